"""Train a tiny C-JEPA for a few steps and print what came out, as one JSON line on rank 0.

engine_worker.py STAGE PRECISION STEPS FOLDER [OPTION ...]: save=STEP resume nan=STEP kernels
adam=NAME full. STAGE is ZeRO's, or "local" for the engine without DeepSpeed. The global batch of
each step is the same for every number of processes. With `kernels` the Triton kernels run, in the
interpreter. With `full` the blocks are computed again in the backward, from weights that stage 3
has given up in between.
"""

import contextlib
import copy
import json
import sys
from pathlib import Path

import tiny
import torch
import torch.distributed as dist

from cjepa_fast import checkpoint, engine, optim
from cjepa_fast.jepa import JEPA
from cjepa_fast.kernels import launch
from cjepa_fast.local import LocalEngine
from cjepa_fast.loss import CJEPALoss
from cjepa_fast.predictor import Predictor
from cjepa_fast.vit import Encoder

BATCH, ACCUMULATION = 8, 2


def batch_of(step: int, micro: int) -> list[torch.Tensor]:
    """Images, context and target indices of a whole micro-batch of all processes."""
    g = torch.Generator().manual_seed(1000 * step + micro)

    def choose(k: int) -> torch.Tensor:
        return torch.randperm(16, generator=g)[:k]

    images = torch.randn(BATCH, 3, 32, 32, generator=g)
    context = torch.stack([choose(5) for _ in range(BATCH)])
    targets = torch.stack([torch.stack([choose(4) for _ in range(2)]) for _ in range(BATCH)])
    return [images, context, targets]


def build(stage: str, precision: str, adam: str, full: bool) -> engine.Engine | LocalEngine:
    world = engine.world_size()
    recompute = {"checkpointing": "full" if full else "none"}
    encoder = Encoder(32, 8, 24, 2, 3, **recompute)
    group = dist.group.WORLD if world > 1 else None
    # A strong VICReg term, so that statistics of a part of the batch could not go unseen.
    predictor = Predictor(24, encoder.grid, 12, 1, 3, **recompute)
    network = JEPA(encoder, predictor, CJEPALoss(beta=0.1, group=group))
    parts = network, copy.deepcopy(encoder), optim.parameter_groups(network)
    options = {"accumulation": ACCUMULATION, "precision": precision, "clip": 0.5}
    if stage == "local":
        return LocalEngine(*parts, **options)
    zero = {"stage": int(stage)} | ({"stage3_param_persistence_threshold": 0} if full else {})
    settings = {"zero_optimization": zero}
    return engine.Engine(
        *parts, settings, micro_batch=BATCH // world, implementation=adam, **options
    )


def whole_weights(made: engine.Engine | LocalEngine) -> dict[str, list[float]]:
    """All fp32 values, gathered from their owners: a checksum a kind that keeps every digit."""
    sums = {"master": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0, "ema": 0.0}
    for owned in made.state():
        for kind, values in {"master": owned.master.values, **owned.moments}.items():
            sums[kind] += values.double().abs().sum()
    for fragment in made.ema.fragments:
        sums["ema"] += fragment.values.double().abs().sum()
    totals = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64)
    if made.sharded:
        dist.all_reduce(totals)
    return dict(zip(sums, totals.tolist(), strict=True))


def main() -> None:
    stage, precision, steps, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    options = dict(option.partition("=")[::2] for option in sys.argv[5:])
    engine.start(seed=0)
    made = build(stage, precision, options.get("adam", "fused"), "full" in options)
    target = made.ema.module
    masters = torch.cat([owned.master.values for owned in made.state()])
    rounded = torch.equal(masters, masters.bfloat16().float())
    rank, share = engine.rank(), BATCH // engine.world_size()
    start = 0
    if "resume" in options:
        start = checkpoint.restore(checkpoint.latest(Path(folder)), made)["step"]
    seen = []
    for step in range(start, steps):
        losses = []
        for micro in range(ACCUMULATION):
            images, context, targets = (
                x[rank * share : (rank + 1) * share] for x in batch_of(step, micro)
            )
            images = images.to(next(target.parameters()).dtype)
            if options.get("nan") == str(step) and rank == engine.world_size() - 1:
                images[0] = float("nan")
            with torch.no_grad():
                tokens = target(images)
            terms = made(images, context, targets, tokens)
            made.backward(terms["loss"])
            applied = made.step(lr=1e-2, weight_decay=0.1, momentum=0.9)
            losses.append(engine.mean_over_ranks({"loss": terms["loss"].detach()})["loss"].item())
        seen.append([sum(losses) / ACCUMULATION, float(made.grad_norm), bool(applied)])
        if options.get("save") == str(step + 1):
            tiny.save(Path(folder), made, step + 1)
    sums = whole_weights(made)
    if rank == 0:
        facts = {"adam": made.optimizer_step(), "rounded": rounded}
        print(json.dumps({"steps": seen, "sums": sums, **facts}))
    engine.part()


if __name__ == "__main__":
    with launch.interpreted() if "kernels" in sys.argv else contextlib.nullcontext():
        main()
    engine.leave(0)
