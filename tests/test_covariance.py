"""Covariance of the data: estimation, factors, and what it is given the rest."""

from __future__ import annotations

import dataclasses

import nets
import numpy as np
import pytest
import torch
from contracts import FitSamples, PartialInMemory, close, fit_contract
from text_nets import text_classifier, texts
from torch import Tensor, nn

from attrib.config.objects import build
from attrib.keys import spec
from attrib.methods.parts import covariance as module
from attrib.methods.parts.covariance import Covariance
from attrib.methods.parts.covariance_moments import CoMoments, Sketch
from attrib.methods.parts.covariance_operators import Dense, Groups, LowRank
from attrib.methods.parts.inputs import Inputs
from attrib.models import Classifier
from attrib.types import Batch, SampleError, UserError

FITTED = ("scalar", "channels", "diagonal", "matrix", "stack", "full", "low_rank", "auto")
OF_TEXTS = ("scalar", "places", "channels", "diagonal", "matrix", "stack", "low_rank", "auto")
SHAPE = (2, 3, 2)


def data(n: int, shape: tuple[int, ...] = SHAPE, seed: int = 0, rank: int | None = None) -> Batch:
    """Correlated numbers with means far from 0, of two classes in turn."""
    r = np.random.RandomState(seed)
    features = int(np.prod(shape))
    x = r.randn(n, rank or features) @ r.randn(rank or features, features) + 10 * r.randn(features)
    return Batch(tuple(f"{seed}/{i}" for i in range(n)), torch.tensor(x).view(n, *shape), torch.arange(n) % 2 * 5)


def classifier(rows: int = 64, dtype: torch.dtype = torch.float64) -> Classifier:
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), rows=rows, dtype=dtype)


def fitted(covariance: Covariance, batch: Batch, size: int = 4, model: Classifier | None = None) -> dict[str, Tensor]:
    return covariance.run(model or classifier(), FitSamples(batch, size), PartialInMemory(), lambda line: None)


def operator(covariance: Covariance, state: dict[str, Tensor], batch: Batch):
    found = covariance.of(batch, Inputs.of(classifier(), batch), state)
    return lambda v: found.apply(v, torch.arange(len(batch))), lambda v: found.sample(v, torch.arange(len(batch)))


def as_matrix(act, shape: tuple[int, ...]) -> Tensor:
    """(D, D) of a linear map of (1, N, *x)."""
    features = int(np.prod(shape))
    return act(torch.eye(features).double().view(1, features, *shape))[0].reshape(features, features).T


def expected(kind: str, x: Tensor) -> Tensor:
    """(D, D) from all data (n, C, *places) at once."""
    c, places = x.shape[1], x[0, 0].numel()
    features = c * places
    full = np.cov(x.flatten(1).numpy(), rowvar=False)
    each = [np.cov(x[:, k].flatten(1).numpy(), rowvar=False) for k in range(c)]
    variance = x.flatten(1).var(0)
    found = {
        "scalar": lambda: variance.mean() * torch.eye(features),
        "channels": lambda: torch.diag(variance.view(c, -1).mean(1).repeat_interleave(places)),
        "diagonal": lambda: torch.diag(variance),
        "matrix": lambda: torch.block_diag(*[torch.tensor(sum(each) / c)] * c),
        "stack": lambda: torch.block_diag(*map(torch.tensor, each)),
        "full": lambda: torch.tensor(full),
    }[kind]()
    return found.double()


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("per_class", [False, True])
def test_the_contract_of_a_fit(kind, per_class):
    fit_contract(Covariance(kind, per_class=per_class, rank=2), classifier, data(11))


@pytest.mark.parametrize("kind", OF_TEXTS)
def test_the_contract_of_a_fit_on_texts(kind):
    for net in ("lstm", "mean"):
        fit_contract(Covariance(kind, rank=2), text_classifier(net), texts(10))


@pytest.mark.parametrize("kind", ["scalar", "channels", "diagonal", "matrix", "stack", "full", "low_rank"])
def test_estimates_are_those_of_all_data_at_once(kind):
    batch = data(40)
    covariance = Covariance(kind, jitter=1e-9, rank=12)
    state = fitted(covariance, batch)
    apply, sample = operator(covariance, state, batch[[0]])
    matrix, root = as_matrix(apply, SHAPE), as_matrix(sample, SHAPE)
    truth = expected("full" if kind == "low_rank" else kind, batch.x)
    torch.testing.assert_close(matrix, truth, rtol=1e-6, atol=1e-6 * truth.abs().max().item())
    torch.testing.assert_close(root @ root.T, matrix, rtol=1e-9, atol=1e-9 * truth.abs().max().item())
    assert state["n"].tolist() == [40]


