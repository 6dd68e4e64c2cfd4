"""Sounds as data: WAV files of every kind, resampling, intervals, and generated clips with a known event."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import wav_reader
from contracts import forbid_global_rng
from scipy.io import wavfile

from attrib.datasets import AudioDataset, AudioFolder, Interval, Sound, Tones, WaveTransform, WavFolder
from attrib.datasets.sound import read_sound
from attrib.datasets.tones import EVENTS, LENGTH, LEVEL, RATE
from attrib.types import UNREADABLE, SampleError, UserError

NET = WaveTransform(8000, 4096, 0.0, 0.1)


def sine(hertz: float, rate: int = 8000, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def pitch(samples: np.ndarray, rate: int) -> float:
    """The strongest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 8 * len(samples)))
    return spectrum.argmax() * rate / (8 * len(samples))


def write(path: Path, samples: np.ndarray, rate: int = 8000, bits: int = 16, channels: int = 1) -> Path:
    """PCM by the standard library; ``samples`` in -1 .. 1, the same in every channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scaled = np.rint(samples * (2 ** (bits - 1) - 1)).astype(np.int64)
    if bits == 8:
        raw = (scaled + 128).astype(np.uint8).tobytes()
    else:
        raw = b"".join(int(v).to_bytes(bits // 8, "little", signed=True) * channels for v in scaled)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(bits // 8)
        file.setframerate(rate)
        file.writeframes(raw)
    return path


# ---- WAV ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_pcm_of_every_width(bits, tmp_path):
    samples = np.concatenate((sine(440), [1.0, -1.0, 0.0]))
    found = read_sound(write(tmp_path / "a.wav", samples, bits=bits).read_bytes())
    assert found.rate == 8000
    np.testing.assert_allclose(found.samples, samples, rtol=0, atol=2 / 2**bits + 1 / 2 ** (bits - 1))


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_files_of_scipy(kind, tmp_path):
    samples = np.stack((sine(440), np.zeros(4000)), axis=1)
    values = samples if np.issubdtype(kind, np.floating) else samples * np.iinfo(np.int16).max
    if kind is np.uint8:
        values = samples * 127 + 128
    if kind is np.int32:
        values = samples * np.iinfo(np.int32).max
    wavfile.write(tmp_path / "a.wav", 22050, values.astype(kind))
    found = read_sound((tmp_path / "a.wav").read_bytes())
    assert found.rate == 22050
    np.testing.assert_allclose(found.samples, sine(440) / 2, atol=0.01)  # channels are averaged


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def riff(*chunks: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + sum(map(len, chunks))) + b"WAVE" + b"".join(chunks)


def form(tag: int = 1, channels: int = 1, rate: int = 8000, bits: int = 16, more: bytes = b"") -> bytes:
    return chunk(b"fmt ", struct.pack("<HHIIHH", tag, channels, rate, 0, 0, bits) + more)


DATA = struct.pack("<4h", 0, 16384, -16384, -32768)
VALUES = [0, 0.5, -0.5, -1]


def test_chunks_that_mean_nothing_are_passed_over():
    extensible = struct.pack("<HHI", 22, 16, 4) + struct.pack("<H", 1)
    extensible += bytes.fromhex("000000001000800000aa00389b71")  # the rest of the name of PCM
    files = (
        riff(chunk(b"LIST", b"odd"), form(), chunk(b"fact", b"1234"), chunk(b"data", DATA), chunk(b"id3 ", b"x")),
        riff(form(0xFFFE, more=extensible), chunk(b"data", DATA)),
        riff(form(), b"data\xff\xff\xff\xff" + DATA),  # a stream whose end was not known
    )
    for file in files:
        assert read_sound(file).samples.tolist() == VALUES


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "empty, damaged or not a sound"),
        (b"ID3\x03" + bytes(40), "not a sound that libsndfile knows"),
        (riff(), "No 'data' chunk marker"),
        (riff(form()), "No 'data' chunk marker"),
        (riff(form(), chunk(b"data", b"")), "no sound in it"),
        (riff(form(), chunk(b"data", DATA))[:-3], "cut short: 5 of 8 bytes"),
        (riff(chunk(b"data", DATA), form()), "No 'data' chunk marker"),
        (riff(chunk(b"fmt ", b"short"), chunk(b"data", DATA)), "Short 'fmt ' chunk"),
        (riff(form(tag=2, bits=4), chunk(b"data", DATA)), "Malformed 'fmt ' chunk"),
        (riff(form(channels=0), chunk(b"data", DATA)), "Channel count is zero"),
        (riff(form(rate=4_000_000_000), chunk(b"data", DATA)), "not a sound that libsndfile knows"),
        (riff(form(rate=10), chunk(b"data", DATA)), "1 channels, 10 samples a second"),
        (riff(form(tag=3, bits=32), chunk(b"data", struct.pack("<2f", 0, float("nan")))), "NaN"),
    ],
)
def test_damage_is_named(data, problem):
    with pytest.raises(ValueError, match=problem):
        read_sound(data)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels", [1, 2, 3, 6])
@pytest.mark.parametrize("form", ["WAV", "WAVEX"])
def test_wav_files_sound_as_they_did_before_libsndfile_read_them(subtype, channels, form, tmp_path):
    """Bit for bit, or stored results would be of other sounds."""
    samples = np.random.default_rng(channels).uniform(-1, 1, (1001, channels))
    samples[:3] = [[-1.0], [1.0], [0.0]]
    if subtype in ("FLOAT", "DOUBLE"):
        samples[5] = 3.7  # beyond full scale
    soundfile.write(tmp_path / "a.wav", samples, 22050, subtype, format=form)
    data = (tmp_path / "a.wav").read_bytes()
    now, before = read_sound(data), wav_reader.read_wav(data)
    assert now.rate == before.rate == 22050
    assert now.samples.dtype == before.samples.dtype == np.float64
    assert np.array_equal(now.samples, before.samples)
    assert np.array_equal(NET.wave(now), NET.wave(Sound(*before)))


# ---- other formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "tolerance"), [("flac", 2.0**-15), ("ogg", 0.05), ("mp3", 0.05), ("wav", 2.0**-15)])
def test_compressed_sounds_mixed_down_and_resampled(suffix, tolerance, tmp_path):
    """Two channels of another rate: what the network hears is their mean at its own rate, at the same time."""
    left = sine(440, 16000, 0.512)
    (tmp_path / "cat").mkdir()
    soundfile.write(tmp_path / "cat" / f"a.{suffix}", np.stack((left, np.zeros_like(left)), axis=1), 16000)
    data = AudioFolder(str(tmp_path), NET)
    assert data.uids == ("cat/a",)
    heard = data.wave("cat/a")
    expected = NET.wave(Sound(left / 2, 16000))
    assert len(heard) == NET.length
    assert pitch(heard, 8000) == pytest.approx(440, abs=2)
    inner = slice(400, -400)  # codecs fade in and out
    assert np.abs(heard - expected)[inner].max() < tolerance


def test_every_format_in_one_folder(tmp_path):
    for i, suffix in enumerate(("wav", "flac", "ogg", "mp3", "WAV")):
        soundfile.write(tmp_path / f"{i}.{suffix}", sine(440), 8000, format=suffix.upper())
    (tmp_path / "notes.txt").write_text("")
    assert AudioFolder(str(tmp_path), NET).uids == ("0", "1", "2", "3", "4")
    assert WavFolder(str(tmp_path), NET).uids == ("0", "4")
    assert AudioFolder(str(tmp_path), NET).key != WavFolder(str(tmp_path), NET).key


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
@pytest.mark.parametrize("keep", [0, 3, 60])
def test_a_damaged_file_costs_its_sample_only(suffix, keep, tmp_path):
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.{suffix}", sine(440), 8000)
    path = tmp_path / f"b.{suffix}"
    path.write_bytes(path.read_bytes()[:keep])
    data = AudioFolder(str(tmp_path), NET)
    with pytest.raises(SampleError, match=rf"b\.{suffix}: (empty, damaged or not a sound|no sound|cut short)"):
        data.batch(["b"])
    assert data.batch(["a"]).x.shape == (1, 1, NET.length)


def test_a_flac_that_is_cut_short_is_not_a_shorter_one(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 40_000), 8000)
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(SampleError, match=r"a\.flac: (cut short|empty, damaged)"):
        AudioFolder(str(tmp_path), NET).batch(["a"])


# ---- what the network hears ---------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("hertz", [300, 1000, 2500])
def test_resampling_keeps_pitch_level_and_time(rate, hertz):
    found = NET.wave(Sound(sine(hertz, rate, 0.6), rate))
    assert pitch(found, 8000) == pytest.approx(hertz, abs=2)
    assert np.sqrt(2) * found[500:-500].std() == pytest.approx(0.5, abs=0.01)
    click = np.zeros(int(rate * 0.512))
    click[round(rate * 0.2)] = 1
    assert np.abs(NET.wave(Sound(click, rate))).argmax() == pytest.approx(1600, abs=1)


def test_what_is_too_high_does_not_come_back_as_something_lower():
    assert np.abs(NET.wave(Sound(sine(7000, 44100), 44100)))[500:-500].max() < 0.005


def test_long_sounds_are_cut_to_their_middle_and_short_ones_get_silence():
    ramp = np.arange(10.0)
    assert WaveTransform(100, 4).wave(Sound(ramp, 100)).tolist() == [3, 4, 5, 6]
    assert WaveTransform(100, 14).wave(Sound(ramp, 100)).tolist() == [0, 0, *range(10), 0, 0]
    assert WaveTransform(100, 13).wave(Sound(ramp, 100)).tolist() == [0, 0, *range(10), 0]
    intervals = [Interval(0.03, 0.05), Interval(0.08, 9)]
    inside = [3, 4, 8, 9]
    for length in (4, 13, 14, 10):
        transform = WaveTransform(100, length)
        mask = transform.mask(intervals, Sound(ramp, 100))
        # An interval may go on behind the sound's end, where there is silence.
        assert set(transform.wave(Sound(ramp, 100))[mask]) - {0} <= set(inside)
        assert mask.sum() >= sum(v in inside for v in transform.wave(Sound(ramp, 100)))
    assert not WaveTransform(100, 4).mask([], Sound(ramp, 100)).any()


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 44100])
@pytest.mark.parametrize("seconds", [0.3, 0.512, 0.9])
def test_intervals_lie_where_the_sound_is(rate, seconds):
    """A burst and its interval, through resampling and cutting."""
    samples = np.zeros(int(rate * seconds))
    middle = seconds / 2
    start, end = middle - 0.08, middle + 0.05
    samples[int(start * rate) : int(end * rate)] = sine(700, rate, 1)[: int(end * rate) - int(start * rate)]
    sound = Sound(samples, rate)
    heard, mask = NET.wave(sound), NET.mask([Interval(start, end)], sound)
    assert mask.sum() == pytest.approx(0.13 * 8000, abs=2)
    assert (heard[mask] ** 2).sum() > 0.97 * (heard**2).sum()


def test_fields_of_the_transform_are_checked():
    for field, value in (("rate", 0), ("length", 0), ("std", 0.0)):
        with pytest.raises(UserError, match=f"model.input.{field} is {value}"):
            WaveTransform(**{"rate": 8000, "length": 9, field: value})
    for other in ({"size": 224}, None, "8000"):
        with pytest.raises(UserError, match="does not say how it wants its sounds"):
            Tones(other)


# ---- a folder -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "sounds"
    write(root / "dog" / "a.wav", sine(300))
    write(root / "dog" / "far" / "b.WAV", sine(400, 16000), rate=16000, channels=2, bits=24)
    write(root / "cat" / "a.wav", sine(900))
    write(root / "nobody.wav", sine(500))
    write(root / ".hidden" / "x.wav", sine(500))
    (root / "cat" / "notes.txt").write_text("meow")
    return root


def test_a_folder_of_sounds(folder):
    data = WavFolder(str(folder), NET)
    assert data.uids == ("cat/a", "dog/a", "dog/far/b", "nobody")
    assert dict(data.names) == {0: "cat", 1: "dog"}
    batch = data.batch(data.uids)
    assert batch.x.shape == (4, 1, 4096)
    assert batch.x.dtype == torch.float32
    assert batch.roi is None
    assert batch.target.tolist() == [0, 1, 1, -1]
    for uid, hertz in zip(data.uids, (900, 300, 400, 500)):
        assert pitch(data.wave(uid), data.rate) == pytest.approx(hertz, abs=2)
        torch.testing.assert_close(data.batch([uid]).x[0, 0], torch.tensor(data.wave(uid)) / 0.1)
    assert isinstance(data, AudioDataset)
    assert data.modality == "audio"
    assert data.box_area("cat/a") is None


def test_a_damaged_file_costs_that_sample_alone(folder):
    bad = folder / "dog" / "a.wav"
    bad.write_bytes(bad.read_bytes()[:3000])
    data = WavFolder(str(folder), NET)
    with pytest.raises(SampleError, match=r"dog/a\.wav: cut short"):
        data.batch(["dog/a"])
    assert data.fingerprint("dog/a") != UNREADABLE  # its bytes are known; ``batch`` says what is wrong
    bad.unlink()
    with pytest.raises(SampleError, match=r"dog/a\.wav: cannot be read: No such file"):
        data.wave("dog/a")
    assert WavFolder(str(folder), NET).batch(["cat/a"]).target.item() == 0


def test_fingerprints_are_of_content_label_and_intervals(folder, tmp_path):
    first = {uid: WavFolder(str(folder), NET).fingerprint(uid) for uid in WavFolder(str(folder), NET).uids}
    assert len(set(first.values())) == 4
    moved = folder.rename(tmp_path / "elsewhere")
    assert {uid: WavFolder(str(moved), NET).fingerprint(uid) for uid in first} == first
    write(moved / "cat" / "a.wav", sine(901))
    table = tmp_path / "intervals.csv"
    table.write_text("file,start,end\ndog/a.wav,0.1,0.2\ndog/a.wav,0.3,0.4\n")
    data = WavFolder(str(moved), NET, intervals=str(table))
    changed = {uid for uid in first if data.fingerprint(uid) != first[uid]}
    assert changed == {"cat/a", "dog/a"}
    assert data.key == WavFolder(str(moved), NET).key != WavFolder(str(moved), WaveTransform(8000, 4000)).key


def test_intervals_of_recordings(folder, tmp_path):
    table = tmp_path / "intervals.csv"
    table.write_text("file,start,end\ndog/far/b.WAV,0.1,0.2\n")
    data = WavFolder(str(folder), NET, intervals=str(table))
    roi = data.batch(data.uids).roi
    assert roi.sum(1).tolist() == [0, 0, 800, 0]
    assert data.box_area("dog/far/b") == pytest.approx(800 / 4096)
    silence = (4096 - 4000) // 2  # the sound of half a second has it on both sides
    assert roi[2].nonzero()[0].item() == silence + 800
    for row, problem in (
        ("dog/z.wav,0,1", "there is no sound dog/z.wav"),
        ("dog/a.wav,0.2,0.1", "it needs 0 <= start < end"),
        ("dog/a.wav,x,1", "not two numbers of seconds"),
        ("dog/a.wav,0,inf", "it needs"),
    ):
        table.write_text(f"file,start,end\n{row}\n")
        with pytest.raises(UserError, match=f"dataset.intervals: .*line 2: .*{problem}"):
            WavFolder(str(folder), NET, intervals=str(table))


def test_folders_without_sounds(tmp_path):
    with pytest.raises(UserError, match=r"holds no \*\.wav"):
        WavFolder(str(tmp_path), NET)
    with pytest.raises(UserError, match="does not exist"):
        WavFolder(str(tmp_path / "none"), NET)


# ---- generated ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tones() -> Tones:
    return Tones(NET)


def test_splits_are_other_samples(tones):
    train, val = Tones(NET, "train"), Tones(NET, "val")
    assert [len(d.uids) for d in (train, val, tones)] == [3000, 600, 600]
    assert not {*train.uids} & {*val.uids} | {*val.uids} & {*tones.uids}
    assert np.abs(train.wave("train/00000") - tones.wave("test/00000")).max() > 0.05
    labels = np.array([tones.label(uid) for uid in tones.uids])
    assert (np.bincount(labels) == 100).all()
    with pytest.raises(UserError, match=r"dataset\.split must be"):
        Tones(NET, "dev")


def test_the_region_is_where_the_event_sounds(tones):
    batch = tones.batch(tones.uids[:60])
    assert batch.roi.shape == (60, LENGTH)
    for uid, roi in zip(batch.uids, batch.roi.numpy()):
        parts = tones.parts(uid)
        assert not parts.event[~roi].any()  # nothing of it lies outside
        assert (parts.event[roi] != 0).mean() > 0.85  # and it fills the region: clicks fade to 0 between each other
        assert not parts.distractors[roi].any()
        assert np.sqrt(np.mean(parts.event[roi] ** 2)) == pytest.approx(LEVEL)
        assert np.flatnonzero(roi).tolist() == list(range(parts.start, parts.end))
        assert 0.15 < roi.mean() < 0.25
        assert tones.box_area(uid) == pytest.approx(roi.mean())
        whole = parts.event + parts.distractors + parts.hiss
        np.testing.assert_allclose(tones.wave(uid), whole, atol=2e-4)


def test_regions_are_everywhere(tones):
    roi = tones.batch(tones.uids[:240]).roi.double()
    thirds = roi.unflatten(1, (4, -1)).mean((0, 2))
    assert (thirds > 0.7 * thirds.mean()).all()
    by_class = torch.stack([roi[k::6].mean(0).unflatten(0, (4, -1)).mean(1) for k in range(6)])
    assert (by_class > 0.05).all()


def test_distractors_are_independent_of_the_class(tones):
    """Exactly: another label changes the event and nothing else."""
    others = Tones(NET)
    for uid in tones.uids[:12]:
        others._labels[uid] = (others._labels[uid] + 1) % len(EVENTS)
        one, other = tones.parts(uid), others.parts(uid)
        assert (one.start, one.end) == (other.start, other.end)
        np.testing.assert_array_equal(one.distractors, other.distractors)
        np.testing.assert_array_equal(one.hiss, other.hiss)
        assert np.abs(one.event - other.event).max() > 0.05


def test_the_classes_are_what_their_names_say():
    clear = Tones(NET, noise=0.0, distractors=0)
    seen = set()
    for uid in clear.uids[:18]:
        kind, parts = clear.names[clear.label(uid)], clear.parts(uid)
        event = parts.event[parts.start : parts.end]
        first, last = pitch(event[50:450], RATE), pitch(event[-450:-50], RATE)
        envelope = np.sqrt(np.convolve(event**2, np.ones(20) / 20, "valid"))[60:-60]
        if kind == "rising":
            assert last > 1.3 * first
        elif kind == "falling":
            assert first > 1.3 * last
        elif kind in ("tremolo", "clicks"):
            assert envelope.min() < 0.25 * envelope.max()
        else:
            spectrum = np.abs(np.fft.rfft(event, 8 * len(event)))
            peaks = np.arange(len(spectrum))[spectrum > 0.4 * spectrum.max()] * RATE / (8 * len(event))
            assert peaks.max() / peaks.min() == pytest.approx(1.5, rel=0.15)  # a fifth, at once or in turn
        seen.add(kind)
    assert seen == set(EVENTS)


def test_a_clip_is_the_same_in_any_batch(tones):
    uids = tones.uids[:6]
    with forbid_global_rng():
        whole = tones.batch(uids)
    assert torch.equal(Tones(NET).batch(uids[::-1]).x.flip(0), whole.x)
    for i, uid in enumerate(uids):
        assert torch.equal(tones.batch([uid]).x[0], whole.x[i])
    assert whole.x.abs().max() <= 10.0001
    values = whole.x[:, 0].double().numpy() * 0.1 * 32768
    np.testing.assert_allclose(values, values.round(), atol=0.01)  # 16 bits


def test_what_changes_a_clip_changes_its_name(tones):
    again = Tones(NET)
    assert again.key == tones.key
    assert again.fingerprint(again.uids[0]) == tones.fingerprint(tones.uids[0])
    for other in (Tones(NET, seed=1), Tones(NET, distractors=2), Tones(NET, noise=0.1)):
        assert other.key != tones.key
        assert other.fingerprint(other.uids[0]) != tones.fingerprint(tones.uids[0])
    for field, value in (("distractors", 9), ("noise", -1.0)):
        with pytest.raises(UserError, match=f"dataset.{field} is {value}"):
            Tones(NET, **{field: value})
