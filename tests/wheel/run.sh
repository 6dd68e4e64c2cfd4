#!/usr/bin/env bash
# Proves that attrib works where only its wheel was installed: builds the wheel, installs it into an environment of its
# own that borrows the packages of .venv but not attrib, and works from an empty folder as a new user would.
set -euo pipefail
home=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$home/.venv/bin/python}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

rm -rf "$home/build"  # a module that was moved since would be packed again
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$place" "$home"
"$python" -m venv --without-pip "$place/env"
site=$("$place/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# What the wheel requires lies in .venv already; its attrib, an editable one, must not be seen.
"$python" - "$site" <<'PY'
import pathlib, sys, sysconfig
ours, here = pathlib.Path(sysconfig.get_path("purelib")), pathlib.Path(sys.argv[1])
for path in ours.iterdir():
    if "attrib" not in path.name.lower() and not path.name.startswith(("__editable__", "_virtualenv", "distutils")):
        (here / path.name).symlink_to(path)
PY
"$python" -m pip --python "$place/env/bin/python" install --quiet --disable-pip-version-check --no-deps "$place"/attrib-*.whl

mkdir "$place/empty" && cd "$place/empty"
export PATH=$place/env/bin:$PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=
says() { grep -F -- "$1" >/dev/null || { echo "test-wheel: expected: $1" >&2; exit 1; }; }

python - <<'PY'
import pathlib, attrib
from attrib.config.places import configs
assert pathlib.Path(attrib.__file__).parent == configs().parent, configs()
assert (pathlib.Path(attrib.__file__).parent / "py.typed").is_file()
PY
attrib --help | says "attrib SUBCOMMAND --help"
attrib list methods | says grad_cam

# Photographs, a preset and a method of one's own, by one sweep; what reads a work directory.
mkdir -p conf/method
cat > conf/method/mine.yaml <<'YAML'
name: mine
_target_: my_module.Mine
YAML
cat > my_module.py <<'PY'
from dataclasses import dataclass
from attrib.methods.baselines import Gradient

@dataclass(frozen=True)
class Mine(Gradient):
    """Mine."""
PY
attrib run -m --config-dir conf method=grad_cam,mine 'metric=[ehr]' run.limit=2 > said
for method in grad_cam mine; do says "$method: maps_computed=2" < said; done
attrib table | says grad_cam
attrib report | says "wrote workdirs/report.html"
{ attrib status || [ $? = 75 ]; } | says grad_cam  # 75: eight photographs are left

# Three lines of Python: the map of a photograph; and the runner's maps, to the bit.
python - <<'PY'
import pathlib

import torch
import attrib
from skimage.data import chelsea
print(attrib.explain("efficientnet_lite0", chelsea(), method="grad_cam").save("cat"))

from attrib.store.cell import cells
data = attrib.dataset("photos", "efficientnet_lite0")
found = attrib.explain("efficientnet_lite0", data, method="grad_cam", uids=data.uids[:2])
(cell,) = (cell for cell in cells(pathlib.Path("workdirs")) if ".grad_cam." in cell.folder.name)
runs = {uid: cell.maps.read((uid, print_), ["map"])["map"] for uid, print_ in cell.maps.index()}
for uid, ours in zip(found.uids, found.map, strict=True):
    assert torch.equal(torch.from_numpy(runs[uid]), ours), uid
PY
test -s cat/explanation.html
echo "test-wheel: attrib works from an empty folder, by its wheel alone"
