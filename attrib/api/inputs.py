"""What people hand over, as a dataset: images, sentences, sounds, tensors, or what torch loads data from.

What a thing means is decided by its type and by the input that the net is known to have, never by a guess from its
shape.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils import data as torch_data

from attrib.api.names import Given, Input, labels_of, named, writable
from attrib.api.tensors import Reading, of_batch, of_tensors, of_torch
from attrib.datasets import Dataset, ImageTransform, Sound, WaveTransform
from attrib.datasets.files import shown
from attrib.datasets.memory import Pictures, Sentences, Waves
from attrib.datasets.sound import read_sound
from attrib.keys import digest
from attrib.types import Batch, UserError

CHANNELS = 8  # a second axis of no more numbers is one of channels
LOUDEST = 1.5  # of a sound: resampling may go a little beyond full scale, another scale goes far
_DATASET = ("fingerprint", "batch", "uids", "key", "modality")
_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # the modes that a PNG file keeps as they are


def given(
    x: Any,
    how: Input,
    uids: Sequence[str] | None = None,
    labels: Any = None,
    what: str = "x",
    pad: int | None = None,
) -> Given:
    """``x`` as a dataset.

    how     the input of the net, as far as it is known
    uids    the samples' names; of a dataset: which of its samples. By default a digest of each one's content
    labels  the class of each, or (N, K)
    what    what messages call it
    pad     the id that the net names as that of padding; None: its tokenizer's

    Raises UserError for what is not understood, and says what would be.
    """
    if all(hasattr(x, name) for name in _DATASET):
        return Given(x, _chosen(x, uids, labels, what))
    if isinstance(x, Batch):
        return of_batch(x, Reading(how, pad), uids, labels)
    if isinstance(x, torch_data.DataLoader | torch_data.Dataset):
        return of_torch(x, Reading(how, pad), uids, labels, what)
    many = _listed(x, how, what)
    if not many:
        raise UserError(f"{what} holds no sample")
    kinds = {_kind(one, how) for one in many}
    if len(kinds) > 1:
        raise UserError(f"{what} mixes {' and '.join(sorted(kinds))}; give samples of one kind")
    kind = kinds.pop()
    if kind == "tensors":
        return of_tensors(many, Reading(how, pad), uids, labels, what)
    return _MAKERS[kind](many, how, uids, labels, what)


def _kind(one: Any, how: Input) -> str:
    for kinds, name in (
        (Image.Image, "images"),
        (Tensor, "tensors"),
        (str, "texts or files"),
        (Path, "texts or files" if isinstance(how, ImageTransform | WaveTransform) else "files"),
        (np.ndarray, "sounds" if isinstance(how, WaveTransform) else "images"),
        (Sound, "sounds"),
        (tuple, "sounds"),
    ):
        if isinstance(one, kinds):
            return name
    return type(one).__name__


def _listed(x: Any, how: Input, what: str) -> list[Any]:
    """The samples one by one."""
    if isinstance(x, Tensor):
        return _rows(x, how, what)
    if isinstance(x, np.ndarray):
        return _arrays(x, how, what)
    if isinstance(x, str | Path | Image.Image) or _is_sound(x):
        return [x]
    if isinstance(x, Mapping) or not isinstance(x, Iterable) or (hasattr(x, "iloc") and hasattr(x, "columns")):
        raise UserError(f"{what} is {type(x).__name__}; give {_WANTED}")
    found: list[Any] = []
    for one in x:
        if isinstance(one, np.ndarray):
            found += _arrays(one, how, what)
        elif not isinstance(one, Tensor | str | Path | Image.Image) and not _is_sound(one):
            raise UserError(f"{what} holds {type(one).__name__}; give {_WANTED}")
        else:
            found.append(one)
    return found


_WANTED = (
    "a tensor as the net reads it, images (PIL, uint8 arrays or files), sentences, sounds (arrays, pairs of an array "
    "and its rate, or files), or a dataset, a Batch or a DataLoader"
)


def _is_sound(x: Any) -> bool:
    """Samples and a rate: of scipy, soundfile or librosa, or a tensor and a rate of torchaudio."""
    if not isinstance(x, tuple) or len(x) != 2 or not isinstance(x[0], np.ndarray | Tensor):
        return False
    return isinstance(x[1], int | float | np.integer | np.floating) and not isinstance(x[1], bool)


def _rows(x: Tensor, how: Input, what: str) -> list[Tensor]:
    """(N, *input) -> N of them; one sample may come without its first axis where the net's input tells."""
    one, many = {ImageTransform: (3, 4), WaveTransform: (2, 3)}.get(type(how), (0, 0))
    if x.ndim == (many or 4) and not x.is_floating_point():
        raise UserError(f"{what} is a tensor of {x.dtype}; a net reads floats, such as x / 255")
    if not x.is_floating_point():
        one, many = 1, 2
    elif not many and x.ndim == 4:
        many = 4
    if x.ndim in (one, many) and x.numel():
        return [x] if x.ndim == one else list(x)
    alone = x.ndim == 3 and x.is_floating_point() and "; of one image x[None]"
    hint = "images (N, C, H, W), or a list of images (C, H, W), of sounds (C, L) or of ids (T,)"
    raise UserError(f"{what} has the shape {tuple(x.shape)} ({x.dtype}); give {hint}{alone or ''}")


