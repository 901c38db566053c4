"""A model's step in several variants, one after the other in one process: rows of throughput.py.

    python bench/variants.py --config vit_h vit_b --variant fused graph compiled --json rows.json

One process imports and compiles once, so that a short lease of a GPU holds many rows. All variants
have contexts of one length (mask.context "fixed"). The first variant is measured of every model
before the next is, and the file is written anew after each row. A row that does not fit the GPU, or
fails, says so, and the next is measured; the exit status is then 1.
"""

import argparse
import contextlib
import itertools
import sys
import traceback
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import measure
import throughput
import torch
from files import write
from tables import COLUMNS, columns_of, phase_table, table

from cjepa_fast.model import fp8
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.oom import is_out_of_memory

FIXED = ("mask.context=fixed",)
GRAPH = (*FIXED, "run.cuda_graph=true")
SMALL_GIB = 100  # of a GPU's memory: ViT-H compiled at batch 128 took 88.8 GiB of an H200
SMALL_BATCH = {("vit_h", "compiled"): 64}  # on a GPU with less


class Variant(NamedTuple):
    """Overrides of the configuration; images a micro-batch, if not its own; and what no key sets:
    FP8 matmuls that sum in fewer bits."""

    overrides: tuple[str, ...]
    batch: int | None = None
    fast_sums: bool = False
    only: str = ""  # of the configurations, where it makes sense for one


FP8 = "model.target_precision=fp8"
CONTEXT_FP8 = "model.context_precision=fp8"
TANH = "model.gelu=tanh"
DEPENDENT = "run.dependent_launch=true"
VARIANTS = {
    "fused": Variant(FIXED),
    "graph": Variant(GRAPH),
    "compiled": Variant((*GRAPH, "run.compile=blocks")),
    "graph_tanh": Variant((*GRAPH, TANH)),
    "graph_fp8_k78": Variant((*GRAPH, FP8, "mask.keep=78"), fast_sums=True, only="vit_h"),
    "graph_tanh_fp8_k78": Variant((*GRAPH, TANH, FP8, "mask.keep=78"), None, True, "vit_h"),
    "fp8": Variant((*FIXED, FP8)),
    "fp8_fast": Variant((*FIXED, FP8), fast_sums=True),
    "graph_fp8": Variant((*GRAPH, FP8)),
    "graph_fp8_all": Variant((*GRAPH, FP8, CONTEXT_FP8)),
    "stream": Variant((*FIXED, "run.target_stream=true")),
    "weight_stream": Variant((*FIXED, "run.weight_stream=true")),
    "tanh": Variant((*FIXED, TANH)),
    "k78": Variant((*FIXED, "mask.keep=78"), only="vit_h"),
    "batch256": Variant(FIXED, batch=256),
    "graph_dependent_launch": Variant((*GRAPH, DEPENDENT)),
}


def batch_of(name: str, variant: str, memory_gib: float | None) -> int | None:
    """Images a micro-batch, None for the configuration's own."""
    small = memory_gib is not None and memory_gib < SMALL_GIB
    own = VARIANTS[variant].batch
    return SMALL_BATCH.get((name, variant), own) if small else own


def memory_gib() -> float | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def recording_is_open() -> bool:
    """Whether a failed recording's stream is still the current one, as up to torch 2.11: its
    allocator then takes every later row for a part of that recording."""
    cuda = torch.cuda.is_available()
    return cuda and torch.cuda.current_stream() != torch.cuda.default_stream()


def device_has_failed() -> bool:
    """Whether an error of the device, a wild address for one, spoils all that this process does."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def measured(name: str, which: str, args: argparse.Namespace) -> list[dict]:
    """The row of a variant of a configuration, or one that says why there is none."""
    variant = VARIANTS[which]
    batch = args.batch or batch_of(name, which, memory_gib())
    asked = throughput.changed(
        args, overrides=[*args.overrides, *variant.overrides], batch=[batch],
        profile=args.profile and args.profile / which,
    )  # fmt: skip
    try:
        with mock.patch.object(fp8, "FAST_SUMS", variant.fast_sums):
            rows = throughput.measure_one(name, asked)
    except Exception as error:  # told in the row: the other variants are measured
        traceback.print_exc()  # of a recording that failed the cause is in what came before
        why = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        failed = {"failed": f"{which}: {why}"[:300], "batch": batch}
        return [{"config": Path(name).stem, "variant": which, **failed}]
    finally:
        with contextlib.suppress(RuntimeError):  # of an allocator that takes a recording for open
            measure.forget(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        torch.compiler.reset()
    also = ["fast sums"] * variant.fast_sums
    return [row | {"variant": which, "also": also} for row in rows]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=["fused", "graph"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--batch-size", dest="batch", type=int, help="images, of every row")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument(
        "--warmup", type=int, default=measure.RING + 1,
        help="steps before them: more than there are synthetic batches, each with masks of its own",
    )  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="traces there, by variant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    for name, least in (("steps", 2), ("warmup", 1), ("batch", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    rest = throughput.parse(["--data", "synthetic"])
    return throughput.changed(rest, **vars(args))


def main(argv: list[str]) -> int:
    args, rows = parse(argv), []
    for which, name in itertools.product(args.variant, args.config):
        if VARIANTS[which].only not in ("", Path(name).stem):
            continue
        rows += measured(name, which, args)
        print(f"{name}, {describe(rows[-1])}", file=sys.stderr, flush=True)
        if args.json:
            write(rows, args.json)
        if recording_is_open():
            print("ends here: after a recording that failed torch's memory is not to be trusted")
            break
        if "failed" in rows[-1] and device_has_failed():
            print("ends here: the device has failed, and fails all that this process asks of it")
            break
    print(
        table(rows, {"config": COLUMNS["config"], "variant": ("variant", "{}")} | columns_of(rows))
    )
    print(phase_table(rows), end="")
    return int(any("failed" in row for row in rows))


def describe(row: dict) -> str:
    figures = "{variant}: {images_per_s:.0f} images/s, {step_ms:.1f} ms"
    return row.get("failed") or figures.format_map(row)


if __name__ == "__main__":
    distributed.leave(main(sys.argv[1:]))
