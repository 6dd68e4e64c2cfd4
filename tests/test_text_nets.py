"""Recurrent nets: padding changes nothing, every layer counts, and the goldens' weights give the goldens' numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from nets import golden
from torch import Tensor, nn

from attrib.models import AcdLSTM, BiLSTM, Classifier, DeepLSTM, Recurrent
from attrib.models.split import GraphSplit
from attrib.models.text import last_step, real_tokens
from attrib.types import UserError

PAD = 1
WORDS, LENGTHS = 40, (7, 1, 4, 12, 0, 9)  # the fifth is a row of padding only


def bilstm(pooling: str, **options) -> Callable[[], nn.Module]:
    return lambda: BiLSTM(WORDS, 8, 6, 3, pooling=pooling, **options)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "deep": (lambda: DeepLSTM(WORDS, 8, 6), ("embedding", "rnn_1", "rnn_2", "rnn_3", "rnn_4")),
    "deep, 2 layers each, 5 classes": (
        lambda: DeepLSTM(WORDS, 8, 6, 5, n_layers=2),
        ("embedding", "rnn_1", "rnn_2", "rnn_3", "rnn_4"),
    ),
    "bilstm last": (bilstm("last"), ("embedding", "rnn")),
    "bilstm mean": (bilstm("mean"), ("embedding", "rnn")),
    "bilstm max, 2 layers": (bilstm("max", n_layers=2), ("embedding", "rnn")),
    "acd": (lambda: AcdLSTM(WORDS, 8, 6), ("embed", "lstm")),
}


def net(name: str) -> nn.Module:
    """Large weights, so that differences are seen; the row of <pad> as random as the others."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = NETS[name][0]()
        for value in made.parameters():
            nn.init.normal_(value, 0.0, 0.6)
    return made.double().eval()


def sentences() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    x = torch.full((len(LENGTHS), max(LENGTHS)), PAD)
    for row, n in zip(x, LENGTHS):
        row[:n] = torch.randint(2, WORDS, (n,), generator=generator)
    return x


def classifier(name: str, rows: int = 64) -> Classifier:
    return Classifier(net(name), {path: path for path in NETS[name][1]}, rows=rows, dtype=torch.float64)


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# A slow LSTM, from its equations (Hochreiter & Schmidhuber 1997, with forget gates) -----------------


def slow_direction(z: list[Tensor], weights: dict[str, Tensor], suffix: str) -> list[Tensor]:
    """One sentence through one layer in one direction: (E,) per step -> (H,) per step."""
    w_input, w_state = weights[f"weight_ih_{suffix}"], weights[f"weight_hh_{suffix}"]
    bias = weights[f"bias_ih_{suffix}"] + weights[f"bias_hh_{suffix}"]
    size = w_state.shape[1]
    state, cell, out = torch.zeros(size).double(), torch.zeros(size).double(), []
    for step in z:
        gates = w_input @ step + w_state @ state + bias
        enter, forget, new, leave = (gates[k * size : (k + 1) * size] for k in range(4))
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        state = torch.sigmoid(leave) * torch.tanh(cell)
        out.append(state)
    return out


def slow_recurrent(z: Tensor, module: nn.LSTM) -> Tensor:
    """One sentence without padding, (T, E) -> (T, H)."""
    weights, steps = dict(module.named_parameters()), list(z)
    for layer in range(module.num_layers):
        out = slow_direction(steps, weights, f"l{layer}")
        if module.bidirectional:
            back = slow_direction(steps[::-1], weights, f"l{layer}_reverse")[::-1]
            out = [torch.cat(pair) for pair in zip(out, back)]
        steps = out
    return torch.stack(steps)


