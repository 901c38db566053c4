"""Memory, time and energy of a training before it is begun.

    cjepa-plan --config vit_h.json --gpu h200 --count 16
    cjepa-plan --config my.json --gpu a100-80 --count 8 --images 5000000 --epochs 100

Bytes of weights, gradients and optimiser follow from the parameters; those kept for the backward
are counted by running the networks on torch's meta device, which computes nothing. What lives for a
moment within the backward, as a block's part that model.checkpointing recomputes, is not.
The speed is the counted work, and what is recomputed, over the data sheet's bf16 rate, at the
share of it that bench/throughput.py has measured for this configuration on this GPU
(measured.json), else at an assumed one ("predicted").
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from cjepa_fast import config as configuration
from cjepa_fast.config import Config, ConfigError
from cjepa_fast.model import block
from cjepa_fast.model.block import Attention
from cjepa_fast.model.flops import recomputed_gflop, step_gflop
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.runtime.memory import SavedActivations
from cjepa_fast.runtime.printable import printable_lines
from cjepa_fast.training import build

MEASURED = Path(__file__).with_name("measured.json")
IMAGENET = 1_281_167
ASSUMED_MFU = 0.40
USABLE = 0.92  # of a GPU's memory, beside the context, the libraries' buffers and fragmentation
STAGES = (0, 1, 2, 3)


class GPU(NamedTuple):
    """By the vendor's data sheet: dense rate in its precision, memory, power, a part of torch's
    name, and what run.precision "auto" becomes on it."""

    tflops: float
    memory_gb: float
    watts: float
    name: str
    precision: str = "bf16"


GPUS = {
    "a100-40": GPU(312, 40, 400, "A100"),
    "a100-80": GPU(312, 80, 400, "A100"),
    "h100": GPU(989, 80, 700, "H100"),
    "h200": GPU(989, 141, 700, "H200"),
    "b200": GPU(2250, 180, 1000, "B200"),
    "l40s": GPU(362, 48, 350, "L40S"),
    "4090": GPU(165, 24, 450, "4090"),
    "t4": GPU(8.1, 16, 70, "T4", "fp32"),
    "2080ti": GPU(13.4, 11, 250, "2080 Ti", "fp32"),
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


def kept_bytes(networks: JEPA, batch: tuple, fused_attention: bool) -> int:
    """Bytes that one micro-batch's forward keeps for its backward, beside the parameters.

    Runs the networks on the device of the batch: images, context and target indices and the target
    encoder's tokens.
    """
    saved = SavedActivations(networks)
    with contextlib.ExitStack() as patches:
        if fused_attention:
            fused = mock.patch.object(F, "scaled_dot_product_attention", KeptAttention.apply)
            patches.enter_context(fused)
            packed = mock.patch.object(
                block, "attend_packed", lambda *a: KeptAttention.apply(*a[:3])
            )
            patches.enter_context(packed)
            for part in networks.modules():
                if isinstance(part, Attention):
                    patches.enter_context(mock.patch.object(part, "backend", "sdpa"))
        patches.enter_context(saved.counting())
        networks(*batch)
    return saved.bytes


def static_bytes(trained: int, encoder: int, precision: str, stage: int, count: int) -> dict:
    """By part, what one of `count` GPUs holds whatever the batch; numbers of parameters given.

    ZeRO 1 shares the optimiser's state, 2 also the gradients, 3 also the weights and the EMA's
    working copy. Our EMA is shared with the masters. DeepSpeed's update takes fp32
    gradients; one GPU's, without it, reads them as they are.
    """
    number = {"bf16": 2, "fp32": 4}[precision]
    low = precision == "bf16"
    state = count if stage >= 1 else 1
    gradients = trained * number / (count if stage >= 2 else 1)
    return {
        "weights": trained * number / (count if stage == 3 else 1),
        "gradients": gradients + (4 * trained / state if low and count > 1 else 0),
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


def plan(config: Config, stage: int, count: int) -> Plan:
    with torch.device("meta"):
        networks = build.build_networks(config)
    counts = [sum(p.numel() for p in part.parameters() if p.requires_grad)
              for part in (networks, networks.encoder)]  # fmt: skip
    networks.to(build.compute_dtype(config))
    per_image = kept_per_image(networks, config)
    return Plan(static_bytes(*counts, config.run.precision, stage, count), per_image, counts[0])


def kept_per_image(networks: JEPA, config: Config) -> float:
    """Bytes an image, at the masks of a micro-batch as the configuration has it."""
    images = config.data.micro_batch_size
    return kept_bytes(networks, build.meta_batch(config, images), fused_attention=True) / images


def largest_batch(found: Plan, gpu: GPU) -> int:
    """Images a GPU that fit, 0 where the static part alone does not."""
    room = USABLE * gpu.memory_gb * 1e9 - sum(found.static.values())
    return max(0, int(room // found.per_image))


# --- time


def gflop_per_image(config: Config) -> tuple[float, float]:
    """What is counted, and what the backward recomputes beside."""
    masks = build.build_masks(config)(0, 0, torch.arange(config.data.micro_batch_size))
    M, P = masks.target_idx_BMP.shape[1:]
    sizes = build.counted_sizes(config, masks.context_k, M, P)
    again = recomputed_gflop(config.model.checkpointing, **sizes)
    return step_gflop(**sizes)["total"], again


def utilisation(name: str, gpu: GPU, measured: Path = MEASURED) -> tuple[float, str]:
    """The share of the bf16 rate that this configuration reaches, and where that is from."""
    found = [
        row["mfu_pct"] / 100
        for row in json.loads(measured.read_text())
        if row["config"] == Path(name).stem and gpu.name in row["device"]
    ]
    return (max(found), "measured") if found else (ASSUMED_MFU, "predicted")


def measured_shares(rows: list[dict]) -> list[dict]:
    """Of bench/results/throughput.json's rows what measured.json holds: the best MFU by
    configuration and device, where the device's rate is known."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.get("config") and row.get("mfu_sheet_pct"):
            key = row["config"], row["hardware"]["device"]
            best[key] = max(best.get(key, 0.0), row["mfu_sheet_pct"])
    return [
        {"config": config, "device": device, "mfu_pct": share}
        for (config, device), share in sorted(best.items())
    ]


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
    share, source = utilisation(args.config, gpu)
    gflop, again = gflop_per_image(config)
    epochs = args.epochs or config.run.epochs
    images_per_s = args.count * share * gpu.tflops * 1e3 / (gflop + again)
    hours = epochs * args.images / images_per_s / 3600
    micro_batch, accumulation = config.data.micro_batches(args.count)
    plans = {stage: plan(config, stage, args.count) for stage in STAGES}
    lines = [
        f"{args.config} on {args.count} x {args.gpu}: {plans[0].trained / 1e6:.0f} M trained "
        f"parameters, {gflop:.1f} GFLOP an image, {micro_batch} images a GPU x {accumulation}",
        "",
        f"GB of each GPU's {gpu.memory_gb:g}, predicted",
        "".join([f"{'ZeRO stage':20s}", *(f"{stage:>10d}" for stage in STAGES)]),
    ]
    for part in plans[0].static:
        cells = (f"{found.static[part] / 1e9:10.2f}" for found in plans.values())
        lines.append(f"{part:20s}{''.join(cells)}")
    kept = (f"{found.per_image * micro_batch / 1e9:10.2f}" for found in plans.values())
    lines.append(f"{'saved for backward':20s}{''.join(kept)}")
    totals = (f"{found.total(micro_batch) / 1e9:10.2f}" for found in plans.values())
    lines.append(f"{'in all':20s}{''.join(totals)}")
    largest = (f"{largest_batch(found, gpu):10d}" for found in plans.values())
    lines.append(f"{'largest batch':20s}{''.join(largest)}")
    own = config.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if plans[own].total(micro_batch) > USABLE * gpu.memory_gb * 1e9:
        lines.append(f"does not fit with ZeRO stage {own}, which the configuration asks for")
    lines += [
        "",
        f"MFU            {100 * share:10.1f} %  {source}",
        f"recomputed     {again:10.1f}    predicted, GFLOP an image, by model.checkpointing",
        f"images/s       {images_per_s:10.0f}    {source}; the exchange of gradients not counted",
        f"hours          {hours:10.1f}    {source}: {epochs} epochs of {args.images:,} images",
        f"GPU-hours      {hours * args.count:10.0f}    {source}",
        f"kWh            {hours * args.count * gpu.watts / 1e3:10.0f}    {source}, at the boards' "
        f"{gpu.watts:g} W",
    ]
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cjepa-plan", description=__doc__.split("\n")[0])
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
        print(f"error: {printable_lines(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
