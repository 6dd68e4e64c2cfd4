"""Classifier: a private frozen copy, and the one place where rows are cut into chunks."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from contracts import forbid_global_rng
from nets import SmallCNN, small_cnn
from torch import Tensor, nn

from attrib.methods.baselines import Gradient
from attrib.methods.cam import GradCAM, ScoreCAM
from attrib.methods.cd import CD
from attrib.models import Classifier
from attrib.models.layers import hooked
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError
from attrib.units import Partition

LAYERS = {"bottleneck": "features.5", "embedding": "pool"}


def model(rows: int = 64, dtype: torch.dtype = torch.float64, **options) -> Classifier:
    return Classifier(small_cnn(), LAYERS, rows=rows, dtype=dtype, **options)


def images(n: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, *(shape or (3, 32, 32)), generator=generator, dtype=torch.float64)


# A private copy ---------------------------------------------------------------------------------


class Tied(nn.Module):
    """One activation at two paths, one convolution and one weight at two paths, a shared norm without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first = nn.Sequential(self.conv, self.norm, self.act)
        self.second = nn.Sequential(self.conv, self.norm, self.act)
        self.plain = nn.Sequential(nn.Sequential(nn.ReLU6(inplace=True), nn.Hardswish(inplace=True)), nn.Identity())
        self.again = self.plain
        self.down = nn.Linear(3, 5, bias=False)
        self.up = nn.Linear(3, 5, bias=False)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.second(self.plain(self.first(x)))).mean((2, 3))
        return self.down(x) + self.up(x) ** 2


def test_the_given_module_is_left_alone():
    net = Tied().train()
    net.norm.running_mean.add_(0.3)
    net.conv.weight.requires_grad_(False)
    calls = []
    net.first.register_forward_hook(lambda *_: calls.append(None))
    state = copy.deepcopy(net.state_dict())
    modules = dict(net.named_modules(remove_duplicate=False))
    made = Classifier(net, {"a": "first"}, dtype=torch.float64, input_shape=(3, 8, 8))
    made.logits(images(2, 3, 8, 8))
    made.until("a", images(2, 3, 8, 8))
    assert all(m.training for m in net.modules())
    assert [p.requires_grad for p in net.parameters()] == [False, True, True]
    assert net.act.inplace
    assert net.plain[0][0].inplace
    assert all(torch.equal(v, state[k]) and v.dtype == state[k].dtype for k, v in net.state_dict().items())
    after = dict(net.named_modules(remove_duplicate=False))
    assert after.keys() == modules.keys()
    assert all(after[k] is modules[k] for k in modules)
    assert [len(m._forward_hooks) for m in net.modules()].count(1) == 1


def test_the_copy_is_frozen_and_shares_nothing():
    net = Tied().train()
    made = Classifier(net, dtype=torch.float64)
    assert not any(m.training for m in made.module.modules())
    assert not any(p.requires_grad for p in made.module.parameters())
    assert all(v.dtype == torch.float64 for v in made.module.state_dict().values() if v.is_floating_point())
    assert not any(getattr(m, "inplace", False) for m in made.module.modules())
    x = images(2, 3, 8, 8)
    before = made.logits(x)
    with torch.no_grad():
        net.conv.weight.zero_()
    assert torch.equal(made.logits(x), before)


def test_shared_activations_are_separated_and_tied_weights_stay_tied():
    net = Tied()
    made = Classifier(net, input_shape=(3, 8, 8), dtype=torch.float64)
    m = made.module
    assert m.first[2] is not m.second[2]
    assert m.plain is not m.again
    assert m.plain[0][0] is not m.again[0][0]
    assert m.first[0] is m.second[0]
    assert m.up.weight is m.down.weight
    x = images(4, 3, 8, 8)
    torch.testing.assert_close(made.logits(x), net.double().eval()(x.clone()))


def test_a_layer_under_its_second_name():
    """The path exists, though the same module has another name as well."""
    with pytest.raises(UserError, match="runs 2 times"):
        Classifier(Tied(), {"a": "second.0"}, dtype=torch.float64).until("a", images(1, 3, 8, 8))
    Classifier(Tied(), {"a": "second"}, dtype=torch.float64).until("a", images(1, 3, 8, 8))


