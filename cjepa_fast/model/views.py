"""What a regulariser looks at: rows of width D, taken from the networks' outputs.

Shapes: B images, N patches of an image, M target blocks, P patches a block, K context, T tokens of
all contexts, D width.
"""

import torch
from torch import nn

from cjepa_fast.kernels.common.ranks import wide
from cjepa_fast.model.packed import PackedContext

Context = torch.Tensor | PackedContext


def projected(
    project: nn.Module | None, z: torch.Tensor, live: torch.Tensor | None = None
) -> torch.Tensor:
    """live: which of z's rows (n, D) are no padding, None for all."""
    if project is None:
        return z
    rows = z.flatten(0, -2).to(next(project.parameters()).dtype)
    rows = project(rows) if live is None else project(rows, live)
    return wide(rows.view(*z.shape[:-1], -1))


def mean_over(x: torch.Tensor, dim: int) -> torch.Tensor:
    """In fp32, or in float64 of such, without a copy of x in it."""
    return x.mean(dim, dtype=torch.promote_types(x.dtype, torch.float32))


def pooled_context(context_BKD: torch.Tensor, context: Context | None) -> torch.Tensor:
    """The mean of each image's context tokens, (B, D)."""
    if isinstance(context, PackedContext):
        return context.sequences.means(wide(context_BKD[0]))
    return mean_over(context_BKD, 1)


def one_row(
    context_BKD: torch.Tensor, context: Context | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The context's tokens (T, D), their positions (T,), and which of them are no padding."""
    if context is None:
        raise ValueError('views "positions" needs the positions of the context')
    tokens_TD = context_BKD[0] if isinstance(context, PackedContext) else context_BKD.flatten(0, 1)
    return tokens_TD, *_positions(context)


def _positions(context: Context) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not isinstance(context, PackedContext):
        return context.flatten(), None
    end = context.sequences.starts[context.sequences.real]
    live_T = torch.arange(len(context.rows_T), device=end.device) < end
    return context.idx_T, live_T


def rows_by_position(context: Context, positions: int) -> torch.Tensor:
    """Which of `one_row`'s tokens stands at each position of each image: int64 (N, B), -1 for none.

    positions: N. An image has each position once at most.
    """
    idx_T, live_T = _positions(context)
    token_T = torch.arange(len(idx_T), device=idx_T.device)
    if isinstance(context, PackedContext):
        images, image_T = context.images, context.rows_T // context.patches
    else:
        images, image_T = len(context), token_T // context.shape[1]
    offset_T = idx_T * images + image_T
    if live_T is not None:  # padding goes to an offset of its own
        offset_T = torch.where(live_T, offset_T, positions * images)
    table = token_T.new_full((positions * images + 1,), -1).scatter_(0, offset_T, token_T)
    return table[:-1].view(positions, images)
