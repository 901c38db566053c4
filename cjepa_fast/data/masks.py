"""Multi-block masks: which patches are context and which are targets (I-JEPA, arXiv 2301.08243).

M target blocks of one size lie anywhere on the grid; the context is one large block minus the
targets. Block sizes are drawn once a step, positions once an image. Every draw is a pure function
of (seed, epoch, index) or (seed, epoch, step), so an image's layout is the same on any world size;
only the cut of "random" and "prefix" to the batch minimum, and that of the rare batch of "packed"
that exceeds its budget, depend on the batch it lands in.

Shapes: B images, H x W grid cells, N = H * W, M target blocks, P patches a block, K context
patches. Indices are row-major int64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from cjepa_fast.data import rng
from cjepa_fast.model.packed import PackedContext, pack

TRIES = 20  # redraws of a layout that keeps too little, before targets are given up (released code)
FIXED_QUANTILE = 0.1  # "fixed": this share of the images, at most, comes out short and is redrawn
PACKED_SIGMAS = 3.0  # "packed": the budget lies so far above the mean, so 1 batch in 700 exceeds it
TILE = 128  # rows that the large matmuls take at a time
_ATTEMPT_SHIFT = 40  # indices stay below 2^40; the bits above hold the number of the redraw
# torch works through fewer than 2^15 elements in the calling thread. Beyond, each of some 60 small
# steps waits for the other threads: on a busy machine 20 to 100 times the work (measured).
_SERIAL = 2**15 - 1
_CELL_BITS = 2**16 - 1  # room for a cell's number in the low bits of its random key


@dataclass(frozen=True)
class Masks:
    """context: int64 (B, K), ascending in a row, or packed; target_idx_BMP int64 (B, M, P)."""

    context: torch.Tensor | PackedContext
    target_idx_BMP: torch.Tensor

    @property
    def context_idx_BK(self) -> torch.Tensor:
        """The context where all images keep K patches. Raises ValueError where it is packed."""
        if isinstance(self.context, PackedContext):
            raise ValueError(
                'context "packed": its images have contexts of different lengths; take "random" or '
                '"fixed" for what needs them of one length'
            )
        return self.context

    @property
    def context_k(self) -> float:
        """Context patches an image, on average; padding does not count."""
        if isinstance(self.context, PackedContext):
            return self.context.tokens / self.context.images
        return float(self.context.shape[1])

    def context_of(self, image: int) -> torch.Tensor:
        """The context patches of one image: int64 (K,)."""
        packed = isinstance(self.context, PackedContext)
        return self.context.of_image(image) if packed else self.context[image]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Masks":
        return Masks(
            self.context.to(device, non_blocking=non_blocking),
            self.target_idx_BMP.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Masks":
        return Masks(self.context.pin_memory(), self.target_idx_BMP.pin_memory())

    def record_stream(self, stream) -> None:
        self.context.record_stream(stream)
        self.target_idx_BMP.record_stream(stream)


@dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of one step, in cells."""

    target_h: int
    target_w: int
    context_h: int
    context_w: int


