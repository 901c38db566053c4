"""`--help` of every command: each option with a default shows its value."""

import argparse
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from cjepa_fast import demo, train
from cjepa_fast.data import pack
from cjepa_fast.data.sets import shapes
from cjepa_fast.eval import __main__ as evaluation
from cjepa_fast.export import __main__ as export
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.tools import ablate, doctor, plan, report

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "cjepa-train": train.main,
    "cjepa-export": export.main,
    "cjepa-report": report.main,
    "cjepa-plan": plan.main,
    "cjepa-doctor": doctor.main,
    "cjepa-pack": pack.main,
    "cjepa-ablate": ablate.main,
    "demo": demo.main,
    "shapes": shapes.main,
    **{
        f"cjepa-eval {task}": lambda argv, task=task: evaluation.main([task, *argv])
        for task in evaluation.TASKS
    },
}
BENCH = [path for path in sorted((ROOT / "bench").glob("*.py")) if "__main__" in path.read_text()]


class _Found(Exception):
    """Carries the parser."""


def parser_of(command: Callable[[list[str]], int], monkeypatch) -> argparse.ArgumentParser:
    """The one that reads the command's options: of an evaluation, the task's."""

    def found(parser, argv=None, namespace=None):
        tasks = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        raise _Found(tasks[0].choices[argv[0]] if tasks else parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", found)
    with pytest.raises(_Found) as caught:
        command([])
    return caught.value.args[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_default_is_shown_as_its_value(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # an option's help in one line
    parser = parser_of(COMMANDS[name], monkeypatch)
    assert isinstance(parser, Parser)
    lines = parser.format_help().splitlines()
    for action in parser._actions:
        if action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS):
            option = action.option_strings[-1]
            (at,) = [i for i, line in enumerate(lines) if re.match(rf"\s+.*{option}\b", line)
                     and line.startswith("  -")]  # fmt: skip
            told = lines[at] if "default:" in lines[at] else lines[at + 1]
            shown = re.search(r"default: (\S+)$", told)
            assert shown, f"{name} {option} = {action.default!r}: {told}"
            read = action.type or str
            assert read(shown[1]) == action.default or shown[1] == str(action.default)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_default_stands_there_twice(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    for line in parser_of(COMMANDS[name], monkeypatch).format_help().splitlines():
        assert line.count("default") < 2, line


def test_all_commands_are_among_these():
    text = (ROOT / "setup.py").read_text()
    scripts = set(re.findall(r'"(cjepa-\w+) = ', text)) - {"cjepa-embed"}  # cjepa-eval embed
    assert scripts == {name.split()[0] for name in COMMANDS if name.startswith("cjepa-")}
    own = [
        path for path in (ROOT / "cjepa_fast").rglob("*.py")
        if "argparse.ArgumentParser(" in path.read_text() and path.name != "command_line.py"
    ]  # fmt: skip
    assert not own


def test_a_section_and_a_key_are_explained(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help-config", "optim"])
    said = capsys.readouterr().out
    assert ended.value.code in (0, None)
    assert "optim.lr = " in said and "optim.final_momentum = " in said and "run." not in said


@pytest.mark.parametrize("script", BENCH, ids=lambda path: path.name)
def test_a_script_of_the_bench_gives_its_help_and_does_nothing(script, monkeypatch, capsys):
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (ROOT / "bench").rglob("*.[jmp]*")}

    before = written()
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    # Some set variables for Triton before they import it: not for the tests after this one.
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out.startswith(("usage: ", "Usage: "))
    assert written() == before
