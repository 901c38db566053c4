"""The arrows between modules, read from the source: who may import whom."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cjepa_fast"

# These put the parts together: they alone read the configuration object.
ASSEMBLERS = {
    "cjepa_fast.build", "cjepa_fast.trainer", "cjepa_fast.run", "cjepa_fast.train",
    "cjepa_fast.demo", "cjepa_fast.ablate", "cjepa_fast.report", "cjepa_fast.eval.__main__",
    "cjepa_fast.eval.masks", "cjepa_fast.cpu_memory", "cjepa_fast.tools.doctor",
}  # fmt: skip
# The maths: plain arguments only, and nothing of data, engine, files or display.
MATHS = {
    "draws", "masks", "sequences", "vit", "predictor", "loss", "optim", "ema", "flops", "attention",
    "linear",
    "fp8", "fused",
}  # fmt: skip
THIRD_PARTY = {
    "torch", "numpy", "nvidia", "deepspeed", "pydantic", "safetensors", "tensorboard", "tqdm",
    "matplotlib", "PIL", "sklearn", "scipy", "pynvml", "triton", "flash_attn", "apex", "wandb",
    "transformers", "timm", "onnxruntime", "pycocotools", "torchvision",
}  # fmt: skip
# Slow to import, or not to be had everywhere: inside the function that uses them, never at the top
# of a module.
HEAVY = {
    "deepspeed", "matplotlib", "sklearn", "scipy", "tensorboard", "wandb", "apex", "flash_attn",
    "transformers", "timm", "onnxruntime", "nvidia",
}  # fmt: skip


def module_name(path: Path) -> str:
    """cjepa_fast/data/pack.py -> cjepa_fast.data.pack, kernels/x.py -> cjepa_fast.kernels.x."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "cjepa_fast")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, package: str) -> set[str]:
    """Every imported module, with `from a import b` given as a.b too (b may be a module)."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, base]).rstrip(".")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def sources() -> dict[str, Path]:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    return {module_name(path): path for path in files}


SOURCES = sources()


def imports(name: str, top_level_only: bool = False) -> set[str]:
    path = SOURCES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if top_level_only:
        tree = ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imports_of(tree, package)


def siblings(name: str) -> set[str]:
    """The modules of the package that `name` imports, itself and bare packages left out."""
    return {i for i in imports(name) if i in SOURCES and i.startswith("cjepa_fast.")} - {name}


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_the_reader_of_imports_sees_all_forms():
    code = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g import h\n"
    found = imports_of(ast.parse(code), "cjepa_fast.data")
    assert {"a.b", "c.d", "cjepa_fast.data.e", "cjepa_fast.g.h"} <= found


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("cjepa_fast.kernels")])
def test_kernels_import_torch_and_triton_alone(name):
    assert roots(imports(name)) <= {"torch", "triton", "cjepa_fast"} | sys.stdlib_module_names
    assert all(s.startswith("cjepa_fast.kernels") for s in siblings(name))


def test_config_imports_no_sibling():
    # The shipped JSON files are data: reading that package's files imports no code.
    assert siblings("cjepa_fast.config") == set()


@pytest.mark.parametrize("name", sorted(MATHS))
def test_maths_imports_only_maths_and_kernels(name):
    allowed = {f"cjepa_fast.{m}" for m in MATHS} | {"cjepa_fast.kernels"}
    allowed |= {"cjepa_fast.runtime", "cjepa_fast.runtime.hardware"}  # what a call may be made by
    foreign = {s for s in siblings(f"cjepa_fast.{name}") if not s.startswith("cjepa_fast.kernels.")}
    assert foreign <= allowed


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_only_assemblers_see_the_configuration(name):
    if name not in ASSEMBLERS:
        assert "cjepa_fast.config" not in imports(name)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_nothing_imports_the_assemblers_bench_or_tests(name):
    assert not roots(imports(name)) & {"bench", "tests", "kernels", "configs"}
    if name not in ASSEMBLERS:
        assert not siblings(name) & ASSEMBLERS


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_third_party_imports_are_declared_and_heavy_ones_late(name):
    assert roots(imports(name)) <= THIRD_PARTY | sys.stdlib_module_names | {"cjepa_fast"}
    assert not roots(imports(name, top_level_only=True)) & HEAVY


def test_no_module_bears_a_foreign_name():
    """`deepspeed cjepa_fast/train.py` puts cjepa_fast/ first on sys.path."""
    ours = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()} - {"__init__"}
    foreign = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    assert not ours & (foreign - {"cjepa_fast"})


def test_importing_the_package_stays_light():
    code = "import cjepa_fast, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
