"""What befell a run, in rows for a reader: from its log and the .jsonl files of its folder."""

import re
from collections.abc import Iterator
from pathlib import Path

from cjepa_fast.eval.figures.curves import PANELS, series
from cjepa_fast.telemetry import read_log
from cjepa_fast.telemetry.pace import duration
from cjepa_fast.tools.report_run import RunRecord

MOST = 200  # of a file, the last
NAMED = 4  # of a list
Event = tuple[str, str, str]  # time, step, what
# Keys of the log in a sentence; what has a dot is a key of the configuration.
KEYS = re.compile(r"(?<![\w.])(knn_centred|knn|rankme|feature_std)(?![\w.])")
OF_RANK = re.compile(r"_rank_\d+$")  # a file of one rank's rows
HEAD = ("time", "step", "what")


def events(run: RunRecord) -> list[Event]:
    """In the order of the steps."""
    found = [*_of_log(run), *_of_files(run.folder), *_branches(run.folder)]
    return [event for _, event in sorted(found, key=lambda pair: pair[0])]


def _of_log(run: RunRecord) -> Iterator[tuple[float, Event]]:
    own = run.settings.telemetry
    for name, floor in (("rankme", own.rankme_floor), ("feature_std", own.feature_std_floor)):
        low = [(s, v) for s, v in zip(*series(run.rows, name), strict=True) if v < floor]
        if low:
            what = (
                f"{PANELS[name].name} below its floor of {floor:g}, in {len(low)} rows of the log"
            )
            yield low[0][0], _event(run.rows, low[0][0], what)
    for name, what in (("skipped_steps", "steps"), ("skipped_images", "unreadable images")):
        if (counts := series(run.rows, name)[1]) and counts[-1]:
            step = run.rows[-1]["step"]
            yield step, _event(run.rows, step, f"{counts[-1]:,} {what} skipped in all")


def _event(rows: list[dict], step: float, what: str) -> Event:
    time_s = next((row.get("time_s") for row in rows if row["step"] >= step), None)
    return _clock(time_s), f"{step:,}", what


def _of_files(folder: Path) -> Iterator[tuple[float, Event]]:
    for path in sorted(folder.glob("*.jsonl")):
        if path.name == "log.jsonl":
            continue
        for row in read_log(path)[-MOST:]:
            if what := _said(OF_RANK.sub("", path.stem), row):
                step = row.get("step")
                yield (
                    step or 0,
                    (_clock(row.get("time_s")), "" if step is None else f"{step:,}", what),
                )


def _said(file: str, row: dict) -> str | None:
    """A row in words; None for what only tells a terminal's reader how to go on."""
    if isinstance(text := row.get("text"), str):
        return None if text.startswith(("next: ", " ")) else KEYS.sub(_name, text)
    if file == "bad_steps":
        state = "applied, but stood out" if row.get("applied") else "not applied"
        return f"step {state}; its images: {_short(row.get('images', []))}"
    if file == "unusable":
        return f"image left out: {row.get('name')}: {row.get('why')}"
    facts = ", ".join(
        f"{key.replace('_', ' ')} {_short(value)}"
        for key, value in row.items()
        if key not in ("step", "time_s")
    )
    return f"{file.replace('_', ' ')}: {facts}"


def _name(key: re.Match) -> str:
    return PANELS[key[0]].name


def _branches(folder: Path) -> Iterator[tuple[float, Event]]:
    if branches := sorted((folder / "checkpoints").glob("abandoned_*")):
        names = ", ".join(path.name for path in branches)
        yield 0, ("", "", f"went back and on from earlier than {names}")


def _clock(time_s: float | None) -> str:
    return "" if time_s is None else duration(time_s)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > NAMED:
        return f"{', '.join(map(str, value[:NAMED]))} and {len(value) - NAMED} more"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
