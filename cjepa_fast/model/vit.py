"""The Vision Transformer: patch embedding, positions, encoder; block.py has attention and block.

Parameter names and maths are I-JEPA's (Assran et al. 2023, arXiv 2301.08243), so that its
checkpoints load: no class token, fixed 2-D sin-cos positions, pre-norm blocks, exact GELU.
Positions can also be learned, as those of most other ViTs are, and GELU be tanh's.
Shapes: B images, N patches, K context patches, D width, H heads, S tokens of a sequence. Packed
sequences (packed.py) are one row of S = T tokens, B = 1, of which only attention sees the cuts.
"""

import functools
import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import nn

from cjepa_fast.kernels.gather import add_positions, gather_tokens
from cjepa_fast.kernels.gelu import APPROXIMATE
from cjepa_fast.model.attention import (
    attention_map,
)
from cjepa_fast.model.block import Block, Norm, run_fused, supports
from cjepa_fast.model.cpu_linear import linear
from cjepa_fast.model.packed import PackedContext
from cjepa_fast.runtime.image_size import ImageSize, height_width, patch_grid, simplest

MODELS = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3, "mlp_ratio": 4.0},
    "vit_small": {"width": 384, "depth": 12, "heads": 6, "mlp_ratio": 4.0},
    "vit_base": {"width": 768, "depth": 12, "heads": 12, "mlp_ratio": 4.0},
    "vit_large": {"width": 1024, "depth": 24, "heads": 16, "mlp_ratio": 4.0},
    "vit_huge": {"width": 1280, "depth": 32, "heads": 16, "mlp_ratio": 4.0},
    "vit_giant": {"width": 1408, "depth": 40, "heads": 16, "mlp_ratio": 48 / 11},
}


