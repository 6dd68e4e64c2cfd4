"""The command ``attrib``: help, mistakes, options in any order, what it lists and completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, Result, called, command, pictures

from attrib.cli import main, parsers
from attrib.cli.list import described
from attrib.cli.main import GROUPS, dispatch
from attrib.cli.parsers import PARSERS
from attrib.config.compose import compose, preset
from attrib.config.objects import experiment
from attrib.errors import UserError
from attrib.results import tables
from attrib.store import damaged, workers
from attrib.store.cell import cells
from attrib.upkeep import export


@pytest.fixture
def attrib(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: called(capfd, lambda: dispatch(arguments))


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """``attrib run ARGS`` on small pictures."""
    monkeypatch.chdir(tmp_path)
    common = ("dataset=tiny", f"dataset.root={pictures(tmp_path)}", "model=small_cnn", "run.progress=false")
    return lambda *arguments: command(capfd)(*common, "metric=[]", *arguments)


def sentence(result: Result) -> str:
    """What a mistake ends with: status 2 and one line."""
    assert result.status == 2, result
    assert "Traceback" not in result.err
    [line] = result.err.strip().splitlines()
    assert line.startswith("error: ")
    return line


# ---- help ----


def test_help_names_every_subcommand_on_one_screen(attrib):
    text = attrib("--help").out
    assert len(text.splitlines()) <= 40
    assert {name for group in GROUPS.values() for name in group} == PARSERS.keys()
    assert all(f"  {name} " in text for name in PARSERS)
    assert attrib("help").out == text
    assert attrib().status == 2


@pytest.mark.parametrize("name", PARSERS)
def test_every_subcommand_explains_itself(attrib, name):
    result = attrib(name, "--help")
    assert result.status == 0
    assert f"attrib {name}" in result.out


def test_help_explains_every_field_of_run(attrib):
    text = attrib("run", "--help").out
    lines = (ROOT / "configs" / "run" / "default.yaml").read_text().splitlines()
    for field in (line.split(":")[0] for line in lines if line and line[0].isalpha()):
        [line] = [line for line in text.splitlines() if line.startswith(f"  run.{field}=")]
        assert len(line.split(None, 1)) == 2, f"run.{field} has no comment in configs/run/default.yaml"


@pytest.mark.parametrize(
    ("name", "field"), [("train", "train.epochs="), ("sanity", "sanity.layers="), ("graph", "betas=")]
)
def test_help_explains_the_fields_of_others(attrib, name, field):
    assert field in attrib(name, "--help").out


def test_help_imports_nothing_slow():
    """Half a second is promised; torch alone takes two."""
    code = "import sys; from attrib.cli.main import dispatch; dispatch(['--help']); print(sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"'torch'", "'hydra'", "'numpy'", "'pandas'"} & set(found.replace("[", "").split(", "))


def test_tools_that_look_do_without_torch():
    """Three seconds are promised for a hundred thousand samples; torch alone takes two."""
    code = "import sys, attrib.cli.table, attrib.cli.status, attrib.cli.cache; print(sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"'torch'", "'hydra'"} & set(found.replace("[", "").split(", "))


def test_a_run_starts_without_what_it_may_not_need(tmp_path):
    """Each of these takes a quarter of a second or more, and a grid starts many processes."""
    few = ["dataset=tiny", f"dataset.root={pictures(tmp_path, 1)}", "model=small_cnn", "method=random", "metric=[]"]
    given = ["run", "--config-dir", f"{ROOT}/tests/configs", *few, f"run.root={tmp_path}", "run.progress=false"]
    code = f"import sys\nfrom attrib.cli.main import dispatch\nassert not dispatch({given!r})\nprint([*sys.modules])"
    places = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    found = subprocess.run([sys.executable, "-c", code], env=places, capture_output=True, text=True, check=True).stdout
    modules = set(found.replace("[", "").split(", "))
    assert "'mmengine.runner'" in modules
    assert not {"'transformers'", "'scipy.stats'", "'quantus'", "'torch._dynamo'", "'torchvision'"} & modules
    assert not {"'captum'", "'scipy.sparse'", "'scipy.ndimage'"} & modules


def test_pythons_garbage_collector_works_again_after_the_imports_and_leaves_them_alone():
    code = (
        "import gc, sys\nfrom attrib.cli.main import dispatch\nassert dispatch(['table', '/nowhere']) == 2\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 50_000"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)


def test_what_the_options_offer_is_what_there_is():
    assert parsers.EXPORT_FORMATS == export.FORMATS
    assert parsers.TABLE_FIELDS == tables.WHERE
    assert parsers.SILENT == workers.SILENT
    assert parsers.DAMAGED == damaged.DAMAGED


def test_every_tool_is_a_wrapper_of_a_subcommand():
    for path in (ROOT / "tools").glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line]
        assert lines == ["from attrib.cli.main import main", f'main("{path.stem.replace("_", "-")}")']


# ---- mistakes ----


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["method=gradcam"], "there is no method 'gradcam'; did you mean 'grad_cam'?"),
        (["metric=[ehrr]"], "there is no metric 'ehrr'; did you mean 'ehr'?"),
        (["limit=3"], "did you mean 'run.limit'?"),
        (["metod=iba"], "did you mean 'method'?"),
        (["+metrics=[ehr]"], "nothing reads 'metrics'; did you mean 'metric'?"),
        (["+nonsense.deep=1"], "nothing reads 'nonsense'"),
        (["method=[random,gradient]"], "-m method=random,gradient"),
        (["method=random,gradient"], "add -m"),
        (["method=iba", "method.bta=3"], "did you mean 'beta'?"),
        (["method=iba", "+method.bta=3"], "did you mean 'beta'?"),
        (["run.limt=3"], "did you mean 'limit'?"),
        (["+run.limt=3"], "did you mean 'limit'?"),
        (["run.limit=few"], "run.limit must be int or null"),
        (["run.limit=0"], "run.limit must be at least 1"),
        (["just words"], "expected KEY=VALUE"),
        (["method={a"], "not understood"),
        (["method=null"], "method takes a name"),
        (["run.root="], "run.root"),
        (["--no-such-option"], "unrecognized arguments"),
        (["--config-dir", "nowhere"], "there is no such folder"),
    ],
)
def test_a_mistake_is_one_sentence(attrib, arguments, says):
    assert says in sentence(attrib("run", *arguments))


def test_a_missing_value_is_named(attrib):
    assert "dataset.path has no value: add dataset.path=..." in sentence(
        attrib("run", "dataset=text_csv", "model=bilstm")
    )


def test_train_needs_a_recipe(attrib):
    assert "no train chosen: add train=NAME (there are: " in sentence(attrib("train"))


def test_a_misspelt_subcommand(attrib):
    assert "did you mean 'report'?" in sentence(attrib("reprot"))


def test_a_method_whose_values_are_for_other_data(attrib):
    text = sentence(attrib("run", "method=input_iba_text"))
    assert "method input_iba_text has the values for text data, but dataset photos holds image" in text


def test_a_misspelt_method_does_not_stop_the_others(run, tmp_path):
    result = run("-m", "method=random,gradcam,gradient", f"run.root={tmp_path / 'work'}")
    assert result.status == 2
    assert "did you mean 'grad_cam'?" in result.err
    assert {cell.folder.name.split(".")[2] for cell in cells(tmp_path / "work")} == {"random", "gradient"}


@pytest.mark.parametrize("flags", [(), ("-m",)])
def test_a_root_that_cannot_be_written(run, tmp_path, flags):
    (tmp_path / "file").write_text("")
    text = sentence(run(*flags, "method=random", f"run.root={tmp_path / 'file' / 'work'}"))
    assert str(tmp_path / "file") in text
    assert "safe" not in text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.steps=many", "method.steps=many: steps must be int"),
        ("method.steps=-1", "method.steps=-1: IBA.steps is -1, must be at least 1"),
        ("+method.stpes=3", r"+method.stpes=3: attrib.methods.iba.IBA has no field 'stpes'; did you mean 'steps'?"),
        ("dataset.select.count=few", "dataset.select.count=few: select: count must be int"),
    ],
)
def test_the_override_is_blamed_and_not_the_file(run, override, says):
    assert sentence(run("method=iba", override)).startswith(f"error: {says}")


def test_a_file_that_is_misread_is_named(run, tmp_path):
    (tmp_path / "conf" / "method").mkdir(parents=True)
    wrong = "name: mine\n_target_: attrib.methods.iba.IBA\nsteps: many\n"
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(wrong)
    compositions = compose("run", ["method=mine", "+method.beta=3", "+method.lr=0.5"], tmp_path / "conf")
    with pytest.raises(UserError) as refused:
        experiment(compositions.values, compositions.files)
    assert compositions.blamed(refused.value) is refused.value
    assert "conf/method/mine.yaml: steps must be int" in str(refused.value)


# ---- grids ----


def test_a_grid_says_which_cell_was_refused_and_lists_them_at_the_end(run, tmp_path):
    result = run("-m", "method=gradcam,random,iba,gradient", "dataset.target=predicted,0",
                 "method.steps=many", f"run.root={tmp_path / 'work'}")  # fmt: skip
    assert result.status == 2
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    cells = [
        f"method={m} dataset.target={t}" for m in ("gradcam", "random", "iba", "gradient") for t in ("predicted", 0)
    ]
    assert [line.split(": ")[1] for line in errors] == cells
    assert errors[4] == f"error: {cells[4]}: method.steps=many: steps must be int, not 'many'"
    head, *listed = result.err.splitlines()[-9:]
    assert head == "8 of 8 cells did not end well:"
    assert [line.split(": ")[0].strip() for line in listed] == cells
    assert all(len(line) <= 200 for line in listed)


def test_a_grid_that_ends_well_lists_nothing(run, tmp_path):
    result = run("-m", "method=random,gradient", "run.limit=1", f"run.root={tmp_path / 'work'}")
    assert result.status == 0
    assert "end well" not in result.err


def test_cells_of_equal_names_are_told_apart(run, tmp_path):
    common = ("run.limit=1", f"run.root={tmp_path / 'work'}")
    done = run("-m", "method=gradient", "dataset.target=0,1", *common)
    assert [line for line in done.out.splitlines() if "INFO" not in line][::2] == [
        "dataset.target=0",
        "dataset.target=1",
    ]
    assert "method=" not in run("-m", "method=random,gradient", *common).out


def test_an_unexpected_error_names_its_cell(run, tmp_path, monkeypatch):
    monkeypatch.setattr("attrib.cli.run.make_plan", lambda *given: 1 / 0)
    result = run("-m", "method=random,gradient", "run.dry=true", f"run.root={tmp_path / 'work'}")
    assert result.status == 1
    assert "error: method=gradient: ZeroDivisionError\nTraceback" in result.err
    assert result.err.splitlines()[-2:] == [
        f"  method={m}: ZeroDivisionError: division by zero" for m in ("random", "gradient")
    ]


# ---- any order, any place ----


def test_options_and_words_in_any_order(attrib, tmp_path):
    one = attrib("status", "work", "--lines", "1", "iba")
    other = attrib("status", "--lines", "1", "work", "iba")
    assert one == other
    assert one.status == 2
    config = tmp_path / "conf" / "paper"
    config.mkdir(parents=True)
    (config / "mine.yaml").write_text("# @package _global_\npaper: {title: a, rows: {}, columns: {}}\n")
    orders = [
        ["paper=mine", "--config-dir", "conf", "run.root=x"],
        ["--config-dir", "conf", "run.root=x", "paper=mine"],
        ["run.root=x", "paper=mine", "--config-dir", "conf"],
    ]
    assert len({sentence(attrib("table", *order)) for order in orders}) == 1


MINE = """
from dataclasses import dataclass
from typing import ClassVar
from attrib.methods import Method

