"""Parameter groups, and the schedules as pure functions of the optimiser step.

As in I-JEPA's code: the learning rate and weight decay of the first update are those of index 1,
the EMA momentum after it that of index 0.
"""

import math

from torch import nn


def parameter_groups(model: nn.Module) -> list[dict]:
    """Four groups: encoder and the rest (predictor, projector), each decayed and not.

    Biases, one-dimensional parameters and learned positions take no weight decay (`"decay":
    False`). Each group has a name. Raises AssertionError if a trainable parameter is in no group
    or in two.
    """
    members: dict[tuple[bool, bool], list] = {}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in trainable:
        decay = p.dim() > 1 and not name.endswith(("bias", "pos_embed"))
        members.setdefault((name.startswith("encoder."), decay), []).append(p)
    groups = []
    for (encoder, decay), params in members.items():
        name = f"{'encoder' if encoder else 'predictor'}_{'decay' if decay else 'no_decay'}"
        groups.append({"name": name, "params": params, "decay": decay})
    covered = [id(p) for group in groups for p in group["params"]]
    assert sorted(covered) == sorted({id(p) for _, p in trainable})
    return groups


def cosine(start: float, end: float, progress: float) -> float:
    """From start at progress 0 to end at progress 1, along half a cosine; end beyond."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def learning_rate(
    index: int, total: int, warmup: int, start: float, peak: float, final: float
) -> float:
    """Linear from start to peak in `warmup` steps, then cosine to final at `total` steps."""
    if index < warmup:
        return start + (peak - start) * index / warmup
    return cosine(peak, final, (index - warmup) / max(1, total - warmup))


def weight_decay(index: int, total: int, start: float, final: float) -> float:
    return cosine(start, final, index / total)


def ema_momentum(index: int, total: int, start: float, final: float) -> float:
    return start + (final - start) * min(index / total, 1.0)
