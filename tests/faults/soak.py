"""A long run on 2 ranks with kills and corrupt images: is its memory flat, its end exact?

    python tests/faults/soak.py --minutes 120 --out bench/results/soak.md

Trains a tiny model for about that long while processes are killed at random and the run is resumed
with `--resume auto`, saving about every minute; then the same run undisturbed, which takes about as
long again. Memory and open descriptors of every training process are sampled all along. --minutes
counts for each of the two. What each start said lies in --folder. The contexts are of one length:
with mask.context "random" memory climbs for as long as lengths are new (on a CPU; caches by shape
and gaps between freed blocks, as far as could be seen), which would hide anything smaller.
"""

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import corrupt_images
import hardware
import psutil
import tiny
import torch
from harness import assert_same_tensors, kill_all, kill_one, launch

from cjepa_fast.telemetry import read_log

RANKS = 2
SAMPLE_S = 2.0
WARM_UP_S = 120  # of a start, or the first third of it where that is shorter
LONG_S = 60  # after the warm-up: of a shorter stretch no growth is told
FLAT_PCT = 2.0
COLUMNS = ("start, rank", "minutes", "USS MiB after warm-up", "at the end", "%", "MiB/h")
COLUMNS += ("RSS MiB after warm-up", "%", "PSS %", "descriptors", "flat")
IMAGES, BATCH = 500, 32
STEPS_PER_EPOCH = IMAGES // BATCH
TRIAL_EPOCHS = 30  # that tell how many steps a minute there are


class Sample(NamedTuple):
    """Of one process: seconds since its start, memory in MiB, open descriptors."""

    at_s: float
    rss: float
    pss: float
    uss: float
    descriptors: int


def sampled(process: psutil.Process) -> Sample:
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    mib = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in rollup}
    return Sample(
        time.time() - process.create_time(),
        mib["Rss"],
        mib["Pss"],
        mib["Private_Clean"] + mib["Private_Dirty"],
        len(os.listdir(f"/proc/{process.pid}/fd")),
    )


