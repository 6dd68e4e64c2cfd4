"""Checkpoints: every usual wrapping is read, no code is run, and what does not fit is named."""

from __future__ import annotations

import os
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from attrib.metadata import read_metadata
from attrib.models import load_weights, save_checkpoint
from attrib.models.checkpoint import read_weights, resolve
from attrib.types import UserError


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def write(path: Path, weights: dict[str, Tensor], **options) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path, **options)
    return str(path)


def equal(module: nn.Module, weights: dict[str, Tensor]) -> bool:
    own = module.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[k], weights[k]) for k in own)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors", "odd name ü.bin"])
def test_formats(tmp_path, name):
    weights, target = net(1).state_dict(), net(2)
    load_weights(target, write(tmp_path / name, weights))
    assert equal(target, weights)


def test_the_format_before_torch_1_6(tmp_path):
    weights, target = net(1).state_dict(), net(2)
    load_weights(target, write(tmp_path / "w.pth", weights, _use_new_zipfile_serialization=False))
    assert equal(target, weights)


WRAPPINGS = {
    "state_dict": lambda w: {"state_dict": w, "epoch": 3, "optimizer": {"lr": 0.1}},
    "model_state_dict": lambda w: {"model_state_dict": w, "epoch": 3},
    "model": lambda w: {"model": w},
    "nested": lambda w: {"model": {"state_dict": w, "arch": "x"}},
    "parallel": lambda w: {f"module.{k}": v for k, v in w.items()},
    "wrapped parallel": lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}},
    "half": lambda w: {k: v.half() if v.is_floating_point() else v for k, v in w.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings(tmp_path, wrapping):
    weights, target = net(1).state_dict(), net(2)
    load_weights(target, write(tmp_path / "w.pt", WRAPPINGS[wrapping](weights)))
    if wrapping == "half":
        weights = {k: v.half().to(v.dtype) for k, v in weights.items()}
    assert equal(target, weights)
    assert all(v.dtype in (torch.float32, torch.int64) for v in target.state_dict().values())


def test_a_prefix_that_only_some_names_have_belongs_to_the_names(tmp_path):
    path = write(tmp_path / "w.pt", {"module.a": torch.zeros(1), "b": torch.zeros(1)})
    assert read_weights(path).keys() == {"module.a", "b"}


def test_match_by_order(tmp_path):
    weights, target = net(1).state_dict(), net(2)
    path = write(tmp_path / "w.pt", {f"other_{i}": v for i, v in enumerate(weights.values())})
    load_weights(target, path, match="order")
    assert equal(target, weights)
    with pytest.raises(
        UserError, match=r"w\.pt does not fit Sequential: missing: 0\.weight, 0\.bias, .*; unexpected: other_0"
    ):
        load_weights(target, path)
    short = write(tmp_path / "short.pt", dict(list(weights.items())[:-1]))
    with pytest.raises(UserError, match=r"short\.pt holds 8 tensors, the net has 9"):
        load_weights(target, short, match="order")
    swapped = write(tmp_path / "swapped.pt", dict(reversed(weights.items())))
    with pytest.raises(UserError, match=r"wrong shape: 0\.weight \(2,\) instead of \(4, 3, 3, 3\)"):
        load_weights(target, swapped, match="order")
    with pytest.raises(UserError, match=r"model\.match must be name or order, not 'position'"):
        load_weights(target, path, match="position")


def test_every_misfit_is_named_and_nothing_is_loaded(tmp_path):
    weights, target = dict(net(1).state_dict()), net(2)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    del weights["0.bias"]
    weights["1.weight"] = torch.zeros(5)
    weights["3.weight"] = torch.zeros(2, 4, 1)
    weights["head.weight"] = torch.zeros(1)
    with pytest.raises(UserError) as caught:
        load_weights(target, write(tmp_path / "w.safetensors", weights))
    text = str(caught.value)
    assert str(tmp_path / "w.safetensors") in text
    assert "missing: 0.bias;" in text
    assert "unexpected: head.weight;" in text
    assert "wrong shape: 1.weight (5,) instead of (4,), 3.weight (2, 4, 1) instead of (2, 4)" in text
    assert equal(target, before)


def test_long_lists_are_cut(tmp_path):
    path = write(tmp_path / "w.pt", {f"x{i}": torch.zeros(1) for i in range(20)})
    with pytest.raises(UserError, match=r"unexpected: x0, x1, x2, x3, x4, x5 and 14 more$"):
        load_weights(net(), path)


# Files that are none ------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 0", "pickle 2", "pickle 5"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".tar"])
def test_no_code_is_run(tmp_path, form, suffix):
    evil, path, proof = Malicious(), tmp_path / f"w{suffix}", tmp_path / "proof"
    evil.path = proof
    content = {"state_dict": {"0.weight": evil}}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the pickle's protocol
        with pytest.raises(UserError, match=r"model\.checkpoint: .*w\."):
            read_weights(str(path))
    assert not proof.exists()
    if form == "zip" and suffix == ".pt":
        with pytest.raises(
            UserError, match=r"holds more than weights \(posix\.system\), .* Save only model\.state_dict\(\)"
        ):
            read_weights(str(path))
    pickle.loads(pickle.dumps(evil))  # it would have worked
    assert proof.exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"holds more than weights \(torch\.nn\.modules\.linear\.Linear\)"):
        read_weights(str(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(1)], {"epoch": 1}, {1: torch.zeros(1)}, {"net": {"a": torch.zeros(1)}}, {"a": 1.0}, torch.zeros(1)],
)
def test_what_holds_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt holds no state dict \(name -> tensor\)"):
        read_weights(str(tmp_path / "w.pt"))


