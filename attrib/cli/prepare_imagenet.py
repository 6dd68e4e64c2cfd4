"""``attrib prepare-imagenet``: small estimation and attribution sets from the ILSVRC 2012 validation set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from attrib.cli import common
from attrib.cli.parsers import PARSERS
from attrib.datasets.prepare import find_sources, prepare


def main(argv: Sequence[str]) -> int:
    args = PARSERS["prepare-imagenet"]().parse(argv)
    return common.guarded(lambda: _prepare(args))


def _prepare(given: argparse.Namespace) -> int:
    report = prepare(
        find_sources(given.images, given.labels, given.annotations, given.meta),
        given.target,
        attribution=given.attribution,
        estimation=given.estimation,
        seed=given.seed,
        link=given.link,
        classes=given.classes,
        force=given.force,
    )
    print(report)
    print(f"{given.attribution} images to explain and {given.estimation} for statistics in {given.target}")
    return 0