def slow_logits(module: nn.Module, ids: list[int]) -> Tensor:
    """One sentence without padding -> (K,)."""
    if isinstance(module, DeepLSTM):
        z = module.embedding.weight[ids]
        for rnn in (module.rnn_1, module.rnn_2, module.rnn_3, module.rnn_4):
            z = slow_recurrent(z, rnn)
        score = module.fc.weight @ z[-1] + module.fc.bias
        if len(score) > 1:
            return score
        p = torch.sigmoid(score[0])
        return torch.stack(((1 - p).log(), p.log())) - 0.5 * ((1 - p).log() + p.log())
    if isinstance(module, AcdLSTM):
        z = slow_recurrent(module.embed.weight[ids], module.lstm)
        return module.hidden_to_label.weight @ z[-1] + module.hidden_to_label.bias
    z = slow_recurrent(module.embedding.weight[ids], module.rnn)
    half = z.shape[1] // 2
    pooled = {
        "last": torch.cat((z[-1, :half], z[0, half:])),
        "mean": sum(z) / len(z),
        "max": torch.stack([max(column) for column in z.T]),
    }[module.pooling]
    return module.fc.weight @ pooled + module.fc.bias


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_logits_are_those_of_the_equations(name):
    module, x = net(name), sentences()
    logits = module(x)
    for row, ids, n in zip(logits, x.tolist(), LENGTHS):
        close(row, slow_logits(module, ids[: max(n, 1)]), 1e-10)
    assert logits.std(0).min() > 0.02  # sentences differ


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_a_padded_batch_equals_single_sentences(name):
    module, x = net(name), sentences()
    logits = module(x)
    for row, ids, n in zip(logits, x, LENGTHS):
        close(module(ids[None, : max(n, 1)])[0], row)
    close(module(torch.cat((x, torch.full((len(x), 5), PAD)), 1)), logits)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    close(module(x[order]), logits[order])
    close(module(x[[4, 4, 0]]), logits[[4, 4, 0]])


@pytest.mark.parametrize("name", NETS)
def test_padding_has_no_gradient_and_no_say(name):
    made, x = classifier(name), sentences()
    front = made.until("embed" if name == "acd" else "embedding", x)
    role = next(iter(made.roles.named))
    real = torch.arange(x.shape[1]) < torch.tensor([max(n, 1) for n in LENGTHS])[:, None]
    other = front.z.clone()
    other[~real] = 7.0
    close(made.after(role, other, front.rest), made.logits(x))
    _, gradient = made.gradient(front.z, lambda out, _: out[:, 1], role, front.rest)
    assert gradient[~real].abs().max() == 0
    assert gradient[real].abs().amax(1).min() > 0


def test_real_tokens():
    x = torch.tensor([[5, 6, 7], [5, 1, 7], [5, 6, 1], [1, 1, 1], [1, 6, 1]])
    assert real_tokens(x, PAD).tolist() == [
        [True, True, True],
        [True, True, True],  # in the middle it is a word like any other
        [True, True, False],
        [True, False, False],
        [True, True, False],
    ]
    z = torch.arange(15.0).reshape(5, 3, 1)
    assert last_step(z, real_tokens(x, PAD).sum(1))[:, 0].tolist() == [2, 5, 7, 9, 13]


# The layer ------------------------------------------------------------------------------------------


def recurrent(**options) -> Recurrent:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Recurrent(5, 4, **options)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}, {"num_layers": 2, "dropout": 0.3}])
def test_recurrent(options):
    module = recurrent(**options).double().eval()
    plain = nn.LSTM(5, 4, batch_first=True, **options).double()
    assert list(module.state_dict()) == list(plain.state_dict())
    z, lengths = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(2)).double(), torch.tensor([6, 2, 0, 4])
    out = module(z, lengths)
    for row, steps, n in zip(out, z, lengths.clamp(min=1).tolist()):
        close(row[:n], slow_recurrent(steps[:n], module))
        assert (row[n:] == 0).all()
    with torch.no_grad():
        close(module(z, lengths), out)
    copied = copy.deepcopy(module)
    close(copied(z, lengths), out)
    assert copied._flat_weights[0] is copied.weight_ih_l0
    assert copied.weight_ih_l0 is not module.weight_ih_l0
    assert module.float()(z.float(), lengths).dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}])
def test_gradients_are_right(options):
    module = recurrent(**options).double().eval()
    z, lengths = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2)).double(), torch.tensor([4, 1, 3])
    assert torch.autograd.gradcheck(lambda z: module(z, lengths), z.requires_grad_())


