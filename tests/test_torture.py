"""A few of the faults of ``make torture``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT


@pytest.mark.slow  # test_faults*.py and test_resume.py have quick tests of it
@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="the failing disk needs Linux and gcc"
)
def test_some_faults_of_a_disk_do_no_harm(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "torture.py"), "--count", "3", "--folder", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[3-9] faults, 0 of them did harm", done.stdout, re.M)
