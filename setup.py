"""Packaging of MiniLLM: the folders of this repository become the one import name `minillm`."""

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
TRAIN = ["datasets>=3.0", "matplotlib>=3.8"]
EVAL = ["lm-eval>=0.4.9"]
GGUF = ["gguf>=0.17"]
TEST = [
    *TRAIN,
    *GGUF,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.150",
    "optimum-quanto>=0.2.7",
    "parameterized>=0.9",
    "trl>=1.0",
    "optuna>=4",
    "trackio>=0.21",
    "onnxscript>=0.5",
    "onnxruntime>=1.22",
]

setup(
    name="minillm-hf",
    version=VERSION,
    description="One composable decoder for transformers: causal, prefix (GLM-style) and ALiBi language models",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"minillm": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "accelerate>=1.10",
        "peft>=0.18",
        "safetensors>=0.5",
        "psutil>=5",
        "filelock>=3.30",
    ],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "gguf": GGUF,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.15", "pre-commit>=4", "build>=1.2"],
    },
    entry_points={"console_scripts": ["minillm = minillm.cli.main:app"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
