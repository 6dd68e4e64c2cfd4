"""The YAML of a text dataset, composed and built without a text model."""

from __future__ import annotations

import inspect

import hydra.utils
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import ROOT

from attrib.config.objects import build
from attrib.datasets import Selection, TextDataset


def preset(name: str, *overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("run", [f"dataset={name}", *overrides])
    encoder = {"_target_": "attrib.datasets.WordEncoder", "vocabulary": ["<unk>", "<pad>", "good"]}
    config = OmegaConf.merge(config, {"model": {"input": None}}, {"model": {"input": encoder}})
    return OmegaConf.to_container(config["dataset"], resolve=True, throw_on_missing=True)


def both(node: dict) -> list[TextDataset]:
    """The dataset and its estimation set, and that a YAML shows every field."""
    made = []
    for part in (node, node["estimation"]):
        fields = {k: v for k, v in part.items() if k not in ("name", "target", "select", "estimation")}
        what = hydra.utils.get_class(fields["_target_"])
        assert {k for k in fields if not k.startswith("_")} == set(inspect.signature(what).parameters)
        made.append(build(fields, "dataset"))
    assert build(node["select"], "select") == Selection()
    assert Selection(**node["estimation"]["select"]).count == 500
    return made
