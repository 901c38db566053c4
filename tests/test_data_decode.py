"""What the decoder puts out, against Pillow: formats, crops, flips, colours; on each device."""

import io

import broken_images as made
import numpy as np
import pytest
import torch
from PIL import Image

from cjepa_fast.data import formats
from cjepa_fast.data.dali import DaliDecoder
from cjepa_fast.data.decode import Feed, Look
from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.sources import open_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# nvJPEG repeats chroma where libjpeg interpolates it: smooth pictures differ by a level or two.
LEVELS = {"cpu": 1.0, "cuda": 3.0}


def look(device="cpu", dtype=torch.float32, **options):
    return Look(48, MEAN, STD, torch.device(device), dtype, 1, **options)


def in_levels(images_B3HW):
    """Undo the normalisation: (B, H, W, 3) in 0..255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (255 * (images_B3HW.float().cpu() * std + mean)).permute(0, 2, 3, 1).numpy()


def by_pillow(upright: Image.Image, window) -> np.ndarray:
    top, left, height, width = (int(v) for v in window)
    crop = upright.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((48, 48), Image.Resampling.BILINEAR)).astype(float)


SMOOTH = made.picture(11, 90, 130)
IMAGE = Image.fromarray(SMOOTH)
KINDS = {
    "4:2:0": made.encoded(SMOOTH),
    "4:2:2": made.encoded(SMOOTH, subsampling=1),
    "4:4:4": made.encoded(SMOOTH, subsampling=0),
    "progressive": made.encoded(SMOOTH, progressive=True),
    "gray jpeg": made.encoded(IMAGE.convert("L")),
    "cmyk": made.encoded(
        Image.merge("CMYK", (*IMAGE.split(), Image.fromarray(made.picture(3, 90, 130)[..., 0])))
    ),
    "rgb coded": made.encoded(SMOOTH, keep_rgb=True),
    "gray png": made.encoded(IMAGE.convert("L"), "PNG"),
    "rgba": made.encoded(Image.merge("RGBA", (*IMAGE.split(), IMAGE.split()[1])), "PNG"),
    "gray with alpha": made.encoded(Image.merge("LA", IMAGE.split()[:2]), "PNG"),
    "palette": made.encoded(IMAGE.quantize(64), "PNG"),
    "palette, one clear": made.encoded(IMAGE.quantize(64), "PNG", transparency=3),
    "palette, many clear": made.encoded(IMAGE.quantize(64), "PNG", transparency=bytes(range(64))),
    "two levels": made.encoded(IMAGE.convert("1"), "PNG"),
    "16-bit gray": made.png(SMOOTH[..., 0].astype(np.uint16) * 257),
    "16-bit gray, dark": made.png(SMOOTH[..., 0].astype(np.uint16) * 40),
    "16-bit colour": made.png(SMOOTH.astype(np.uint16) * 257),
    "gif": made.encoded(IMAGE.quantize(64), "GIF"),
    "webp": made.encoded(SMOOTH, "WEBP"),
    "damaged exif": made.encoded(SMOOTH, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "cut exif": made.encoded(SMOOTH, exif=made.exif(6)[:-8]),
} | {
    f"{kind} exif {turn}": made.encoded(SMOOTH, kind, exif=made.exif(turn))
    for kind in ("JPEG", "PNG")
    for turn in range(1, 9)
}


@pytest.mark.parametrize("device", DEVICES)
def test_every_kind_is_upright_rgb_as_by_pillow(tmp_path, device):
    """All kinds in one batch, each through ImageSet.read, so the converting path counts too."""
    for number, data in enumerate(KINDS.values()):
        made.write(tmp_path / "set" / f"{number:02d}.jpg", data)
    images = open_images(tmp_path / "set", cache=tmp_path / "cache")
    assert len(images) == len(KINDS) and not images.skipped
    wide = np.array([17, 23, 51, 84]), np.array([23, 17, 84, 51])
    window_B4 = np.array([wide[0] if h < w else wide[1] for h, w in images.sizes_N2], np.int32)
    decoder = DaliDecoder(look(device), len(KINDS))
    decoder.submit(Feed([images.read(i) for i in range(len(images))], window_B4))
    got_BHWC = in_levels(decoder.collect())
    for i, (kind, data) in enumerate(KINDS.items()):
        upright = formats.decode_rgb(data)
        assert images.sizes_N2[i].tolist() == [upright.height, upright.width], kind
        error = np.abs(got_BHWC[i] - by_pillow(upright, window_B4[i])).mean()
        assert error < LEVELS[device], (kind, error)


def test_the_reference_itself_is_upright():
    """decode_rgb is the reference above: it is held to the pixels that the files were made of."""
    turned = {1: SMOOTH, 3: SMOOTH[::-1, ::-1], 6: np.rot90(SMOOTH, -1), 8: np.rot90(SMOOTH)}
    turned |= {2: SMOOTH[:, ::-1], 4: SMOOTH[::-1], 5: SMOOTH.transpose(1, 0, 2)}
    turned |= {7: SMOOTH[::-1, ::-1].transpose(1, 0, 2)}
    for turn, want in turned.items():
        for kind in ("JPEG", "PNG"):
            got = np.asarray(formats.decode_rgb(KINDS[f"{kind} exif {turn}"])).astype(int)
            assert np.abs(got - want).mean() < 2, (kind, turn)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flip_colour_and_dtype(device, dtype):
    data = made.encoded(SMOOTH, subsampling=0)
    window_B4 = np.array([[0, 0, 90, 130]] * 3, np.int32)
    factors_B3 = np.array([[1, 1, 1], [0.5, 1, 1], [1, 1, 0]], np.float32)
    decoder = DaliDecoder(look(device, dtype, flip=True, colour=True), 3)
    decoder.submit(Feed([data] * 3, window_B4, np.array([0, 1, 0], np.int32), factors_B3))
    images = decoder.collect()
    assert images.dtype == dtype and images.shape == (3, 3, 48, 48) and images.device.type == device
    plain, dark, grey = in_levels(images)
    tolerance = 1.5 if dtype == torch.float32 else 3
    assert np.abs(plain - by_pillow(IMAGE, window_B4[0])).mean() < tolerance
    assert np.abs(dark[:, ::-1] - plain / 2).mean() < tolerance
    assert grey.std(axis=-1).mean() < 1.5 < plain.std(axis=-1).mean()


def test_batches_come_in_order_and_a_partial_one_too():
    decoder = DaliDecoder(look(), 4)
    window = np.array([[0, 0, 60, 80]], np.int32)
    feeds = [Feed([made.encoded(made.picture(k))] * n, window.repeat(n, 0)) for k, n in
             enumerate([4, 4, 1, 3])]  # fmt: skip
    decoder.submit(feeds[0])
    got = []
    for feed in feeds[1:]:
        decoder.submit(feed)
        got.append(decoder.collect())
    got.append(decoder.collect())
    assert [len(g) for g in got] == [4, 4, 1, 3]
    for k, images in enumerate(got):
        want = by_pillow(Image.fromarray(made.picture(k)), window[0])
        assert all(np.abs(image - want).mean() < 1.5 for image in in_levels(images))


@pytest.mark.parametrize("batch_size", [3, 4, 100])
def test_evaluation_is_in_order_centred_and_drops_the_bad(tmp_path, batch_size):
    root = made.good_folder(tmp_path / "set", 8, classes=1)
    _, later = made.break_folder(root)
    said = []
    images = open_images(root, cache=tmp_path / "cache", log=lambda line: None)
    (root / "c0" / "0003.jpg").unlink()
    options = {
        "image_size": 48,
        "mean": MEAN,
        "std": STD,
        "device": "cpu",
        "dtype": torch.float32,
        "threads": 1,
    }
    batches = list(eval_batches(images, resize=0.5, batch_size=batch_size, log=said.append,
                                **options))  # fmt: skip
    index = torch.cat([i for _, i in batches]).tolist()
    names = [images.name(i) for i in index]
    assert names == [f"c0/{i:04d}.jpg" for i in range(8) if i != 3]
    assert len(said) == len(later) + 1 and all(len(x) == len(i) for x, i in batches)
    shown = np.concatenate([in_levels(x) for x, _ in batches])
    for (height, width), name, got in zip(images.sizes_N2[index], names, shown, strict=True):
        side = round(0.5 * min(height, width))
        window = (height - side) // 2, (width - side) // 2, side, side
        want = by_pillow(Image.open(io.BytesIO((root / name).read_bytes())), window)
        assert np.abs(got - want).mean() < 1.5


def test_evaluation_of_bad_images_alone_is_empty(tmp_path):
    for i in range(5):
        made.write(tmp_path / "set" / f"{i}.jpg", made.damaged_tables(i))
    images = open_images(tmp_path / "set", cache=tmp_path / "cache")
    options = {
        "image_size": 48,
        "mean": MEAN,
        "std": STD,
        "device": "cpu",
        "dtype": torch.float32,
        "threads": 1,
    }
    assert list(eval_batches(images, batch_size=2, log=lambda line: None, **options)) == []
    with pytest.raises(ValueError, match="share of the short side"):
        next(eval_batches(images, batch_size=2, resize=1.2, **options))
