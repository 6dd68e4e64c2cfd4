"""Which layer of a net plays which role for the methods, and which axes of its output are space."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from attrib.models.admission import Admission
from attrib.models.default_layers import ROLES, DefaultLayer, default_layer, only_embedding
from attrib.models.extent import PartialImageError
from attrib.models.layers import check_rows
from attrib.models.reading import Name, Reading, described, find
from attrib.models.split import HookSplit
from attrib.models.token_axis import tokens_are_second
from attrib.types import UserError, did_you_mean

log = logging.getLogger(__name__)

Front = Callable[[Tensor], Tensor]  # (N, *input) -> what is read of it, (N, *layer)


class Roles:
    """The layers of a classifier by role, such as ``cam`` or ``bottleneck``: ``model.roles``.

    What has to be found out by running the net is found out once, and by the original of a randomised copy.

    named      role -> module path, as the user names them
    found      role -> what was found out, where no layer was named
    net        the net in which the layers are; ``admission`` knows the shape of its inputs
    in_pieces  computes a ``Front`` of any number of rows in pieces for which there is memory
    like       an empty tensor with the dtype and device of the net's inputs
    original   the roles of the net that this one is a randomised copy of

    Raises UserError for a path that the net does not have.

    >>> import torch
    >>> from attrib.models.classifier import Classifier
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    >>> model = Classifier(net, {"cam": "1"}, input_shape=(3, 4, 4))
    >>> model.roles.path("cam"), str(model.roles.reading("cam", (3, 4, 4)))
    ('1', 'channels_first')
    """

    def __init__(
        self,
        named: Mapping[str, str],
        net: nn.Module,
        admission: Admission,
        in_pieces: Callable[[Front, Tensor], Tensor],
        like: Tensor,
        original: Roles | None,
    ) -> None:
        self.named, self._net, self._admission = named, net, admission
        self._in_pieces, self._like, self._original = in_pieces, like, original
        self.found: dict[str, DefaultLayer] = {}
        self._readings: dict[tuple[str, tuple[int, ...], tuple[Name, ...]], Reading] = {}
        self._token_axes: dict[str, bool] = {}
        names = [name for name, _ in self._net.named_modules(remove_duplicate=False) if name]
        for role, path in self.named.items():
            if path not in names:
                raise UserError(
                    f"model.layers.{role}: {type(self._net).__name__} has no layer {path!r}{did_you_mean(path, names)} "
                    f"(its upper layers: {', '.join(n for n in names if n.count('.') < 2)})"
                )

    def path(self, role: str, shape: tuple[int, ...] | None = None) -> str:
        """The module path of a role.

        Where none is named, that of ``cam`` and ``bottleneck`` is found out for images or sounds of ``shape``, by
        default those that the net has been tried on, and that of ``embedding`` where there is only one. A randomised
        copy has the layers of its original.

        Raises UserError for a role that has no layer.
        """
        if role in self.named:
            return self.named[role]
        if role in self.found:
            return self.found[role].path
        if self._original is not None:
            return self._original.path(role, shape)
        shape = shape or self._admission.shape
        if role == "embedding":
            self.found[role] = only_embedding(self._net)
            return self.found[role].path
        if role not in ROLES or shape is None:
            known = ", ".join(sorted(self.named)) or "none"
            raise UserError(f"the model has no layer for the role {role!r} (only: {known}); set model.layers.{role}")

        partial: list[PartialImageError] = []

        def look(path: str) -> Reading | None:
            try:
                return self._reading(path, shape, "auto", f"{type(self._net).__name__}'s layer {path}")
            except PartialImageError as error:
                partial.append(error)
            except UserError:
                pass
            return None

        try:
            found = self.found[role] = default_layer(self._net, role, shape, self._like, look)
        except UserError as error:
            if partial:
                raise partial[0] from error
            raise
        log.info("model.layers.%s=%s, which nobody named: %s", role, found.path, found.why)
        return found.path

    def layer(self, role: str) -> nn.Module:
        return self._net.get_submodule(self.path(role))

    def reading(self, role: str, shape: tuple[int, ...], said: str = "auto") -> Reading:
        """Which axes of the layer's output are space, for images (C, H, W) or sounds (C, L).

        With ``said="tokens"`` only which tokens are. It is the same for every batch. Raises UserError if it cannot be
        found out.
        """
        if self._original is not None:
            return self._original.reading(role, shape, said)
        path = self.path(role, shape)
        return self._reading(path, shape, said, f"model.layers.{role}: the layer {path} of {type(self._net).__name__}")

    def _reading(self, path: str, shape: tuple[int, ...], said: str, what: str) -> Reading:
        among: tuple[Name, ...] = ("channels_first", "channels_last", "tokens", "vector")
        among = ("tokens",) if said == "tokens" else among if len(shape) == 3 else (*among[:2], "vector")
        key = path, shape, among
        if key not in self._readings:
            cut = HookSplit(self._net, path)

            def front(x: Tensor) -> Tensor:
                z = cut.front(x.clone()).z
                check_rows(f"layer {path} of {type(self._net).__name__}", z, len(x))
                return z

            self._readings[key] = find(
                partial(self._in_pieces, front),
                shape,
                self._like,
                among,
                what,
                lambda layer: described(self._net, path, layer, (shape[-2], shape[-1])),
            )
            log.info("layer %s is read as %s", path, self._readings[key])
        return self._readings[key]

    def read(self, name: str, front: Front, shape: tuple[int, ...], among: tuple[Name, ...]) -> Reading:
        """``reading`` for what is no layer; ``front`` is of ``model.original``, and ``name`` is for messages."""
        if self._original is not None:
            return self._original.read(name, front, shape, among)
        key = name, shape, among
        if key not in self._readings:
            what = f"the {name} of {type(self._net).__name__}"
            self._readings[key] = find(partial(self._in_pieces, front), shape, self._like, among, what)
        return self._readings[key]

    def check_tokens(self, role: str, x: Tensor) -> None:
        """Raises UserError unless a layer that gives (B, T, C) for texts x (B, T) gives a vector for each token.

        C channels of T places have the same shape where there are as many of them as tokens.
        """
        if self._original is not None:
            return self._original.check_tokens(role, x)
        path = self.path(role)
        if path not in self._token_axes:
            self._token_axes[path] = tokens_are_second(self._net, path, x[:1])
        if not self._token_axes[path]:
            raise UserError(
                f"model.layers.{role}: {path} gives its channels where the tokens would be, as many as these texts "
                "have tokens, (B, C, T); take a layer that gives a vector for each token, (B, T, C)"
            )
