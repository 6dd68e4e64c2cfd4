"""Class activation maps: the activations of a layer, weighted by how much each counts for the target's logit.

A method of this family says with which weights (``cam``); the rest is the same for all. A is the layer's output, as
channels k at places (i, j), whatever the layout of the layer, and S the target's logit (several labels: the sum of
theirs). All is at the layer's resolution, and enlarged linearly to the image at the end. Maps are not normalised, as
every metric takes them as they are.

``relu`` sets negative values of the map, which speak against the class, to zero. Its default is what the paper does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from attrib import keys
from attrib.fit import State
from attrib.methods import Method
from attrib.methods.parts.inputs import cancelled
from attrib.methods.parts.layout import Layout, image_size, on_image, resize, resizing
from attrib.methods.parts.losses import target_score
from attrib.models import Classifier
from attrib.models.reading import check_layout
from attrib.noise import Noise
from attrib.types import Batch, SampleError, UserError

# Sums below this share of their parts say nothing: in front of a LayerNorm they are 10^-12 to 10^-5 of them (what its
# epsilon leaves), elsewhere a tenth and more.
CANCELS = 1e-4


@dataclass(frozen=True)
class Activations:
    """The activations of a layer, z (B, *layer), and how to go on from there."""

    model: Classifier
    role: str
    batch: Batch
    z: Tensor
    rest: tuple[Tensor, ...]
    places: Layout

    @property
    def grid(self) -> Tensor:
        """(B, C, h, w)"""
        return self.places.to_grid(self.z)

    def gradient(self) -> Tensor:
        """(B, C, h, w) of the target's logit."""

        def score(logits: Tensor, rows: slice) -> Tensor:
            return target_score(logits, self.batch.target[rows])

        return self.places.to_grid(self.model.gradient(self.z, score, self.role, self.rest)[1])

    def refuse(self, found: Tensor, why: str) -> None:
        """Raises SampleError, with the uid, for the first sample of which ``found`` (B,) bool is true."""
        for uid, so in zip(self.batch.uids, found.tolist(), strict=True):
            if so:
                raise SampleError(f"{uid}: {self.model.roles.path(self.role)}: {why}")


@dataclass(frozen=True)
class _CAM(Method):
    """What all of them share; they differ in ``cam``."""

    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, >= 0 unless relu=false, upsampled from the layer"}
    EXTRAS: ClassVar[Mapping[str, str]] = {"cam": "the same at the layer's resolution, (h, w)"}
    layer: str = "cam"
    relu: bool = True
    layout: str = field(default="auto", metadata=keys.ADDED)

    def __post_init__(self) -> None:
        check_layout(type(self).__name__, self.layout)

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.layer,)

    @property
    def laid(self) -> Mapping[str, str]:
        return {self.layer: self.layout}

    def cam(self, at: Activations) -> Tensor:
        """(B, h, w), before the ReLU."""
        raise NotImplementedError

    def attribute(self, model: Classifier, batch: Batch, state: State, noise: Noise) -> Mapping[str, Tensor]:
        z, rest = model.until(self.layer, batch.x)
        places = on_image(model, self.layer, batch.x, z, self.layout)
        if places.name == "vector":
            raise UserError(
                f"{type(self).__name__} needs a layer with places; {model.roles.path(self.layer)} gives "
                f"(B, {z.shape[1]}), one vector for the whole image (set model.layers.{self.layer})"
            )
        cam = self.cam(Activations(model, self.layer, batch, z, rest, places))
        cam = cam.relu() if self.relu else cam
        return {"map": resize(cam, image_size(batch.x)), "cam": cam}


# ---- by the gradient ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradCAM(_CAM):
    """Each channel weighted by its mean gradient (Selvaraju et al., *Grad-CAM*, ICCV 2017, section 3, eq. 1 and 2).

    The map is the ReLU of sum_k w_k A_k, with w_k = mean_ij dS/dA_kij.

    layer   role of the layer
    relu    set negative values, which speak against the class, to zero, as the paper does
    layout  which axes of the layer are places, see ``iba.IBA``. The means and the map are of places alone: tokens
            in front of them (a class token) are left out

    Images only.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=GradCAM(), layers="relu2").map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.baselines.GradCAM"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True

    def cam(self, at: Activations) -> Tensor:
        return (at.gradient().mean((2, 3), keepdim=True) * at.grid).sum(1)


@dataclass(frozen=True)
class GradCAMPlusPlus(_CAM):
    """Channels weighted by their positive gradients (Chattopadhay et al., *Grad-CAM++*, WACV 2018, section 3).

    With g = dS/dA_kij, the score Y = exp(S), and a net that is piecewise linear behind the layer,

        w_k = sum_ij alpha_kij relu(g),    alpha_kij = g^2 / (2 g^2 + g^3 sum_ab A_kab),

    where a place without gradient has the weight 0. As only positive g count, a term is g / (2 + g sum A). The paper's
    w_k has a further factor exp(S), the same for all channels and places of a sample, which may overflow and is left
    out. The authors' program divides alpha by its sum over the places, which the paper does not say.

    It is meant for a layer behind a ReLU: where activations are negative, the denominator may come close to 0.

    layer, relu, layout   see ``GradCAM``; the paper has the ReLU

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=GradCAMPlusPlus(), layers="relu2").map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.cam.GradCAMPlusPlus"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {"map": "arbitrary units, >= 0 unless relu=false, upsampled from the layer"}

    def cam(self, at: Activations) -> Tensor:
        a, g = at.grid, at.gradient().relu()
        weights = (g / (2 + g * a.sum((2, 3), keepdim=True))).sum((2, 3), keepdim=True)
        return (weights * a).sum(1)