def test_per_class_about_its_own_mean():
    batch = data(40)
    moved = dataclasses.replace(batch, x=batch.x + 100 * batch.target.view(-1, 1, 1, 1))
    covariance = Covariance("full", per_class=True, jitter=1e-9)
    state = fitted(covariance, moved)
    assert state["classes"].tolist() == [0, 5]
    apply, _ = operator(covariance, state, moved[[1, 0, 3]])
    v = torch.tensor(np.random.RandomState(0).randn(3, 4, *SHAPE))
    found = apply(v)
    for i, target in enumerate((5, 0, 5)):
        truth = expected("full", batch.x[batch.target == target])
        torch.testing.assert_close(found[i].flatten(1), v[i].flatten(1) @ truth, rtol=1e-6, atol=1e-6)


def test_texts_count_real_tokens():
    batch, model = texts(8), text_classifier("mean")(64, torch.float64)
    covariance = Covariance("matrix", jitter=0.0)
    state = fitted(covariance, batch, model=model)
    tokens = model.module.embedding(batch.x)[batch.mask]
    torch.testing.assert_close(state["covariance"][0, 0], torch.tensor(np.cov(tokens.numpy(), rowvar=False)))
    assert state["n"].item() == batch.lengths.sum()
    for kind, truth in (("channels", tokens.var(0)), ("scalar", tokens.var(0).mean())):
        state = fitted(Covariance(kind, jitter=0.0), batch, model=model)
        torch.testing.assert_close(state["variance"][0], truth)


def test_each_sample_s_own_variance():
    batch = data(3)
    ones = torch.ones(3, 1, *SHAPE).double()
    apply, sample = operator(Covariance("sample"), {}, batch)
    truth = batch.x.flatten(1).var(1).view(3, 1, 1, 1, 1).expand_as(ones)
    torch.testing.assert_close(apply(ones), truth)
    torch.testing.assert_close(sample(ones), truth.sqrt())
    apply, _ = operator(Covariance("sample_channels"), {}, batch)
    truth = batch.x.flatten(2).var(2).view(3, 1, 2, 1, 1)
    torch.testing.assert_close(apply(ones), truth.expand_as(ones))
    # Of a text, over the numbers of its real tokens.
    model, some = text_classifier("mean")(64, torch.float64), texts(3)
    inputs, at = Inputs.of(model, some), torch.arange(3)
    ones = torch.ones_like(inputs.x)
    found = Covariance("sample").of(some, inputs, {}).apply(ones, at)
    own = Covariance("sample_channels").of(some, inputs, {}).apply(ones, at)
    for i, length in enumerate(some.lengths.tolist()):
        torch.testing.assert_close(found[i, 0, 0], inputs.x[i, :length].var())
        torch.testing.assert_close(own[i, :length, 0], inputs.x[i, :length].var(1))


# ---- low rank ---------------------------------------------------------------------------------------------


def test_low_rank_is_exact_where_the_data_has_no_more_directions():
    """Also for fewer samples than directions, and for data of a low rank itself."""
    for batch, rank in ((data(5), 64), (data(5), 4), (data(40, rank=3), 3), (data(40, rank=3), 10)):
        covariance = Covariance("low_rank", rank=rank, jitter=1e-9)
        state = fitted(covariance, batch)
        assert state["gain"].shape[1] <= rank
        truth = expected("full", batch.x)
        matrix = as_matrix(operator(covariance, state, batch[[0]])[0], SHAPE)
        torch.testing.assert_close(matrix, truth, rtol=1e-6, atol=1e-6 * truth.abs().max().item())


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_low_rank_keeps_variances_and_the_largest_directions(passes):
    shape = (1, 6, 10)
    r = np.random.RandomState(0)
    scale = torch.tensor(0.7 ** np.arange(60))
    turn = torch.linalg.qr(torch.tensor(r.randn(60, 60)))[0]
    x = (torch.tensor(r.randn(500, 60)) * scale) @ turn.T
    batch = Batch(tuple(map(str, range(500))), x.view(500, *shape), torch.zeros(500, dtype=torch.long))
    covariance = Covariance("low_rank", rank=5, passes=passes, jitter=1e-9)
    state = fitted(covariance, batch, 100)
    matrix = as_matrix(operator(covariance, state, batch[[0]])[0], shape)
    truth = expected("full", batch.x)
    torch.testing.assert_close(matrix.diagonal(), truth.diagonal(), rtol=1e-6, atol=0)
    assert (torch.linalg.eigvalsh(matrix) > 0).all()
    value, vector = torch.linalg.eigh(truth)
    part = vector[:, -5:] @ torch.diag(value[-5:]) @ vector[:, -5:].T
    best = part + torch.diag((truth - part).diagonal())
    wrong, least = (matrix - truth).norm(), (best - truth).norm()
    assert wrong < (1.5 if passes == 1 else 1.05) * least


