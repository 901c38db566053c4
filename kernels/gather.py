"""Gathering tokens by index: the context of an image, the targets' tokens, the predictor's input.

Shapes: B images, N patches, K context patches, M target blocks, P patches a block, S = K or M * P
indices of an image, D and W widths. Indices are int32 or int64, row-major positions in the patch
grid; they need not be unique. None is ever expanded to the width of the tokens.

`x_reference` is the definition, and the path on the CPU and in float64; on CUDA a kernel takes its
place. An index outside 0..N-1 raises IndexError on the CPU. On CUDA the host would have to wait for
the device to know it: its rows come out NaN, and with CJEPA_DEBUG_INDICES=1 the kernel asserts.

Bytes that must move, with e bytes a value (indices and position tables are small and stay in L2):
    gather_tokens     forward 2 B S D e                    backward (S + N) B D e
    embed_gather      forward 2 B S D e                    backward (S + N) B D e
    add_positions     forward 2 B K D e                    backward none
    target_gather     forward B S D (e + 4)
    predictor_input   forward (K + M (K + P)) B W e        backward the same
    prediction_loss   forward 2 B S D e                    backward 3 B S D e
Operations are a few for each value: all are bound by bytes, at any width.

Nothing is added atomically, so equal inputs give equal bits. The kernels are in gather_tiles.py.
Source of the maths: I-JEPA (Assran et al. 2023, arXiv 2301.08243, section 3).
"""

import torch
import torch.nn.functional as F

from cjepa_fast.kernels import gather_tiles
from cjepa_fast.kernels.common.launch import use_kernel
from cjepa_fast.kernels.common.ranks import wide
from cjepa_fast.kernels.gather_tiles import promoted

# --- the definitions


