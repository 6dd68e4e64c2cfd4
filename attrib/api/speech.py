"""Messages that speak to those at a command line, as they are said to those who call from Python."""

from __future__ import annotations

import re

_SAID = (
    (r"dataset\.target=(predicted|second|label)\b", r'target="\1"'),
    (r"dataset\.target\b", "target"),
    (r"\brun\.(device|dtype)=(\w+)(?=[,;.\s]|$)", r'run={"\1": "\2"}'),
    (r"\bmethod=(\w+)", r'method="\1"'),
    (r"\bset (model\.\w+=\S+) (model\.\w+=\S+)", r'say overrides=["\1", "\2"]'),
)


def to_callers(text: str) -> str:
    """
    >>> to_callers("explain another class with dataset.target=predicted; take run.device=cpu")
    'explain another class with target="predicted"; take run={"device": "cpu"}'
    >>> to_callers("overrides: run.device=cpu: only model.* are set so; set model.weights=null model.checkpoint=FILE")
    'overrides: run.device=cpu: only model.* are set so; say overrides=["model.weights=null", "model.checkpoint=FILE"]'
    """
    for written, said in _SAID:
        text = re.sub(written, said, text)
    return text
