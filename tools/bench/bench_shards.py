"""Times of sets in shards: the first index, later starts, and the memory that the index takes.

python tools/bench/bench_shards.py FOLDER [--samples 50000] [--kind tar|parquet]   (writes the set if it is missing)
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SHARD = 1000  # samples


def jpegs(count: int) -> list[bytes]:
    """Of about 37 kB each."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).resize((320, 240), Image.BICUBIC)
        stream = io.BytesIO()
        noise.save(stream, "JPEG", quality=92)
        found.append(stream.getvalue())
    return found


def write(folder: Path, kind: str, samples: int) -> None:
    folder.mkdir(parents=True)
    base = jpegs(100)
    for shard in range(-(-samples // SHARD)):
        numbers = range(shard * SHARD, min(samples, (shard + 1) * SHARD))
        # Bytes behind the end of a JPEG make every image another one.
        contents = [base[i % len(base)] + i.to_bytes(4, "big") for i in numbers]
        if kind == "tar":
            with tarfile.open(folder / f"bench-val-{shard:06d}.tar", "w") as archive:
                for i, content in zip(numbers, contents, strict=True):
                    for name, data in ((f"{i:08d}.jpg", content), (f"{i:08d}.cls", str(i % 1000).encode())):
                        about = tarfile.TarInfo(name)
                        about.size = len(data)
                        archive.addfile(about, io.BytesIO(data))
        else:
            images = [{"bytes": c, "path": f"val_{i:08d}.JPEG"} for i, c in zip(numbers, contents, strict=True)]
            table = pa.table({"image": images, "label": [i % 1000 for i in numbers]})
            pq.write_table(table, folder / f"validation-{shard:05d}-of-00050.parquet", row_group_size=100)


def child(root: str, kind: str, work: str) -> None:
    from attrib.datasets import ImageTransform, ParquetShards, TarShards

    def memory() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    before, start = memory(), time.perf_counter()
    dataset = (TarShards if kind == "tar" else ParquetShards)(root, ImageTransform(224), index=work)
    indexed, held = time.perf_counter(), memory()
    for uid in dataset.uids:
        dataset.fingerprint(uid)
    printed = time.perf_counter()
    rng = np.random.default_rng(0)
    for uid in sorted(rng.choice(dataset.uids, 200, replace=False)):
        dataset.open(uid)
    scattered = time.perf_counter()
    for uid in dataset.uids[:200]:
        dataset.open(uid)
    near = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        json.dumps(
            {
                "samples": len(dataset.uids), "index_s": indexed - start, "fingerprints_s": printed - indexed,
                "index_mb": held - before, "peak_mb_more": peak - before,
                "scattered_ms": (scattered - printed) * 5, "neighbours_ms": (near - scattered) * 5,
            }
        )
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--kind", choices=("tar", "parquet"), default="tar")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    root = args.folder / f"{args.kind}-{args.samples}"
    if args.child:
        child(str(root), args.kind, args.child)
        return
    if not root.exists():
        write(root, args.kind, args.samples)
        time.sleep(3)  # a shard that has just been written is not remembered
    work = args.folder / f"work-{time.time_ns()}"
    command = [sys.executable, __file__, str(args.folder), "--kind", args.kind, "--samples", str(args.samples)]
    for what in ("first", "later"):
        done = subprocess.run([*command, "--child", str(work)], check=True, capture_output=True, text=True)
        print(f"{args.kind} {what}: {done.stdout.strip()}")


if __name__ == "__main__":
    main()
