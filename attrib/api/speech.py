"""Messages that speak to those at a command line, as they are said to those who call from Python."""

from __future__ import annotations

import re
from collections.abc import Callable

_SAID: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"dataset\.target=(predicted|second|label)\b", r'target="\1"'),
    (r"dataset\.target\b", "target"),
    (r"\brun\.(device|dtype)=(\w+)(?=[,;.\s]|$)", r'run={"\1": "\2"}'),
    (r"\bmethod=(\w+)", r'method="\1"'),
    (r"\bset (model\.\w+=\S+) (model\.\w+=\S+)", r'say overrides=["\1", "\2"]'),
    (r"\bset model\.layers\.(\w+\b|<role>)(?! to )", r'give layers={"\1": "PATH"}'),
    (r"\bset method\.(\w+)=([a-z_]+)\b(?![=.])", r'give \1="\2"'),
    (r"\bSet method\.(\w+)=([a-z_]+)\b(?![=.])", r'Give \1="\2"'),
    (r'\b([Gg]ive \w+)="(true|false)"', lambda found: f"{found[1]}={found[2].title()}"),
)


def to_callers(text: str) -> str:
    """
    >>> to_callers("explain another class with dataset.target=predicted; take run.device=cpu")
    'explain another class with target="predicted"; take run={"device": "cpu"}'
    >>> to_callers("overrides: run.device=cpu: only model.* are set so; set model.weights=null model.checkpoint=FILE")
    'overrides: run.device=cpu: only model.* are set so; say overrides=["model.weights=null", "model.checkpoint=FILE"]'
    >>> to_callers("(set model.layers.<role>). Set method.reduce=abs_sum, or set method.softmax=false")
    '(give layers={"<role>": "PATH"}). Give reduce="abs_sum", or give softmax=False'
    """
    for written, said in _SAID:
        text = re.sub(written, said, text)
    return text