def test_a_large_image_needs_no_large_matrix():
    """3 x 64 x 64 would be a matrix of 1.1 GiB; the state is a few hundred columns at most."""
    r = np.random.RandomState(0)
    x = torch.tensor(r.randn(6, 3, 64, 64))
    batch = Batch(tuple(map(str, range(6))), x, torch.zeros(6, dtype=torch.long))
    state = fitted(Covariance("low_rank", rank=3), batch)
    assert max(value.numel() for value in state.values()) == 3 * 3 * 64 * 64
    with pytest.raises(UserError, match=r"12288 x 12288 take 1\.1 GiB, more than 1; take kind=low_rank"):
        fitted(Covariance("full"), batch)


def test_size_counts_channels_and_classes(monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 2 * 36)
    fitted(Covariance("stack"), data(9))
    with pytest.raises(UserError, match="take kind=low_rank"):
        fitted(Covariance("stack", per_class=True), data(9))
    with pytest.raises(UserError, match="take kind=low_rank"):
        fitted(Covariance("full"), data(9))


# ---- conditionals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [0, 1])
def test_conditionals_are_schur_complements(split):
    r = np.random.RandomState(0)
    a = torch.tensor(r.randn(12, 20))
    basis = torch.linalg.qr(a[:, :3])[0]
    rest, gain = torch.tensor(r.rand(12)) + 0.3, torch.tensor([5.0, 2.0, 1.0]).double()
    d = torch.diag(rest.sqrt())
    low = d @ (torch.eye(12) + basis @ torch.diag(gain) @ basis.T) @ d
    places = torch.tensor([1, 4, 5])
    if split:
        blocks = [a[k * 6 : k * 6 + 6] @ a[k * 6 : k * 6 + 6].T for k in range(2)]
        matrix = torch.stack(blocks)
        operators = [
            (Dense(Groups(SHAPE, 1, 6), matrix, torch.linalg.cholesky(matrix), False), torch.block_diag(*blocks))
        ]
    else:
        full = (a @ a.T)[None]
        operators = [
            (Dense(Groups(SHAPE, 0, 6), full, torch.linalg.cholesky(full), False), full[0]),
            (LowRank(Groups(SHAPE, 0, 6), rest, basis, gain, False), low),
        ]
    v = torch.tensor(r.randn(4, *SHAPE))
    for operator, sigma in operators:
        torch.testing.assert_close(as_matrix(operator.apply, SHAPE), sigma)
        root = as_matrix(operator.sample, SHAPE)
        torch.testing.assert_close(root @ root.T, sigma)
        inside = torch.zeros(12, dtype=torch.bool)
        inside[torch.cat((places, places + 6))] = True
        schur = sigma[inside][:, inside] - sigma[inside][:, ~inside] @ torch.linalg.solve(
            sigma[~inside][:, ~inside], sigma[~inside][:, inside]
        )
        part = v.flatten(1)[:, inside]
        torch.testing.assert_close(operator.conditional(places)(v), (part @ schur * part).sum(1))


def test_a_matrix_is_inverted_once_for_all_units(monkeypatch):
    sizes, invert = [], torch.cholesky_inverse
    monkeypatch.setattr(torch, "cholesky_inverse", lambda a: sizes.append(a.shape[-1]) or invert(a))
    matrix = torch.eye(12).double()[None] * 2
    operator = Dense(Groups(SHAPE, 0, 6), matrix, torch.linalg.cholesky(matrix), False)
    for place in range(6):
        operator.conditional(torch.tensor([place]))
    assert sizes.count(12) == 1


# ---- shrinkage, jitter, bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["channels", "diagonal", "matrix", "full", "low_rank"])
def test_shrinkage_and_jitter(kind):
    batch = data(40)
    plain, shrunk = Covariance(kind, jitter=1e-9, rank=12), Covariance(kind, shrinkage=0.4, jitter=0.1, rank=12)
    found = [as_matrix(operator(c, fitted(c, batch), batch[[0]])[0], SHAPE) for c in (plain, shrunk)]
    mean = found[0].diagonal().mean()
    truth = 0.6 * found[0] + 0.5 * mean * torch.eye(12)
    torch.testing.assert_close(found[1], truth, rtol=1e-6, atol=1e-6 * mean.item())