def test_a_net_that_relies_on_in_place_is_refused():
    class Relies(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

        def forward(self, x):
            self.act(x)
            return self.head(x)

    with pytest.raises(UserError, match="Relies relies on in-place operations"):
        Classifier(Relies(), input_shape=(4,))


@pytest.mark.parametrize(
    "output", [lambda x: (x, x), lambda x: {"logits": x}, lambda x: x[:, 0], lambda x: x[..., None]]
)
def test_what_is_no_classifier_is_refused(output):
    class Odd(nn.Linear):
        def forward(self, x):
            return output(super().forward(x))

    with pytest.raises(UserError, match=r"Odd returns .*; a classifier returns a tensor \(N, K\)"):
        Classifier(Odd(4, 3), input_shape=(4,))


def test_preparation_draws_no_global_random_numbers():
    net, x = small_cnn(), images(1)
    with forbid_global_rng():
        Classifier(net, LAYERS, dtype=torch.float64, input_shape=(3, 32, 32)).until("bottleneck", x)


def test_inputs_are_never_changed():
    """A net may write into what it is given; the caller's tensors are the caller's."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer, self.head = nn.Identity(), nn.Conv2d(3, 3, 1), nn.Linear(3, 4)

        def forward(self, x):
            x.mul_(2)
            x = self.layer(self.stem(x))
            x.mul_(3)
            x += 1
            return self.head(F.relu(x, inplace=True).mean((2, 3)))

    class Hidden(Writes):
        def forward(self, x):
            if x.shape[0] > 10**9:  # cannot be traced
                return None
            return super().forward(x)

    for kind in (Writes, Hidden):
        made = Classifier(kind(), {"layer": "layer"}, dtype=torch.float64)
        x, keep = images(3, 3, 4, 4), images(3, 3, 4, 4)
        expected = made.logits(x)
        z, rest = made.until("layer", x)
        kept = z.clone()
        for _ in range(2):
            torch.testing.assert_close(made.after("layer", z, rest), expected)
        _, through = made.gradient(z, lambda out, _: out[:, 1], "layer", rest)
        _, whole = made.gradient(x, lambda out, _: out[:, 1])
        torch.testing.assert_close(
            whole, 2 * torch.einsum("nohw,oi->nihw", through, made.module.layer.weight[..., 0, 0])
        )
        made.record(["layer"], x)
        assert torch.equal(x, keep)
        assert torch.equal(z, kept)


# Layers and roles -------------------------------------------------------------------------------


def test_a_wrong_layer_lists_near_names():
    with pytest.raises(
        UserError, match=r"model\.layers\.bottleneck: SmallCNN has no layer 'feature\.5'; did you mean 'features\.5'"
    ):
        Classifier(SmallCNN(), {"bottleneck": "feature.5"})
    with pytest.raises(UserError, match=r"no layer .* \(its upper layers: features, .*pool, classifier"):
        Classifier(SmallCNN(), {"bottleneck": "~~~"})
    with pytest.raises(UserError, match="has no layer ''"):
        Classifier(SmallCNN(), {"bottleneck": ""})


def test_an_unknown_role():
    made = model()
    for call in (made.roles.path, made.roles.layer, lambda role: made.until(role, images(1))):
        with pytest.raises(
            UserError,
            match=r"no layer for the role 'middle' \(only: bottleneck, embedding\); set model\.layers\.middle",
        ):
            call("middle")
    with pytest.raises(UserError, match=r"\(only: none\)"):
        Classifier(SmallCNN()).roles.path("middle")
    assert made.roles.path("bottleneck") == "features.5"
    assert made.roles.layer("bottleneck") is made.module.features[5]


def test_rows_must_be_positive():
    with pytest.raises(UserError, match=r"run\.rows must be at least 1, or auto, not 0"):
        Classifier(SmallCNN(), rows=0)


# Rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_rows_change_nothing(rows):
    whole, made, x = model(1000), model(rows), images(7)
    expected = small_cnn().double()(x).detach()
    torch.testing.assert_close(made.logits(x), expected, rtol=0, atol=1e-12)
    assert made.passed == 7
    front, front_whole = made.until("bottleneck", x), whole.until("bottleneck", x)
    torch.testing.assert_close(front.z, front_whole.z, rtol=0, atol=1e-12)
    assert made.passed == 14
    z = front.z.repeat_interleave(3, 0) + 0.1 * images(21, *front.z.shape[1:])
    logits = made.after("bottleneck", z, front.rest)
    torch.testing.assert_close(logits, whole.after("bottleneck", z, front.rest), rtol=0, atol=1e-12)
    assert made.passed == 35

    weight = images(21, 10)

    def objective(out, rows):
        return (out * weight[rows]).sum(1)

    values, grad = made.gradient(z, objective, "bottleneck", front.rest)
    values_whole, grad_whole = whole.gradient(z, objective, "bottleneck", front.rest)
    torch.testing.assert_close(values, (logits * weight).sum(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(values, values_whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad, grad_whole, rtol=0, atol=1e-12)
    leaf = x.clone().requires_grad_()
    (small_cnn().double()(leaf) * weight[:7]).sum().backward()
    values, grad = made.gradient(x, objective)
    torch.testing.assert_close(grad, leaf.grad, rtol=0, atol=1e-12)
    assert not any(t.requires_grad for t in (logits, values, grad, front.z))


class Untraceable(nn.Module):
    """Cut by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2 if x.shape[0] > 10**9 else x
        return self.head(self.layer(x * x).mean((2, 3)))


@pytest.mark.parametrize("net", [small_cnn().double(), Untraceable().double()], ids=["graph", "hooks"])
@pytest.mark.parametrize(
    ("rows", "keep", "front_rows"), [(64, True, [7]), (64, False, [7, 7]), (3, True, [3, 3, 1, 3, 3, 1])]
)
def test_the_way_back_through_the_front(net, rows, keep, front_rows):
    """Once with the graph of the forward pass where that is allowed, else the front runs again."""
    path = "features.5" if isinstance(net, SmallCNN) else "layer"
    made, x, seen = Classifier(net, {"layer": path}, rows=rows, dtype=torch.float64), images(7), []
    z = made.until("layer", x).z
    made.roles.layer("layer").register_forward_hook(lambda _m, _i, out: seen.append(len(out)))
    made.passed = 0
    found, back = made.vjp("layer", x, keep)
    torch.testing.assert_close(found, z, rtol=0, atol=1e-12)
    direction = images(*z.shape)
    grad = back(direction)
    assert seen == front_rows
    assert made.passed == sum(seen)
    assert not any(t.requires_grad for t in (found, grad))
    leaf, caught = x.clone().requires_grad_(), []
    with hooked(net.get_submodule(path), lambda _m, _i, out: caught.append(out)):
        net(leaf)
    (caught[0] * direction).sum().backward()
    torch.testing.assert_close(grad, leaf.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(back(direction), grad, rtol=0, atol=1e-12)  # again: what was kept is used up


def test_a_front_without_gradients():
    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.head = nn.Identity(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.steps((x > 0).to(x)))

    model, x = Classifier(Rounds(), {"bottleneck": "steps"}), torch.randn(2, 4)
    _, back = model.vjp("bottleneck", x, keep=False)
    with pytest.raises(UserError, match="no gradient flows from steps to the input"):
        back(torch.ones(2, 4))


def test_a_kept_graph_is_not_used_for_less_than_all_rows():
    made, x = model(), images(4)
    z, back = made.vjp("bottleneck", x)
    direction = images(*z.shape)
    made.rows = 2  # memory ran out meanwhile
    expected = model(rows=2).vjp("bottleneck", x)[1](direction)
    torch.testing.assert_close(back(direction), expected, rtol=0, atol=1e-12)


def test_chunks_have_at_most_rows_and_at_least_one_item():
    made, sizes = model(rows=10), []

    def piece(rows):
        sizes.append(rows.stop - rows.start)
        part = torch.arange(rows.start, rows.stop)
        return part, part[:, None] * 2.0

    for cost, expected in ((1, [10, 10, 3]), (3, [3] * 7 + [2]), (10, [1] * 23), (99, [1] * 23)):
        sizes.clear()
        made.passed = 0
        one, two = made.chunked(piece, 23, cost)
        assert sizes == expected
        assert one.tolist() == list(range(23))
        assert two[:, 0].tolist() == [2.0 * i for i in range(23)]
        assert made.passed == 23 * cost
    with pytest.raises(ValueError, match="no rows"):
        made.chunked(piece, 0)


def test_rest_must_fit_the_rows():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x + self.layer(x))

    made = Classifier(Residual(), {"layer": "layer"}, dtype=torch.float64)
    x = images(2, 4)
    z, rest = made.until("layer", x)
    assert len(rest) == 1
    for n in (1, 3):
        with pytest.raises(ValueError, match=f"{n} rows cannot be shared out evenly among 2 samples"):
            made.after("layer", images(n, 4), rest)
    torch.testing.assert_close(made.after("layer", z, rest), made.logits(x))


def test_after_before_until():
    with pytest.raises(RuntimeError, match="call until"):
        model().after("bottleneck", images(1))


# Memory -----------------------------------------------------------------------------------------


class Hungry(nn.Module):
    """Fails above ``limit`` rows, as an allocator does."""

    def __init__(self, limit: int, error: BaseException) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.limit, self.error, self.seen = limit, error, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) > self.limit:
            raise self.error
        return self.head(self.layer(x))


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY, ids=lambda e: type(e).__name__)
def test_out_of_memory_halves_rows_for_good(error, caplog):
    made = Classifier(Hungry(3, error), rows=64, dtype=torch.float64)
    x = images(20, 4)
    with caplog.at_level(logging.WARNING):
        logits = made.logits(x)
    torch.testing.assert_close(logits, made.module.head(made.module.layer(x)))
    assert made.module.seen == [20, 10, 5] + [2] * 10
    assert made.rows == 2
    assert made.passed == 20  # what failed is no work done
    assert [r.getMessage() for r in caplog.records] == [
        f"out of memory; going on with run.rows={n}" for n in (10, 5, 2)
    ]
    made.gradient(x, lambda out, _: out[:, 0])
    assert max(made.module.seen[13:]) == 2
    assert made.passed == 40


