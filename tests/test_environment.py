"""What a run writes down of its environment, also of one that is broken."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import torch

from attrib.process.environment import devices, environment, packages


def test_what_is_imported_is_recorded():
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert found["python"] == sys.version
    assert found["torch"] == torch.__config__.show()


def test_remains_of_installations_end_no_run(tmp_path, monkeypatch):
    for name in ("empty", "nameless", "link", "binary", "old", "numpy"):
        (tmp_path / f"{name}-0.0.1.dist-info").mkdir()
    (tmp_path / "nameless-0.0.1.dist-info" / "METADATA").write_text("Version: 1\n")
    (tmp_path / "link-0.0.1.dist-info" / "METADATA").symlink_to(tmp_path / "nowhere")
    (tmp_path / "binary-0.0.1.dist-info" / "METADATA").write_bytes(b"Name: \xff\xfe\x00")
    (tmp_path / "old-0.0.1.dist-info" / "METADATA").write_text("Name: old\n")
    (tmp_path / "numpy-0.0.1.dist-info" / "METADATA").write_text("Name: numpy\nVersion: 0.0.1\n")
    (tmp_path / "junk.egg-info").write_text("nothing")
    monkeypatch.syspath_prepend(tmp_path)
    found = packages()
    assert found["numpy"] == "0.0.1"  # the one that would be imported
    assert found["old"] is None
    assert found["torch"] == importlib.metadata.version("torch")
    assert all(found)


def test_a_gpu_that_cannot_be_used_ends_no_run(monkeypatch):
    def broken(index: int) -> str:
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices() == ["RuntimeError: the driver is too old"]
