"""The Vision Transformer: patch embedding, attention, block, encoder.

Parameter names and maths are I-JEPA's (Assran et al. 2023, arXiv 2301.08243), so that its
checkpoints load: no class token, fixed 2-D sin-cos positions, pre-norm blocks, exact GELU.
Shapes: B images, N patches, K context patches, D width, H heads, S tokens of a sequence. Packed
sequences (sequences.py) are one row of S = T tokens, B = 1, of which only attention sees the cuts.
"""

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cjepa_fast.kernels.gather import add_positions, gather_tokens
from cjepa_fast.model import fused_blocks
from cjepa_fast.model.attention import (
    attend,
    attend_by_block,
    attend_packed,
    attention_map,
    flash_attention,
)
from cjepa_fast.model.cpu_linear import Linear, linear, linear_gelu
from cjepa_fast.model.packed import PackedContext, Sequences

# What attention must know of a row: one sequence; or several packed; or (M, P), a context and then
# M blocks of P tokens, as attention.attend_by_block sees them.
Layout = None | Sequences | tuple[int, int]

MODELS = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3, "mlp_ratio": 4.0},
    "vit_small": {"width": 384, "depth": 12, "heads": 6, "mlp_ratio": 4.0},
    "vit_base": {"width": 768, "depth": 12, "heads": 12, "mlp_ratio": 4.0},
    "vit_large": {"width": 1024, "depth": 24, "heads": 16, "mlp_ratio": 4.0},
    "vit_huge": {"width": 1280, "depth": 32, "heads": 16, "mlp_ratio": 4.0},
    "vit_giant": {"width": 1408, "depth": 40, "heads": 16, "mlp_ratio": 48 / 11},
}

