"""``attrib cache``: list, verify, repair, export or prune what a work directory holds."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from attrib.cli import common, parsers
from attrib.errors import UserError, printable
from attrib.process import exit_status
from attrib.store.cell import cells
from attrib.store.damaged import DAMAGED
from attrib.store.workers import clock, counted
from attrib.upkeep import cache, export, repair
from attrib.upkeep.status_table import duration


def main(argv: Sequence[str]) -> int:
    first = next((word for word in argv if not word.startswith("-")), None)
    if first not in COMMANDS:
        parsers.cache().parse(argv)  # says what there is, and exits
    assert first is not None
    rest = list(argv)
    rest.remove(first)
    args = parsers.cache(first).parse(rest)
    try:
        return common.guarded(lambda: COMMANDS[first](args))
    except KeyboardInterrupt:
        print("stopped. What was done so far is done; the same command goes on", file=sys.stderr)
        return 130


def size(number: float) -> str:
    """1234567 -> 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" or number >= 99.5 else f"{number:.1f} {unit}"


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> None:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        drawn.add_column(name, no_wrap=True, justify="right" if name in ("size", "files", "age") else "left")
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    console = common.console()
    console.print(drawn, soft_wrap=True)
    print(common.printed(console), end="")


def ask(question: str, args: argparse.Namespace) -> bool:
    if args.dry:
        return False
    if args.yes:
        return True
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def line(item: cache.StoredItem, root: Path, about: str) -> list[str]:
    names = item.path.relative_to(root)
    more = f" (+{len(item.paths) - 1})" if len(item.paths) > 1 else ""
    m = item.measure
    return [item.kind, f"{names}{more}", size(m.size), str(m.files), duration(m.age), about]


HEADER = ("what", "path", "size", "files", "age", "")


def do_list(args: argparse.Namespace) -> int:
    problem = ""
    try:
        uses = cache.references(args.root)
    except UserError as error:
        uses, problem = {}, str(error)
    found = cache.inventory(args.root, uses)
    rows = []
    for item in found:
        about = item.about
        if item.kind in ("state", "partial", "pictures", "confidence") and not problem:
            about = f"used by {counted(len(item.uses), 'cell')}" if item.uses else "used by no cell"
        rows.append(line(item, args.root, about))
    table(rows, HEADER)
    print(f"{size(sum(item.measure.size for item in found if item.kind != 'temporary'))} in {args.root}")
    if problem:
        print(f"note: {printable(problem)}")
    return 0


def damages(root: Path) -> list[repair.Damage]:
    """Reads everything, with a bar on a terminal."""
    listed = repair.checks(root)
    bar = tqdm(listed, desc="reading", unit=" files", disable=not sys.stderr.isatty(), leave=False)
    found = [damage for path, check in bar if (damage := check(path)) is not None and os.path.lexists(path)]
    print(f"{counted(len(listed), 'file')} read, {len(found)} damaged")
    for damage in found:
        print(f"  {printable(f'{damage.path}: {damage.problem}')}")
        if damage.samples is not None:
            uids = list(dict.fromkeys(uid for uid, _ in damage.samples))
            more = ", ..." if len(uids) > 20 else ""
            print(f"    held {counted(len(uids), 'sample')}: {printable(', '.join(uids[:20]))}{more}")
        elif damage.path.suffix in (".safetensors", ".parquet"):
            print("    does not say any more which samples it held; the next run finds those that miss")
    return found


def do_verify(args: argparse.Namespace) -> int:
    return 1 if damages(args.root) else 0


