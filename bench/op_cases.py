"""The inputs that bench/ops.py times the kernels on, and the work that each must do.

Bytes and operations are those of the kernels' docstrings. Shapes come from configs/: the model's
tokens, and masks as its run would draw them. Letters: B images, N patches, K context patches, M
target blocks, P patches a block, S indices of an image, D width, W predictor width, n rows.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from cjepa_fast import config as configuration
from cjepa_fast.config import Config
from cjepa_fast.data.masks import Masks
from cjepa_fast.kernels import attention, ema, fp8, gather, gelu, norm, sigreg, vicreg
from cjepa_fast.model.views import rows_by_position
from cjepa_fast.runtime.image_size import patch_grid
from cjepa_fast.training import build
from cjepa_fast.training.sizes import model_sizes

MODELS = {"T": "vit_t", "B": "vit_b", "L": "vit_l", "H": "vit_h"}
ROWS, WIDTHS = 25_088, (384, 768, 1024, 1280, 2048, 4096, 8192)
BF16 = 2  # bytes a value
DIRECTIONS, KNOTS = 256, 17  # of SIGReg
ADAM = {"step": 10, "lr": 1e-4, "momentum": 0.996, "weight_decay": 0.05}


class Cost(NamedTuple):
    """What a pass must at least do: bytes to and from memory, operations (2 a multiply-add)."""

    bytes: float
    flop: float = 0.0


class Case(NamedTuple):
    """An op on inputs of one shape. `make` gives its arguments, on a device; the passes' work by
    name, "backward" only where there is a gradient: that of the first argument."""

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.device], tuple]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    work: dict[str, Cost]


def cases(models: list[str], batch: int | None, rows: int, widths: list[int]) -> list[Case]:
    """batch: images, None for each configuration's own micro-batch."""
    found, last = [], []
    for model in models:
        config = configuration.load(MODELS[model])
        images = batch or config.data.micro_batch_size
        masks = build.build_masks(config)(0, 0, torch.arange(images))
        found += gathers(model, config, masks)
        last += emas(model, config)  # whose references take torch.compile a minute
        found += quantisations(model, config, images)
        found += blocks(model, config, masks)
        found.append(vicreg_blocks(model, config, masks))
        found += position_views(model, config, masks)
    found += [vicreg_tokens(rows, width, torch.bfloat16) for width in widths]
    return found + last


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def wanting(x: torch.Tensor) -> torch.Tensor:
    return x.requires_grad_()


def patches_of(config: Config) -> int:
    return math.prod(patch_grid(config.data.image_size, config.model.patch_size))


def pair(module, op: str) -> dict[str, Callable]:
    """A public function of kernels/ and its reference."""
    return {"op": op, "ours": getattr(module, op), "reference": getattr(module, f"{op}_reference")}


def gathers(model: str, config: Config, masks: Masks) -> list[Case]:
    """The five gathers and the prediction loss, at a model's shapes in bf16."""
    context, targets = masks.context_idx_BK, masks.target_idx_BMP
    (B, K), (_, M, P) = context.shape, targets.shape
    N = patches_of(config)
    D, W = model_sizes(config)["width"], config.predictor.width
    S, tokens, rows = M * P, f"{model}: {B}x{N}x{D}", B * D * BF16
    copied = {"forward": Cost(2 * K * rows), "backward": Cost((K + N) * rows)}
    sequences = Cost((K + M * (K + P)) * B * W * BF16)

    def made(*shapes: tuple[int, ...], idx: tuple) -> Callable[[torch.device], tuple]:
        return lambda device: (
            wanting(normal(device, *shapes[0])),
            *(normal(device, *shape) for shape in shapes[1:]),
            *(i.to(device) for i in idx),
        )

    def case(op: str, label: str, make, **work: Cost) -> Case:
        return Case(shape=label, dtype=torch.bfloat16, make=make, work=work, **pair(gather, op))

    return [
        case("gather_tokens", f"{tokens}, K {K}", made((B, N, D), idx=(context,)), **copied),
        case("embed_gather", f"{tokens}, K {K}", made((B, N, D), (N, D), idx=(context,)), **copied),
        case(
            "add_positions", f"{model}: {B}x{K}x{D}", made((B, K, D), (N, D), idx=(context,)),
            forward=copied["forward"],
        ),
        case(
            "target_gather", f"{tokens}, {M}x{P}", made((B, N, D), idx=(targets,)),
            forward=Cost(B * S * D * (BF16 + 4)),
        ),
        case(
            "predictor_input", f"{model}: {B}x{K}x{W}, {M}x{P}",
            made((B, K, W), (N, W), (W,), idx=(context, targets)),
            forward=sequences, backward=sequences,
        ),
        case(
            "prediction_loss", f"{tokens}, {M}x{P}",
            made((B, M, P, D), (B, N, D), idx=(targets,)),
            forward=Cost(2 * S * rows), backward=Cost(3 * S * rows),
        ),
    ]  # fmt: skip


