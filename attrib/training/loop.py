"""Training a net: mmengine's loop by epochs, which can be killed at any moment and resumed.

Before each epoch torch's random numbers, for dropout, are seeded from (seed, epoch), and the order of the samples is a
hash. So the next epoch depends on nothing but the ``state`` that is kept after each epoch: a training that was killed
and resumed ends with the weights of one that was not, bit for bit on the same CPU. At the end torch's random numbers
are put back.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.config import Config
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from attrib.keys import stable_hash
from attrib.models.float32 import use_all_bits
from attrib.running.runner import AttributionRunner
from attrib.store.files import write_atomic
from attrib.training.batches import Augment, EpochBatches, LoadedSamples, learning_rate_factor
from attrib.training.state import Progress, load_state, save_state
from attrib.types import UserError

log = logging.getLogger(__name__)

EVALUATION_BATCH = 256  # samples at once where no gradient is needed
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class Hyperparameters:
    """How a net is trained; every field changes the result.

    epochs        at most so many; training ends earlier after ``patience`` epochs without a better validation
                  accuracy (null: never earlier)
    batch         samples per update; the loss is their mean cross-entropy
    lr            learning rate at its highest
    momentum      of sgd; the other optimisers have their own default
    schedule      how the learning rate changes with each update, after a linear increase over ``warmup`` epochs
    clip          the gradient's norm is cut to at most this; null: not at all
    freeze        names of modules or parameters that keep their values, such as "embedding"
    augment       "crop_flip" shifts images by up to 4 pixels and mirrors half of them
    """

    epochs: int = 20
    batch: int = 64
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = 0.0
    clip: float | None = None
    patience: int | None = 5
    freeze: tuple[str, ...] = ()
    augment: Augment | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"train.{name} must be positive, not {getattr(self, name)}")
        for name in ("clip", "patience"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"train.{name} must be positive or null, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "momentum"):
            if getattr(self, name) < 0:
                raise UserError(f"train.{name} must not be negative, but is {getattr(self, name)}")


@torch.no_grad()
def evaluate(net: nn.Module, samples: LoadedSamples, device: torch.device) -> dict[str, float]:
    """Accuracy and mean cross-entropy, in eval mode."""
    was_training = net.training
    net.eval()
    found = torch.zeros(2, dtype=torch.float64, device=device)  # how many are right, and the sum of their losses
    for positions in samples.portions(EVALUATION_BATCH):
        x, target = samples.pick(positions)
        logits, target = net(x.to(device)), target.to(device)
        found += torch.stack([(logits.argmax(1) == target).sum(), cross_entropy(logits, target, reduction="sum")])
    net.train(was_training)
    right, loss = found.tolist()
    return {"accuracy": right / len(samples), "loss": loss / len(samples)}


class Trainee(nn.Module):
    """A net with the methods that mmengine calls to train and validate it."""

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.net, self.device = net, device

    def train_step(self, data: tuple[Tensor, Tensor], optim_wrapper: Any) -> dict[str, float]:
        x, target = (part.to(self.device) for part in data)
        logits = self.net(x)
        loss = cross_entropy(logits, target)
        right = (logits.argmax(1) == target).float().mean()
        value, accuracy = torch.stack([loss.detach(), right]).tolist()  # the one wait of a step
        if math.isfinite(value):  # else the weights stay as they are, and ``TrainingHook`` ends the training
            optim_wrapper.update_params(loss)
        return {"loss": value, "accuracy": accuracy}

    def val_step(self, data: LoadedSamples) -> dict[str, float]:
        return evaluate(self.net, data, self.device)


class ValidationLoop(BaseLoop):
    """One pass over the validation samples, after each epoch."""

    def run(self) -> dict[str, float]:
        self.runner.call_hook("before_val")
        self.runner.call_hook("before_val_epoch")
        metrics = self.runner.model.val_step(self.dataloader)
        self.runner.call_hook("after_val_epoch", metrics=metrics)
        self.runner.call_hook("after_val")
        return metrics


class TrainingHook(Hook):
    """Seeds each epoch, sets the learning rate, records the epoch's numbers, saves the best weights and the state."""

    priority = "LOWEST"  # after early stopping, whose decision is part of the state

    def __init__(
        self,
        hyperparameters: Hyperparameters,
        seed: int,
        progress: Progress,
        state: Path,
        early_stopping: EarlyStoppingHook | None,
        save_best: Callable[[nn.Module, Progress], None],
    ) -> None:
        self._hyperparameters, self._seed, self.progress = hyperparameters, seed, progress
        self._state, self._early_stopping, self._save_best = state, early_stopping, save_best
        self._loss = self._right = self._seen = self._start = 0.0

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        loop._epoch, loop._iter = self.progress.epoch, self.progress.iteration  # as Runner.resume does
        loop.stop_training = self.progress.stopped

    def before_train_epoch(self, runner: Runner) -> None:
        torch.manual_seed(stable_hash(f"{self._seed}/epoch/{runner.epoch}"))  # ``fit`` puts them back
        runner.train_dataloader.epoch = runner.epoch
        self._loss = self._right = self._seen = 0.0
        self._start = time.perf_counter()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        factor = learning_rate_factor(
            runner.iter,
            runner.max_iters,
            warmup=round(self._hyperparameters.warmup * len(runner.train_dataloader)),
            schedule=self._hyperparameters.schedule,
        )
        for group in runner.optim_wrapper.param_groups:
            group["lr"] = self._hyperparameters.lr * factor

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._check(outputs["loss"], f"epoch {runner.epoch + 1}, batch {batch_idx + 1}")
        n = len(data_batch[1])
        self._seen += n
        self._loss += outputs["loss"] * n
        self._right += outputs["accuracy"] * n

    def _check(self, loss: float, where: str) -> None:
        if math.isfinite(loss):
            return
        best = self.progress.best_epoch
        kept = f"the best weights so far (epoch {best}) are kept" if best else "no weights are kept"
        raise UserError(
            f"{where}: the loss is {loss}; {kept}. "
            "Lower train.lr or set train.clip, with train.restart=true or another train.name"
        )

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        progress, found = self.progress, metrics or {}
        self._check(found["loss"], f"epoch {runner.epoch}, validation")
        progress.epoch, progress.iteration = runner.epoch, runner.iter
        progress.history.append(
            {
                "epoch": runner.epoch,
                "loss": self._loss / self._seen,
                "train_accuracy": self._right / self._seen,
                "validation_loss": found["loss"],
                "validation_accuracy": found["accuracy"],
                "lr": runner.optim_wrapper.param_groups[0]["lr"],
                "seconds": time.perf_counter() - self._start,
            }
        )
        if found["accuracy"] > progress.best:
            progress.best, progress.best_epoch = found["accuracy"], runner.epoch
            self._save_best(runner.model.net, progress)
        if self._early_stopping is not None:
            progress.waited, progress.stopped = self._early_stopping.wait_count, runner.train_loop.stop_training
        # Last: what the state says is saved must be. A kill just before repeats the epoch, to the same result.
        save_state(self._state, runner.model.net, runner.optim_wrapper.optimizer, progress)
        lines = [json.dumps(row) + "\n" for row in progress.history]
        write_atomic(self._state.with_name("metrics.jsonl"), "".join(lines).encode())
        row = progress.history[-1]
        log.info(
            "epoch %d of %d: loss %.4f, accuracy %.2f %% (training), %.2f %% (validation)%s, %.1f s",
            *(row["epoch"], self._hyperparameters.epochs, row["loss"], 100 * row["train_accuracy"]),
            *(100 * row["validation_accuracy"], " *" if progress.best_epoch == runner.epoch else "", row["seconds"]),
        )