@dataclass(frozen=True)
class LayerCAM(_CAM):
    """Each activation weighted by its own positive gradient (Jiang et al., *LayerCAM*, IEEE TIP 2021, section III).

    The map is the ReLU of sum_k relu(dS/dA_kij) A_kij. What the paper does to join several layers (scaling by tanh,
    the largest value of all) is left out: this is the map of one layer.

    layer, relu, layout   see ``GradCAM``; the paper has the ReLU

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=LayerCAM(), layers="relu2").map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.cam.LayerCAM"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True

    def cam(self, at: Activations) -> Tensor:
        return (at.gradient().relu() * at.grid).sum(1)


@dataclass(frozen=True)
class XGradCAM(_CAM):
    """Each channel weighted by its gradients, averaged with its activations for weights (Fu et al., *Axiom-based
    Grad-CAM*, BMVC 2020, section 3).

    The map is the ReLU of sum_k w_k A_k, with w_k = sum_ij dS/dA_kij A_kij / sum_ij A_kij. So without the ReLU it sums
    to sum_kij dS/dA_kij A_kij, the change of the logit wherever the net is linear behind the layer.

    A channel that is 0 everywhere adds nothing. One whose activations cancel, so that their sum is rounding, has no
    weight: such a sample is refused.

    layer, relu, layout   see ``GradCAM``; the authors' program has the ReLU

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=XGradCAM(), layers="relu2").map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.cam.XGradCAM"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True

    def cam(self, at: Activations) -> Tensor:
        a, dims = at.grid, (2, 3)
        total, size = a.sum(dims, keepdim=True), a.abs().sum(dims, keepdim=True)
        rounding = a[0, 0].numel() * torch.finfo(a.dtype).eps * size
        at.refuse(
            ((total.abs() <= rounding) & (size > 0)).flatten(1).any(1),
            "the activations of a channel cancel, and XGrad-CAM divides by their sum; take a layer behind a ReLU, or "
            "method=hires_cam",
        )
        weights = (at.gradient() * a).sum(dims, keepdim=True) / torch.where(size > 0, total, 1.0)
        return (weights * a).sum(1)


@dataclass(frozen=True)
class HiResCAM(_CAM):
    """Each activation weighted by its own gradient (Draelos & Carin, *Use HiResCAM instead of Grad-CAM*, 2020,
    arXiv:2011.08891, section 3).

    The map is sum_k dS/dA_kij A_kij. Where the net is linear behind the layer, it sums to the logit without its bias.

    layer, layout   see ``GradCAM``
    relu            false by default: what the paper proves of the map is of its negative values too

    Raises UserError at a layer in front of a LayerNorm, where gradient times activation cancels.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=HiResCAM(), layers="relu2").map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.cam.HiResCAM"
    VERSION: ClassVar[int] = 2
    CONTRASTS: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {"map": "logit units, signed unless relu=true, upsampled from the layer"}
    relu: bool = False

    def cam(self, at: Activations) -> Tensor:
        products = at.gradient() * at.grid
        total = products.sum(1)
        if cancelled(total, products.abs().sum(1), CANCELS).any():
            raise UserError(
                "HiResCAM leaves nothing: gradient times activation cancels among the channels of every place, as in "
                "front of a LayerNorm, to which the scale of its input does not matter. Choose a layer behind the norm "
                "(method.layer, model.layers), or take method=grad_cam or method=layer_cam"
            )
        return total


# ---- without a gradient -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreCAM(_CAM):
    """Each channel weighted by the logit of the image that it masks (Wang et al., *Score-CAM*, CVPR workshops 2020,
    section 3 and algorithm 1).

    A channel is enlarged to the image, scaled to 0 .. 1, and multiplied with the normalised image x, whose 0 is the
    data's mean colour: M_k. The map is the ReLU of sum_k w_k A_k, with w = softmax over k of S(M_k) - S(baseline). The
    baseline's logit cancels in the softmax, so that none is computed.

    A channel that is the same everywhere masks nothing and is left out, as in the authors' program. (That one weighs by
    probabilities, without the softmax over channels.) A sample without any other channel is refused.

    layer, relu, layout   see ``GradCAM``; the paper has the ReLU

    One pass through the whole net for each channel.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=ScoreCAM(), layers="relu2").map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.cam.ScoreCAM"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {
        "map": "units of the activations, >= 0 unless relu=false, upsampled from the layer"
    }

    @torch.no_grad()
    def cam(self, at: Activations) -> Tensor:
        a, x, target = at.grid, at.batch.x, at.batch.target
        low, high = a.amin((2, 3)), a.amax((2, 3))
        varies = high - low > 16 * torch.finfo(a.dtype).eps * torch.maximum(high, -low)
        at.refuse(~varies.any(1), "every channel is the same at all places, so Score-CAM has no masks")
        which = varies.nonzero()

        enlarge = resizing(image_size(a), image_size(x), a)

        def piece(rows: slice) -> Tensor:
            sample, channel = which[rows].unbind(1)
            mask = enlarge(a[sample, channel]).unsqueeze(1)
            mask = mask - mask.amin((2, 3), keepdim=True)
            mask = mask / mask.amax((2, 3), keepdim=True)
            return target_score(at.model(x[sample] * mask), target[sample])

        scores = torch.full_like(low, -torch.inf)
        scores[varies] = at.model.chunked(piece, len(which))
        return (scores.softmax(1)[:, :, None, None] * a).sum(1)


