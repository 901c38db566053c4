"""What a segmenter is shown: labels on their pixels, crops no class fills, new colours."""

import colorsys

import pytest
import torch

from cjepa_fast.data.sets.pairs import IGNORE
from cjepa_fast.eval.dense import segment_views as views
from cjepa_fast.model.vit import Encoder

SCALE_1 = 1 / 3  # the draw that gives it
STILL = [0.9] * 4 + [0.5] * 4  # of the colours


@pytest.fixture
def view():
    encoder = Encoder(image_size=16, patch_size=4, width=24, depth=1, heads=3)
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3

    def view(image, labels, uniforms, short_side=40, plain_colours=True):
        chosen = views.chosen_view(labels, uniforms, short_side, crop_size=32)
        return views.shown(image, chosen, plain_colours, encoder, "cpu")

    return view


def shades(view_3CC: torch.Tensor) -> torch.Tensor:
    """The first channel of a normalised view, 0..255."""
    return (view_3CC[0] * 0.25 + 0.5) * 255


def test_labels_stay_on_their_pixels(view, seed):
    """Colour and class of each pixel agree after scaling, cropping and flipping."""
    labels = torch.arange(6, dtype=torch.uint8).view(2, 3).repeat_interleave(20, 0)
    labels = labels.repeat_interleave(20, 1)
    image = (labels * 40).repeat(3, 1, 1)
    smallest = []
    draws = torch.rand(40, views.DRAWS)
    draws[0, 0] = 0.0  # the smallest, which needs padding
    for draw in draws.tolist():
        picture, found = view(image, labels, draw)
        assert picture.shape == (3, 32, 32) and found.shape == (32, 32)
        known = found != IGNORE
        agrees = (shades(picture) / 40 - found)[known].abs() < 0.45  # but where two squares meet
        assert agrees.float().mean() > 0.7
        smallest.append(known.float().mean().item())
    assert min(smallest) < 1 == max(smallest)


def test_the_flip_is_of_both_and_the_scale_as_drawn(view):
    labels = torch.arange(32, dtype=torch.uint8).expand(32, 32).contiguous()
    image = (labels * 8).repeat(3, 1, 1)
    for flip, expected in ((0.9, labels), (0.1, labels.flip(-1))):
        draw = [SCALE_1, flip] + [0.0] * (2 * views.TRIES) + STILL
        for plain_colours in (True, False):
            picture, found = view(image, labels, draw, short_side=32, plain_colours=plain_colours)
            assert torch.equal(found, expected)
            torch.testing.assert_close(shades(picture), expected.float() * 8, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("first", "chosen"), [(0.0, 1), (0.5, 0)])
def test_a_crop_that_a_class_fills_is_drawn_again(view, first, chosen):
    """The left 40 columns are of one class, the right of two; the second try lies in the middle."""
    labels = torch.zeros(40, 80, dtype=torch.uint8)
    labels[:, 40:60], labels[:, 60:] = 1, 2
    labels[0] = IGNORE
    tries = [0.0, first, 0.0, 0.99] + [0.0] * (2 * views.TRIES - 4)
    draw = [SCALE_1, 0.9, *tries, *STILL]
    _, found = view(labels.repeat(3, 1, 1), labels, draw)
    start = [int(first * 49), 48][chosen]
    assert torch.equal(found, labels[:32, start : start + 32])


def test_one_class_alone_is_shown_all_the_same(view):
    labels = torch.full((40, 80), 3, dtype=torch.uint8)
    draw = [SCALE_1, 0.9, *torch.rand(2 * views.TRIES).tolist(), *STILL]
    assert (view(labels.repeat(3, 1, 1), labels, draw)[1] == 3).all()


def one(kind: int, value: float) -> list[float]:
    """Draws that change one of the four, with `value` for how much."""
    whether, much = [0.9] * 4, [0.5] * 4
    whether[kind], much[kind] = 0.1, value
    return whether + much


def test_brightness_and_contrast_by_hand():
    image = torch.tensor([10.0, 100.0, 200.0]).view(3, 1, 1)
    brighter = views.recoloured(image, one(0, 1.0)).flatten()
    torch.testing.assert_close(brighter, torch.tensor([42.0, 132.0, 232.0]), rtol=0, atol=1e-3)
    weaker = views.recoloured(image, one(1, 0.0)).flatten()
    torch.testing.assert_close(weaker, torch.tensor([5.0, 50.0, 100.0]), rtol=0, atol=1e-3)
    stronger = views.recoloured(image, one(1, 1.0)).flatten()
    torch.testing.assert_close(stronger, torch.tensor([15.0, 150.0, 255.0]), rtol=0, atol=1e-3)


def test_saturation_and_hue_leave_greys_and_turn_as_hsv_does():
    grey = torch.full((3, 2, 2), 77.0)
    for kind in (2, 3):
        torch.testing.assert_close(views.recoloured(grey, one(kind, 0.9)), grey, rtol=0, atol=1e-2)
    red = torch.tensor([180.0, 90.0, 90.0]).view(3, 1, 1)

    def hsv(image_311: torch.Tensor) -> tuple[float, float, float]:
        return colorsys.rgb_to_hsv(*(image_311.flatten() / 255).tolist())

    paler = hsv(views.recoloured(red, one(2, 0.0)))
    assert paler[0] == pytest.approx(0, abs=1e-3) and 0.2 < paler[1] < 0.35 < hsv(red)[1]
    turned = [hsv(views.recoloured(red, one(3, value)))[0] for value in (0.0, 1.0)]
    degrees = sorted(min(hue, hue - 1, key=abs) * 360 for hue in turned)
    assert degrees == pytest.approx([-36, 36], abs=2)  # HSV's circle is a hexagon


def test_only_what_is_drawn_changes(seed):
    image = 255 * torch.rand(3, 4, 4)
    torch.testing.assert_close(views.recoloured(image, STILL), image, rtol=0, atol=1e-2)
    assert (views.recoloured(image, [0.1] * 4 + [0.9] * 4) - image).abs().max() > 10
