"""Images/s of the training step, on synthetic data and end to end from JPEG files.

    python bench/throughput.py                                  # the demo's model, on what is here
    python bench/throughput.py --config vit_b vit_h --data both --data-path /my/images --save
    python bench/throughput.py --config vit_b --against reference
    python bench/throughput.py --config vit_b --batch 32,64,128 --profile traces/

The step is train.py's own: forward, backward, update and average. Warm-up is timed apart. MFU is
the counted work (cjepa_fast/flops.py) over the device's data-sheet bf16 rate where that is known,
and over the rate of a large matrix product measured in the same run. --against takes turns with the
plain step of bench/reference.py, in fp32 and under bf16 autocast, on the same batches.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from hardware import ROOT, own_command, provenance
from measure import add_mfu, measure, measure_against, measure_decoding

from cjepa_fast import config as configuration
from cjepa_fast import engine as engines
from cjepa_fast.config import Config

RESULTS = ROOT / "bench" / "results" / "throughput.json"
DATA = ("synthetic", "jpeg", "both", "decode-only")
COLUMNS = {  # heading: (key of a row, format)
    "config": ("config", "{}"),
    "data": ("data", "{}"),
    "batch": ("batch", "{}"),
    "images/s": ("images_per_s", "{:.1f}"),
    "step ms": ("step_ms", "{:.1f}"),
    "p10": ("step_ms_p10", "{:.1f}"),
    "p90": ("step_ms_p90", "{:.1f}"),
    "wait %": ("data_wait_pct", "{:.1f}"),
    "GFLOP/image": ("gflop_per_image", "{:.2f}"),
    "TFLOP/s": ("tflops", "{:.2f}"),
    "MFU % sheet": ("mfu_sheet_pct", "{:.1f}"),
    "% of matmul": ("mfu_matmul_pct", "{:.1f}"),
    "peak GiB": ("peak_gib", "{:.2f}"),
    "build s": ("build_s", "{:.1f}"),
    "warm-up s": ("warmup_s", "{:.1f}"),
}

AGAINST_COLUMNS = {
    "config": ("config", "{}"),
    "step": ("step", "{}"),
    "batch": ("batch", "{}"),
    "step ms": ("step_ms", "{:.1f}"),
    "p10": ("step_ms_p10", "{:.1f}"),
    "p90": ("step_ms_p90", "{:.1f}"),
    "images/s": ("images_per_s", "{:.1f}"),
    "ours is faster, times": ("ours_times", "{:.2f}"),
}


def configured(name: str, args: argparse.Namespace, world_size: int) -> Config:
    """The configuration with the bench's batch: one micro-batch a process, no accumulation."""
    config = configuration.load(name, args.overrides)
    share = min(config.data.micro_batch_size, max(1, config.data.batch_size // world_size))
    batch = args.batch[0] or share
    sizes = [f"data.micro_batch_size={batch}", f"data.batch_size={batch * world_size}"]
    path = [f"data.path={json.dumps(args.data_path)}"]
    return configuration.load(name, [*args.overrides, *sizes, *path])


def measure_one(name: str, args: argparse.Namespace) -> list[dict]:
    """Rows of one configuration, in this process."""
    config = configured(name, args, int(os.environ.get("WORLD_SIZE", "1")))
    device = engines.start(config.run.seed)
    about = provenance(device)
    named = {"config": Path(name).stem, "precision": config.run.precision}
    if args.against:
        found = measure_against(config, device, args.steps, args.warmup)
    elif args.data == "decode-only":
        found = [measure_decoding(config, device, args.steps, args.warmup)]
    else:
        found = []
        for data in ("synthetic", "jpeg") if args.data == "both" else (args.data,):
            trace = args.profile and args.profile / f"{named['config']}_{data}.json"
            row = measure(config, data, device, args.steps, args.warmup, trace)
            add_mfu(row, config.run.precision, device, about["hardware"]["device"])
            found.append(row)
    return [named | row | {"processes": engines.world_size()} | about for row in found]


def measure_apart(name: str, batch: int | None, args: argparse.Namespace) -> list[dict]:
    """Rows of one of several jobs, in a process of its own: memory is then its own, and one that
    does not fit leaves the others be."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--config", name, "--json", str(out), "--quiet"]
        for option in ("steps", "warmup", "data", "data_path", "against", "profile"):
            if (value := getattr(args, option)) is not None:
                command += [f"--{option.replace('_', '-')}", str(value)]
        command += [] if batch is None else ["--batch", str(batch)]
        command += [part for override in args.overrides for part in ("--set", override)]
        done = subprocess.run(command)
        if done.returncode == 0:
            return [row | {"command": own_command()} for row in json.loads(out.read_text())]
    return [{"config": name, "failed": f"exit status {done.returncode}"}]


def largest_batch(name: str, args: argparse.Namespace) -> list[dict]:
    """Rows of the batches that fit, from the configuration's on, each half as large again."""
    batch, rows = configured(name, args, 1).data.micro_batch_size, []
    while True:
        found = measure_apart(name, batch, args)
        if "failed" in found[0]:
            return rows or found
        rows += found
        batch = -(-3 * batch // 2)


def table(rows: list[dict], columns: dict[str, tuple[str, str]] = COLUMNS) -> str:
    lines = [list(columns)]
    for row in rows:
        if "failed" in row:
            lines.append([row["config"], row["failed"], *[""] * (len(columns) - 2)])
            continue
        cells = [(row.get(key), text) for key, text in columns.values()]
        lines.append(["-" if value is None else text.format(value) for value, text in cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines
    )


def save(rows: list[dict], path: Path) -> None:
    """Append to a JSON list, which is whole at any time."""
    kept = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(kept + rows, indent=1) + "\n")
    partial.replace(path)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", default=["demo"], metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument(
        "--batch", type=batches, default=[None], metavar="N[,N...]|auto",
        help="images a process, or the largest that fits; default: the config's",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--data", choices=DATA, default="both")
    parser.add_argument("--against", choices=("reference",), help="take turns with that step")
    parser.add_argument("--data-path", default="shapes", metavar="SET", help="images of 'jpeg'")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="traces there; top table")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--save", action="store_true", help=f"append them to {RESULTS.name}")
    parser.add_argument("--quiet", action="store_true", help="print no table")
    args = parser.parse_args(argv)
    for name, least in (("steps", 2), ("warmup", 1)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    if args.batch == "auto" and not torch.cuda.is_available():
        parser.error("--batch auto: on a CPU it would fill the machine's memory; give numbers")
    return args


def batches(text: str) -> list[int] | str:
    if text == "auto":
        return text
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def measure_all(args: argparse.Namespace) -> list[dict]:
    """Rows of every configuration and batch; the JSON file is written anew after each."""
    rows: list[dict] = []
    for name in args.config:
        if args.batch == "auto":
            jobs = [lambda name=name: largest_batch(name, args)]
        elif len(args.config) * len(args.batch) == 1:
            jobs = [lambda name=name: measure_one(name, args)]
        else:
            jobs = [lambda n=name, b=batch: measure_apart(n, b, args) for batch in args.batch]
        for job in jobs:
            rows += job()
            if args.json and engines.rank() == 0:
                Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
            if not args.quiet:
                print(f"measured {name}", file=sys.stderr, flush=True)
    return rows


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        rows = measure_all(args)
    except (ValueError, FileNotFoundError) as error:  # the user's input
        print(f"error: {error}", file=sys.stderr)
        return 2
    if engines.rank() == 0:
        report(rows, args)
    return int(any("failed" in row for row in rows))


def report(rows: list[dict], args: argparse.Namespace) -> None:
    measured = [row for row in rows if "failed" not in row]
    if args.save and measured:
        save(measured, RESULTS)
    if args.quiet:
        return
    if args.against:
        print(table(rows, AGAINST_COLUMNS))
        return
    if measured and "matmul_tflops" in measured[0]:
        row = measured[0]
        sheet = f"{row['peak_tflops']:.0f}" if row["peak_tflops"] else "not known"
        print(f"{row['hardware']['device']}; torch {row['versions']['torch']}")
        print(f"bf16 TFLOP/s: {sheet} by data sheet, {row['matmul_tflops']:.3g} in a large product")
    print(table(rows))
    print(phase_table([row for row in measured if row.get("phases_ms")]), end="")


def phase_table(rows: list[dict]) -> str:
    """A line a row: the milliseconds of each phase of a step."""
    lines = []
    for row in rows:
        parts = ", ".join(f"{name} {ms:.1f}" for name, ms in row["phases_ms"].items())
        lines.append(f"{row['config']}, {row['data']}, batch {row['batch']}, ms: {parts}\n")
    return "".join(lines)


if __name__ == "__main__":
    engines.leave(main(sys.argv[1:]))
