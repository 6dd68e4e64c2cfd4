"""The options of every subcommand. Imports nothing slow: help, mistakes and shell completion must come at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

SHORT = "The same command goes on after a kill and computes only what is missing."
ROOT = "work directory (workdirs)"


class Parser(argparse.ArgumentParser):
    """Takes options and positional arguments in any order."""

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Exits with 2 and one line for what is wrong."""
        return self.parse_intermixed_args(list(arguments))

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse says NoReturn, which exit() is
        self.exit(2, f"error: {message} ({self.prog} --help)\n")


def _parser(name: str, about: str, **more: str) -> Parser:
    p = Parser(
        prog=f"attrib {name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **more,  # type: ignore[arg-type]
    )
    p.add_argument(
        "-cd", "--config-dir", type=Path, metavar="DIR", help="folder of your own configurations, beside attrib's"
    )
    return p


def work_directory(text: str) -> Path:
    """A work directory as it is given: its path, or ``run.root=PATH`` as the command had it that wrote there."""
    return Path(text.removeprefix("run.root="))


def _root(p: Parser) -> None:
    p.add_argument("root", nargs="?", type=work_directory, default=Path("workdirs"), help=ROOT)


def _confidence(p: Parser) -> None:
    p.add_argument("--confidence", type=float, default=0.95, help="of the intervals and verdicts (0.95)")


# ---- subcommands that compose a configuration ----------------------------------------------------


def _composing(
    name: str, about: str, fields: Sequence[tuple[str, str]], *, grid: bool = True, shows: bool = True
) -> Parser:
    """``fields``: (heading, file of configurations whose comments explain them)."""
    p = _parser(name, about, epilog="\n\n".join(f"{heading}:\n{_explained(file)}" for heading, file in fields))
    if grid:
        p.add_argument("-m", "--multirun", action="store_true", help="overrides list several values: method=iba,random")
    if shows:
        p.add_argument("--cfg", choices=("job",), help="print the composed configuration, and do nothing else")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="method=iba chooses configs/method/iba.yaml, method.beta=20 sets a field of it (attrib list)",
    )
    return p


def _explained(file: str) -> str:
    """The fields of a YAML file with the comments beside them."""
    from attrib.config.places import configs

    path = configs() / file
    top = "run." if file.startswith("run/") else ""
    lines, section = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"(\w+):\s*$", line):
            section = f"{found[1]}."
        elif (found := re.match(r"( *)(\w+): *([^#]*?) *(?:# *(.*))?$", line)) and found[2] != "hydra":
            name = f"{section if found[1] else ''}{top}{found[2]}"
            if not name.startswith("hydra"):
                lines.append(f"  {name + '=' + found[3]:28} {found[4] or ''}".rstrip())
        elif (found := re.match(r" +# *(.*)", line)) and lines and not section.startswith("hydra"):
            lines.append(f"  {'':28} {found[1]}")
    return "\n".join(lines)


def run() -> Parser:
    about = "Explain the samples of a dataset, and score the maps: one experiment, or with -m a grid of them.\n" + SHORT
    heading = "Settings of the run, which change speed and storage but never results"
    p = _composing("run", about, [(heading, "run/default.yaml")])
    p.add_argument("--python", action="store_true", help="print the lines of Python that explain one of the samples")
    return p


def dataset() -> Parser:
    about = (
        "What a dataset holds: samples, classes, regions, sizes, ten thumbnails, and the net's accuracy on a hundred\n"
        "samples, with a warning if the labels seem to be in another order than the net's classes. Takes a folder,\n"
        "whose layout is found out, and the overrides of attrib run: attrib dataset photos/ model=vgg16."
    )
    p = _composing("dataset", about, [], grid=False, shows=False)
    p.add_argument(
        "--out",
        type=Path,
        help="the HTML page (<run.root>/dataset.<name>.html, of a folder alone dataset.<folder>-<digest>.html)",
    )
    return p


