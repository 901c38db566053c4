"""The gathers against explicit loops, and every index that must be refused."""

import pytest
import torch

from cjepa_fast.kernels.gather import (
    add_positions,
    embed_gather,
    gather_tokens,
    predictor_input,
    target_gather,
)

B, N, K, M, P, D, W = 3, 7, 4, 2, 3, 5, 6
DTYPES = [torch.int32, torch.int64]


@pytest.fixture
def tokens(seed) -> torch.Tensor:
    return torch.randn(B, N, D, dtype=torch.float64)


def indices(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(N, shape, dtype=dtype)


def sequences(seed) -> list[torch.Tensor]:
    """context (B, K, W), positions (N, W), mask token (W,), float64."""
    torch.manual_seed(seed)
    return [torch.randn(*s, dtype=torch.float64) for s in ((B, K, W), (N, W), (W,))]


def with_wrong_index(shape: tuple[int, ...], wrong: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros but for one index in the FIRST image: in the stacked tables N is image 1's row 0."""
    idx = torch.zeros(shape, dtype=dtype)
    idx[(0, *(-1 for _ in shape[1:]))] = wrong
    return idx


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(B, K), (B, M, P), (B, N), (B, 1), (B, 0)])
def test_gather_against_loops(tokens, shape, dtype):
    idx = indices(*shape, dtype=dtype)
    got = gather_tokens(tokens, idx)
    assert got.shape == (*shape, D)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        b, *rest = index
        assert torch.equal(got[tuple(index)], tokens[b, idx[b][tuple(rest)].item()])


def test_gather_of_strided_tokens_and_indices(tokens):
    strided = tokens.transpose(0, 1).contiguous().transpose(0, 1)
    idx = indices(K, B).t()
    assert not strided.is_contiguous() and not idx.is_contiguous()
    assert torch.equal(gather_tokens(strided, idx), gather_tokens(tokens, idx.contiguous()))


def test_gather_gradient_adds_up_repeated_indices(tokens):
    idx = torch.tensor([[1, 1, 1, 0]] * B)
    tokens.requires_grad_()
    gather_tokens(tokens, idx).sum().backward()
    wanted = torch.zeros(N).double()
    wanted[:2] = torch.tensor([1.0, 3.0])
    assert torch.equal(tokens.grad, wanted[:, None].expand(B, N, D))


def test_gather_gradcheck_with_overlapping_blocks(tokens):
    overlapping, repeated = torch.tensor([[[0, 1, 2], [1, 2, 3]]] * B), indices(B, 2 * N)
    tokens.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, overlapping), tokens)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, repeated), tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(B, K), (B, M, P)])
@pytest.mark.parametrize("wrong", [N, N + 1, B * N, 10**6, -1, -N])
def test_gather_refuses_indices_outside_the_image(tokens, shape, wrong, dtype):
    message = rf"index {wrong} is outside 0\.\.{N - 1}: there are N = {N} patches"
    with pytest.raises(IndexError, match=message):
        gather_tokens(tokens, with_wrong_index(shape, wrong, dtype))
    if len(shape) == 3:
        with pytest.raises(IndexError, match=message):
            target_gather(tokens, with_wrong_index(shape, wrong, dtype))


def test_gather_refuses_a_negative_index_of_a_later_image(tokens):
    """-1 of image 1 would be the last row of image 0."""
    idx = torch.zeros(B, K, dtype=torch.int64)
    idx[1, 0] = -1
    with pytest.raises(IndexError, match="index -1"):
        gather_tokens(tokens, idx)


@pytest.mark.parametrize("dtype", DTYPES)
def test_target_gather_is_a_layer_norm_of_each_gathered_token(tokens, dtype):
    idx = indices(B, M, P, dtype=dtype)
    got = target_gather(tokens, idx)
    assert got.shape == (B, M, P, D) and got.dtype == torch.float64
    for b, m, p in torch.cartesian_prod(*map(torch.arange, (B, M, P))).tolist():
        row = tokens[b, idx[b, m, p].item()].tolist()
        mean = sum(row) / D
        variance = sum((x - mean) ** 2 for x in row) / D
        wanted = [(x - mean) / (variance + 1e-5) ** 0.5 for x in row]
        assert got[b, m, p].tolist() == pytest.approx(wanted, abs=1e-12)


