"""Which kernels and libraries compute attention and linear layers on this machine."""

import functools
from typing import NamedTuple

import torch
from torch import nn

from cjepa_fast.config import Config, ConfigError
from cjepa_fast.model import cpu_linear
from cjepa_fast.model.attention_trial import Shape, candidates, fastest, kernel_for
from cjepa_fast.model.attention_trial import problem as unusable
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import distributed, hardware, trials
from cjepa_fast.training.build import compute_dtype, first_masks, fuses

TRIED_ROWS = 2048  # of a Linear, in the trial of CPU libraries


class _AttentionUse(NamedTuple):
    """A network's blocks, the shape of their attention, and that of the last block's."""

    blocks: nn.ModuleList
    shape: Shape
    last: Shape


def choose_attention(
    networks: JEPA,
    target: Encoder,
    config: Config,
    device: torch.device,
    micro_batch: int,
    saved: dict | None = None,
) -> dict[str, str]:
    """For attention "auto": the fastest kernel for each network at its own lengths, set in it.

    Timed on rank 0 and the same on all. On a CPU nothing is timed. saved: a checkpoint's choices,
    which a resumed run keeps where they work here, so that its bits are those of before. Another
    backend is tried once: raises ConfigError where it has no kernel here. Returns which kernel runs
    in each network, by "target", "context" and "predictor".
    """
    dtype, given = compute_dtype(config), config.model.attention
    choices = {}
    for name, use in _attention_uses(networks, target, config, micro_batch).items():
        if given != "auto":
            _check_named_backend(given, name, use, device, dtype)
            choices[name] = kernel_for(use.shape, device, dtype, given)
            continue
        before = (saved or {}).get(name)
        choices[name] = distributed.broadcast_from_rank_0(
            functools.partial(_saved_or_fastest, before, use.shape, device, dtype)
        )
        _set_backend(choices[name], use, device, dtype)
    return choices


def _attention_uses(
    networks: JEPA, target: Encoder, config: Config, micro_batch: int
) -> dict[str, _AttentionUse]:
    """By network, at the lengths of the first micro-batch's masks.

    The predictor's last block has fewer queries than keys.
    """
    masks = first_masks(config, micro_batch)
    K, (M, P) = round(masks.context_k), masks.target_idx_BMP.shape[1:]
    N, L = target.grid[0] * target.grid[1], K + P
    own = P if config.predictor.mode == "one_pass" else L  # queries of a call
    lengths = {
        "target": (target.blocks, micro_batch, N, N, False),
        "context": (networks.encoder.blocks, micro_batch, K, K, True),
        "predictor": (networks.predictor.predictor_blocks, micro_batch * M, own, L, True),
    }
    uses = {}
    for name, (blocks, *of) in lengths.items():
        shape = _attention_shape(blocks, config, *of)
        last = shape._replace(queries=P) if name == "predictor" else shape
        uses[name] = _AttentionUse(blocks, shape, last)
    return uses


def _attention_shape(
    blocks: nn.ModuleList, config: Config, sequences: int, queries: int, keys: int, trained: bool
) -> Shape:
    part = blocks[0].attn
    width = part.proj.in_features // part.heads
    packed = trained and config.mask.context == "packed"
    fused = fuses(config, part.proj.in_features) and compute_dtype(config).itemsize == 2
    fused = fused and not packed and queries == keys
    return Shape(sequences, part.heads, queries, keys, width, trained, packed, fused)


def _check_named_backend(
    given: str, name: str, use: _AttentionUse, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises ConfigError where the backend has no kernel for this network here."""
    shapes = dict.fromkeys((use.shape, use.last))
    tried = (unusable(shape, device, dtype, given) for shape in shapes)
    if problem := next(filter(None, tried), ""):
        raise ConfigError(
            f'model.attention = "{given}": not for the {name} here ({problem}); take "auto"'
        )


def _set_backend(
    backend: str, use: _AttentionUse, device: torch.device, dtype: torch.dtype
) -> None:
    """In all blocks; in the last torch's choice, where the backend refuses that one's shape."""
    for block in use.blocks:
        block.attn.backend = backend
    if use.last != use.shape and distributed.broadcast_from_rank_0(
        functools.partial(unusable, use.last, device, dtype, backend)
    ):
        use.blocks[-1].attn.backend = "plain" if use.shape.packed else "sdpa"


def _saved_or_fastest(
    saved: str | None, shape: Shape, device: torch.device, dtype: torch.dtype
) -> str:
    if saved in candidates(device) and not unusable(shape, device, dtype, saved):
        return saved
    return fastest(shape, device, dtype)[0]


def choose_linear(
    networks: JEPA, config: Config, device: torch.device, micro_batch: int, saved: dict | None
) -> dict:
    """For fp32 on a CPU: the library of each kind of Linear call (cpu_linear), set for all.

    saved: a checkpoint's, which a resumed run keeps, so that its bits are those of before.
    Tried on rank 0, once a machine (trials.py), and the same on all. {} elsewhere.
    """
    if device.type != "cpu" or config.run.precision != "fp32":
        return {}
    otherwise = cpu_linear.LinearBackends()._asdict()
    uses = linear_uses(networks, micro_batch)
    facts = {
        "of": "linear", "uses": uses, "processor": hardware.processor_name(),
        "tier": hardware.tier(), "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    ways = saved or distributed.broadcast_from_rank_0(
        lambda: trials.remembered(facts, lambda: cpu_linear.fastest(uses)._asdict(), otherwise)
    )
    cpu_linear.use(
        cpu_linear.LinearBackends(
            **{kind: ways.get(kind, "torch") for kind in cpu_linear.LinearBackends._fields}
        )
    )
    return cpu_linear.in_use()._asdict()


def linear_uses(networks: JEPA, micro_batch: int) -> list[cpu_linear.LinearUse]:
    """One block's Linears of the encoder, trained and as target, and of the predictor."""
    encoder, predictor = networks.encoder, networks.predictor
    rows = min(TRIED_ROWS, micro_batch * encoder.grid[0] * encoder.grid[1])
    parts = ((encoder.blocks[0], True), (encoder.blocks[0], False),
             (predictor.predictor_blocks[0], True))  # fmt: skip
    return [
        cpu_linear.LinearUse(rows, layer.in_features, layer.out_features, trained)
        for block, trained in parts
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    ]
