"""What the pictures of features show: components, neighbours, and the same as arrays."""

import numpy as np
import pytest
import tiny
import torch
from sklearn.decomposition import PCA

from cjepa_fast.data.masks import MaskSampler
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval.figures import attention, pca, retrieve, sheets, snapshots
from cjepa_fast.model.vit import Encoder


def encoder_of(seed: int) -> Encoder:
    torch.manual_seed(seed)
    encoder = Encoder(image_size=24, patch_size=4, width=24, depth=1, heads=3).eval()
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    return encoder


@pytest.fixture
def encoder(seed):
    return encoder_of(seed)


def test_components_are_scikit_learn_s_within_images(encoder):
    images_BCHW = torch.randn(3, 3, 24, 24)
    found = pca.components(encoder, images_BCHW)
    assert found.shape == (3, 6, 6, 3)
    with torch.no_grad():
        tokens = encoder(images_BCHW).double()
    within = (tokens - tokens.mean(1, keepdim=True)).flatten(0, 1).numpy()
    expected = PCA(3, svd_solver="full").fit_transform(within)
    ours = found.flatten(0, 2).numpy()
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-4)


def test_a_larger_grid_than_trained(encoder):
    assert pca.components(encoder, torch.randn(1, 3, 48, 32)).shape == (1, 12, 8, 3)


def test_colours_fill_their_range_and_nothing_gives_no_nan():
    scores = torch.arange(3 * 4 * 4 * 3, dtype=torch.float64).view(3, 4, 4, 3)
    ends = scores.amin((0, 1, 2)), scores.amax((0, 1, 2))
    shown = pca.as_colours(scores, *ends)
    assert shown.min() == 0 and shown.max() == 1
    nothing = torch.zeros(3).double()
    assert (pca.as_colours(torch.zeros(1, 2, 2, 3).double(), nothing, nothing) == 0.5).all()


def test_one_basis_serves_both_encoders_of_a_checkpoint(encoder):
    """The context's scores are along the target's components, whatever its own would be."""
    images_BCHW = torch.randn(2, 3, 24, 24)
    other = encoder_of(1)
    found = pca.scores({"target": encoder, "context": other}, images_BCHW)
    with torch.no_grad():
        both = [pca._centred(x, images_BCHW) for x in (encoder, other)]
    axes_D3 = pca._loadings(both[0][0])
    for of, (centred_BND, length) in zip(found.values(), both, strict=True):
        expected = (centred_BND @ axes_D3 / length).unflatten(1, (6, 6))
        torch.testing.assert_close(of.scores_Brc3, expected)
    own = pca.explained(encoder, images_BCHW)
    assert found["target encoder"].shares_3.tolist() == pytest.approx(list(own.values()))
    assert found["context encoder"].shares_3.sum() < sum(pca.explained(other, images_BCHW).values())
    assert "7, 5, 5 %" in pca._told(
        pca.Scores(torch.tensor([7, 5.2, 4.8]).double().sqrt().expand(1, 2, 2, 3), 100.0, axes_D3)
    )


def test_another_checkpoint_s_colours_agree_with_the_first_s(encoder):
    """The same encoder with its features turned round, its components mixed: the same colours."""
    turned = encoder_of(0)
    turned.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        turned.norm.weight.copy_(-turned.norm.weight)
        turned.norm.bias.copy_(-turned.norm.bias)
    images_BCHW = torch.randn(2, 3, 24, 24)
    first = pca.scores({"target": encoder}, images_BCHW)
    second = pca.scores({"target": turned}, images_BCHW)
    mixed = second["target encoder"]
    turn = torch.linalg.qr(torch.randn(3, 3).double()).Q
    second = mixed._replace(scores_Brc3=mixed.scores_Brc3[..., [2, 0, 1]] @ turn)
    ours, theirs = pca.columns({"one": first["target encoder"], "two": second})
    np.testing.assert_allclose(np.stack(ours.images), np.stack(theirs.images), atol=1e-3)


def test_nearly_equal_tokens_are_grey(encoder):
    """What a collapsed encoder has, tiny differences, is not spread over all colours."""
    basis = torch.eye(24, 3).double()
    collapsed = pca.Scores(1e-3 * torch.randn(2, 6, 6, 3).double(), 3e-6, basis)
    (shown,) = pca.columns({"target encoder": collapsed})
    assert np.abs(np.stack(shown.images) - 0.5).max() < 0.05


def test_attention_lies_over_a_pale_picture():
    """Where a patch gets nothing the picture shows through in grey; at the top it is brightest."""
    shares_rc = torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    shown = attention._over(np.ones((2, 2, 3), np.float32), shares_rc, 4.0)
    from matplotlib import colormaps

    for column, level in ((0, 0.0), (1, 1.0)):
        colour = np.array(colormaps["inferno"](level)[:3])
        np.testing.assert_allclose(shown[0, column], 0.72 * colour + 0.28, atol=1e-6)


