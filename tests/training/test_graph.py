"""The recorded step: the same losses as the step itself, and nothing in it waits for the host."""

import contextlib
import itertools

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cjepa_fast import checkpoint
from cjepa_fast.checkpoint.writer import Saver
from cjepa_fast.config import ConfigError, validate
from cjepa_fast.data.loader import Batch
from cjepa_fast.data.masks import Masks
from cjepa_fast.kernels.gather import predictor, targets, tokens
from cjepa_fast.runtime import distributed
from cjepa_fast.training import build, dry_run
from cjepa_fast.training.engines import single
from cjepa_fast.training.engines.cuda_graph import WARM, Graphed
from cjepa_fast.training.trainer import Trainer

STEPS = WARM + 4


IN_FP8 = {"model": {"width": 48, "context_precision": "fp8"}, "precision": "bf16"}


def trainer_of(
    context: str = "fixed",
    attention: str = "sdpa",
    loss: dict | None = None,
    model: dict | None = None,
    micro_batch: int = 8,
    **run,
) -> tuple[Trainer, list[list[Batch]]]:
    """A tiny trainer with fixed shapes, and a few steps' batches on its device."""
    sections = {
        "run": run,
        "data": tiny.CONFIG["data"] | {"batch_size": 8, "micro_batch_size": micro_batch},
        "mask": {"min_keep": 4, "context": context},
        "optim": {"warmup_epochs": 0, "lr": 0.01, "clip": 1.0},
        "loss": loss or {},
    }
    # Not by trial: two trainings must not end up with two kernels for attention.
    sections["model"] = tiny.CONFIG["model"] | {"attention": attention} | (model or {})
    device = distributed.start(0)
    config = build.with_precision(validate(tiny.CONFIG | sections), device)
    trainer, masks = Trainer(config, device, steps_per_epoch=10), build.build_masks(config)
    dtype = build.compute_dtype(config)
    steps = []
    for index in range(STEPS):
        images = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(index))
        drawn = masks(0, index, torch.arange(8) + 8 * index).to(device)
        steps.append([Batch(images.to(device, dtype), drawn, torch.arange(8), 0, index, 0)])
    return trainer, steps


def test_every_call_sees_its_own_inputs(monkeypatch):
    """Warm calls, the recording and the replays: the recorded function reads the static tensors."""
    seen = []

    def function(x, masks, number):
        assert x is graphed.inputs[0] and number.dtype == torch.float64
        assert torch.equal(masks.context, x) and torch.equal(masks.target_idx_BMP, x + 1)
        seen.append((x.clone(), float(number)))
        return x.sum() * number

    graphed = Graphed(function, torch.device("cpu"))
    monkeypatch.setattr(graphed, "_beside", lambda: function(*graphed.inputs))
    monkeypatch.setattr(graphed, "_record", lambda: setattr(graphed, "graph", Replay()))

    class Replay:
        def replay(self):
            graphed.outputs = function(*graphed.inputs)

    for call in range(STEPS):
        x = torch.full((3,), call)
        result = graphed(x, Masks(x, x + 1), call / 8)
        assert result == 3 * call * call / 8
    assert [int(x[0]) for x, _ in seen] == list(range(STEPS))
    with pytest.raises(ValueError, match=r"\(3,\), not \(4,\)"):
        graphed(torch.zeros(4), Masks(x, x), 1.0)


def test_the_calls_before_a_recording_share_one_stream(monkeypatch):
    """Else the memory of each of them stays reserved, for a stream that is never used again."""
    made, used = [], []

    class Stream:
        def __init__(self):
            made.append(self)

        def wait_stream(self, other):
            pass

    here = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext(used.append(s)))
    graphed = Graphed(lambda x: x + 1, torch.device("cpu"))
    for _ in range(WARM):
        assert graphed(torch.zeros(1)) == 1
    assert made == [here, used[0]] and used == [used[0]] * WARM


@pytest.mark.parametrize(("recorded", "steps"), [(False, 3), (True, WARM + 3)])
def test_a_dry_run_goes_on_until_the_step_is_replayed(recorded, steps):
    config = validate({"run": {"cuda_graph": recorded}, "mask": {"context": "fixed"}})
    assert dry_run.steps_to_take(config) == steps


