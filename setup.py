"""Installs rag_mm; the experiment pages in configs/ travel in the wheel as rag_mm/configs."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"$', (ROOT / "rag_mm" / "__init__.py").read_text(), re.MULTILINE
).group(1)

# CI runs two sets, whose versions are the bounds: requirements.lock on Python 3.11, the newest.lock above it.
# flax and jax come in pairs, since many of their versions do not import together: flax 0.12.8 not with
# jax 0.11.1, 0.12.9 not with 0.11.2. Python 3.11 has no newer ones than these.
BASE = [
    "absl-py",
    "array_record>=0.8; sys_platform != 'win32'",
    "clu>=0.0.12",
    "etils[epath]",
    "flax>=0.12.8,<0.12.9; python_version < '3.12'",
    "flax>=0.12.12,<0.13; python_version >= '3.12'",
    "grain>=0.2.18",
    "importlib_resources",  # tensorflow-datasets imports it without saying so.
    "jax>=0.10.2,<0.11; python_version < '3.12'",
    "jax>=0.12,<0.13; python_version >= '3.12'",
    "jaxtyping>=0.3.11,<0.4",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "ml_collections>=1.1",
    "ml_dtypes",
    "msgpack",
    "numpy>=2.4",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",  # Names in its v1 still move between minor versions.
    "pillow",
    "pyarrow",  # Parquet files
    "pycocoevalcap",
    "rich",
    "safetensors",
    "scann>=1.4.2; sys_platform == 'linux' and python_version < '3.14'",
    "scipy>=1.17",
    "tensorflow-datasets>=4.9.10",
    "tensorstore",
    "tokenizers",
]
EXTRAS = {
    # ScaNN is linked against TensorFlow 2.20 and no other; TensorBoard needs pkg_resources.
    "tf": [
        "setuptools<82",
        "tensorboard~=2.20.0",
        "tensorflow-cpu~=2.20.0; platform_machine in 'x86_64 AMD64'",
        "tensorflow~=2.20.0; platform_machine not in 'x86_64 AMD64'",
    ],
    "tpu": ["jax[tpu]"],
    "gpu": ["jax[cuda13]"],
    "bench": ["faiss-cpu>=1.12"],  # the peer of `rag-mm bench memory`
    "beam": ["apache-beam>=2.60"],
    "explore": ["anyio>=4", "starlette>=1,<2", "uvicorn>=0.54"],  # the page of `rag-mm explore`
    "gguf": ["gguf>=0.19,<0.20"],  # `rag-mm import gguf`
    "gcs": ["gcsfs", "google-cloud-storage"],  # runs in a bucket of Google Cloud Storage
    "endpoint": ["openai>=3.57,<4"],  # a language model behind HTTP
    "parity": ["diffusers>=0.42,<0.43", "torch==2.13.0", "transformers>=5,<6"],
    "test": [
        "beartype",
        "emoji",
        "gguf>=0.19,<0.20",
        "hypothesis",
        "ipykernel",
        "mypy",
        "nbclient",
        "nbformat",
        "openai>=3.57,<4",
        "playwright",  # drives a Chromium that is there, and brings none
        "pytest",
        "pytest-xdist",
        "pyyaml",
        "ruff",
    ],
}

setuptools.setup(
    name="rag_mm",
    version=VERSION,
    description="Retrieval-augmented multimodal models in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11,<3.14",
    packages=[
        *setuptools.find_packages(include=["rag_mm", "rag_mm.*"]),
        "rag_mm.configs",
    ],
    package_dir={"rag_mm.configs": "configs"},
    package_data={
        "rag_mm": ["py.typed"],
        "rag_mm.worlds.emoji": ["*.webp", "*.json"],
        "rag_mm.report": ["*.css", "*.j2", "*.js"],
    },
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["rag-mm = rag_mm.cli.main:main"]},
)