# Roles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_every_role_is_cut_by_graph_and_reaches_the_logits(name):
    made, x = classifier(name, rows=4), sentences()
    expected = net(name)(x).detach()
    for role in made.roles.named:
        z, rest = made.until(role, x)
        assert isinstance(made._splits[role], GraphSplit)
        assert z.shape[:2] == x.shape
        close(made.after(role, z, rest), expected)
        many = z.repeat_interleave(3, 0)
        close(made.after(role, many, rest), expected.repeat_interleave(3, 0))
        for k in range(expected.shape[1]):
            _, gradient = made.gradient(z, lambda out, _, k=k: out.softmax(1)[:, k], role, rest)
            assert gradient.flatten(1).abs().amax(1).min() > 0
            leaf = z.clone().requires_grad_()
            out = made.rear(role)(leaf, *rest)  # not in pieces of 4 rows
            close(gradient, torch.autograd.grad(out.softmax(1)[:, k].sum(), leaf)[0])


def test_a_bottleneck_at_rnn_4_sees_one_word_and_one_at_rnn_1_all():
    """Why configs/model/deep_lstm.yaml has its bottleneck at rnn_1."""
    made, x = classifier("deep"), sentences()
    steps = {}
    for role in ("rnn_1", "rnn_4"):
        z, rest = made.until(role, x)
        _, gradient = made.gradient(z, lambda out, _: out[:, 1], role, rest)
        steps[role] = (gradient.abs().amax(2) > 0).sum(1).tolist()
    assert steps == {"rnn_1": [max(n, 1) for n in LENGTHS], "rnn_4": [1] * len(LENGTHS)}


def test_a_net_from_outside_is_cut_at_its_lstm():
    """The class of torch, and a subclass that returns its output alone."""

    class Sequence(nn.GRU):
        def forward(self, z):
            if z.sum() > 1e9:  # tracing into it would fail
                return None
            return super().forward(z)[0]

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.rnn, self.fc = nn.Embedding(9, 4), Sequence(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(self.rnn(self.words(x)).mean(1))

    x = torch.tensor([[1, 2, 3], [4, 5, 6]])
    made = Classifier(Own(), {"words": "words", "rnn": "rnn"}, dtype=torch.float64)
    for role in made.roles.named:
        z, rest = made.until(role, x)
        assert isinstance(made._splits[role], GraphSplit)
        close(made.after(role, z, rest), made.logits(x))


# Building -------------------------------------------------------------------------------------------


def test_sizes_and_special_ids():
    deep = DeepLSTM(60, 10, 24, n_layers=2, pad_id=5, mask_id=7)
    assert (deep.pad_id, deep.mask_id, deep.embedding.padding_idx) == (5, 7, 5)
    assert [getattr(deep, f"rnn_{i}").num_layers for i in (1, 2, 3, 4)] == [2] * 4
    assert [getattr(deep, f"rnn_{i}").input_size for i in (1, 2, 3, 4)] == [10, 24, 24, 24]
    x = torch.tensor([[2, 3]])
    assert deep(x).shape == (1, 2)
    assert DeepLSTM(60, 10, 24, num_classes=3)(x).shape == (1, 3)
    assert BiLSTM(60, num_classes=4)(x).shape == AcdLSTM(60, num_classes=4)(x).shape == (1, 4)
    assert (DeepLSTM(60).pad_id, BiLSTM(60).mask_id, AcdLSTM(60).pad_id) == (1, 0, 1)


def test_two_classes_in_one_score():
    """The softmax of the two logits is the sigmoid of the score, and both classes have a gradient."""
    module = net("deep")
    logits = module(sentences())
    score = logits[:, 1] - logits[:, 0]
    close(logits.softmax(1)[:, 1], torch.sigmoid(score))
    close(logits.sum(1), torch.zeros(len(logits)).double())
    close(
        nn.functional.cross_entropy(logits, torch.ones(len(logits), dtype=torch.long)),
        nn.functional.binary_cross_entropy_with_logits(score, torch.ones_like(score)),
    )


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"model\.pooling must be last, mean or max, not 'sum'"):
        BiLSTM(9, pooling="sum")
    for kind in (DeepLSTM, BiLSTM, AcdLSTM):
        with pytest.raises(UserError, match=r"model\.num_classes must be at least 2, not 1"):
            kind(9, num_classes=1)


