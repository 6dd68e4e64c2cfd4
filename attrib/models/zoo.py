"""Builders of nets by name; what a model YAML's ``_target_`` points to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import nn

from attrib.types import UserError


def _unknown(library: str, arch: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(arch, list(known), n=5, cutoff=0.4)
    return UserError(f"model.arch: {library} has no model {arch!r}; near names: {', '.join(near) or 'none'}")


def torchvision_net(arch: str, weights: str | None = None, **options: Any) -> nn.Module:
    """Any torchvision classifier.

    ``weights`` names a set of weights that torchvision downloads ("DEFAULT", "IMAGENET1K_V1");
    None leaves the net random, for a checkpoint to fill.
    """
    from torchvision import models

    try:
        builder = models.get_model_builder(arch)
    except ValueError as error:
        raise _unknown("torchvision", arch, models.list_models(models)) from error
    if arch in ("googlenet", "inception_v3"):
        options = {"init_weights": False, **options}  # else they warn, and take long
    if weights is None:
        return builder(weights=None, **options)
    entries = models.get_model_weights(arch)
    if weights not in entries.__members__:
        raise UserError(f"model.weights: {arch} has no weights {weights!r}; it has {', '.join(entries.__members__)}")
    if arch in ("googlenet", "inception_v3"):
        # torchvision sets this itself, but only when it loads the weights itself.
        options = {"transform_input": True, **options}
    net = builder(weights=None, **options)
    entry = entries[weights]
    try:
        net.load_state_dict(entry.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except OSError as error:
        raise UserError(
            f"torchvision cannot download {entry.url} ({error}). On a machine without network, put the file there "
            f"by hand and set model.weights=null model.checkpoint=FILE"
        ) from error
    return net


def timm_net(arch: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """Any timm classifier; ``pretrained`` downloads its weights."""
    import timm

    if not timm.is_model(arch.partition(".")[0]):
        raise _unknown("timm", arch, timm.list_models())
    return timm.create_model(arch, pretrained=pretrained, **options)
