"""The simple feature pyramid: strides, the order of its cells, patches of another size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cjepa_fast.eval.dense.pyramid import ChannelNorm, Pyramid, enlarge_patches
from cjepa_fast.model.vit import Encoder


def encoder_of(patch_size: int = 8, image_size: int = 32, depth: int = 1) -> Encoder:
    return Encoder(image_size, patch_size, width=24, depth=depth, heads=3)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_strides_and_shapes(size, seed):
    pyramid = Pyramid(encoder_of(), channels=16)
    maps = pyramid(torch.randn(2, 3, *size))
    assert pyramid.strides == (2, 4, 8, 16, 32)
    for stride, found in zip(pyramid.strides, maps.values(), strict=True):
        assert found.shape == (2, 16, size[0] // stride, size[1] // stride)
        assert found.dtype == torch.float32
    assert torch.equal(maps["4"], maps["3"][..., ::2, ::2])


def test_a_patch_reaches_its_own_cells_on_a_grid_that_is_not_square(seed):
    """Without blocks, what is read of a patch lies where the patch does, at each stride."""
    pyramid = Pyramid(encoder_of(depth=0), channels=16)
    for branch in pyramid.branches:
        branch[-2] = nn.Identity()  # the 3 x 3 convolution, which reaches the neighbours
    images = torch.randn(1, 3, 64, 96)
    other = images.clone()
    other[..., 40:48, 72:80] += 1  # the patch in row 5, column 9
    before, after = pyramid(images), pyramid(other)
    for level, stride in enumerate(pyramid.strides[:4]):
        changed = (before[str(level)] != after[str(level)]).any(1)[0].nonzero()
        low, high = changed.min(0).values * stride, (changed.max(0).values + 1) * stride
        expected = ([40, 72], [48, 80]) if stride <= 8 else ([32, 64], [48, 80])
        assert (low.tolist(), high.tolist()) == expected


def test_positions_are_interpolated_to_the_grid(seed):
    """A blank image's tokens, without blocks, are the positions: of 4 x 4 to 8 x 12."""
    encoder = encoder_of(depth=0)
    tokens = encoder(torch.zeros(1, 3, 64, 96))[0]
    table = encoder.pos_embed.view(1, 4, 4, 24).permute(0, 3, 1, 2)
    wanted = F.interpolate(table, (8, 12), mode="bicubic")[0].flatten(1).T
    assert torch.allclose(tokens, F.layer_norm(wanted, (24,), eps=1e-6), atol=1e-5)


def test_an_enlarged_patch_gives_the_token_that_the_patch_gave(seed):
    encoder = encoder_of(patch_size=14, image_size=28)
    patches = torch.randn(5, 3, 14, 14)
    large = F.interpolate(patches, (16, 16), mode="bilinear")
    before = encoder.patch_embed(patches.flatten(1)[None])
    pyramid = Pyramid(encoder, channels=16)
    assert pyramid.strides == (4, 8, 16, 32, 64)
    after = pyramid.encoder.patch_embed(large.flatten(1)[None])
    assert torch.allclose(before, after, atol=1e-5)
    assert enlarge_patches(encoder, 16) is encoder


def test_bf16_is_for_the_encoder_and_ends_in_fp32(seed):
    encoder, images = encoder_of(), torch.randn(1, 3, 64, 64)
    torch.manual_seed(seed)
    exact = Pyramid(encoder, channels=16)(images)["0"]
    torch.manual_seed(seed)
    rough = Pyramid(encoder, channels=16, bf16=True)(images)["0"]
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.05


def test_the_norm_is_over_channels(seed):
    x = torch.randn(2, 6, 3, 4) * 5 + 2
    found = ChannelNorm(6)(x)
    assert torch.allclose(found.mean(1), torch.zeros(2, 3, 4), atol=1e-5)
    assert torch.allclose(found[1, :, 2, 3], F.layer_norm(x[1, :, 2, 3], (6,)), atol=1e-5)