@pytest.mark.parametrize("name", ["deep", "bilstm mean", "acd"])
def test_it_learns(name):
    """Training mode, dropout included: whether a word occurs is learnt, and padding keeps its zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = NETS[name][0]()
        x = torch.randint(4, WORDS, (64, 6))
        y = torch.arange(64) % 2
        x[y == 1, 3] = 2
        x[::3, 4:] = PAD
        optimizer = torch.optim.Adam(module.parameters(), 0.02)
        for _ in range(60):
            loss = nn.functional.cross_entropy(module(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert (module.eval()(x).argmax(1) == y).float().mean() > 0.9
    table = module.get_submodule(NETS[name][1][0])
    assert (table.weight[PAD] == 0).all()


# Parity ---------------------------------------------------------------------------------------------


def state(name: str, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.tensor(v) for k, v in golden(name).items() if k.startswith(prefix)}


def input_iba_net() -> DeepLSTM:
    vocabulary, embedding, hidden, layers = golden("deeplstm")["hyper"].tolist()
    made = DeepLSTM(vocabulary, embedding, hidden, n_layers=layers)
    made.load_state_dict(state("deeplstm", "sd."))
    return made.eval()


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("sentence", [0, 1])
def test_input_iba_net_under_partly_deleted_words(sentence, step):
    """Its probabilities with the embeddings of the most important words, or of all others, set to zero."""
    stored = golden("metric_nlp")
    tokens, heat = torch.tensor(stored[f"s{sentence}_tokens"])[None], stored[f"s{sentence}_heatmap"]
    made = Classifier(input_iba_net(), {"embedding": "embedding"})
    z, rest = made.until("embedding", tokens)
    order = np.argsort(-heat)[: int(0.4 * len(heat))]  # where the original stops
    for number in range(len(stored[f"s{sentence}_pb{step}_t1_del_scores"])):
        first = torch.zeros(len(heat), dtype=torch.bool)
        first[order[: (number + 1) * step]] = True
        for change, kept in (("del", ~first), ("ins", first)):
            probability = made.after("embedding", z * kept[None, :, None], rest).softmax(1)[0]
            for target in (0, 1):
                expected = stored[f"s{sentence}_pb{step}_t{target}_{change}_scores"][number]
                assert probability[target].item() == pytest.approx(expected, abs=1e-5)


def test_input_iba_tokens_batch_with_their_padding():
    stored, module = golden("deeplstm"), input_iba_net().double()
    tokens = torch.tensor(stored["tokens"])
    assert real_tokens(tokens, module.pad_id).sum(1).tolist() == stored["lens"].tolist()
    for ids, n, logits in zip(tokens, stored["lens"], module(tokens)):
        close(module(ids[None, :n])[0], logits)
        close(slow_logits(module, ids[:n].tolist()), logits, 1e-10)


@pytest.mark.parametrize(("kind", "sentences"), [("small", (0, 1, 3)), ("rand", (0,))])
def test_acd_net(kind, sentences):
    stored, weights = golden("cd_text"), state("cd_text", f"sd_{kind}.")
    module = AcdLSTM(*weights["embed.weight"].shape, weights["lstm.weight_hh_l0"].shape[1])
    module.load_state_dict(weights)
    bias = weights["hidden_to_label.bias"]
    for i in sentences:
        logits = module.eval()(torch.tensor(stored[f"{kind}_s{i}_tokens"])[None])[0].detach()
        close(logits, torch.tensor(stored[f"{kind}_s{i}_logits"]), 1e-5)
        close(logits - bias, torch.tensor(stored[f"{kind}_s{i}_logits_minus_bias"]), 1e-5)
        whole = stored[f"{kind}_s{i}_rel"] + stored[f"{kind}_s{i}_irrel"]
        close((logits - bias).double().expand(len(whole), -1), torch.tensor(whole), 1e-5)