class BarHook(Hook):
    """A progress bar in samples with the time left, on a terminal only."""

    _bar: tqdm  # of the epoch in work

    def __init__(self, name: str) -> None:
        self._name = name

    def before_train_epoch(self, runner: Runner) -> None:
        n = len(runner.train_dataloader.samples)
        self._bar = tqdm(
            total=runner.max_epochs * n,
            initial=runner.epoch * n,
            desc=f"{self._name}: epoch {runner.epoch + 1}",
            unit=" samples",
            dynamic_ncols=True,
            leave=False,
            disable=not sys.stderr.isatty(),
            file=sys.stderr,
        )

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._bar.update(len(data_batch[1]))
        self._bar.set_postfix(loss=f"{outputs['loss']:.3f}", refresh=False)

    def after_train_epoch(self, runner: Runner) -> None:
        self._bar.close()


class TrainingRunner(AttributionRunner):
    """mmengine's runner for a training; like its parent it owns no random numbers and no device."""

    def __init__(
        self,
        trainee: Trainee,
        folder: Path,
        name: str,
        batches: EpochBatches,
        validation: LoadedSamples,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Hyperparameters,
        hooks: Sequence[Hook | Mapping[str, Any]],
        vis_backends: Sequence[Mapping[str, Any]],
    ) -> None:
        self._run_name = folder.name
        max_norm = hyperparameters.clip
        clip = None if max_norm is None else {"max_norm": max_norm}
        # Not super(), whose runner explains instead of training.
        Runner.__init__(
            self,
            model=trainee,
            work_dir=str(folder.parent),
            train_dataloader=batches,
            val_dataloader=validation,
            train_cfg={"by_epoch": True, "max_epochs": hyperparameters.epochs},
            val_cfg={},
            val_evaluator=[],
            optim_wrapper={"type": "OptimWrapper", "optimizer": optimizer, "clip_grad": clip},
            default_hooks=dict.fromkeys(("sampler_seed", "param_scheduler", "checkpoint")),
            custom_hooks=list(hooks),
            visualizer={"type": "Visualizer", "vis_backends": list(vis_backends), "save_dir": str(folder)},
            env_cfg={"cudnn_benchmark": False},
            randomness={},
            experiment_name=f"{name}.{folder.name}",
            cfg=Config(),
        )

    def set_randomness(self, seed: Any = None, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        """mmengine would seed Python, numpy and torch for the whole process; ``TrainingHook`` seeds what is needed."""
        self._seed, self._deterministic = seed, deterministic

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        return ValidationLoop(self, self._val_dataloader)


def freeze(net: nn.Module, names: Sequence[str]) -> None:
    """Freeze the parameters whose name is one of ``names`` or lies below one.

    Raises UserError for a name that the net does not have.
    """
    for name in names:
        found = [p for n, p in net.named_parameters() if n == name or n.startswith(f"{name}.")]
        if not found:
            tops = ", ".join(n for n, _ in net.named_children())
            raise UserError(f"train.freeze: {type(net).__name__} has no parameters at {name!r}; its parts: {tops}")
        for parameter in found:
            parameter.requires_grad_(False)


def fit(
    net: nn.Module,
    samples: LoadedSamples,
    validation: LoadedSamples,
    hyperparameters: Hyperparameters,
    *,
    seed: int,
    device: torch.device,
    folder: Path,
    run: Path,
    save_best: Callable[[nn.Module, Progress], None],
    progress_bar: bool = True,
    hooks: Sequence[Hook | Mapping[str, Any]] = (),
    vis_backends: Sequence[Mapping[str, Any]] = (),
) -> Progress:
    """Train ``net`` in place; where ``folder/state.safetensors`` exists, go on from there.

    run         the folder for the log and the environment of this start
    save_best   called with the net whenever the validation accuracy is the best so far

    Raises UserError for a loss that is not finite, naming epoch and batch.
    """
    freeze(net, hyperparameters.freeze)
    use_all_bits()
    net.to(device)
    state = folder / "state.safetensors"
    trained = [p for p in net.parameters() if p.requires_grad]
    if not trained:
        raise UserError("train.freeze leaves no parameter to train")
    settings = {"lr": hyperparameters.lr, "weight_decay": hyperparameters.weight_decay}
    if hyperparameters.optimizer == "sgd":
        settings["momentum"] = hyperparameters.momentum
    optimizer = OPTIMIZERS[hyperparameters.optimizer](trained, **settings)
    progress = load_state(state, net, optimizer) if state.exists() else Progress()
    if progress.epoch:
        log.info("going on after epoch %d (best: %.2f %%)", progress.epoch, 100 * progress.best)
    own: list[Hook | Mapping[str, Any]] = [BarHook(folder.name)] if progress_bar else []
    early_stopping, patience = None, hyperparameters.patience
    if patience is not None:
        early_stopping = EarlyStoppingHook("accuracy", rule="greater", min_delta=1e-9, patience=patience)
        early_stopping.best_score, early_stopping.wait_count = progress.best, progress.waited
        own.append(early_stopping)
    own.append(TrainingHook(hyperparameters, seed, progress, state, early_stopping, save_best))
    batches = EpochBatches(samples, size=hyperparameters.batch, seed=seed, augment=hyperparameters.augment)
    try:
        runner = TrainingRunner(
            Trainee(net, device),
            run,
            folder.name,
            batches,
            validation,
            optimizer,
            hyperparameters,
            [*own, *hooks],
            vis_backends,
        )
    except (KeyError, TypeError, ValueError) as error:  # what mmengine raises for a name that is not registered
        raise UserError(f"train.hooks or train.vis_backends cannot be built: {error}") from error
    package = logging.getLogger("attrib")
    package.addHandler(runner.file_handler)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            runner.train()
    finally:
        package.removeHandler(runner.file_handler)
        runner.visualizer.close()
        runner.file_handler.close()
    return progress
