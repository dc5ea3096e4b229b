"""The package. Tested versions of everything, for both supported jax releases: constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "dgpt_jax/_version.py").read_text())[1]

setup(
    name="dgpt_jax",
    version=VERSION,
    description="Pretrain vision transformers by D-iGPT in JAX, from stored CLIP tokens",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dgpt_jax", "dgpt_jax.*"]),
    package_data={"dgpt_jax": ["py.typed"], "dgpt_jax.evals": ["published.csv"]},
    install_requires=[
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "tensorflow-datasets>=4.9.10,<5",
        "array_record>=0.8.3,<0.9",
        "grain>=0.2.18,<0.3",
        "ml_collections>=1.1.0,<2",
        "clu>=0.0.12,<0.1",
        "fsspec>=2024.6",
        "numpy>=2.1,<3",
        "opencv-python-headless>=4.11,<6",
        "packaging>=24",
        "pillow>=11,<14",
        "psutil>=6,<8",
        "pyyaml>=6,<7",
        "safetensors>=0.5,<1",
        "tensorboardX>=2.6.2,<3",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "plan": ["libtpu"],
        "torch": ["torch>=2.6,<3"],
        "parity": ["torch>=2.6,<3", "transformers>=5.24,<6"],
        "gcs": ["gcsfs>=2026.8"],
        "s3": ["s3fs>=2026.8"],
        "parquet": ["pyarrow>=18,<27"],
        "tfrecord": ["google-crc32c>=1.5,<2"],
        "plot": ["matplotlib>=3.9,<4"],
        "wandb": ["wandb>=0.19,<1"],
        "notebook": [
            "ipykernel>=7,<8",
            "matplotlib>=3.9,<4",
            "nbclient>=0.11,<0.12",
            "nbformat>=5.10,<6",
            "scikit-learn>=1.5,<2",
        ],
        "quickstart": ["matplotlib>=3.9,<4", "scikit-learn>=1.5,<2"],
        "docs": ["mkdocs-material>=9.8,<10", "mkdocstrings[python]>=1,<2"],
        "lint": ["basedpyright==1.40.2", "import-linter==2.17", "ruff==0.17.6"],
        "test": [
            "flask>=3,<4",  # moto's server
            "flask-cors>=6,<7",
            "gcsfs>=2026.8",
            "google-crc32c>=1.5,<2",
            "hypothesis>=6.150,<7",
            "matplotlib>=3.9,<4",
            "moto[s3]>=5.2,<6",
            "pyarrow>=18,<27",
            "pytest>=8,<10",
            "pytest-cov>=6,<8",
            "pytest-xdist>=3.6,<4",
            "pyyaml>=6,<7",
            "s3fs>=2026.8",
            "scikit-learn>=1.5,<2",
        ],
    },
)