# The parts of a trained block that run again in the backward, by policy: see Block.
RECOMPUTED = {
    "none": (),
    "norm_gelu": ("heads", "hidden", "output"),
    "selective": ("heads", "mlp"),
    "full": ("block",),
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
        return linear(patches_BKC, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = PatchProjection(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches_BKC: torch.Tensor) -> torch.Tensor:
        return self.proj(patches_BKC)


class Norm(nn.LayerNorm):
    """LayerNorm in the dtype of the residual stream; its output has the dtype of its weights."""

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        affine = self.weight.to(x_BSD.dtype), self.bias.to(x_BSD.dtype)
        return F.layer_norm(x_BSD, self.normalized_shape, *affine, self.eps).to(self.weight.dtype)


def last_of(x_BSD: torch.Tensor, last: int, layout: Layout) -> torch.Tensor:
    """The last tokens of each sequence: (B, last, D), or packed again, (1, real * last, D)."""
    if isinstance(layout, Sequences):
        return x_BSD.index_select(1, layout.last(last))
    return x_BSD[:, -last:]


class QueryKeyValue(Linear):
    """The three projections of attention as one Linear of width D -> 3 D."""

    def forward(
        self, x_BSD: torch.Tensor, last: int | None = None, layout: Layout = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v, each (B, S, D); q of the last tokens alone if asked, (B, last, D)."""
        D = x_BSD.shape[-1]
        if last is None:
            return super().forward(x_BSD).split(D, -1)
        q = linear(last_of(x_BSD, last, layout), self.weight[:D], self.bias[:D])
        return q, *linear(x_BSD, self.weight[D:], self.bias[D:]).split(D, -1)


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
        self.proj = Linear(width, width)

    def heads_of(
        self, x_BSD: torch.Tensor, last: int | None = None, layout: Layout = None
    ) -> list[torch.Tensor]:
        """q, k and v, each (B, H, S, d); q of the last tokens alone if asked."""
        parts = self.qkv(x_BSD, last, layout)
        return [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts]

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        last: int | None = None,
        layout: Layout = None,
    ) -> torch.Tensor:
        """(B, S, D) from what `heads_of` gave, asked for the same."""
        if isinstance(layout, Sequences):
            queries = layout if last is None else layout.of_last(last)
            rows = (x_1HSd[0].transpose(0, 1) for x_1HSd in (q, k, v))
            return self.proj(attend_packed(*rows, queries, layout, self.backend).flatten(1)[None])
        if layout is None:
            x_BHSd = attend(q, k, v, self.backend)
        else:
            x_BHSd = attend_by_block(q, k, v, *layout, self.backend)
        return self.proj(x_BHSd.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.fc2(linear_gelu(x_BSD, self.fc1.weight, self.fc1.bias))

    def output(self, hidden_BSX: torch.Tensor) -> torch.Tensor:
        """What follows fc1."""
        return self.fc2(F.gelu(hidden_BSX))


def _keep_products():
    """For checkpoint: the contexts in which the outputs of matrix products stay."""
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts([aten.addmm.default, aten.mm.default])


class Block(nn.Module):
    """x + attention(norm1(x)), and to that the MLP of its norm2; sums in the dtype of x.

    checkpointing says what is kept for the backward, given here in values a token at MLP ratio 4,
    beside the maps or sums of attention. The rest is computed again there, to the same bits.
      "none": all that autograd asks for, 16 D;
      "norm_gelu": all but the outputs of LayerNorm and GELU, 10 D. No product runs twice (but the
        queries of a predictor's last block, where nothing is compiled);
      "selective": x, q, k, v, attention's output and the sum after it, 6 D. fc1 runs twice: 1/9 of
        the products of forward and backward more, attention's left out;
      "full": x alone, D (fused, x and the branch not yet added to it, 2 D). All but fc2 runs twice,
        attention too: 2/9 more.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        backend: str = "auto",
        checkpointing: str = "none",
    ):
        super().__init__()
        self.norm1 = Norm(width, eps=1e-6)
        self.attn = Attention(width, heads, backend)
        self.norm2 = Norm(width, eps=1e-6)
        self.mlp = MLP(width, round(width * mlp_ratio))
        self.recomputed = RECOMPUTED[checkpointing]

    def forward(
        self,
        x_BSD: torch.Tensor,
        last: int | None = None,
        layout: Layout = None,
    ) -> torch.Tensor:
        """All tokens, or the last of each sequence alone, (B, last, D), having attended to all."""
        return self._run("block", self._forward, x_BSD, last, layout)

    def _recomputes(self, part: str) -> bool:
        return part in self.recomputed and torch.is_grad_enabled()

    def _run(self, part: str, function: Callable, *args) -> torch.Tensor:
        """function(*args). Of a part that is recomputed only the arguments are kept.

        It runs again until all is there that its own backward asks for: a Linear at its end does
        not. A compiler would have it run where the next part's backward asks for its output, so it
        is told to keep that.
        """
        if not self._recomputes(part):
            return function(*args)
        options = {}
        if part in ("heads", "hidden") and torch.compiler.is_compiling():
            options["context_fn"] = _keep_products
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)

    def _forward(self, x_BSD: torch.Tensor, last: int | None, layout: Layout) -> torch.Tensor:
        heads = self._run("heads", self._heads, x_BSD, last, layout)
        x_BSD = x_BSD if last is None else last_of(x_BSD, last, layout)
        x_BSD = x_BSD + self.attn(*heads, last, layout)
        return x_BSD + self._run("mlp", self._mlp, x_BSD)

    def _heads(self, x_BSD: torch.Tensor, last: int | None, layout: Layout) -> list[torch.Tensor]:
        return self.attn.heads_of(self.norm1(x_BSD), last, layout)

    def _mlp(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if not self._recomputes("hidden"):
            return self.mlp(self.norm2(x_BSD))
        return self._run("output", self.mlp.output, self._run("hidden", self._hidden, x_BSD))

    def _hidden(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.mlp.fc1(self.norm2(x_BSD))


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
    residual: "fp32" keeps the stream between the blocks in fp32 where the weights are bf16; the
    products and the output stay bf16. checkpointing: see Block. Where `fused` is set, the blocks
    run as fused.py's operators on what those take.
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
        residual: str = "bf16",
        checkpointing: str = "none",
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}"
            )
        self.image_size, self.patch_size, self.width = image_size, patch_size, width
        self.depth, self.heads, self.mlp_ratio = depth, heads, mlp_ratio
        self.residual, self.fused = residual, False
        self.grid = (image_size // patch_size,) * 2
        self.patch_embed = PatchEmbed(patch_size, width)
        self.pos_embed = frozen_positions(*self.grid, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, attention, checkpointing) for _ in range(depth)
        )
        self.norm = Norm(width, eps=1e-6)
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
        if self.fused and packed is None and fused_blocks.supports(self.blocks, x):
            return fused_blocks.run(self.blocks, self.norm, x)
        for block in self.blocks:
            x = block(x, layout=packed)
        return self.norm(x)

    def layers(self, images_B3HW: torch.Tensor, wanted: Collection[int]) -> list[torch.Tensor]:
        """Tokens of all patches after each wanted block, counted from 1, normed: each (B, N, D).

        Raises ValueError for a block that is not there.
        """
        if not wanted or min(wanted) < 1 or max(wanted) > self.depth:
            raise ValueError(f"blocks {sorted(wanted)} of an encoder that has 1 to {self.depth}")
        x = self.embed(images_B3HW, None)
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
    def attention_maps(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """The last block's attention over the whole image: (B, H, N, N), rows summing to one."""
        x = self.embed(images_B3HW, None)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        q, k, _ = last.attn.heads_of(last.norm1(x))
        return attention_map(q, k)


def stream_of(positions: torch.Tensor, residual: str) -> torch.Tensor:
    """The positions in the residual stream's dtype: what is added to them takes it, and so on."""
    return positions.float() if residual == "fp32" else positions


def count_parameters(module: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in module.parameters() if p.requires_grad)
