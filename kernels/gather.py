"""Gathering tokens by index: the context of an image, the targets' tokens, the predictor's input.

Each function is the plain-PyTorch definition and runs on every device. Shapes: B images, N patches,
K context patches, M target blocks, P patches a block, D and W widths. Indices are int32 or int64,
row-major positions in the patch grid. No index is ever expanded to the width of the tokens.
"""

import torch
import torch.nn.functional as F


def _check(idx: torch.Tensor, rows: int) -> None:
    """On the CPU, raise IndexError for an index outside 0..rows-1.

    In the stacked tables such an index would silently read the neighbouring image. Elsewhere the
    host would have to wait for the device to know it: there indices must be right.
    """
    if idx.device.type != "cpu" or idx.numel() == 0 or torch.compiler.is_compiling():
        return
    lowest, highest = (int(extreme) for extreme in torch.aminmax(idx))
    if lowest < 0 or highest >= rows:
        wrong = lowest if lowest < 0 else highest
        raise IndexError(f"index {wrong} is outside 0..{rows - 1}: there are N = {rows} patches")


def _flat_rows(idx: torch.Tensor, rows: int) -> torch.Tensor:
    """Indices (B, ...) into each of B tables of `rows` rows -> flat rows of the stacked tables."""
    offsets = torch.arange(idx.shape[0], device=idx.device) * rows
    return (idx + offsets.view(-1, *[1] * (idx.dim() - 1))).flatten()


def gather_tokens(x_BND: torch.Tensor, idx_BK: torch.Tensor) -> torch.Tensor:
    """x[b, idx[b, k]] for all b, k: (B, K, D); idx may have any further shape, as (B, M, P).

    Raises IndexError (on the CPU) for an index outside 0..N-1.
    """
    B, N, D = x_BND.shape
    _check(idx_BK, N)
    return x_BND.reshape(B * N, D).index_select(0, _flat_rows(idx_BK, N)).view(*idx_BK.shape, D)


def target_gather(x_BND: torch.Tensor, idx_BMP: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Layer-norm without affine over D, then gather: (B, M, P, D), fp32. Takes no gradient.

    float64 stays float64. Raises IndexError (on the CPU) for an index outside 0..N-1.
    """
    with torch.no_grad():
        rows = gather_tokens(x_BND, idx_BMP)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        return F.layer_norm(rows, rows.shape[-1:], eps=eps)


def predictor_input(
    context_BKW: torch.Tensor,
    pos_NW: torch.Tensor,
    mask_token_W: torch.Tensor,
    context_idx_BK: torch.Tensor,
    target_idx_BMP: torch.Tensor,
) -> torch.Tensor:
    """One sequence for each target block: [context + position, mask token + position].

    Returns (B*M, K+P, W), image-major: sequence b*M + m holds block m of image b. Raises
    IndexError (on the CPU) for an index outside 0..N-1.
    """
    B, K, W = context_BKW.shape
    M, P = target_idx_BMP.shape[1:]
    for idx in (context_idx_BK, target_idx_BMP):
        _check(idx, len(pos_NW))
    context = context_BKW + pos_NW[context_idx_BK]
    context = context[:, None].expand(B, M, K, W)
    queries = mask_token_W + pos_NW[target_idx_BMP]
    return torch.cat([context, queries], dim=2).view(B * M, K + P, W)
