"""RandAugment without DALI: each change beside DALI's own, and which are drawn."""

import warnings

import corrupt_images as made
import numpy as np
import pytest
import torch
from test_data_decoder import settings
from test_data_loader import loader, take

from cjepa_fast.data import rand_augment
from cjepa_fast.data.decoder import MOST_MAGNITUDE, DecodeRequest
from cjepa_fast.data.decoder_choice import PILLOW
from cjepa_fast.data.pillow_decoder import PillowDecoder
from cjepa_fast.data.sources import open_images

SIDE = 64
# Smooth, noisy, and all of one colour, which leaves nothing to stretch.
IMAGES = [made.picture(k, SIDE, SIDE) for k in range(2)]
IMAGES.append(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
IMAGES.append(np.full((SIDE, SIDE, 3), 77, np.uint8))


def by_dali(number: int, magnitude: int, negative: bool) -> list[np.ndarray]:
    """IMAGES after DALI's own change of that number in its own list."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug.core import signed_bin
    from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite

    change = get_rand_augment_suite(use_shape=True)[number]

    @pipeline_def(batch_size=len(IMAGES), num_threads=1, device_id=None)
    def shown():
        images = fn.external_source(name="images", layout="HWC")
        bin_ = magnitude
        if change.randomly_negate:
            sign = fn.external_source(name="sign", ndim=0, dtype=types.INT32)
            bin_ = signed_bin(magnitude, random_sign=sign)
        shape = {"shape": [SIDE, SIDE]} if change.name.startswith("translate") else {}
        return change(
            images,
            magnitude_bin=bin_,
            num_magnitude_bins=MOST_MAGNITUDE + 1,
            **shape,
        )

    with warnings.catch_warnings(record=True):  # DALI warns of its own names, whatever is ignored
        pipe = shown()
        pipe.build()
    pipe.feed_input("images", IMAGES)
    if change.randomly_negate:
        pipe.feed_input("sign", np.full(len(IMAGES), negative, np.int32))
    (made_,) = pipe.run()
    return [np.array(made_.at(b)) for b in range(len(IMAGES))]


@pytest.mark.parametrize("magnitude", [0, 7, MOST_MAGNITUDE])
@pytest.mark.parametrize("number", range(len(rand_augment.CHANGES)))
def test_every_change_is_dalis(number, magnitude):
    """Within one level, at the edges too."""
    count = len(rand_augment.CHANGES)
    for negative in (False, True):
        uniforms = np.array([(number + 0.5) / count, 0.25 if negative else 0.75])
        for image, want in zip(IMAGES, by_dali(number, magnitude, negative), strict=True):
            got = rand_augment.changed(image, uniforms, magnitude)
            assert np.abs(got.astype(int) - want).max() <= 1


def test_the_list_is_dalis():
    from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite

    names = [change.name.replace("color", "colour") for change in get_rand_augment_suite(True)]
    assert [change.__name__ for change, *_ in rand_augment.CHANGES] == names


def test_every_change_is_drawn_and_each_image_has_its_own():
    count = len(rand_augment.CHANGES)
    draw_B2 = [((k + 0.01) / count, sign) for k in range(count) for sign in (0.49, 0.51)]
    B = len(draw_B2)
    request = DecodeRequest(
        [made.encoded(IMAGES[0], "PNG")] * B, np.array([[0, 0, SIDE, SIDE]] * B, np.int32),
        augment_BC=np.array(draw_B2),
    )  # fmt: skip
    decoder = PillowDecoder(settings(rand_augment=(1, 20, 0)))
    decoder.submit(request)
    looks = torch.unique(decoder.collect().flatten(1), dim=0)
    assert len(looks) == 3 + 2 * 9 + 2  # identity; what has one sign; what has two


def test_it_is_a_pure_function_of_the_index(tmp_path):
    images = open_images(made.good_folder(tmp_path / "set", 12), cache=tmp_path / "cache")
    options = {"rand_augment": (2, 9), "decoder": PILLOW, "micro_batch": 12, "image_size": 32}
    whole = take(loader(images, **options), 3)
    (resumed,) = take(loader(images, **options, threads=3), 1, start=2)
    assert torch.equal(resumed.images_BCHW, whole[2].images_BCHW)
    plain = take(loader(images, **(options | {"rand_augment": None})), 1)[0]
    changed_B = (plain.images_BCHW != whole[0].images_BCHW).flatten(1).any(1)
    assert changed_B.sum() >= 6
    halves = [
        take(loader(images, **(options | {"micro_batch": 6}), rank=r, world_size=2), 1)[0]
        for r in range(2)
    ]
    joined = torch.cat([half.images_BCHW for half in halves])
    assert torch.equal(joined, whole[0].images_BCHW)
