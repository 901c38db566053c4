"""The Vision Transformer: patch embedding, attention, block, encoder.

Parameter names and maths are I-JEPA's (Assran et al. 2023, arXiv 2301.08243), so that its
checkpoints load: no class token, fixed 2-D sin-cos positions, pre-norm blocks, exact GELU.
Shapes: B images, N patches, K context patches, D width, H heads, S tokens of a sequence. Packed
sequences (sequences.py) are one row of S = T tokens, B = 1, of which only attention sees the cuts.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from cjepa_fast.attention import attend, attend_packed, attention_map, flash_attention
from cjepa_fast.kernels.gather import add_positions, gather_tokens
from cjepa_fast.sequences import PackedContext, Sequences

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
    angles = [place.flatten()[:, None] * frequency for place in (col, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1).float()


def patchify(images_B3HW: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images cut into patches, row-major: (B, N, 3 * patch_size^2), each as (channel, y, x)."""
    B, C, height, width = images_B3HW.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height}x{width} do not divide into patches of {patch_size}")
    rows, cols = height // patch_size, width // patch_size
    tiles = images_B3HW.reshape(B, C, rows, patch_size, cols, patch_size)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(B, rows * cols, C * patch_size**2)


class PatchProjection(nn.Conv2d):
    """A patch-sized convolution as a matrix product, so that chosen patches alone are embedded."""

    def forward(self, patches_BKC: torch.Tensor) -> torch.Tensor:
        return F.linear(patches_BKC, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = PatchProjection(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches_BKC: torch.Tensor) -> torch.Tensor:
        return self.proj(patches_BKC)


def last_of(x_BSD: torch.Tensor, last: int, packed: Sequences | None) -> torch.Tensor:
    """The last tokens of each sequence: (B, last, D), or packed again, (1, real * last, D)."""
    return x_BSD[:, -last:] if packed is None else x_BSD.index_select(1, packed.last(last))


class QueryKeyValue(nn.Linear):
    """The three projections of attention as one Linear of width D -> 3 D."""

    def forward(
        self, x_BSD: torch.Tensor, last: int | None = None, packed: Sequences | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v, each (B, S, D); q of the last tokens alone if asked, (B, last, D)."""
        D = x_BSD.shape[-1]
        if last is None:
            return super().forward(x_BSD).split(D, -1)
        q = F.linear(last_of(x_BSD, last, packed), self.weight[:D], self.bias[:D])
        return q, *F.linear(x_BSD, self.weight[D:], self.bias[D:]).split(D, -1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, backend: str = "auto"):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        if backend == "flash_attn":
            flash_attention()  # to fail here, not in the first step
        self.heads = heads
        self.backend = backend
        self.qkv = QueryKeyValue(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def heads_of(
        self, x_BSD: torch.Tensor, last: int | None = None, packed: Sequences | None = None
    ) -> list[torch.Tensor]:
        """q, k and v, each (B, H, S, d); q of the last tokens alone if asked."""
        parts = self.qkv(x_BSD, last, packed)
        return [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts]

    def forward(
        self, x_BSD: torch.Tensor, last: int | None = None, packed: Sequences | None = None
    ) -> torch.Tensor:
        q, k, v = self.heads_of(x_BSD, last, packed)
        if packed is None:
            return self.proj(attend(q, k, v, self.backend).transpose(1, 2).flatten(2))
        queries = packed if last is None else packed.of_last(last)
        rows = (x_1HSd[0].transpose(0, 1) for x_1HSd in (q, k, v))
        return self.proj(attend_packed(*rows, queries, packed, self.backend).flatten(1)[None])


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x_BSD)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, backend: str = "auto"):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, backend)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, round(width * mlp_ratio))

    def forward(
        self, x_BSD: torch.Tensor, last: int | None = None, packed: Sequences | None = None
    ) -> torch.Tensor:
        """All tokens, or the last ones alone, (B, last, D), having attended to all."""
        whole, x_BSD = x_BSD, x_BSD if last is None else last_of(x_BSD, last, packed)
        x_BSD = x_BSD + self.attn(self.norm1(whole), last, packed)
        return x_BSD + self.mlp(self.norm2(x_BSD))


def init_weights(module: nn.Module, std: float = 0.02) -> None:
    """I-JEPA's initialisation: truncated normal weights, zero biases, unit norms."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def frozen_positions(rows: int, cols: int, width: int) -> nn.Parameter:
    return nn.Parameter(sincos_positions(rows, cols, width)[None], requires_grad=False)


class Encoder(nn.Module):
    """A ViT over the patches of an image, or over a chosen subset of them.

    image_size and patch_size are in pixels; the grid is (image_size // patch_size) squared.
    Raises ValueError when the image is no multiple of the patch or the width none of the heads.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        attention: str = "auto",
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}"
            )
        self.image_size, self.patch_size, self.width = image_size, patch_size, width
        self.depth, self.heads, self.mlp_ratio = depth, heads, mlp_ratio
        self.grid = (image_size // patch_size,) * 2
        self.patch_embed = PatchEmbed(patch_size, width)
        self.pos_embed = frozen_positions(*self.grid, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights)

    @property
    def architecture(self) -> dict:
        """The constructor's arguments that decide the weights' shapes, as in encoder.json."""
        names = ("image_size", "patch_size", "width", "depth", "heads", "mlp_ratio")
        return {name: getattr(self, name) for name in names}

    def positions(self, rows: int, cols: int) -> torch.Tensor:
        """(rows * cols, D): the positions, interpolated (bicubic) for another grid than trained."""
        if (rows, cols) == self.grid:
            return self.pos_embed[0]
        table = self.pos_embed.float().view(1, *self.grid, self.width).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(rows, cols), mode="bicubic", align_corners=False)
        return table.permute(0, 2, 3, 1).reshape(rows * cols, self.width).to(self.pos_embed.dtype)

    def embed(
        self, images_B3HW: torch.Tensor, context: torch.Tensor | PackedContext | None
    ) -> torch.Tensor:
        """Patch tokens with their positions, before the blocks, in the shape of `forward`."""
        patches = patchify(images_B3HW, self.patch_size)
        positions = self.positions(*(size // self.patch_size for size in images_B3HW.shape[-2:]))
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
        return add_positions(self.patch_embed(chosen), positions, idx)

    def forward(
        self,
        images_B3HW: torch.Tensor,
        context: torch.Tensor | PackedContext | None = None,
    ) -> torch.Tensor:
        """Tokens of all patches (B, N, D), or of the context's, after the last norm.

        context: int64 (B, K), for (B, K, D), or packed, for (1, T, D).
        """
        packed = context.sequences if isinstance(context, PackedContext) else None
        x = self.embed(images_B3HW, context)
        for block in self.blocks:
            x = block(x, packed=packed)
        return self.norm(x)

    @torch.no_grad()
    def attention_maps(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """The last block's attention over the whole image: (B, H, N, N), rows summing to one."""
        x = self.embed(images_B3HW, None)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        q, k, _ = last.attn.heads_of(last.norm1(x))
        return attention_map(q, k)


def count_parameters(module: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in module.parameters() if p.requires_grad)
