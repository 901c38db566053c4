"""Pillow's decoder beside DALI's on the CPU, in levels of 255 (measured, and held here).

Whole images: equal, but one level at most for CMYK and for colours of 16 bits. Windows, resized:
one level at most, and two for those. Colours of the same pixels: one level at most.
"""

import corrupt_images as made
import numpy as np
import pytest
import torch
from PIL import Image
from test_data_decoder import IMAGE, KINDS, MEAN, SMOOTH, STD, in_levels, settings
from test_data_loader import indices, loader, take

from cjepa_fast.data import crops, formats, pillow_decoder
from cjepa_fast.data.dali import DaliWholeDecoder
from cjepa_fast.data.decoder import DecodeFailed, DecodeRequest, DecodeSettings
from cjepa_fast.data.decoder_choice import DALI, PILLOW, open_decoder
from cjepa_fast.data.masks import MaskSampler
from cjepa_fast.data.pillow_decoder import PillowDecoder, PillowWholeDecoder
from cjepa_fast.data.sources import open_images
from cjepa_fast.data.whole_images import WholeImages

NOISE = np.random.default_rng(0).integers(0, 256, (97, 131, 3), dtype=np.uint8)
BOTH = {kind: data for kind, data in KINDS.items() if kind != "gif"}  # DALI reads no GIF
BOTH |= {
    "noise 4:2:0": made.encoded(NOISE),
    "noise 4:2:2": made.encoded(NOISE, subsampling=1),
    "noise 4:4:4": made.encoded(NOISE, subsampling=0),
    "noise, progressive": made.encoded(NOISE, progressive=True),
    "noise, coarse": made.encoded(NOISE, quality=30),
    "bmp": made.encoded(SMOOTH, "BMP"),
    "tiff": made.encoded(SMOOTH, "TIFF"),
    "jpeg 2000": made.encoded(SMOOTH, "JPEG2000"),
}
BOTH["noise, 16 bits"] = made.png(NOISE.astype(np.uint16) * 255 + NOISE[::-1])
BOTH["noise, gray, 16 bits"] = made.png(NOISE[..., 0].astype(np.uint16) * 255 + NOISE[..., 1])
ONE_LEVEL = {"cmyk", "noise, 16 bits"}  # apart before the resize; all others are equal


def difference(request: DecodeRequest, how: DecodeSettings) -> np.ndarray:
    """Levels between the two, (B, S, S, 3)."""
    shown = []
    for kind in (DALI, PILLOW):
        decoder = open_decoder(kind, how, len(request.encoded))
        decoder.submit(request)
        shown.append(np.rint(in_levels(decoder.collect())))
    return np.abs(shown[0] - shown[1])


@pytest.mark.parametrize("kind", BOTH)
def test_whole_images_are_dalis(kind):
    by_dali, by_pillow = (d([BOTH[kind]])[0] for d in (DaliWholeDecoder(1, 1),
                                                        PillowWholeDecoder(1)))  # fmt: skip
    assert by_dali.shape == by_pillow.shape
    far = np.abs(by_dali.astype(int) - by_pillow).max()
    assert far <= (1 if kind in ONE_LEVEL else 0)


# height and width of a window at (row 11, column 17): an eighth, about the size shown, and the rest
@pytest.mark.parametrize("height, width", [(6, 9), (48, 48), (60, 71)])
@pytest.mark.parametrize("kind", [k for k in BOTH if "exif" not in k])
def test_windows_are_dalis(kind, height, width):
    far = difference(
        DecodeRequest([BOTH[kind]], np.array([[11, 17, height, width]], np.int32)), settings()
    )
    assert far.max() <= (2 if kind in ONE_LEVEL else 1)


@pytest.mark.parametrize("turn", range(1, 9))
def test_windows_are_of_the_upright_image(turn):
    for kind in ("JPEG", "PNG"):
        window_B4 = np.array([[30, 5, 50, 70]], np.int32)
        far = difference(DecodeRequest([KINDS[f"{kind} exif {turn}"]], window_B4), settings())
        assert far.max() <= 1