def train() -> Parser:
    about = "Train a network by a recipe (train=NAME), or go on with a training that was stopped."
    return _composing("train", about, [("Settings", "train.yaml")])


def sanity() -> Parser:
    about = "Does a method's map depend on the network's weights? Explains copies with randomised layers and compares."
    return _composing("sanity", about, [("Settings of the check; those of run.* are as for attrib run", "sanity.yaml")])


def precision() -> Parser:
    about = (
        "What another arithmetic of the network changes: explains and scores the samples in float32 and in that\n"
        "one (precision=bfloat16), and prints the differences of maps, scores and seconds with their intervals."
    )
    return _composing("precision", about, [("Settings; those of run.* are as for attrib run", "run.yaml")])


def graph() -> Parser:
    about = (
        "Causal graphs of a network's classes: JSON, pictures, what their paths are worth, how stable they are.\n\n"
        "Written to <run.root>/graphs/<dataset>.<model>.<key>/:\n"
        "  class_3.json  class_3.png      a graph, for networkx and to look at\n"
        "  effect.csv                     the causal sub-network against random ones of its size\n"
        "  stability.csv  stability.png   Jaccard index of graphs by soft interventions, over beta\n"
        "  bootstrap.csv                  the same for samples drawn with replacement"
    )
    return _composing("graph", about, [("Settings; those of run.* are as for attrib run", "graph.yaml")], grid=False)


def compare_trees() -> Parser:
    about = "Do hierarchies hold still when the input is perturbed a little?"
    p = _composing("compare-trees", about, [], grid=False, shows=False)
    p.add_argument(
        "--perturb",
        "--twin",
        choices=("noise", "fgsm"),
        default="noise",
        help="uniform noise, or one step of the gradient's sign against the class (noise)",
    )
    p.add_argument("--size", type=float, default=0.1, help="largest change of a number of the normalised input (0.1)")
    p.add_argument("--count", type=int, default=20, help="samples (20)")
    return p


# ---- subcommands that read a work directory ------------------------------------------------------


def table() -> Parser:
    p = _parser(
        "table",
        "The scores of a work directory as a table: means with bootstrap intervals, paired tests, costs.\n"
        "With paper=NAME: a paper's table, ours beside the published values, and what is still missing.",
    )
    p.add_argument(
        "root",
        nargs="*",
        metavar="ROOT",
        help="work directory (workdirs); or paper=NAME and overrides as for attrib run",
    )
    p.add_argument("--format", choices=TABLE_FORMATS, help="default: by the suffix of --out, else terminal")
    p.add_argument("--out", type=Path, metavar="FILE", help="write there instead of to the terminal")
    p.add_argument("--wide", action="store_true", help="methods x columns, one table per dataset and model (not csv)")
    p.add_argument(
        "--pairs",
        nargs="*",
        metavar="COLUMN",
        help="paired tests of these columns, without a name of all; in a terminal they are shown anyway. "
        "A csv then holds the tests instead of the means",
    )
    p.add_argument("--ranks", action="store_true", help="mean ranks of the methods with Friedman's test and Nemenyi's")
    p.add_argument("--power", action="store_true", help="how many samples it takes to tell methods apart, by column")
    p.add_argument("--agreement", action="store_true", help="rank correlation between metrics over the methods")
    p.add_argument("--rows", action="store_true", help="csv of every sample's scores instead of means")
    p.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE[,VALUE]",
        help=f"only these; fields: {', '.join(TABLE_FIELDS)}. Example: dataset=photos method=iba,grad_cam",
    )
    p.add_argument("--commands", action="store_true", help="paper=NAME: only the commands that compute what is missing")
    _confidence(p)
    return p


