"""The predictor: one sequence for each target block, and what each may depend on."""

import pytest
import torch
import torch.nn.functional as F
from test_vit import block_shapes, stream_dtypes

from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.vit import MODELS, sincos_positions

SIZES = {"encoder_width": 12, "grid": (4, 4), "width": 16, "heads": 4}


@pytest.fixture(params=["per_target", "one_pass"])
def predictor(seed, request) -> Predictor:
    return Predictor(**SIZES, depth=2, mode=request.param).double().eval()


@pytest.fixture
def inputs(predictor) -> list[torch.Tensor]:
    """Context tokens (2, 5, 12), their indices (2, 5), targets (2, 3, 4), overlapping."""
    context = torch.randn(2, 5, 12, dtype=torch.float64)
    context_idx = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    targets = torch.stack(
        [torch.stack([torch.randperm(16)[:4] for _ in range(3)]) for _ in range(2)]
    )
    return [context, context_idx, targets]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_ijepa(name):
    size = MODELS[name]
    with torch.device("meta"):
        predictor = Predictor(size["width"], (16, 16), 384, 3, size["heads"])
    wanted = {
        "mask_token": (1, 1, 384),
        "predictor_pos_embed": (1, 256, 384),
        "predictor_embed.weight": (384, size["width"]),
        "predictor_embed.bias": (384,),
        "predictor_norm.weight": (384,),
        "predictor_norm.bias": (384,),
        "predictor_proj.weight": (size["width"], 384),
        "predictor_proj.bias": (size["width"],),
    }
    for i in range(3):
        wanted |= block_shapes(f"predictor_blocks.{i}", 384, 4 * 384)
    assert {n: tuple(p.shape) for n, p in predictor.state_dict().items()} == wanted
    trained = {n for n, p in predictor.named_parameters() if p.requires_grad}
    assert trained == wanted.keys() - {"predictor_pos_embed"}
    assert {b.attn.heads for b in predictor.predictor_blocks} == {size["heads"]}


def test_initialisation(seed):
    predictor = Predictor(192, (3, 5), 1024, 1, 4)
    assert torch.equal(predictor.predictor_pos_embed[0], sincos_positions(3, 5, 1024))
    assert predictor.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert predictor.predictor_norm.eps == 1e-6


def test_one_token_for_each_target_patch(predictor, inputs):
    assert predictor(*inputs).shape == (2, 3, 4, 12)


def test_the_last_block_spares_the_context_and_nothing_else(predictor, inputs):
    """Values and gradients are those of all blocks over all tokens."""
    context, context_idx, targets = inputs
    context.requires_grad_()
    upstream = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    wanted = [context, *(p for p in predictor.parameters() if p.requires_grad)]
    spared = predictor(context, context_idx, targets)
    grads = torch.autograd.grad(spared, wanted, upstream)
    last = predictor.predictor_blocks[-1]
    whole_forward, lengths = last.forward, []

    def whole(x, last, layout):
        lengths.append(x.shape[1])
        return whole_forward(x, None, layout)[:, -last:]

    last.forward = whole
    whole = predictor(context, context_idx, targets)
    assert lengths == [5 + 4 if predictor.mode == "per_target" else 5 + 3 * 4]
    assert same(spared, whole)
    for one, other in zip(grads, torch.autograd.grad(whole, wanted, upstream), strict=True):
        assert same(one, other)


def test_index_types_agree(predictor, inputs):
    context, context_idx, targets = inputs
    assert torch.equal(predictor(context, context_idx.int(), targets.int()), predictor(*inputs))


def test_blocks_of_an_image_do_not_see_each_other(predictor, inputs):
    context, context_idx, targets = inputs
    before = predictor(*inputs)
    changed = targets.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 16
    after = predictor(context, context_idx, changed)
    assert same(after[:, [0, 2]], before[:, [0, 2]])
    assert not same(after[:, 1], before[:, 1])


def test_the_patches_of_a_block_see_each_other(predictor, inputs):
    context, context_idx, targets = inputs
    changed = targets.clone()
    changed[0, 0, 0] = (changed[0, 0, 0] + 1) % 16
    assert not same(
        predictor(context, context_idx, changed)[0, 0, 1:], predictor(*inputs)[0, 0, 1:]
    )


