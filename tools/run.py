"""Run one experiment, or with -m a grid of them. See configs/run.yaml and README.md."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from attrib.config import build, experiment, options_of, resolved
from attrib.memory import keep_freed_memory
from attrib.plan import Options, plan
from attrib.run import run
from attrib.types import UserError

status = 0  # of the process: a grid goes on after a failure, but does not hide it


def _options(config: dict) -> Options:
    extras = {
        name: [build(node, f"run.{name}") if "_target_" in node else node for node in config[name]]
        for name in ("hooks", "vis_backends")
    }
    return options_of({**config, **extras})


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent.parent / "configs"), config_name="run")
def main(config: DictConfig) -> None:
    global status
    try:
        plain = resolved(config)
        options = _options(plain["run"])
        cell = experiment(plain)
        if options.dry:
            print(plan(cell, options))
            return
        summary = run(cell, options)
        print(f"{cell.names['dataset']} {cell.names['model']} {cell.names['method']}: {summary}", flush=True)
        nothing = not (summary.maps_computed or summary.maps_present)
        if summary.failed and (options.strict or nothing):
            status = max(status, 3)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = max(status, 2)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("attrib").setLevel(logging.INFO)
    keep_freed_memory()
    # A polite kill flushes what is finished; an impolite one loses at most a few seconds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.path.append(str(Path.cwd()))  # so that _target_: my_module.MyMethod finds a file beside you
    main()
    sys.exit(status)
