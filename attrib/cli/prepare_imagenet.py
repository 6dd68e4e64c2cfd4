#!/usr/bin/env python
"""Make small estimation and attribution sets from the ILSVRC 2012 validation set.

The images may be flat (then --labels says which class each is) or sorted into folders named by WordNet id:

    python tools/prepare_imagenet.py --images val --labels ILSVRC2012_validation_ground_truth.txt \\
        --meta meta.mat --annotations bbox/val --target data/imagenet
    python tools/prepare_imagenet.py --images val --labels LOC_val_solution.csv --target data/imagenet --link symbolic
    python tools/prepare_imagenet.py --images val_by_class --target data/imagenet

Run again, it adds what is missing and touches nothing else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from attrib.datasets.prepare import find_sources, prepare
from attrib.types import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the full validation set")
    parser.add_argument("--labels", type=Path, help="ground truth .txt, or LOC_val_solution.csv with boxes")
    parser.add_argument("--meta", type=Path, help="meta.mat, for a ground truth of ILSVRC ids")
    parser.add_argument("--annotations", type=Path, help="folder of VOC .xml files, searched recursively")
    parser.add_argument("--classes", type=Path, help="class index, JSON or CSV (default: the 1,000 of ImageNet)")
    parser.add_argument("--target", type=Path, default=Path("data/imagenet"), help="default: %(default)s")
    parser.add_argument("--attribution", type=int, default=500, help="images to explain (default: %(default)s)")
    parser.add_argument("--estimation", type=int, default=1000, help="images for statistics (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--link", choices=("copy", "hard", "symbolic"), default="copy", help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace another choice of images in the target")
    given = parser.parse_args(arguments)
    try:
        sources = find_sources(given.images, given.labels, given.annotations, given.meta)
        report = prepare(
            sources,
            given.target,
            attribution=given.attribution,
            estimation=given.estimation,
            seed=given.seed,
            link=given.link,
            classes=given.classes,
            force=given.force,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    print(f"{given.attribution} images to explain and {given.estimation} for statistics in {given.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
