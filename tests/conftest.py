"""A work directory for the tests of labels, tables, formats and the report, see ``synthetic.build``."""

import shutil

import pytest
from synthetic import build


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("synthetic") / "work")


@pytest.fixture
def root(built, tmp_path):
    """A copy of its own for each test."""
    return shutil.copytree(built, tmp_path / "work")
