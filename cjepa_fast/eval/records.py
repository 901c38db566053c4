"""What an evaluation found: a table on the terminal, and JSON, also in the folder of the run, where
model cards, `compare` and the report of a run read it.

A task is a module with `add_options(parser)` and `run(args)`; what it finds it gives to `report`.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cjepa_fast.checkpoint.encoders import located, run_of
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.files import read_json, write_text
from cjepa_fast.runtime.printable import printable

USUAL_LIMITS = ("detect", "video")  # tasks that read whole images by the usual ones
Row = dict[str, object]
VERSIONS = (
    "cjepa_fast", "torch", "nvidia-dali-cuda130", "scikit-learn", "torchvision", "pycocotools",
)  # fmt: skip
RECORD = {"task": str, "made": str, "settings": dict, "headings": dict, "rows": list}
COUNTS = ("train_images", "test_images", "images")
ROW_KEYS = ("question", "labels", "layers")  # what tells the rows of one encoder apart


def report(
    args: argparse.Namespace,
    rows: list[Row],
    headings: dict[str, str],
    settings: Sequence[str],
    figure: Path | None = None,
) -> None:
    """Print a table, and write it to --json and into the run's folder as eval/TASK-DIGEST.json.

    rows: of plain values, each with "encoder", its name; headings: the columns by key, in order;
    settings: names of the arguments that decide the numbers; figure: a file drawn of them. What an
    earlier record in the run's folder has besides, of the same weights, settings and images, stays
    there. Only rank 0 does so.
    """
    if distributed.rank() != 0:
        return
    print_table(rows, headings)
    chosen = {name: getattr(args, name) for name in settings}
    if (limits := args.limits.changed()) and args.task not in USUAL_LIMITS:
        chosen["limits"] = limits
    record = {
        "task": args.task,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        "command": shlex.join(["cjepa-eval", *sys.argv[1:]]),
        "versions": _versions(),
        "checkpoint": str(args.checkpoint),
        "inside": inside(args.checkpoint),
        "which": args.which,
        "weights": args.weights,
        "settings": chosen,
        "headings": headings,
        "rows": rows,
        "picture": figure and str(figure),
    }
    if args.json:
        _write_record(args.json, record)
    if file := _file_in_run(args, chosen):
        _write_record(file, _with_earlier(file, record))


def _write_record(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2, default=str) + "\n")


def _with_earlier(file: Path, record: dict) -> dict:
    """The record with the rows, and a row's values, that the file has and the record lacks: as of
    `knn --untrained --linear` before `knn`. A row whose other values differ is replaced."""
    try:
        before = read_json(file)
    except (OSError, ValueError):
        return record
    if not _is_record(before) or before.get("weights") != record["weights"]:
        return record
    record = json.loads(json.dumps(record, default=str))
    old, new = ({_row_key(row): row for row in one["rows"]} for one in (before, record))
    common = old.keys() & new
    if any(old[key].get(count) != new[key].get(count) for key in common for count in COUNTS):
        return record
    for key in common:
        if all(old[key][name] == new[key][name] for name in old[key].keys() & new[key]):
            new[key] = old[key] | new[key]
    rows = [*(row for key, row in old.items() if key not in new), *new.values()]
    return record | {"rows": rows, "headings": before["headings"] | record["headings"]}


def _row_key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in ("encoder", *ROW_KEYS))


def print_numbers(
    args: argparse.Namespace, rows: list[Row], headings: dict[str, str], label: str
) -> None:
    """Print a figure's numbers and write them to --json. label: the key of a row's name.
    Only rank 0 does so."""
    if distributed.rank() != 0:
        return
    print_table(rows, headings, label)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.json, json.dumps({"task": args.task, "rows": rows}, indent=2) + "\n")


def _file_in_run(args: argparse.Namespace, chosen: dict) -> Path | None:
    if not (run := run_of(args.checkpoint)):
        return None
    facts = json.dumps([inside(args.checkpoint), args.which, chosen], default=str)
    digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
    return run / "eval" / f"{args.task}-{digest}.json"


def inside(checkpoint: str | Path) -> str | None:
    """Its path below the run's folder, "." for the run itself; None outside of any run."""
    if (run := run_of(checkpoint)) is None:
        return None
    path = located(checkpoint)  # RUN/best keeps its name, whatever links lead to RUN
    return "." if path == run else os.path.relpath(path.parent.resolve() / path.name, run.resolve())


def records_in(run: Path) -> list[dict]:
    """What `report` has left in a run's folder, the oldest first. Raises ValueError, naming the
    file, for one that is damaged."""
    found = {path: read_json(path) for path in (run / "eval").glob("*-*.json")}
    for path, record in found.items():
        if not _is_record(record):
            raise ValueError(f"{path} is no record of an evaluation: remove it")
    return sorted(found.values(), key=lambda record: record["made"])


def _is_record(found: dict) -> bool:
    return all(isinstance(found.get(key), kind) for key, kind in RECORD.items())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def print_table(rows: list[Row], headings: dict[str, str], label: str = "encoder") -> None:
    """Aligned columns; of `headings` those that any row has."""
    shown = {key: word for key, word in headings.items() if any(key in row for row in rows)}
    lines = [[label, *shown.values()]]
    lines += [[printable(row[label]), *(cell(row.get(key)) for key in shown)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *cells in lines:
        print("  ".join([f"{first:{widths[0]}s}", *map(str.rjust, cells, widths[1:])]).rstrip())


def cell(value: object) -> str:
    """A value as tables show it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) else printable(value)