def _check(idx: torch.Tensor, rows: int) -> None:
    """On the CPU, raise IndexError for an index outside 0..rows-1.

    In the stacked tables such an index would silently read the neighbouring image.
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


def gather_tokens_reference(x_BND: torch.Tensor, idx_BK: torch.Tensor) -> torch.Tensor:
    B, N, D = x_BND.shape
    return x_BND.reshape(B * N, D).index_select(0, _flat_rows(idx_BK, N)).view(*idx_BK.shape, D)


def embed_gather_reference(
    patches_BND: torch.Tensor, pos_ND: torch.Tensor, idx_BK: torch.Tensor
) -> torch.Tensor:
    return gather_tokens_reference(patches_BND, idx_BK) + pos_ND[idx_BK]


def add_positions_reference(
    x_BKD: torch.Tensor, pos_ND: torch.Tensor, idx_BK: torch.Tensor
) -> torch.Tensor:
    return x_BKD + pos_ND[idx_BK]


@torch.no_grad()
def target_gather_reference(
    x_BND: torch.Tensor, idx_BMP: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    rows = gather_tokens_reference(x_BND, idx_BMP)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return F.layer_norm(rows, rows.shape[-1:], eps=eps)


def predictor_input_reference(
    context_BKW: torch.Tensor,
    pos_NW: torch.Tensor,
    mask_token_W: torch.Tensor,
    context_idx_BK: torch.Tensor,
    target_idx_BMP: torch.Tensor,
) -> torch.Tensor:
    B, K, W = context_BKW.shape
    M, P = target_idx_BMP.shape[1:]
    context = context_BKW + pos_NW[context_idx_BK]
    context = context[:, None].expand(B, M, K, W)
    queries = mask_token_W + pos_NW[target_idx_BMP]
    return torch.cat([context, queries], dim=2).view(B * M, K + P, W)


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


# --- gather_tokens, embed_gather, add_positions


@torch.library.custom_op("cjepa_fast::gather", mutates_args=())
def gather_op(x: torch.Tensor, pos: torch.Tensor | None, idx: torch.Tensor) -> torch.Tensor:
    return gather_tiles.launch_gather(x, pos, idx)


@torch.library.custom_op("cjepa_fast::gather_backward", mutates_args=())
def gather_backward_op(
    grad: torch.Tensor, idx: torch.Tensor, N: int, dtype: torch.dtype
) -> torch.Tensor:
    return gather_tiles.launch_gather_backward(grad, idx, N, dtype)


@torch.library.custom_op("cjepa_fast::add_positions", mutates_args=())
def add_positions_op(x: torch.Tensor, pos: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    return gather_tiles.launch_gather(x, pos, idx, gather=False)


@gather_op.register_fake
def _(x, pos, idx):
    dtype = x.dtype if pos is None else promoted(x, pos)
    return x.new_empty(*idx.shape, x.shape[-1], dtype=dtype)


@gather_backward_op.register_fake
def _(grad, idx, N, dtype):
    return grad.new_empty(grad.shape[0], N, grad.shape[-1], dtype=dtype)


@add_positions_op.register_fake
def _(x, pos, idx):
    return x.new_empty(x.shape, dtype=promoted(x, pos))


def _save_gather(ctx, inputs, output):
    x, _, idx = inputs
    ctx.save_for_backward(idx)
    ctx.N, ctx.dtype = x.shape[1], x.dtype


def _gather_gradient(ctx, grad):
    return gather_backward_op(grad, ctx.saved_tensors[0], ctx.N, ctx.dtype), None, None


gather_op.register_autograd(_gather_gradient, setup_context=_save_gather)


def _save_dtype(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype


add_positions_op.register_autograd(
    lambda ctx, grad: (grad.to(ctx.dtype), None, None), setup_context=_save_dtype
)


def gather_tokens(x_BND: torch.Tensor, idx_BK: torch.Tensor) -> torch.Tensor:
    """x[b, idx[b, k]] for all b, k: (B, K, D); idx may have any further shape, as (B, M, P).

    Raises IndexError (on the CPU) for an index outside 0..N-1.
    """
    _check(idx_BK, x_BND.shape[1])
    if not use_kernel(x_BND):
        return gather_tokens_reference(x_BND, idx_BK)
    return gather_op(x_BND, None, idx_BK.flatten(1)).view(*idx_BK.shape, x_BND.shape[-1])


def _one_each(x_BKD: torch.Tensor, idx_BK: torch.Tensor) -> None:
    if idx_BK.shape != x_BKD.shape[:2]:
        raise ValueError(f"indices {[*idx_BK.shape]} for tokens {[*x_BKD.shape]}")


def _fixed(pos: torch.Tensor) -> bool:
    """Positions are a constant here: the kernels take no gradient for them, the definitions do."""
    return not (pos.requires_grad and torch.is_grad_enabled())


def embed_gather(
    patches_BND: torch.Tensor, pos_ND: torch.Tensor, idx_BK: torch.Tensor
) -> torch.Tensor:
    """patches[b, idx[b, k]] + pos[idx[b, k]]: (B, K, D), of the dtype that the sum promotes to.

    For tokens that are embedded already. Where they are not, gathering the raw patches, embedding
    those alone and `add_positions` is cheaper. Raises ValueError unless there are N positions,
    IndexError (on the CPU) for an index outside 0..N-1.
    """
    N = patches_BND.shape[1]
    if len(pos_ND) != N:
        raise ValueError(f"{len(pos_ND)} positions for {N} patches")
    _check(idx_BK, N)
    if not (use_kernel(patches_BND, pos_ND) and _fixed(pos_ND)):
        return embed_gather_reference(patches_BND, pos_ND, idx_BK)
    return gather_op(patches_BND, pos_ND, idx_BK)


def add_positions(x_BKD: torch.Tensor, pos_ND: torch.Tensor, idx_BK: torch.Tensor) -> torch.Tensor:
    """x[b, k] + pos[idx[b, k]]: (B, K, D), of the dtype that the sum promotes to.

    Raises ValueError for other than one index a token, IndexError (on the CPU) for an index outside
    0..N-1.
    """
    _one_each(x_BKD, idx_BK)
    _check(idx_BK, len(pos_ND))
    if not (use_kernel(x_BKD, pos_ND) and _fixed(pos_ND)):
        return add_positions_reference(x_BKD, pos_ND, idx_BK)
    return add_positions_op(x_BKD, pos_ND, idx_BK)


# --- target_gather, prediction_loss


@torch.library.custom_op("cjepa_fast::target_gather", mutates_args=())
def target_gather_op(x: torch.Tensor, idx: torch.Tensor, eps: float) -> torch.Tensor:
    return gather_tiles.launch_target_gather(x, idx, eps)


@target_gather_op.register_fake
def _(x, idx, eps):
    return x.new_empty(*idx.shape, x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("cjepa_fast::prediction_loss", mutates_args=())
def prediction_loss_op(
    pred: torch.Tensor, tokens: torch.Tensor, idx: torch.Tensor, kind: str, eps: float
) -> torch.Tensor:
    return gather_tiles.launch_prediction_loss(pred, tokens, idx, kind, eps)


@prediction_loss_op.register_fake
def _(pred, tokens, idx, kind, eps):
    return pred.new_empty((), dtype=torch.float32)


@torch.library.custom_op("cjepa_fast::prediction_slope", mutates_args=())
def prediction_slope_op(
    upstream: torch.Tensor,
    pred: torch.Tensor,
    tokens: torch.Tensor,
    idx: torch.Tensor,
    kind: str,
    eps: float,
) -> torch.Tensor:
    return gather_tiles.launch_prediction_slope(upstream, pred, tokens, idx, kind, eps)


@prediction_slope_op.register_fake
def _(upstream, pred, tokens, idx, kind, eps):
    return pred.new_empty(pred.shape)


def _save_prediction(ctx, inputs, output):
    *tensors, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _prediction_gradient(ctx, upstream):
    """The error is computed anew.

    Kept from the forward pass the slope would cost a write and a read of pred's size, the same
    bytes as reading pred and the targets again where both have one dtype, with one more tensor
    held, a second rounding, and a price for those who want the loss alone.
    """
    slope = prediction_slope_op(upstream, *ctx.saved_tensors, ctx.kind, ctx.eps)
    return slope, None, None, None, None


prediction_loss_op.register_autograd(_prediction_gradient, setup_context=_save_prediction)


def target_gather(x_BND: torch.Tensor, idx_BMP: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Layer-norm without affine over D, then gather: (B, M, P, D), fp32. Takes no gradient.

    float64 stays float64. Raises IndexError (on the CPU) for an index outside 0..N-1.
    """
    _check(idx_BMP, x_BND.shape[1])
    if not (use_kernel(x_BND) and x_BND.shape[-1] <= gather_tiles.WIDEST):
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
    _check(target_idx_BMP, target_tokens_BND.shape[1])
    if not (use_kernel(pred_BMPD, target_tokens_BND) and gather_tiles.WIDEST >= D):
        args = pred_BMPD, target_tokens_BND, target_idx_BMP, kind, eps
        return prediction_loss_reference(*args)
    idx = target_idx_BMP.flatten(1)
    return prediction_loss_op(pred_BMPD.flatten(1, 2), target_tokens_BND.detach(), idx, kind, eps)