@dataclass(frozen=True)
class Mine(Method):
    \"\"\"A map of ones.\"\"\"

    VERSION: ClassVar[int] = 1
    MAPS: ClassVar[dict[str, str]] = {"map": "ones"}

    def attribute(self, model, batch, state, noise):
        return {"map": batch.x.new_ones(batch.x.shape[0], *batch.x.shape[2:])}
"""


def test_own_configurations_and_modules_of_the_current_folder(attrib, tmp_path, monkeypatch):
    """As a new user: another folder, a class of one's own. tests/wheel/run.sh does so by the command itself."""
    (tmp_path / "mine_module.py").write_text(MINE)
    for part, text in {
        "method/mine": "name: mine\n_target_: mine_module.Mine\n",
        "paper/mine": "# @package _global_\npaper: {title: Mine, columns: {EHR: ehr.ehr}, rows: {it: method=mine}}\n",
    }.items():
        path = tmp_path / "conf" / f"{part}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the command puts its folder there

    small = ["dataset=digits", "model=lenet", "run.limit=2", "run.device=cpu"]
    done = attrib("run", *small, "metric=[]", "--config-dir", "conf", "method=mine")
    assert done.status == 0, done.err
    assert "maps_computed=2" in done.out
    assert "mine" in attrib("table", "--config-dir", "conf", "paper=mine", *small).out
    assert described("method", "mine", tmp_path / "conf/method/mine.yaml", tmp_path / "conf")[1] == "A map of ones."