def test_numpy_arrays_are_no_tensors(tmp_path):
    torch.save({"a": np.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"holds more than weights \(numpy"):
        read_weights(str(tmp_path / "w.pt"))


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_files(tmp_path, name):
    path = tmp_path / name
    whole = Path(write(path, net().state_dict())).read_bytes()
    rng = random.Random(0)
    contents = [
        b"",
        b"x",
        b"version https://git-lfs.github.com/spec/v1\noid",
        b"<!DOCTYPE html>",
        whole[:500],
        whole[:-1],
    ]
    contents[:0] = [whole[: len(whole) // 2]]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"model\.checkpoint: .*{name} (cannot be read|is damaged)"):
            read_weights(str(path))
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(3):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_weights(str(path))
        except UserError:
            pass


# Where files are ----------------------------------------------------------------------------------


def test_no_such_file(tmp_path):
    for path in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(UserError, match=rf"model\.checkpoint: no such file: {path}"):
            read_weights(str(path))


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "w.pt", {"a": torch.ones(1)})
    assert read_weights("~/w.pt")["a"] == 1


def test_a_file_in_a_package(tmp_path, monkeypatch):
    package = tmp_path / "shipped_net" / "weights"
    package.mkdir(parents=True)
    (tmp_path / "shipped_net" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    write(package / "w.pt", {"a": torch.ones(1)})
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:shipped_net/weights/w.pt") == package / "w.pt"
    assert read_weights("package:shipped_net/weights/w.pt")["a"] == 1
    with pytest.raises(UserError, match=r"no such file: .*shipped_net/other\.pt"):
        read_weights("package:shipped_net/other.pt")
    with pytest.raises(
        UserError, match=r"package:not_there/w\.pt: the package is not installed; try: pip install not-there"
    ):
        read_weights("package:not_there/w.pt")
    for name in ("", "os", "a.b", "..", "shipped_net.sub"):
        with pytest.raises(UserError, match="is not installed"):
            read_weights(f"package:{name}/w.pt")


# What attrib writes -------------------------------------------------------------------------------


METADATA = {
    "target": "attrib.models.DeepLSTM",
    "arguments": {"vocab_size": 3, "dropout": 0.5, "embedding": None},
    "vocabulary": ["<unk>", "<pad>", "naïve \N{SNOWMAN}"],
    "training": {"accuracy": [0.5, 0.75]},
}


def test_a_checkpoint_comes_back(tmp_path):
    source, target, path = net(1), net(2), tmp_path / "new" / "folder" / "model.safetensors"
    save_checkpoint(path, source, METADATA)
    load_weights(target, str(path))
    assert equal(target, source.state_dict())
    assert read_metadata(str(path)) == METADATA
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    first = path.read_bytes()
    save_checkpoint(str(path), source, dict(reversed(METADATA.items())))
    assert path.read_bytes() == first
    save_checkpoint(path, target, {})
    assert read_metadata(str(path)) == {}


def test_tied_transposed_and_trained_weights_are_written(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.out.weight = self.words.weight
            self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
            self.register_buffer("part", self.turned.detach()[1:])

    source, target = Tied(), Tied()
    source.out(source.words(torch.tensor([1]))).sum().backward()
    save_checkpoint(tmp_path / "w.safetensors", source, METADATA)
    with torch.no_grad():
        target.turned.zero_()
        target.words.weight.zero_()
    load_weights(target, str(tmp_path / "w.safetensors"))
    assert equal(target, source.state_dict())
    assert target.out.weight is target.words.weight


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_checkpoint(path, net(1), METADATA)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(path, net(2), {"a": object()})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_checkpoint(path, net(2), {"loss": float("nan")})
    with pytest.raises(UserError, match=r"name ends in \.safetensors, not \.pt: .*w\.pt"):
        save_checkpoint(tmp_path / "w.pt", net(2), {})

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, net(2), METADATA)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_metadata_of_other_files(tmp_path):
    assert read_metadata(write(tmp_path / "w.safetensors", net().state_dict())) == {}
    assert read_metadata(write(tmp_path / "w.pt", net().state_dict())) == {}
    with pytest.raises(UserError, match=rf"no such file: {tmp_path}/none\.safetensors"):
        read_metadata(str(tmp_path / "none.safetensors"))
    path = tmp_path / "bad.safetensors"
    for text in ("{", "[1]", '"a"', "3"):
        safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"attrib": text})
        with pytest.raises(UserError, match=r"bad\.safetensors"):
            read_metadata(str(path))
    save_checkpoint(path, net(), METADATA)
    whole = path.read_bytes()
    for content in (b"", b"x", whole[:20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.checkpoint: .*bad\.safetensors cannot be read"):
            read_metadata(str(path))
