"""The Python version of CIFAR, read without unpickling.

A pickle is a program, and Python's own reader calls whatever it names. This reader knows the few instructions that the
six files of CIFAR-10 and the three of CIFAR-100 consist of: dictionaries, lists, tuples, strings, integers and one
array of bytes. The three names that numpy's arrays need are compared as text and never imported; anything else is
refused. ``pickletools``, which tells the instructions apart, runs nothing.
"""

from __future__ import annotations

import math
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from attrib.types import UserError

_MOST = 2**28  # bytes of a file; CIFAR-100's training file has 155 MB
_RECONSTRUCT, _NDARRAY, _DTYPE = "numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"


class _Name(str):
    """What an instruction wants to import."""


class _DType:
    """Of bytes: the only one that is allowed."""


class _Array:
    """An array that is still to be filled."""

    value: np.ndarray


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"SHORT_BINSTRING", "BINSTRING", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BININT", "BININT1", "BININT2"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a file of CIFAR. Raises UserError naming the file and the instruction that is refused."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"dataset.root: {path} cannot be read: {error.strerror or error}") from error
    if len(content) > _MOST:
        raise UserError(f"dataset.root: {path} has {len(content):,} bytes, more than any file of CIFAR")
    try:
        found = _run(content)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(
            f"dataset.root: {path} is damaged, or holds more than CIFAR's own files: {error}; it was not unpickled"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"dataset.root: {path} holds {type(found).__name__}, not a dictionary")
    return {str(key): _plain(value) for key, value in found.items()}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


def _run(content: bytes) -> Any:
    """Raises ValueError and what wrong operands raise."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def marked() -> list[Any]:
        start = len(stack) - 1 - stack[::-1].index(_MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    code: Any
    argument: Any
    for code, argument, _ in pickletools.genops(content):
        name = code.name
        if name == "STOP":
            return stack.pop()
        if name == "PROTO":
            continue
        if name == "MARK":
            stack.append(_MARK)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(marked()))
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name in ("APPEND", "APPENDS"):
            items = marked() if name == "APPENDS" else [stack.pop()]
            _of(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = marked() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            _of(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL" and argument in (_RECONSTRUCT, _NDARRAY, _DTYPE):
            stack.append(_Name(argument))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_made(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            _fill(stack[-1], state)
        else:
            raise ValueError(f"{name} {argument!r}"[:100])
    raise ValueError("it has no end")


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{type(value).__name__} in the place of {kind.__name__}")
    return value


def _made(what: Any, arguments: tuple[Any, ...]) -> _Array | _DType:
    if type(what) is _Name and what == _RECONSTRUCT and arguments[0] == _NDARRAY:
        return _Array()
    if type(what) is _Name and what == _DTYPE and arguments[0] == "u1":
        return _DType()
    raise ValueError(f"{what!r} of {arguments!r}"[:100])


def _fill(what: Any, state: tuple[Any, ...]) -> None:
    if isinstance(what, _DType):
        return  # the state of a type of single bytes says nothing
    _, shape, kind, fortran, content = state
    if not isinstance(what, _Array) or not isinstance(kind, _DType):
        raise ValueError(f"{type(what).__name__} of {kind!r}"[:100])
    data = content.encode("latin-1") if isinstance(content, str) else bytes(content)
    if math.prod(shape) != len(data) or min(shape) < 0:
        raise ValueError(f"an array of {shape} with {len(data):,} bytes")
    what.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
