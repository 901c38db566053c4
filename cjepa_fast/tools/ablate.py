"""Compare configurations over seeds: `python -m cjepa_fast.tools.ablate vicreg --base FILE`.

An ablation is a JSON file, of your own or in configs/ablations/:

    {"base": "cifar10_vit_t.json",                  the configuration all rows share
     "set": {"run.epochs": 4},                      what is laid over it
     "seeds": [0, 1, 2],
     "rows": {"I-JEPA": {"loss.vicreg.beta": 0},    what each row changes
              "C-JEPA": {}}}

Every row is trained with every seed by train.py, several at a time with --parallel or --gpus, and
evaluated while it trains (eval.online). Started again it resumes where it was. It ends with a table
(mean and standard deviation over the seeds, and the difference from the first row, seed by seed)
and the curves, in the folder of the ablation.
"""

import argparse
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cjepa_fast import checkpoint
from cjepa_fast import config as configuration
from cjepa_fast.config import ConfigError
from cjepa_fast.eval.figures import seed_bands
from cjepa_fast.eval.figures.curves import PANELS, at_start
from cjepa_fast.eval.figures.style import STYLE, save
from cjepa_fast.eval.options import positive
from cjepa_fast.eval.records import print_table
from cjepa_fast.runtime import caches, children, hardware, json_text
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.printable import in_markdown, printable, printable_lines, say
from cjepa_fast.telemetry import read_log
from cjepa_fast.training.diagnosis import start_name

TRAIN = Path(__file__).parents[1] / "train.py"
MEASURES = {
    "knn": "kNN %",
    "knn_centred": "mean-subtracted",
    "linear": "linear %",
    "rankme": "RankMe",
}
INTERRUPTED = 130  # the exit status, as a shell's
KEYS = {"base", "set", "seeds", "rows"}
# What a run may change when it is resumed, but what an old training may not be tabled under.
COUNTED = ("data.path", "data.micro_batch_size", "eval.", "run.init_from", "run.on_spike")
COUNTED += ("run.spike_z",)


@dataclass(frozen=True)
class Ablation:
    """What a file says; overrides: "key=value" laid over all rows."""

    name: str
    base: str
    seeds: tuple[int, ...]
    rows: dict[str, dict]
    overrides: tuple[str, ...]

    def settings(self, row: str) -> list[str]:
        changes = [f"{key}={json.dumps(value)}" for key, value in self.rows[row].items()]
        return [*self.overrides, *changes]

    def settings_of(self, trial: "Trial") -> list[str]:
        own = [f"run.dir={json.dumps(str(trial.folder))}", f"run.seed={trial.seed}"]
        return [*self.settings(trial.row), *own]


class Trial(NamedTuple):
    """One training."""

    row: str
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        return (self.folder / "encoder.safetensors").is_file()


