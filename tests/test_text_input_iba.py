"""InputIBA on sentences: parity with the released code, a slow re-derivation, padding that must not matter."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from contracts import FitSamples, PartialInMemory, forbid_global_rng, seeded, untouched
from contracts import close as close_all
from nets import golden
from test_text_iba import ROLES, SENTENCES, ReleasedNoise, released_net, small, state_of, texts
from test_text_iba import reference as reference_iba
from test_wgan import close
from torch import Tensor, nn

from attrib.fit import State
from attrib.methods.iba import IBA
from attrib.methods.input_iba import InputBottleneck, InputIBA
from attrib.methods.parts.inputs import Inputs
from attrib.methods.parts.layout import TextLayout
from attrib.methods.parts.statistics import FeatureStatistics
from attrib.methods.parts.wgan import WGAN, Generators, Trained
from attrib.methods.parts.wgan_text import LSTMCritics, _ends, critic_shapes
from attrib.models import Classifier
from attrib.models.text import BiLSTM, DeepLSTM
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

# ---- parity with the released code ------------------------------------------------------------------


def released_model() -> Classifier:
    return Classifier(released_net(), {"bottleneck": "rnn_1", "embedding": "embedding"})


def released_sentence(i: int) -> list[int]:
    data = golden("deeplstm")
    return data["tokens"][i][: data["lens"][i]].tolist()


def test_critic_equals_the_released_code():
    data = golden("inputiba_nlp")
    steps, _, channels = data["disc_x"].shape
    stream, parameters = np.random.RandomState(int(data["disc_seed"])), {}
    for name, shape in critic_shapes(channels).items():  # the goldens' seeded_fill
        z = stream.randn(*shape).astype(np.float32) * (math.sqrt(2 / shape[1]) if len(shape) > 1 else 0.1)
        parameters[name] = torch.tensor(z, dtype=torch.float32)[None]
    critic = LSTMCritics(parameters, torch.tensor([steps]))
    close(critic(torch.tensor(data["disc_x"]).transpose(0, 1)[None])[0], data["disc_out"][:, 0])


def test_generator_equals_the_released_code():
    data, model, batch = golden("inputiba_nlp"), released_model(), texts([released_sentence(0)])
    inputs = Inputs.of(model, batch)
    features = model.until("bottleneck", batch.x).z
    close(features.transpose(0, 1), data["gen_feature_map_no_noise"])
    places = TextLayout.of(features, batch.mask)
    nats = places.spread(places.bits(torch.tensor(data["gen_capacity"])[None])) * math.log(2)
    generators = Generators(inputs.x, nats.unsqueeze(2).expand_as(inputs.x))
    close(generators.mask().transpose(0, 1), data["gen_input_mask"])
    made = generators(torch.tensor(data["gen_z"]).transpose(0, 1)[None])[0]
    out, _ = model.vjp("bottleneck", made, start=("embedding", batch.x))
    close(out.transpose(0, 1), data["gen_out"], 1e-4)


def test_the_last_stage_equals_the_released_code():
    data, model, batch = golden("inputiba_nlp"), released_model(), texts([released_sentence(0)], [1])
    mask = torch.tensor(data["s0_given_input_mask"]).transpose(0, 1)
    method = InputBottleneck(beta=30.0, lr=0.5, steps=30, sigma=None)
    found = method.optimise(model, Inputs.of(model, batch), mask, ReleasedNoise(3100))
    close(found.alpha.sigmoid().mean(2)[0], data["s0_input_mask"], 1e-3)
    close(found.alpha.transpose(0, 1), data["s0_input_alpha"], 1e-2)
    np.testing.assert_allclose(found.losses["loss_model"][0], data["s0_input_cls_loss"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.losses["loss"][0], data["s0_input_loss"], rtol=1e-3)


@pytest.mark.slow
def test_our_own_noise_agrees_with_the_released_code_over_seeds():
    """Means of five seeds; with the statistics that the released code took (of sentences, padding included)."""
    data, one = golden("inputiba_nlp_full_seeds"), golden("inputiba_nlp")
    state = {name: torch.tensor(one[f"f1_{name}"]) for name in ("mean", "std", "active")}
    method = InputIBA(
        feature=IBA(beta=15.0, sigma=None),
        gan=WGAN(mask_lr=0.03),
        input=InputBottleneck(beta=30.0, steps=30, lr=0.5, sigma=None),
    )
    for i in (0, 1):
        batch = texts([released_sentence(i)] * 5, [1] * 5)
        maps = {k: v.double().numpy() for k, v in method.attribute(
            released_model(), batch, state, Noise(batch.uids)).items()}  # fmt: skip
        # Their feature mask is in nats, our map in bits.
        for ours, theirs, unit in (("input", "input_mask", 1.0), ("feature", "feat_mask", math.log(2))):
            mean, expected = unit * maps[ours].mean(0), data[f"rnn_1_s{i}_{theirs}_mean"]
            assert np.corrcoef(mean, expected)[0, 1] >= 0.9, (i, ours)
            np.testing.assert_allclose(mean.mean(), expected.mean(), rtol=0.15)
        # Theirs is the mean over the tokens, whose own mean is that of all.
        np.testing.assert_allclose(maps["gan"].mean(), data[f"rnn_1_s{i}_gen_input_mask_mean"].mean(), atol=0.05)


# ---- the same, slowly ---------------------------------------------------------------------------------


class Whole:
    """A small DeepLSTM as plain calls: embedded words (N, T, E) to rnn_2, and to logits."""

    def __init__(self) -> None:
        self.net = small()

    def layer(self, z: Tensor) -> Tensor:
        lengths = torch.full((len(z),), z.shape[1])
        return self.net.rnn_2(self.net.rnn_1(z, lengths), lengths)

    def logits(self, z: Tensor) -> Tensor:
        lengths = torch.full((len(z),), z.shape[1])
        return self.net.fc(self.net.rnn_4(self.net.rnn_3(self.layer(z), lengths), lengths)[:, -1])


class PlainCritic(nn.Module):
    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        channels = parameters["rnn.weight_ih"].shape[1]
        self.rnn = nn.LSTM(channels, channels)
        self.output = nn.Sequential(nn.Linear(channels, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
        for p, value in zip(self.double().parameters(), parameters.values(), strict=True):
            assert p.shape == value.shape
            p.data = value.clone()

    def forward(self, z: Tensor) -> Tensor:
        return self.output(self.rnn(z.transpose(0, 1))[1][0][-1])


def reference_gan(
    whole: Whole, x: Tensor, mask: Tensor, alpha: Tensor, parameters: dict[str, Tensor], config: WGAN, noise: Noise
) -> Trained:
    """One sentence: x, alpha (T, E), mask (T, C). The generator is run twice per step, by autograd."""
    z, critic = whole.layer(x[None])[0].detach(), PlainCritic(parameters)
    alpha = alpha.clone().requires_grad_()
    mean, std = (torch.full((len(x), 1), value, dtype=x.dtype, requires_grad=True) for value in (0.0, 1.0))
    groups = {"params": [mean], "lr": config.mean_lr}, {"params": [std], "lr": config.std_lr}
    generator_step = torch.optim.RMSprop([*groups, {"params": [alpha], "lr": config.mask_lr}])
    critic_step = torch.optim.RMSprop(critic.parameters(), lr=config.lr)

    def generate(eps: Tensor) -> Tensor:
        m = torch.sigmoid(alpha)
        return whole.layer(torch.stack([m * x + (1 - m) * (std * e + mean) for e in eps]))

    order, latent, synthetic = (noise.child(name) for name in ("order", "latent", "synthetic"))
    count = math.ceil(config.dataset_size / config.sub_dataset_size)
    stds, means = 5 * synthetic.uniform(count)[0], 4 * synthetic.uniform(count)[0] - 2
    critic_losses, generator_losses = [], []
    for _ in range(config.epochs):
        numbers = order.permutation(config.dataset_size)[0].tolist()
        batches = [numbers[i : i + config.batch] for i in range(0, len(numbers), config.batch)]
        for i, batch in enumerate(batches):
            eps = latent.normal(len(batch), *x.shape, ragged=1)[0]
            draws = synthetic.normal(len(batch), *z.shape, ragged=1)[0]
            rows = []
            for number, draw in zip(batch, draws, strict=True):
                group = number // config.sub_dataset_size
                rows.append(mask * z + (1 - mask) * (stds[group] * draw + means[group]))
            loss = -critic(torch.stack(rows)).mean() + critic(generate(eps).detach()).mean()
            critic_step.zero_grad()
            loss.backward()
            critic_step.step()
            critic_losses.append(loss.item())
            for p in critic.parameters():
                p.data.clamp_(-config.weight_clip, config.weight_clip)
            if i % config.critic_iter == 0:
                generator_step.zero_grad()
                loss = -critic(generate(eps)).mean()
                loss.backward()
                generator_step.step()
                generator_losses.append(loss.item())
    curves = (torch.tensor(losses, dtype=x.dtype) for losses in (critic_losses, generator_losses))
    return Trained(torch.sigmoid(alpha).detach(), mean.detach(), std.detach(), *curves)


def reference_input(
    whole: Whole, x: Tensor, target: Tensor, mask: Tensor, method: InputBottleneck, noise: Noise
) -> tuple[Tensor, Tensor, Tensor]:
    """alpha (T, E) after the last step and both losses: one sentence, one draw at a time."""
    alpha = torch.full_like(x, method.initial_alpha).requires_grad_()
    adam = torch.optim.Adam([alpha], lr=method.lr)
    model_losses, info_losses = [], []
    for _ in range(method.steps):
        lam = torch.sigmoid(alpha)
        losses = []
        for draw in noise.normal(method.batch, *x.shape, ragged=1)[0]:
            z = lam * x + (1 - lam) * (method.std * draw + method.mean)
            losses.append(nn.functional.cross_entropy(whole.logits(z[None]), target[None]))
        p = torch.distributions.Normal(lam * x + (1 - lam) * method.mean, (1 - lam) * method.std)
        q = torch.distributions.Normal(lam * mask * x + (1 - lam * mask) * method.mean, (1 - lam * mask) * method.std)
        info = torch.distributions.kl_divergence(p, q).mean()
        loss = torch.stack(losses).mean()
        adam.zero_grad()
        (loss + method.beta * info).backward()
        adam.step()
        model_losses.append(loss.detach())
        info_losses.append(info.detach())
    return alpha.detach(), torch.stack(model_losses), torch.stack(info_losses)


METHOD = InputIBA(
    feature=IBA(beta=20.0, steps=8, batch=2, sigma=None),
    gan=WGAN(dataset_size=10, sub_dataset_size=4, batch=4, epochs=2, critic_iter=2, weight_clip=0.1, lr=1e-3),
    input=InputBottleneck(beta=0.05, steps=8, batch=3, initial_alpha=1.0, mean=0.1, std=0.8, sigma=None),
)


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.quick("True")
def test_equals_plain_modules_and_optimisers(prior):
    method, whole, batch, seed = dataclasses.replace(METHOD, gan_prior=prior), Whole(), texts(SENTENCES), 3
    model, state = Classifier(whole.net, ROLES, dtype=torch.float64), state_of(whole.net)
    found = method.stages(model, batch, state, Noise(batch.uids, seed, dtype=torch.float64))
    with forbid_global_rng(), untouched(model, batch, state):
        maps = method.attribute(model, batch, state, Noise(batch.uids, seed, dtype=torch.float64))
    agree = partial(torch.testing.assert_close, rtol=0, atol=1e-8)
    for i, ids in enumerate(SENTENCES):
        noise, n = Noise([batch.uids[i]], seed, dtype=torch.float64), len(ids)
        target = batch.target[i]
        bits = reference_iba(whole.net, ids, int(target), state, noise.child("feature"), method.feature)
        agree(maps["feature"][i, :n], bits)
        agree(maps["capacity"][i, :n], bits)

        x, nats = whole.net.embedding(torch.tensor(ids)), found.feature.capacity[i, :n]
        agree(nats.sum(1) / math.log(2), bits)
        streams = noise.child("gan")
        like, mask = whole.layer(x[None]), torch.ones(1, n, dtype=torch.bool)
        initial = LSTMCritics.initial(streams.child("critic"), TextLayout.of(like, mask), like).parameters
        one = {name: value[0] for name, value in initial.items()}
        alpha = (bits * math.log(2))[:, None].expand_as(x)
        gan = reference_gan(whole, x, nats, alpha, one, method.gan, streams)
        assert (gan.mask - alpha.sigmoid()).abs().max() > 1e-3, "the training went nowhere"
        agree(maps["gan"][i, :n], gan.mask.mean(1))
        agree(found.gan.mean[i, :n], gan.mean)
        agree(found.gan.std[i, :n], gan.std)
        agree(maps["loss_critic"][i], gan.critic_loss)
        agree(maps["loss_generator"][i], gan.generator_loss)

        free = gan.mask if prior else torch.zeros_like(x)
        alpha, loss, info = reference_input(whole, x, target, free, method.input, noise.child("input"))
        assert alpha.std() > 0.01, "the optimisation went nowhere"
        agree(maps["input"][i, :n], alpha.sigmoid().mean(1))
        agree(maps["loss_input_model"][i], loss)
        agree(maps["loss_input_info"][i], info)
        agree(maps["loss_input"][i], loss + method.input.beta * info)
    for name in ("input", "gan", "feature", "capacity"):
        assert maps[name].shape == batch.x.shape
        assert not maps[name][~batch.mask].any()


def test_critics_of_a_gpu_equal_the_librarys():
    noise = Noise(["a", "b", "c"], dtype=torch.float64)
    z, lengths = noise.normal(4, 9, 5), torch.tensor([9, 1, 6])
    places = TextLayout(torch.arange(9) < lengths[:, None], torch.ones(3, 9, 1))
    critics = LSTMCritics.initial(noise, places, z[:, 0])
    parameters = critics.parameters
    weights = [value for name, value in parameters.items() if name.startswith("rnn")]
    ends = _ends(z, lengths, *weights)
    for i, n in enumerate(lengths.tolist()):
        critic = PlainCritic({name: value[i] for name, value in parameters.items()})
        torch.testing.assert_close(ends[i], critic.rnn(z[i, :, :n].transpose(0, 1))[1][0][0])
        torch.testing.assert_close(critics(z)[i], critic(z[i, :, :n])[:, 0])
    assert ends.std() > 0.01
    vector = LSTMCritics.initial(noise, TextLayout(places.mask, None), z[:, 0, 0])
    torch.testing.assert_close(vector(z[:, :, 0]), LSTMCritics(vector.parameters, torch.ones(3).long())(z[:, :, :1]))


def test_initial_critics():
    noise, like = Noise(["a", "b"], dtype=torch.float64), torch.zeros(2, 3, 25, dtype=torch.float64)
    p = LSTMCritics.initial(noise, TextLayout.of(like, torch.ones(2, 3, dtype=torch.bool)), like).parameters
    assert [*p] == [*critic_shapes(25)]
    for name, value in p.items():
        bound = 1 / math.sqrt(128 if name.startswith("linear2") else 25)
        assert value.abs().max() <= bound
        assert value.numel() < 9 or value.abs().max() > 0.9 * bound
    np.testing.assert_allclose(p["rnn.weight_hh"].std(), 0.2 / math.sqrt(3), rtol=0.05)
    assert not torch.equal(p["linear1.weight"][0], p["linear1.weight"][1])


# ---- the way from the embedding to the layer --------------------------------------------------------


@pytest.mark.parametrize("rows", [64, 5, 1])
@pytest.mark.parametrize("keep", [True, False])
def test_the_way_back_ends_at_the_embedding(rows, keep):
    whole, ids = Whole(), torch.tensor([[5, 9, 12], [30, 2, 8]])
    model = Classifier(whole.net, ROLES, dtype=torch.float64, rows=rows)
    noise = Noise(["z"], dtype=torch.float64)
    z, grad = noise.normal(8, 3, 6)[0].requires_grad_(), noise.normal(8, 3, 5)[0]
    expected = whole.layer(z)
    with untouched(model, ids):
        found, back = model.vjp("rnn_2", z.detach(), keep=keep, start=("embedding", ids))
        pulled = back(grad)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(pulled, torch.autograd.grad(expected, z, grad)[0])
    assert not found.requires_grad


def test_nothing_behind_the_layer_is_computed():
    model, ids = Classifier(small(), ROLES, dtype=torch.float64), torch.tensor([[5, 9, 12]])
    z, calls = model.until("embedding", ids).z, []
    model.module.rnn_3.register_forward_hook(lambda *_: calls.append(1))
    model.vjp("rnn_2", z, start=("embedding", ids))[1](torch.ones(1, 3, 5).double())
    model.vjp("embedding", torch.ones(1, 3, 6).double(), start=("embedding", ids))
    assert len(calls) == 0


def test_a_layer_in_front_of_the_embedding():
    model = Classifier(small(), ROLES | {"front": "embedding", "embedding": "rnn_1"}, dtype=torch.float64)
    with pytest.raises(UserError, match="layer embedding of DeepLSTM does not read what rnn_1 gives"):
        model.vjp("front", torch.ones(1, 3, 5).double(), start=("embedding", torch.tensor([[5, 9, 12]])))


# ---- padding, other nets ----------------------------------------------------------------------------


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from attrib.models import HuggingFaceClassifier

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=24, pad_token_id=1, num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng():
        net = transformers.BertForSequenceClassification(config)
    return seeded(HuggingFaceClassifier(net, pad_id=1, mask_id=0), 0.5)


NETS = {
    "deep_lstm": (small, "rnn_2", "embedding"),
    "words": (small, "embedding", "embedding"),
    "wide": (lambda: seeded(DeepLSTM(50, 11, 4, num_classes=3, pad_id=1), 1.0), "rnn_1", "embedding"),
    "both_ways": (lambda: seeded(BiLSTM(50, 6, 4, num_classes=3, pad_id=1, pooling="mean"), 1.0), "rnn", "embedding"),
    "vector": (lambda: seeded(BiLSTM(50, 6, 4, num_classes=3, pad_id=1), 1.0), "fc", "embedding"),
    "bert": (bert, "net.bert.encoder.layer.0", "net.bert.embeddings.word_embeddings"),
}


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.quick("both_ways", "vector")
def test_padding_and_company_do_not_matter(kind):
    build, layer, embedding = NETS[kind]
    net, batch = build(), texts(SENTENCES)

    def model(rows: int = 64) -> Classifier:
        return Classifier(net, {"bottleneck": layer, "embedding": embedding}, dtype=torch.float64, rows=rows)

    fitted = FeatureStatistics("bottleneck").run(model(), FitSamples(batch, 2), PartialInMemory(), lambda _: None)
    state = {name: value.double() for name, value in fitted.items()}

    def explain(batch: Batch, rows: int = 64) -> dict[str, Tensor]:
        with untouched(used := model(rows), batch, state):
            return dict(METHOD.attribute(used, batch, state, Noise(batch.uids, 3, dtype=torch.float64)))

    whole = explain(batch)
    tokens = [name for name, value in whole.items() if value.shape == batch.x.shape]
    assert {"input", "gan", "feature"} <= {*tokens}
    for name in ("input", "gan", "feature"):
        assert not whole[name][~batch.mask].any()
        assert all(row[row != 0].numel() == len(ids) for row, ids in zip(whole[name], SENTENCES))
    assert whole["input"][0].std() > 0
    wide = explain(texts(SENTENCES, width=19))
    for name in tokens:
        assert not wide[name][:, 7:].any()
        wide[name] = wide[name][:, :7]
    close_all(wide, whole, 1e-9)
    close_all(explain(batch, rows=3), whole, 1e-9)
    for i, ids in enumerate(SENTENCES):
        alone = texts([ids], [int(batch.target[i])])
        one = explain(dataclasses.replace(alone, uids=(batch.uids[i],)))
        cut = {k: v[i : i + 1, : len(ids)] if k in tokens else v[i : i + 1] for k, v in whole.items()}
        close_all(one, cut, 1e-9)


# ---- meaning, edges ---------------------------------------------------------------------------------


class Reader(nn.Module):
    """A net that reads one word of many: logit = +-8 or so for the ids 2 and 3, whatever the others are."""

    pad_id, mask_id = 1, 0

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(20, 4), nn.Linear(4, 4)
        self.embedding.weight.data = torch.tensor(np.random.RandomState(0).randn(20, 4)) * 0.7
        self.embedding.weight.data[:, 0] = 0.0
        self.embedding.weight.data[2:4, 0] = torch.tensor([3.0, -3.0])
        self.layer.weight.data, self.layer.bias.data = torch.eye(4), torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        read = (self.layer(self.embedding(x)) * (x != 1).unsqueeze(2))[:, :, :1].sum(1)
        return torch.cat((read, -read), 1)


def reader() -> tuple[Classifier, Batch, State]:
    rows = [[5, 6, 2, 7, 8, 9], [3, 10, 11], [12, 13, 14, 15, 2], [16, 17, 3, 18]]
    batch = texts(rows, [0, 1, 0, 1])
    model = Classifier(Reader().double(), {"embedding": "embedding", "bottleneck": "layer"}, dtype=torch.float64)
    state = FeatureStatistics("bottleneck").run(model, FitSamples(batch, 4), PartialInMemory(), lambda _: None)
    return model, batch, {k: v.double() for k, v in state.items()}


def test_the_word_that_decides_is_found():
    model, batch, state = reader()
    method = dataclasses.replace(
        METHOD, feature=IBA(beta=1.0, steps=20, sigma=None), input=InputBottleneck(beta=1.0, lr=0.5, sigma=None)
    )
    maps = method.attribute(model, batch, state, Noise(batch.uids, dtype=torch.float64))
    for i, ids in enumerate(batch.x.tolist()):
        decides = next(j for j, word in enumerate(ids) if word in (2, 3))
        assert maps["input"][i].argmax() == decides
        assert maps["feature"][i].argmax() == decides
        assert (maps["gan"][i, batch.mask[i]] > 0.4).all()
    assert (maps["loss_input"][:, -1] < maps["loss_input"][:, 0]).all()


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("feature bottleneck", {"feature": IBA(lr=1e308, steps=3, batch=2, sigma=None)}),
        ("GAN", {"gan": dataclasses.replace(METHOD.gan, mean_lr=1e308)}),
        ("input bottleneck", {"input": InputBottleneck(lr=1e308, steps=3, batch=2)}),
    ],
)
def test_a_stage_that_diverges_is_named(stage, change):
    model, batch, state = reader()
    with untouched(model, batch, state), pytest.raises(SampleError, match=f"^s/0: the {stage} diverged"):
        dataclasses.replace(METHOD, **change).attribute(model, batch, state, Noise(batch.uids, dtype=torch.float64))


def test_the_embedding_must_have_a_vector_per_token():
    model = Classifier(small(), ROLES | {"embedding": "fc"}, dtype=torch.float64)
    batch = texts(SENTENCES)
    with pytest.raises(UserError, match=r"model\.layers\.embedding: fc gives \(4, 3\)"):
        METHOD.attribute(model, batch, state_of(small()), Noise(batch.uids, dtype=torch.float64))
