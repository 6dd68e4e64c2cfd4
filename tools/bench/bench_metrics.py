"""The perturbation metrics: how much of their time is the net's, and how long quantus takes for the same rows.

    python tools/bench/bench_metrics.py                                # LeNet, 32 px; MobileNetV3-Small 0.5x, 224 px
    python tools/bench/bench_metrics.py --nets lite0 --steps 200       # EfficientNet-Lite0 with its trained weights
    python tools/bench/bench_metrics.py --nets none small --steps 1000 # "none": a net that costs nothing
    python tools/bench/bench_metrics.py --profile --nets small --steps 10000

Same work: as many rows through the same net, from the same images and maps, in one process and with as many threads.
Insertion and deletion of ``--steps`` steps against two runs of quantus' PixelFlipping with as many steps; sensitivity-n
at ten sizes against ten runs of quantus' FaithfulnessCorrelation, which is sensitivity-n at one size. quantus gets all
images as one batch, its warnings are off. The numbers of deletion are compared. With ``--profile`` attrib alone.
Weights are random but for lite0: they do not change the time.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench import images, lite0
from torch import Tensor, nn

from attrib.metrics import InsertionDeletion, SensitivityN
from attrib.models import Classifier, LeNet, timm_net
from attrib.noise import Noise
from attrib.process.memory import keep_freed_memory
from attrib.types import Batch


def now(device: torch.device) -> float:
    """Seconds: on a GPU of the clock, on a CPU those that the process computed, as others may compute beside it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Timed(nn.Module):
    """A net that counts its seconds and rows."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seconds, self.rows = net, 0.0, 0

    def forward(self, x: Tensor) -> Tensor:
        start = now(x.device)
        y = self.net(x)
        self.seconds += now(x.device) - start
        self.rows += len(x)
        return y

    def clear(self) -> None:
        self.seconds, self.rows = 0.0, 0


class Nothing(nn.Module):
    """A few pixels as logits: what is left is not the net's."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10] * 1.0


NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # builder, channels, side
    "lenet": (LeNet, 1, 32),
    "small": (lambda: timm_net("mobilenetv3_small_050"), 3, 224),
    "lite0": (lite0, 3, 224),
    "none": (Nothing, 3, 224),
}


def timed(net: Timed, device: torch.device, work: Callable[[], Any]) -> tuple[float, float, int, Any]:
    """Seconds, of these the net's, rows, and the result."""
    net.clear()
    start = now(device)
    found = work()
    return now(device) - start, net.seconds, net.rows, found


def by_quantus(name: str, net: nn.Module, batch: Batch, map: Tensor, runs: list[dict[str, Any]]) -> list[Any]:
    import quantus

    metric = getattr(quantus, name)
    found = []
    for parameters in runs:
        made = metric(**parameters, disable_warnings=True, return_aggregate=False)
        found.append(
            made(
                model=net, x_batch=batch.x.cpu().numpy(), y_batch=batch.target.cpu().numpy(),
                a_batch=map[:, None].cpu().numpy(), channel_first=True, softmax=name == "PixelFlipping",
                device=str(batch.x.device),
            )
        )  # fmt: skip
    return found


def one_net(name: str, arguments: argparse.Namespace) -> None:
    build, channels, side = NETS[name]
    torch.manual_seed(0)
    model = Classifier(Timed(build()), rows=arguments.rows, device=arguments.device)
    net: Timed = model.module
    batch = images(arguments.images, model.device)
    x = nn.functional.interpolate(batch.x[:, :channels], (side, side), mode="bilinear")
    batch = Batch(batch.uids, x, batch.target % 10)
    map = Noise(batch.uids, device=model.device).normal(side, side)
    pixels = side * side
    thirds = min(arguments.steps // channels, pixels)
    while pixels % thirds:  # quantus removes a number of one channel at a time, as many as divide the pixels
        thirds -= 1
    steps = arguments.steps if arguments.profile else channels * thirds
    print(
        f"{name}, {side} px, {arguments.images} images, {steps} steps, rows={arguments.rows}, {platform.machine()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {model.device}"
    )
    model.logits(batch.x)  # warm

    def noise() -> Noise:
        return Noise(batch.uids, device=model.device)

    curves = InsertionDeletion(steps=steps, insertion_baseline="zero")
    sensitivity = SensitivityN(points=10, samples=arguments.subsets)
    fast: dict[str, tuple[float, float, int, Any]] = {}
    for label, metric in (("insertion and deletion", curves), ("sensitivity-n", sensitivity)):
        fast[label] = timed(net, model.device, lambda m=metric: m.score(model, batch, map, noise()))
        total, own, rows, _ = fast[label]
        print(
            f"  {label}: {rows} rows in {total:.2f} s, {own / total:.1%} of it in the net, "
            f"{1e3 * (total - own) / rows:.3f} ms a row outside it"
        )
    if arguments.profile:
        return
    sizes = sensitivity.counts(torch.tensor([pixels]))[0].tolist()
    flips = {"features_in_step": pixels // thirds, "perturb_baseline": 0.0}
    subsets = [
        {"subset_size": min(channels * n, pixels - 1), "nr_runs": arguments.subsets, "perturb_baseline": 0.0}
        for n in sizes
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_quantus("Selectivity", net, batch[:1], map[:1], [{}])  # imported, and warm
        slow = {
            "insertion and deletion": timed(
                net, model.device, lambda: by_quantus("PixelFlipping", net, batch, map, [flips, flips])
            ),
            "sensitivity-n": timed(
                net, model.device, lambda: by_quantus("FaithfulnessCorrelation", net, batch, map, subsets)
            ),
        }
    for label, (total, own, rows, found) in slow.items():
        each, ours = total / rows, fast[label][0] / fast[label][2]
        print(
            f"  {label} by quantus: {rows} rows in {total:.2f} s, {own / total:.1%} of it in the net, "
            f"{1e3 * (total - own) / rows:.3f} ms a row outside it: {each / ours:.1f} times as long for a row"
        )
        if label == "insertion and deletion":
            # Where all channels of a pixel are gone.
            theirs, own_curve = np.array(found[0]), fast[label][3]["deletion_curve"][:, 1:].cpu().numpy()
            difference = np.abs(theirs - own_curve)[:, channels - 1 :: channels].max()
            print(f"    the deletion curves differ by at most {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["lenet", "small"], choices=list(NETS))
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=256, help="at most; a divisor of the pixels is taken")
    parser.add_argument("--subsets", type=int, default=20, help="of each of the ten sizes")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--profile", action="store_true", help="without quantus")
    arguments = parser.parse_args()
    for name in arguments.nets:
        one_net(name, arguments)


if __name__ == "__main__":
    keep_freed_memory()  # as tools/run.py; quantus profits from it too
    main()
