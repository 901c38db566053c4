"""The parser of all commands: `--help` shows each option's default as its value."""

import argparse
import copy
from collections.abc import Sequence


class _Help(argparse.RawDescriptionHelpFormatter):
    def _format_action(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        if (value := default_of(action)) and action.help is not argparse.SUPPRESS:
            escaped = value.replace("%", "%%")
            shown.help = "; ".join(filter(None, (action.help, f"default: {escaped}")))
        return super()._format_action(shown)


def default_of(action: argparse.Action) -> str:
    """The default as it would be typed; "" where there is none, or none worth a word: the help of
    what is None says what is taken instead."""
    value = action.default
    if value in (None, False, argparse.SUPPRESS) or value == [] or not action.option_strings:
        return ""
    return _typed(value)


def _typed(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join("+".join(map(_typed, x)) if isinstance(x, list) else _typed(x)
                        for x in value)  # fmt: skip
    return f"{value:g}" if isinstance(value, float) else str(value)


class Parser(argparse.ArgumentParser):
    """Also of its sub-commands. The description is printed as it stands."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{"formatter_class": _Help, **options})