def paper() -> Parser:
    p = _parser(
        "paper",
        "A paper's table in one command: computes what is missing (the same command goes on after a kill), prints the\n"
        "table and writes it, with a figure, to ROOT/papers/. A study, such as study_2026, is several grids: what it\n"
        "found is written to ROOT/studies/. With --export: a finished work directory as a preset.",
    )
    p.add_argument("name", metavar="NAME", help="of the table or the study (attrib list papers)")
    p.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="overrides as for attrib run; of a study also paper.parts=NAME,NAME (these parts alone) and "
        "paper.size=tiny (small data, to see that every command works); with --export the work directory",
    )
    p.add_argument(
        "--export",
        action="store_true",
        help="write paper/NAME.yaml into --config-dir (default: configs/) from a work directory: its values, "
        "tolerances from its intervals, digests of nets and data",
    )
    _confidence(p)
    return p


TABLE_FORMATS = ("csv", "md", "tex", "terminal")
TABLE_FIELDS = ("dataset", "model", "method", "metric", "map", "column")


def report() -> Parser:
    p = _parser("report", "One self-contained HTML page about a work directory.")
    _root(p)
    p.add_argument("--out", type=Path, metavar="FILE", help="default: ROOT/report.html, of one sample ROOT/sample.html")
    p.add_argument("--samples", type=int, default=12, help="at most so many rows in each gallery (12)")
    p.add_argument("--sample", metavar="UID", help="a page about this sample alone, its maps larger")
    _confidence(p)
    return p


def show() -> Parser:
    p = _parser("show", "Explained texts on the terminal, their words coloured by the maps.")
    _root(p)
    p.add_argument("--samples", type=int, default=8, help="texts of each dataset and model (8)")
    return p


SILENT = 120.0


def status() -> Parser:
    p = _parser(
        "status",
        "How far a work directory is: done, to do, failed, and which processes work on it.\n\n"
        "Exit status:\n"
        "   0  all is done; samples that failed are named, and do not count as work\n"
        "  10  work is left, and every cell that misses something has a running worker\n"
        "  75  work is left that no process does: give the same command again\n"
        "   2  there is nothing to look at",
    )
    _root(p)
    p.add_argument("filter", nargs="*", help="only cells with all of these in their name; iba.* matches between dots")
    p.add_argument("--watch", type=float, metavar="SECONDS", help="look again and again, until all is done")
    p.add_argument("--json", action="store_true", help="for scripts; with --watch a line each time")
    p.add_argument("--lines", type=int, default=5, metavar="N", help="of each log, and of what failed; 0: none (5)")
    p.add_argument(
        "--silent",
        type=float,
        default=SILENT,
        metavar="SECONDS",
        help=f"a worker on another machine counts as dead after so long without a sign of life ({SILENT:.0f})",
    )
    return p


CACHE_COMMANDS = {
    "list": "cells, fitted states and leftovers with their sizes",
    "verify": "read everything and compare it with its checksums; exit status 1 if any file is damaged",
    "repair": "move damaged files away, so that the next run computes what they held; remove what dead writers left",
    "export": "write maps as PNG, .npy or .npz for other programs: attrib cache export ROOT FOLDER",
    "prune": "delete fitted states, pictures and folders that no cell refers to",
}
EXPORT_FORMATS = ("png", "npy", "npz")
DAMAGED = ".damaged"


