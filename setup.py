"""Packaging of vjepa_scale."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vjepa-scale",
    version="0.1.0",
    description="V-JEPA 2 pretraining at scale: shards, sharded training, cooldown, consolidation",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["vjepa_scale", "vjepa_scale.*"]),
    package_data={"vjepa_scale.launch": ["epilogue.sh"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "numpy>=2",
        "pydantic>=2.9",
        "pyyaml>=6",
        "einops>=0.8",
        "webdataset>=1.0",
        "av>=17",
        "submitit>=1.5",
        "psutil>=6",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "threadpoolctl>=3",
        "tqdm>=4.66",
        "h5py>=3.12",
        "matplotlib>=3.9",
    ],
    extras_require={
        # data.decoder: torchcodec; needs FFmpeg's shared libraries on the machine, too
        "torchcodec": ["torchcodec>=0.13"],
        # engine.attention: fa4 (FlashAttention-3 and flash-attn itself are built from source: docs/model.md)
        "flash-attn-4": ["flash-attn-4"],
        # engine.kind: deepspeed
        "deepspeed": ["deepspeed>=0.19"],
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "import-linter",
            "transformers>=5",
            "torchcodec>=0.13",
            "deepspeed>=0.19",
        ],
    },
)