def sincos_positions(rows: int, cols: int, width: int) -> torch.Tensor:
    """Fixed 2-D sin-cos positions: (rows * cols, width) fp32, row-major.

    The first half of the width encodes the column, the second the row; each half is [sin | cos]
    with frequencies 10000^(-i / (width / 4)), computed in float64.
    """
    if width % 4:
        raise ValueError(f"width {width} must be a multiple of 4 for 2-D sin-cos positions")
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, col = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(cols, dtype=torch.float64),
        indexing="ij",
    )
    angles = [x.flatten()[:, None] * frequency for x in (col, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1).float()


def patchify(images_BCHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images cut into patches, row-major: (B, N, C * patch_size^2), each as (channel, y, x)."""
    B, C, height, width = images_BCHW.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height}x{width} do not divide into patches of {patch_size}")
    rows, cols = height // patch_size, width // patch_size
    tiles = images_BCHW.reshape(B, C, rows, patch_size, cols, patch_size)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(B, rows * cols, C * patch_size**2)


class PatchProjection(nn.Conv2d):
    """A patch-sized convolution as a matmul, so that chosen patches alone are embedded."""

    def forward(self, patches_BKC: torch.Tensor) -> torch.Tensor:
        operands = patches_BKC, self.weight.flatten(1)
        if patches_BKC.is_cuda:
            operands = map(aligned, operands)
        return linear(*operands, self.bias)


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """Rows with zeros behind them up to a multiple of 16 bytes, below which a GPU's fast matmuls
    do not go: a patch of 14 x 14 x 3 values has 588, in bf16 73.5 times that. The result is
    unchanged."""
    values = 16 // rows.itemsize
    return F.pad(rows, (0, -rows.shape[-1] % values))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int, channels: int = 3):
        super().__init__()
        self.proj = PatchProjection(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches_BKC: torch.Tensor) -> torch.Tensor:
        return self.proj(patches_BKC)


INITS = ("ijepa", "xavier")
XAVIER_BELOW = 384  # widths; see initialisation()


def initialisation(name: str, width: int) -> str:
    """model.init, "auto" resolved for an encoder of this width.

    I-JEPA's std of 0.02 suits its widths. At 96 to 192 it is 4 to 5 times too small: patches come
    out at 0.14 rms beside positions of 0.71, and attention starts flat (docs/collapse.md).
    """
    if name != "auto":
        return name
    return "xavier" if width < XAVIER_BELOW else "ijepa"


def init_weights(module: nn.Module, init: str = "ijepa") -> None:
    """Weights normal of std 0.02 ("ijepa") or uniform by fan-in and fan-out ("xavier", as in
    MAE's); zero biases, unit norms.

    I-JEPA's code cuts at -2 and 2, which no value reaches: they are 100 times the std. But the
    trunc_normal_ of torch 2.11 gives one value in 2^24 just these, dozens of ViT-H's weights.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        if init == "xavier":
            nn.init.xavier_uniform_(module.weight.flatten(1))
        else:
            nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def frozen_positions(rows: int, cols: int, width: int) -> nn.Parameter:
    return nn.Parameter(sincos_positions(rows, cols, width)[None], requires_grad=False)


class Encoder(nn.Module):
    """A ViT over the patches of an image, or over a chosen subset of them.

    image_size, a square's side or (height, width), and patch_size are in pixels; the grid is
    (height // patch_size, width // patch_size).
    residual: "fp32" keeps the residual stream in fp32 where the weights are bf16; the
    matmuls and the output stay bf16. checkpointing: see recompute.py; init: see init_weights.
    learned_positions: they start as the sin-cos, and are trained. gelu: "exact", or "tanh", torch's
    approximation of it. Where `fused` is set, the blocks run by our kernels on what those take.
    Raises ValueError for another init or gelu, and when the image is no multiple of the patch or
    the width none of the heads.
    """

    def __init__(
        self,
        image_size: ImageSize,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        attention: str = "auto",
        residual: str = "bf16",
        checkpointing: str = "none",
        init: str = "ijepa",
        channels: int = 3,
        learned_positions: bool = False,
        gelu: str = "exact",
    ):
        super().__init__()
        self.image_size = simplest(image_size)
        if any(side % patch_size for side in height_width(image_size)):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {patch_size}"
            )
        if init not in INITS:
            raise ValueError(f"init {init!r}: must be one of {', '.join(INITS)}")
        if gelu not in APPROXIMATE:
            raise ValueError(f"gelu {gelu!r}: must be one of {', '.join(APPROXIMATE)}")
        self.patch_size, self.width = patch_size, width
        self.depth, self.heads, self.mlp_ratio = depth, heads, mlp_ratio
        self.residual, self.fused, self.init = residual, False, init
        self.grid = patch_grid(self.image_size, patch_size)
        self.channels, self.learned_positions, self.gelu = channels, learned_positions, gelu
        self.patch_embed = PatchEmbed(patch_size, width, channels)
        self.pos_embed = frozen_positions(*self.grid, width).requires_grad_(learned_positions)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, attention, checkpointing, gelu) for _ in range(depth)
        )
        self.norm = Norm(width, eps=1e-6)
        self.apply(functools.partial(init_weights, init=init))

    @property
    def architecture(self) -> dict:
        """The constructor's arguments that decide what it computes and starts from, as in
        encoder.json; of three channels, fixed positions and exact GELU nothing is said there."""
        names = ["image_size", "patch_size", "width", "depth", "heads", "mlp_ratio", "init"]
        names += ["channels"] if self.channels != 3 else []
        names += ["learned_positions"] if self.learned_positions else []
        names += ["gelu"] if self.gelu != "exact" else []
        return {name: getattr(self, name) for name in names}

    def positions(self, rows: int, cols: int) -> torch.Tensor:
        """(rows * cols, D): the positions, interpolated (bicubic) for another grid than trained."""
        if (rows, cols) == self.grid:
            return self.pos_embed[0]
        table = self.pos_embed.float().view(1, *self.grid, self.width).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(rows, cols), mode="bicubic", align_corners=False)
        return table.permute(0, 2, 3, 1).reshape(rows * cols, self.width).to(self.pos_embed.dtype)

    def embedded(
        self, images_BCHW: torch.Tensor, context: torch.Tensor | PackedContext | None
    ) -> torch.Tensor:
        """Patch tokens with their positions, before the blocks, in the shape of `forward`."""
        if images_BCHW.shape[1] != self.channels:
            raise ValueError(
                f"images of {images_BCHW.shape[1]} channels for an encoder of {self.channels}"
            )
        patches = patchify(images_BCHW, self.patch_size)
        positions = self.positions(*(size // self.patch_size for size in images_BCHW.shape[-2:]))
        positions = stream_of(positions, self.residual)
        if context is None:
            return self.patch_embed(patches) + positions
        rows = idx = context
        if isinstance(context, PackedContext):  # all images' patches as those of one
            patches, rows, idx = (
                patches.flatten(0, 1)[None],
                context.rows_T[None],
                context.idx_T[None],
            )
        chosen = gather_tokens(patches, rows)  # so that these alone are embedded
        if positions.requires_grad:
            return self.patch_embed(chosen) + trained_positions(positions, idx)
        return add_positions(self.patch_embed(chosen), positions, idx)

    def forward(
        self,
        images_BCHW: torch.Tensor,
        context: torch.Tensor | PackedContext | None = None,
    ) -> torch.Tensor:
        """Tokens of all patches (B, N, D), or of the context's, after the last norm.

        context: int64 (B, K), for (B, K, D), or packed, for (1, T, D).
        """
        packed = context.sequences if isinstance(context, PackedContext) else None
        x = self.embedded(images_BCHW, context)
        if self.fused and packed is None and supports(self.blocks, x):
            return run_fused(self.blocks, self.norm, x)
        for block in self.blocks:
            x = block(x, layout=packed)
        return self.norm(x)

    def layers(self, images_BCHW: torch.Tensor, wanted: Collection[int]) -> list[torch.Tensor]:
        """Tokens of all patches after each wanted block, counted from 1, normed: each (B, N, D).

        Raises ValueError for a block that is not there.
        """
        if not wanted or min(wanted) < 1 or max(wanted) > self.depth:
            raise ValueError(f"blocks {sorted(wanted)} of an encoder that has 1 to {self.depth}")
        x = self.embedded(images_BCHW, None)
        found = []
        for number, block in enumerate(self.blocks[: max(wanted)], 1):
            x = block(x)
            if number in wanted:
                found.append(self.norm(x))
        return found

    def last(self, count: int) -> range:
        """The numbers of the last `count` blocks. Raises ValueError for more than there are."""
        if count > self.depth:
            raise ValueError(f"the last {count} layers of an encoder of {self.depth} blocks")
        return range(self.depth - count + 1, self.depth + 1)

    @torch.no_grad()
    def attention_maps(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """The last block's attention over the whole image: (B, H, N, N), rows summing to one."""
        x = self.embedded(images_BCHW, None)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        q, k, _ = last.attn.heads_of(last.norm1(x))
        return attention_map(q, k)

    def attention_received(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """What each patch receives there, over all queries: (B, H, rows, cols), each map summing
        to one, fp32."""
        grid = tuple(size // self.patch_size for size in images_BCHW.shape[-2:])
        return self.attention_maps(images_BCHW).float().mean(2).unflatten(-1, grid)


def trained_positions(positions_ND: torch.Tensor, idx_BK: torch.Tensor) -> torch.Tensor:
    """positions[idx]: (B, K, D). Their gradient, a sum over the images, is summed in fp32 at least:
    in bf16 it would be 1.4 % off after 160 terms. Each device has one of two ways that sums in the
    same order every time: on a CPU indexing's gradient adds from several threads at once."""
    wide = positions_ND.to(torch.promote_types(positions_ND.dtype, torch.float32))
    if wide.device.type == "cpu":
        chosen = wide.index_select(0, idx_BK.flatten()).view(*idx_BK.shape, -1)
    else:
        chosen = wide[idx_BK]
    return chosen.to(positions_ND.dtype)


def stream_of(positions: torch.Tensor, residual: str) -> torch.Tensor:
    """The positions in the residual stream's dtype: what is added to them takes it, and so on."""
    return positions.float() if residual == "fp32" else positions


def count_parameters(module: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in module.parameters() if p.requires_grad)
