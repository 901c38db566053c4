"""Sequences of different lengths end to end in one row of tokens: which token is whose.

Whatever is asked of the lengths is worked out on their device, and every shape follows from
constants of the run, so nothing waits and nothing is compiled twice.
Shapes: S sequences, T tokens of all of them, L the most that a sequence may hold; B images, N
patches of an image, M target blocks, P patches a block.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Sequences:
    """The first `real` sequences are somebody's; those after them are padding, read by nobody.

    starts int32 (S + 1,): sequence s holds the tokens from starts[s] up to starts[s + 1], none
    where they are equal; all T tokens are in one. longest: none holds more, a constant.
    """

    starts: torch.Tensor
    longest: int
    real: int

    @property
    def lengths_S(self) -> torch.Tensor:
        return self.starts.diff()

    def offsets(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's sequence, and its offset in that: int64 (T,) and int (T,)."""
        token_T = torch.arange(tokens, device=self.starts.device, dtype=self.starts.dtype)
        sequence_T = torch.searchsorted(self.starts, token_T, right=True) - 1
        return sequence_T, token_T - self.starts[sequence_T]

    def live(self) -> torch.Tensor:
        """Which positions of `padded` hold a token: bool (S, L)."""
        return torch.arange(self.longest, device=self.starts.device) < self.lengths_S[:, None]

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """(T, ...) -> (S, L, ...): a row for each sequence, filled up with whatever comes next."""
        row_SL = self.starts[:-1, None] + torch.arange(self.longest, device=x.device)
        row_SL = row_SL.clamp(max=len(x) - 1)
        return x.index_select(0, row_SL.flatten()).view(*row_SL.shape, *x.shape[1:])

    def packed(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """(S, L, ...) -> (T, ...): what `padded` did, undone."""
        sequence_T, offset_T = self.offsets(tokens)
        return x.flatten(0, 1).index_select(0, sequence_T * self.longest + offset_T)

    def means(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The mean over the tokens of each real sequence: (real, D). A matmul, with no atomics."""
        sequence_T, _ = self.offsets(len(x_TD))
        own_ST = sequence_T == torch.arange(self.real, device=x_TD.device)[:, None]
        return own_ST.to(x_TD.dtype) @ x_TD / self.lengths_S[: self.real, None]

    def last(self, count: int) -> torch.Tensor:
        """Where the last `count` tokens of each real sequence stand: int64 (real * count,)."""
        offset = torch.arange(-count, 0, device=self.starts.device)
        return (self.starts[1 : self.real + 1, None] + offset).flatten()

    def of_last(self, count: int) -> "Sequences":
        """The sequences that those tokens make, padding being empty."""
        number = torch.arange(len(self.starts), device=self.starts.device, dtype=torch.int32)
        return Sequences(number.clamp(max=self.real) * count, count, self.real)

    def copied(self, tokens: int, copies: int, added: int) -> tuple["Sequences", torch.Tensor]:
        """Each sequence M = `copies` times in a row, each copy of a real one with `added` more.

        Returns those sequences, and where in them everything stands, int64: M times the T tokens,
        (M, T), then what is added, (real, M, added), all flat.
        """
        number_S = torch.arange(len(self.starts) - 1, device=self.starts.device)
        copy_M, added_P = (torch.arange(n, device=self.starts.device) for n in (copies, added))
        length_S = self.lengths_S.long()
        begin_S = copies * (self.starts[:-1] + added * number_S.clamp(max=self.real))
        whole_S = length_S + added * (number_S < self.real)
        begin_SM = begin_S[:, None] + whole_S[:, None] * copy_M
        sequence_T, offset_T = self.offsets(tokens)
        copied_MT = begin_SM[sequence_T].T + offset_T
        added_BMP = (begin_SM + length_S[:, None])[: self.real, :, None] + added_P
        where = torch.cat([copied_MT.flatten(), added_BMP.flatten()])
        starts = torch.cat([begin_SM.flatten(), begin_SM.new_full((1,), len(where))]).int()
        return Sequences(starts, self.longest + added, self.real * copies), where


def evenly(count: int, length: int, device: torch.device | str = "cpu") -> Sequences:
    """`count` sequences of one length."""
    starts = torch.arange(count + 1, dtype=torch.int32, device=device) * length
    return Sequences(starts, length, count)


@dataclass(frozen=True)
class PackedContext:
    """The contexts of B images end to end, and padding up to T tokens, the budget of the run.

    rows_T int64 (T,): image * N + patch, ascending; 0 in the padding. sequences: the images', then
    padding, in pieces no longer than an image's. tokens: how many of the T are no padding.
    """

    rows_T: torch.Tensor
    sequences: Sequences
    patches: int
    tokens: int

    @property
    def images(self) -> int:
        return self.sequences.real

    @property
    def idx_T(self) -> torch.Tensor:
        """The patch of each token in its own image, 0..N-1."""
        return self.rows_T % self.patches

    def of_image(self, image: int) -> torch.Tensor:
        """The patches of one image's context, ascending: int64 (K,). Waits for the device."""
        begin, end = self.sequences.starts[image : image + 2].tolist()
        return self.idx_T[begin:end]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedContext":
        starts = self.sequences.starts.to(device, non_blocking=non_blocking)
        return self._with(self.rows_T.to(device, non_blocking=non_blocking), starts)

    def pin_memory(self) -> "PackedContext":
        return self._with(self.rows_T.pin_memory(), self.sequences.starts.pin_memory())

    def record_stream(self, stream) -> None:
        self.rows_T.record_stream(stream)
        self.sequences.starts.record_stream(stream)

    def _with(self, rows_T: torch.Tensor, starts: torch.Tensor) -> "PackedContext":
        return replace(self, rows_T=rows_T, sequences=replace(self.sequences, starts=starts))


def pack(
    rows: torch.Tensor, lengths_B: torch.Tensor, patches: int, budget: int, longest: int, least: int
) -> PackedContext:
    """The rows of B images, `lengths_B` of them each, padded to `budget` tokens.

    No image has fewer than `least` or more than `longest`: so many pieces of padding are always
    enough, and their number is a constant.
    """
    B, tokens = len(lengths_B), len(rows)
    pieces = -(-(budget - B * least) // longest)
    starts = lengths_B.new_full((B + pieces + 1,), tokens, dtype=torch.int32)
    starts[0] = 0
    starts[1 : B + 1] = lengths_B.cumsum(0)
    starts[B:] += longest * torch.arange(pieces + 1, device=starts.device, dtype=torch.int32)
    rows_T = rows.new_zeros(budget)
    rows_T[:tokens] = rows
    return PackedContext(rows_T, Sequences(starts.clamp(max=budget), longest, B), patches, tokens)
