"""Each kernel beside its reference, eager and compiled: time, bandwidth, roofline, memory.

    python bench/ops.py                         # every op and model on a GPU; the smallest on a CPU
    python bench/ops.py --only vicreg --markdown bench/results/ops.md
    python bench/ops.py --predict               # the roofline alone, by data sheet; runs nothing
    python bench/ops.py --tune                  # time every configuration, write the fastest down
    compute-sanitizer python bench/ops.py --once --model T --batch 2 --rows 300 --widths 96

On a CPU the kernels' plain-PyTorch paths stand in for them. The variants take turns, each call with
the cache flushed on a GPU; a figure is the median over the turns. "backward" is for the gradients
of the arguments that train, of random upstream gradients. The roofline is the larger of bytes over
the rate of a copy and operations over that of a matmul, both measured in the same call.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hardware
import torch
import tune
from op_cases import MODELS, ROWS, WIDTHS, Case, Cost, cases
from stopwatch import Stopwatch

from cjepa_fast.runtime.rates import measured_gb_per_s, measured_tflops, synchronize

SHEETS = ("H200", "A100", "B200")
Rates = dict[str, float]  # bytes_per_s, and FLOP/s by dtype ("bfloat16", "float32": as tf32)


def measured_rates(device: torch.device) -> Rates:
    """The ceilings of this device."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    matmuls = {
        name: 1e12 * measured_tflops(device, getattr(torch, name))
        for name in ("bfloat16", "float32")
    }
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return {"bytes_per_s": 1e9 * measured_gb_per_s(device), **matmuls}


def sheet_rates(name: str) -> Rates:
    """The ceilings of a data sheet; tf32 runs at half the rate of bf16."""
    flop_per_s = 1e12 * hardware.PEAK_TFLOPS[name]
    bytes_per_s = 1e9 * hardware.PEAK_GB_PER_S[name]
    return {"bytes_per_s": bytes_per_s, "bfloat16": flop_per_s, "float32": flop_per_s / 2}


def roofline_us(work: Cost, dtype: torch.dtype, rates: Rates) -> float:
    matmuls = rates[str(dtype).removeprefix("torch.")]
    return 1e6 * max(work.bytes / rates["bytes_per_s"], work.flop / matmuls)


def passes(function: Callable, inputs: tuple, both_ways: bool) -> dict[str, Callable[[], Any]]:
    """What is timed of one variant, by the pass's name."""
    if not both_ways:
        return {"forward": lambda: function(*inputs)}
    outputs = differentiable(function(*inputs))
    upstream = [torch.randn_like(out) for out in outputs]

    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def grad(outs, **options):
        return torch.autograd.grad(outs, wanted, upstream, **options)

    return {
        "forward": lambda: function(*inputs),
        "backward": lambda: grad(outputs, retain_graph=True),
        "both": lambda: grad(differentiable(function(*inputs))),
    }