def _arrays(x: np.ndarray, how: Input, what: str) -> list[Any]:
    if isinstance(how, WaveTransform):
        if x.ndim == 2 and x.shape[1] <= CHANNELS < x.shape[0]:
            raise UserError(
                f"{what}: {x.shape[0]} sounds of {x.shape[1]} numbers? Of a sound with channels (L, C) give one, such "
                "as x.mean(1)"
            )
        if x.ndim in (1, 2) and x.dtype.kind in "fiu":
            return [x] if x.ndim == 1 else list(x)
        raise UserError(f"{what}: a sound is (L,) and sounds are (N, L), numbers in -1 .. 1, not {x.dtype} {x.shape}")
    if x.dtype == np.uint8 and (x.ndim == 2 or (x.ndim in (3, 4) and x.shape[-1] == 3)):
        return list(x) if x.ndim == 4 else [x]
    raise UserError(
        f"{what} is an array of {x.dtype} {x.shape}; images are uint8, (H, W), (H, W, 3) or (N, H, W, 3), and what is "
        "already as the net reads it is a tensor: torch.from_numpy(x)"
    )


# ---- names and labels ---------------------------------------------------------------------------


def _chosen(dataset: Dataset, uids: Sequence[str] | None, labels: Any, what: str) -> tuple[str, ...]:
    if labels is not None:
        raise UserError(f"target: {what} is a dataset, which has labels of its own; explain target='label'")
    if uids is None:
        return writable(tuple(dataset.uids))
    known = set(dataset.uids)
    for uid in uids:
        if uid not in known:
            some = ", ".join(dataset.uids[:3])
            raise UserError(f"uids: {what} has no sample {uid!r} (it has {len(known)}: {some}, ...)")
    return tuple(uids)


# ---- makers -------------------------------------------------------------------------------------


def _images(many: Sequence[Any], how: Input, uids: Sequence[str] | None, labels: Any, what: str) -> Given:
    if not isinstance(how, ImageTransform):
        raise _unknown_input(
            what, "images", how, "transform=attrib.datasets.ImageTransform(size=..., mean=..., std=...)"
        )
    contents = [_encoded(one, what) for one in many]
    names = named(uids, [_file_name(one) or digest(data.hex())[:8] for one, data in zip(many, contents)])
    return Given(Pictures(dict(zip(names, contents)), how, labels_of(labels, names)), names)


def _encoded(one: Any, what: str) -> bytes:
    """An image as the bytes of a file. Raises UserError."""
    if isinstance(one, str | Path):
        return _content(Path(one), what)
    image = Image.fromarray(one) if isinstance(one, np.ndarray) else one
    if image.mode in ("F", "I"):
        raise UserError(f"{what}: images of 32-bit numbers have no fixed range; give a tensor, or 8 or 16 bits")
    buffer = io.BytesIO()
    (image if image.mode in _PNG else image.convert("RGB")).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _content(path: Path, what: str) -> bytes:
    if path.expanduser().is_dir():
        raise UserError(f"{what}: {path} is a folder; give a list of its files, or attrib.dataset of it")
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read: {error.strerror or error}") from error


