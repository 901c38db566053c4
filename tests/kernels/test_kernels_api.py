"""cjepa_fast.kernels as an API: its names, what importing it loads, and docs/kernels.md."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cjepa_fast import kernels

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
FUNCTIONS = sorted({*kernels.__all__} - {"Ranks", "Rows"})


def modules() -> list[str]:
    prefix = f"{kernels.__name__}."
    return [info.name for info in pkgutil.walk_packages(kernels.__path__, prefix)]


def test_every_name_is_there_and_none_is_a_module_s():
    for name in kernels.__all__:
        assert getattr(kernels, name).__name__ == name and name in dir(kernels)
    assert not {*kernels.__all__} & {name.rpartition(".")[2] for name in modules()}
    with pytest.raises(AttributeError, match="no_such"):
        kernels.__getattr__("no_such")


def test_what_editors_see_is_what_is_there():
    """The imports under TYPE_CHECKING are those that __getattr__ makes."""
    tree = ast.parse(Path(kernels.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen.keys() == {*kernels.__all__}
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(kernels, name)


def test_no_function_bears_the_name_of_its_module():
    """So that both can be imported."""
    for name in modules():
        module = importlib.import_module(name)
        assert not hasattr(module, name.rpartition(".")[2]), name


def test_the_import_loads_neither_torch_nor_triton():
    code = "import sys, cjepa_fast.kernels; print({'torch', 'triton'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_page_documents_every_function_with_its_arguments(name):
    """As `name(a, b=0)`, at the beginning of a row of a table, in their order."""
    (row,) = re.findall(rf"^\| `{name}\((.*?)\)` \|", PAGE.read_text(encoding="utf-8"), re.M)
    documented = {}
    for argument in re.split(r", (?![^(]*\))", row):
        if argument != "*":
            documented |= dict([argument.split("=")] if "=" in argument else [(argument, None)])
    taken = inspect.signature(getattr(kernels, name)).parameters
    plain = {re.sub(r"_[A-Z]+d?$", "", a): p for a, p in taken.items()}
    assert [*documented] == [*plain]
    for argument, value in documented.items():
        default = plain[argument].default
        assert default is inspect.Parameter.empty if value is None else eval(value) == default


def test_the_page_names_nothing_that_is_not_there():
    rows = re.findall(r"^\| `(\w+)\(", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(rows) == FUNCTIONS


def test_the_page_s_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    scope: dict = {}
    exec(example, scope)
    assert scope["x"].grad.abs().sum() > 0 and torch.isfinite(scope["cov_loss"])
