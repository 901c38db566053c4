"""What the pictures of features show: components, neighbours, and the same as arrays."""

import numpy as np
import pytest
import tiny
import torch
from sklearn.decomposition import PCA

from cjepa_fast.data.masks import MaskSampler
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval.figures import attention, pca, retrieve, snapshots
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
    images_B3HW = torch.randn(3, 3, 24, 24)
    found = pca.components(encoder, images_B3HW)
    assert found.shape == (3, 6, 6, 3)
    with torch.no_grad():
        tokens = encoder(images_B3HW).double()
    within = (tokens - tokens.mean(1, keepdim=True)).flatten(0, 1).numpy()
    expected = PCA(3, svd_solver="full").fit_transform(within)
    ours = found.flatten(0, 2).numpy()
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-4)


def test_a_larger_grid_than_trained(encoder):
    assert pca.components(encoder, torch.randn(1, 3, 48, 32)).shape == (1, 12, 8, 3)


def test_colours_fill_their_range_and_nothing_gives_no_nan():
    scores = torch.arange(3 * 4 * 4 * 3, dtype=torch.float64).view(3, 4, 4, 3)
    shown = pca.as_colours(scores)
    assert shown.min() == 0 and shown.max() == 1
    assert np.isfinite(pca.as_colours(torch.zeros(1, 2, 2, 3).double())).all()


def test_the_context_s_colours_agree_with_the_target_s(encoder):
    """The same encoder with the last norm turned round: the same colours, not their opposite."""
    turned = encoder_of(0)
    turned.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        turned.norm.weight.neg_()
        turned.norm.bias.neg_()
    (_, ours), (_, theirs) = pca.columns(
        {"target": encoder, "context": turned}, torch.randn(2, 3, 24, 24)
    )
    np.testing.assert_allclose(np.stack(ours), np.stack(theirs), atol=1e-3)


def test_attention_lies_over_a_pale_picture():
    """Where a map is least the picture shows through in grey under its colour: by hand."""
    map_rc = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    shown = attention._over(np.ones((2, 2, 3), np.float32), map_rc)
    from matplotlib import colormaps

    for column, level in ((0, 0.0), (1, 1.0)):
        colour = np.array(colormaps["inferno"](level)[:3])
        np.testing.assert_allclose(shown[0, column], 0.72 * colour + 0.28, atol=1e-6)


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

    assert colours == [to_rgba(retrieve.RIGHT), to_rgba(retrieve.WRONG)]


def test_snapshots_are_arrays_for_tensorboard(encoder):
    images_B3HW = torch.randn(2, 3, 24, 24)
    masks = MaskSampler(grid=(6, 6), min_keep=4)(0, 0, torch.arange(2))
    found = snapshots.figures(encoder, encoder_of(1), images_B3HW, masks, encoder.mean, encoder.std)
    assert list(found) == ["masks", "attention", "pca"]
    for shown in found.values():
        assert shown.dtype == np.uint8 and shown.shape[2] == 3 and min(shown.shape[:2]) > 200
        assert shown.std() > 10