def test_target_gather_works_in_fp32_and_takes_no_gradient(tokens):
    idx = indices(B, M, P)
    rounded = tokens.bfloat16().requires_grad_()
    got = target_gather(rounded, idx)
    assert got.dtype == torch.float32 and not got.requires_grad
    wanted = target_gather(rounded.detach().double(), idx)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_predictor_input_against_loops(seed, dtype):
    context, positions, mask_token = sequences(seed)
    contexts, targets = indices(B, K, dtype=dtype), indices(B, M, P, dtype=dtype)
    got = predictor_input(context, positions, mask_token, contexts, targets)
    assert got.shape == (B * M, K + P, W)
    for b in range(B):
        for m in range(M):
            sequence = got[b * M + m]
            for k in range(K):
                wanted = context[b, k] + positions[contexts[b, k].item()]
                assert torch.equal(sequence[k], wanted)
            for p in range(P):
                wanted = mask_token + positions[targets[b, m, p].item()]
                assert torch.equal(sequence[K + p], wanted)


def test_predictor_input_gradcheck_with_overlapping_blocks(seed):
    context, positions, mask_token = (x.requires_grad_() for x in sequences(seed))
    contexts = torch.tensor([[0, 1, 2, 2]] * B)  # 2 twice, and 1 and 2 targets too
    targets = torch.tensor([[[1, 2, 3], [2, 3, 4]]] * B)
    assert torch.autograd.gradcheck(
        lambda *x: predictor_input(*x, contexts, targets), (context, positions, mask_token)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [N, B * N, -1, -N])
@pytest.mark.parametrize("which", ["context", "target"])
def test_predictor_input_refuses_indices_outside_the_grid(seed, which, wrong, dtype):
    contexts, targets = indices(B, K, dtype=dtype), indices(B, M, P, dtype=dtype)
    if which == "context":
        contexts = with_wrong_index((B, K), wrong, dtype)
    else:
        targets = with_wrong_index((B, M, P), wrong, dtype)
    with pytest.raises(IndexError, match=rf"index {wrong} is outside 0\.\.{N - 1}"):
        predictor_input(*sequences(seed), contexts, targets)


def test_shapes_alone_are_enough_on_the_meta_device():
    """No index is read where reading it would wait for the device."""
    tokens = torch.empty(B, N, D, device="meta")
    contexts = torch.empty(B, K, dtype=torch.int64, device="meta")
    targets = torch.empty(B, M, P, dtype=torch.int64, device="meta")
    assert gather_tokens(tokens, contexts).shape == (B, K, D)
    assert target_gather(tokens, targets).shape == (B, M, P, D)
    parts = [torch.empty(s, device="meta") for s in ((B, K, W), (N, W), (W,))]
    assert predictor_input(*parts, contexts, targets).shape == (B * M, K + P, W)


def test_positions_and_mask_tokens_of_another_width_are_refused(seed):
    """A kernel reads the tokens' width of each, whatever is there."""
    context, pos, mask_token = sequences(seed)
    idx, targets = indices(B, K), indices(B, M, P)
    with pytest.raises(ValueError, match="positions of width 5 for tokens of 6"):
        predictor_input(context, pos[:, :5], mask_token, idx, targets)
    with pytest.raises(ValueError, match="mask_token of width 1 for tokens of 6"):
        predictor_input(context, pos, mask_token[:1], idx, targets)
    with pytest.raises(ValueError, match="positions of width 5"):
        add_positions(context, pos[:, :5], idx)
    with pytest.raises(ValueError, match="positions of width 5"):
        embed_gather(torch.randn(B, N, W), pos[:, :5], idx)