# ---- what there is ----


@pytest.mark.parametrize("what", ["methods", "models", "datasets", "metrics", "papers", "recipes"])
@pytest.mark.quick("methods", "recipes")
def test_list(attrib, what):
    from attrib.cli.list import GROUP
    from attrib.config.places import presets
    from attrib.papers import study

    result = attrib("list", what)
    assert result.status == 0, result.err
    lines = result.out.splitlines()[1:]
    known = [*presets(GROUP[what]), *(study.names() if what == "papers" else [])]
    assert [line.split()[0] for line in lines] == known
    assert all(len(line.split()) >= 3 for line in lines), "a line each: name, data, what it is"
    assert "?" not in {line.split()[1] for line in lines}


def test_presets_of_a_folder_are_listed_beside_those_of_attrib(attrib, tmp_path):
    """Whatever they build on and override, and wherever the folder lies."""
    for name, text in {
        "method/mine": "defaults: [grad_cam, _self_]\nname: mine\n",
        "method/sub/inner": "# Further inside.\nname: inner\n_target_: attrib.methods.baselines.Random\n",
        "method/both": "# @package _global_\n# Sets the data, too.\ndefaults:\n  - override /dataset: digits\n"
        "method: {name: both, _target_: attrib.methods.baselines.Random}\n",
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    lines = {
        line.split()[0]: line for line in attrib("list", "methods", "--config-dir", str(tmp_path)).out.splitlines()
    }
    assert {"mine", "sub/inner", "both", "grad_cam"} <= lines.keys()
    assert "?" not in {line.split()[1] for name, line in lines.items() if name != "method="}
    assert "Sets the data, too." in lines["both"]
    for folder in (ROOT, ROOT.parent):  # above attrib's own
        assert preset("method", "grad_cam", folder)["name"] == "grad_cam"


def completions(line: str) -> list[str]:
    environment = {**os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    environment |= {"_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout", "_ARGCOMPLETE_IFS": "\n"}
    code = "from attrib.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    return [word.strip() for word in done.stdout.split("\n") if word.strip()]


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("attrib sta", "status"),
        ("attrib table --ra", "--ranks"),
        ("attrib run met", "method="),
        ("attrib run method=grad_c", "method=grad_cam"),
        ("attrib run -m method=random,grad_c", "method=random,grad_cam"),
        ("attrib list meth", "methods"),
        ("attrib cache ver", "verify"),
    ],
)
def test_completion(line, offers):
    assert offers in completions(line)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_prints_a_script(attrib, shell):
    result = attrib("completion", shell)
    assert result.status == 0
    assert "attrib" in result.out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=result.out, text=True, check=True)


