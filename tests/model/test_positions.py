"""VICReg at each position: against plain loops over positions, padded, packed and over ranks."""

import forks
import pytest
import tiny
import torch
import torch.distributed as dist

from cjepa_fast.data.masks import MaskSampler
from cjepa_fast.kernels.vicreg import vicreg_position_terms
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.loss import CJEPALoss
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.distributed import AllRanks

N, D = 7, 5


def tokens(seed: int, T: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 tokens with an offset for each position, and their positions: 0 thrice or more, 5
    once, 6 never."""
    torch.manual_seed(seed)
    idx_T = torch.cat(
        [torch.tensor([5]), torch.zeros(3, dtype=torch.int64), torch.randint(5, (T,))]
    )
    offsets = 3 * torch.randn(N, D, dtype=torch.float64)
    x = offsets[idx_T] + 0.8 * torch.randn(len(idx_T), D, dtype=torch.float64)
    return x.requires_grad_(), idx_T


def position_terms(x, idx_T, positions, live_T=None, *args, **options):
    """The terms of tokens at positions idx, of which those that are not live are padding."""
    live_T = torch.ones_like(idx_T, dtype=torch.bool) if live_T is None else live_T
    own = [torch.nonzero((idx_T == n) & live_T).flatten() for n in range(positions)]
    rows = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=-1)
    return vicreg_position_terms(x, rows, *args, **options)


def by_loops(x: torch.Tensor, idx_T: torch.Tensor, gamma: float, eps: float):
    std = scatter = 0.0
    free = 0
    for n in range(N):
        own = x[idx_T == n]
        if len(own) < 2:
            continue
        deviation = own - own.mean(0)
        hinge = torch.clamp(gamma - (own.var(0) + eps).sqrt(), min=0).mean()
        std, free = std + (len(own) - 1) * hinge, free + len(own) - 1
        scatter = scatter + torch.einsum("ti,tj->ij", deviation, deviation)
    off = (scatter / free)[~torch.eye(D, dtype=torch.bool)]
    return std / free, off.square().sum() / D


@pytest.mark.parametrize(("gamma", "eps"), [(1.0, 1e-4), (1.4, 1e-2)])
def test_terms_and_gradient_are_those_of_loops_over_positions(seed, gamma, eps):
    x, idx_T = tokens(seed)
    got = position_terms(x, idx_T, N, None, gamma, eps)
    for one, wanted in zip(got, by_loops(x, idx_T, gamma, eps), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-12)
        slopes = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (one, wanted)]
        torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-11)
    assert torch.autograd.gradcheck(lambda x: position_terms(x, idx_T, N, None, gamma, eps), x)


def test_what_position_explains_does_not_count(seed):
    x, idx_T = tokens(seed)
    shifted = x + 100 * torch.randn(N, D, dtype=torch.float64)[idx_T]
    for one, other in zip(
        position_terms(x, idx_T, N), position_terms(shifted, idx_T, N), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_padding_counts_for_nothing_whatever_it_holds(seed):
    x, idx_T = tokens(seed)
    padded = torch.cat([x, torch.full((9, D), float("nan"), dtype=torch.float64)])
    live_T = torch.arange(len(padded)) < len(x)
    where = torch.cat([idx_T, torch.zeros(9, dtype=torch.int64)])
    got = position_terms(padded, where, N, live_T)
    for one, wanted in zip(got, position_terms(x, idx_T, N), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-14)
    (slope,) = torch.autograd.grad(sum(got), x)
    (wanted,) = torch.autograd.grad(sum(position_terms(x, idx_T, N)), x)
    torch.testing.assert_close(slope, wanted)


def test_collapse_at_each_position_shows_in_std(seed):
    _, idx_T = tokens(seed)
    same = torch.randn(N, D)[idx_T]  # one vector a position: position explains all
    std, cov = position_terms(same, idx_T, N, gamma=1.0, eps=1e-4)
    assert std.item() == pytest.approx(1 - 1e-2, abs=1e-3) and cov.item() < 1e-10


def test_fp32_terms_of_bf16_tokens_are_as_near_as_rounding_allows(seed):
    x, idx_T = tokens(seed)
    rounded = x.detach().bfloat16()
    for one, wanted in zip(
        position_terms(rounded, idx_T, N), position_terms(rounded.double(), idx_T, N), strict=True
    ):
        assert one.dtype == torch.float32 and one.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_packed_contexts_give_the_loss_of_their_tokens_alone(seed):
    """The same images and masks: ragged rows end to end, against the tokens of each by itself."""
    encoder = Encoder(24, 4, 24, 1, 2).double()
    networks = JEPA(encoder, Predictor(24, encoder.grid, 12, 1, 2).double(), CJEPALoss())
    networks.loss = CJEPALoss(views="positions", beta=1.0)
    masks = MaskSampler(grid=encoder.grid, context="packed", seed=3)(0, 0, torch.arange(6))
    images = torch.randn(6, 3, 24, 24, dtype=torch.float64)
    target = torch.randn(6, 36, 24, dtype=torch.float64)
    terms = networks(images, masks.context, masks.target_idx_BMP, target)
    parts = [masks.context.of_image(b) for b in range(6)]
    alone = [encoder(images[b : b + 1], part[None])[0] for b, part in enumerate(parts)]
    std, cov = position_terms(torch.cat(alone), torch.cat(parts), 36)
    torch.testing.assert_close(terms["std"], std.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(terms["cov"], cov.detach(), rtol=1e-9, atol=1e-10)
    assert terms["sim"] == 0


@pytest.mark.parametrize("views", ["blocks", "context_target", "tokens"])
def test_they_add_to_the_terms_of_other_views(seed, views):
    torch.manual_seed(seed)
    predicted = torch.randn(4, 2, 3, D, dtype=torch.float64)
    context = torch.randn(4, 6, D, dtype=torch.float64, requires_grad=True)
    outputs = (predicted, context, torch.randn(4, 9, D, dtype=torch.float64))
    positions = torch.stack([torch.randperm(9)[:6] for _ in range(4)])

    def terms_of(**options):
        jepa = torch.tensor(0.5, dtype=torch.float64)
        loss = CJEPALoss(beta=0.1, sim=2, std=3, cov=4, **options)
        return loss(jepa, *outputs, context=positions)

    own, added = terms_of(views=views), terms_of(views="positions")
    both = terms_of(views=views, positions_weight=0.25)
    for name in ("std", "cov"):
        assert both[name].item() == pytest.approx((own[name] + 0.25 * added[name]).item())
    gain = 0.1 * 0.25 * (3 * added["std"] + 4 * added["cov"])
    assert both["loss"].item() == pytest.approx((own["loss"] + gain).item())
    (slope,) = torch.autograd.grad(both["loss"], context)
    assert slope.any()


def test_it_asks_for_the_positions():
    with pytest.raises(ValueError, match="needs the positions of the context"):
        CJEPALoss(views="positions").vicreg(
            torch.randn(2, 1, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 9, 4)
        )


def share_of(rank: int, x: torch.Tensor, idx_T: torch.Tensor) -> slice:
    """Uneven: a third, and the rest."""
    cut = len(x) // 3
    return slice(0, cut) if rank == 0 else slice(cut, None)


def worker(rank: int, port: int, seed: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, idx_T = tokens(seed)
    own = share_of(rank, x, idx_T)
    scale = torch.ones(D, dtype=torch.float64, requires_grad=True)
    terms = position_terms(x.detach()[own] * scale, idx_T[own], N, ranks=AllRanks())
    (slope,) = torch.autograd.grad(sum(terms), scale)
    dist.all_reduce(slope)
    torch.save(([t.detach() for t in terms], slope / 2), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_ranks_together_are_one_with_all_tokens(seed, tmp_path):
    forks.spawn(worker, (tiny.free_port(), seed, str(tmp_path)), 2)
    x, idx_T = tokens(seed)
    scale = torch.ones(D, dtype=torch.float64, requires_grad=True)
    wanted = position_terms(x.detach() * scale, idx_T, N)
    (slope,) = torch.autograd.grad(sum(wanted), scale)
    for rank in range(2):
        terms, found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(terms, [w.detach() for w in wanted], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-11)
