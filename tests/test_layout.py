"""Layout: grids of every kind of layer, smoothing and resizing against scipy, skimage and the released code."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from nets import golden
from scipy import ndimage
from skimage.transform import resize as skimage_resize
from torch import Tensor

from attrib.methods.parts.layout import Layout, resize
from attrib.types import UserError


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.RandomState(seed).randn(*shape))


# layer, image, layout, grid
LAYERS = [
    ((5, 7, 9), (28, 36), "channels_first", (7, 9)),
    ((5, 1, 1), (28, 36), "channels_first", (1, 1)),
    ((7, 9, 5), (28, 36), "channels_last", (7, 9)),
    ((16, 5), (32, 32), "tokens:4x4", (4, 4)),
    ((17, 5), (32, 32), "tokens:4x4+1", (4, 4)),  # class token
    ((21, 5), (32, 32), "tokens:4x4+5", (4, 4)),  # and four registers
    ((66, 5), (224, 224), "tokens:7x7+17", (7, 7)),
    ((197, 2), (224, 224), "tokens:14x14+1", (14, 14)),
    ((33, 5), (64, 32), "tokens:8x4+1", (8, 4)),
    ((1037, 2), (450, 600), "tokens:28x37+1", (28, 37)),
    ((7, 5), (16, 48), "tokens:1x3+4", (1, 3)),
    ((1, 5), (16, 16), "tokens:1x1", (1, 1)),
    ((5,), (28, 36), "vector", (1, 1)),
]


@pytest.mark.parametrize(("layer", "image", "name", "grid"), LAYERS)
def test_grid_and_back(layer, image, name, grid):
    z = numbers(3, *layer)
    places = Layout.of(z, image, name)
    assert places.grid == grid
    on_grid = places.to_grid(z)
    assert on_grid.shape == (3, 2 if 2 in layer else 5, *grid)
    assert torch.equal(places.from_grid(on_grid, like=z), z)
    assert torch.equal(places.to_grid(places.from_grid(on_grid + 1, like=z)), on_grid + 1)
    bits = places.bits(z)
    assert bits.shape == (3, *grid)
    assert places.spread(bits).shape == (3, *image)
    for one in (on_grid[1], bits[1]):
        assert one.isfinite().all()


def test_places_stand_where_they_belong():
    conv = numbers(2, 3, 4, 6)
    row_by_row = conv.flatten(2).transpose(1, 2)
    tokens = torch.cat((torch.full((2, 1, 3), 99.0), row_by_row), dim=1)  # a class token in front
    for z, name in ((conv, "channels_first"), (conv.permute(0, 2, 3, 1), "channels_last"), (tokens, "tokens:4x6+1")):
        assert torch.equal(Layout.of(z, (8, 12), name).to_grid(z), conv)


def test_sizes_alone_decide_nothing():
    assert Layout.of(torch.zeros(2, 3), (8, 8)).name == "vector"
    assert Layout.of(torch.zeros(2, 1, 3), (8, 8)).grid == (1, 1)
    for shape in ((2, 3, 4, 4), (2, 4, 4, 3), (2, 16, 3)):
        for said in ("auto",) if len(shape) == 4 else ("auto", "tokens"):
            with pytest.raises(UserError, match=r"channels_first, channels_last, vector or tokens:HxW\+P"):
                Layout.of(torch.zeros(shape), (8, 8), said)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((2, 3, 4, 4, 4), "channels_first"),
        ((2, 16, 3), "channels_first"),
        ((2, 3), "tokens:1x2"),
        ((2, 3), "grid"),
        ((2, 17, 3), "tokens:4x4"),
        ((2, 17, 3), "tokens:4x4+2"),
        ((2, 17, 3), "tokens:0x4+17"),
    ],
)
def test_a_layer_of_another_shape_is_an_error_that_names_it(shape, name):
    with pytest.raises(UserError, match=re.escape(repr(name))):
        Layout.of(torch.zeros(shape), (8, 8), name)


# ---- smoothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5, 2.0])
def test_smoothing_equals_the_released_code(sigma):
    data, name = golden("iba_pieces"), f"sigma{sigma}".replace(".", "p")
    z = torch.tensor(data["smooth_in"])
    found = Layout.of(z, (9, 9), "channels_first").smooth(z, sigma)
    np.testing.assert_allclose(found, data[f"smooth_out_{name}"], rtol=0, atol=1e-5 * found.abs().max().item())
    size = data[f"smooth_kernel_{name}"].shape[0]
    impulse = torch.zeros(1, 1, 25, 25)
    impulse[0, 0, 12, 12] = 1
    kernel = Layout.of(impulse, (9, 9), "channels_first").smooth(impulse, sigma)[0, 0]
    assert (kernel > 0).sum() == size**2
    half = size // 2
    middle = kernel[12 - half : 13 + half, 12 - half : 13 + half]
    np.testing.assert_allclose(middle, data[f"smooth_kernel_{name}"], rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("grid", [(9, 12), (2, 2), (1, 7), (7, 1), (3, 5), (1, 1)])
def test_smoothing_equals_scipy(sigma, grid):
    z = numbers(2, 3, *grid)
    expected = z.numpy()
    for axis, size in ((2, grid[0]), (3, grid[1])):
        radius = min(round(2 * sigma), size - 1)  # a smaller map cannot be mirrored further
        if radius:
            expected = ndimage.gaussian_filter1d(expected, sigma, axis=axis, mode="mirror", radius=radius)
    found = Layout.of(z, (20, 20), "channels_first").smooth(z, sigma)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
    channels_last = z.permute(0, 2, 3, 1)
    other = Layout.of(channels_last, (20, 20), "channels_last").smooth(channels_last, sigma)
    np.testing.assert_allclose(other.permute(0, 3, 1, 2), found, rtol=0, atol=1e-14)


def test_smoothing_leaves_constants_class_tokens_and_vectors_alone():
    tokens = numbers(2, 17, 3)
    found = Layout.of(tokens, (32, 32), "tokens:4x4+1").smooth(tokens, 1.0)
    assert torch.equal(found[:, 0], tokens[:, 0])
    assert (found[:, 1:] - tokens[:, 1:]).abs().min() > 0
    constant = torch.full((1, 2, 5, 6), 0.7, dtype=torch.float64)
    torch.testing.assert_close(
        Layout.of(constant, (9, 9), "channels_first").smooth(constant, 2.0), constant, rtol=0, atol=1e-15
    )
    for z, said in ((numbers(2, 5), "auto"), (numbers(2, 5, 1, 1), "channels_first")):
        assert Layout.of(z, (9, 9), said).smooth(z, 1.0) is z
    for sigma in (None, 0.0):
        assert Layout.of(tokens, (32, 32), "tokens:4x4+1").smooth(tokens, sigma) is tokens


# ---- resizing ------------------------------------------------------------------------------------

OLD = [(1, 1), (1, 5), (3, 1), (2, 3), (7, 7), (8, 12), (16, 10), (14, 14)]
NEW = [(1, 1), (2, 2), (4, 4), (7, 7), (5, 31), (13, 17), (30, 20), (56, 3), (64, 64)]


@pytest.mark.parametrize("old", OLD)
def test_resizing_equals_skimage(old):
    maps = numbers(2, *old)
    for new in NEW:
        found = resize(maps, new)
        assert found.dtype == maps.dtype
        for row in range(2):
            expected = skimage_resize(maps[row].numpy(), new, order=1, preserve_range=True)
            np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-9, err_msg=f"{old} -> {new}")
        np.testing.assert_allclose(resize(maps.float(), new), found, rtol=0, atol=1e-5)


def test_to_the_same_size_nothing_changes():
    maps = numbers(2, 5, 6)
    assert torch.equal(resize(maps, (5, 6)), maps)


def test_saliency_maps_equal_the_released_code():
    data = golden("iba_pieces")
    nats = torch.tensor(data["cap"])
    assert nats.isnan().sum() == 1
    # The released code leaves NaN out of the sum over channels (nansum); here the runner fails the sample.
    ours = Layout.of(nats[None], (28, 28), "channels_first")
    assert ours.bits(nats[None]).isnan().sum() == 1
    known = nats.nan_to_num(0.0)
    sizes = {"sal_none": (7, 7), "sal_28": (28, 28), "sal_30x20": (30, 20), "sal_4": (4, 4)}
    cases = [(key, known, "channels_first", size) for key, size in sizes.items()]
    for key, z, name, image in [*cases, ("sal_channels_last", known.permute(1, 2, 0), "channels_last", (28, 28))]:
        places = Layout.of(z[None], image, name)
        found = places.spread(places.bits(z[None]))[0]
        np.testing.assert_allclose(found, data[key], rtol=0, atol=1e-5 * data[key].max(), err_msg=key)


# ---- what becomes of the bits ----------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "image", "name", "grid"), LAYERS)
def test_places_hold_all_bits_but_those_of_class_tokens(layer, image, name, grid):
    nats = numbers(3, *layer).abs()
    places = Layout.of(nats, image, name)
    bits = places.bits(nats)
    lost = nats[:, : layer[0] - grid[0] * grid[1]].flatten(1).sum(1) if name.startswith("tokens") else 0
    total = (nats.flatten(1).sum(1) - lost) / np.log(2)
    torch.testing.assert_close(bits.flatten(1).sum(1), total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("times", [2, 3, 16])
def test_pixels_hold_all_bits_of_the_inside(times):
    """A single place's bits: all of them inside, 7/8 at the border, 9/8 next to it, whatever the other axis does."""
    share = []
    for place in range(6):
        bits = torch.zeros(1, 6, 5, dtype=torch.float64)
        bits[0, place, 2] = 3.0
        places = Layout("channels_first", (1, 6, 5), (6 * times, 5 * times))
        share.append(places.spread(bits).sum().item() / 3)
    border = 7 / 8 if times % 2 == 0 else (7 + 1 / times**2) / 8
    np.testing.assert_allclose(share, [border, 2 - border, 1, 1, 2 - border, border], rtol=1e-12)


@pytest.mark.parametrize("image", [(5, 6), (30, 20), (224, 224), (3, 4), (1, 1)])
def test_a_constant_map_keeps_its_sum(image):
    bits = torch.full((2, 5, 6), 0.3, dtype=torch.float64)
    found = Layout("channels_first", (1, 5, 6), image).spread(bits)
    torch.testing.assert_close(found.sum((1, 2)), bits.sum((1, 2)), rtol=1e-12, atol=0)
    assert found.std() < 1e-12


def test_a_vector_is_one_place_as_large_as_the_image():
    z = numbers(2, 5).abs()
    places = Layout.of(z, (8, 10))
    found = places.spread(places.bits(z))
    expected = z.sum(1) / np.log(2) / 80
    torch.testing.assert_close(found, expected[:, None, None].expand(2, 8, 10), rtol=1e-12, atol=0)
