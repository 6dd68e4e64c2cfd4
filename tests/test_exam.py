"""The admission exam: nets that are random, mix the rows of a batch, see padding, or come in another form."""

from __future__ import annotations

import dataclasses
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from text_nets import MeanEmbedding
from torch import Tensor, nn

import attrib
from attrib import keys
from attrib.experiment.samples import Samples
from attrib.methods.baselines import Gradient
from attrib.methods.cam import GradCAM
from attrib.models import Classifier, Exam, admission
from attrib.models.exam import examine
from attrib.noise import Noise
from attrib.types import Batch, UserError

SHAPE = (2, 6, 6)
ON_LOADING_OR_LATER = pytest.mark.parametrize("shape", [SHAPE, None])


def pictures(n: int = 3) -> Batch:
    uids = tuple(f"p{i}" for i in range(n))
    x = Noise(uids, dtype=torch.float64).normal(*SHAPE)
    return Batch(uids, x, torch.arange(n) % 3)


def explained(net: nn.Module, shape: tuple[int, ...] | None, **options) -> Tensor:
    batch = pictures()
    model = Classifier(net, {"cam": "conv"}, dtype=torch.float64, input_shape=shape, **options)
    return Gradient().attribute(model, batch, {}, Noise(batch.uids))["map"]


class Net(nn.Module):
    """A small net; subclasses do something with its features (N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 8, 3), nn.Linear(8, 3)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(Noise([name]).normal(*parameter.shape)[0])

    def features(self, z: Tensor) -> Tensor:
        return z

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(F.relu(self.conv(x)).mean((2, 3))))


# Random nets ------------------------------------------------------------------------------------


class Dropout(Net):
    def features(self, z: Tensor) -> Tensor:
        return F.dropout(z, 0.5)


class RareDropout(Net):
    """Nine in ten runs are equal, and most exams would see nothing but that."""

    def features(self, z: Tensor) -> Tensor:
        return F.dropout(z, 0.01)


class Jitter(Net):
    def features(self, z: Tensor) -> Tensor:
        return z + 0.01 * torch.randn_like(z)


class DropPath(Net):
    def features(self, z: Tensor) -> Tensor:
        return z if torch.rand(()) < 0.99 else z * 0


class OfPython(Net):
    def features(self, z: Tensor) -> Tensor:
        return z if random.random() < 0.999 else z * 0


class OfPythonsWhole(Net):
    def features(self, z: Tensor) -> Tensor:
        return z if random.randint(0, 999) else z * 0


class OfNumpy(Net):
    def features(self, z: Tensor) -> Tensor:
        return z if np.random.rand() < 0.999 else z * 0


class OfNumpysNormal(Net):
    """A polar method, which draws again until a point is in the circle."""

    def features(self, z: Tensor) -> Tensor:
        return z + 1e-3 * float(np.random.normal()) * z


@ON_LOADING_OR_LATER
@pytest.mark.parametrize(
    "kind", [Dropout, RareDropout, Jitter, DropPath, OfPython, OfPythonsWhole, OfNumpy, OfNumpysNormal]
)
def test_a_net_that_is_random_in_eval_mode_is_refused(kind, shape):
    net, before, python, numpy = kind(), torch.get_rng_state(), random.getstate(), np.random.get_state()
    with pytest.raises(UserError, match=rf"random in eval mode.*forward of {kind.__name__} itself, before head"):
        explained(net, shape)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    assert all(map(np.array_equal, np.random.get_state(), numpy))


def test_a_net_may_draw_what_it_does_not_use():
    """As some of Hugging Face do, to decide what to skip in training."""

    class Skipping(Net):
        def features(self, z: Tensor) -> Tensor:
            drawn = random.random(), np.random.uniform(0, 1), torch.rand(()).item()
            return z * 0 if self.training and min(drawn) < 0.5 else z

    assert torch.equal(explained(Skipping(), SHAPE), explained(Net(), SHAPE))


# Nets that return probabilities -----------------------------------------------------------------


class Softmax(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class Divided(Net):
    """A softmax, written out."""

    def forward(self, x: Tensor) -> Tensor:
        e = super().forward(x).exp()
        return e / e.sum(1, keepdim=True)


class Sigmoids(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


class SigmoidsInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid_().view(len(x), 3, 1).squeeze(2)


class Clamped(Net):
    """As before a binary cross-entropy."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid().clamp(1e-6, 1 - 1e-6)


