"""The folders of this repository become the one import name `minillm`; all else of packaging is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
# The folder names `configuration`, `training`, ... must not land in site-packages at top level, so each room is
# mapped below `minillm`. A test compares this dict with the folders of the repository.
PACKAGES = {
    "minillm": "modeling_minillm",
    "minillm.configuration": "configuration",
    "minillm.tokenization": "tokenization",
    "minillm.publishing": "publishing",
    "minillm.plugin": "plugin",
    "minillm.data": "data",
    "minillm.conversion": "conversion",
    "minillm.training": "training",
    "minillm.evaluation": "evaluation",
    "minillm.experiments": "experiments",
    "minillm.cli": "cli",
}
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "modeling_minillm" / "version.py").read_text("utf-8"), re.M)[1]

setup(version=VERSION, packages=list(PACKAGES), package_dir=PACKAGES)
