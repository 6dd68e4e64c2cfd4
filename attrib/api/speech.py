"""Messages that speak to those at a command line, as they are said to those who call from Python."""

from __future__ import annotations

import re

_SAID = (
    (r"dataset\.target=(predicted|second|label)\b", r'target="\1"'),
    (r"dataset\.target\b", "target"),
    (r"\brun\.(device|dtype)=([\w:]+)", r'run={"\1": "\2"}'),
    (r"\bmethod=(\w+)", r'method="\1"'),
)


def to_callers(text: str) -> str:
    """
    >>> to_callers("explain the model's own class with dataset.target=predicted; take run.device=cpu")
    'explain the model\'s own class with target="predicted"; take run={"device": "cpu"}'
    """
    for written, said in _SAID:
        text = re.sub(written, said, text)
    return text