def test_parity_of_the_released_helpers():
    golden = nets.golden("fisher_helpers")
    rows = torch.tensor(golden["data"])
    moments = CoMoments("shared")
    for piece in rows[:, None].split(7):
        moments.add(piece)
    found = (moments.m2[0] / (moments.n - 1)).float()
    torch.testing.assert_close(found, torch.tensor(golden["covariance"]), rtol=1e-4, atol=1e-5)
    # Their copy adds the least variance where there is no factor; here that is said.
    factor = Covariance("full", jitter=0.0).given(torch.tensor(golden["covariance"]))["factor"][0, 0]
    torch.testing.assert_close(factor.float(), torch.tensor(golden["cholesky"]), rtol=1e-4, atol=1e-5)
    singular = torch.tensor(golden["singular_cov"])
    with pytest.raises(UserError, match="not positive definite; raise jitter"):
        Covariance("full", jitter=0.0).given(singular - 1e-6 * torch.eye(12))
    least = (singular.diagonal().abs().min() / singular.diagonal().mean()).item()
    factor = Covariance("full", jitter=least).given(singular)["factor"][0, 0]
    truth = torch.tensor(golden["singular_cholesky_with_jitter"])
    assert (factor.float() - truth).abs().max() <= 1e-4 * truth.abs().max()


def test_fewer_samples_than_features():
    batch = data(5)
    with pytest.raises(UserError, match="12 features from 5 observations"):
        fitted(Covariance("full", jitter=0.0), batch)
    state = fitted(Covariance("full"), batch)  # with the jitter there is a factor, and it is one
    torch.testing.assert_close(state["factor"] @ state["factor"].mT, state["covariance"])


@pytest.mark.parametrize("kind", FITTED)
def test_too_little_data(kind):
    with pytest.raises(UserError, match="at least 2 samples: the estimation set is too small"):
        fitted(Covariance(kind), data(1))
    with pytest.raises(UserError, match="at least 2 samples"):
        fitted(Covariance(kind), data(1)[:0])
    alone = dataclasses.replace(data(3), target=torch.tensor([1, 1, 4]))
    with pytest.raises(UserError, match="of each class, and class 4 has 1"):
        fitted(Covariance(kind, per_class=True), alone)
    constant = dataclasses.replace(data(3), x=torch.ones(3, *SHAPE).double())
    with pytest.raises(UserError, match="do not vary"):
        fitted(Covariance(kind), constant)
    broken = data(3)
    broken.x[1, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        fitted(Covariance(kind), broken)


def test_per_class_needs_one_label_per_sample():
    batch = data(8)
    several = dataclasses.replace(batch, target=torch.ones(8, 3, dtype=torch.long))
    with pytest.raises(UserError, match="one label per sample"):
        fitted(Covariance("diagonal", per_class=True), several)
    assert fitted(Covariance("diagonal"), several)["n"].tolist() == [8]


def test_images_of_different_sizes():
    class Mixed(FitSamples):
        def __iter__(self):
            yield from super().__iter__()
            yield data(4, (2, 2, 2))

    with pytest.raises(UserError, match=r"inputs of \(2, 2, 2\) and of \(2, 3, 2\)"):
        Covariance("diagonal").run(classifier(), Mixed(data(4), 4), PartialInMemory(), lambda line: None)


@pytest.mark.parametrize("kind", ["channels", "diagonal", "matrix", "stack", "full", "low_rank"])
def test_a_state_of_other_inputs(kind):
    state, other = fitted(Covariance(kind), data(9)), data(2, (3, 4, 5))
    with pytest.raises(UserError, match=r"inputs of another shape than \(3, 4, 5\)"):
        Covariance(kind).of(other, Inputs.of(classifier(), other), state)
    unlike, batch = Covariance("full" if kind == "low_rank" else "low_rank"), data(2)
    with pytest.raises(UserError, match="is not of kind="):
        unlike.of(batch, Inputs.of(classifier(), batch), state)


def test_the_places_of_texts_by_their_formula():
    batch, model = texts(12), text_classifier("mean")(64, torch.float64)
    stack, places = (Covariance(kind, jitter=0.0, shrinkage=0.1) for kind in ("stack", "places"))
    embedded = model.module.embedding(batch.x)
    at = [embedded[batch.mask[:, t], t] for t in range(batch.x.shape[1])]
    known = sum(len(rows) >= 2 for rows in at)
    matrices = [torch.tensor(np.cov(rows.numpy(), rowvar=False)) for rows in at[:known]]
    mean = torch.stack(matrices).diagonal(dim1=1, dim2=2).mean()
    for size in (1, 5, 12):
        state = fitted(stack, batch, size, model)
        assert state["lengths"].tolist() == [known]
        assert state["n"].tolist() == [12]
        for found, truth in zip(state["covariance"][0], matrices, strict=True):
            torch.testing.assert_close(found, 0.9 * truth + 0.1 * mean * torch.eye(len(truth)).double())
        torch.testing.assert_close(state["factor"][0] @ state["factor"][0].mT, state["covariance"][0])
        variance = fitted(places, batch, size, model)["variance"][0]
        for found, truth in zip(variance, matrices, strict=True):
            torch.testing.assert_close(found, 0.9 * truth.diagonal().mean() + 0.1 * mean)


def test_a_place_that_is_the_same_in_all_texts_has_only_the_jitter():
    batch, model = texts(6), text_classifier("mean")(64, torch.float64)
    begun = dataclasses.replace(batch, x=batch.x.index_fill(1, torch.tensor([0]), 3))
    state = fitted(Covariance("stack", jitter=1e-3), begun, model=model)["covariance"][0]
    mean = state.diagonal(dim1=1, dim2=2).mean() / (1 + 1e-3)
    torch.testing.assert_close(state[0], 1e-3 * mean * torch.eye(len(state[0])).double())


def test_a_text_longer_than_those_of_the_estimation_set():
    batch, model = texts(6), text_classifier("mean")(64, torch.float64)
    order = batch.lengths.argsort()
    short, longest = batch[order[:2].tolist()], batch[[int(order[-1])]]
    assert longest.lengths.item() > short.lengths.min().item()
    for kind in ("stack", "places"):
        covariance = Covariance(kind)
        state = fitted(covariance, short, model=model)
        covariance.of(short[[0]], Inputs.of(model, short[[0]]), state)
        with pytest.raises(SampleError, match=f"{longest.uids[0]}: a text of {longest.lengths.item()} tokens, but"):
            covariance.of(longest, Inputs.of(model, longest), state)


def test_kinds_that_are_not_for_this_data():
    with pytest.raises(UserError, match="is not for texts"):
        fitted(Covariance("full"), texts(4), model=text_classifier("mean")(64, torch.float64))
    with pytest.raises(UserError, match="is for texts only"):
        fitted(Covariance("places"), data(4))
    batch = data(3, (12,))
    with pytest.raises(UserError, match="have no channels"):
        Covariance("sample_channels").of(batch, Inputs.of(classifier(), batch), {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "fully"}, "kind is 'fully'"), ({"kind": "full", "rank": 0}, "rank is 0"), ({"passes": 0}, "passes"),
        ({"shrinkage": 1.5}, "shrinkage is 1.5"), ({"jitter": -1.0}, "jitter is -1.0, must be at least 0"),
        ({"kind": "low_rank", "jitter": 0.0}, "above 0 for low_rank"), ({"per_class": True}, "per_class needs"),
    ],
)  # fmt: skip
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        Covariance(**fields)


