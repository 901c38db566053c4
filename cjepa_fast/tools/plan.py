"""Memory, time and energy of a training before it is begun.

    cjepa-plan --config vit_h.json --gpu h200 --count 16
    cjepa-plan --config my.json --gpu a100-80 --count 8 --images 5000000 --epochs 100

Bytes of weights, gradients and optimiser follow from the parameters; those kept for the backward
are counted by running the networks on torch's meta device, which computes nothing. What lives for a
moment within the backward, as a block's part that model.checkpointing recomputes, is not.
The speed is the counted work, and what is recomputed, over the data sheet's rate, at the share of
it that bench/throughput.py has measured (measured.json) of this very step on this GPU. Of any other
it is derived or assumed, and has a range. What torch reserved in the measured step stands below the
counted memory: it may be far more.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from cjepa_fast import config as configuration
from cjepa_fast.config import Config, ConfigError
from cjepa_fast.kernels.vicreg import positions
from cjepa_fast.model import block, waves
from cjepa_fast.model.block import Attention
from cjepa_fast.model.flops import recomputed_gflop, step_gflop
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.memory import SavedActivations
from cjepa_fast.runtime.printable import printable_lines, say
from cjepa_fast.training import build
from cjepa_fast.training.sizes import counted_sizes, meta_batch

MEASURED = Path(__file__).with_name("measured.json")
IMAGENET = 1_281_167
ASSUMED_MFU = 0.40, 0.25, 0.50  # and its range
DERIVED = 0.75, 1.1  # of the share that another step of the same networks reached
USABLE = 0.92  # of a GPU's memory, beside the context, the libraries' buffers and fragmentation
STAGES = (0, 1, 2, 3)


class GPU(NamedTuple):
    """By the vendor's data sheet: dense rate in its precision, memory, power, multiprocessors, a
    part of torch's name, what run.precision "auto" becomes on it, and the rate of fp32 where that
    is bf16: without TF32, which torch takes only where a program asks for it, as none here does."""

    tflops: float
    memory_gb: float
    watts: float
    multiprocessors: int
    name: str
    precision: str = "bf16"
    fp32_tflops: float = math.nan

    def rate(self, precision: str) -> float:
        """TFLOP/s."""
        return self.tflops if precision == self.precision else self.fp32_tflops


# fp32: NVIDIA's data sheets of the A100, H100 SXM, H200 SXM, HGX B200 (a GPU's part) and L40S, and
# the white paper of the Ada architecture.
GPUS = {
    "a100-40": GPU(312, 40, 400, 108, "A100", fp32_tflops=19.5),
    "a100-80": GPU(312, 80, 400, 108, "A100", fp32_tflops=19.5),
    "h100": GPU(989, 80, 700, 132, "H100", fp32_tflops=67),
    "h200": GPU(989, 141, 700, 132, "H200", fp32_tflops=67),
    "b200": GPU(2250, 180, 1000, 148, "B200", fp32_tflops=75),
    "l40s": GPU(362, 48, 350, 142, "L40S", fp32_tflops=91.6),
    "4090": GPU(165, 24, 450, 128, "4090", fp32_tflops=82.6),
    "t4": GPU(8.1, 16, 70, 40, "T4", "fp32"),
    "2080ti": GPU(13.4, 11, 250, 68, "2080 Ti", "fp32"),
}


# --- memory


class KeptAttention(torch.autograd.Function):
    """Attention that keeps for its backward what a fused kernel keeps: q, k, v, the output and a
    number a query, not the map. It has no backward: nothing is computed here."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.clone()
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def autocast(device_type: str, *args, **kwargs) -> contextlib.AbstractContextManager:
    """torch.autocast, but for the meta device, which it refuses and where nothing is cast."""
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.amp.autocast(device_type, *args, **kwargs)


