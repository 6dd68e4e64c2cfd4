"""Hugging Face's hub, from a machine that may have no network."""

from __future__ import annotations

import contextlib
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def hub_at_once(place: str = "") -> Iterator[str]:
    """Inside, without a network, the hub looks into its cache only; else it asks again and again, for a minute.

    What is yielded says why it cannot be reached; "" where it may be, where the caller has said so already, and where
    ``place`` is a folder, for which nobody is asked.
    """
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    asked = host and not constants.HF_HUB_OFFLINE and not os.path.isdir(place)
    proxies = urllib.request.getproxies().keys() - {"no"}  # "no": what goes by none
    if not asked or proxies:  # a proxy knows names that we do not
        yield ""
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        why = f"{host}: {error}"
    else:
        yield ""
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE = False
