"""run.compile: the same losses, and no more compilations than the lengths need."""

import pytest
import tiny
import torch
import torch._dynamo
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from cjepa_fast.config import validate
from cjepa_fast.data.loader import Batch
from cjepa_fast.model.block import Block
from cjepa_fast.runtime import distributed
from cjepa_fast.training import build
from cjepa_fast.training.trainer import Trainer

STEPS = 5


def losses(
    context: str, how: str, depth: int, checkpointing: str = "none", mode: str = "per_target"
) -> tuple[list[float], int]:
    """Of a few steps, and the number of graphs compiled (by a backend that only traces)."""
    sections = {
        "run": {"precision": "fp32"},
        "data": tiny.CONFIG["data"] | {"batch_size": 8},
        "mask": {"min_keep": 4, "context": context},
        # blocks share their graphs; in a whole network each would be traced anew
        "model": tiny.CONFIG["model"] | {"checkpointing": checkpointing, "depth": depth},
        "predictor": tiny.CONFIG["predictor"] | {"mode": mode},
        "optim": {"warmup_epochs": 0, "lr": 0.01},
    }
    config = validate(tiny.CONFIG | sections)
    torch.manual_seed(0)
    trainer = Trainer(config, distributed.start(0), steps_per_epoch=10)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    networks, target = trainer.engine.module, trainer.ema.module
    build.compile_networks(networks, target, how, backend="aot_eager")
    masks, found = build.build_masks(config), []
    for index in range(STEPS):
        images = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(index))
        drawn = masks(0, index, torch.arange(8) + 8 * index)
        terms, _ = trainer.step([Batch(images, drawn, torch.arange(8), 0, index, 0)], index)
        found.append(terms["loss"].item())
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], dict(counters["graph_break"])
    return found, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("context", "how", "most", "options"),
    [
        ("fixed", "whole", 2, ()),
        pytest.param("packed", "whole", 2, (), marks=pytest.mark.long),
        pytest.param("random", "blocks", 8, (), marks=pytest.mark.long),
        pytest.param("fixed", "blocks", 3, ("selective", "one_pass"), marks=pytest.mark.long),
    ],
)
def test_compiled_steps_are_the_same(context, how, most, options):
    depth = 1 if how == "whole" else 2
    eager, none = losses(context, "none", depth, *options)
    compiled, graphs = losses(context, how, depth, *options)
    assert none == 0 and 0 < graphs <= most
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert eager[-1] < eager[0]


def matmuls(policy: str, backend: str, last: int | None) -> tuple[list[int], list[torch.Tensor]]:
    """Matmuls of a compiled block's forward and backward graphs; output and gradients."""
    found = []

    def count(graph, inputs):
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        aten = torch.ops.aten
        found.append(sum(target in (aten.mm.default, aten.addmm.default) for target in called))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    torch.manual_seed(0)
    block, x = Block(16, 2, 4.0, backend, policy), torch.randn(2, 6, 16, requires_grad=True)
    partition = min_cut_rematerialization_partition
    block.compile(
        backend=aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=partition)
    )
    out = block(x, last)
    return found, [out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])]


@pytest.mark.parametrize(
    ("backend", "last"), [("plain", None), pytest.param("sdpa", 2, marks=pytest.mark.long)]
)
def test_a_compiled_block_runs_only_the_matmuls_of_its_policy_again(backend, last):
    """qkv, proj, fc1 and fc2, and apart the queries of a last block; two for each backward."""
    linears = 4 + (last is not None)
    wanted = {"none": 0, "norm_gelu": 0, "selective": 1, "full": linears - 1}
    _, plain = matmuls("none", backend, last)
    for policy, again in wanted.items():
        counts, results = matmuls(policy, backend, last)
        assert counts == [linears, 2 * linears + again], policy
        assert all(torch.equal(a, b) for a, b in zip(plain, results, strict=True)), policy
