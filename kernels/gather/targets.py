"""The targets' tokens, layer-normed and gathered, and the error of the predictions against them.

    target_gather     out[b, s] = layer_norm(x[b, idx[b, s]]), without affine
    prediction_loss   mean of f(pred - target_gather(x, idx)); the targets are never written
        f(e) = e^2 / 2 where |e| < 1, |e| - 1/2 elsewhere ("smooth_l1"), or e^2 ("l2")
    dpred = upstream * f'(e) / (B S D)
Targets take no gradient.

Shapes: x (B, N, D); idx (B, M, P), in the kernels (B, S) with S = M P; pred (B, M, P, D).

Bytes that must move, with e bytes a value of x and pred:
    target_gather     forward B S D (e + 4)
    prediction_loss   forward 2 B S D e            backward 3 B S D e
"""

import torch
import torch.nn.functional as F

from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.common.launch import (
    Compiled,
    last_dim_dense,
    narrow,
    on_its_device,
    use_kernel,
)
from cjepa_fast.kernels.common.maybe_triton import tl, triton
from cjepa_fast.kernels.common.operators import operator
from cjepa_fast.kernels.common.ranks import wide
from cjepa_fast.kernels.common.tiles import (
    ROW_TILES,
    WIDE_LOADS,
    WIDEST,
    Tile,
    chosen_tile,
    row_tiles,
)
from cjepa_fast.kernels.gather.index import (
    Rows,
    asserting,
    check_indices,
    dense_indices,
    load_index,
    pointers,
)
from cjepa_fast.kernels.gather.tokens import gather_tokens_reference

# --- the reference