def test_the_folder_of_configurations_is_found():
    from attrib.config.places import configs

    assert configs() == ROOT / "configs"
    assert Path(configs() / "run.yaml").is_file()


@pytest.mark.parametrize("words", [["table"], ["status"], ["report"], ["show"], ["cache", "list"]])
def test_a_work_directory_may_be_said_as_the_run_said_it(root, capsys, words):
    """``run.root=W`` was taken for a path of that name."""
    plain, said = [
        (dispatch([*words, given]), re.sub(r"run\.root=|\b\d+ s\b|\s+", "", capsys.readouterr().out))  # ages change
        for given in (str(root), f"run.root={root}")
    ]
    assert plain == said
    assert dispatch(["table", f"run.root={root}/nowhere"]) == 2
    assert f"{root}/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["table"], ["report"], ["list"], ["run"]])
def test_an_interrupt_during_imports_is_no_traceback(arguments, monkeypatch, capfd):
    def interrupted(given):
        raise KeyboardInterrupt

    monkeypatch.setattr("attrib.process.signals.polite_start", lambda: None)
    monkeypatch.setattr("attrib.process.signals.exit_process", sys.exit)
    monkeypatch.setattr(main, "dispatch", interrupted)
    monkeypatch.setattr(main.sys, "argv", ["attrib", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 130
    assert "Traceback" not in capfd.readouterr().err
