"""Sequences end to end against Python lists of them."""

import pytest
import torch

from cjepa_fast.model.packed import Sequences, evenly, pack

LENGTHS = [3, 1, 5, 2, 4, 0, 0]  # three sequences that are somebody's, two of padding, two empty
REAL = 3


@pytest.fixture
def sequences() -> Sequences:
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return Sequences(starts, longest=6, real=REAL)


def pieces(x: torch.Tensor) -> list[torch.Tensor]:
    return list(x.split(LENGTHS))


def test_padding_and_packing(sequences, seed):
    x = torch.randn(sum(LENGTHS), 2, requires_grad=True)
    padded = sequences.padded(x)
    assert padded.shape == (len(LENGTHS), 6, 2)
    live = sequences.live()
    assert live.sum(1).tolist() == LENGTHS and live.shape == (len(LENGTHS), 6)
    for row, piece in zip(padded, pieces(x), strict=True):
        assert torch.equal(row[: len(piece)], piece)
    back = sequences.packed(padded, len(x))
    assert torch.equal(back, x)
    upstream = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(back, x, upstream)[0], upstream)


def test_offsets_and_means(sequences, seed):
    x = torch.randn(sum(LENGTHS), 4, dtype=torch.float64)
    wanted = [(s, offset) for s, length in enumerate(LENGTHS) for offset in range(length)]
    assert list(zip(*(x.tolist() for x in sequences.offsets(len(x))), strict=True)) == wanted
    wanted = torch.stack([piece.mean(0) for piece in pieces(x)[:REAL]])
    torch.testing.assert_close(sequences.means(x), wanted)


def test_the_last_tokens_of_those_that_are_somebodys(sequences):
    x = torch.arange(sum(LENGTHS))
    assert sequences.last(1).tolist() == [piece[-1] for piece in pieces(x)[:REAL]]
    longer = Sequences(torch.tensor([0, 3, 7, 7, 9]).int(), 4, real=2)
    assert longer.last(3).tolist() == [0, 1, 2, 4, 5, 6]
    of_last = longer.of_last(3)
    assert of_last.starts.tolist() == [0, 3, 6, 6, 6] and of_last.starts.dtype == torch.int32
    assert (of_last.longest, of_last.real) == (3, 2)


@pytest.mark.parametrize("copies", [1, 4])
def test_copies_with_tokens_of_their_own(sequences, copies):
    """Every token once, each sequence followed by its copies, padding without tokens of its own."""
    T, added = sum(LENGTHS), 2
    made, row = sequences.copied(T, copies, added)
    own = 1000 + torch.arange(REAL * copies * added)
    tokens = torch.cat([torch.arange(T)] * copies + [own])
    laid = torch.empty_like(tokens).index_copy_(0, row, tokens)
    wanted = []
    for s, piece in enumerate(pieces(torch.arange(T))):
        for copy in range(copies):
            first = (s * copies + copy) * added
            wanted.append(
                [*piece.tolist(), *(own[first : first + added].tolist() if s < REAL else [])]
            )
    assert [part.tolist() for part in laid.tensor_split(made.starts[1:-1].long())] == wanted
    assert row.unique().tolist() == list(range(len(tokens)))
    assert made.starts.dtype == torch.int32 and made.starts[-1] == len(tokens)
    assert (made.longest, made.real) == (6 + added, REAL * copies)


def test_a_context_is_padded_to_its_budget_in_pieces():
    lengths = torch.tensor([3, 5, 2])
    rows = torch.tensor([1, 2, 3, 10, 11, 12, 13, 14, 27, 29])
    context = pack(rows, lengths, patches=10, budget=24, longest=6, least=2)
    assert context.rows_T.tolist() == rows.tolist() + [0] * 14
    assert context.idx_T[:10].tolist() == [1, 2, 3, 0, 1, 2, 3, 4, 7, 9]
    assert context.sequences.starts.tolist() == [0, 3, 8, 10, 16, 22, 24]
    assert (context.images, context.tokens) == (3, 10)
    assert [context.of_image(b).tolist() for b in (0, 2)] == [[1, 2, 3], [7, 9]]
    full = pack(torch.arange(24), torch.tensor([6, 6, 6, 6]), 10, budget=24, longest=6, least=6)
    assert full.sequences.starts.tolist() == [0, 6, 12, 18, 24]


def test_even_sequences():
    even = evenly(3, 4)
    assert even.starts.tolist() == [0, 4, 8, 12] and even.lengths_S.tolist() == [4, 4, 4]
    assert (even.longest, even.real, even.starts.dtype) == (4, 3, torch.int32)