@pytest.mark.parametrize("error", MEMORY, ids=lambda e: type(e).__name__)
def test_out_of_memory_with_one_row_fails_the_sample(error):
    made = Classifier(Hungry(0, error), rows=4, dtype=torch.float64)
    with pytest.raises(SampleError, match=f"even with one row at a time: {'MemoryError' if not str(error) else ''}"):
        made.logits(images(5, 4))
    assert made.passed == 0
    made.module.limit = 9
    assert made.logits(images(5, 4)).shape == (5, 3)


def test_an_item_that_cannot_be_cut_fails_at_once_and_slows_nothing():
    made, tried = model(rows=16), []

    def piece(rows):
        tried.append(rows.stop - rows.start)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SampleError, match="even with one sample at a time: CUDA out of memory"):
        made.chunked(piece, 5, cost=50)
    assert tried == [1]
    assert made.rows == 16


def test_out_of_memory_in_the_middle_keeps_what_is_done():
    made, done, failed = model(rows=8), [], []

    def piece(rows):
        if rows.start == 8 and not failed:
            failed.append(rows)
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append((rows.start, rows.stop))
        return torch.arange(rows.start, rows.stop)

    assert made.chunked(piece, 20).tolist() == list(range(20))
    assert done == [(0, 8), (8, 12), (12, 16), (16, 20)]
    assert made.passed == 20


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("x"), KeyboardInterrupt()])
def test_other_errors_are_not_swallowed(error):
    made = Classifier(Hungry(0, error), rows=4)
    with pytest.raises(type(error)):
        made.logits(torch.zeros(5, 4))
    assert made.rows == 4
    assert made.module.seen == ([] if isinstance(error, KeyboardInterrupt) else [4])  # it ends the exam already


