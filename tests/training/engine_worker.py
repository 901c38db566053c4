"""Train a tiny C-JEPA for a few steps and print what came out, as one JSON line a run on rank 0.

engine_worker.py RUN[,RUN ...] STEPS FOLDER [OPTION ...]: save=STEP resume again nan=STEP
spike=STEP weight=STEP kernels adam=NAME full zero=JSON bug=NAME. A RUN is STAGE:PRECISION. STAGE is
ZeRO's, "3offload" with the optimiser's state on the CPU, or "local" for the engine without
DeepSpeed. The global batch of each step is the same for every number of ranks. With `again` the
run goes back, in the end, to what it saved. With `kernels` the Triton kernels run, in the
interpreter. With `full` the blocks are recomputed in the backward, from weights that stage 3
has given up in between. `zero` is laid over DeepSpeed's zero_optimization. Bugs: "local" statistics
of VICReg, gradients "scale"d by the ranks.
"""

import contextlib
import copy
import itertools
import json
import math
import sys
from pathlib import Path

import fast_interpreter
import tiny
import torch

from cjepa_fast import checkpoint
from cjepa_fast.checkpoint.owned import Fragment
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.loss import CJEPALoss
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import distributed
from cjepa_fast.training import optim
from cjepa_fast.training.engines.single import SingleEngine
from cjepa_fast.training.engines.zero import DTYPES, MOMENTS, ZeroEngine

BATCH, ACCUMULATION = 8, 2


def batch_of(step: int, micro: int) -> list[torch.Tensor]:
    """Images, context and target indices of a whole micro-batch of all ranks."""
    g = torch.Generator().manual_seed(1000 * step + micro)

    def choose(k: int) -> torch.Tensor:
        return torch.randperm(16, generator=g)[:k]

    images = torch.randn(BATCH, 3, 32, 32, generator=g)
    context = torch.stack([choose(5) for _ in range(BATCH)])
    targets = torch.stack([torch.stack([choose(4) for _ in range(2)]) for _ in range(BATCH)])
    return [images, context, targets]


