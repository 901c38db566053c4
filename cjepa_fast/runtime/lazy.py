"""A package's public names, each imported at its first use: importing the package stays cheap."""

import importlib
from collections.abc import Callable


def exports(
    package: str, names: dict[str, str]
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` (PEP 562) for a package's `__init__`.

    names: by module, relative to the package, the names exported of it, with spaces between.
    For any other name `__getattr__` raises AttributeError.
    """
    home = {name: module for module, found in names.items() for name in found.split()}

    def getattribute(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return sorted(home), getattribute, lambda: sorted(home)