def read(name: str, overrides: Sequence[str] = (), base: str | None = None) -> Ablation:
    """An ablation's file, with every row's configuration checked. base: instead of the file's.
    Raises ConfigError."""
    if named := [one for one in overrides if one.startswith("run.dir=")]:
        raise ConfigError(f"--set {named[0]}: each training has a folder of its own, below --out")
    folder = configuration.configs_folder() / "ablations"
    found = [p for p in (Path(name), folder / name, folder / f"{name}.json") if p.is_file()]
    if not found:
        known = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
        raise ConfigError(f"{name}: no such file here or in configs/ablations/, which has {known}")
    try:
        values = json_text.parse(found[0].read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{found[0]}: not JSON: {error}") from None
    if not isinstance(values, dict) or values.keys() ^ KEYS:
        raise ConfigError(f"{found[0]}: must be an object of {', '.join(sorted(KEYS))}")
    for key, kind in (("base", str), ("set", dict), ("seeds", list), ("rows", dict)):
        if not isinstance(values[key], kind):
            raise ConfigError(f"{found[0]}: {key} = {values[key]!r}: see --help for what it is")
    for seed in values["seeds"]:
        if type(seed) is not int:
            raise ConfigError(f"{found[0]}: seeds: {json.dumps(seed)} is no whole number")
    for row, changes in values["rows"].items():
        if not isinstance(changes, dict):
            raise ConfigError(
                f"{found[0]}, row {row!r}: {json.dumps(changes)} must be an object of keys, such "
                'as {"optim.lr": 0.001}, or {} for the base as it is'
            )
    shared = [f"{key}={json.dumps(value)}" for key, value in values["set"].items()]
    ablation = Ablation(
        found[0].stem, base or values["base"], tuple(values["seeds"]), values["rows"],
        (*shared, *overrides),
    )  # fmt: skip
    folders = [slug(row) for row in ablation.rows]
    if not ablation.seeds or len(set(folders)) < max(1, len(folders)):
        raise ConfigError(f"{found[0]}: it takes a seed, and rows that differ in their names")
    for row in ablation.rows:
        try:
            made = configuration.load(ablation.base, ablation.settings(row))
        except ConfigError as error:
            raise ConfigError(f"{found[0]}, row {row!r}: {error}") from None
        if made.eval.online.data is None:
            raise ConfigError(
                f"{found[0]}: rows are compared by eval.online: --set eval.online.data=SET names "
                "labelled images"
            )
    return ablation


def slug(text: str) -> str:
    """As the name of a folder."""
    return re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_")


def trials_of(ablation: Ablation, out: Path) -> list[Trial]:
    """Seed by seed, so that rows can be compared before all is done."""
    return [
        Trial(row, seed, out / slug(row) / f"seed_{seed}")
        for seed in ablation.seeds
        for row in ablation.rows
    ]


def check_folders(ablation: Ablation, trials: list[Trial], option: str = "--out") -> None:
    """Raises ConfigError where a folder holds a training with other settings than its row's.
    option: that which names the folders' place."""
    for trial in trials:
        if not (trial.folder / "config.json").is_file():
            continue
        saved = configuration.load_run(trial.folder)
        wanted = configuration.load(ablation.base, ablation.settings_of(trial))
        wanted = configuration.keep_saved_values(wanted, saved.model_dump(mode="json"))
        harmless, changes = checkpoint.differences(
            *({"config": made.model_dump(mode="json")} for made in (saved, wanted))
        )
        changes += [line for line in harmless if line.startswith(COUNTED)]
        if changes:
            listed = "\n  ".join(changes)
            raise ConfigError(
                f"{trial.folder} holds another training:\n  {listed}\ngive another {option}, or "
                "set them back"
            )


# ------------------------------------------------------------------------------------- trainings


def train_all(
    ablation: Ablation, trials: list[Trial], environments: list[dict[str, str]]
) -> list[Trial]:
    """Train what is not finished, one in each environment; returns what failed."""
    free: queue.Queue = queue.Queue()
    for environment in environments:
        free.put(environment)
    stopping = threading.Event()
    running: set[subprocess.Popen] = set()

    def attempt(trial: Trial) -> bool:
        environment = free.get()
        try:
            if stopping.is_set():
                return False
            began = time.monotonic()
            process = start(ablation, trial, environment)
            running.add(process)
            status = process.wait()
            running.discard(process)
            return tell(trial, status, time.monotonic() - began)
        finally:
            free.put(environment)

    todo = [trial for trial in trials if not trial.finished]
    print(
        f"{len(todo)} of {len(trials)} trainings to do, {len(environments)} at a time", flush=True
    )
    with ThreadPoolExecutor(len(environments)) as pool:
        futures = {trial: pool.submit(attempt, trial) for trial in todo}
        try:
            return [trial for trial, future in futures.items() if not future.result()]
        except KeyboardInterrupt:
            stopping.set()
            for process in list(running):  # they save and end
                process.terminate()
            raise


def start(ablation: Ablation, trial: Trial, environment: dict[str, str]) -> subprocess.Popen:
    trial.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(TRAIN), "--config", ablation.base]
    for setting in ablation.settings_of(trial):
        command += ["--set", setting]
    if (trial.folder / "config.json").is_file():
        command += ["--resume", "auto"]
    with open(trial.folder / "said.txt", "a", encoding="utf-8") as said:
        return subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=children.environment(**environment)
        )


