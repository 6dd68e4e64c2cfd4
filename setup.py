"""Thin by intent: everything is in pyproject.toml; this lets old tools say `python setup.py`."""

from setuptools import setup

setup()