def as_on_a_gpu(networks: JEPA) -> Iterator[contextlib.AbstractContextManager]:
    """Patches, within which the networks keep what a fused attention keeps and, of VICReg at each
    position, what our kernels keep."""
    yield mock.patch.object(F, "scaled_dot_product_attention", KeptAttention.apply)
    yield mock.patch.object(block, "attend_packed", lambda *a: KeptAttention.apply(*a[:3]))
    for part in networks.modules():
        if isinstance(part, Attention):
            yield mock.patch.object(part, "backend", "sdpa")
    yield mock.patch.object(positions, "use_kernel", lambda *_: True)


def kept_bytes(networks: JEPA, batch: tuple, fused_attention: bool) -> int:
    """Bytes that one micro-batch's forward keeps for its backward, beside the parameters.

    Runs the networks on the device of the batch: images, context and target indices, the target
    encoder's tokens, and SIGReg's directions where the loss takes them. fused_attention: see
    as_on_a_gpu; the batch is then on the meta device.
    """
    saved = SavedActivations(networks)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch, "autocast", autocast))
        for patch in as_on_a_gpu(networks) if fused_attention else ():
            patches.enter_context(patch)
        patches.enter_context(saved.counting())
        networks(*batch)
    return saved.bytes


def gradient_bytes(trained: int, low: bool, stage: int, count: int, summed: bool) -> float:
    """What one of `count` GPUs holds of the gradients; low: in bf16; summed: over micro-batches.

    DeepSpeed's update takes fp32 gradients; one GPU's, without it, reads them as they are. ZeRO 2
    and 3 keep sums of bf16 gradients in fp32 (engines/zero.py): 2 updates from these themselves,
    3 from a copy (DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py).
    """
    share = trained / (count if stage >= 2 else 1)
    if not low or count == 1:
        return share * (2 if low else 4)
    if stage >= 2 and summed:
        return share * (4 if stage == 2 else 8)
    return 2 * share + 4 * trained / (count if stage >= 1 else 1)


def static_bytes(
    trained: int, encoder: int, precision: str, stage: int, count: int, summed: bool = False
) -> dict[str, float]:
    """By part, what one of `count` GPUs holds whatever the batch; numbers of parameters given.

    ZeRO 1 shares the optimiser's state, 2 also the gradients, 3 also the weights and the EMA's
    working copy. Our EMA is shared with the masters. summed: a step has several micro-batches.
    """
    number = {"bf16": 2, "fp32": 4}[precision]
    low = precision == "bf16"
    state = count if stage >= 1 else 1
    return {
        "weights": trained * number / (count if stage == 3 else 1),
        "gradients": gradient_bytes(trained, low, stage, count, summed),
        "fp32 masters": 4 * trained / state if low else 0.0,
        "Adam's moments": 8 * trained / state,
        "EMA": 4 * encoder / state,
        "its working copy": number * encoder / (count if stage == 3 else 1),
    }


class Plan(NamedTuple):
    """What a run of this configuration takes of each GPU, in bytes, by part."""

    static: dict[str, float]
    per_image: float
    trained: int

    def total(self, images: int) -> float:
        return sum(self.static.values()) + self.per_image * images


def plans(config: Config, count: int) -> dict[int, Plan]:
    """By ZeRO stage, what a run of the configuration on `count` GPUs takes."""
    with torch.device("meta"):
        networks = build.build_networks(config)
    counts = [sum(p.numel() for p in part.parameters() if p.requires_grad)
              for part in (networks, networks.encoder)]  # fmt: skip
    networks.to(build.compute_dtype(config))
    per_image, precision = kept_per_image(networks, config), config.run.precision
    summed = config.data.micro_batches(count)[1] > 1
    return {
        stage: Plan(static_bytes(*counts, precision, stage, count, summed), per_image, counts[0])
        for stage in STAGES
    }


def kept_per_image(networks: JEPA, config: Config) -> float:
    """Bytes an image, at the masks of a micro-batch as the configuration has it."""
    images = config.data.micro_batch_size
    masks = build.first_masks(config, images)
    batch = *meta_batch(config, masks), *build.meta_directions(config)
    return kept_bytes(networks, batch, fused_attention=True) / images