def tell(trial: Trial, status: int, seconds: float) -> bool:
    """What came of it; returns whether it has ended with scores."""
    if lost := without_scores(trial):
        print(f"{trial.row}, seed {trial.seed}: failed: {printable(lost)}", flush=True)
        return False
    if trial.finished:
        last = scores_of(trial)[-1]
        found = ", ".join(
            f"{word} {last[key]:.2f}"
            for key, word in MEASURES.items()
            if last.get(key) is not None  # RankMe of too few images after a resume
        )
        print(f"{trial.row}, seed {trial.seed}: {found} ({seconds / 60:.1f} min)", flush=True)
    elif status:
        print(f"{trial.row}, seed {trial.seed}: failed; see {trial.folder}/said.txt", flush=True)
    return trial.finished


def scores_of(trial: Trial) -> list[dict]:
    """The rows of its log that have scores. Raises ValueError where there is none."""
    if not (found := [row for row in read_log(trial.folder) if "knn" in row]):
        raise ValueError(
            f"{trial.folder / 'log.jsonl'} has no scores, though the training is finished: remove "
            f"{trial.folder} to train it again"
        )
    return found


def without_scores(trial: Trial) -> str:
    """That a finished training has none, in words, else ""."""
    try:
        _ = trial.finished and scores_of(trial)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


# --------------------------------------------------------------------------------------- results


def table(ablation: Ablation, trials: list[Trial]) -> list[dict]:
    """A dict a row, and one for the encoder at its start: by measure mean, std, and the paired
    difference from the first row with its own std, over the seeds that both have finished."""
    last = {(t.row, t.seed): scores_of(t)[-1] for t in trials if t.finished}
    base = next(iter(ablation.rows))
    scored = [scores_of(t) for t in trials if t.finished and t.row == base]
    start = start_name(configuration.load(ablation.base, ablation.settings(base)))
    lines = [_line(start, [rows[0] for rows in scored if at_start(rows, "knn")])]
    for name in ablation.rows:
        line = _line(name, [row for (row_name, _), row in last.items() if row_name == name])
        shared = [s for s in ablation.seeds if {(name, s), (base, s)} <= last.keys()]
        if name != base and shared:
            of_base = _line(base, [last[base, s] for s in shared])
            for key in [key for key in MEASURES if key in line and key in of_base]:
                gaps = [last[name, s][key] - last[base, s][key] for s in shared]
                line[f"{key}_gain"], line[f"{key}_gain_std"] = _mean_std(gaps)
        lines.append(line)
    return lines


def _line(name: str, rows: list[dict]) -> dict:
    line: dict = {"row": name, "seeds": len(rows)}
    known = [key for key in MEASURES if rows and all(row.get(key) is not None for row in rows)]
    for key in known:  # RankMe is not measured before the first step
        line[key], line[f"{key}_std"] = _mean_std([row[key] for row in rows])
    return line


