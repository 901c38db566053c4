"""The arrows between the packages, read from the source: they only point down."""

import ast
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cjepa_fast"

# Each may import those below it, and itself.
LAYERS = (
    "train", "demo", "tools", "export", "eval", "training", "checkpoint", "interop", "data",
    "model", "telemetry", "config", "runtime", "kernels",
)  # fmt: skip
# Who reads the configuration object; all others take plain arguments.
READ_THE_CONFIGURATION = ("train", "demo", "tools", "eval", "training", "data", "export")
THIRD_PARTY = {
    "torch", "numpy", "nvidia", "deepspeed", "pydantic", "safetensors", "tensorboard", "tqdm",
    "matplotlib", "PIL", "sklearn", "scipy", "pynvml", "triton", "flash_attn", "apex", "wandb",
    "transformers", "timm", "onnxruntime", "pycocotools", "torchvision", "huggingface_hub",
    "pyarrow", "mlflow", "threadpoolctl",
}  # fmt: skip
# Slow to import, or not to be had everywhere: inside the function that uses them, never at the top
# of a module.
HEAVY = {
    "deepspeed", "matplotlib", "sklearn", "scipy", "tensorboard", "wandb", "apex", "flash_attn",
    "transformers", "timm", "onnxruntime", "nvidia", "huggingface_hub", "pyarrow",
    "mlflow",
}  # fmt: skip


def module_name(path: Path) -> str:
    """cjepa_fast/data/pack.py -> cjepa_fast.data.pack, kernels/x.py -> cjepa_fast.kernels.x."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "cjepa_fast")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, package: str) -> dict[str, int]:
    """The line of every imported module; `from a import b` is given as a.b too (it may be one)."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, base]).rstrip(".")
            found |= dict.fromkeys((base, *(f"{base}.{a.name}" for a in node.names)), node.lineno)
    return found


SOURCES = {
    module_name(path): path for path in (*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py"))
}


def imports(name: str, top_level_only: bool = False) -> dict[str, int]:
    path = SOURCES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if top_level_only:
        tree = ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imports_of(tree, package)


def own(name: str) -> dict[str, int]:
    """The modules of this package that `name` imports; of a.b and a.b.c the longer alone."""
    found = {i: line for i, line in imports(name).items() if i in SOURCES and i != name}
    longer = {i.rpartition(".")[0] for i in found}
    is_package = {i for i in longer if SOURCES.get(i, Path()).name == "__init__.py"}
    return {i: line for i, line in found.items() if i not in is_package and i != "cjepa_fast"}


def layer(name: str) -> str:
    return name.split(".")[1]


def offence(name: str, line: int) -> str:
    """FILE:LINE and what stands there."""
    path = SOURCES[name]
    return f"{path.relative_to(ROOT)}:{line}: {path.read_text().splitlines()[line - 1].strip()}"


def roots(names) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_the_reader_of_imports_sees_all_forms():
    code = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from ..g import h\n"
    found = imports_of(ast.parse(code), "cjepa_fast.data")
    assert {
        "a.b": 1,
        "c.d": 2,
        "cjepa_fast.data.e": 4,
        "cjepa_fast.g.h": 5,
    }.items() <= found.items()


MODULES = sorted(SOURCES.keys() - {"cjepa_fast"})


@pytest.mark.parametrize("name", MODULES)
def test_arrows_point_down(name):
    above = LAYERS[: LAYERS.index(layer(name))]
    wrong = [offence(name, line) for i, line in own(name).items() if layer(i) in above]
    assert not wrong, f"{layer(name)} may not import what is above it:\n" + "\n".join(wrong)


def test_no_circle():
    """Also within a package, and also by imports inside functions."""
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            pytest.fail(" -> ".join([*way[way.index(name) :], name]))
        if name not in done:
            for found in own(name):
                walk(found, (*way, name))
            done.add(name)

    for name in MODULES:
        walk(name, ())


@pytest.mark.parametrize("name", MODULES)
def test_only_those_who_put_parts_together_see_the_configuration(name):
    if layer(name) not in (*READ_THE_CONFIGURATION, "config"):
        wrong = [offence(name, line) for i, line in own(name).items() if layer(i) == "config"]
        assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [n for n in MODULES if layer(n) == "kernels"])
def test_kernels_import_torch_and_triton_alone(name):
    found = imports(name)
    assert roots(found) <= {"torch", "triton", "cjepa_fast"} | sys.stdlib_module_names
    wrong = [offence(name, line) for i, line in found.items() if i.startswith("torch.distributed")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", MODULES)
def test_third_party_imports_are_declared_and_heavy_ones_late(name):
    assert roots(imports(name)) <= THIRD_PARTY | sys.stdlib_module_names | {"cjepa_fast"}
    assert not roots(imports(name, top_level_only=True)) & HEAVY


def test_what_evaluates_within_a_training_imports_no_command_line():
    """It needs images, features and probes; arguments and records are of the commands."""
    of_commands = {f"cjepa_fast.eval.{name}" for name in ("options", "records", "__main__")}
    assert of_commands < SOURCES.keys()
    assert not of_commands & imports("cjepa_fast.eval.online").keys()


def test_nothing_lies_loose():
    """Beside the commands every module has its room."""
    assert {p.stem for p in PACKAGE.glob("*.py")} == {"__init__", "train", "demo"}


PACKAGES = sorted(name for name, path in SOURCES.items() if path.name == "__init__.py")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_says_its_purpose_and_exports_names_that_are_there(name):
    package = importlib.import_module(name)
    purpose = ast.get_docstring(ast.parse(SOURCES[name].read_text()))
    assert purpose and purpose.splitlines()[0].endswith((".", "`"))
    assert package.__all__ and len(set(package.__all__)) == len(package.__all__)
    for exported in package.__all__:
        assert not inspect.ismodule(getattr(package, exported)), "a module has the same name"
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        _ = package.missing


def test_importing_a_package_loads_nothing_heavy():
    names = [name for name in PACKAGES if not name.startswith("cjepa_fast.kernels.")]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(sorted(set(sys.modules) & {HEAVY!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]


def test_no_module_bears_a_foreign_name():
    """`deepspeed cjepa_fast/train.py` puts cjepa_fast/ first on sys.path."""
    ours = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()} - {"__init__"}
    foreign = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    assert not ours & (foreign - {"cjepa_fast"})


@pytest.mark.parametrize(
    ("name", "loaded"),
    [("cjepa_fast", [False, False]), ("cjepa_fast.data.sets.shapes", [False, True])],
)
def test_importing_the_package_or_what_renders_stays_light(name, loaded):
    """The processes that render the shapes set would else take longer to start than to render."""
    code = f"import {name}, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(x) for x in loaded]