def cache(command: str | None = None) -> Parser:
    """Of ``attrib cache``, or of one of its commands."""
    if command is None:
        lines = "\n".join(f"  {name:8} {about}" for name, about in CACHE_COMMANDS.items())
        asks = "repair and prune say what they would do and ask first; --yes does not ask, --dry does nothing."
        p = _parser("cache", f"Look after a work directory.\n\n{lines}\n\n{asks}")
        p.add_argument("command", choices=tuple(CACHE_COMMANDS), metavar="|".join(CACHE_COMMANDS))
        p.add_argument("rest", nargs="*", metavar="...", help="attrib cache COMMAND --help")
        return p
    p = _parser(f"cache {command}", CACHE_COMMANDS[command])
    if command == "export":
        p.add_argument("root", type=work_directory, help=ROOT)
        p.add_argument("out", type=Path, help="folder to write to")
        p.add_argument(
            "--format", choices=EXPORT_FORMATS, default="png", help="npz: all that is stored of a sample (png)"
        )
        words = {"--cell": ("WORD", "only cells with all of these in their name"), "--map": ("NAME", "only these maps")}
        words["--uid"] = ("PATTERN", "only these samples; * and ? match anything")
        for option, (metavar, about) in words.items():
            p.add_argument(option, nargs="+", default=[], metavar=metavar, help=about)
        p.add_argument("--force", action="store_true", help="write over files that are there")
        return p
    _root(p)
    if command == "repair":
        p.add_argument(
            "--delete", action="store_true", help=f"delete damaged files instead of moving them to {DAMAGED}"
        )
    if command == "prune":
        p.add_argument("--old-versions", action="store_true", help="also scores of an older VERSION of a metric")
        p.add_argument("--scores", nargs="+", default=[], metavar="FOLDER", help="also these: ehr.9561f895, or ehr.*")
        p.add_argument("--samples", action="store_true", help="also maps of samples that samples.json no longer names")
    if command in ("repair", "prune"):
        p.add_argument("--dry", action="store_true", help="only say what would be done")
        p.add_argument("--yes", action="store_true", help="do not ask")
    return p


# ---- others --------------------------------------------------------------------------------------


def list_() -> Parser:
    p = _parser("list", "What can be chosen, with one line each and what data it is for.")
    p.add_argument("what", choices=("methods", "models", "datasets", "metrics", "papers", "recipes"))
    return p


def prepare_imagenet() -> Parser:
    p = _parser(
        "prepare-imagenet",
        "Make small estimation and attribution sets from the ILSVRC 2012 validation set.\n\n"
        "The images may be flat (--labels says which class each is) or sorted into folders named by WordNet id:\n\n"
        "  attrib prepare-imagenet --images val --labels ILSVRC2012_validation_ground_truth.txt \\\n"
        "      --meta meta.mat --annotations bbox/val --target data/imagenet\n"
        "  attrib prepare-imagenet --images val --labels LOC_val_solution.csv --target data/imagenet --link symbolic\n"
        "  attrib prepare-imagenet --images val_by_class --target data/imagenet\n\n"
        "Run again, it adds what is missing and touches nothing else.",
    )
    p.add_argument("--images", type=Path, required=True, help="folder of the full validation set")
    p.add_argument("--labels", type=Path, help="ground truth .txt, or LOC_val_solution.csv with boxes")
    p.add_argument("--meta", type=Path, help="meta.mat, for a ground truth of ILSVRC ids")
    p.add_argument("--annotations", type=Path, help="folder of VOC .xml files, searched recursively")
    p.add_argument("--classes", type=Path, help="class index, JSON or CSV (default: the 1,000 of ImageNet)")
    p.add_argument("--target", type=Path, default=Path("data/imagenet"), help="default: %(default)s")
    p.add_argument("--attribution", type=int, default=500, help="images to explain (default: %(default)s)")
    p.add_argument("--estimation", type=int, default=1000, help="images for statistics (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the choice of images")
    p.add_argument("--link", choices=("copy", "hard", "symbolic"), default="copy", help="default: %(default)s")
    p.add_argument("--force", action="store_true", help="replace another choice of images in the target")
    return p


def completion() -> Parser:
    p = _parser("completion", 'Shell completion: eval "$(attrib completion bash)" in ~/.bashrc, or zsh in ~/.zshrc.')
    p.add_argument("shell", choices=("bash", "zsh"))
    return p


PARSERS: dict[str, Callable[[], Parser]] = {
    "run": run,
    "train": train,
    "table": table,
    "paper": paper,
    "report": report,
    "show": show,
    "list": list_,
    "status": status,
    "cache": cache,
    "sanity": sanity,
    "precision": precision,
    "dataset": dataset,
    "graph": graph,
    "compare-trees": compare_trees,
    "prepare-imagenet": prepare_imagenet,
    "completion": completion,
}
