"""attrib beside its peers: the same work in the same process, as one table of ratios.

    python tools/bench/bench_peers.py                       # all of it: about half an hour of one core
    python tools/bench/bench_peers.py --only captum acd     # what has these words in its name
    python tools/bench/bench_peers.py --repeat 5

Both sides run the same network on the same inputs, one after the other, ``--repeat`` times; a ratio is that of the
medians. Seconds are those that the process computed, whatever else the machine does (on a GPU those of the clock). What
was freed is kept for both (``attrib.process.memory``). attrib has the settings that a run has by default, ``rows=auto``
and ``fold=true``; captum gets as many rows at a time as are its best of 16 and 64. Weights are random where a trained
network would have to be downloaded: they do not change the time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench import images, lite0, plain_iba, plain_input_iba
from bench_cd import both_ways
from bench_fisher import plain_information
from bench_metrics import by_quantus, now
from captum import attr
from torch import Tensor, nn

from attrib.methods import Method
from attrib.methods.baselines import IntegratedGradients, Occlusion, SmoothGrad
from attrib.methods.fisher import FunctionalInformation
from attrib.methods.iba import IBA
from attrib.methods.input_iba import InputBottleneck, InputIBA
from attrib.methods.parts.statistics import Moments
from attrib.methods.parts.wgan import WGAN
from attrib.metrics import InsertionDeletion
from attrib.models import Classifier, torchvision_net
from attrib.noise import Noise
from attrib.process.memory import keep_freed_memory
from attrib.types import Batch

Work = Callable[[], Any]
HALF = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two ways to do the same.

    ours    arithmetic -> how attrib does it
    theirs  the ways of a peer, of which the fastest counts
    wanted  arithmetic -> the ratio that is wanted at least
    """

    what: str
    against: str
    ours: dict[str, Work]
    theirs: list[Work]
    wanted: dict[str, float]


def arithmetics(model: Classifier) -> dict[str, Classifier]:
    """bfloat16 only where the processor multiplies it: elsewhere it is several times slower than float32."""
    return {"float32": model, **({HALF: model.with_precision(HALF)} if multiplies_half(model.device) else {})}


def multiplies_half(device: torch.device) -> bool:
    flags = Path("/proc/cpuinfo").read_text() if device.type == "cpu" and Path("/proc/cpuinfo").exists() else ""
    return device.type != "cpu" or "avx512_bf16" in flags or "amx_bf16" in flags


def attributed(method: Method, model: Classifier, batch: Batch, state: dict[str, Tensor] | None = None) -> Work:
    return lambda: method.attribute(model, batch, state or {}, Noise(batch.uids, device=model.device))


def original(net: nn.Module, device: torch.device) -> nn.Module:
    return net.to(device).eval()


