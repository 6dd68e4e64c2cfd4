"""A Compose of torchvision is the ImageTransform that does the same to an image, or is refused by its step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

from attrib.api.compositions import image_transform
from attrib.datasets import ImageTransform
from attrib.types import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUMBERS = {
    "v1": [v1.ToTensor(), v1.Normalize(MEAN, STD)],
    "v2": [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)],
    "v2 pure": [
        v2.PILToTensor(),
        v2.ConvertImageDtype(torch.float32),
        v2.Compose([v2.Normalize(MEAN, STD), v2.ToPureTensor()]),
    ],
    "no normalisation": [v1.ToTensor()],
}
GEOMETRY = {
    "crop": [v1.Resize(40), v1.CenterCrop(32)],
    "v2 crop": [v2.RGB(), v2.Resize(40, v2.InterpolationMode.BICUBIC), v2.CenterCrop((24, 32))],
    "squash": [v2.Resize((30, 26))],
}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("geometry", GEOMETRY)
def test_it_does_the_same_to_an_image(geometry, numbers):
    kind = v1.Compose if numbers == "v1" else v2.Compose
    theirs = kind([*GEOMETRY[geometry], *NUMBERS[numbers]])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    ours = image_transform(theirs)
    torch.testing.assert_close(ours.tensor(image), torch.as_tensor(theirs(image)), rtol=0, atol=1e-6)


def test_gray():
    theirs = v1.Compose([v1.Grayscale(), v1.Resize((16, 16)), v1.ToTensor(), v1.Normalize([0.5], [0.2])])
    assert image_transform(theirs) == ImageTransform(16, (0.5,), (0.2,))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (
            [v1.Resize(40), v1.RandomCrop(32), v1.ToTensor()],
            r"what RandomCrop does .*torch\.stack\(\[transform\(image\)",
        ),
        (
            [v1.Resize((9, 9)), v1.ToTensor(), lambda x: x * 2],
            r"what function \(not of torchvision\) behind ToTensor does",
        ),
        ([v1.Resize(40), v1.ToTensor()], r"Resize of the shorter side alone, .*CenterCrop"),
        ([v1.ToTensor(), v1.Normalize(MEAN, STD)], "no Resize, so that the size"),
        (
            [v2.ToImage(), v2.Resize((9, 9)), v2.ToDtype(torch.float32, scale=True)],
            "Resize stands behind ToImage; .* before",
        ),
        ([v2.Resize((9, 9)), v2.ToImage(), v2.ToDtype(torch.float32)], "what ToDtype behind ToImage does"),
        ([v2.Resize((9, 9)), v2.ToImage()], r"end it with ToTensor\(\)"),
        ([v1.Resize((9, 9), v1.InterpolationMode.NEAREST), v1.ToTensor()], "interpolation=nearest; only bilinear"),
        ([v1.Resize((9, 9)), v1.ToTensor(), v1.Normalize([0.5], [0.5])], "Normalize has 1 channels, and the image 3"),
        ([v1.Resize(20), v1.CenterCrop(32), v1.ToTensor()], "smaller than the crop"),
    ],
)
def test_what_cannot_be_described_is_refused_by_its_step(steps, words):
    with pytest.raises(UserError, match=f"^transform.*{words}"):
        image_transform(v2.Compose(steps))


def test_other_things_are_refused():
    with pytest.raises(UserError, match=r"transform is ColorJitter; give .* a Compose of Resize"):
        image_transform(v1.ColorJitter())
