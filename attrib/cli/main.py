"""The command ``attrib``: finds the subcommand, and says what went wrong in one line."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from attrib.cli.parsers import PARSERS
from attrib.errors import did_you_mean
from attrib.process.garbage import kept_for_good

GROUPS = {
    "compute": {
        "run": "explain a dataset's samples and score the maps; -m: a grid, or a paper's table",
        "paper": "a paper's table in one command; a study of one's own as a preset",
        "train": "train a network by a recipe",
        "sanity": "does a method's map depend on the network's weights?",
        "precision": "what another arithmetic of the network, such as bfloat16, changes",
        "graph": "causal graphs of a network's classes",
        "compare-trees": "do hierarchies hold still when the input is perturbed?",
    },
    "look": {
        "dataset": "what a dataset holds, and whether its labels mean what the network's classes mean",
        "table": "means, intervals, paired tests, ranks; a paper's table beside ours",
        "report": "one self-contained HTML page",
        "show": "coloured words on the terminal",
        "status": "what is done, to do, failed, and which processes work on it",
        "list": "methods, models, datasets, metrics, papers that can be chosen",
    },
    "look after": {
        "cache": "list, verify, repair, export or prune a work directory",
        "prepare-imagenet": "small sets from the ILSVRC 2012 validation images",
        "completion": "shell completion for bash and zsh",
    },
}
EXAMPLE = """\
  attrib run method=grad_cam run.limit=2     explain two photographs with the default network
  attrib table                               what it found
  attrib run -m method=random,grad_cam,iba   a grid; the same command goes on after a kill"""


def _overview() -> str:
    lines = ["usage: attrib SUBCOMMAND ...", "", "Attribution experiments that can be trusted, resumed and compared."]
    for heading, commands in GROUPS.items():
        lines += ["", f"{heading}:", *(f"  {name:18} {about}" for name, about in commands.items())]
    return "\n".join([*lines, "", "for example:", EXAMPLE, "", "attrib SUBCOMMAND --help explains one of them."])


def dispatch(arguments: Sequence[str]) -> int:
    """The exit status of ``attrib ARGUMENTS``."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name in ("--version", "-V"):
        import attrib

        print(f"attrib {attrib.__version__}")
        return 0
    if name not in PARSERS:
        print(f"error: there is no subcommand {name!r}{did_you_mean(name, PARSERS)} (attrib --help)", file=sys.stderr)
        return 2
    if any(option in rest for option in ("-h", "--help")) and name != "cache":
        PARSERS[name]().parse(["--help"])
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # _target_: my_module.MyMethod, from a file beside you
    with kept_for_good():
        subcommand = importlib.import_module(f"attrib.cli.{name.replace('-', '_')}")
    return int(subcommand.main(rest))


def main(*before: str) -> None:
    """The console script; ``before``: words in front of the command line's own (tools/run.py says "run")."""
    if "_ARGCOMPLETE" in os.environ:
        from attrib.cli.completion import complete

        complete()
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream that is no file
        faulthandler.enable()  # an abort inside a library says where it happened
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    arguments = [*before, *sys.argv[1:]]
    if arguments and arguments[0] in GROUPS["compute"]:
        from attrib.process.signals import polite_start

        polite_start()  # imports take seconds
    try:
        status = dispatch(arguments)
    except SystemExit as end:  # argparse
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # such as | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:  # in the seconds that imports take, where no subcommand is there yet to catch it
        status = 130
    if "attrib.process.signals" in sys.modules:
        from attrib.process.signals import exit_process

        exit_process(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
