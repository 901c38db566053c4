"""The linear layers of an encoder's blocks in FP8: weights and inputs by row.

    y = x W^T + b  ~  (x8 W8^T) * (scale of the token) * (scale of the output) + b

x8 and W8 are e4m3 (kernels/fp8.py); the sums are fp32, the result bf16. qkv, proj, fc1 and fc2 of
the blocks are replaced; the norm before qkv and fc1 and the GELU before fc2 write FP8 at once.
The patch embedding, the attention, the residual and the last norm stay bf16.

Each operand is off by 2.4 % of itself in the mean square, so a matmul by 3.4 %, whatever the
scales: e4m3 has 4 significant bits.

The target encoder takes no gradient and keeps its weights in FP8 (FP8Linear). The context encoder
is trained (trained_linear): its weights stay in bf16 and are quantised in each call.

    dx = dy W    ~  (dy8 V8^T) * (scale of the token) * (scale of the input),  V = W^T
    dW = dy^T x  in bf16

dx sums over the outputs, so a scale belongs to a row of V, which is a column of W. dy is in e4m3
too. e5m2 has a bit less, and is off by 4.8 %; its wider range serves where a whole tensor has one
scale. Here each row has its own, and e4m3 keeps its precision down to 1 / 28,672 of the row's
largest value.

Bytes that a trained Linear moves beside its matmuls: 3 a value of x and of dy, 10 a weight (3 for
its rows; 7 for its columns, which are copied first).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from cjepa_fast.kernels.fp8 import Rows, quantise_gelu, quantise_norm, quantise_rows
from cjepa_fast.model.cpu_linear import plain_weight_gradient
from cjepa_fast.runtime import hardware

MULTIPLE = 16  # of which every width must be one, for a GPU's matmul
FAST_SUMS = False  # True: sums of fewer bits than fp32's in the tensor cores; see short_sums
# Of the tensor cores of sm_89 and sm_90: the values that one instruction sums, and the last bits of
# an fp32 fraction that its accumulator drops (13 of 23 stay: SageAttention2, arXiv 2411.10958).
INSTRUCTION, DROPPED_BITS = 32, 10


def matmul_reference(x: Rows, weight: Rows, bias: torch.Tensor | None) -> torch.Tensor:
    matmul = short_sums if FAST_SUMS else F.linear
    out = matmul(x.values.float(), weight.values.float()) * x.scales * weight.scales.T
    return (out if bias is None else out + bias.float()).bfloat16()


def short_sums(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., C) times weight (O, C), fp32, summed as the tensor cores do with fast sums.

    After each instruction the accumulator's last bits are cut off. Without fast sums the library
    moves it to an fp32 sum every few instructions. The cut of the single products within an
    instruction, to the same bits of the greatest, is left out: one rounding of 32, not a sum of
    roundings.
    """
    out = x.new_zeros(*x.shape[:-1], len(weight))
    parts = zip(x.split(INSTRUCTION, -1), weight.split(INSTRUCTION, -1), strict=True)
    for x_part, weight_part in parts:
        out += F.linear(x_part, weight_part)
        bits = out.view(torch.int32)
        bits &= -1 << DROPPED_BITS  # towards zero
    return out


def matmul(x: Rows, weight: Rows, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., C) times weight (O, C), plus bias (O,) in bf16, if any: (..., O) in bf16."""
    if not x.values.is_cuda:
        return matmul_reference(x, weight, bias)
    out = torch._scaled_mm(
        x.values.flatten(0, -2),
        weight.values.t(),
        x.scales.flatten(0, -2),
        weight.scales.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=FAST_SUMS,
    )
    return out.view(*x.values.shape[:-1], -1)


class FP8Linear(nn.Module):
    """A Linear with its weight in FP8: `weight` (O, C) e4m3, `scales` (O, 1) fp32, `bias`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        rows = quantise_rows(linear.weight.data)
        self.weight = nn.Parameter(rows.values, requires_grad=False)
        self.register_buffer("scales", rows.scales)
        self.bias = linear.bias

    def write(self, weight: torch.Tensor) -> None:
        """Take another weight, of bf16 values, into the same memory."""
        rows = quantise_rows(weight.view_as(self.weight))
        self.weight.data.copy_(rows.values)
        self.scales.copy_(rows.scales)

    def forward(self, x: torch.Tensor | Rows) -> torch.Tensor:
        rows = x if isinstance(x, Rows) else quantise_rows(x)
        return matmul(rows, Rows(self.weight, self.scales), self.bias)


