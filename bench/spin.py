"""Images/s by how long torch's CPU threads spin for each other, on idle and on busy processors.

    python bench/spin.py [--config demo] [--counts own 4000] [--rounds 3] [--json FILE]

"own" is libgomp's count, 300,000; the package sets 4,000 (cjepa_fast/runtime/spin.py). All settings
take turns in each round; medians. "busy" has a process that never waits beside it for each core.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import files
import hardware

THROUGHPUT = Path(__file__).with_name("throughput.py")
LIBGOMP = {"own": "300000"}  # set, so that the package leaves it as it is


@contextlib.contextmanager
def surroundings(busy: bool) -> Iterator[None]:
    """With processes that never wait, one a core, where `busy`."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(hardware.cores() if busy else 0)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def images_per_s(config: str, count: str, steps: int) -> dict[str, float]:
    """{"synthetic": , "jpeg": } of one call of throughput.py."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        options = ["--data", "both", "--steps", str(steps), "--quiet", "--json", str(rows)]
        command = [sys.executable, str(THROUGHPUT), "--config", config, *options]
        environment = os.environ | {"GOMP_SPINCOUNT": LIBGOMP.get(count, count)}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(rows.read_text(encoding="utf-8"))
    return {row["data"]: row["images_per_s"] for row in found}


def described(config: str, data: str, busy: bool, count: str, speed: float) -> str:
    beside = "busy" if busy else "idle"
    return f"{config:15} {data:10} {beside}  {count:>6}  {speed:8.0f} images/s"


def measure(configs: list[str], counts: list[str], rounds: int, steps: int) -> list[dict]:
    found: dict[tuple, list[float]] = {}
    for _, config, busy, count in itertools.product(range(rounds), configs, (False, True), counts):
        with surroundings(busy):
            for data, speed in images_per_s(config, count, steps).items():
                found.setdefault((config, data, busy, count), []).append(speed)
                print(described(config, data, busy, count, speed), flush=True)
    return [
        {"config": config, "data": data, "busy": busy, "count": count,
         "images_per_s": statistics.median(speeds), "all": speeds}
        for (config, data, busy, count), speeds in found.items()
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", default=["demo"], metavar="NAME")
    parser.add_argument("--counts", nargs="+", default=["own", "4000"], metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    rows = measure(args.config, args.counts, args.rounds, args.steps)
    print("medians:")
    for row in rows:
        print(described(*(row[key] for key in ("config", "data", "busy", "count", "images_per_s"))))
    if args.json:
        files.write({**hardware.provenance(hardware.here()), "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