# --- predictor_input


@torch.library.custom_op("cjepa_fast::predictor_input", mutates_args=())
def predictor_input_op(
    context: torch.Tensor,
    pos: torch.Tensor,
    mask_token: torch.Tensor,
    context_idx: torch.Tensor,
    target_idx: torch.Tensor,
) -> torch.Tensor:
    return gather_tiles.launch_predictor_input(context, pos, mask_token, context_idx, target_idx)


@predictor_input_op.register_fake
def _(context, pos, mask_token, context_idx, target_idx):
    (B, K, W), (M, P) = context.shape, target_idx.shape[1:]
    return context.new_empty(B * M, K + P, W, dtype=promoted(context, pos, mask_token))


@torch.library.custom_op("cjepa_fast::predictor_input_backward", mutates_args=())
def predictor_input_backward_op(
    grad: torch.Tensor, B: int, K: int, context_dtype: torch.dtype, token_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return gather_tiles.launch_predictor_input_backward(grad, B, K, (context_dtype, token_dtype))


@predictor_input_backward_op.register_fake
def _(grad, B, K, context_dtype, token_dtype):
    W = grad.shape[-1]
    return grad.new_empty(B, K, W, dtype=context_dtype), grad.new_empty(W, dtype=token_dtype)


def _save_shapes(ctx, inputs, output):
    context, _, mask_token, _, _ = inputs
    ctx.shapes = (*context.shape[:2], context.dtype, mask_token.dtype)


def _predictor_input_gradient(ctx, grad):
    dcontext, dtoken = predictor_input_backward_op(grad, *ctx.shapes)
    return dcontext, None, dtoken, None, None


predictor_input_op.register_autograd(_predictor_input_gradient, setup_context=_save_shapes)


def predictor_input(
    context_BKW: torch.Tensor,
    pos_NW: torch.Tensor,
    mask_token_W: torch.Tensor,
    context_idx_BK: torch.Tensor,
    target_idx_BMP: torch.Tensor,
) -> torch.Tensor:
    """One sequence for each target block: [context + position, mask token + position].

    Returns (B*M, K+P, W), image-major: sequence b*M + m holds block m of image b. Raises
    ValueError for other than one context index a token, IndexError (on the CPU) for an index
    outside 0..N-1.
    """
    _one_each(context_BKW, context_idx_BK)
    for idx in (context_idx_BK, target_idx_BMP):
        _check(idx, len(pos_NW))
    args = context_BKW, pos_NW, mask_token_W, context_idx_BK, target_idx_BMP
    if not (use_kernel(*args[:3]) and _fixed(pos_NW)):
        return predictor_input_reference(*args)
    return predictor_input_op(*args)
