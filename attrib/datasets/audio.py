"""What all datasets of sounds share: from a recording to what a network hears; and folders of recordings."""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from attrib.classes import Numbering
from attrib.datasets.files import InFiles, class_folders, existing_folder, note, read_rows, shown, uids_of
from attrib.datasets.sound import FASTEST, SLOWEST, Sound, read_sound
from attrib.keys import digest, short_name
from attrib.store.reading import LISTING, content
from attrib.types import UNREADABLE, Batch, SampleError, UserError


class Interval(NamedTuple):
    """A part of a sound, in seconds from its beginning."""

    start: float
    end: float


@dataclass(frozen=True)
class WaveTransform:
    """From a recording to the numbers that a network reads.

    rate     samples per second; another rate is resampled, with a filter that does not move anything in time
    length   samples: a longer sound is cut to its middle, a shorter one gets silence on both sides
    mean, std   of the normalisation, full scale being -1 .. 1
    """

    NAME: ClassVar[str] = "attrib.datasets.audio.WaveTransform"
    rate: int
    length: int
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not SLOWEST <= self.rate <= FASTEST:
            raise UserError(f"model.input.rate is {self.rate}, must lie between {SLOWEST} and {FASTEST} per second")
        if self.length < 1:
            raise UserError(f"model.input.length is {self.length}, must be at least 1")
        if self.std <= 0:
            raise UserError(f"model.input.std is {self.std}, must be positive")

    def wave(self, sound: Sound) -> np.ndarray:
        """(length,) float32, what the network hears, before normalisation."""
        samples = np.asarray(sound.samples, np.float64)
        if sound.rate != self.rate:
            from scipy import signal  # takes a second to import

            common = math.gcd(sound.rate, self.rate)
            samples = signal.resample_poly(samples, self.rate // common, sound.rate // common)
        skip = self._skipped(len(samples))
        kept = samples[max(skip, 0) : max(skip, 0) + self.length]
        wave = np.zeros(self.length, np.float32)
        wave[max(-skip, 0) : max(-skip, 0) + len(kept)] = kept
        return wave

    def mask(self, intervals: Sequence[Interval], sound: Sound) -> np.ndarray:
        """(length,) bool: the samples of ``wave`` whose time lies in one of the intervals."""
        resampled = -(-len(sound.samples) * self.rate // sound.rate)
        time = (np.arange(self.length) + self._skipped(resampled)) / self.rate
        return np.any([(i.start <= time) & (time < i.end) for i in intervals], axis=0) & np.ones(self.length, bool)

    def _skipped(self, samples: int) -> int:
        """How many of these are cut off at the beginning; negative: so many are put in front."""
        return (samples - self.length) // 2


Input = WaveTransform | Mapping[str, Any]  # a mapping is what a model of images has; it is refused with a hint


class AudioDataset(ABC):
    """Sounds by name. A subclass says what a sample's sound and label are, and where in it the evidence lies.

    transform   what the network wants; model YAMLs of sounds build it (``model.input``)
    marked      whether samples may have intervals at all (``Batch.roi`` is None otherwise)
    about       what else determines the samples; it is part of the key
    """

    modality = "audio"

    def __init__(
        self,
        uids: Iterable[str],
        transform: Input,
        names: Mapping[int, str] | None = None,
        marked: bool = False,
        about: Any = None,
    ) -> None:
        if not isinstance(transform, WaveTransform):
            raise UserError(
                "dataset.transform: the chosen model does not say how it wants its sounds (its input is not "
                "an attrib.datasets.WaveTransform); this dataset needs a model of sounds, such as model=tone_cnn"
            )
        self.uids = tuple(sorted(uids))
        self.transform = transform
        self.names = dict(names or {})
        self.numbering: Numbering = "given"  # see ``attrib.classes``
        self.key = digest(short_name(type(self)), transform, about)
        self._marked = marked
        self.fingerprints: dict[str, str] = {}

    @abstractmethod
    def sound(self, uid: str) -> Sound:
        """The sound as it is stored. Raises SampleError."""

    @abstractmethod
    def label(self, uid: str) -> int:
        """Class index, -1 where unknown."""

    def intervals(self, uid: str) -> tuple[Interval, ...]:
        """Where the evidence for the label is, in the stored sound."""
        return ()

    def content(self, uid: str) -> bytes:
        """What the fingerprint covers beside label and intervals. Raises OSError or SampleError."""
        sound = self.sound(uid)
        return sound.rate.to_bytes(4, "little") + sound.samples.tobytes()

    @property
    def rate(self) -> int:
        """Samples per second of ``wave`` and of the batches."""
        return self.transform.rate

    def wave(self, uid: str) -> np.ndarray:
        """(L,) float32 in -1 .. 1, what the network hears, before normalisation. Raises SampleError like ``batch``."""
        return self.transform.wave(self.sound(uid))

    def fingerprint(self, uid: str) -> str:
        if uid not in self.fingerprints:
            try:
                value = self._print(uid, self.content(uid))
            except (OSError, SampleError):
                return UNREADABLE  # not remembered: the file server may come back
            self.fingerprints[uid] = value
        return self.fingerprints[uid]

    def _print(self, uid: str, content: bytes) -> str:
        return digest(hashlib.sha256(content).hexdigest(), self.label(uid), self.intervals(uid))[:16]

    def batch(self, uids: Sequence[str]) -> Batch:
        """x (B, 1, L) float32, normalised; target (B,); roi (B, L) bool. Raises SampleError."""
        sounds = [self.sound(uid) for uid in uids]
        waves = np.stack([self.transform.wave(sound) for sound in sounds])
        roi = None
        if self._marked:
            masks = [self.transform.mask(self.intervals(uid), sound) for uid, sound in zip(uids, sounds)]
            roi = torch.from_numpy(np.stack(masks))
        return Batch(
            uids=tuple(uids),
            x=((torch.from_numpy(waves) - self.transform.mean) / self.transform.std).unsqueeze(1),
            target=torch.tensor([self.label(uid) for uid in uids], dtype=torch.long),
            roi=roi,
        )

    def box_area(self, uid: str) -> float | None:
        """The share of what the network hears that lies in the sample's intervals."""
        intervals = self.intervals(uid)
        return float(self.transform.mask(intervals, self.sound(uid)).mean()) if intervals else None


class AudioFolder(InFiles, AudioDataset):
    """Recordings, one folder per class: ``<root>/<class>/*.flac``, at any depth; WAV, FLAC, OGG and MP3.

    intervals   CSV file,start,end: the path below the root, and seconds between which the evidence lies;
                several rows per file, or none

    A file directly in root has no label (target -1). A file that cannot be read costs that sample only.
    Raises UserError if the folder is missing or without recordings, or the table is wrong.
    """

    SUFFIXES: ClassVar[frozenset[str]] = frozenset({".wav", ".flac", ".ogg", ".oga", ".mp3"})

    def __init__(self, root: str, transform: Input, intervals: str | None = None) -> None:
        self._root = existing_folder(root, "dataset.root")
        files = sound_files(self._root, self.SUFFIXES)
        if not files:
            raise UserError(f"dataset.root: {self._root} holds no *{', *'.join(sorted(self.SUFFIXES))}")
        folders = class_folders(self._root)
        classes = {name: i for i, name in folders.items()}
        self._files = uids_of(files)
        self._labels = {
            uid: classes[file.partition("/")[0]] if "/" in file else -1 for uid, file in self._files.items()
        }
        marked = read_intervals(intervals, files) if intervals else {}
        self._intervals = {uid: marked.get(file, ()) for uid, file in self._files.items()}
        names = {i: shown(name) for i, name in folders.items()}
        super().__init__(self._files, transform, names, marked=intervals is not None)
        self.numbering = "folders"

    def sound(self, uid: str) -> Sound:
        with self._blame(uid):
            content = self.content(uid)
            sound = read_sound(content)
        if type(self).fingerprint is AudioDataset.fingerprint and type(self).content is AudioFolder.content:
            note(self.fingerprints, uid, self._print(uid, content), shown(str(self._root / self._files[uid])))
        return sound

    def label(self, uid: str) -> int:
        return self._labels[uid]

    def intervals(self, uid: str) -> tuple[Interval, ...]:
        return self._intervals[uid]

    def content(self, uid: str) -> bytes:
        return content(self._root / self._files[uid], LISTING)

    def sources(self, uid: str) -> tuple[str, ...]:
        return (os.path.abspath(self._root / self._files[uid]),)

    def described(self, uid: str) -> tuple[Any, ...]:
        return self.label(uid), self.intervals(uid)

    @contextmanager
    def _blame(self, uid: str) -> Iterator[None]:
        file = shown(str(self._root / self._files[uid]))
        try:
            yield
        except OSError as error:
            raise SampleError(f"{file}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise SampleError(f"{file}: {error}") from error


class WavFolder(AudioFolder):
    """``AudioFolder`` of WAV files only."""

    SUFFIXES = frozenset({".wav"})

    def sources(self, uid: str) -> tuple[str, ...]:
        return super().sources(uid)


def sound_files(root: Path, suffixes: Collection[str]) -> list[str]:
    """Paths of all recordings below ``root``, relative to it, with "/", sorted; hidden ones are skipped."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        sounds = [n for n in names if os.path.splitext(n)[1].lower() in suffixes and not n.startswith(".")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in sounds]
    return sorted(found)


def read_intervals(path: str, files: Sequence[str]) -> dict[str, tuple[Interval, ...]]:
    """file -> intervals, from CSV file,start,end in seconds. Raises UserError for a row that cannot be used."""
    known = set(files)
    found: dict[str, tuple[Interval, ...]] = {}
    for where, row in read_rows(path, ("file", *Interval._fields), "dataset.intervals"):
        file, texts = row["file"], [row[c] for c in Interval._fields]
        if file not in known:
            raise UserError(f"{where}: there is no sound {file}")
        try:
            interval = Interval(*map(float, texts))
        except ValueError:
            raise UserError(f"{where}: {' to '.join(texts)} is not two numbers of seconds") from None
        if not (0 <= interval.start < interval.end < math.inf):
            raise UserError(f"{where}: {' to '.join(texts)} is not an interval; it needs 0 <= start < end")
        found[file] = (*found.get(file, ()), interval)
    return found