def _mean_std(values: list[float]) -> tuple[float, float | None]:
    """std: of the sample (n - 1), None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def as_text(lines: list[dict]) -> list[dict]:
    """For a table: "41.20 +- 0.35 (+1.10 +- 0.20)"."""
    return [
        {"row": line["row"], "seeds": line["seeds"]}
        | {key: _cell(line, key) for key in MEASURES if key in line}
        for line in lines
    ]


def _cell(line: dict, key: str) -> str:
    cell = _spread(line[key], line[f"{key}_std"], "")
    if f"{key}_gain" in line:
        cell += f" ({_spread(line[f'{key}_gain'], line[f'{key}_gain_std'], '+')})"
    return cell


def _spread(mean: float, std: float | None, sign: str) -> str:
    return f"{mean:{sign}.2f}" + ("" if std is None else f" +- {std:.2f}")


def markdown(ablation: Ablation, lines: list[dict]) -> str:
    cells = [["row", "seeds", *MEASURES.values()]]
    cells += [[in_markdown(row.get(key, "-")) for key in ("row", "seeds", *MEASURES)]
              for row in as_text(lines)]  # fmt: skip
    cells.insert(1, ["---"] * len(cells[0]))
    body = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    last = dict(override.split("=", 1) for override in ablation.overrides)
    changes = ", ".join(f"{key}={value}" for key, value in last.items())
    return (
        f"{body}\n\nMean and standard deviation over the seeds; in brackets the difference from "
        f'"{in_markdown(next(iter(ablation.rows)))}", seed by seed. Base: '
        f"{in_markdown(ablation.base)}, with {in_markdown(changes) or 'nothing changed'}.\n"
    )


def draw(ablation: Ablation, trials: list[Trial], out: Path) -> Path:
    """The measures against epochs: the mean of the seeds, and between the least and the most."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    done = {row: [t for t in trials if t.row == row and t.finished] for row in ablation.rows}
    scores = {row: [scores_of(t) for t in of] for row, of in done.items() if of}
    every = [rows for group in scores.values() for rows in group]
    shown = [key for key in MEASURES if any(_points(rows, key)[0] for rows in every)]
    with rc_context(STYLE):
        tall = 3.4 + 0.2 * -(-len(scores) // 4)
        figure = Figure(figsize=(3.6 * len(shown), tall), layout="constrained")
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, key in zip(panels, shown, strict=True):
            for i, (row, group) in enumerate(scores.items()):
                seed_bands.draw(axes, i, len(scores), row, [_points(rows, key) for rows in group])
            seed_bands.at_start(axes, [rows[0][key] for rows in every if at_start(rows, key)])
            axes.set_ylabel(PANELS[key].label)
            axes.set_xlabel("epoch")
            axes.grid()
        seed_bands.legend(figure, panels)
        return save(figure, out)


def _points(rows: list[dict], key: str) -> seed_bands.Points:
    """(epochs, values)"""
    logged = [row for row in rows if row.get(key) is not None]
    return [row["epoch"] for row in logged], [row[key] for row in logged]


# ---------------------------------------------------------------------------------- command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="cjepa-ablate",
        description=__doc__,
    )
    parser.add_argument("ablation", metavar="FILE", help="here or in configs/ablations/")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/ablations/NAME")
    parser.add_argument("--base", metavar="FILE", help="configuration, instead of the file's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", metavar="0,1,...", help="one training on each")
    where.add_argument("--parallel", type=positive, default=1, metavar="N", help="at a time")
    parser.add_argument("--table", action="store_true", help="train nothing: what is there so far")
    return parser.parse_args(argv)


def environments_of(args: argparse.Namespace) -> list[dict[str, str]]:
    """One for each training at a time. Those that share a CPU share its cores."""
    if args.gpus is None:
        told = args.parallel == 1 or "OMP_NUM_THREADS" in os.environ or hardware.has_gpu()
        threads = max(1, hardware.cores() // args.parallel)
        return [{} if told else {"OMP_NUM_THREADS": str(threads)}] * args.parallel
    if not re.fullmatch(r"\d+(,\d+)*", args.gpus):
        raise ConfigError(f"--gpus {args.gpus}: name them as 0,1,2")
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in args.gpus.split(",")]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    caches.root()
    try:
        environments = environments_of(args)
        ablation = read(args.ablation, args.overrides, args.base)
        out = args.out or Path("runs/ablations") / ablation.name
        trials, status = trials_of(ablation, out), 0
        check_folders(ablation, trials)
    except ConfigError as error:
        say(f"error: {printable_lines(error)}", sys.stderr)
        return 2
    if not args.table:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            status = 1 if train_all(ablation, trials, environments) else 0
        except KeyboardInterrupt:
            status = INTERRUPTED
    for lost in filter(None, map(without_scores, trials)):
        say(f"error: {printable(lost)}", sys.stderr)
        status = status or 1
    trials = [trial for trial in trials if not without_scores(trial)]
    if not any(trial.finished for trial in trials):
        print("no training is finished yet")
        return status or 1
    try:
        print(*results(ablation, trials, out), sep="\n")
    except (ValueError, OSError) as error:
        say(f"error: {printable_lines(error)}", sys.stderr)
        return 2
    return status


def results(ablation: Ablation, trials: list[Trial], out: Path) -> Iterator[str]:
    """Write table.json, table.md and curves.png; yields what was written."""
    lines = table(ablation, trials)
    print_table(as_text(lines), {"seeds": "seeds", **MEASURES}, label="row")
    (out / "table.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    (out / "table.md").write_text(markdown(ablation, lines), encoding="utf-8")
    yield str(out / "table.md")
    yield str(draw(ablation, trials, out / "curves.png"))


if __name__ == "__main__":
    sys.exit(main())