@ON_LOADING_OR_LATER
@pytest.mark.parametrize("kind", [Softmax, Divided, Sigmoids, SigmoidsInPlace])
@pytest.mark.parametrize("rows", [1, 8])
def test_probabilities_are_not_taken_for_logits(kind, shape, rows):
    link = "softmax" if kind in (Softmax, Divided) else "sigmoid"
    with pytest.raises(UserError, match=rf"{kind.__name__} returns probabilities.*without its last {link}"):
        explained(kind(), shape, rows=rows)
    output = {"read": "probabilities", "link": link}
    torch.testing.assert_close(explained(kind(), shape, rows=rows, output=output), explained_as(link, shape))


def test_clamped_probabilities_are_not_taken_for_logits():
    with pytest.raises(UserError, match=r"Clamped returns probabilities.*without its last sigmoid"):
        explained(Clamped(), SHAPE)


def explained_as(link: str, shape: tuple[int, ...] | None) -> Tensor:
    """Of the net without its last layer; the softmax has taken a number off all logits of a row."""

    class Centred(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log_softmax(1)

    return explained(Net() if link == "sigmoid" else Centred(), shape)


LIKELY = [lambda z: z.relu(), lambda z: 0.2 + 0.1 * z.tanh(), lambda z: z.sigmoid() - 0.01]


@pytest.mark.parametrize("last", LIKELY)
def test_logits_that_look_a_bit_like_probabilities_are_logits(last):
    class Likely(Net):
        def forward(self, x: Tensor) -> Tensor:
            return last(super().forward(x))

    assert explained(Likely(), SHAPE).isfinite().all()


def test_the_module_that_is_random_is_named():
    class Always(nn.Dropout):
        def forward(self, z: Tensor) -> Tensor:
            return F.dropout(z, 0.3)

    class Inside(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(nn.Linear(8, 8), Always(), nn.Linear(8, 8))

        def features(self, z: Tensor) -> Tensor:
            return self.blocks(z)

    net = Inside()
    with pytest.raises(UserError, match=r"first in blocks\.1 \(Always\)"):
        explained(net, SHAPE)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_net_that_remembers_is_refused():
    class Counting(Net):
        runs = 0

        def features(self, z: Tensor) -> Tensor:
            self.runs += 1
            return z * self.runs

    with pytest.raises(UserError, match=r"Counting is not deterministic.*keeps something from run to run"):
        explained(Counting(), None)


def test_a_net_that_draws_what_it_does_not_use_is_right():
    class Drawing(Net):
        def features(self, z: Tensor) -> Tensor:
            drop = torch.rand(()) < 0.5  # as Wav2Vec2's encoder does
            return z * 0 if drop and self.training else F.dropout(z, 0.5, self.training)

    assert torch.equal(explained(Drawing(), SHAPE), explained(Net(), SHAPE))


# Rows that interact -----------------------------------------------------------------------------


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def features(self, z: Tensor) -> Tensor:
        return self.norm(torch.stack((z, z * z), 2))[..., 0]


class Centred(Net):
    def features(self, z: Tensor) -> Tensor:
        return z - 0.1 * z.mean(0)


class Attending(Net):
    """Attention over the batch: batch_first forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def features(self, z: Tensor) -> Tensor:
        return z + self.attention(*[z[:, None]] * 3)[0][:, 0]


class Ranked(Net):
    def features(self, z: Tensor) -> Tensor:
        return z * (z.norm(dim=1, keepdim=True) == z.norm(dim=1).max())


@ON_LOADING_OR_LATER
@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (Normed, r"norm \(BatchNorm1d\).*track_running_stats"),
        (Centred, "the forward of Centred itself, before head"),
        (Attending, r"attention \(MultiheadAttention\)"),
        (Ranked, "the forward of Ranked itself, before head"),
    ],
)
def test_a_net_whose_rows_interact_is_refused(kind, where, shape):
    with pytest.raises(UserError, match=f"rows of a batch interact in {kind.__name__}: .*first in .*{where}"):
        explained(kind(), shape)


def test_one_row_at_a_time_nothing_interacts():
    class Alone(Net):
        def features(self, z: Tensor) -> Tensor:
            return z - 0.1 * z

    model = Classifier(Centred(), rows=1, dtype=torch.float64, input_shape=SHAPE)
    right = Classifier(Alone(), dtype=torch.float64, input_shape=SHAPE)
    x = pictures().x
    torch.testing.assert_close(model.logits(x), right.logits(x))
    assert model.exam.together is None
    model.rows = 2
    with pytest.raises(UserError, match="interact"):
        model.logits(x)


def test_a_net_for_one_row_is_refused():
    class One(Net):
        def features(self, z: Tensor) -> Tensor:
            return z.reshape(1, 8)

    with pytest.raises(UserError, match="One takes one sample alone, but not two together"):
        explained(One(), SHAPE)


def test_a_right_net_passes_with_the_same_numbers_and_key():
    net, batch = Net().double(), pictures()
    x = batch.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).gather(1, batch.target[:, None]).sum(), x)
    model = Classifier(net, dtype=torch.float64, input_shape=SHAPE)
    assert model.exam.on == "noise"
    assert model.exam.again == 0
    assert model.key == keys.digest("Net", {}, keys.tensor_digest(net.state_dict()))
    found = Gradient().attribute(model, batch, {}, Noise(batch.uids))["map"]
    torch.testing.assert_close(found, gradient.sum(1))
    assert model.exam.on == "samples"
    assert max(model.exam.again, model.exam.together) < 1e-12
    assert model.exam.padding is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.exam.again = 1.0


def test_samples_that_come_one_by_one_are_examined_as_two():
    model, x = Classifier(Net(), dtype=torch.float64), pictures().x
    model.logits(x[:1])
    assert model.exam.on == "sample"
    model.logits(x[:1])
    assert model.exam.on == "sample"
    model.logits(x[1:2])
    assert model.exam.on == "samples"
    before = model.exam
    model.logits(x)
    assert model.exam is before


# Texts and padding ------------------------------------------------------------------------------

PAD, IDS, WIDTH = 0, 11, 6


class Words(nn.Module):
    """Texts (N, T) of ids; subclasses read their vectors (N, T, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.pad_id, self.mask_id = PAD, 1
        self.embedding, self.head = nn.Embedding(IDS, WIDTH), nn.Linear(WIDTH, 3)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(Noise([name]).normal(*parameter.shape)[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.embedding(x), x != self.pad_id))


class Mean(Words):
    """Sees no padding."""

    def read(self, z: Tensor, real: Tensor) -> Tensor:
        return (z * real[..., None]).sum(1) / real.sum(1, keepdim=True)


class MeanOfAll(Words):
    def read(self, z: Tensor, real: Tensor) -> Tensor:
        return z.mean(1)


class Last(Words):
    def read(self, z: Tensor, real: Tensor) -> Tensor:
        return self.rnn(z)[0][:, -1]


class Mixed(Words):
    """As FNet does."""

    def read(self, z: Tensor, real: Tensor) -> Tensor:
        return torch.fft.fft2(z).real[:, 0]


class Convolved(Words):
    """As ConvBERT does: padding is seen by the tokens beside it."""

    def read(self, z: Tensor, real: Tensor) -> Tensor:
        return (self.conv(z.mT).mT * real[..., None]).sum(1)


SEEING = [MeanOfAll, Last, Mixed, Convolved]
TEXTS = [[3, 5, 7, 2, 9], [4, 8], [6, 2, 10, 3, 5, 9, 7], [2, 2], [5]]


class Texts:
    """A dataset of texts, as much of one as ``Samples`` asks for."""

    uids = tuple(f"t{i}" for i in range(len(TEXTS)))

    def batch(self, uids) -> Batch:
        rows = [TEXTS[self.uids.index(uid)] for uid in uids]
        lengths = torch.tensor([len(row) for row in rows])
        x = torch.tensor([row + [PAD] * (int(lengths.max()) - len(row)) for row in rows])
        words = torch.arange(x.shape[1]).expand_as(x).where(torch.arange(x.shape[1]) < lengths[:, None], -1)
        return Batch(tuple(uids), x, torch.arange(len(rows)) % 3, lengths=lengths, words=words)


def alone(net: Words, row: list[int], target: int) -> tuple[Tensor, Tensor]:
    """A text's logits and its map of the gradient, straight from the net."""
    z = net.embedding(torch.tensor([row])).detach().requires_grad_()
    logits = net.head(net.read(z, torch.ones(1, len(row), dtype=torch.bool)))
    (grad,) = torch.autograd.grad(logits[0, target], z)
    return logits[0].detach(), grad[0].sum(-1)


def text_model(kind: type[Words]) -> tuple[Words, Classifier]:
    net = kind().double().eval()
    return net, Classifier(net, {"embedding": "embedding"}, dtype=torch.float64)


@pytest.mark.parametrize("kind", [Mean, *SEEING])
def test_a_text_has_the_same_numbers_in_any_batch(kind):
    net, model = text_model(kind)
    samples = Samples(Texts(), model, Texts.uids, batch=len(TEXTS))
    logits = model.logits(Texts().batch(Texts.uids).x)
    done = []
    for batch in samples:
        maps = Gradient().attribute(model, batch, {}, Noise(batch.uids))["map"]
        if kind is not Mean:
            assert (batch.lengths == batch.x.shape[1]).all()
        for i, uid in enumerate(batch.uids):
            row = TEXTS[Texts.uids.index(uid)]
            expected, map = alone(net, row, int(batch.target[i]))
            torch.testing.assert_close(logits[Texts.uids.index(uid)], expected)
            torch.testing.assert_close(maps[i, : len(row)], map)
        done += batch.uids
    assert sorted(done) == sorted(Texts.uids)
    assert (model.exam.padding > 1e-4) == (kind is not Mean)


@pytest.mark.parametrize("kind", SEEING)
def test_layers_of_texts_with_padding_are_refused_where_it_is_seen(kind):
    _net, model = text_model(kind)
    batch = Texts().batch(Texts.uids)
    with pytest.raises(UserError, match=f"{kind.__name__} sees the padding of texts"):
        Gradient().attribute(model, batch, {}, Noise(batch.uids))


class Stops(Words):
    def read(self, z: Tensor, real: Tensor) -> Tensor:
        return (z.detach() * real[..., None]).sum(1)


def test_a_text_net_without_a_way_back_to_its_embedding_is_refused():
    _net, model = text_model(Stops)
    batch = Texts().batch(Texts.uids)
    with pytest.raises(UserError, match=r"no gradient comes from the scores of Stops to its input .of a text: its emb"):
        Gradient().attribute(model, batch, {}, Noise(batch.uids))


def test_padding_that_only_the_dataset_knows():
    class Secret(MeanOfAll):
        def __init__(self) -> None:
            super().__init__()
            del self.pad_id

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x).mean(1))

    net, model = text_model(Secret)
    for batch in Samples(Texts(), model, Texts.uids, batch=len(TEXTS)):
        assert (batch.lengths == batch.x.shape[1]).all()
        expected = [alone(net, TEXTS[Texts.uids.index(uid)], 0)[0] for uid in batch.uids]
        torch.testing.assert_close(model.logits(batch.x), torch.stack(expected))


def test_a_net_that_takes_texts_of_one_length_only_gets_no_padding():
    class Fixed(Words):
        def read(self, z: Tensor, real: Tensor) -> Tensor:
            return z.reshape(-1, 4, WIDTH)[: len(z)].mean(1) if z.shape[1] == 4 else 1 / 0

    _, model = text_model(Fixed)
    model.logits(torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]]))
    assert model.exam.padding == float("inf")