def captum(device: torch.device, name: str, net: nn.Module) -> Iterator[Comparison]:
    """Integrated gradients 4 x 16 steps with their error of completeness, SmoothGrad 4 x 8 copies, occlusion of 49
    squares."""
    batch, frozen = images(4, device), original(net, device).requires_grad_(False)
    model = Classifier(net, rows="auto", device=device, input_shape=(3, 224, 224))
    x, target = batch.x, batch.target
    peers: dict[str, tuple[Method, Callable[[int], Work]]] = {
        "integrated gradients": (
            IntegratedGradients(steps=16),
            lambda rows: (
                lambda: attr.IntegratedGradients(frozen).attribute(
                    x, target=target, n_steps=16, internal_batch_size=rows, return_convergence_delta=True
                )
            ),
        ),
        "SmoothGrad": (
            SmoothGrad(samples=8),
            lambda rows: (
                lambda: attr.NoiseTunnel(attr.Saliency(frozen)).attribute(
                    x,
                    target=target,
                    nt_type="smoothgrad",
                    nt_samples=8,
                    nt_samples_batch_size=min(8, rows // 4),
                    abs=False,
                )
            ),
        ),
        "occlusion": (
            Occlusion(window=32, stride=32),
            lambda rows: (
                lambda: attr.Occlusion(frozen).attribute(
                    x, (3, 32, 32), target=target, strides=(3, 32, 32), perturbations_per_eval=rows // 4
                )
            ),
        ),
    }
    for what, (method, peer) in peers.items():
        ours = {"float32": attributed(method, model, batch)}
        yield Comparison(f"{what}, {name}", "captum", ours, [peer(16), peer(64)], {"float32": 1.3})


def quantus(device: torch.device, steps: int = 16) -> Iterator[Comparison]:
    """As many rows for both: quantus also scores the whole image, attrib that and the empty one."""
    batch, net = images(4, device), torchvision_net("resnet50")
    frozen = original(net, device).requires_grad_(False)
    model = Classifier(net, rows="auto", device=device, input_shape=(3, 224, 224))
    map = Noise(batch.uids, device=device).normal(224, 224)
    metric = InsertionDeletion(steps=steps, insertion_baseline="zero")
    flips = {"features_in_step": 224 * 224 // steps, "perturb_baseline": 0.0}

    def score(at: Classifier) -> Work:
        return lambda: metric.score(at, batch, map, Noise(batch.uids, device=device))

    def peer() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            by_quantus("PixelFlipping", frozen, batch, map, [flips, flips])

    ours = {name: score(at) for name, at in arithmetics(model).items()}
    yield Comparison("insertion and deletion, ResNet-50", "quantus", ours, [peer], {"float32": 1.5, HALF: 5})


def information(device: torch.device, draws: int) -> Iterator[Comparison]:
    net, batch = torchvision_net("resnet50"), images(1, device)
    model = Classifier(net, rows="auto", device=device, input_shape=(3, 224, 224))
    trainable = original(net, device).requires_grad_(True)
    method = FunctionalInformation(("functional_information",), draws)
    yield Comparison(
        f"functional information, ResNet-50, n = {draws}",
        "the original's loop",
        {name: attributed(method, at, batch) for name, at in arithmetics(model).items()},
        [lambda: plain_information(trainable, batch.x, batch.target, draws, 0.15)],
        {"float32": 1.3, HALF: 3},
    )


def iba(device: torch.device) -> Iterator[Comparison]:
    net, batch, layer = torchvision_net("vgg16"), images(1, device), "features.17"
    method = IBA(steps=10)
    model = Classifier(net, {"bottleneck": layer}, rows="auto", device=device, input_shape=(3, 224, 224))
    state, trainable = statistics_of(model, device), original(net, device).requires_grad_(True)
    yield Comparison(
        f"IBA, VGG16 `{layer}`, 10 steps",
        "the original's loop",
        {name: attributed(method, at, batch, state) for name, at in arithmetics(model).items()},
        [lambda: plain_iba(trainable, layer, batch.x, batch.target, state, method)],
        {"float32": 5.5, HALF: 12},
    )


def input_iba(device: torch.device) -> Iterator[Comparison]:
    """The three stages, each a few steps, in about the proportions of the paper's configuration."""
    net, batch, layer = lite0(), images(1, device), "blocks.4"
    method = InputIBA(
        feature=IBA(beta=20.0, sigma=None, steps=1),
        gan=WGAN(dataset_size=224, batch=32, epochs=1),  # 7 steps of the critic, 2 of the generator
        input=InputBottleneck(steps=3),
    )
    model = Classifier(net, {"bottleneck": layer}, rows="auto", device=device, input_shape=(3, 224, 224))
    state, trainable = statistics_of(model, device), original(net, device).requires_grad_(True)
    yield Comparison(
        f"InputIBA, EfficientNet-Lite0 `{layer}`, 1/20 of the GAN",
        "a plain loop",
        {name: attributed(method, at, batch, state) for name, at in arithmetics(model).items()},
        [lambda: plain_input_iba(trainable, layer, batch.x, batch.target, state, method)],
        {"float32": 2, HALF: 4},
    )


def statistics_of(model: Classifier, device: torch.device) -> dict[str, Tensor]:
    moments = Moments()
    moments.add(model.until("bottleneck", images(8, device).x).z)
    return moments.state()


def hierarchy(device: torch.device) -> Iterator[Comparison]:
    together, one_at_a_time = both_ways(256, device=str(device))
    yield Comparison("ACD of a digit", "one mask at a time", {"float32": together}, [one_at_a_time], {"float32": 20})


def seconds(work: Work, device: torch.device) -> float:
    start = now(device)
    work()
    return now(device) - start


def measured(each: Comparison, device: torch.device, repeats: int) -> Iterator[str]:
    """Rows of the table."""
    for work in each.ours.values():
        work()  # warm: how the net is best computed is found out
    tried = [seconds(work, device) for work in each.theirs]
    theirs = each.theirs[tried.index(min(tried))]
    times: dict[str, list[float]] = {name: [] for name in ("", *each.ours)}
    for _ in range(repeats):
        times[""].append(seconds(theirs, device))
        for name, work in each.ours.items():
            times[name].append(seconds(work, device))
    slow = statistics.median(times[""])
    for name, wanted in each.wanted.items():
        if name not in times:
            yield f"| {each.what}, {name} | {each.against} | {slow:.2f} s | not on this processor | | {wanted:g} |"
            continue
        ours = statistics.median(times[name])
        spread = sorted(one / other for one, other in zip(times[""], times[name], strict=True))
        yield (
            f"| {each.what}, {name} | {each.against} | {slow:.2f} s | {ours:.2f} s | **{slow / ours:.2f}** "
            f"({spread[0]:.2f} to {spread[-1]:.2f}) | {wanted:g} |{'' if slow / ours >= wanted else ' missed'}"
        )


GROUPS: dict[str, Callable[[torch.device, argparse.Namespace], Iterator[Comparison]]] = {
    "captum lite0": lambda device, _: captum(device, "EfficientNet-Lite0", lite0()),
    "captum resnet50": lambda device, _: captum(device, "ResNet-50", torchvision_net("resnet50")),
    "quantus": lambda device, _: quantus(device),
    "functional information": lambda device, given: information(device, given.draws),
    "iba": lambda device, _: iba(device),
    "input_iba": lambda device, _: input_iba(device),
    "acd": lambda device, _: hierarchy(device),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", help="groups with one of these words")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--draws", type=int, default=100, help="of functional information")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = torch.device(arguments.device)
    rows = []
    for name, group in GROUPS.items():
        if arguments.only and not set(arguments.only) & set(name.split()):
            continue
        torch.manual_seed(0)
        for each in group(device, arguments):
            for row in measured(each, device, arguments.repeat):
                print(row, flush=True)
                rows.append(row)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(
        f"\n{where}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}, medians of {arguments.repeat}\n"
    )
    print("| work | against | theirs | attrib | ratio (least to most) | wanted |\n|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
