"""The Linear that GELU follows and its like: which of cuBLAS's ways is the fastest, by shape.

    python bench/matmuls.py --json matmuls.json

Of bf16 x (rows, C), weight (O, C) and bias (O,), at the shapes of the models' steps:
    addmm             x W^T + b
    addmm, gelu       the same, then kernels/gelu.py in place
    addmm activation  torch._addmm_activation: GELU in the matmul's epilogue, by its tanh form
    gelu_aux          the same, and what GELU's backward reads: model/cublaslt.py, linear_gelu
    dgelu             a matmul times GELU's derivative, and its sum: there, gelu_backward
    mm, dgelu         the same by mm, then kernels/gelu.py
gelu_aux and dgelu are measured where cuBLASLt's trial is right. The variants take turns with the
caches cold; a figure is the median. Errors are against float64, of some rows.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import files
import torch
import torch.nn.functional as F
from hardware import here, provenance
from stopwatch import Stopwatch

from cjepa_fast.kernels.common.launch import runs_on
from cjepa_fast.kernels.gelu import launch_gelu, launch_gelu_backward
from cjepa_fast.model import cublaslt

CHECKED = 256  # rows whose error is told


class Shape(NamedTuple):
    """A Linear of a step: where it stands, and its rows, inputs and outputs."""

    name: str
    rows: int
    inputs: int
    outputs: int


def linears(name: str, rows: int, width: int, parts: str = "qkv proj fc1 fc2") -> list[Shape]:
    sizes = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
    return [
        Shape(f"{name} {part}", rows, *(width * times for times in sizes[part]))
        for part in parts.split()
    ]


SHAPES = [
    *linears("vit_h target", 32_768, 1280),
    *linears("vit_h context", 11_648, 1280),
    *linears("vit_h predictor", 68_096, 384, "fc1 fc2"),
    *linears("vit_b target", 50_176, 768, "fc1"),
    *linears("vit_l target", 25_088, 1024, "fc1"),
]


def epilogues(x, weight, bias) -> dict[str, Callable]:
    """cuBLASLt's GELU with what its backward reads, and that backward, as model/cublaslt.py calls
    them, where it serves these shapes."""
    if not cublaslt.takes(x, weight) or cublaslt.linear_gelu(x, weight, bias) is None:
        return {}
    u, _ = cublaslt.linear_gelu(x, weight, bias)
    second = weight.t().contiguous()  # of the same sizes
    if cublaslt.gelu_backward(x, second, u) is None:
        return {}
    return {
        "gelu_aux": lambda: cublaslt.linear_gelu(x, weight, bias)[1],
        "dgelu": lambda: cublaslt.gelu_backward(x, second, u)[0],
    }


def variants(shape: Shape, device: torch.device) -> dict[str, Callable]:
    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    x, bias = normal(shape.rows, shape.inputs), normal(shape.outputs)
    weight = normal(shape.outputs, shape.inputs) * shape.inputs**-0.5
    found = {"addmm": lambda: torch.addmm(bias, x, weight.t())}
    found["addmm activation"] = lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    if device.type == "cuda" and runs_on(device):

        def with_ours():
            u = torch.addmm(bias, x, weight.t())
            return launch_gelu(u, u)

        found["addmm, gelu"] = with_ours
        second, u = weight.t().contiguous(), normal(shape.rows, shape.outputs)
        found["mm, dgelu"] = lambda: launch_gelu_backward(x @ second, u, kind="tanh")[0]
        try:
            found |= epilogues(x, weight, bias)
        except Exception as error:  # of a binding that is there and refuses: told, not fatal
            print(f"epilogues: {type(error).__name__}: {error}", file=sys.stderr)
    found["reference"] = lambda: F.linear(x[:CHECKED].double(), weight.double(), bias.double())
    return found


def measure(shape: Shape, watch: Stopwatch, seconds: float) -> dict:
    calls = variants(shape, watch.device)
    exact = calls.pop("reference")()
    errors = {}
    for name, call in calls.items():
        if not name.endswith("dgelu"):
            wanted = exact if name == "addmm" else F.gelu(exact)
            off = call()[:CHECKED].double() - wanted
            errors[name] = float(off.norm() / wanted.norm())
    us = {name: statistics.median(t) for name, t in watch.turns(calls, seconds).items()}
    flop = 2 * shape.rows * shape.inputs * shape.outputs
    tflops = {name: flop / t / 1e6 for name, t in us.items()}
    return {**shape._asdict(), "us": us, "tflops": tflops, "errors": errors}


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    lines = [f"{'TFLOP/s':26s}{'rows':>8s}{'':2s}" + "".join(f"{name:>18s}" for name in names)]
    for row in rows:
        cells = (f"{row['tflops'][n]:.4g}" if n in row["us"] else "not bound" for n in names)
        lines.append(f"{row['name']:26s}{row['rows']:8d}  {''.join(f'{c:>18s}' for c in cells)}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a shape, about")
    parser.add_argument("--rows", type=int, help="instead of each shape's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    if args.rows is not None and args.rows < 1:
        parser.error(f"--rows {args.rows}: must be at least 1")
    device = here()
    watch, rows = Stopwatch(device), []
    for shape in SHAPES:
        torch.manual_seed(0)
        chosen = shape._replace(rows=args.rows) if args.rows else shape
        rows.append(measure(chosen, watch, args.seconds))
        if args.json:
            about = {"batch": args.rows, "overrides": []}  # report.py takes the shapes' own alone
            files.write({**provenance(device), **about, "rows": rows}, args.json)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