def test_outputs_follow_the_order_of_images_blocks_and_patches(predictor, inputs):
    context, context_idx, targets = inputs
    whole = predictor(*inputs)
    assert same(predictor(context[[1]], context_idx[[1]], targets[[1]]), whole[[1]])
    assert same(predictor(context, context_idx, targets[:, [2, 0, 1]]), whole[:, [2, 0, 1]])
    shuffled = predictor(context, context_idx, targets[:, :, [3, 1, 0, 2]])
    assert same(shuffled, whole[:, :, [3, 1, 0, 2]])


def test_the_context_is_a_set_of_placed_tokens(predictor, inputs):
    context, context_idx, targets = inputs
    order = [4, 2, 0, 1, 3]
    assert same(predictor(context[:, order], context_idx[:, order], targets), predictor(*inputs))
    assert not same(predictor(context[:, order], context_idx, targets), predictor(*inputs))


def test_gradients_reach_all_but_the_positions(predictor, inputs):
    context, context_idx, targets = inputs
    context.requires_grad_()
    predictor(context, context_idx, targets).square().sum().backward()
    assert context.grad.abs().sum(-1).all()
    for name, p in predictor.named_parameters():
        if name == "predictor_pos_embed":
            assert p.grad is None
        else:
            assert p.grad is not None and p.grad.any(), name


def test_indices_outside_the_grid_are_named(predictor, inputs):
    context, context_idx, targets = inputs
    targets[1, 2, 3] = 16
    with pytest.raises(IndexError, match=r"index 16 is outside 0\.\.15"):
        predictor(context, context_idx, targets)


def masked_prediction(predictor: Predictor, context, context_idx, targets) -> torch.Tensor:
    """The one-pass predictor by its definition: a mask over one sequence, every token computed."""
    (B, K), (M, P) = context_idx.shape, targets.shape[1:]
    table = predictor.predictor_pos_embed[0]
    seen_tokens = predictor.predictor_embed(context) + table[context_idx]
    mask_tokens = predictor.mask_token + table[targets.flatten(1)]
    x = torch.cat([seen_tokens, mask_tokens], 1)
    owner = torch.cat([torch.zeros(K), torch.arange(1, M + 1).repeat_interleave(P)])  # 0: context
    allowed = (owner[None, :] == 0) | (owner[:, None] == owner[None, :])
    for block in predictor.predictor_blocks:
        q, k, v = block.attn.qkv(block.norm1(x))
        q, k, v = (y.view(B, -1, 4, 4).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.mT / 4**0.5).masked_fill(~allowed, -torch.inf)
        x = x + block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return predictor.predictor_proj(predictor.predictor_norm(x[:, K:])).view(B, M, P, -1)


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("depth", [1, 3])
def test_one_pass_is_attention_under_a_mask(seed, inputs, depth, backend):
    """Values and every gradient."""
    one_pass = Predictor(**SIZES, depth=depth, attention=backend, mode="one_pass").double()
    context, context_idx, targets = inputs
    context.requires_grad_()
    upstream = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    wrt = [context, *(p for p in one_pass.parameters() if p.requires_grad)]
    results = []
    for predict in (one_pass, lambda *a: masked_prediction(one_pass, *a)):
        out = predict(context, context_idx, targets)
        results.append([out, *torch.autograd.grad(out, wrt, upstream)])
    for got, wanted in zip(*results, strict=True):
        assert same(got, wanted)


@pytest.mark.parametrize(("depth", "equal"), [(1, True), (2, False)])
def test_one_pass_is_other_maths_from_the_second_block_on(seed, inputs, depth, equal):
    """With one block the context's keys have not seen a mask token in either mode."""
    predictor = Predictor(**SIZES, depth=depth).double()
    per_target = predictor(*inputs)
    predictor.mode = "one_pass"
    assert same(predictor(*inputs), per_target) is equal


@pytest.mark.parametrize("mode", ["per_target", "one_pass"])
def test_the_residual_stream_is_fp32_and_the_matmuls_are_not(seed, mode):
    predictor = Predictor(**SIZES, depth=2, residual="fp32", mode=mode).bfloat16()
    inputs = torch.randn(1, 2, 12).bfloat16(), torch.tensor([[0, 9]]), torch.tensor([[[3], [4]]])
    wide, low = torch.float32, torch.bfloat16
    assert stream_dtypes(predictor, *inputs) == {(wide, wide), (wide, low)}
    assert predictor(*inputs).dtype == low