def test_targets_count_only_per_class():
    assert not Covariance("full").TARGETS
    assert Covariance("full", per_class=True).TARGETS
    batch = dataclasses.replace(data(4), target=torch.ones(4, 3).long())
    with pytest.raises(UserError, match="one label per sample"):
        Covariance("full", per_class=True).of(batch, Inputs.of(classifier(), batch), {"classes": torch.tensor([0])})


def test_it_has_a_key_and_leaves_the_data_alone():
    method = build(
        {
            "_target_": "attrib.methods.fisher.FunctionalInformation",
            "covariance": {"_target_": "attrib.methods.parts.covariance.Covariance", "kind": "full"},
        },
        "x",
    )
    assert method.fit == Covariance("full")
    assert spec(method.fit) != spec(Covariance("stack"))
    given = torch.tensor(np.cov(np.random.RandomState(0).randn(4, 9)))
    before = given.clone()
    state = Covariance("full", jitter=0.0).given(given)
    state["covariance"] += 1
    torch.testing.assert_close(given, before, rtol=0, atol=0)


def test_sketches_are_products_with_the_covariance():
    x = data(17).x.flatten(1) + 1e4
    sketch = Sketch(torch.eye(12).double()[:, :5])
    for piece in x.split((1, 0, 9, 7)):
        sketch.add(piece)
    product, variance = sketch.result()
    truth = torch.tensor(np.cov(x.numpy(), rowvar=False))
    torch.testing.assert_close(product, truth[:, :5], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(variance, truth.diagonal(), rtol=1e-8, atol=0)


def test_states_of_equal_keys():
    close(fitted(Covariance("low_rank", rank=2), data(9), 2), fitted(Covariance("low_rank", rank=2), data(9), 9), 1e-9)
