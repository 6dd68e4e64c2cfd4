"""Train a net, or go on with a training that was stopped. See configs/train.yaml and docs/how-to/train-a-network.md."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from attrib.process import exit_status
from attrib.process.signals import LEFT, Interrupted, ended, leave, watching
from attrib.training.recipe import train
from attrib.types import UserError

CONFIGS = str(Path(__file__).resolve().parent.parent.parent / "configs")
status = 0  # of the process: a grid goes on after a failure, but does not hide it


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(config: DictConfig) -> None:
    global status
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        with watching() as stop, stop.at_once():  # the state of the last whole epoch is there
            print(train(plain), flush=True)
    except OmegaConfBaseException as error:
        status = exit_status.worst((status, exit_status.told(UserError(str(error)))))
    except Exception as error:
        status = exit_status.worst((status, exit_status.told(error)))
    except (KeyboardInterrupt, Interrupted):
        how = "without train.restart the same command" if config.train.get("restart") else "the same command"
        print(f"stopped; {how} goes on after the last whole epoch", file=sys.stderr, flush=True)
        sys.exit(LEFT)


if __name__ == "__main__":
    exit_status.ready()
    leave(ended(main) or status)