def emas(model: str, config: Config) -> list[Case]:
    """The two updates over all the encoder's weights, bf16 gradients and working copies."""
    with torch.device("meta"):
        encoder = build.build_networks(config).encoder
    shapes = [p.shape for p in encoder.parameters() if p.requires_grad]
    values = sum(shape.numel() for shape in shapes)
    label = f"{model}: {values / 1e6:.0f} M in {len(shapes)}"

    def lists(device: torch.device, *dtypes: torch.dtype) -> list[list[torch.Tensor]]:
        # squares of gradients may not be negative
        return [[normal(device, *s, dtype=d).abs_() for s in shapes] for d in dtypes]

    def arguments(device: torch.device) -> tuple:
        target, online, copies = lists(device, torch.float32, torch.float32, torch.bfloat16)
        return target, online, 0.996, copies

    fp32, bf16 = torch.float32, torch.bfloat16
    adamw = pair(ema, "adamw_ema_step")
    for name in ("ours", "reference"):
        adamw[name] = _with_copies(adamw[name])
    # 14 and 38 bytes a value: see the docstrings of kernels/ema/, here with bf16 gradients
    return [
        Case(
            shape=label, dtype=fp32, make=arguments, work={"forward": Cost(14 * values)},
            **pair(ema, "ema_update"),
        ),
        Case(
            shape=label, dtype=fp32,
            make=lambda device: tuple(lists(device, fp32, bf16, fp32, fp32, fp32, bf16, bf16)),
            work={"forward": Cost(38 * values)}, **adamw,
        ),
    ]  # fmt: skip


