"""Images/s of the training step, on synthetic data and end to end from JPEG files.

    python bench/throughput.py                                  # the demo's model, on what is here
    python bench/throughput.py --config vit_b vit_h --data both --data-path /my/images --save
    python bench/throughput.py --config vit_b --against reference
    python bench/throughput.py --config vit_b --batch 32,64,128 --profile traces/ --plot bars.png
    deepspeed bench/throughput.py --config vit_b                # all GPUs here, and one for scaling

The step is train.py's own: forward, backward, update and EMA. Warm-up is timed apart. MFU is
the counted work (model/flops.py) over the device's data-sheet bf16 rate where that is known,
and over the rate of a large matmul measured in the same call. --against takes turns with the
plain step of bench/reference.py, in fp32 and under bf16 autocast, on the same batches; of these,
"kept GiB" is what the forward keeps for the backward beside the weights, "step GiB" the most that a
step holds beyond what is held between steps. NVIDIA GPUs add energy, power and clocks, by NVML.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from files import save, write
from hardware import ROOT, has_gpu, own_command, provenance
from measure import add_mfu, measure, measure_against, measure_decoding
from tables import AGAINST_COLUMNS, columns_of, phase_table, table

from cjepa_fast import config as configuration
from cjepa_fast.config import Config
from cjepa_fast.runtime import children, distributed
from cjepa_fast.training.build import with_precision

RESULTS = ROOT / "bench" / "results" / "throughput.json"
DATA = {
    "synthetic": ["synthetic"],
    "jpeg": ["jpeg"],
    "both": ["synthetic", "jpeg"],
    "decode-only": ["decode-only"],
    None: [],
}
# What the launchers of several ranks put into the environment of each.
LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "CROSS_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
)


def launched() -> int:
    """How many ranks were started together with this one, itself counted."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def configured(name: str, args: argparse.Namespace, world_size: int) -> Config:
    """The configuration with the bench's batch: one micro-batch a rank, no accumulation."""
    config = configuration.load(name, args.overrides)
    share = min(config.data.micro_batch_size, max(1, config.data.batch_size // world_size))
    batch = args.batch[0] or share
    sizes = [f"data.micro_batch_size={batch}", f"data.batch_size={batch * world_size}"]
    path = [f"data.path={json.dumps(args.data_path)}"]
    return configuration.load(name, [*args.overrides, *sizes, *path])


def changed(args: argparse.Namespace, **values) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | values)


def measure_one(name: str, args: argparse.Namespace) -> list[dict]:
    """Rows of one configuration, in this process and those it was started with."""
    config = configured(name, args, launched())
    device = distributed.start(config.run.seed)
    config = with_precision(config, device)
    about = provenance(device)
    named = {"config": Path(name).stem, "precision": config.run.precision}
    named["overrides"] = args.overrides
    found = []
    for data in DATA[args.data]:
        if data == "decode-only":
            found.append(measure_decoding(config, device, args.steps, args.warmup))
            continue
        trace = args.profile and args.profile / f"{named['config']}_{data}.json"
        row = measure(config, data, device, args.steps, args.warmup, trace)
        add_mfu(row, config.run.precision, device, about["hardware"]["device"])
        found.append(row)
    if args.against:
        found += measure_against(config, device, args.steps, args.warmup)
    return [named | row | {"processes": distributed.world_size()} | about for row in found]


def measure_apart(name: str, args: argparse.Namespace) -> list[dict]:
    """Rows of one of several jobs, in a process of its own: memory is then its own, and one that
    does not fit leaves the others be."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--config", name, "--json", str(out), "--quiet"]
        for option in ("steps", "warmup", "data", "data_path", "against", "profile"):
            if (value := getattr(args, option)) is not None:
                command += [f"--{option.replace('_', '-')}", str(value)]
        command += [] if args.batch[0] is None else ["--batch-size", str(args.batch[0])]
        command += [part for override in args.overrides for part in ("--set", override)]
        own = children.environment()
        own = {name: v for name, v in own.items() if not name.startswith(LAUNCHERS)}
        done = subprocess.run(command, env=own)
        if done.returncode == 0:
            return [
                row | {"command": own_command()}
                for row in json.loads(out.read_text(encoding="utf-8"))
            ]
    return [{"config": name, "failed": f"exit status {done.returncode}"}]


def largest_batch(name: str, args: argparse.Namespace) -> list[dict]:
    """Rows of the batches that fit, from the configuration's on, each half as large again."""
    batch, rows = configured(name, changed(args, batch=[None]), 1).data.micro_batch_size, []
    while True:
        found = measure_apart(name, changed(args, batch=[batch]))
        if "failed" in found[0]:
            return rows or found
        rows += found
        batch = -(-3 * batch // 2)


def rates_alone(name: str, args: argparse.Namespace) -> dict[str, float]:
    """What one process reaches, images/s by kind of data: given, or measured now, before this one
    joins the others, which wait for it. Empty in all but the first of several."""
    if launched() == 1 or os.environ["RANK"] != "0":
        return {}
    if args.alone:
        return dict.fromkeys(DATA[args.data], args.alone)
    batch = configured(name, args, launched()).data.micro_batch_size
    rows = measure_apart(name, changed(args, batch=[batch], profile=None))
    return {row["data"]: row["images_per_s"] for row in rows if "failed" not in row}


def add_scaling(row: dict, alone: dict[str, float]) -> None:
    """Add images/s of each rank, and the share of what one alone reaches."""
    row["images_per_s_each"] = row["images_per_s"] / row["processes"]
    if rate := alone.get(row["data"]):
        row["images_per_s_alone"] = rate
        row["scaling_pct"] = 100 * row["images_per_s_each"] / rate


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", default=["demo"], metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument(
        "--batch-size", dest="batch", type=batches, default=[None], metavar="N[,N...]|auto",
        help="images a rank, or the largest that fits; default: the config's",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--data", choices=[d for d in DATA if d], help="default: both, or none of "
                        "them with --against")  # fmt: skip
    parser.add_argument("--against", choices=("reference",), help="take turns with that step")
    parser.add_argument("--data-path", default="shapes", metavar="SET", help="images of 'jpeg'")
    parser.add_argument("--alone", type=float, metavar="IMAGES/S", help="what one process reaches,"
                        " for the scaling of several; default: measured first")  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="traces there; top table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="bars of speed and phases there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--save", action="store_true", help=f"append them to {RESULTS.name}")
    parser.add_argument("--quiet", action="store_true", help="print no table")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least in (("steps", 2), ("warmup", 1)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    if args.batch == "auto" and not has_gpu():
        parser.error("--batch-size auto: on a CPU it would fill the machine's memory; give numbers")
    if args.alone is not None and not args.alone > 0:
        parser.error(f"--alone {args.alone}: must be above 0")
    if launched() > 1 and (args.batch == "auto" or args.against):
        parser.error("--batch-size auto and --against are for one process: leave the launcher out")
    if args.data is None and not args.against:
        args.data = "both"
    return args


def batches(text: str) -> list[int] | str:
    if text == "auto":
        return text
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def measure_all(args: argparse.Namespace) -> list[dict]:
    """Rows of every configuration and batch; the JSON file is written anew after each.

    Several ranks stay together: they do all jobs themselves, one after the other.
    """
    auto = args.batch == "auto"
    each = [args] if auto else [changed(args, batch=[batch]) for batch in args.batch]
    jobs = list(itertools.product(args.config, each))
    together = launched() > 1 or len(jobs) == 1
    measured = largest_batch if auto else measure_one if together else measure_apart
    rows: list[dict] = []
    for job, rates in [(job, rates_alone(*job)) for job in jobs]:
        found = measured(*job)
        if launched() > 1:
            for row in found:
                add_scaling(row, rates)
        rows += found
        if distributed.rank() == 0:
            if args.json:
                write(rows, args.json)
            if not args.quiet:
                print(f"measured {job[0]}", file=sys.stderr, flush=True)
    return rows


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        rows = measure_all(args)
    except (ValueError, FileNotFoundError) as error:  # the user's input
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    if distributed.rank() == 0:
        report(rows, args)
    return int(any("failed" in row for row in rows))


def report(rows: list[dict], args: argparse.Namespace) -> None:
    measured = [row for row in rows if "failed" not in row]
    if args.save and measured:
        save(measured, RESULTS)
    if args.plot:
        plot(measured, args.plot)
    if args.quiet:
        return
    turns = [row for row in measured if "step" in row]
    others = [row for row in rows if "step" not in row]
    if others:
        with_matmul = next((row for row in others if "matmul_tflops" in row), None)
        print(f"{ceilings(with_matmul)}{table(others, columns_of(others))}")
        print(phase_table(others), end="")
    if turns:
        print(table(turns, AGAINST_COLUMNS))


def ceilings(row: dict | None) -> str:
    if row is None:
        return ""
    sheet = f"{row['peak_tflops']:.0f}" if row["peak_tflops"] else "not known"
    return (
        f"{row['hardware']['device']}; torch {row['versions']['torch']}\n"
        f"{row['precision']} TFLOP/s: {sheet} by data sheet, "
        f"{row['matmul_tflops']:.3g} in a large matmul\n"
    )


def plot(rows: list[dict], path: Path) -> None:
    from report import draw  # matplotlib takes a second

    if draw(rows, path):
        print(f"drawn: {path}", file=sys.stderr)
    else:
        print("nothing to draw: no row has phases", file=sys.stderr)


if __name__ == "__main__":
    distributed.leave(main(sys.argv[1:]))