class FP8QueryKeyValue(FP8Linear):
    """q, k and v of all tokens, as block.QueryKeyValue gives them."""

    def forward(self, x: Rows, last: None = None, layout: None = None) -> tuple[torch.Tensor, ...]:
        return super().forward(x).chunk(3, -1)

    def side_by_side(self, x: Rows) -> torch.Tensor:
        """The three as one, (..., 3 D)."""
        return super().forward(x)


class FP8Norm(nn.Module):
    """A LayerNorm whose output is in FP8."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> Rows:
        return quantise_norm(x, self.weight, self.bias, self.eps)


class FP8MLP(nn.Module):
    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.fc1, self.fc2, self.gelu = FP8Linear(mlp.fc1), FP8Linear(mlp.fc2), mlp.gelu

    def forward(self, x: Rows) -> torch.Tensor:
        return self.fc2(quantise_gelu(self.fc1(x), self.gelu))


def linears_to_fp8(encoder: nn.Module) -> dict[str, FP8Linear]:
    """Replace the linear layers of an encoder's blocks, in place: the new ones, by weight's name.

    The encoder must be in bf16 and takes no gradient from here on.
    """
    for block in encoder.blocks:
        block.norm1, block.norm2 = FP8Norm(block.norm1), FP8Norm(block.norm2)
        block.attn.qkv = FP8QueryKeyValue(block.attn.qkv)
        block.attn.proj = FP8Linear(block.attn.proj)
        block.mlp = FP8MLP(block.mlp)
    layers = {
        name: layer for name, layer in encoder.named_modules() if isinstance(layer, FP8Linear)
    }
    return {f"{name}.weight": layer for name, layer in layers.items()}


# --- trained


def train_in_fp8(encoder: nn.Module) -> None:
    """Let the blocks' Linears compute so from here on, those of an encoder in bf16."""
    for block in encoder.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.in_fp8 = True


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x (..., C), weight (O, C) and bias (O,) in bf16: (..., O) in bf16."""
    return matmul(quantise_rows(x), quantise_rows(weight), bias)


def input_gradient(dout: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of x (..., C), from dout (..., O), by an FP8 matmul."""
    return matmul(quantise_rows(dout), quantise_rows(weight.t().contiguous()), None)


def trained_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`linear`, with the gradients above.

    In two steps, since autograd takes what a Function saves when its forward ends. So a part of a
    block that is recomputed (recompute.py) ends before the matmul, as it does before F.linear.
    """
    gradients_to = _LinearGradients.apply(x, weight, bias)
    return _LinearOutput.apply(gradients_to, x.detach(), weight.detach(), bias.detach())


class _LinearGradients(Function):
    """A placeholder in the shape of the output, whose gradient is that of x, weight and bias."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x.new_empty(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        dbias = dout.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return input_gradient(dout, weight), plain_weight_gradient(dout, x), dbias


class _LinearOutput(Function):
    """The Linear, whose gradient goes to the placeholder."""

    @staticmethod
    def forward(ctx, gradients_to, x, weight, bias):
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dout):
        return dout, None, None, None


def check_device(device: torch.device) -> None:
    """Raises ValueError for a GPU without FP8 matmuls. A CPU computes them in fp32."""
    if device.type == "cuda" and not hardware.gpu_multiplies_fp8(device):
        major, minor = hardware.capability(device)
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"{name} (sm_{major}{minor}) cannot multiply FP8, which begins with sm_89")
