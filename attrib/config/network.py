"""What libraries download when a net is built, on a machine that reaches no server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.error import URLError

CLIENTS = ("httpx", "httpcore", "requests", "urllib3")  # whose errors are no ConnectionError
# What to do, by the field that asks for the download.
BY_HAND = {
    "pretrained": "set model.pretrained=false model.checkpoint=FILE",
    "weights": "set model.weights=null model.checkpoint=FILE",
    "path": "set model.path=FOLDER",
}


def by_hand(node: Mapping[str, Any], error: BaseException) -> str | None:
    """What to say of an error while ``node`` was built, if it is that no server was reached; else None."""
    reached = _unreachable(error)
    if reached is None:
        return None
    advice = next((how for field, how in BY_HAND.items() if field in node), "give it the file itself")
    return (
        f"cannot download what it needs ({type(reached).__name__}: {reached}). On a machine without network, put the "
        f"file there by hand and {advice}"
    )


def _unreachable(error: BaseException | None) -> BaseException | None:
    """The first of an error's causes by which a library says that a server could not be reached."""
    while error is not None:
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, ConnectionError | URLError) or (library in CLIENTS and "Connect" in type(error).__name__):
            return error
        error = error.__cause__ or error.__context__
    return None