def test_flips_and_colours_are_dalis(seed):
    """Of pixels that need no resize, so that nothing is told twice."""
    B, random = 24, np.random.default_rng(seed)
    encoded = [made.encoded(made.picture(seed + b, 48, 48), "PNG") for b in range(B - 1)]
    encoded.append(made.encoded(NOISE[:48, :48], "PNG"))
    factors_B3 = random.uniform(0, 2, (B, 3)).astype(np.float32)
    flip_B = random.integers(0, 2, B).astype(np.int32)
    request = DecodeRequest(encoded, np.array([[0, 0, 48, 48]] * B, np.int32), flip_B, factors_B3)
    assert difference(request, settings(flip=True, colour=True)).max() <= 1


def test_real_windows_are_dalis(real_images, seed):
    """Crops as training draws them, of a large share, of a small one, and whole."""
    images = open_images(real_images, log=lambda line: None)
    some = np.random.default_rng(seed).permutation(len(images))[:48]
    uniform_BC = np.random.default_rng(seed).random((len(some), crops.CROP_UNIFORMS))
    encoded, sizes_B2 = [images.read(i) for i in some], images.sizes_N2[some]
    how = DecodeSettings(224, MEAN, STD, torch.device("cpu"), torch.float32, 2)
    for scale in ((0.3, 1.0), (0.02, 0.1)):
        window_B4 = crops.random_resized(sizes_B2, uniform_BC, scale, (3 / 4, 4 / 3))
        assert difference(DecodeRequest(encoded, window_B4), how).max() <= 1
    whole_B4 = np.concatenate([np.zeros_like(sizes_B2), sizes_B2], axis=1).astype(np.int32)
    assert difference(DecodeRequest(encoded, whole_B4), how).max() <= 1


def test_the_order_the_crops_and_the_masks_are_those_with_dali(tmp_path):
    images = open_images(made.good_folder(tmp_path / "set", 41), cache=tmp_path / "cache")
    masks = MaskSampler((8, 8), min_keep=4, seed=5)
    options = {"micro_batch": 12, "flip": True, "masks": masks, "image_size": 32}
    by_dali, by_pillow = (
        take(loader(images, decoder=kind, **options), 7) for kind in (DALI, PILLOW)
    )
    assert indices(by_dali) == indices(by_pillow)
    for one, other in zip(by_dali, by_pillow, strict=True):
        assert torch.equal(one.masks.context_idx_BK, other.masks.context_idx_BK)
        far = 0.25 * 255 * (one.images_BCHW - other.images_BCHW).abs()
        assert far.max() < 1.01


# ------------------------------------------------------------------------------ threads, failures


def some_request(count: int = 20) -> DecodeRequest:
    encoded = [made.encoded(made.picture(b, 60 + b, 80)) for b in range(count)]
    return DecodeRequest(encoded, np.array([[3, 4, 50, 60]] * count, np.int32))


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    request = some_request()
    seen = []
    for threads in (1, 2, 7):
        decoder = PillowDecoder(
            DecodeSettings(48, MEAN, STD, torch.device("cpu"), torch.float32, threads)
        )
        for _ in range(3):
            decoder.submit(request)
        seen += [decoder.collect() for _ in range(3)]
    assert all(torch.equal(images, seen[0]) for images in seen)


