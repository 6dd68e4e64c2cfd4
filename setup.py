"""Everything but the packages is in pyproject.toml: configs/, a folder beside attrib/, is attrib/configs in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["attrib", "attrib.*"]), "attrib.configs"],
    package_dir={"attrib.configs": "configs"},
)