def largest_batch(found: Plan, gpu: GPU) -> int:
    """Images a GPU that fit, 0 where the static part alone does not."""
    room = USABLE * gpu.memory_gb * 1e9 - sum(found.static.values())
    return max(0, int(room // found.per_image))


# --- time


def gflop_per_image(config: Config) -> tuple[float, float]:
    """What is counted, and what the backward recomputes beside."""
    masks = build.first_masks(config, config.data.micro_batch_size)
    M, P = masks.target_idx_BMP.shape[1:]
    sizes = counted_sizes(config, masks.context_k, M, P)
    again = recomputed_gflop(config.model.checkpointing, sizes)
    return step_gflop(sizes)["total"], again


class Speed(NamedTuple):
    """The share of the GPU's rate that a step reaches, its range, and what says so; and the memory
    of the measured step, in words."""

    mfu: float
    low: float
    high: float
    source: str
    joules_per_image: float | None = None
    memory: str = ""

    @property
    def measured(self) -> bool:
        return self.low == self.high


def speed(config: Config, name: str, gpu: GPU, count: int, measured: Path = MEASURED) -> Speed:
    """Measured where a row is of this very step: the same settings, precision, images, GPU and
    count of GPUs. Else derived from the row of this configuration on this GPU whose images are the
    nearest, or assumed; the ranges of both are a judgement."""
    rows = [
        row
        for row in json.loads(measured.read_text(encoding="utf-8"))
        if row["config"] == Path(name).stem and gpu.name in row["device"]
    ]
    # A user's own file of that name may be of anything.
    shipped = str(configuration.configs_folder() / f"{Path(name).stem}.json")
    images, own = config.data.batch_size, _step(config)
    for row in rows:
        same = (row["precision"], row["batch"], row["processes"]) == (
            config.run.precision, images, count
        )  # fmt: skip
        if same and _step(on_gpu(configuration.load(shipped, row["overrides"]), gpu)) == own:
            mfu, source = row["mfu_pct"] / 100, f"measured, {row['commit']}"
            return Speed(mfu, mfu, mfu, source, row["joules_per_image"], _memory(row))
    alike = [row for row in rows if row["precision"] == config.run.precision]
    if not alike or config.model != configuration.load(shipped).model:
        return Speed(*ASSUMED_MFU, "assumed: nothing like it has been measured")
    row = min(alike, key=lambda row: abs(row["batch"] - images // count))
    mfu = row["mfu_pct"] / 100
    said = f"derived: {100 * mfu:.1f} % measured of {_step_of(row)}"
    return Speed(mfu, *(mfu * x for x in DERIVED), said, None, _memory(row))


def _step_of(row: dict) -> str:
    how = ", ".join(row["overrides"]) or "as shipped"
    return f"{row['batch']} images on {row['processes']} x {row['device']}, {how}"


def _memory(row: dict) -> str:
    """In GB, as the plan is; torch counts in GiB."""
    if not (gib := row.get("peak_gib")):
        return ""
    reserved = f"measured: torch reserved {gib * 2**30 / 1e9:.1f} GB ({gib:.1f} GiB)"
    return f"{reserved} for {_step_of(row)}, at commit {row['commit']}"


def _step(config: Config) -> tuple:
    """What a step's time depends on, beside the images."""
    run = config.run
    how = run.precision, run.compile, run.cuda_graph, run.target_stream, run.weight_stream
    how += (run.dependent_launch,)
    data = config.data
    own = data.image_size, data.channels, data.micro_batch_size, config.optim.implementation
    parts = config.mask, config.model, config.predictor, config.loss
    return *how, *own, *parts, json.dumps(config.deepspeed, sort_keys=True)


def measured_rows(rows: list[dict]) -> list[dict]:
    """The rows of bench/results/throughput.json that measured.json holds: of a GPU whose rate is
    known, and whose step a configuration gives (`also`: what no key sets)."""
    kept = (
        "config", "overrides", "precision", "batch", "processes", "joules_per_image", "peak_gib",
        "commit",
    )  # fmt: skip
    return [
        {**{key: row.get(key) for key in kept}, "device": row["hardware"]["device"],
         "mfu_pct": row["mfu_sheet_pct"]}
        for row in rows
        if row.get("config") and row.get("mfu_sheet_pct") and not row.get("also")
    ]  # fmt: skip


def on_gpu(config: Config, gpu: GPU) -> Config:
    """The configuration as a run on that GPU has it, whatever this machine is.

    Raises ConfigError for bf16 where the GPU's rate is of fp32.
    """
    precision = config.run.precision
    if precision == "auto":
        precision = gpu.precision
    if precision == "bf16" != gpu.precision:
        raise ConfigError(f'run.precision = "bf16": {gpu.name} multiplies none; take "auto"')
    run = config.run.model_copy(update={"precision": precision})
    return config.model_copy(update={"run": run})


def describe(args: argparse.Namespace, config: Config) -> str:
    gpu = GPUS[args.gpu]
    config = on_gpu(config, gpu)
    micro_batch, accumulation = config.data.micro_batches(args.count)
    gflop, again = gflop_per_image(config)
    stages = plans(config, args.count)
    zero = config.deepspeed.get("zero_optimization", {})
    own = zero.get("stage") or 0
    found = speed(config, args.config, gpu, args.count)
    lines = [
        f"{args.config} on {args.count} x {args.gpu}: {stages[0].trained / 1e6:.0f} M trained "
        f"parameters, {gflop:.1f} GFLOP an image, {micro_batch} images a GPU x {accumulation}",
        verdict(stages, own, gpu, micro_batch),
        *not_counted(zero),
        "",
        *memory_table(stages, own, gpu, micro_batch),
        *([found.memory] if found.memory else []),
        "",
        *cost(args, config, gpu, found, gflop, again),
    ]
    return "\n".join(lines)


def verdict(plans: dict[int, Plan], own: int, gpu: GPU, micro_batch: int) -> str:
    """Whether the configuration fits, and if not what to change."""
    room, needed = USABLE * gpu.memory_gb, plans[own].total(micro_batch) / 1e9
    of = f"{needed:.1f} GB of each GPU's {room:.1f} usable, at ZeRO stage {own}"
    if needed <= room:
        return f"fits: {of}; up to {largest_batch(plans[own], gpu)} images a GPU would"
    ways = []
    if most := largest_batch(plans[own], gpu):
        ways.append(f"data.micro_batch_size={most} or less")
    if stage := next((s for s in STAGES if plans[s].total(micro_batch) / 1e9 <= room), None):
        ways.append(f"deepspeed.zero_optimization.stage={stage}")
    ways.append("model.checkpointing, more GPUs, or a smaller model" if ways else
                "more GPUs with ZeRO stage 3, or a smaller model")  # fmt: skip
    return f"does not fit, because it takes {of}: try {'; '.join(ways)}"


def not_counted(zero: dict) -> list[str]:
    """What of DeepSpeed's zero_optimization moves memory between a GPU and elsewhere."""
    fewer = [key for key in ("offload_optimizer", "offload_param") if zero.get(key)]
    more = [key for key in ("zero_hpz_partition_size",) if zero.get(key, 1) not in (1, "auto")]
    lines = [f"{key} is not counted: it takes less of the GPU than said here" for key in fewer]
    return lines + [f"{key} is not counted: it takes more than said here" for key in more]


def memory_table(plans: dict[int, Plan], own: int, gpu: GPU, micro_batch: int) -> list[str]:
    """A column a ZeRO stage, the configuration's own marked with a *."""
    heads = [f"{stage}{'*' if stage == own else ''}" for stage in STAGES]

    def row(name: str, cells: list[str]) -> str:
        return f"{name:22s}" + "".join(f"{cell:>10s}" for cell in cells)

    def sizes(name: str, size: Callable[[Plan], float]) -> str:
        return row(name, [f"{size(found) / 1e9:.2f}" for found in plans.values()])

    return [
        f"GB of each GPU's {gpu.memory_gb:g}, predicted: counted, not measured "
        "(*: as the configuration has it)",
        row("ZeRO stage", heads),
        *(sizes(part, lambda found, part=part: found.static[part]) for part in plans[0].static),
        sizes("saved for backward", lambda found: found.per_image * micro_batch),
        sizes("in all", lambda found: found.total(micro_batch)),
        row("largest batch a GPU", [str(largest_batch(found, gpu)) for found in plans.values()]),
    ]


def cost(
    args: argparse.Namespace, config: Config, gpu: GPU, found: Speed, gflop: float, again: float
) -> list[str]:
    """Speed, time and energy, each with its range; the source of all of them in the first line."""
    steps_per_epoch = max(args.images // config.data.batch_size, 1)
    epochs = args.epochs or configuration.with_epochs(config, steps_per_epoch).run.epochs
    images = epochs * args.images
    # A measured share is of the counted work alone; of another, recomputing takes its part.
    work = gflop if found.measured else gflop + again
    peak = args.count * gpu.rate(config.run.precision) * 1e3 / work
    hours = [images / (share * peak) / 3600 for share in (found.mfu, found.high, found.low)]
    joules = found.joules_per_image
    kwh = [images * joules / 3.6e6] if joules else [h * args.count * gpu.watts / 1e3 for h in hours]
    watts = "" if joules else f", at the boards' {gpu.watts:g} W"
    rate = [share * peak for share in (found.mfu, found.low, found.high)]

    def line(name: str, values: list[float], digits: int, note: str = "") -> str:
        range_ = "" if found.measured else f"({values[1]:,.{digits}f} to {values[2]:,.{digits}f})"
        return f"{name:15s}{values[0]:>12,.{digits}f}  {range_:22s}{note}".rstrip()

    shares = [100 * share * gflop / work for share in (found.mfu, found.low, found.high)]
    several = "" if args.count == 1 else "the exchange of gradients not counted"
    return [
        line("MFU, %", shares, 1, found.source),
        f"{'recomputed':15s}{again:12.1f}  {'':22s}GFLOP an image, by model.checkpointing",
        *wave_messages(config, gpu, args.count),
        line("images/s", rate, 0, several),
        line("hours", hours, 1, f"{images // args.images} epochs of {args.images:,} images"),
        line("GPU-hours", [h * args.count for h in hours], 0),
        line("kWh", kwh, 0, watts.removeprefix(", ")),
    ]


def wave_messages(config: Config, gpu: GPU, count: int = 1) -> list[str]:
    """How the lengths of "fixed" fill the multiprocessors in a micro-batch of one of `count` GPUs;
    nothing of what varies by the batch."""
    if config.mask.context != "fixed":
        return []
    images, _ = config.data.micro_batches(count)
    masks = build.first_masks(config, 1)
    K, (M, P) = int(masks.context_k), masks.target_idx_BMP.shape[1:]
    sizes = counted_sizes(config, K, M, P)
    said = waves.describe(images, sizes, gpu.multiprocessors, config.mask.min_keep)
    return [f"{'waves':15s}{said}"]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="cjepa-plan", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="here or in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--gpu", choices=GPUS, required=True)
    parser.add_argument("--count", type=int, default=1, help="of GPUs")
    parser.add_argument("--images", type=int, default=IMAGENET, help="of the set")
    parser.add_argument("--epochs", type=int, help="default: the configuration's")
    args = parser.parse_args(argv)
    for name in ("count", "images", "epochs"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        print(describe(args, configuration.load(args.config, args.overrides)))
    except (ConfigError, ValueError) as error:
        say(f"error: {printable_lines(error)}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
