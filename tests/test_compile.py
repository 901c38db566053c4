"""run.compile: the same losses, and no more compilations than the lengths need."""

import pytest
import tiny
import torch
import torch._dynamo

from cjepa_fast import build, engine, train
from cjepa_fast.config import validate
from cjepa_fast.data.loader import Batch

STEPS = 5


def losses(context: str, how: str) -> tuple[list[float], int]:
    """Of a few steps, and the number of graphs compiled (by a backend that only traces)."""
    sections = {
        "run": {"precision": "fp32"},
        "data": tiny.CONFIG["data"] | {"batch_size": 8},
        "mask": {"min_keep": 4, "context": context},
        "optim": {"warmup_epochs": 0, "lr": 0.01},
    }
    config = validate(tiny.CONFIG | sections)
    torch.manual_seed(0)
    trainer = train.Trainer(config, engine.start(0), steps_per_epoch=10)
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
    ("context", "how", "most"),
    [
        ("fixed", "whole", 2),
        pytest.param("packed", "whole", 2, marks=pytest.mark.slow),
        ("random", "blocks", 8),
    ],
)
def test_compiled_steps_are_the_same(context, how, most):
    eager, none = losses(context, "none")
    compiled, graphs = losses(context, how)
    assert none == 0 and 0 < graphs <= most
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert eager[-1] < eager[0]