def maps_of(shares_Brc: torch.Tensor, evenness: float) -> attention.Maps:
    return attention.Maps(shares_Brc, evenness, np.zeros((len(shares_Brc), 8, 8, 3), np.float32))


def test_one_scale_serves_all_maps_and_noise_stays_dark():
    """The same share has the same colour in every map; an even map's noise is of one colour."""
    noise = maps_of(1 + 0.01 * torch.randn(2, 4, 4), 99.98)
    peaked = torch.ones(2, 4, 4)
    peaked[:, 0] = 6.0
    alone, (even, sharp) = (
        attention.columns({"noise": noise})[0],
        attention.columns({"noise": noise, "peaked": maps_of(peaked, 80.0)}),
    )
    assert np.ptp(np.stack(alone.images), axis=(0, 1, 2)).max() < 0.1
    ones = attention._over(np.zeros((8, 8, 3), np.float32), torch.ones(4, 4), 6.0)
    np.testing.assert_allclose(sharp.images[0][-1, -1], ones[-1, -1], atol=1e-6)
    np.testing.assert_allclose(even.images[0], ones, atol=0.05)
    assert "evenness 100.0 %" in even.heading and "evenness 80.0 %" in sharp.heading


def test_the_scale_is_on_the_figure(encoder):
    images_BCHW = torch.randn(2, 3, 24, 24)
    found = attention.maps({"target": encoder}, images_BCHW, encoder.mean, encoder.std)
    image = sheets.Column("image", list(found["target encoder"].images_BHW3))
    *_, bar = attention.figure(image, found, "title").axes
    assert bar.get_ylabel() == "attention a patch receives (1 = an even share)"
    assert bar.get_ylim() == pytest.approx((0, attention.top_of(found)))
    torch.testing.assert_close(found["target encoder"].shares_Brc.mean((1, 2)), torch.ones(2))


def test_neighbours_are_the_nearest_by_angle_and_never_the_image_itself():
    features_nD = torch.tensor([[1.0, 0], [10, 1], [0, 1], [1, 1], [-1, 0]])
    similarity, near = retrieve.nearest(features_nD, torch.tensor([0, 2]), 2)
    assert near.tolist() == [[1, 3], [3, 1]]
    assert similarity[0].tolist() == pytest.approx([10 / 101**0.5, 0.5**0.5])
    labels = torch.tensor([7, 7, 0, 0, 0])
    index = torch.arange(5)
    assert retrieve.agreement(labels, index, torch.tensor([0, 2]), near) == pytest.approx(50)
    with pytest.raises(ValueError, match="5 neighbours of 5 images"):
        retrieve.nearest(features_nD, torch.tensor([0]), 5)


def test_the_contact_sheet_frames_right_and_wrong(encoder, tmp_path):
    images = open_images(tiny.write_images(tmp_path / "set", count=8), cache=tmp_path / "cache")
    index = torch.tensor([0, 1, 4, 5])  # classes 0, 0, 1, 1, by folder
    assert images.labels[index].tolist() == [0, 0, 1, 1]
    near = torch.tensor([[1, 2]])
    figure = retrieve.figure(
        images, index, torch.tensor([0]), {"run": (torch.tensor([[0.9, 0.8]]), near)}, "title"
    )
    query, right, wrong = figure.axes
    assert query.get_title().startswith("query")
    assert right.get_title() == "0.900  class_0" and wrong.get_title() == "0.800  class_1"
    colours = [axes.spines["top"].get_edgecolor() for axes in (right, wrong)]
    from matplotlib.colors import to_rgba

    assert colours == [to_rgba(retrieve.RIGHT[0]), to_rgba(retrieve.WRONG[0])]
    dashes = [axes.spines["top"].get_linestyle() for axes in (right, wrong)]
    assert dashes[0] == "-" and dashes[1] != "-"  # not by colour alone
    assert wrong.spines["top"].get_capstyle() == "butt"  # others fill the gaps


def test_chance_and_any_two_by_hand():
    labels_n = torch.tensor([0, 0, 0, 1, 2])
    assert retrieve.chance(labels_n, torch.tensor([0, 3])) == pytest.approx(100 * (2 / 4 + 0) / 2)
    features_nD = torch.tensor([[1.0, 0], [0, 2], [3, 0]])  # cosines 0, 1, 0
    assert retrieve.any_two(features_nD) == pytest.approx(1 / 3)
    assert retrieve._short(["a very long class's name"], 0) == "a very long c…"


def test_snapshots_are_arrays_for_tensorboard(encoder):
    images_BCHW = torch.randn(2, 3, 24, 24)
    masks = MaskSampler(grid=(6, 6), min_keep=4)(0, 0, torch.arange(2))
    found = snapshots.figures(encoder, encoder_of(1), images_BCHW, masks, encoder.mean, encoder.std)
    assert list(found) == ["masks", "attention", "pca"]
    for shown in found.values():
        assert shown.dtype == np.uint8 and shown.shape[2] == 3 and min(shown.shape[:2]) > 200
        assert shown.std() > 10
