"""Every `module.name` of a module of the project is there: read from the source, so that what runs
on a GPU alone cannot name what has moved."""

import ast
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FOLDERS = ("tests", "bench", "kernels", "cjepa_fast")
SCOPES = (*NAMED, ast.Lambda)
PATCHES = ("setattr", "delattr", "object")  # monkeypatch.setattr, mock.patch.object


def module_name(path: Path) -> str:
    """cjepa_fast/data/pack.py -> cjepa_fast.data.pack, kernels/x.py -> cjepa_fast.kernels.x; bench/
    and tests/ are no packages: bench/report.py -> report."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("bench", "tests"):
        return parts[-1]
    parts = ["cjepa_fast", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))
}


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


@functools.cache
def names_of(module: str) -> dict[str, str]:
    return bindings(tree_of(module), module)


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope, of the scopes within it the outermost node alone."""
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, SCOPES):
            waiting += ast.iter_child_nodes(node)


def imported(node: ast.Import | ast.ImportFrom, module: str) -> Iterator[tuple[str, str]]:
    """(name, what it stands for) of an import in `module`."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            whole = alias.name if alias.asname else alias.name.partition(".")[0]
            yield alias.asname or whole, whole
        return
    base = node.module or ""
    if node.level:
        package = module.split(".")
        up = node.level - (SOURCES[module].name == "__init__.py")
        base = ".".join([*package[: len(package) - up], *filter(None, [base])])
    for alias in node.names:
        yield alias.asname or alias.name, f"{base}.{alias.name}"


def bindings(scope: ast.AST, module: str) -> dict[str, str]:
    """What a scope's names stand for, by name: "" for all but an imported module of the project."""
    modules, others = {}, set()
    if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        others |= {node.arg for node in ast.walk(scope.args) if isinstance(node, ast.arg)}
    for node in own_nodes(scope):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules |= dict(imported(node, module))
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            others.add(node.id)
        elif isinstance(node, (*NAMED, ast.ExceptHandler)):
            others.add(node.name)
    found = {name: what if what in SOURCES else "" for name, what in modules.items()}
    return found | dict.fromkeys(others, "")


def problem(module: str, names: list[str]) -> str:
    """What is wrong with module.name.name..., "" if nothing: of other objects nothing is known."""
    for name in names:
        inner, known = f"{module}.{name}", names_of(module)
        if inner in SOURCES and not known.get(name):
            module = inner
        elif name in known:
            module = known[name]
        else:
            return "" if name.startswith("__") or given_late(module, name) else inner
        if not module:
            break
    return ""


def given_late(module: str, name: str) -> bool:
    """Whether a package's __getattr__ has it."""
    lazy = "__getattr__" in names_of(module) and module.startswith("cjepa_fast")
    return lazy and hasattr(importlib.import_module(module), name)


def chain(node: ast.Attribute) -> tuple[str, list[str]]:
    """(a, [b, c]) of a.b.c; ("", []) where a is no name."""
    names = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return (node.id, names) if isinstance(node, ast.Name) else ("", [])


def named(node: ast.AST) -> tuple[str, list[str]]:
    """The name and its attributes that a node asks for, ("", []) where it asks for none."""
    if isinstance(node, ast.Attribute):
        return chain(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) > 1:
        target, text = node.args[:2]
        added = any(keyword.arg in ("raising", "create") for keyword in node.keywords)
        if node.func.attr in PATCHES and isinstance(text, ast.Constant) and not added:
            name, names = chain(target) if isinstance(target, ast.Attribute) else ("", [])
            name = target.id if isinstance(target, ast.Name) else name
            return name, [*names, text.value]
    return "", []


def missing(scope: ast.AST, module: str, outer: dict[str, str]) -> Iterator[str]:
    """LINE: what is named in a scope, and those within it, and is not there."""
    known = outer | bindings(scope, module)
    for node in own_nodes(scope):
        if isinstance(node, SCOPES):
            yield from missing(node, module, known)
            continue
        if isinstance(node, ast.ImportFrom):
            asked = (what.rpartition(".")[::2] for _, what in imported(node, module))
            asked = [(base, [name]) for base, name in asked if name != "*"]
        else:
            name, names = named(node)
            asked = [(known.get(name, ""), names)]
        for base, names in asked:
            if base in SOURCES and (wrong := problem(base, names)):
                yield f"{node.lineno}: {wrong}"


def test_what_a_module_names_of_another_is_there():
    wrong = [
        f"{path.relative_to(ROOT)}:{told}"
        for name, path in SOURCES.items()
        for told in missing(tree_of(name), name, {})
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("from cjepa_fast.model import attention\ndef f():\n    attention._calls(1)", "_calls"),
        ("import cjepa_fast.model.attention\ncjepa_fast.model.attention.gone", "gone"),
        ("import cjepa_fast.model.attention\ncjepa_fast.model.attend_on", "attend_on"),
        ("def f():\n    from cjepa_fast.model.attention import gone", "gone"),
        ("import variants\nvariants.throughput.gone()", "gone"),
        ("import variants as v\nmonkeypatch.setattr(v, 'gone', 1)", "gone"),
        ("import variants as v\nmonkeypatch.setattr(v, 'gone', 1, raising=False)", ""),
        ("import variants\ndef f(variants):\n    variants.gone", ""),
        ("import variants\nvariants.VARIANTS.gone", ""),  # of no module
        ("from cjepa_fast import load_encoder\nimport cjepa_fast\ncjepa_fast.load_encoder", ""),
    ],
)
def test_the_reader_sees_what_is_gone_and_nothing_else(code, told):
    found = list(missing(ast.parse(code), "tiny", {}))
    assert [line.rpartition(".")[2] for line in found] == [told] * bool(told)


def test_no_two_modules_have_one_name():
    """Those of bench/ and tests/ are imported by it alone."""
    assert len(SOURCES) == sum(len([*(ROOT / folder).rglob("*.py")]) for folder in FOLDERS)