BAD = {
    "truncated": made.truncated(1),
    "cut short": made.encoded(SMOOTH, "PNG")[:-40],
    "tables": made.damaged_tables(1),
    "png pixels": made.png_damaged_pixels(1),
    "text": b"this is not an image",
    "empty": b"",
    "huge jpeg": made.huge(1),
    "huge png": made.PNG_MAGIC
    + made.chunk(b"IHDR", b"\0\1\0\0" * 2 + b"\x08\2\0\0\0")
    + made.chunk(b"IDAT", b""),
    "huge tiff": made.encoded(Image.new("1", (30000, 8000)), "TIFF", compression="group4"),
    "smaller than its window": made.encoded(SMOOTH[:49]),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_found_and_the_others_go_on(kind, recwarn):
    decoder, request = PillowDecoder(settings()), some_request(4)
    decoder.submit(some_request(4))
    request.encoded[2] = BAD[kind]
    decoder.submit(request)
    want = decoder.collect()
    with pytest.raises(DecodeFailed):
        decoder.collect()
    found = [decoder.decode_alone(request, b) for b in range(4)]
    assert found == [None if b == 2 else request.encoded[b] for b in range(4)]
    decoder.restart()
    again = [decoder.decode_alone(request, b) for b in range(4)]  # also of what is not inside
    assert again == found
    decoder.submit(request.rows([0, 1, 3]))
    assert torch.equal(decoder.collect(), want[[0, 1, 3]])
    assert not recwarn.list


def test_an_error_that_is_no_images_fault_is_raised(monkeypatch):
    def fails(*_, **options):
        raise MemoryError

    monkeypatch.setattr(formats, "decode_rgb", fails)
    decoder = PillowDecoder(settings())
    decoder.submit(some_request(2))
    with pytest.raises(MemoryError):
        decoder.collect()


def test_whole_images_by_pillow_name_the_bad_one(monkeypatch):
    monkeypatch.setenv("CJEPA_DECODER", PILLOW)
    monkeypatch.setattr(DaliWholeDecoder, "__call__", None)  # not asked
    jpeg = made.encoded(SMOOTH)
    (image, _) = WholeImages(2, 2)([jpeg, jpeg], ["a", "b"])
    assert np.array_equal(image.permute(1, 2, 0).numpy(), formats.decode_rgb(jpeg))
    with pytest.raises(ValueError, match="b cannot be decoded: replace or remove it"):
        WholeImages(2, 2)([jpeg, BAD["tables"]], ["a", "b"])


# ---------------------------------------------------------------------------------- other formats

EXACT = {
    "bmp": made.encoded(SMOOTH, "BMP"),
    "tiff": made.encoded(SMOOTH, "TIFF"),
    "tiff, lzw": made.encoded(SMOOTH, "TIFF", compression="tiff_lzw"),
    "tiff, clear": made.encoded(IMAGE.convert("RGBA"), "TIFF"),
    "tiff, cmyk": made.encoded(IMAGE.convert("CMYK"), "TIFF"),
    "jpeg 2000": made.encoded(SMOOTH, "JPEG2000"),
    "jpeg 2000, clear": made.encoded(IMAGE.convert("RGBA"), "JPEG2000"),
    "webp": made.encoded(SMOOTH, "WEBP", lossless=True),
    "webp, moving": made.encoded(
        IMAGE, "WEBP", lossless=True, save_all=True, append_images=[IMAGE.rotate(180)]
    ),
    "ppm": made.encoded(SMOOTH, "PPM"),
    "16-bit ppm": b"P6 130 90 65535\n" + (SMOOTH.astype(">u2") * 257).tobytes(),
}
GREY = {
    "16-bit tiff": made.encoded(Image.fromarray(SMOOTH[..., 0].astype(np.uint16) * 257), "TIFF"),
    "16-bit pgm": b"P5 130 90 65535\n" + (SMOOTH[..., 0].astype(">u2") * 257).tobytes(),
    "grey jpeg 2000": made.encoded(Image.fromarray(SMOOTH[..., 0]), "JPEG2000"),
}


@pytest.mark.parametrize("kind", [*EXACT, *GREY])
def test_other_formats_are_read(kind, recwarn):
    got = pillow_decoder.pixels((EXACT | GREY)[kind])
    want = SMOOTH if kind in EXACT else SMOOTH[..., :1].repeat(3, -1)
    assert np.array_equal(got, want) and not recwarn.list


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_other_formats_are_upright_and_of_the_first_frame(kind, recwarn):
    if kind == "GIF":
        first = IMAGE.quantize(64)
        data = made.encoded(
            first, "GIF", save_all=True, append_images=[first.rotate(180)], transparency=3
        )
        want = np.asarray(first.convert("RGB"))
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        data = made.encoded(
            SMOOTH, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})
        )
        want = np.rot90(SMOOTH, -1)
    assert np.array_equal(pillow_decoder.pixels(data), want) and not recwarn.list
