"""The pictures of docs/methods.md: python tools/site/gallery.py [METHOD ...], into docs/pictures/methods.

One picture per method, of the same photograph, sentence or digit. Nothing is downloaded. The networks of the sentence,
the digit and the sound are trained first where no run has left them in workdirs/train. All of them take about
20 minutes of one core; pictures that exist are kept unless their methods are named.
"""

from __future__ import annotations

import math
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import attrib
from attrib.api import pictures
from attrib.config.places import presets

FOLDER = Path(__file__).parent.parent.parent / "docs" / "pictures" / "methods"
FITTED = "workdirs/gallery"
SIZE = 160  # pixels of a picture's longer side; the page shows fewer
SENTENCE = "a dull film , saved by one brilliant scene"
TEXTS = {  # methods for sentences alone, or that say most about them -> the network
    "acd_text": "lstm_snippets",
    "attention_gradient": "minilm_snippets",
    "attention_raw": "minilm_snippets",
    "attention_rollout": "minilm_snippets",
    "input_iba_text": "lstm_snippets",
}
DIGITS = ("acd", "causal_gradient", "causal_paths")  # for these a deep network takes minutes to hours
SOUNDS = {"sound": "functional_information"}  # a picture beside those of the methods
WITHOUT = {
    "captum": "it is whichever algorithm is named",
    "iba_readout": "what ten photographs teach it in some minutes is not yet its map",
    "input_iba": "input_iba_fast, which stands in the same row, makes nearly the same map in a sixth of the time",
    "input_iba_stages": "a check: docs/how-to/check-sanity.md",
}
FISHER = (
    "fisher",
    "functional_information",
    "functional_information_covariance",
    "set_information",
    "smooth_grad_sq",
    "var_grad",
)
TRAINING = {
    "lstm_snippets": ["train.epochs=2"],
    "minilm_snippets": ["train.limit=640", "train.epochs=1"],
}  # good enough
FIELDS: dict[str, dict[str, Any]] = {  # cheaper, or for a small estimation set, than the preset
    "extremal_perturbation": {"optimizer": "adam", "lr": 0.05, "steps": 80, "area_growth": 1.0355},
    "rise": {"samples": 300},
    "lime": {"samples": 200},
    "kernel_shap": {"samples": 200},
    **{name: {"samples": 25} for name in FISHER},
}


def explanation(name: str) -> Any:
    method = SOUNDS.get(name, name)
    fields = FIELDS.get(name, {})
    if name in TEXTS:
        return attrib.explain(trained(TEXTS[name]), [SENTENCE], None, method, "movie_snippets", root=FITTED, **fields)
    if name in SOUNDS or name in DIGITS:
        net, data = ("tone_cnn_tones", "tones") if name in SOUNDS else ("lenet_digits", "digits")
        samples = attrib.dataset(data, trained(net))
        return attrib.explain(net, samples, "label", method, data, uids=samples.uids[:1], root=FITTED, **fields)
    from skimage.data import chelsea

    return attrib.explain("efficientnet_lite0", chelsea(), method=method, fit="photos", root=FITTED, **fields)


def trained(net: str) -> str:
    if not Path(f"workdirs/train/{net}/model.safetensors").exists():
        subprocess.run([sys.executable, "-m", "attrib", "train", f"train={net}", *TRAINING.get(net, [])], check=True)
    return net


def picture(found: Any) -> Image.Image:
    """Of a method with several maps the first; of one whose maps are measures of the same draws, all of them."""
    (one,) = found.drawn()
    if one.is_text:
        buffer = BytesIO()
        found.plot().savefig(buffer, dpi=120)
        return trimmed(Image.open(buffer).convert("RGB"))
    kinds = list(one.maps) if found.about["names"]["method"].startswith("fisher") else list(one.maps)[:1]
    drawn = [Image.fromarray(pictures.image(one, kind)) for kind in kinds]
    columns = math.ceil(math.sqrt(len(drawn)))
    width, height = drawn[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(drawn) / columns) * height), "white")
    for i, tile in enumerate(drawn):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    longest = max(sheet.size)
    resample = Image.Resampling.LANCZOS if longest > SIZE else Image.Resampling.NEAREST
    return sheet.resize([round(side * SIZE / longest) for side in sheet.size], resample)


def trimmed(page: Image.Image, border: int = 6) -> Image.Image:
    ink = np.argwhere((np.asarray(page) < 250).any(2))
    (top, left), (bottom, right) = ink.min(0) - border, ink.max(0) + border + 1
    return page.crop((max(left, 0), max(top, 0), min(right, page.width), min(bottom, page.height)))


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    chosen = sys.argv[1:]
    names = sorted(set(presets("method")) - set(WITHOUT), key=lambda name: (name in TEXTS, name in DIGITS, name))
    for name in chosen or [*names, *SOUNDS]:
        path = FOLDER / f"{name}.jpg"
        if chosen or not path.exists():
            picture(explanation(name)).save(path, quality=72, optimize=True)
            print(path, path.stat().st_size, flush=True)


if __name__ == "__main__":
    main()