@dataclass
class Stretch:
    """One process from its start to its end."""

    name: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def after_warm_up(self) -> list[Sample]:
        warm_s = min(WARM_UP_S, self.samples[-1].at_s / 3)
        return [s for s in self.samples if s.at_s >= warm_s]

    @property
    def seconds(self) -> float:
        return self.after_warm_up[-1].at_s - self.after_warm_up[0].at_s

    def ends(self, what: str) -> tuple[float, float]:
        """Medians of the first and of the last tenth after the warm-up."""
        values = [getattr(s, what) for s in self.after_warm_up]
        tenth = -(-len(values) // 10)
        return statistics.median(values[:tenth]), statistics.median(values[-tenth:])

    def change_pct(self, what: str) -> float:
        first, last = self.ends(what)
        return 100 * (last / first - 1)

    def mib_per_h(self, what: str) -> float:
        samples = self.after_warm_up
        hours = [s.at_s / 3600 for s in samples]
        return statistics.linear_regression(hours, [getattr(s, what) for s in samples]).slope

    @property
    def flat(self) -> bool:
        first, last = self.ends("descriptors")
        return max(self.change_pct("uss"), self.change_pct("rss")) <= FLAT_PCT and last <= first


class Run:
    """A training of so many steps below `folder`, started as often as it takes."""

    def __init__(self, folder: Path, images: Path, epochs: int, every: int, context: str):
        folder.mkdir(parents=True)
        self.folder, self.every, self.context = folder, every, context
        self.steps = epochs * STEPS_PER_EPOCH
        self.minutes, self.starts, self.kills = 0.0, 0, 0
        self.stretches: list[Stretch] = []
        self.config = tiny.write_config(
            folder,
            run={"epochs": epochs},
            data={"path": str(images), "batch_size": BATCH, "micro_batch_size": 8},
            mask={"context": context},
            checkpoint={"every_steps": every},
            telemetry={"every_steps": 20, "tensorboard": True},
        )

    @property
    def result(self) -> Path:
        return self.folder / "run"

    def until_done(self, draw: random.Random, kills: int = 0, mean_gap_s: float = 0) -> None:
        """Train to the end, killed so often at most, each time about such a gap is over."""
        began, done = time.monotonic(), False
        while not done:
            gap_s = mean_gap_s * draw.uniform(0.3, 1.7)
            done = self._start(gap_s if self.kills < kills else float("inf"), draw)
        self.minutes = (time.monotonic() - began) / 60

    def _start(self, kill_after_s: float, draw: random.Random) -> bool:
        """One start; whether the training came to its end."""
        said = self.folder / f"said.{self.starts}"
        resume = ["--resume", "auto"] if self.starts else []
        arguments = [tiny.ROOT / "cjepa_fast/train.py", "--config", self.config, *resume]
        launcher = launch(arguments, RANKS, said)
        stretches: dict[int, Stretch] = {}
        began, killed = time.monotonic(), False
        while launcher.poll() is None:
            workers = self._sample(launcher, stretches)
            if not killed and workers and time.monotonic() - began > kill_after_s:
                killed = True
                with contextlib.suppress(psutil.Error, ProcessLookupError):  # it has just ended
                    draw.choice([kill_all, kill_one])(launcher, draw.choice(workers))
            time.sleep(SAMPLE_S)
        self.starts += 1
        self.kills += killed
        self.stretches += stretches.values()
        if not killed and launcher.poll():
            raise SystemExit(f"the run failed by itself; it said:\n{said.read_text()}")
        return launcher.poll() == 0

    def _sample(self, launcher: subprocess.Popen, stretches: dict[int, Stretch]) -> list[int]:
        """Note a sample of each training process; returns their ids."""
        workers = []
        for process in psutil.Process(launcher.pid).children():
            with contextlib.suppress(psutil.Error, OSError, KeyError):  # it begins, or has ended
                name = f"{self.folder.name} {self.starts}, rank {process.environ()['RANK']}"
                sample = sampled(process)
                stretches.setdefault(process.pid, Stretch(name)).samples.append(sample)
                workers.append(process.pid)
        return workers


def steps_per_minute(folder: Path, images: Path, context: str) -> float:
    trial = Run(folder, images, TRIAL_EPOCHS, 0, context)
    trial.until_done(random.Random(0))
    rows = read_log(trial.result)
    half = rows[len(rows) // 2 :]
    return 60 * (half[-1]["step"] - half[0]["step"]) / (half[-1]["time_s"] - half[0]["time_s"])


def row(stretch: Stretch) -> str:
    uss, rss, fds = (stretch.ends(what) for what in ("uss", "rss", "descriptors"))
    cells = [
        stretch.name,
        f"{stretch.samples[-1].at_s / 60:.1f}",
        f"{uss[0]:.1f}",
        f"{uss[1]:.1f}",
        f"{stretch.change_pct('uss'):+.2f}",
        f"{stretch.mib_per_h('uss'):+.1f}",
        f"{rss[0]:.1f}",
        f"{stretch.change_pct('rss'):+.2f}",
        f"{stretch.change_pct('pss'):+.2f}",
        f"{fds[0]:g}, {fds[1]:g}",
        "yes" if stretch.flat else "NO",
    ]
    return f"| {' | '.join(cells)} |"


def report(struck: Run, whole: Run) -> str:
    """Markdown. The final states are compared here: AssertionError names the first difference."""
    about = hardware.provenance(torch.device("cpu"))
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    long = [s for s in (*struck.stretches, *whole.stretches) if s.seconds >= LONG_S]
    assert_same_tensors(struck.result, whole.result)
    flat = sum(s.flat for s in long)
    return f"""# A long run with kills, beside the same run undisturbed

{about["hardware"]["device"]}; {versions}; commit {about["commit"]}. `{about["command"]}`

{RANKS} ranks, mask.context "{whole.context}", {whole.steps} steps, a save every
{whole.every}, 12 corrupt files in the set. At the end weights, moments and EMA of both runs are
equal, bit for bit.

| run | minutes | kills | starts |
|---|---|---|---|
| struck | {struck.minutes:.1f} | {struck.kills} | {struck.starts} |
| undisturbed | {whole.minutes:.1f} | {whole.kills} | {whole.starts} |

Memory of each rank that lived {LONG_S} s beyond its warm-up (the first third of its life, at
most {WARM_UP_S} s): medians of the first and of the last tenth of its samples, one in
{SAMPLE_S:g} s. USS is what the process alone holds. Flat means that USS and RSS grow by no more
than {FLAT_PCT:g} % and open descriptors not at all: {flat} of {len(long)}.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
{chr(10).join(map(row, long))}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=120, help="of each of the two runs")
    parser.add_argument("--kills", type=int, help="at most (default: one in 12 minutes)")
    parser.add_argument("--context", default="fixed", help="mask.context (see above)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--out", type=Path, default=Path("bench/results/soak.md"))
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary one)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        images = tiny.write_images(folder / "images", IMAGES)
        corrupt_images.break_folder(images, "class_0")
        rate = steps_per_minute(folder / "trial", images, given.context)
        epochs = max(1, round(given.minutes * rate / STEPS_PER_EPOCH))
        struck, whole = (
            Run(folder / name, images, epochs, max(1, round(rate)), given.context)
            for name in ("struck", "undisturbed")
        )
        print(f"{rate:.0f} steps a minute: {whole.steps} steps", flush=True)
        kills = given.kills or max(2, round(given.minutes / 12))
        draw = random.Random(given.seed)
        struck.until_done(draw, kills, 60 * given.minutes / (kills + 1))
        whole.until_done(draw)
        text = report(struck, whole)
    given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