# Forms of nets ----------------------------------------------------------------------------------


def plain() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(Noise([name]).normal(*parameter.shape)[0])
    return net


@pytest.mark.parametrize(
    ("wrapped", "path"),
    [
        (lambda: torch.compile(plain(), backend="eager"), "_orig_mod.1"),
        (lambda: nn.DataParallel(plain()), "module.1"),
        (lambda: nn.DataParallel(torch.compile(plain(), backend="eager")), "module._orig_mod.1"),
    ],
)
def test_a_net_in_a_wrapping_is_the_net(wrapped, path):
    batch, right = pictures(), Classifier(plain(), {"cam": "1"}, input_shape=SHAPE, dtype=torch.float64)
    for where in ("1", path):
        model = Classifier(wrapped(), {"cam": where}, input_shape=SHAPE, dtype=torch.float64)
        assert (model.key, model.roles.named, model.weights) == (right.key, right.roles.named, right.weights)
        found, wanted = (GradCAM().attribute(m, batch, {}, Noise(batch.uids))["map"] for m in (model, right))
        assert torch.equal(found, wanted)


def test_a_compiled_part_is_part_of_the_net():
    net = plain()
    net[1] = torch.compile(nn.Sequential(nn.ReLU()), backend="eager")
    model = Classifier(net, {"cam": "1._orig_mod.0"}, input_shape=SHAPE, dtype=torch.float64)
    assert model.roles.named == {"cam": "1.0"}
    assert torch.equal(model.until("cam", pictures().x).z, net[0].double()(pictures().x).relu())


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (lambda: torch.jit.script(plain()), "TorchScript"),
        (lambda: torch.jit.trace(plain(), torch.zeros(1, *SHAPE)), "TorchScript"),
        (
            lambda: torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}, dtype=torch.qint8),
            r"3\S* \(LinearPackedParams\) keeps .* quantised",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), r"1 \(LazyLinear\) has no weights yet"),
        (lambda: torch.export.export(plain(), (torch.zeros(2, *SHAPE),)).module(), "cannot be"),
        (lambda: torch.export.export(plain(), (torch.zeros(2, *SHAPE),)), "a net is a torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_other_forms_are_refused_with_a_sentence(net, why):
    with pytest.raises(UserError, match=why):
        Classifier(net(), {"cam": "1"}, input_shape=SHAPE)


def test_a_net_that_cannot_be_copied():
    net = plain()
    net.lock = threading.Lock()
    with pytest.raises(UserError, match="Sequential cannot be copied"):
        Classifier(net, input_shape=SHAPE)


def test_the_exam_is_plain():
    assert keys.spec(dataclasses.asdict(Exam("samples", 0.0, 1e-7, float("inf"))))["padding"] == "inf"


@pytest.mark.parametrize("texts", [[[4, 5, 6], [7, 8]], [[4, 5], [4, 5], [7, 8, 9]], [[4, 5, 6]]])
def test_a_text_net_is_tried_on_two_texts_at_once(texts, monkeypatch):
    """It was tried on the first one alone before, and again."""
    tried: list[str] = []

    def counted(net, output, x, on, *more):
        tried.append(on)
        return examine(net, output, x, on, *more)

    monkeypatch.setattr(admission, "examine", counted)
    found = attrib.explain(MeanEmbedding(), [torch.tensor(text) for text in texts], method="gradient", target=0)
    assert len(found) == len(texts)
    assert tried[-1] == ("samples" if len(texts) > 1 else "sample")
    assert len(tried) == (2 if len(texts) == 3 else 1)  # where the first two are equal, there is nothing but to go on


# ---- decisions for a whole batch ------------------------------------------------------------------


class DoubledIfLarge(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        if bool(z.max() > 1e3):
            z = 2 * z
        return z


class Decides(nn.Module):
    """Two samples of the exam may well lie on one side of what it asks."""

    def __init__(self, how, limit=0.3):
        super().__init__()
        self.how, self.limit = how, limit
        self.conv, self.head = nn.Conv2d(SHAPE[0], 4, 3), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        if how == "script":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.scripted = torch.jit.script(DoubledIfLarge())

    def forward(self, x):
        z = self.conv(x)
        if self.how == "branch" and x.mean() > self.limit:
            z = 2 * z
        elif self.how == "float":
            z = z * (1 + float((z > 1e3).any()))
        elif self.how == "buffer":
            large = torch.zeros_like(z)
            large[z > 1e3] = 1
            z = z + sum(large.flatten().tolist())
        elif self.how == "part":  # of a tensor that knows nothing of the sample
            canvas = torch.zeros(len(z), 5, *z.shape[2:], dtype=z.dtype)
            canvas[:, :4] = z
            z = z * 2 if canvas.max() > 1e3 else z
        elif self.how == "script":
            z = self.scripted(z)
        elif self.how == "slice":
            z = z[:, :, : 1 + (z.mean() > 1e3).long()]
        elif self.how == "index":
            z = z * (1 + (z > 1e3).long().flatten()[z.sum((1, 2, 3)).argmax()])
        elif self.how == "in":
            z = z * (2 if 1e3 in z else 1)
        elif self.how == "weight":
            z = z * float(self.scale)
        elif self.how == "like":
            z = z * int(torch.ones_like(z[:1, 0, 0, :1]).sum()) * float(z.new_ones(1))
        elif self.how == "one_hot":  # torch reads whether there is a class below 0
            z = z * F.one_hot(z.mean((2, 3)).argmax(1), 4)[:, :, None, None]
        elif self.how == "size" and len(x) > 100:
            z = 2 * z
        return self.head(z.mean((2, 3)))


@pytest.mark.parametrize("shape", [None, SHAPE])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("how", ["branch", "float", "buffer", "part", "script", "slice", "index", "in"])
def test_a_net_that_may_decide_for_a_whole_batch_gets_one_sample_at_a_time(how, alike, shape, caplog):
    torch.manual_seed(0)
    model = Classifier(Decides(how).double(), input_shape=shape, dtype=torch.float64, rows=8)
    sizes = torch.tensor([1, 1, 0.1, 0.1, 1, 1 if alike else 0.1])  # the exam tries the first and the last
    x = torch.rand(6, *SHAPE, dtype=torch.float64) * sizes[:, None, None, None]
    alone = torch.cat([model.module(one[None]) for one in x])
    assert torch.equal(model.logits(x), alone)
    values, _ = model.gradient(x, lambda logits, _: logits[:, 0])
    assert torch.equal(values, alone[:, 0])
    assert model.rows == 1
    assert caplog.text.count("Decides reads numbers of its samples") == 1


@pytest.mark.parametrize("how", ["weight", "size", "like", "one_hot", "nothing"])
def test_what_is_known_without_the_samples_decides_nothing(how, caplog):
    model = Classifier(Decides(how).double(), input_shape=SHAPE, dtype=torch.float64, rows=8)
    model.logits(torch.rand(6, *SHAPE, dtype=torch.float64))
    assert model.rows == 8
    assert not caplog.text


class DecidesForTexts(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.embedding, self.head = how, nn.Embedding(30, 4), nn.Linear(4, 3)

    def forward(self, ids):
        mask, z = ids != 1, self.embedding(ids)
        if self.how == "mask" and not mask.all():  # as many of transformers' nets do
            z = z * mask[..., None]
        elif self.how == "length":
            z = z[:, : int(mask.sum(1).max())]
        elif self.how == "numbers" and z.mean() > 100:
            z = 2 * z
        elif self.how == "one_hot":
            z = F.linear(F.one_hot(ids, 30).to(z), self.embedding.weight.t())
            z = 2 * z if z.mean() > 100 else z
        return self.head((z * mask[: len(z), : z.shape[1], None]).sum(1))


@pytest.mark.parametrize(("how", "rows"), [("mask", 8), ("length", 8), ("numbers", 1), ("one_hot", 1)])
def test_of_texts_places_may_be_read_and_numbers_not(how, rows):
    model = Classifier(DecidesForTexts(how).double(), dtype=torch.float64, rows=8)
    model.logits(torch.tensor([[4, 5, 6], [7, 8, 9], [10, 11, 12]]))
    assert model.rows == rows
