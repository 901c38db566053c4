"""Packaging of cjepa_fast. Tested versions: constraints.txt; tool settings: pyproject.toml.

kernels/ and configs/ lie at the top of the repository, where they are found and edited, and are
installed as cjepa_fast.kernels and cjepa_fast.configs, so that no top-level `kernels` or `configs`
overwrites another project's in a user's environment. kernels/__init__.py says how tools that read
the source follow these names.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

# Triton and DALI have builds for Linux alone (x86-64 and aarch64); DeepSpeed and NVML serve there.
LINUX = "platform_system == 'Linux'"

packages = find_packages(include=["cjepa_fast", "cjepa_fast.*"])
packages += ["cjepa_fast.configs", "cjepa_fast.kernels"]
packages += [f"cjepa_fast.kernels.{name}" for name in find_packages("kernels")]

version = runpy.run_path(str(Path(__file__).parent / "cjepa_fast/runtime/version.py"))["VERSION"]

setup(
    name="cjepa_fast",
    version=version,
    description="Fast C-JEPA pretraining of Vision Transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=packages,
    package_dir={"cjepa_fast.configs": "configs", "cjepa_fast.kernels": "kernels"},
    package_data={
        "cjepa_fast.configs": ["*.json", "ablations/*.json"],
        "cjepa_fast.tools": ["measured.json"],
    },
    # apex is optional and absent here: the registry's package of that name is another project.
    install_requires=[
        "torch>=2.11",
        f"triton; {LINUX}",
        "numpy",
        f"deepspeed>=0.19.8; {LINUX}",
        f"nvidia-dali-cuda130; {LINUX} and platform_machine in 'x86_64 aarch64'",
        f"nvidia-ml-py; {LINUX}",
        "pydantic>=2",
        "safetensors",
        "tensorboard",
        "tqdm",
        "matplotlib",
        "pillow",
        "scikit-learn",
        "threadpoolctl",
        "scipy",
    ],
    extras_require={
        "detect": ["torchvision", "pycocotools"],
        "flash": ["flash-attn"],
        "hub": ["huggingface_hub"],
        "parquet": ["pyarrow>=21"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
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
            "pyarrow>=21",
        ],
    },
    entry_points={
        "console_scripts": [
            "cjepa-ablate = cjepa_fast.tools.ablate:main",
            "cjepa-doctor = cjepa_fast.tools.doctor:main",
            "cjepa-embed = cjepa_fast.eval.__main__:embed",
            "cjepa-eval = cjepa_fast.eval.__main__:main",
            "cjepa-export = cjepa_fast.export.__main__:main",
            "cjepa-train = cjepa_fast.train:main",
            "cjepa-pack = cjepa_fast.data.pack:main",
            "cjepa-plan = cjepa_fast.tools.plan:main",
            "cjepa-report = cjepa_fast.tools.report:main",
        ]
    },
)