@dataclass(frozen=True)
class MaskSampler:
    """Draws the masks of a batch; K >= min_keep always.

    grid: (rows, cols) of patches.
    sampler: "uniform" draws scale and aspect apart and reaches every position of the grid;
      "ijepa" is the released code's distribution: one number sets a target's scale and aspect,
      no block takes a whole side, and the last row and column are never used.
    context: "random" cuts each image to the batch minimum by a random subset; "prefix" keeps the
      first K of the row-major list, as the released code does, which favours the top of the image;
      "fixed" keeps block sizes and K (see `fixed_context`) for the whole run, cut at random;
      "packed" keeps block sizes and every context patch: the images' contexts lie end to end,
      padded to a number of tokens that is the same for the whole run (see `budget`).
    target_scale, context_scale: block area as a share of the grid, in (0, 1].
    target_aspect: height over width of the targets, in patches. The context block has the grid's
      aspect, or, under "ijepa", is square where the grid has room for it.
    min_keep: an image that keeps fewer context patches is redrawn up to 20 times; then target
      blocks are given up one by one, so that context may lie inside a given-up target. The
      released code wants more than min_keep, and so does "ijepa". Target blocks are not held to
      it.
    keep: K of "fixed", in place of its own (see `fixed_context`).

    Raises ValueError for settings that leave a block empty or can never keep min_keep patches.
    """

    grid: tuple[int, int]
    sampler: str = "uniform"
    context: str = "random"
    targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_keep: int = 10
    seed: int = 0
    keep: int | None = None

    def __post_init__(self):
        _choice("sampler", self.sampler, ("uniform", "ijepa"))
        _choice("context", self.context, ("random", "prefix", "fixed", "packed"))
        _grid(self.grid, self.sampler)
        _share("target_scale", self.target_scale)
        _share("context_scale", self.context_scale)
        low, high = self.target_aspect
        if not 0 < low <= high:
            raise ValueError(f"target_aspect {self.target_aspect}: need 0 < low <= high")
        if self.targets < 1:
            raise ValueError(f"targets {self.targets}: need at least one target block")
        if self.min_keep < 1:
            raise ValueError(f"min_keep {self.min_keep}: need at least one context patch")
        self._check_targets()
        self._check_min_keep()
        if self.keep is not None:
            self._check_keep(self.keep)

    def _check_targets(self) -> None:
        cells = int(self.cells * self.target_scale[0])
        low, high = self.target_aspect
        if round(math.sqrt(cells * low)) < 1 or round(math.sqrt(cells / high)) < 1:
            raise ValueError(
                f"target_scale {self.target_scale} with target_aspect {self.target_aspect} leaves "
                f"an empty target block on a grid of {self.grid}: raise the scale or the grid"
            )

    def _check_min_keep(self) -> None:
        smallest = self._block(self.context_scale[0], self.context_aspect)
        room = smallest[0] * smallest[1]
        if self.needed > room:
            raise ValueError(
                f"min_keep {self.min_keep} is more than the smallest context block on a grid of "
                f"{self.grid} can hold ({room} patches): lower it or raise context_scale"
            )

    def _check_keep(self, keep: int) -> None:
        if self.context != "fixed":
            raise ValueError(f'keep {keep}: of context "fixed" alone, not of "{self.context}"')
        most = int(self._typical_lengths.median())
        if not self.needed <= keep <= most:
            raise ValueError(
                f"keep {keep}: from {self.needed} (min_keep) to {most}, the patches that half of "
                "the images have left; for more of them raise context_scale or lower target_scale"
            )

    def __call__(
        self, epoch: int, step: int, index_B: torch.Tensor, device: torch.device | str = "cpu"
    ) -> Masks:
        """The masks of the images at the indices `index_B` (int64 (B,), B >= 1) of one epoch.

        Each redraw asks the host how many images are short, and the number of context patches of
        "random" and "prefix" is a shape: on a GPU that waits, so make them ahead on the CPU.
        """
        index_B = index_B.to(device)
        blocks = self.block_sizes(epoch, step)
        shares = index_B.split(self._share_of(index_B, blocks))
        corners, contexts = zip(*(self._layouts(epoch, blocks, s) for s in shares), strict=True)
        target_idx_BMP = _join([self._target_indices(blocks, c) for c in corners])
        if self.context == "packed":
            return Masks(self._packed(epoch, blocks, shares, contexts), target_idx_BMP)
        K = self._context_length(contexts)
        kept = [
            self._context_indices(epoch, s, context_BN, K)
            for s, context_BN in zip(shares, contexts, strict=True)
        ]
        return Masks(_join(kept), target_idx_BMP)

    def _share_of(self, index_B: torch.Tensor, blocks: Blocks) -> int:
        """How many images are worked through at once: on the CPU as many as stay serial."""
        if index_B.device.type != "cpu":
            return len(index_B)
        target_cells = self.targets * blocks.target_h * blocks.target_w
        return max(1, _SERIAL // max(self.cells, target_cells))

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def context_aspect(self) -> float:
        return 1.0 if self.sampler == "ijepa" else self.grid[0] / self.grid[1]

    @property
    def needed(self) -> int:
        """Fewest context patches an image may keep before the cut."""
        return self.min_keep + (self.sampler == "ijepa")

    @cached_property
    def fixed_context(self) -> int:
        """K of "fixed", a function of the settings alone (not of the seed).

        `keep`, or the 10 % quantile of the context patches over 2,048 layouts, min_keep if that is
        more: nine images in ten keep their first layout, the others are redrawn.
        """
        if self.keep is not None:
            return self.keep
        kept = self._typical_lengths
        quantile = int(kept.sort().values[int(len(kept) * FIXED_QUANTILE)])
        return max(quantile, self.needed)

    @cached_property
    def _typical_lengths(self) -> torch.Tensor:
        """Context patches of 2,048 first layouts at the constant block sizes, whatever the seed."""
        blocks = self._middle_blocks()
        corners = self._draw_corners(0, 0, blocks, torch.arange(2048))
        return self._context_map(blocks, *corners).sum(-1)

    def budget(self, images: int) -> int:
        """T of "packed" for so many images, a function of them and of the settings alone.

        Three standard deviations of such a sum above its mean over 2,048 layouts, filled up to
        whole tiles. One batch in 700 or so has more: see `_packed`.
        """
        typical = self._typical_lengths.clamp(min=self.needed).double()
        tokens = images * typical.mean() + PACKED_SIGMAS * math.sqrt(images) * typical.std()
        tile = TILE if tokens > 32 * TILE else 8
        return math.ceil(tokens / tile) * tile

    def block_sizes(self, epoch: int, step: int) -> Blocks:
        """Sizes of this step's blocks, the same on every rank."""
        if self.context in ("fixed", "packed"):
            return self._middle_blocks()
        drawn = rng.uniforms(self.seed, rng.MASK_SIZE, epoch, torch.tensor([step]), 3)
        scale, aspect, context = drawn[0].tolist()
        if self.sampler == "ijepa":
            aspect = scale
        target = self._block(
            _between(self.target_scale, scale), _between(self.target_aspect, aspect)
        )
        wide = self._block(_between(self.context_scale, context), self.context_aspect)
        return Blocks(*target, *wide)

    def _middle_blocks(self) -> Blocks:
        """Block sizes in the middle of their ranges; the aspect's middle is geometric."""
        aspect = math.sqrt(self.target_aspect[0] * self.target_aspect[1])
        target = self._block(_between(self.target_scale, 0.5), aspect)
        return Blocks(*target, *self._block(_between(self.context_scale, 0.5), self.context_aspect))

    def _block(self, scale: float, aspect: float) -> tuple[int, int]:
        """Height and width in cells of a block of `scale` of the grid, cut to the grid. What an
        oblong grid's short side cuts off, its long one makes up for."""
        area = int(self.cells * scale)
        spare = int(self.sampler == "ijepa")  # the released code keeps a row and a column free
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        most_h, most_w = self.grid[0] - spare, self.grid[1] - spare
        if self.grid[0] != self.grid[1]:  # a square's blocks are the released code's
            if height > most_h:
                width = max(width, round(area / most_h))
            elif width > most_w:
                height = max(height, round(area / most_w))
        return min(height, most_h), min(width, most_w)

    def _layouts(
        self, epoch: int, blocks: Blocks, index_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Top-left corners of the targets (B, M, 2) int64 and the context as bool (B, N).

        The loop runs over redraws, each on the images that are still short: none, most often.
        """
        need = self.fixed_context if self.context == "fixed" else self.needed
        targets, wide = self._draw_corners(self.seed, epoch, blocks, index_B)
        context = self._context_map(blocks, targets, wide)
        short = (context.sum(-1) < need).nonzero()[:, 0]
        attempt = 0
        while len(short):
            attempt += 1
            keys = index_B[short] + (attempt << _ATTEMPT_SHIFT)
            new_targets, new_wide = self._draw_corners(self.seed, epoch, blocks, keys)
            if self.sampler == "ijepa" and self.context != "fixed":
                # the released code, which has no "fixed", redraws the context alone
                new_targets = targets[short]
            kept = self.targets - attempt // TRIES
            new_context = self._context_map(blocks, new_targets[:, :kept], new_wide)
            targets.index_copy_(0, short, new_targets)
            context.index_copy_(0, short, new_context)
            short = short[new_context.sum(-1) < need]
        return targets, context

    def _draw_corners(
        self, seed: int, epoch: int, blocks: Blocks, keys_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Corners (row, column) of the targets (B, M, 2) and of the context block (B, 1, 2)."""
        H, W = self.grid
        spare = int(self.sampler == "ijepa")  # randint's excluded upper end
        free = [[H - blocks.target_h, W - blocks.target_w]] * self.targets
        free.append([H - blocks.context_h, W - blocks.context_w])
        choices_X2 = torch.tensor(free, device=keys_B.device) + 1 - spare
        numbers = rng.uniforms(seed, rng.MASK_POSITION, epoch, keys_B, choices_X2.numel())
        corners = (numbers.view(-1, *choices_X2.shape) * choices_X2).long()
        return corners[:, :-1], corners[:, -1:]

    def _context_map(
        self, blocks: Blocks, targets_BM2: torch.Tensor, wide_B12: torch.Tensor
    ) -> torch.Tensor:
        """Cells of the context block outside every target: bool (B, N)."""
        covered = self._cover(targets_BM2, blocks.target_h, blocks.target_w)
        inside = self._cover(wide_B12, blocks.context_h, blocks.context_w)
        return (inside & ~covered).flatten(1)

    def _cover(self, corners_BX2: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Cells that any of X blocks with these corners covers: bool (B, H, W)."""
        H, W = self.grid
        cells = torch.arange(max(H, W), device=corners_BX2.device)[:, None]
        # Images last: the innermost loop is then long, which takes a third of the time.
        top_XB, left_XB = corners_BX2.permute(2, 1, 0)
        row_XHB = cells[:H] - top_XB[:, None]
        col_XWB = cells[:W] - left_XB[:, None]
        rows = (row_XHB >= 0) & (row_XHB < height)
        cols = (col_XWB >= 0) & (col_XWB < width)
        covered_HWB = rows.new_zeros(H, W, len(corners_BX2))
        for row_HB, col_WB in zip(rows, cols, strict=True):  # all at once: X times the memory
            covered_HWB |= row_HB[:, None] & col_WB
        return covered_HWB.permute(2, 0, 1)

    def _target_indices(self, blocks: Blocks, corners_BM2: torch.Tensor) -> torch.Tensor:
        cells = torch.arange(max(self.grid), device=corners_BM2.device)
        inside = cells[: blocks.target_h, None] * self.grid[1] + cells[: blocks.target_w]
        corner_BM = corners_BM2[..., 0] * self.grid[1] + corners_BM2[..., 1]
        return corner_BM[..., None] + inside.flatten()

    def _packed(
        self,
        epoch: int,
        blocks: Blocks,
        shares: Sequence[torch.Tensor],
        contexts: Sequence[torch.Tensor],
    ) -> PackedContext:
        """All contexts end to end.

        Where they exceed the budget, the longest lose patches at random, down to one length.
        """
        lengths_B = _join([context_BN.sum(-1) for context_BN in contexts])
        T = self.budget(len(lengths_B))
        kept_B = _levelled(lengths_B, T)
        rows, first = [], 0
        for index_B, context_BN in zip(shares, contexts, strict=True):
            end = first + len(index_B)
            cut = kept_B[first:end] < lengths_B[first:end]
            for K in kept_B[first:end][cut].unique().tolist():
                these = (cut & (kept_B[first:end] == K)).nonzero()[:, 0]
                subset = self._random_subset(epoch, index_B[these], context_BN[these], K)
                context_BN.index_copy_(0, these, subset)
            rows.append(context_BN.flatten().nonzero()[:, 0] + first * self.cells)
            first = end
        longest = blocks.context_h * blocks.context_w
        return pack(_join(rows), kept_B, self.cells, T, longest, self.needed)

    def _context_length(self, contexts: Sequence[torch.Tensor]) -> int:
        """K: the batch minimum, or the constant of "fixed"."""
        if self.context == "fixed":
            return self.fixed_context
        return min(int(context_BN.sum(-1).min()) for context_BN in contexts)

    def _context_indices(
        self, epoch: int, index_B: torch.Tensor, context_BN: torch.Tensor, K: int
    ) -> torch.Tensor:
        """K cells of each image's context, ascending: int64 (B, K)."""
        if self.context == "prefix":
            chosen = context_BN & (context_BN.cumsum(-1) <= K)
        else:
            chosen = self._random_subset(epoch, index_B, context_BN, K)
        return chosen.nonzero()[:, 1].view(len(context_BN), K)

    def _random_subset(
        self, epoch: int, index_B: torch.Tensor, context_BN: torch.Tensor, K: int
    ) -> torch.Tensor:
        """Exactly K cells of each row of the context, each subset as likely: bool (B, N).

        The K cells with the smallest random keys stay; the cell's number in the low bits keeps
        the keys of an image apart.
        """
        N = context_BN.shape[1]
        cells_N = torch.arange(N, device=context_BN.device)
        keys = rng.bits(self.seed, rng.MASK_KEEP, epoch, index_B[:, None] * N + cells_N)
        keys = (keys & ~_CELL_BITS) | cells_N
        keys.masked_fill_(~context_BN, torch.iinfo(torch.int64).max)
        return keys <= _kth_smallest(keys, K)


def _kth_smallest(keys_BN: torch.Tensor, k: int) -> torch.Tensor:
    """(B, 1). On a CPU by numpy, in a tenth of the time of torch's kthvalue."""
    if keys_BN.device.type != "cpu":
        return keys_BN.kthvalue(k, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(keys_BN.numpy(), k - 1, axis=1)[:, k - 1 : k])


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """torch.cat over the images, a share at a time for the same reason as above."""
    joined = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for target, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
        target.copy_(part)
    return joined


def _levelled(lengths_B: torch.Tensor, budget: int) -> torch.Tensor:
    """The lengths where they fit the budget; else the greatest lowered to one level, to just fit.

    Those that stand one above it are the first of the batch.
    """
    if int(lengths_B.sum()) <= budget:
        return lengths_B
    levels = torch.arange(int(lengths_B.max()), device=lengths_B.device)
    totals = torch.minimum(lengths_B[:, None], levels).sum(0)
    level = int((totals <= budget).sum()) - 1
    above = lengths_B > level
    one_more = above & (above.cumsum(0) <= budget - totals[level])
    return lengths_B.clamp(max=level) + one_more


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + share * (bounds[1] - bounds[0])


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(allowed)}")


def _grid(grid: tuple[int, int], sampler: str) -> None:
    least = 2 if sampler == "ijepa" else 1
    if len(grid) != 2 or min(grid) < least or grid[0] * grid[1] > _CELL_BITS:
        raise ValueError(
            f"grid {grid}: need (rows, cols) of at least {least} and at most {_CELL_BITS} cells"
        )


def _share(name: str, bounds: tuple[float, float]) -> None:
    if not 0 < bounds[0] <= bounds[1] <= 1:
        raise ValueError(f"{name} {bounds}: need 0 < low <= high <= 1")
