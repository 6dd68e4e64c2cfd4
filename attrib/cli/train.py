"""``attrib train``: train a network by a recipe, or go on with a training that was stopped."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.config.compose import Composition
from attrib.process.signals import LEFT, Interrupted, watching
from attrib.training.recipe import train


def main(argv: Sequence[str]) -> int:
    args = PARSERS["train"]().parse(argv)
    common.prepare()
    return common.grid("train", args, _train)


def _train(composition: Composition) -> int:
    try:
        with watching() as stop, stop.immediately():  # the state of the last whole epoch is there
            print(train(composition.values), flush=True)
    except (KeyboardInterrupt, Interrupted):
        again = composition.values["train"].get("restart")
        how = "without train.restart the same command" if again else "the same command"
        print(f"stopped; {how} goes on after the last whole epoch", file=sys.stderr, flush=True)
        return LEFT
    return 0