def blocks(model: str, config: Config, masks: Masks) -> list[Case]:
    """What fused blocks do between their matmuls: of the target's tokens forward, of the
    context's and the predictor's backward."""
    (B, K), (_, M, P) = masks.context_idx_BK.shape, masks.target_idx_BMP.shape
    N = patches_of(config)
    sizes, W = model_sizes(config), config.predictor.width
    D, hidden, heads = sizes["width"], round(sizes["width"] * sizes["mlp_ratio"]), sizes["heads"]
    L = K + P

    def case(op: str, shape: tuple[int, ...], make, ours, reference, **passes: float) -> Case:
        """passes: over the tensor of that shape; at 4 S T d operations forward, 10 backward."""
        values = math.prod(shape)
        flop = {"forward": 4, "backward": 10}
        pairs = values * shape[1] if op == "attention" else 0
        work = {n: Cost(x * values * BF16, flop[n] * pairs) for n, x in passes.items()}
        label = f"{model}: {'x'.join(map(str, shape))}"
        return Case(op, label, torch.bfloat16, make, ours, reference, work)

    def normed(device: torch.device) -> tuple:
        return *normal(device, 2, B * N, D), *normal(device, 2, D)

    def norm_gradients(device: torch.device) -> tuple:
        dh, ds, s = normal(device, 3, B * K, D)
        weight = normal(device, D)
        wide = s.float()
        stats = torch.stack([wide.mean(1), (wide.var(1, correction=0) + 1e-6).rsqrt()])
        return dh, ds, s, weight, stats

    def heads_of(rows: int, length: int, width: int, trained: bool) -> Case:
        def make(device: torch.device) -> tuple:
            parts = normal(device, 3, rows, length, heads, width // heads).transpose(2, 3)
            return tuple(part.detach().requires_grad_(trained) for part in parts)

        passes = {"forward": 4.0} | ({"backward": 8.0} if trained else {})
        pair = attention.short_attention, attention.short_attention_reference
        return case("attention", (rows, length, width), make, *pair, **passes)

    return [
        case("add_norm", (B * N, D), normed, *_on_gpu(_add_norm, _plain_add_norm), forward=4),
        case(
            "add_norm_backward", (B * K, D), norm_gradients,
            *_on_gpu(_norm_gradients, _plain_norm_gradients), forward=4,
        ),
        case(
            "gelu", (B * N, hidden), lambda device: (normal(device, B * N, hidden),),
            *_on_gpu(gelu.launch_gelu, gelu.gelu_reference), forward=2,
        ),
        case(
            "gelu_backward", (B * K, hidden), lambda device: (*normal(device, 2, B * K, hidden),),
            *_on_gpu(gelu.launch_gelu_backward, _plain_gelu_gradients), forward=3,
        ),
        heads_of(B, N, D, False), heads_of(B, K, D, True), heads_of(B * M, L, W, True),
    ]  # fmt: skip


def _on_gpu(kernel: Callable, plain: Callable) -> tuple[Callable, Callable]:
    """Ours, which has no other way on a CPU, and what it stands beside."""
    return lambda *args: (kernel if args[0].is_cuda else plain)(*args), plain


def _add_norm(x, y, weight, bias):
    return norm.launch_add_norm(x, y, weight, bias, 1e-6)[:2]


def _plain_add_norm(x, y, weight, bias):
    s = x + y
    return s, F.layer_norm(s, weight.shape, weight, bias, 1e-6)


def _norm_gradients(dh, ds, s, weight, stats):
    d, sums = norm.launch_add_norm_backward(dh, ds, s, weight, stats)
    return d, *sums


def _plain_norm_gradients(dh, ds, s, weight, stats):
    backward = torch.ops.aten.native_layer_norm_backward
    mean, rstd = (x[:, None].to(x.dtype if x.is_cuda else s.dtype) for x in stats)
    d, dweight, dbias = backward(dh, s, weight.shape, mean, rstd, weight, weight, [True] * 3)
    d = d + ds
    return d, dweight, dbias, d.sum(0)


def _plain_gelu_gradients(dg, u):
    du = torch.ops.aten.gelu_backward(dg, u)
    return du, du.sum(0)


def quantisations(model: str, config: Config, images: int) -> list[Case]:
    """What the target's forward in fp8 does beside its matmuls: of all tokens, from bf16."""
    sizes = model_sizes(config)
    tokens, D = images * patches_of(config), sizes["width"]
    hidden = round(D * sizes["mlp_ratio"])

    def case(op: str, width: int, make) -> Case:
        return Case(
            shape=f"{model}: {tokens}x{width}", dtype=torch.bfloat16, make=make,
            work={"forward": Cost(tokens * width * (BF16 + 1))}, **pair(fp8, op),
        )  # fmt: skip

    return [
        case("quantise_rows", D, lambda device: (normal(device, tokens, D),)),
        case(
            "quantise_norm", D,
            lambda device: (normal(device, tokens, D), *normal(device, 2, D), 1e-6),
        ),
        case("quantise_gelu", hidden, lambda device: (normal(device, tokens, hidden),)),
        averaged_rows(model, D, sizes["depth"]),
    ]  # fmt: skip


def averaged_rows(model: str, D: int, depth: int) -> Case:
    """The EMA of one square matrix a block, and its rows in FP8."""

    def make(device: torch.device) -> tuple:
        target, online = (normal(device, depth, D, D, dtype=torch.float32) for _ in range(2))
        rows = [fp8.quantise_rows(t) for t in target]
        values, scales = [r.values for r in rows], [r.scales for r in rows]
        return list(target), list(online), 0.996, values, scales

    return Case(
        shape=f"{model}: {depth}x{D}x{D}", dtype=torch.float32, make=make,
        work={"forward": Cost(13 * depth * D**2)}, **pair(ema, "ema_update_rows"),
    )  # fmt: skip


def _with_copies(step: Callable) -> Callable:
    def run(params, grads, exp_avgs, exp_avg_sqs, target, copies, target_copies):
        arrays = params, grads, exp_avgs, exp_avg_sqs, target
        step(*arrays, copies=copies, target_copies=target_copies, **ADAM)

    return run


def vicreg_work(M: int, n: int, D: int, dtype: torch.dtype) -> dict[str, Cost]:
    """The least work: the matrix is S x S, S = min(n, D), half of it computed forward."""
    S, values = min(n, D), M * n * D * dtype.itemsize
    matrix = M * S * S * 4
    return {
        "forward": Cost(2 * values + matrix, M * n * D * S),
        "backward": Cost(2 * values + matrix, 2 * M * n * D * S),
    }


def vicreg_blocks(model: str, config: Config, masks: Masks) -> Case:
    """The default views: the predicted blocks' mean tokens, in fp32."""
    M, B = masks.target_idx_BMP.shape[1], len(masks.target_idx_BMP)
    D = model_sizes(config)["width"]
    return vicreg_case(f"{model}: {M}x{B}x{D}", (M, B, D), torch.float32)


def vicreg_tokens(n: int, D: int, dtype: torch.dtype) -> Case:
    return vicreg_case(f"tokens: {n}x{D}", (n, D), dtype)


def vicreg_case(label: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    M, n, D = (1, *shape)[-3:]
    return Case(
        shape=label, dtype=dtype,
        make=lambda device: (wanting(normal(device, *shape, dtype=dtype)),),
        work=vicreg_work(M, n, D, dtype), **pair(vicreg, "vicreg_terms"),
    )  # fmt: skip


def position_views(model: str, config: Config, masks: Masks) -> list[Case]:
    """SIGReg of the pooled contexts in fp32; VICReg and SIGReg of the contexts' tokens apart at
    each position."""
    B, D = len(masks.target_idx_BMP), model_sizes(config)["width"]
    N = patches_of(config)
    rows_NB = rows_by_position(masks.context, N)
    T = int(rows_NB.max()) + 1
    label = f"{model}: {N} of {T}x{D}"
    return [
        position_case(label, (T, D), rows_NB),
        sigreg_case(f"{model}: {B}x{D}", (B, D), torch.float32, torch.arange(B)[None]),
        sigreg_case(label, (T, D), torch.bfloat16, rows_NB),
    ]


def position_case(label: str, shape: tuple[int, int], rows: torch.Tensor) -> Case:
    T, D = shape
    values, matrix, products = T * D * BF16, 4 * D**2, T * D**2
    return Case(
        shape=label, dtype=torch.bfloat16,
        make=lambda device: (wanting(normal(device, *shape)), rows.to(device)),
        work={
            "forward": Cost(2 * values + 8 * T * D + matrix, products),
            "backward": Cost(values + 4 * T * D + matrix, 2 * products),
        },
        **pair(vicreg, "vicreg_position_terms"),
    )  # fmt: skip


def sigreg_case(label: str, shape: tuple[int, int], dtype: torch.dtype, rows: torch.Tensor) -> Case:
    def make(device: torch.device) -> tuple:
        directions = F.normalize(normal(device, shape[1], DIRECTIONS, dtype=torch.float32), dim=0)
        return wanting(normal(device, *shape, dtype=dtype)), directions, rows.to(device)

    return Case(
        shape=label, dtype=dtype, make=make, work=sigreg_work(*shape, len(rows), dtype),
        **pair(sigreg, "sigreg_statistic"),
    )  # fmt: skip


def sigreg_work(T: int, D: int, G: int, dtype: torch.dtype) -> dict[str, Cost]:
    """The least work: each matmul once, and 8 operations for each rotation."""
    values, rotations = T * D * dtype.itemsize, 8 * T * DIRECTIONS * (KNOTS - 1)
    sums, flop = 8 * G * (KNOTS - 1) * DIRECTIONS + 4 * D * DIRECTIONS, 2 * T * D * DIRECTIONS
    return {
        "forward": Cost(values + sums, flop + rotations),
        "backward": Cost(2 * values + sums + 8 * T * DIRECTIONS, 2 * flop + rotations),
    }