def _file_name(one: Any) -> str:
    return shown(Path(one).name) if isinstance(one, str | Path) else ""  # as names in folders of images are


def _sounds(many: Sequence[Any], how: Input, uids: Sequence[str] | None, labels: Any, what: str) -> Given:
    if not isinstance(how, WaveTransform):
        raise _unknown_input(what, "sounds", how, "transform=attrib.datasets.WaveTransform(rate=..., length=...)")
    sounds = [_sound(one, how.rate, what) for one in many]
    contents = [_file_name(one) or _content_name(sound) for one, sound in zip(many, sounds)]
    names = named(uids, contents)
    return Given(Waves(dict(zip(names, sounds)), how, labels_of(labels, names)), names)


def _content_name(sound: Sound | str) -> str:
    return sound if isinstance(sound, str) else digest(sound.rate, sound.samples.tobytes().hex())[:8]


def _sound(one: Any, rate: int, what: str) -> Sound | str:
    """An array without a rate has that of the net. Of a file that holds no sound: why, as its sample's failure."""
    if isinstance(one, str | Path):
        try:
            return read_sound(_content(Path(one), what))
        except ValueError as error:
            return str(error)
    samples, rate = one if isinstance(one, tuple) else (one, rate)
    given = np.asarray(samples.detach().cpu() if isinstance(samples, Tensor) else samples)
    if given.ndim == 2 and given.shape[0] == 1:  # as torchaudio has it
        given = given[0]
    if given.ndim != 1 or not len(given):
        raise UserError(f"{what}: a sound is (L,), one channel, not {given.shape}")
    if rate < 1 or rate != int(rate):
        raise UserError(f"{what}: a sound has a whole number of samples per second, not {rate}")
    values = given.astype(np.float64)
    if given.dtype.kind in "iu":  # full scale, as in WAV files, where 8 bits are without a sign
        half = 2.0 ** (8 * given.itemsize - 1)
        values = values / half - (given.dtype.kind == "u")
    if not np.isfinite(values).all():
        raise UserError(f"{what}: a sound has NaN or infinite numbers")
    if np.abs(values).max() > LOUDEST:
        raise UserError(f"{what}: a sound's numbers lie in -1 .. 1; these reach {np.abs(values).max():.3g}")
    return Sound(values, int(rate))


def _texts(many: Sequence[Any], how: Input, uids: Sequence[str] | None, labels: Any, what: str) -> Given:
    """Sentences or, for nets of images and sounds, files."""
    if isinstance(how, ImageTransform):
        return _images(many, how, uids, labels, what)
    if isinstance(how, WaveTransform):
        return _sounds(many, how, uids, labels, what)
    if how is None:
        raise _unknown_input(what, "text", how, "tokenizer=... for sentences, or transform=... for files of images")
    names = named(uids, [digest(text)[:8] for text in many])
    return Given(Sentences(dict(zip(names, many)), how, labels_of(labels, names)), names)


def _files(many: Sequence[Any], how: Input, uids: Sequence[str] | None, labels: Any, what: str) -> Given:
    if isinstance(how, ImageTransform | WaveTransform):
        return _texts(many, how, uids, labels, what)
    raise _unknown_input(what, "files", how, "transform=...; the text in a file is explained as a str")


def _unknown_input(what: str, kind: str, how: Input, say: str) -> UserError:
    if how is None:
        return UserError(f"{what} holds {kind}, and nothing says how this net wants them; say {say}")
    wants = "images" if isinstance(how, ImageTransform) else "sounds" if isinstance(how, WaveTransform) else "texts"
    return UserError(f"{what} holds {kind}, but the net wants {wants}")


_MAKERS: Mapping[str, Callable[..., Given]] = {
    "images": _images,
    "texts or files": _texts,
    "files": _files,
    "sounds": _sounds,
}
