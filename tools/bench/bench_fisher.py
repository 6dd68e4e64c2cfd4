"""How fast functional information is, beside the plain loop of the original in the same process.

Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from bench import images
from torch import Tensor, nn

from attrib.methods.fisher import FunctionalInformation
from attrib.models import Classifier, torchvision_net
from attrib.noise import Noise
from attrib.process.memory import keep_freed_memory

MEASURES = (
    "functional_information",
    "covariance_functional_information",
    "smooth_grad",
    "smooth_grad_sq",
    "var_grad",
)


def clock(device: torch.device, work: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest call; on a CPU those of this process, whatever else the machine does."""
    cuda, best = device.type == "cuda", float("inf")
    now = time.perf_counter if cuda else time.process_time
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        start = now()
        work()
        if cuda:
            torch.cuda.synchronize()
        best = min(best, now() - start)
    return best


def plain_information(net: nn.Module, x: Tensor, target: Tensor, draws: int, var_spread: float) -> Tensor:
    """One image (1, 3, H, W) as the original works: one noisy copy at a time, through trainable parameters,
    with a graph of the gradient itself."""
    std, grads, outputs = (var_spread * x.var()).sqrt(), [], []
    for _ in range(draws):
        z = (x + std * torch.randn_like(x)).requires_grad_()
        f = net(z).softmax(1)[:, target]
        (grad,) = torch.autograd.grad(f.sum(), z, create_graph=True)
        grads.append(grad.detach())
        outputs.append(f.detach())
    return (torch.stack(grads).sum(2) ** 2 / torch.stack(outputs)[..., None]).mean(0)


def frozen_information(net: nn.Module, x: Tensor, target: Tensor, draws: int, var_spread: float) -> Tensor:
    """The same loop with frozen parameters and without that graph: what batches alone bring beyond it."""
    std, total = (var_spread * x.var()).sqrt(), torch.zeros_like(x)
    for _ in range(draws):
        z = (x + std * torch.randn_like(x)).requires_grad_()
        f = net(z).softmax(1)[:, target]
        (grad,) = torch.autograd.grad(f.sum(), z)
        total += grad**2 / f.detach() / draws
    return total.sum(1)


def bare(net: nn.Module, x: Tensor, target: Tensor, draws: int, rows: int) -> None:
    """The net alone, forward and backward, for as many rows: below that no way of computing it can go."""
    for start in range(0, draws, rows):
        z = x.expand(min(rows, draws - start), -1, -1, -1).clone().requires_grad_()
        torch.autograd.grad(net(z).softmax(1)[:, target].sum(), z)


def bench_fisher(device: torch.device, draws: int, rows: int, arch: str = "resnet50") -> None:
    """Prints rows of a table: seconds per image for ``draws`` noisy copies, and the ratio to attrib.

    The first plain loop runs before the process keeps the memory that it frees (``attrib.process.memory``), as in the
    original's process; all others profit from that too. So call it in a new process.
    """
    net = torchvision_net(arch, num_classes=1000)
    batch = images(1, device)
    trainable = net.to(device).eval().requires_grad_(True)
    arguments = (batch.x, batch.target, draws)
    plain_information(trainable, batch.x, batch.target, 1, 0.15)  # warm up
    before = clock(device, lambda: plain_information(trainable, *arguments, 0.15), 1)
    keep_freed_memory()
    model = Classifier(net, rows=rows, device=device)

    def explain(*measures: str) -> None:
        FunctionalInformation(measures, draws).attribute(model, batch, {}, Noise(batch.uids, device=device))

    explain("functional_information")  # warm up
    ours = clock(device, lambda: explain("functional_information"))
    several = clock(device, lambda: explain(*MEASURES))
    print(f"| functional information, {arch} at 224 px, {draws} draws | {rows} rows at a time | {ours:.3f} s | |")
    print(f"| | plain loop, trainable parameters, in a plain process | {before:.3f} s | {before / ours:.2f} |")
    for name, work in {
        "the same where freed memory is kept": lambda: plain_information(trainable, *arguments, 0.15),
        "plain loop, frozen parameters": lambda: frozen_information(model.module, *arguments, 0.15),
        "the net alone": lambda: bare(model.module, *arguments, rows),
    }.items():
        seconds = clock(device, work)
        print(f"| | {name} | {seconds:.3f} s | {seconds / ours:.2f} |")
    print(f"| | {len(MEASURES)} measures of the same draws | {several:.3f} s | {several / ours:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--arch", default="resnet50")
    arguments = parser.parse_args()
    bench_fisher(torch.device(arguments.device), arguments.draws, arguments.rows, arguments.arch)


if __name__ == "__main__":
    main()