# The key ----------------------------------------------------------------------------------------


def test_key():
    net = small_cnn()

    def key(module=net, **options):
        return Classifier(module, **options).key

    same = [
        key(),
        key(rows=1),
        key(dtype=torch.float64),
        key(layers=LAYERS),
        key(input_shape=(3, 32, 32)),
        key(spec={}),
    ]
    same.append(key(copy.deepcopy(net).train().requires_grad_(False)))
    assert len(set(same)) == 1

    changed = copy.deepcopy(net)
    changed.classifier[3].bias.data[0] += 1e-6

    class Other(SmallCNN):
        pass

    other = Other()
    other.load_state_dict(net.state_dict())
    keys = [same[0], key(changed), key(other), key(spec={"arch": "x"}), key(spec={"arch": "y"}), key(net.double())]
    assert len(set(keys)) == len(keys)
    assert key(spec={"a": 1, "b": [2]}) == key(spec={"b": [2], "a": 1})


class Ends(nn.Module):
    """A net whose scores have a dtype of their own."""

    def __init__(self, dtype):
        super().__init__()
        self.conv, self.fc, self.dtype = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), dtype

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3))).to(self.dtype)


@pytest.mark.parametrize(("dtype", "ends"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_scores_are_in_the_dtype_of_the_classifier(dtype, ends):
    torch.manual_seed(0)
    net, x = Ends(ends), torch.rand(2, 3, 6, 6, dtype=dtype)
    model, plain = (Classifier(n, {"cam": "conv"}, dtype=dtype) for n in (net, copy.deepcopy(net)))
    plain.module.dtype = dtype
    front = model.until("cam", x)
    assert model.logits(x).dtype == model.after("cam", front.z, front.rest).dtype == dtype
    batch = Batch(("a", "b"), x, torch.tensor([0, 1]))
    for method in (ScoreCAM(), CD(units=Partition(side=2))):
        noise = Noise(batch.uids, 0, dtype=dtype)
        found, expected = (method.attribute(m, batch, {}, noise)["map"] for m in (model, plain))
        assert expected.abs().max() > 0
        assert torch.allclose(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


class InPlaceOnParts(nn.Module):
    """Autograd refuses the ReLU when it is called, not on the way back."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        z = self.conv(x)
        torch.relu_(z.chunk(2, 1)[1])
        return self.fc(z.mean((2, 3)))


@pytest.mark.parametrize("layers", [{}, {"cam": "conv"}])
def test_where_autograd_refuses_the_way_forward_gradients_are_refused(layers):
    x = torch.rand(2, 3, 6, 6)
    model, batch = Classifier(InPlaceOnParts(), layers), Batch(("a", "b"), x, torch.tensor([0, 1]))
    model.logits(x)
    for method in (Gradient(), GradCAM()):
        with pytest.raises(UserError, match=r"no gradient comes from the scores of InPlaceOnParts .*modified inplace"):
            method.attribute(model, batch, {}, None)


class OneByOne(nn.Module):
    """Runs a layer for each row of a batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.cat([self.conv(row[None]).relu().mean((2, 3)) for row in x]))


def test_a_layer_that_runs_for_each_row_is_refused():
    x = torch.rand(2, 3, 8, 8)
    model = Classifier(OneByOne(), {"cam": "conv"})
    model.examine(x)
    with pytest.raises(UserError, match=r"conv of OneByOne gives \(1, 4, 8, 8\) for \d+ samples, which is not one row"):
        model.roles.reading("cam", (3, 8, 8))
    with pytest.raises(UserError, match="no layer that could be taken by default"):
        Classifier(OneByOne(), input_shape=(3, 8, 8)).roles.path("cam")


class _NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x


@pytest.mark.parametrize(
    "stops", [torch.no_grad()(lambda z: 2 * z), _NoWayBack.apply, lambda z: torch.from_numpy(z.detach().numpy())]
)
def test_where_autograd_cannot_go_back_gradients_are_refused(stops):
    class Stopped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(stops(self.conv(x)).mean((2, 3)))

    model, x = Classifier(Stopped(), {"cam": "conv"}), torch.rand(2, 3, 6, 6)
    batch = Batch(("a", "b"), x, torch.tensor([0, 1]))
    model.examine(x)
    for method in (Gradient(), GradCAM()):
        with pytest.raises(UserError, match="no gradient comes from the scores of Stopped to its input"):
            method.attribute(model, batch, {}, None)