class NoReading(TorchDispatchMode):
    """Fails where a value goes to the host, or a shape depends on values."""

    READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        assert name not in self.READING, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


SIGREG = {"regulariser": "sigreg", "sigreg": {"views": "positions", "directions": 16}}
LOSSES = {
    "vicreg": {},
    "projected, at positions": {"vicreg": {"projector": [16, 16], "positions_weight": 1.0}},
    "sigreg": SIGREG,
}


@pytest.mark.parametrize(
    ("loss", "how"),
    [({}, {}), (SIGREG, {}), ({}, IN_FP8)],
    ids=["vicreg", "sigreg", "fp8"],
)
@pytest.mark.parametrize("context", ["fixed", "packed", "random"])
def test_nothing_in_a_step_waits_for_the_device(monkeypatch, context, loss, how):
    """But for what a CPU alone does: check indices, read the numbers of the optimiser's pass."""
    passes = []
    monkeypatch.setattr(single, "adamw_ema_step", lambda *a, **numbers: passes.append(numbers))
    for module in (tokens, targets, predictor):
        monkeypatch.setattr(module, "check_indices", lambda idx, patches: None)
    trainer, steps = trainer_of(context, loss=loss, **how)
    with NoReading():
        for index, batches in enumerate(steps):
            _, applied = trainer.step(batches, index)
    assert isinstance(applied, torch.Tensor) and len(passes) == 4 * STEPS
    for name in ("step", "scale", "apply"):
        assert isinstance(passes[0][name], torch.Tensor)
    with pytest.raises(AssertionError, match="waits for the device"), NoReading():
        trainer.step(steps[0], 0)[1].item()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"run": {"cuda_graph": True}}, 'mask.context to "fixed" or "packed"'),
        ({"run": {"cuda_graph": True}, "mask": {"min_keep": 4, "context": "prefix"}}, "prefix"),
    ],
)
def test_a_step_whose_shapes_change_is_refused(sections, said):
    with pytest.raises(ConfigError, match=said):
        validate(tiny.CONFIG | sections)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(ConfigError, match="the device is cpu"):
        trainer_of(cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("context", ["fixed", "packed"])
@pytest.mark.parametrize("graph", [False, True])
def test_no_host_sync_in_a_step(graph, context, loss):
    trainer, steps = trainer_of(context, loss=loss, cuda_graph=graph)
    steps = itertools.cycle(steps)
    for index in range(WARM + 1):
        trainer.step(next(steps), index)
    with sync_is_an_error():
        for index in range(WARM + 1, WARM + 4):
            trainer.step(next(steps), index)


@contextlib.contextmanager
def sync_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, IN_FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("context", "attention"), [("fixed", "sdpa"), ("fixed", "triton"), ("packed", "sdpa")]
)
def test_the_recorded_step_is_the_step(context, attention, how):
    found = []
    for graph in (False, True):
        trainer, steps = trainer_of(context, attention, cuda_graph=graph, **how)
        losses = [trainer.step(batches, i)[0]["loss"].item() for i, batches in enumerate(steps)]
        weights = torch.cat([s.master.values for s in trainer.engine.state()])
        found.append((losses, weights))
    (eager, eager_weights), (recorded, recorded_weights) = found
    assert recorded == pytest.approx(eager, rel=1e-4)
    torch.testing.assert_close(recorded_weights, eager_weights, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_save_beside_gpu_steps_has_the_state_of_its_step(tmp_path, cuda_graph):
    """Of every step, the recorded one too: the next updates wait for the copy on the GPU."""
    trainer, steps = trainer_of(cuda_graph=cuda_graph)
    saver = Saver(tmp_path / "checkpoints", trainer.engine, "{}", keep=STEPS)
    wanted = {}
    for done, batches in enumerate(steps, 1):
        trainer.step(batches, done - 1)
        wanted[done] = [owned.master.values.clone() for owned in trainer.engine.state()]
        saver.begin(done, {})
    assert saver.finish()
    names = [owned.master.name for owned in trainer.engine.state()]
    for done, values in wanted.items():
        stored = checkpoint.StoredCheckpoint(tmp_path / "checkpoints" / f"step_{done:08d}")
        for name, value in zip(names, values, strict=True):
            assert torch.equal(stored.whole("master", name), value.cpu())
