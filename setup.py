"""Packaging of cjepa_fast. Tested versions: constraints.txt; tool settings: pyproject.toml.

kernels/ and configs/ lie at the top of the repository, where they are found and edited, and are
installed as cjepa_fast.kernels and cjepa_fast.configs, so that no top-level `kernels` or `configs`
overwrites another project's in a user's environment.
"""

from pathlib import Path

from setuptools import setup

setup(
    name="cjepa_fast",
    version="0.1.0",
    description="Fast C-JEPA pretraining of Vision Transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[
        "cjepa_fast",
        "cjepa_fast.configs",
        "cjepa_fast.data",
        "cjepa_fast.eval",
        "cjepa_fast.export",
        "cjepa_fast.interop",
        "cjepa_fast.kernels",
    ],
    package_dir={"cjepa_fast.configs": "configs", "cjepa_fast.kernels": "kernels"},
    package_data={"cjepa_fast.configs": ["*.json", "ablations/*.json"]},
    # apex is optional and absent here: the registry's package of that name is another project.
    install_requires=[
        "torch>=2.11",
        "triton; platform_system == 'Linux'",
        "numpy",
        "deepspeed",
        "nvidia-dali-cuda130",
        "nvidia-ml-py",
        "pydantic>=2",
        "safetensors",
        "tensorboard",
        "tqdm",
        "matplotlib",
        "pillow",
        "scikit-learn",
        "scipy",
    ],
    extras_require={
        "detect": ["torchvision", "pycocotools"],
        "flash": ["flash-attn"],
        "wandb": ["wandb"],
        "export": ["transformers", "onnx", "onnxscript", "onnxruntime"],
        "dev": [
            "ruff",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "transformers",
            "onnx",
            "onnxscript",
            "onnxruntime",
            "pycocotools",
        ],
    },
    entry_points={
        "console_scripts": [
            "cjepa-eval = cjepa_fast.eval.__main__:main",
            "cjepa-export = cjepa_fast.export.__main__:main",
            "cjepa-report = cjepa_fast.report:main",
        ]
    },
)