@dataclass(frozen=True)
class AblationCAM(_CAM):
    """Each channel weighted by the fall of the logit without it (Desai & Ramaswamy, *Ablation-CAM*, WACV 2020,
    section 3).

    The map is the ReLU of sum_k w_k A_k, with w_k = S - S_k, where S_k is the logit when channel k is 0 at all places.
    The paper divides by S: that scales the map of a sample, and would turn its sign where the logit is negative, so it
    is left out.

    layer, relu, layout   see ``GradCAM``; the paper has the ReLU

    One pass through what follows the layer for each channel that is not 0 already.

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=AblationCAM(), layers="relu2").map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.cam.AblationCAM"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True

    @torch.no_grad()
    def cam(self, at: Activations) -> Tensor:
        a, target, rear = at.grid, at.batch.target, at.model.rear(at.role)
        there = (a != 0).flatten(2).any(2)
        which = there.nonzero()

        def piece(rows: slice) -> Tensor:
            sample, channel = which[rows].unbind(1)
            without = a[sample]
            without[torch.arange(len(sample), device=a.device), channel] = 0
            z = at.places.from_grid(without, like=at.z[sample])
            return target_score(rear(z, *(t[sample] for t in at.rest)), target[sample])

        whole = target_score(at.model.after(at.role, at.z, at.rest), target)
        fall = torch.zeros_like(a[:, :, 0, 0])
        if len(which):
            fall[there] = whole[which[:, 0]] - at.model.chunked(piece, len(which))
        return (fall[:, :, None, None] * a).sum(1)


@dataclass(frozen=True)
class EigenCAM(_CAM):
    """The activations along their first right singular vector (Muhammad & Yeasin, *Eigen-CAM*, IJCNN 2020, section 3).

    With O the matrix of places times channels of a sample, not centred, and O = U Sigma V', the map is O V_1. It does
    not depend on the target.

    A singular vector has no sign: here the value of the map that is largest in size is positive, so behind a ReLU no
    value is negative. A sample whose first singular vector is not determined, or whose largest value is as large as
    the smallest is low, is refused.

    layer, layout   see ``GradCAM``
    relu            false by default: the paper has no ReLU

    >>> import attrib, torch
    >>> net, x = attrib.models.LeNet(), torch.rand(1, 1, 32, 32)
    >>> attrib.explain(net, x, method=EigenCAM(), layers="relu2").map.shape
    torch.Size([1, 32, 32])
    """

    NAME: ClassVar[str] = "attrib.methods.cam.EigenCAM"
    VERSION: ClassVar[int] = 1
    CONTRASTS: ClassVar[bool] = True
    MAPS: ClassVar[Mapping[str, str]] = {
        "map": "units of the activations, signed unless relu=true, upsampled from the layer"
    }
    relu: bool = False

    def cam(self, at: Activations) -> Tensor:
        a = at.grid
        places = a.flatten(2).transpose(1, 2).to(torch.promote_types(a.dtype, torch.float32))
        u, s, _ = torch.linalg.svd(places, full_matrices=False)
        first, near = u[:, :, 0] * s[:, :1], 100 * torch.finfo(s.dtype).eps * s[:, 0]
        second = s[:, 1] if s.shape[1] > 1 else torch.zeros_like(near)
        at.refuse(s[:, 0] - second <= near, "Eigen-CAM: the activations have no first singular vector of their own")
        high, low = first.amax(1), first.amin(1)
        at.refuse((high + low).abs() <= near, "Eigen-CAM: nothing tells the sign of the first singular vector")
        sign = torch.where(high > -low, 1.0, -1.0).to(first)
        return (sign[:, None] * first).unflatten(1, a.shape[2:]).to(a.dtype)