@torch.no_grad()
def target_gather_reference(
    x_BND: torch.Tensor, idx_BMP: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    rows = gather_tokens_reference(x_BND, idx_BMP)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return F.layer_norm(rows, rows.shape[-1:], eps=eps)


def prediction_loss_reference(
    pred_BMPD: torch.Tensor,
    target_tokens_BND: torch.Tensor,
    target_idx_BMP: torch.Tensor,
    kind: str = "smooth_l1",
    eps: float = 1e-5,
) -> torch.Tensor:
    targets = target_gather_reference(target_tokens_BND, target_idx_BMP, eps)
    return prediction_error(pred_BMPD, targets, kind)


def prediction_error(
    pred: torch.Tensor, targets: torch.Tensor, kind: str = "smooth_l1"
) -> torch.Tensor:
    """Mean over everything, in fp32 or float64: "smooth_l1" (beta 1, I-JEPA's code) or "l2"."""
    return {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}[kind](wide(pred), wide(targets))


# --- the kernels


@triton.jit
def _target_rows(
    tokens, idx, row, live, d, S, N, D, image_stride, row_stride, eps, DEBUG: tl.constexpr
):  # fmt: skip
    """The layer-normed tokens of the indices idx[row], fp32; 0 beyond D, NaN for a wrong index."""
    nan: tl.constexpr = float("nan")
    index, inside = load_index(idx, row, live, N, DEBUG)
    start = (row // S).to(tl.int64) * image_stride + index * row_stride
    real = (d < D)[None, :]
    keep = (live & inside)[:, None] & real
    x = tl.load(tokens + start[:, None] + d[None, :], mask=keep, other=0.0).to(tl.float32)
    mean = tl.where(inside, tl.sum(x, 1) / D, nan)
    x = tl.where(real, x - mean[:, None], 0.0)
    # The mean of large values is off by its own rounding: the rest of it shows once centred.
    x = tl.where(real, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    variance = tl.sum(x * x, 1) / D
    return x * (1.0 / tl.sqrt(variance + eps))[:, None]


@triton.jit(do_not_specialize=["total", "S"])
def _target_gather_kernel(
    tokens,  # (B, N, D)
    idx,  # (B, S)
    out,  # (B, S, D) fp32
    total, S, N, D, image_stride, row_stride, eps,
    DEBUG: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of the B * S rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    live = row < total
    x = _target_rows(
        tokens, idx, row, live, d, S, N, D, image_stride, row_stride, eps, DEBUG
    )  # fmt: skip
    there = out + row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(there, x, mask=live[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["total", "S"])
def _prediction_loss_kernel(
    pred,  # (B, S, D)
    tokens,  # (B, N, D)
    idx,  # (B, S)
    partial,  # (programs,) fp32
    total, S, N, D, image_stride, row_stride, eps,
    SMOOTH: tl.constexpr, DEBUG: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """partial[program] = the sum of its rows' errors. Programs: tiles of the B * S rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    live = row < total
    target = _target_rows(
        tokens, idx, row, live, d, S, N, D, image_stride, row_stride, eps, DEBUG
    )  # fmt: skip
    keep = live[:, None] & (d < D)[None, :]
    here = pred + row.to(tl.int64)[:, None] * D + d[None, :]
    error = tl.load(here, mask=keep, other=0.0).to(tl.float32) - target
    square = error * error
    if SMOOTH:
        size = tl.abs(error)
        square = tl.where(size < 1.0, 0.5 * square, size - 0.5)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(tl.where(keep, square, 0.0), 1), 0))


@triton.jit(do_not_specialize=["total", "S"])
def _prediction_slope_kernel(
    upstream,  # ()
    pred,  # (B, S, D)
    tokens,  # (B, N, D)
    idx,  # (B, S)
    dpred,  # (B, S, D)
    total, S, N, D, image_stride, row_stride, eps, share,
    SMOOTH: tl.constexpr, DEBUG: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dpred = upstream * share * slope of the error; share is 1 / (B S D). Programs: row tiles."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    live = row < total
    target = _target_rows(
        tokens, idx, row, live, d, S, N, D, image_stride, row_stride, eps, DEBUG
    )  # fmt: skip
    keep = live[:, None] & (d < D)[None, :]
    here = row.to(tl.int64)[:, None] * D + d[None, :]
    error = tl.load(pred + here, mask=keep, other=0.0).to(tl.float32) - target
    slope = 2.0 * error
    if SMOOTH:
        slope = tl.where(error > 1.0, 1.0, tl.where(error < -1.0, -1.0, error))
    slope *= tl.load(upstream).to(tl.float32) * share
    tl.store(dpred + here, narrow(slope, dpred.dtype.element_ty), mask=keep)


# --- launchers


@on_its_device
def launch_target_gather(x: Rows, idx: torch.Tensor, eps: float, tile: Tile | None = None) -> Rows:
    """(B, S, D) fp32."""
    x, idx = last_dim_dense(x), dense_indices(idx, x)
    (B, S), (N, D) = idx.shape, x.shape[1:]
    out = torch.empty(B, S, D, device=x.device, dtype=torch.float32)
    if out.numel() == 0:
        return out
    tile = tile or chosen_tile("target_gather", row_tiles(D), x)
    _target_gather_kernel[(triton.cdiv(B * S, tile.rows),)](
        x, idx, out, B * S, S, N, D, x.stride(0), x.stride(1), eps, DEBUG=launch.DEBUG_INDICES,
        ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps, debug=launch.DEBUG_INDICES,
    )  # fmt: skip
    return out


@on_its_device
def launch_prediction_loss(
    pred: Rows, tokens: Rows, idx: torch.Tensor, kind: str, eps: float, tile: Tile | None = None
) -> torch.Tensor:
    """The mean error, 0-d fp32: partial sums, then their sum, both in a fixed order."""
    pred, tokens, idx = pred.contiguous(), last_dim_dense(tokens), dense_indices(idx, tokens)
    (B, S), (N, D) = idx.shape, tokens.shape[1:]
    tile = tile or chosen_tile("prediction_loss", row_tiles(D), pred)
    programs = triton.cdiv(B * S, tile.rows) if D else 0
    partial = torch.empty(programs, device=pred.device, dtype=torch.float32)
    if programs:
        _prediction_loss_kernel[(programs,)](
            pred, tokens, idx, partial, B * S, S, N, D, tokens.stride(0), tokens.stride(1), eps,
            SMOOTH=kind == "smooth_l1", DEBUG=launch.DEBUG_INDICES,
            ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps, debug=launch.DEBUG_INDICES,
        )  # fmt: skip
    return partial.sum() / (B * S * D)  # 0 / 0 is NaN, as the mean of nothing


@on_its_device
def launch_prediction_slope(
    upstream: torch.Tensor,
    pred: Rows,
    tokens: Rows,
    idx: torch.Tensor,
    kind: str,
    eps: float,
    tile: Tile | None = None,
) -> Rows:
    """The gradient of pred, in its dtype. upstream: the 0-d gradient of the loss."""
    pred, tokens, idx = pred.contiguous(), last_dim_dense(tokens), dense_indices(idx, tokens)
    (B, S), (N, D) = idx.shape, tokens.shape[1:]
    dpred = torch.empty(pred.shape, device=pred.device, dtype=pred.dtype)
    if dpred.numel() == 0:
        return dpred
    tile = tile or chosen_tile("prediction_loss backward", row_tiles(D), pred)
    _prediction_slope_kernel[(triton.cdiv(B * S, tile.rows),)](
        upstream, pred, tokens, idx, dpred, B * S, S, N, D, tokens.stride(0), tokens.stride(1),
        eps, 1 / dpred.numel(), SMOOTH=kind == "smooth_l1", DEBUG=launch.DEBUG_INDICES,
        ROWS=tile.rows, WIDTH=tile.width, num_warps=tile.warps, debug=launch.DEBUG_INDICES,
    )  # fmt: skip
    return dpred


# --- the operators


@operator("target_gather")
def target_gather_op(x: torch.Tensor, idx: torch.Tensor, eps: float) -> torch.Tensor:
    return launch_target_gather(x, idx, eps)


@torch.library.register_fake(target_gather_op)
def _(x, idx, eps):
    return x.new_empty(*idx.shape, x.shape[-1], dtype=torch.float32)


@operator("prediction_loss")
def prediction_loss_op(
    pred: torch.Tensor, tokens: torch.Tensor, idx: torch.Tensor, kind: str, eps: float
) -> torch.Tensor:
    return launch_prediction_loss(pred, tokens, idx, kind, eps)


@torch.library.register_fake(prediction_loss_op)
def _(pred, tokens, idx, kind, eps):
    return pred.new_empty((), dtype=torch.float32)


@operator("prediction_slope")
def prediction_slope_op(
    upstream: torch.Tensor,
    pred: torch.Tensor,
    tokens: torch.Tensor,
    idx: torch.Tensor,
    kind: str,
    eps: float,
) -> torch.Tensor:
    return launch_prediction_slope(upstream, pred, tokens, idx, kind, eps)


@torch.library.register_fake(prediction_slope_op)
def _(upstream, pred, tokens, idx, kind, eps):
    return pred.new_empty(pred.shape)


def _save_prediction(ctx, inputs, output):
    *tensors, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _prediction_gradient(ctx, upstream):
    """The error is recomputed.

    Saved from the forward pass the slope would cost a write and a read of pred's size, the same
    bytes as reading pred and the targets again where both have one dtype, with one more tensor
    held, a second rounding, and a price for those who want the loss alone.
    """
    slope = prediction_slope_op(upstream, *ctx.saved_tensors, ctx.kind, ctx.eps)
    return slope, None, None, None, None


torch.library.register_autograd(
    prediction_loss_op, _prediction_gradient, setup_context=_save_prediction
)


# --- public


def target_gather(x_BND: torch.Tensor, idx_BMP: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Layer-norm without affine over D, then gather: (B, M, P, D), fp32. Takes no gradient.

    float64 stays float64. Raises IndexError (on the CPU) for an index outside 0..N-1.
    """
    check_indices(idx_BMP, x_BND.shape[1])
    if not (use_kernel(x_BND) and x_BND.shape[-1] <= WIDEST):
        return target_gather_reference(x_BND, idx_BMP, eps)
    rows = target_gather_op(x_BND.detach(), idx_BMP.flatten(1), eps)
    return rows.view(*idx_BMP.shape, x_BND.shape[-1])


def prediction_loss(
    pred_BMPD: torch.Tensor,
    target_tokens_BND: torch.Tensor,
    target_idx_BMP: torch.Tensor,
    kind: str = "smooth_l1",
    eps: float = 1e-5,
) -> torch.Tensor:
    """The mean error of pred against the layer-normed tokens of the target's patches: 0-d, fp32.

    kind: "smooth_l1" (beta 1, I-JEPA's code) or "l2" (the papers), meaned over everything. The
    gathered targets are never written; they take no gradient. Raises ValueError for another kind,
    IndexError (on the CPU) for an index outside 0..N-1.
    """
    if kind not in ("smooth_l1", "l2"):
        raise ValueError(f'kind must be "smooth_l1" or "l2", not {kind!r}')
    D = target_tokens_BND.shape[-1]
    if pred_BMPD.shape != (*target_idx_BMP.shape, D):
        raise ValueError(
            f"pred is {tuple(pred_BMPD.shape)}, for indices {tuple(target_idx_BMP.shape)} "
            f"into tokens {tuple(target_tokens_BND.shape)}"
        )
    check_indices(target_idx_BMP, target_tokens_BND.shape[1])
    if not (use_kernel(pred_BMPD, target_tokens_BND) and WIDEST >= D):
        args = pred_BMPD, target_tokens_BND, target_idx_BMP, kind, eps
        return prediction_loss_reference(*args)
    idx = target_idx_BMP.flatten(1)
    return prediction_loss_op(pred_BMPD.flatten(1, 2), target_tokens_BND.detach(), idx, kind, eps)


# --- ahead of time


def _compiled(dtype: str, tile: Tile) -> list[Compiled]:
    """The kernels in one tile; `dtype` is that of pred and of the tokens."""
    sizes = {"DEBUG": False, "ROWS": tile.rows, "WIDTH": tile.width}
    name = f"{dtype} {tile.rows}x{tile.width}"
    shape = "total S N D image_stride row_stride"
    common = {
        "num_warps": tile.warps, "must_have": WIDE_LOADS,
        "divisible": ("D", "image_stride", "row_stride"),
    }  # fmt: skip
    smooth = {"SMOOTH": True, **sizes}
    fp32 = {"out": "*fp32", "partial": "*fp32", "upstream": "*fp32"}
    kernels = [
        ("target_gather", _target_gather_kernel, "tokens idx out", "eps", sizes),
        ("prediction_loss", _prediction_loss_kernel, "pred tokens idx partial", "eps", smooth),
        (
            "prediction_loss backward", _prediction_slope_kernel,
            "upstream pred tokens idx dpred", "eps share", smooth,
        ),
    ]  # fmt: skip
    found = []
    for op, kernel, tensors, floats, constexprs in kernels:
        kinds = pointers(dtype, tensors, shape, floats)
        kinds |= {n: kind for n, kind in fp32.items() if n in kinds}
        found.append(Compiled(f"{op} {name}", kernel, kinds, constexprs, **common))
    return found


def ahead_of_time() -> list[Compiled]:
    """Every kernel in every tile for each dtype, at a width that is a multiple of 16."""
    dtypes = [launch.TRITON_NAMES[d] for d in launch.KERNEL_DTYPES]
    tiles = [tile for found in ROW_TILES.values() for tile in found]
    found = [c for t in dtypes for tile in tiles for c in _compiled(t, tile)]
    return found + asserting(_compiled("bf16", ROW_TILES[1024][0]))