def differentiable(outputs) -> list[torch.Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [out for out in outputs if out.requires_grad]


def measure(
    case: Case, device: torch.device, rates: Rates, *, seconds: float, compiled: bool
) -> Iterator[dict]:
    """A row for each pass of one case."""
    torch.manual_seed(0)
    inputs = case.make(device)
    functions = {"eager": case.reference, "ours": case.ours}
    if compiled:
        torch.compiler.reset()
        functions["compiled"] = torch.compile(case.reference, dynamic=False)
    both_ways = "backward" in case.work
    began = time.perf_counter()
    variants = {name: passes(f, inputs, both_ways) for name, f in functions.items()}
    for calls in variants.values():
        for call in calls.values():  # compile, and warm up
            call()
            call()
    synchronize(device)
    prepared_s = time.perf_counter() - began
    watch = Stopwatch(device)
    total = Cost(*map(sum, zip(*case.work.values(), strict=True)))
    for name in variants["ours"]:
        calls = {variant: found[name] for variant, found in variants.items()}
        times = watch.turns(calls, seconds)
        work = {**case.work, "both": total}[name]
        yield {
            "op": case.op, "shape": case.shape, "pass": name,
            "dtype": str(case.dtype).removeprefix("torch."), "prepared_s": prepared_s,
            **row_of(times, work, roofline_us(work, case.dtype, rates)),
            "peak_mib": {variant: watch.peak_mib(call) for variant, call in calls.items()},
        }  # fmt: skip


def call_once(found: list[Case], device: torch.device) -> None:
    """Ours alone, forward and backward, for a checker that would find fault with others' too."""
    for case in found:
        print(f"{case.op}, {case.shape}", flush=True)
        for call in passes(case.ours, case.make(device), "backward" in case.work).values():
            call()
        synchronize(device)


def row_of(times: dict[str, list[float]], work: Cost, bound_us: float) -> dict:
    """The figures of one pass; rates, share of the roofline and speed-ups are of our medians."""
    spread = {name: statistics.quantiles(t, n=10, method="inclusive") for name, t in times.items()}
    median = {name: statistics.median(t) for name, t in times.items()}
    ours = median["ours"]
    return {
        "us": median,
        "us_p10": {name: deciles[0] for name, deciles in spread.items()},
        "us_p90": {name: deciles[-1] for name, deciles in spread.items()},
        "turns": len(times["ours"]),
        "gb_per_s": work.bytes / ours / 1e3,
        "tflops": work.flop / ours / 1e6,
        "roofline_us": bound_us,
        "roofline_pct": 100 * bound_us / ours,
        "speedup": {name: us / ours for name, us in median.items() if name != "ours"},
    }


def predict(found: list[Case]) -> str:
    """The rooflines of the data sheets, as Markdown."""
    lines = [
        "# What the roofline predicts for each kernel: predicted, not measured",
        "",
        "`python bench/ops.py --predict`. Microseconds that a pass takes at least, by the data"
        " sheets' memory bandwidth and dense matrix rate (tf32 for float32), whichever binds."
        " VICReg's matmuls of two halves each cost three times the operations counted here.",
        "",
        "| op | shape | pass | MB | GFLOP | " + " | ".join(f"{s} µs" for s in SHEETS) + " |",
        "|---|---|---|---|---|" + "---|" * len(SHEETS),
    ]
    for case in found:
        for name, work in case.work.items():
            bounds = [roofline_us(work, case.dtype, sheet_rates(sheet)) for sheet in SHEETS]
            cells = [case.op, case.shape, name, f"{work.bytes / 1e6:.1f}", f"{work.flop / 1e9:.2f}"]
            lines.append(f"| {' | '.join(cells + [f'{us:.1f}' for us in bounds])} |")
    return "\n".join(lines) + "\n"


def markdown(rows: list[dict], about: dict, rates: Rates) -> str:
    """The measured rows; a multiplication sign says how many times as fast ours is."""
    what = "kernels" if about["hardware"]["kind"] == "cuda" else "plain paths"
    lines = [
        f"# The {what} of cjepa_fast.kernels beside their references",
        "",
        f"{about['hardware']['device']}; torch {about['versions']['torch']}, triton "
        f"{about['versions']['triton']}; commit {about['commit']}. Copy "
        f"{rates['bytes_per_s'] / 1e9:.0f} GB/s, matmul {rates['bfloat16'] / 1e12:.4g} TFLOP/s in"
        f" bf16, {rates['float32'] / 1e12:.4g} in fp32. `{about['command']}`",
        "",
        "| op | shape | pass | ours µs (p10-p90) | GB/s | TFLOP/s | % of roofline | × eager "
        "| × compiled | peak MiB: ours, eager, compiled |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        us, low, high = (row[key]["ours"] for key in ("us", "us_p10", "us_p90"))
        speedups = [row["speedup"].get(name) for name in ("eager", "compiled")]
        peaks = [row["peak_mib"].get(name) for name in ("ours", "eager", "compiled")]
        cells = [
            row["op"], f"{row['shape']} {row['dtype']}", row["pass"],
            f"{us:.1f} ({low:.1f}-{high:.1f})", f"{row['gb_per_s']:.0f}", f"{row['tflops']:.3g}",
            f"{row['roofline_pct']:.0f}", *("-" if s is None else f"{s:.2f}" for s in speedups),
            ", ".join("-" if p is None else f"{p:.0f}" for p in peaks),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    full = hardware.has_gpu() or "--predict" in argv  # which runs nothing
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS) if full else "T")
    parser.add_argument(
        "--batch-size", dest="batch", type=int, default=None if full else 16, help="images"
    )
    parser.add_argument("--rows", type=int, default=ROWS if full else 2048, help="of vicreg tokens")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS if full else WIDTHS[:1])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="ops whose name has one of these"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="of each pass, about")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="and as a table there")
    parser.add_argument("--once", action="store_true", help="call ours once, and nothing else")
    parser.add_argument("--predict", action="store_true", help="the data sheets' rooflines alone")
    parser.add_argument("--tune", action="store_true", help="time configurations; needs a GPU")
    parser.add_argument(
        "--prepare", type=share, metavar="I/N", help="with --tune: compile share I (from 0) of N"
    )
    args = parser.parse_args(argv)
    for name in ("batch", "rows"):
        if (value := getattr(args, name)) is not None and value < 2:
            parser.error(f"--{name} {value}: must be at least 2")
    if any(width < 1 for width in args.widths):
        parser.error(f"--widths {args.widths}: must be at least 1")
    return args


def share(text: str) -> tuple[int, int]:
    """ "2/16": the third of sixteen shares."""
    mine, every = map(int, text.split("/"))
    if not 0 <= mine < every:
        raise ValueError
    return mine, every


def written(text: str, path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main(argv: list[str]) -> int:
    args = parse(argv)
    device = hardware.here()
    if args.tune:
        return tune.main(device, args.seconds, args.only, args.prepare, args.json)
    every = cases(args.model, args.batch, args.rows, args.widths)
    found = [c for c in every if not args.only or any(text in c.op for text in args.only)]
    if not found:
        print(f"error: --only {' '.join(args.only)}: no op has that in its name", file=sys.stderr)
        return 2
    if args.predict:
        text = predict(found)
        written(text, args.markdown)
        print(text, end="")
        return 0
    if args.once:
        call_once(found, device)
        return 0
    about, rates, rows, failed = hardware.provenance(device), measured_rates(device), [], 0
    for case in found:
        print(f"{case.op}, {case.shape}", file=sys.stderr, flush=True)
        try:
            rows += measure(case, device, rates, seconds=args.seconds, compiled=not args.no_compile)
        except Exception:  # told; the other cases are measured
            traceback.print_exc()
            failed += 1
        gc.collect()
        made = {**about, "batch": args.batch, "rates": rates, "rows": rows}
        written(json.dumps(made, indent=1) + "\n", args.json)
        written(markdown(rows, about, rates), args.markdown)
    print(markdown(rows, about, rates), end="")
    if failed:
        print(f"{failed} cases failed: see above", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
