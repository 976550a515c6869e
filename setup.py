"""Package metadata. Every dependency is imported only where it is used."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
SOURCE = (HERE / "flax_skd" / "__init__.py").read_text()

setup(
    name="flax-skd",
    version=re.search(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE)[1],
    description="One Vision Transformer, every size: SKD super-networks in JAX/Flax",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["flax_skd*"]),
        *("flax_skd.configs", "flax_skd.configs.rivals"),
    ],
    package_dir={"flax_skd.configs": "configs"},
    package_data={"flax_skd": ["py.typed"]},
    install_requires=[
        "jax>=0.8.1",
        "flax>=0.12.1",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.25",
        "tensorflow-datasets>=4.9.10",
        "ml-collections>=1.0",
        "absl-py",
        "numpy",
        "grain>=0.2.16",  # deterministic, resumable input without TensorFlow
        "pillow",  # decoding; tensorflow-datasets needs it and does not say so
        "safetensors",
        "scikit-learn",  # the handwritten digits of the demo
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "export": ["flatbuffers"],  # StableHLO files; docs/export.md has timm and ONNX
        "timm": ["timm>=1.0.23", "torch"],  # only to check what is exported for them
        "log": ["tensorboardX"],  # training curves for tensorboard, where installed
        "docs": ["pdoc"],  # the API pages, from docstrings
        "test": [
            *("pytest", "pytest-xdist", "ruff", "hypothesis"),
            *("tensorboardX", "flatbuffers", "nbmake", "ipykernel", "pdoc"),
        ],
    },
    entry_points={"console_scripts": ["flax-skd=flax_skd.run.main:cli"]},
)
