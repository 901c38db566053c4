"""The keys of a configuration in words: docs/config.md and `cjepa-train --help-config KEY`."""

import argparse
import difflib
import json
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic.fields import FieldInfo

from cjepa_fast.config.schema import Config, ConfigError, Section

HEAD = """# Configuration

This page lists every key, its values and its default. `python -m cjepa_fast.config.describe`
writes it. A configuration is a JSON file of sections, and may start with `"extends": "vit_b.json"`.
Any key can be set on the command line (`--set optim.lr=3e-4`) or from Python.
[configs/README.md](../configs/README.md) says more about the keys that change a step's speed,
memory or maths.
"""


class Key(NamedTuple):
    """One leaf of the configuration."""

    path: str
    values: str
    default: str
    text: str


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[Key]:
    """All leaves, in the schema's order."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            default = json.dumps(field.get_default(call_default_factory=True))
            yield Key(f"{prefix}{name}", _values(field), default, field.description or "")


def _values(field: FieldInfo) -> str:
    limits = [_limit(m) for m in field.metadata]
    return f"{_kind(field.annotation)}{', '.join(['', *filter(None, limits)])}"


def _kind(annotation: Any) -> str:
    """In JSON's words; of a union its members, of a Literal its words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(json.dumps(word) for word in args)
    if origin is typing.Annotated:
        limits = [_limit(m) for extra in args[1:] for m in getattr(extra, "metadata", [extra])]
        return ", ".join([_kind(args[0]), *filter(None, limits)])
    if origin is tuple:
        many = "any number" if args[-1] is Ellipsis else str(len(args))
        return f"{many} of: {_kind(args[0])}"
    if origin is dict:
        return "object"
    if args:
        return " or ".join(map(_kind, args))
    names = {bool: "true or false", int: "integer", float: "number", str: "text"}
    return names.get(annotation, "null")


def _limit(limit: Any) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [(signs[n], getattr(limit, n)) for n in signs if getattr(limit, n, None) is not None]
    shown = ((s, f"{v:g}" if isinstance(v, float) else v) for s, v in found)
    return ", ".join(f"{sign} {value}" for sign, value in shown)


def explained(path: str) -> str:
    """What a key, or every key below a section, means. Raises ConfigError naming the nearest."""
    found = [key for key in keys() if key.path == path or key.path.startswith(f"{path}.")]
    if not found:
        near = difflib.get_close_matches(path, [key.path for key in keys()], n=1, cutoff=0.0)
        raise ConfigError(f"--help-config {path}: no such key; nearest is {near[0]}")
    return "\n".join(
        f"{key.path} = {key.default}   ({key.values})\n    {key.text}" for key in found
    )


class HelpConfig(argparse.Action):
    """--help-config KEY: print what the key means, and exit."""

    def __init__(self, **given):
        super().__init__(metavar="KEY", **given)

    def __call__(self, parser, namespace, path, option_string=None):
        try:
            print(explained(path))
        except ConfigError as error:
            parser.exit(2, f"error: {error}\n")
        parser.exit()


def markdown() -> str:
    """docs/config.md."""
    lines, section = [HEAD], None
    for key in keys():
        first, _, rest = key.path.partition(".")
        if first != section:
            section = first
            lines += [f"\n## {section}\n", "| key | values | default | what |", "|---|---|---|---|"]
        cells = (f"`{rest or first}`", key.values, f"`{key.default}`", key.text)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
