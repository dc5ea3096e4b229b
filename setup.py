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
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA :: 12",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    keywords="jax, flax, vision transformer, self-supervised learning, pretraining, CLIP, TPU",
    python_requires=">=3.11",
    # Config files are found by name (dgpt_jax/config/files.py); in a clone they stay in configs/.
    packages=[*find_packages(include=["dgpt_jax", "dgpt_jax.*"]), "dgpt_jax.configs"],
    package_dir={"dgpt_jax.configs": "configs"},
    package_data={"dgpt_jax": ["py.typed"], "dgpt_jax.evals": ["published.csv"]},
    entry_points={"console_scripts": ["dgpt = dgpt_jax.__main__:main"]},
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
        "hub": ["huggingface_hub>=1,<3"],
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
        "docs": [
            "matplotlib>=3.9,<4",
            "mkdocs-material>=9.8,<10",
            "mkdocstrings[python]>=1,<2",
            "scikit-learn>=1.5,<2",
        ],
        "lint": ["basedpyright==1.40.2", "import-linter==2.17", "ruff==0.17.6"],
        "test": [
            "gcsfs>=2026.8",
            "huggingface_hub>=1,<3",
            "hypothesis>=6.150,<7",
            "matplotlib>=3.9,<4",
            "pytest>=8,<10",
            "pytest-cov>=6,<8",
            "pytest-xdist>=3.6,<4",
            "pyyaml>=6,<7",
            "scikit-learn>=1.5,<2",
        ],
    },
)