def do_repair(args: argparse.Namespace) -> int:
    if not args.dry:
        cache.refuse_while_running(args.root)
    found = damages(args.root)
    left = cache.temporaries(args.root, clock(args.root), dead=True)
    if left:
        table([line(item, args.root, item.about) for item in left], HEADER)
    what = [f"{'delete' if args.delete else 'move away'} {counted(len(found), 'damaged file')}"] if found else []
    what += [f"delete {counted(len(left), 'unfinished file')} of dead writers"] if left else []
    if what and not ask(f"{' and '.join(what)}?", args):
        print("nothing was changed")
        return 1 if found else 0
    if args.dry:
        return 0
    if found:
        cache.refuse_while_running(args.root)
        saved = repair.put_aside(args.root, found, delete=args.delete)
        print(f"{counted(len(found), 'file')} {'deleted' if args.delete else f'moved to {DAMAGED}'}")
        if saved:
            print(f"{counted(saved, 'sample')} in them were whole, and are written anew")
        print("the next run of the same command computes what was lost")
    for item in left:
        with contextlib.suppress(FileNotFoundError):
            cache.remove(args.root, item.path)
    print(f"{counted(repair.reindex(args.root), 'stored sample')} indexed")
    return 0


def do_export(args: argparse.Namespace) -> int:
    done = export.export(
        args.root, args.out, args.format, filters=args.cell, maps=args.map, uids=args.uid, force=args.force
    )
    bare = f" ({done.bare} without the input, which the work directory keeps of the first samples only)"
    print(f"{counted(done.files, 'file')} in {args.out}{bare if done.bare else ''}")
    for reason in done.skipped[:20]:
        print(f"  left out: {printable(reason)}")
    if len(done.skipped) > 20:
        print(f"  and {len(done.skipped) - 20} more")
    return exit_status.report_broken(done.broken) or (1 if done.skipped else 0)


def do_prune(args: argparse.Namespace) -> int:
    root = args.root
    if not args.dry:
        cache.refuse_while_running(root)
    doomed, kept = selected(args)
    stale = {cell.folder: cache.stale_maps(cell) for cell in cells(root)} if args.samples else {}
    chunks = {folder: found for folder, found in stale.items() if found}
    for item, why in kept:
        print(f"kept: {printable(str(item.path.relative_to(root)))}: {printable(why)}")
    if not doomed and not chunks:
        print("nothing to delete")
        return 0
    if doomed:
        table([line(item, root, item.about or "used by no cell") for item in doomed], HEADER)
    for folder, found in chunks.items():
        count, whole = (sum(n[i] for n in found.values()) for i in (0, 1))
        chunked = f"{counted(len(found), 'chunk')} of {whole} written anew"
        print(f"maps of {counted(count, 'sample')} in {printable(folder.name)} ({chunked})")
    total = sum(item.measure.size for item in doomed)
    if not ask(f"delete {size(total)} in {counted(len(doomed), 'place')}{' and these maps' if chunks else ''}?", args):
        print("nothing was deleted")
        return 0
    cache.refuse_while_running(root)  # the answer may have taken its time
    again = {item.path for item in selected(args)[0]}
    for item in doomed:
        for path in item.paths if item.path in again else ():
            with contextlib.suppress(FileNotFoundError):
                cache.remove(root, path)
    for cell in cells(root):
        if cell.folder in chunks:
            gone = repair.drop(root, cell, cache.stale_maps(cell))
            print(f"{counted(gone, 'map')} dropped from {printable(cell.folder.name)}")
    if chunks:
        repair.reindex(root)
    print(f"{size(total)} deleted")
    return 0


def selected(args: argparse.Namespace) -> tuple[list[cache.StoredItem], list[tuple[cache.StoredItem, str]]]:
    doomed, kept = cache.unused(args.root)
    more = cache.superseded(args.root) if args.old_versions else []
    more += [item for pattern in args.scores for item in cache.scores(args.root, pattern)]
    for item in more:
        if item.measure.strange:
            kept.append((item, f"{item.measure.strange[0]} {cache.NOT_OURS}"))
        else:
            doomed.append(item)
    return list({item.path: item for item in doomed}.values()), kept


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": do_list,
    "verify": do_verify,
    "repair": do_repair,
    "export": do_export,
    "prune": do_prune,
}
