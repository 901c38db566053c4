"""JPEGs whose pixels end before the picture does: seen by the gray that a decoder paints there."""

import io

import corrupt_images as made
import numpy as np
import pytest
import torch
from PIL import Image

from cjepa_fast.config import DataSection
from cjepa_fast.data import formats
from cjepa_fast.data.decoder_choice import DALI, PILLOW
from cjepa_fast.data.early_ends import gap
from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.loader import BatchSplit, Loader
from cjepa_fast.data.pack import pack
from cjepa_fast.data.sources import Limits, open_images

H, W = 160, 240
WHOLE = made.picture(3, H, W)
EOI = b"\xff\xd9"
SHAPES = {"image_size": 32, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def cut(data: bytes, share: float = 0.5, end: bytes = EOI) -> bytes:
    """A JPEG of which a share of the pixels' bytes is left, with an end marker all the same."""
    scan = data.rfind(b"\xff\xda")
    return data[: scan + int(share * (len(data) - scan))].rstrip(b"\xff") + end


def rows_there(data: bytes) -> int:
    """By the gray in what Pillow makes of it, without a turn by EXIF."""
    with Image.open(io.BytesIO(data)) as image:
        rows_HW = np.asarray(image.convert("L"))
    return int(np.flatnonzero((rows_HW != 128).any(1)).max()) + 1


@pytest.mark.parametrize("options", [
    {}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_rows": 1}, {"optimize": True},
])  # fmt: skip
@pytest.mark.parametrize("share", [0.03, 0.5, 0.93])
def test_a_gap_is_where_the_pixels_end(options, share):
    for pixels in (WHOLE, WHOLE[..., 0]):
        data = made.encoded(pixels, **options)
        assert gap(data) is None and gap(data[:-2]) is None and gap(data + b"trailing") is None
        found = gap(cut(data, share))
        there = rows_there(cut(data, share))
        assert found.axis == 0 and found.stop == H and there <= found.start <= there + 16
        assert gap(cut(data, share, end=b"")) == found
        assert gap(cut(data, share, end=b"\xff\x02" + bytes(40) + EOI)) == found  # a wild marker


def test_a_gray_edge_that_is_in_the_picture_is_no_gap():
    """Letterboxed, or all of one gray."""
    boxed = np.full((H, W, 3), 128, np.uint8)
    assert gap(made.encoded(boxed)) is None
    boxed[40:100] = WHOLE[40:100]
    assert gap(made.encoded(boxed)) is None


def test_what_is_no_baseline_jpeg_has_no_gap():
    assert gap(cut(made.encoded(WHOLE, progressive=True))) is None
    assert gap(made.encoded(WHOLE, "PNG")) is None and gap(b"\xff\xd8\xff\xda") is None
    assert gap(made.damaged_tables(1)) is None


@pytest.mark.parametrize("turn", range(1, 9))
def test_the_gap_of_a_turned_image_is_where_it_is_shown(turn):
    data = cut(made.encoded(WHOLE, exif=made.exif(turn)))
    shown = np.asarray(formats.decode_rgb(data)).astype(int)
    found = gap(data)
    span = slice(found.start, found.stop)
    missing = shown[span] if found.axis == 0 else shown[:, span]
    assert (missing == 128).all() and missing.size > 0.3 * shown.size
    whole = np.array([0, 0, *shown.shape[:2]])
    assert found.share(whole) == pytest.approx(missing.size / shown.size)


def made_set(root):
    """Twelve good images, one letterboxed, and three of which half is missing."""
    made.good_folder(root, 12)
    boxed = np.full((H, W, 3), 128, np.uint8)
    boxed[:80] = WHOLE[:80]
    made.write(root / "c0" / "boxed.jpg", made.encoded(boxed))
    for turn in (1, 3, 6):
        data = cut(made.encoded(WHOLE, exif=made.exif(turn)), 0.4)
        made.write(root / "c1" / f"cut{turn}.jpg", data)
    return root


CUT = {f"c1/cut{turn}.jpg" for turn in (1, 3, 6)}


@pytest.fixture(params=[DALI, PILLOW])
def decoder(request):
    return request.param


def shown(images, decoder, said, steps=12, start=0, **options):
    """{(step, index): name} of what a loader shows."""
    data = DataSection(image_size=32, batch_size=4, micro_batch_size=4, threads=1, decoder=decoder,
                       max_skipped=0.5, **options)  # fmt: skip
    loader = Loader(images, data, BatchSplit(4, 4), seed=0, device="cpu", dtype=torch.float32,
                    log=said.append)  # fmt: skip
    batches = loader.iterate(start)
    found = {}
    for step in range(start, steps):
        batch = next(batches)
        gray = (batch.images_BCHW[:, :, -1].std(-1) < 1e-6).all(1)
        for b, i in enumerate(batch.index_B.tolist()):
            found[step, b] = images.name(i), bool(gray[b])
    loader.close()
    return found


@pytest.mark.parametrize("colour", [0.0, 1.0])
def test_a_crop_of_what_is_missing_is_replaced(tmp_path, decoder, colour):
    images = open_images(made_set(tmp_path / "set"), cache=tmp_path / "c", log=lambda line: None)
    said = []
    found = shown(images, decoder, said, colour=colour)
    gray = {name for name, gray in found.values() if gray}
    assert gray == {"c0/boxed.jpg"}
    named = {line.split(": ")[1] for line in said if "its pixels end early" in line}
    assert named == CUT
    resumed = shown(images, decoder, [], start=7, colour=colour)  # which knows of no file yet
    assert resumed == {key: value for key, value in found.items() if key[0] >= 7}


def test_a_run_of_before_shows_them_as_it_did(tmp_path, decoder):
    root = made_set(tmp_path / "set")
    images = open_images(root, cache=tmp_path / "c", limits=Limits(min_shown=0.0))
    said = []
    assert CUT & {name for name, gray in shown(images, decoder, said).values() if gray}
    assert not [line for line in said if "end early" in line]


def test_an_evaluation_leaves_them_out(tmp_path, decoder):
    images = open_images(made_set(tmp_path / "set"), cache=tmp_path / "c", log=lambda line: None)
    said = []
    batches = eval_batches(images, batch_size=5, device="cpu", dtype=torch.float32, threads=1,
                           decoder=decoder, log=said.append, **SHAPES)  # fmt: skip
    names = [images.name(int(i)) for _, index_B in batches for i in index_B]
    assert len(names) == len(images) - 3 and not CUT & set(names)
    assert len([line for line in said if "its pixels end early" in line]) == 3


def test_packing_leaves_them_out(tmp_path):
    root = made_set(tmp_path / "set")
    left_out = pack(root, tmp_path / "out", cache=tmp_path / "c", short_side=24, log=lambda line: 0)
    assert {name for name, why in left_out if "end early" in why} == CUT == dict(left_out).keys()
