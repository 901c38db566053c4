"""The whole way in minutes, on synthetic images: `python -m cjepa_fast.demo` (`make demo`).

Renders the shapes set, trains configs/demo.json on its images (never on its labels) through the
same command a user would give, compares kNN with what needs no learning, and draws what happened:
report.html holds all of it. `--compare` (`make demo-compare`) trains it once more beside I-JEPA,
which is the same without VICReg, and draws the curves of both.
"""

import contextlib
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from cjepa_fast.data.sets import scenes, shapes
from cjepa_fast.eval.__main__ import main as evaluate
from cjepa_fast.runtime import children
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.telemetry import read_log
from cjepa_fast.telemetry.pace import rate
from cjepa_fast.tools import ablate, report

TRAIN = Path(__file__).with_name("train.py")
HELD_OUT = "shapes:val"
COMPARED = Path("runs/demo-compare")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m cjepa_fast.demo", description=__doc__)
    parser.add_argument("--out", default="runs/demo", metavar="RUN", help="folder of the run")
    parser.add_argument("--config", default="demo.json", metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--compare", action="store_true", help=f"with I-JEPA, in {COMPARED}")
    args = parser.parse_args(argv)
    if named := [one for one in args.overrides if one.startswith("run.dir=")]:
        parser.error(f"--set {named[0]}: --out RUN names the folder, and --compare has its own")
    if args.compare:
        return beside_ijepa(COMPARED, args.overrides)
    began = time.perf_counter()
    run = free_folder(Path(args.out))
    for split, count in shapes.COUNTS.items():
        print(f"{split}: {count:,} images in {shapes.ensure(split)}", flush=True)
    status = train(run, args.config, args.overrides)
    if status or not (run / "encoder.safetensors").is_file():
        return status  # it failed or was stopped, and has said so
    print("\nhow well each tells the largest shape of an image, in percent:")
    status = compare(run) or draw(run) or report.main([str(run), "--images", HELD_OUT])
    if not status:
        print("", *story(run, time.perf_counter() - began), sep="\n")
    return status


def story(run: Path, seconds: float) -> list[str]:
    """What happened, in five lines."""
    log = [row for row in read_log(run) if row.get("images_per_s")]
    speed = statistics.median(row["images_per_s"] for row in log)
    found = {
        row["encoder"]: row
        for row in json.loads((run / "knn.json").read_text(encoding="utf-8"))["rows"]
    }
    pixels, untrained, trained = (found[name] for name in ("raw pixels", "untrained", "trained"))
    chance = 100 / len(scenes.KINDS)
    return [
        f"In {seconds:.0f} s an encoder learnt from {shapes.COUNTS['train']:,} images without "
        f"labels, at {rate(speed)}.",
        f"kNN of its features tells the shape of {trained['top1']:.0f} % of new images; untrained "
        f"{untrained['top1']:.0f} %, raw pixels {pixels['top1']:.0f} %, chance {chance:.1f} %.",
        f"A linear probe tells {trained['linear']:.0f} %; untrained {untrained['linear']:.0f} %.",
        f"{spread(log)}. `make demo-compare` trains I-JEPA beside it.",
        f"All figures: {run / 'report.html'}. Your images: --set data.path=FOLDER.",
    ]


def spread(rows: list[dict]) -> str:
    """What RankMe was in a log: a short run has one, and one that was resumed at its end none."""
    values = [row["rankme"] for row in rows if row["rankme"] is not None]
    if len(values) > 1:
        verb = "rose" if values[-1] > values[0] else "FELL"
        came = f"{verb} from {values[0]:.0f} to {values[-1]:.0f}"
    else:
        came = f"is {values[0]:.0f}" if values else "was not measured"
    return f"RankMe, how many directions the features use, {came}"


def beside_ijepa(out: Path, overrides: list[str]) -> int:
    """Both trainings at once, a core each where there is no GPU; their curves and a sentence."""
    for split in shapes.COUNTS:
        shapes.ensure(split)
    sets = [part for override in overrides for part in ("--set", override)]
    status = ablate.main(["demo", "--out", str(out), "--parallel", "2", *sets])
    if not status:
        untrained, ijepa, cjepa = json.loads((out / "table.json").read_text(encoding="utf-8"))
        print(
            f"\nFrom {untrained['knn']:.0f} % of kNN, I-JEPA came to {_end(ijepa)} and C-JEPA to "
            f"{_end(cjepa)}. They differ in VICReg alone, for which the settings were chosen."
        )
    return status


def _end(row: dict) -> str:
    """RankMe is missing of a run that was resumed just before its end."""
    rankme = f" (RankMe {row['rankme']:.0f})" if "rankme" in row else ""
    return f"{row['knn']:.0f} %{rankme}"


def free_folder(run: Path) -> Path:
    """`run` itself, or run-2, run-3, ... where a run is there already: none is overwritten."""
    names = itertools.chain([run], (run.with_name(f"{run.name}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not (name / "config.json").exists())


def train(run: Path, config: str, overrides: list[str]) -> int:
    """Training in a process of its own, as a user starts it. Returns its exit status."""
    sets = [f"run.dir={json.dumps(str(run))}", *overrides]
    command = [sys.executable, str(TRAIN), "--config", config]
    command += [part for override in sets for part in ("--set", override)]
    print(f"\n$ {shlex.join(['python', 'cjepa_fast/train.py', *command[2:]])}", flush=True)
    training = subprocess.Popen(command, env=children.environment())
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # the training has it too: it saves and ends
            return training.wait()


def compare(run: Path) -> int:
    """kNN of raw pixels and mean colour; kNN and linear probe of untrained and trained encoder."""
    also = ["--max-train", "4096", "--pixels", "--linear", "--untrained"]
    also += ["--json", str(run / "knn.json")]
    return evaluate(["knn", str(run), "--data", "shapes", "--test", HELD_OUT, *also])


def draw(run: Path) -> int:
    """curves.png and the figures of what was learnt, in the run's folder."""
    print("\ndrawn:", flush=True)
    tasks = {
        "curves": [],
        "attention": ["--images", HELD_OUT],
        "pca": ["--images", HELD_OUT],
        "masks": ["--images", HELD_OUT],
        "retrieve": ["--data", HELD_OUT],
    }
    for task, options in tasks.items():
        status = evaluate([task, str(run), *options, "--out", str(run / f"{task}.png")])
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
