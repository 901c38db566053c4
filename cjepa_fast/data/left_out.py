"""What a set holds and is not used: a count by reason on the terminal, and every name in a file."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cjepa_fast.runtime import json_text
from cjepa_fast.runtime.files import write_text
from cjepa_fast.runtime.printable import printable

FILE = "unusable.jsonl"  # in a run's folder
WHILE_TRAINING = {"while": "training"}  # in the rows of what failed then
NAMED = 20  # files, each on a line of its own; of more the terminal has the counts alone
REASONS = 8  # counted apart


def tell(
    left_out: list[tuple[str, str]], found: int, report: Path, log: Callable[[str], None]
) -> None:
    """Write all (name, reason) to `report` as `write` does, and log the counts and a few names."""
    where = write(left_out, report) or f"all are named in {report}"
    if not left_out:
        return
    log(f"{len(left_out)} of {found} images are left out ({counted(left_out)}); {where}")
    for name, why in left_out if len(left_out) <= NAMED else ():
        log(f"unusable image left out: {printable(name)}: {printable(why)}")


def write(left_out: list[tuple[str, str]], report: Path) -> str:
    """All (name, reason) to `report`. What failed while training stays there, or comes there from
    the files of other ranks. Returns why they cannot be written, or "". Where there is nothing to
    write there is no such file."""
    rows = [{"name": name, "why": why} for name, why in left_out]
    names = {name for name, _ in left_out}
    try:
        others = sorted(report.parent.glob(f"{report.stem}_rank_*{report.suffix}"))
        late = _of_training([report, *others])
        rows += [row for row in late if str(row.get("name")) not in names]
        if rows:
            report.parent.mkdir(parents=True, exist_ok=True)
            write_text(report, "".join(json.dumps(row) + "\n" for row in rows))
        for path in others if rows else [report, *others]:
            path.unlink(missing_ok=True)
    except OSError as error:
        return f"they could not be written down: {error}"
    return ""


def of_rank(path: Path, rank: int) -> Path:
    """The file that a rank adds to, and no other: on a network disk rows of two would mix."""
    return path.with_name(f"{path.stem}_rank_{rank}{path.suffix}") if rank else path


def _of_training(reports: list[Path]) -> list[dict]:
    """The rows of reports that were added WHILE_TRAINING, each name once."""
    found, there = {}, [report for report in reports if report.exists()]
    texts = [report.read_text(encoding="utf-8", errors="replace") for report in there]
    for line in itertools.chain(*map(str.splitlines, texts)):
        try:
            row = json_text.parse(line)
        except ValueError:
            continue  # a line that a crash tore
        if isinstance(row, dict) and WHILE_TRAINING.items() <= row.items():
            found.setdefault(str(row.get("name")), row)
    return list(found.values())


def counted(left_out: list[tuple[str, str]]) -> str:
    """The reasons, without what is of one file alone, the most frequent first."""
    count = Counter(_kind(why) for _, why in left_out)
    said = [f"{kind}: {number:,}" for kind, number in count.most_common(REASONS)]
    rest = count.total() - sum(number for _, number in count.most_common(REASONS))
    return ", ".join([*said, f"others: {rest:,}"] if rest else said)


def _kind(why: str) -> str:
    """A reason up to its details: in brackets, after a colon, or with numbers."""
    return re.split(r" \(|: | \d", printable(why), maxsplit=1)[0]