def build(stage: str, precision: str, options: dict) -> ZeroEngine | SingleEngine:
    world = distributed.world_size()
    recompute = {"checkpointing": "full" if "full" in options else "none"}
    torch.manual_seed(0)
    encoder = Encoder(32, 8, 24, 2, 3, **recompute)
    ranks = distributed.AllRanks() if world > 1 and options.get("bug") != "local" else None
    # A strong VICReg term, so that statistics of a part of the batch could not go unseen.
    predictor = Predictor(24, encoder.grid, 12, 1, 3, **recompute)
    network = JEPA(encoder, predictor, CJEPALoss(beta=0.1, ranks=ranks))
    parts = network, copy.deepcopy(encoder), optim.parameter_groups(network)
    settings = {"accumulation": ACCUMULATION, "precision": precision, "clip": 0.5}
    if stage == "local":
        return SingleEngine(*parts, **settings)
    zero = {"stage": int(stage[0])}
    if "full" in options:
        zero["stage3_param_persistence_threshold"] = 0
    if "offload" in stage:
        zero["offload_optimizer"] = {"device": "cpu"}
    adam = options.get("adam", "fused")
    zero = {"zero_optimization": zero | json.loads(options.get("zero", "{}"))}
    return ZeroEngine(*parts, zero, micro_batch=BATCH // world, implementation=adam, **settings)


def whole(fragments: list[Fragment]) -> dict[str, torch.Tensor]:
    """Every parameter's values, put together from all ranks' fragments."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    own = [(f.name, f.start, f.values.cpu()) for f in fragments]
    for name, start, values in itertools.chain(*distributed.all_gather_objects(own)):
        pieces.setdefault(name, {})[start] = values
    return {name: torch.cat([found[at] for at in sorted(found)]) for name, found in pieces.items()}


def kinds(made: ZeroEngine | SingleEngine) -> dict[str, dict[str, torch.Tensor]]:
    """All fp32 values by kind and parameter."""
    state = made.state()
    moments = {
        kind: whole([owned.master._replace(values=owned.moments[kind]) for owned in state])
        for kind in MOMENTS
    }
    masters = whole([owned.master for owned in state])
    return {"master": masters, **moments, "ema": whole(made.ema.fragments)}


def working_copy(target: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The target's weights as its forward has them, gathered under ZeRO-3."""
    weights = dict(target.named_parameters())
    shared_out = [p for p in weights.values() if hasattr(p, "ds_tensor")]
    gathered = contextlib.nullcontext()
    if shared_out:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(shared_out)
    with gathered:
        return {name: p.detach().flatten().cpu().clone() for name, p in weights.items()}


def train(stage: str, precision: str, steps: int, folder: Path, options: dict) -> dict:
    made = build(stage, precision, options)
    target = made.ema.module
    dtype = DTYPES[precision]
    masters = torch.cat([owned.master.values for owned in made.state()])
    rounded = torch.equal(masters, masters.bfloat16().float())
    rank, share = distributed.rank(), BATCH // distributed.world_size()
    start, exact, seen = 0, True, []
    if "resume" in options:
        start = checkpoint.restore(checkpoint.latest(folder), made)["step"]
    ema = whole(made.ema.fragments)
    order = list(range(start, steps))
    if "again" in options:
        order += [-1, *range(int(options["save"]), steps)]
    for step in order:
        if step < 0:
            checkpoint.restore(checkpoint.latest(folder), made)
            ema = whole(made.ema.fragments)
            continue
        losses = []
        for micro in range(ACCUMULATION):
            images, context, targets = (
                x[rank * share : (rank + 1) * share] for x in batch_of(step, micro)
            )
            images = images.to(dtype)
            if options.get("weight") == str(step) and rank == distributed.world_size() - 1:
                p = made.module.encoder.norm.weight
                (p if p.numel() else p.ds_tensor).data[0] = float("nan")
            if options.get("nan") == str(step) and rank == distributed.world_size() - 1:
                images[0] = float("nan")
            with torch.no_grad():
                tokens = target(images)
            terms = made(images, context, targets, tokens)
            scale = distributed.world_size() if options.get("bug") == "scale" else 1
            if options.get("spike") == str(step):
                made.limit(loss=math.inf, grad_norm=1e-6)
            made.backward(terms["loss"] / scale)
            applied = made.step(lr=1e-2, weight_decay=0.1, momentum=0.9)
            losses.append(
                distributed.mean_over_ranks({"loss": terms["loss"].detach()})["loss"].item()
            )
        made.limit(loss=math.inf, grad_norm=math.inf)
        seen.append([sum(losses) / ACCUMULATION, float(made.grad_norm), bool(applied)])
        if applied:  # the EMA as one rank alone would keep it
            online = whole(made.masters("encoder."))
            for name, values in ema.items():
                values.lerp_(online[name], 1 - 0.9)
        if options.get("save") == str(step + 1):
            stored = checkpoint.StoredCheckpoint(tiny.save(folder, made, step + 1))
            exact &= all(torch.equal(stored.whole("ema", n), v) for n, v in ema.items())
    found = kinds(made)
    copies = working_copy(target)
    exact &= all(torch.equal(v, found["ema"][name]) for name, v in ema.items())
    exact &= all(torch.equal(v.to(dtype), copies[name]) for name, v in ema.items())
    sums = {
        kind: sum(float(v.double().abs().sum()) for v in values.values())
        for kind, values in found.items()
    }
    whole_copies = sum(p.numel() for p in target.parameters())
    facts = {"adam": made.optimizer_step(), "rounded": rounded, "average_exact": exact}
    return {"steps": seen, "sums": sums, "target_values_held": whole_copies, **facts}


def main() -> None:
    runs, steps, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    options = dict(option.partition("=")[::2] for option in sys.argv[4:])
    distributed.start(seed=0)
    for run in runs.split(","):
        stage, precision = run.split(":")
        result = train(stage, precision, steps, folder, options)
        if distributed.rank() == 0:
            print(json.dumps(result), flush=True)
    distributed.leave_group()


if __name__ == "__main__":
    with fast_interpreter.interpreted() if "kernels" in sys.argv else contextlib.nullcontext():
        main()
    distributed.leave(0)
