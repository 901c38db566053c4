"""Images of one, two, four and more channels: pictures, .npy and TIFFs of bands; who is refused."""

import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import corrupt_images as made
import numpy as np
import pytest
import torch
from PIL import Image

from cjepa_fast.config import DataSection
from cjepa_fast.data import arrays, dali, formats, index
from cjepa_fast.data.decoder import DecodeRequest, DecodeSettings
from cjepa_fast.data.decoder_choice import DALI, PILLOW, choose_decoder, open_decoder
from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.headers import Unusable
from cjepa_fast.data.loader import BatchSplit, Loader
from cjepa_fast.data.pack import pack
from cjepa_fast.data.sources import Limits, open_images

SMOOTH = made.picture(5, 60, 80)
RGBA = np.concatenate([SMOOTH, made.picture(6, 60, 80)[..., :1]], axis=2)
BANDS = np.concatenate([SMOOTH, RGBA[..., 3:], SMOOTH[::-1, :, :1]], axis=2)  # five
PICTURES = {
    1: [("jpg", made.encoded(Image.fromarray(SMOOTH[..., 0]))),
        ("png", made.encoded(Image.fromarray(SMOOTH[..., 0]), "PNG")),
        ("tif", made.encoded(Image.fromarray(SMOOTH[..., 0]), "TIFF")),
        ("png", made.png(SMOOTH[..., 0].astype(np.uint16) * 257))],
    2: [("png", made.encoded(Image.fromarray(RGBA[..., [0, 3]], "LA"), "PNG"))],
    4: [("png", made.encoded(Image.fromarray(RGBA, "RGBA"), "PNG")),
        ("tif", made.encoded(Image.fromarray(RGBA, "RGBA"), "TIFF")),
        ("webp", made.encoded(Image.fromarray(RGBA, "RGBA"), "WEBP", lossless=True, exact=True))],
}  # fmt: skip


def settings(channels: int, size=48, **options) -> DecodeSettings:
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    return DecodeSettings(size, zeros, ones, torch.device("cpu"), torch.float32, 1, **options)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tiff(values: np.ndarray, *, tile=None, planes=False, deflated=False, differences=False,
         order="<", compression=None, more=None) -> bytes:  # fmt: skip
    """A TIFF of (H, W, bands), its blocks first, then the tags: as GDAL and others write it."""
    height, width, count = values.shape
    block_h, block_w = tile or (16, width)
    layers = [values[..., [c]] for c in range(count)] if planes else [values]
    blocks = []
    for layer in layers:
        for top in range(0, height, block_h):
            for left in range(0, width, block_w):
                part = layer[top : top + block_h, left : left + block_w]
                if tile:
                    room = [(0, block_h - part.shape[0]), (0, block_w - part.shape[1]), (0, 0)]
                    part = np.pad(part, room)
                if differences:
                    part = np.diff(part, axis=1, prepend=np.zeros_like(part[:, :1]))
                data = part.astype(part.dtype.newbyteorder(order)).tobytes()
                blocks.append(zlib.compress(data) if deflated else data)
    kind = {"u": 1, "f": 3}[values.dtype.kind]
    lengths = [len(block) for block in blocks]
    offsets = np.cumsum([8, *lengths[:-1]]).tolist()
    fields = {
        256: [width], 257: [height], 258: [8 * values.dtype.itemsize] * count,
        259: [compression or (8 if deflated else 1)], 262: [1], 277: [count],
        284: [2 if planes else 1], 317: [2 if differences else 1], 339: [kind] * count,
    }  # fmt: skip
    fields |= {322: [block_w], 323: [block_h], 324: offsets, 325: lengths} if tile else {
        273: offsets, 278: [block_h], 279: lengths}  # fmt: skip
    fields |= more or {}
    start = 8 + sum(lengths)
    entries, beyond = b"", b""
    after = start + 2 + 12 * len(fields) + 4
    for tag, numbers in sorted(fields.items()):
        body = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(body) > 4:
            body, beyond = struct.pack(f"{order}I", after + len(beyond)), beyond + body
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + body
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    count = struct.pack(f"{order}H", len(fields))
    return head + b"".join(blocks) + count + entries + bytes(4) + beyond


def header_of(data: bytes) -> formats.ImageHeader:
    return formats.inspect(lambda at, count: data[at : at + count], len(data))


def write(root, files) -> object:
    for i, (ending, data) in enumerate(files):
        made.write(root / "c0" / f"{i}.{ending}", data)
    return root


def shown(images, channels: int, decoder: str, size=48, **options) -> np.ndarray:
    """All images whole, in levels of 255: (n, H, W, C)."""
    batches = eval_batches(
        images, image_size=size, mean=(0.0,) * channels, std=(1.0,) * channels, batch_size=3,
        device="cpu", dtype=torch.float32, threads=1, decoder=decoder,
        windows_N4=np.array([[0, 0, h, w] for h, w in images.sizes_N2], np.int32), **options,
    )  # fmt: skip
    return 255 * torch.cat([x for x, _ in batches]).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("channels", PICTURES)
def test_pictures_come_with_the_channels_that_they_have(tmp_path, channels):
    """Each is resized by itself: what is clear keeps its colour, and weighs no less."""
    images = open_images(write(tmp_path / "set", PICTURES[channels]), cache=tmp_path / "cache")
    assert images._entries_N["channels"].tolist() == [channels] * len(images)
    found = shown(images, channels, PILLOW, size=(30, 40))
    stored = {1: SMOOTH[..., :1], 2: RGBA[..., [0, 3]], 4: RGBA}[channels]
    for got_HWC in found:
        for c in range(channels):
            band = Image.fromarray(stored[..., c]).resize((40, 30), Image.Resampling.BILINEAR)
            assert np.abs(got_HWC[..., c] - np.asarray(band)).mean() < 1.5
    other = shown(images, channels, "auto", size=(30, 40))  # DALI, but for gray with alpha
    assert np.abs(found - other).max() <= 1.01


def test_a_palette_with_clear_colours_has_an_alpha(tmp_path):
    palette = Image.fromarray(SMOOTH).quantize(16)
    data = made.encoded(palette, "PNG", transparency=bytes(range(0, 160, 10)))
    images = open_images(write(tmp_path / "set", [("png", data)]), cache=tmp_path / "cache")
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    assert len(np.unique(wanted[..., 3])) == 16
    for decoder in ("auto", PILLOW):
        assert np.abs(shown(images, 4, decoder, size=(60, 80))[0] - wanted).max() <= 1.01


def test_channels_are_told_from_headers():
    cmyk = made.encoded(Image.fromarray(RGBA, "CMYK"))
    palette = Image.fromarray(SMOOTH).quantize(32)
    kinds = {
        3: [made.encoded(SMOOTH), cmyk, made.encoded(palette, "PNG"), made.encoded(palette, "GIF"),
            made.encoded(SMOOTH, "WEBP"), npy(SMOOTH)],
        1: [made.encoded(Image.fromarray(SMOOTH[..., 0]).convert("1"), "PNG"), npy(SMOOTH[..., 0])],
        4: [made.encoded(palette, "PNG", transparency=bytes(32))],
        5: [tiff(BANDS), npy(BANDS), npy(BANDS.transpose(2, 0, 1))],
    }  # fmt: skip
    for channels, files in kinds.items():
        assert [header_of(data).channels for data in files] == [channels] * len(files)
    assert header_of(npy(BANDS.transpose(2, 0, 1)))[:3] == (60, 80, formats.ARRAY)
    floats = SMOOTH[..., :1].astype(np.float32)
    for data in (tiff(floats), made.encoded(Image.fromarray(floats[..., 0]), "TIFF")):
        assert header_of(data) == (60, 80, formats.ARRAY, 8, 100, 1)
        assert np.array_equal(arrays.pixels(data), 255 * floats)
    assert header_of(tiff(BANDS))[:3] == (60, 80, formats.ARRAY)


LAYOUTS = {
    "strips": {},
    "deflated, differences": {"deflated": True, "differences": True},
    "tiles": {"tile": (32, 48)},
    "tiles as wide as the image": {"tile": (32, 80), "deflated": True},
    "planes": {"planes": True},
    "planes of tiles, big end first": {"planes": True, "tile": (16, 16), "order": ">"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiffs_of_bands_are_read_as_written(layout, dtype):
    options = LAYOUTS[layout]
    values = BANDS.astype(dtype) * (257 if dtype == np.uint16 else 1)
    if dtype == np.float32:
        options, values = {**options, "differences": False}, values / 100 - 1
    found = arrays.pixels(tiff(values, **options))
    wanted = BANDS if dtype != np.float32 else 255 * values
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiffs_of_any_depth_are_upright(turn, dtype):
    """As Pillow has them of 8 bits."""
    gray = SMOOTH[..., :1]
    want = np.asarray(formats.decode_rgb(tiff(gray, more={274: [turn]}), channels=1))
    values = gray.astype(dtype) * dtype(257 if dtype == np.uint16 else 1)
    for data in (tiff(values, more={274: [turn]}), tiff(values.repeat(5, 2), more={274: [turn]})):
        header = header_of(data)
        assert (header.height, header.width) == want.shape == ((80, 60) if turn >= 5 else (60, 80))
        if header.kind == formats.ARRAY:
            found = arrays.pixels(data)[..., -1] / (255 if dtype == np.float32 else 1)
        else:
            found = np.asarray(formats.decode_rgb(data, channels=1)).astype(float)
        assert np.abs(found - want).max() < 0.51


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("options", [{}, {"deflated": True}, {"order": ">"}])
def test_where_zero_is_white_it_is_so_at_every_depth(bits, options):
    """Pillow opens none of 16 bits with the big end first: that is an array."""
    gray = SMOOTH[..., :1]
    values = (gray / 255 * (2**bits - 1) + 0.5).astype(np.uint8 if bits == 8 else np.uint16)
    data, deep = tiff(values, more={262: [0]}, **options), bits if bits == 12 else None
    if header_of(data).kind == formats.ARRAY:
        found = arrays.pixels(data, deep)
    else:
        found = np.atleast_3d(formats.decode_rgb(data, bits=deep, channels=1)).astype(float)
    assert np.abs(found - (255 - gray.astype(float))).max() < 1.01


def test_floats_and_bands_have_no_white():
    for values in (SMOOTH[..., :1].astype(np.float32), BANDS):
        same = [arrays.pixels(tiff(values, more={262: [k]})) for k in (0, 1)]
        assert np.array_equal(*same)


CUT = {
    "LZW": (lambda: tiff(BANDS, compression=5), "5 bands compressed by LZW: store it uncompressed"),
    "signed": (lambda: tiff(SMOOTH[..., :1], more={339: [2]}), "a TIFF of signed numbers: store"),
    "signed bands": (lambda: tiff(BANDS, more={339: [2] * 5}), "of 5 bands of .* store uint8"),
    "tags cut": (lambda: tiff(BANDS)[:-40], "damaged header"),
    "no tags": (lambda: tiff(BANDS)[:4000], "damaged header"),
    "blocks cut": (
        lambda: tiff(BANDS, more={279: [10] * 4}),
        "truncated: 80 x 60 pixels of 5 bands",
    ),
    "a file of a few bytes that claims gigabytes": (
        lambda: tiff(
            BANDS, more={256: [60000], 257: [60000], 278: [60000], 273: [8], 279: [60000 * 60000]}
        ),
        "truncated: 60000 x 60000 pixels of 5 bands",
    ),
    "damaged block": (
        lambda: tiff(BANDS, deflated=True).replace(
            zlib.compress(BANDS[:16].tobytes())[9:40], b"?" * 31
        ),
        "a damaged block",
    ),
    "integers": (lambda: npy(BANDS.astype(np.int64)), "an array of int64: store whole numbers as"),
    "pickled": (lambda: npy(np.array([{}, 1], object)), "Python objects, which is never unpickled"),
    "axes": (lambda: npy(BANDS[None]), "an array of 4 axes"),
    "cut": (lambda: npy(BANDS)[:-9], "truncated"),
    "header cut": (lambda: npy(BANDS)[:40], "damaged header"),
    "header open": (lambda: npy(BANDS).replace(b"}", b" "), "damaged header .*multi-line"),
    "channels": (lambda: npy(np.zeros((2000, 2, 2000), np.uint8)), "of 2000 channels, more than"),
    "empty": (lambda: npy(np.zeros((0, 3, 1), np.uint8)), "of 0 channels"),
    "flat": (lambda: npy(np.zeros((0, 3, 0), np.uint8)), "declares 3 x 0 pixels|of 0 channels"),
}


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.filterwarnings("ignore:.*Corrupt EXIF", "ignore:Truncated")
def test_arrays_that_cannot_be_read_say_why(kind):
    data, said = CUT[kind][0](), CUT[kind][1]
    with pytest.raises((Unusable, OSError), match=said):
        header_of(data)
        arrays.pixels(data)


def test_a_damaged_header_is_an_os_error_where_the_values_are_read_too():
    with pytest.raises(OSError, match="cannot be decoded"):
        arrays.pixels(CUT["header open"][0]())


def test_channels_count_for_the_largest_image(tmp_path):
    files = [("npy", npy(np.zeros((20, 30, 7), np.uint8))), ("npy", npy(np.zeros((9, 9, 7), "u1")))]
    root = write(tmp_path / "set", files)
    whole = open_images(root, limits=Limits(20 * 30 * 3), cache=tmp_path / "cache")
    assert len(whole) == 2
    images = open_images(root, limits=Limits(20 * 30 * 3 - 1), cache=tmp_path / "cache")
    assert len(images) == 1 and "of 7 channels, three a pixel" in images.skipped[0][1]


def test_values_of_arrays_are_shares_of_their_range_or_what_they_are():
    dark = np.full((9, 9, 2), 4095, np.uint16)
    assert np.allclose(arrays.pixels(npy(dark)), 255 * 4095 / 65535)
    assert np.allclose(arrays.pixels(npy(dark), 12), 255)
    assert np.allclose(arrays.pixels(npy(dark.astype(np.float32))) / 255, 4095)
    first = np.moveaxis(np.arange(9 * 9 * 2, dtype=np.uint8).reshape(9, 9, 2), 2, 0)
    assert np.array_equal(arrays.pixels(npy(first)), np.moveaxis(first, 0, 2))
    assert np.array_equal(arrays.pixels(npy(np.asfortranarray(first))), np.moveaxis(first, 0, 2))
    with pytest.raises(OSError, match="not finite"):
        arrays.pixels(npy(np.full((4, 4), np.nan, np.float32)))


@pytest.mark.parametrize("in_shards", [False, True])
def test_arrays_train_at_full_depth(tmp_path, in_shards):
    """In a folder and in shards, which `pack` makes of it; what is damaged is left out by name."""
    values = [np.random.default_rng(i).random((40, 56, 6), np.float32) for i in range(6)]
    files = [("npy", npy(v.transpose(2, 0, 1) if i % 2 else v)) for i, v in enumerate(values)]
    files.append(("npy", npy(np.full((9, 9, 6), np.inf, np.float32))))
    root = write(tmp_path / "set", files)
    said = []
    if in_shards:
        pack(root, tmp_path / "shards", shard_size=4, workers=1, cache=tmp_path / "cache",
             log=lambda line: None)  # fmt: skip
        root = tmp_path / "shards"
    images = open_images(root, cache=tmp_path / "cache", log=said.append)
    assert images.has_arrays and len(images) == (6 if in_shards else 7)
    data = DataSection(
        image_size=(16, 24), channels=6, mean=(0.5,) * 6, std=(0.25,) * 6, threads=1, flip=True,
        crop_scale=(1.0, 1.0), crop_ratio=(0.9, 1.0), max_skipped=0.5,
    )  # fmt: skip
    loader = Loader(images, data, BatchSplit(6, 3), seed=0, device="cpu", dtype=torch.float32,
                    log=said.append)  # fmt: skip
    batches = iter(loader.iterate(0))
    for _ in range(2):
        batch = next(batches)
        assert batch.images_BCHW.shape == (3, 6, 16, 24)
        assert batch.images_BCHW.isfinite().all()
    loader.close()
    if not in_shards:
        images = open_images(write(tmp_path / "good", files[:6]), cache=tmp_path / "cache")
    whole = shown(images, 6, "auto", size=(40, 56))
    levels = sorted(float(v.mean()) for v in values)
    assert np.allclose(sorted(whole.mean((1, 2, 3)) / 255), levels, atol=1e-6)
    if not in_shards:
        assert any("cannot be decoded" in line and "6.npy" in line for line in said)


def test_the_first_file_that_disagrees_is_named(tmp_path):
    files = [*PICTURES[1][:2], ("jpg", made.encoded(SMOOTH)), *PICTURES[4][:1]]
    images = open_images(write(tmp_path / "set", files), cache=tmp_path / "cache")
    images.require_channels(3)  # of pictures of any kind RGB is made, as ever
    for channels, first in ((1, "c0/2.jpg has 3, and 1 more are not of 1"), (4, "c0/0.jpg has 1")):
        with pytest.raises(ValueError, match=rf"data.channels = {channels}: {first}"):
            images.require_channels(channels)
    data = DataSection(channels=1, mean=(0.5,), std=(0.5,), image_size=24)
    with pytest.raises(ValueError, match=r"data.channels = 1: c0/2.jpg has 3"):
        Loader(images, data, BatchSplit(2, 2), seed=0, device="cpu", dtype=torch.float32)
    bands = open_images(write(tmp_path / "bands", [("tif", tiff(BANDS))]), cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"data.channels = 3: c0/0.tif has 5; all images"):
        shown(bands, 3, "auto")


def test_npy_beside_pictures_is_no_image(tmp_path):
    """Features or masks lie there: the set is what it was before arrays were read."""
    root = write(tmp_path / "set", PICTURES[1])
    before = open_images(root, cache=tmp_path / "a")
    (root / "c0" / "0.npy").write_bytes(npy(np.zeros((8, 8))))
    (root / "labels.npy").write_bytes(npy(np.zeros(4)))
    after = open_images(root, cache=tmp_path / "b")
    assert after.fingerprint == before.fingerprint and len(after) == len(before)
    assert after.skipped == before.skipped == []


def test_a_tiff_of_bands_among_pictures_is_left_out_by_name(tmp_path, monkeypatch):
    """As before such files were read, so that older runs find their images again."""
    root = write(tmp_path / "set", [*PICTURES[1], ("tif", tiff(BANDS))])
    images = open_images(root, cache=tmp_path / "a")
    assert images.skipped == [("c0/4.tif", "an array of 5 channels among pictures")]
    assert len(images) == 4 and not images.has_arrays
    images.require_channels(1)
    monkeypatch.setattr(arrays, "is_array", lambda head: False)
    assert open_images(root, cache=tmp_path / "b").fingerprint == images.fingerprint


def test_what_dali_makes_of_a_channel_is_tried(monkeypatch):
    found = [dali.problem(torch.device("cpu"), channels) for channels in (1, 2, 3, 4)]
    assert found[0] is found[2] is found[3] is None
    assert found[1] and not found[1].endswith(":")  # it decodes none of gray with alpha
    full = formats.as_ppm(Image.new("RGBA", (16, 16), (40, 90, 140, 255)))
    monkeypatch.setattr(formats, "as_ppm", lambda image: full)  # as if the decoder made it so
    assert "(40, 90, 140, 190) in 4 channels it makes" in dali.problem(torch.device("cpu"), 4)
    device = torch.device("cpu")
    assert choose_decoder("auto", device, channels=9, arrays=True) == PILLOW
    with pytest.raises(ValueError, match="does not decode arrays"):
        choose_decoder(DALI, device, channels=9, arrays=True)


def test_colours_are_changed_of_rgb_alone():
    with pytest.raises(ValueError, match=r"data.colour: it changes the colours of RGB pictures"):
        settings(1, colour=True)
    with pytest.raises(ValueError, match=r"rand_augment: .* of 4 channels; set it to null"):
        settings(4, rand_augment=(2, 9, 0))
    with pytest.raises(ValueError, match="arrays of 3 channels"):
        settings(3, colour=True, arrays=True)


def test_an_array_is_shown_as_the_picture_of_its_pixels(tmp_path):
    """Window, resize and mirror are those of pictures; only the rounding is missing."""
    window_B4 = np.array([[7, 9, 41, 50], [0, 0, 60, 80]], np.int32)
    flip_B = np.array([1, 0], np.int32)
    shapes = []
    for data, options in ((made.encoded(SMOOTH, "PNG"), {}), (npy(SMOOTH), {"arrays": True})):
        decoder = open_decoder(PILLOW, settings(3, (20, 36), flip=True, **options), 2)
        decoder.submit(DecodeRequest([data] * 2, window_B4, flip_B))
        shapes.append(255 * decoder.collect())
    assert (shapes[0] - shapes[1]).abs().max() < 0.51 + 0.5
    assert (shapes[1] - shapes[1].round()).abs().max() > 0.2
    assert decoder.decode_alone(DecodeRequest([npy(BANDS)], window_B4[:1], flip_B), 0) is None


def test_headers_are_parsed_by_one_thread_at_a_time(monkeypatch, tmp_path):
    """Python 3.11's parser, which numpy calls, fails by chance where two threads are in it."""
    within, parse = [], np.lib.format.read_array_header_1_0

    def slowly(file, *args, **options):
        within.append(1)
        time.sleep(0.005)
        assert len(within) == 1
        within.pop()
        return parse(file, *args, **options)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", slowly)
    file, values = io.BytesIO(), np.asfortranarray(np.arange(24, dtype=">u2").reshape(4, 3, 2))
    np.save(file, values)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(arrays.pixels, [file.getvalue()] * 16))
        assert all(np.array_equal(pixels, arrays.levels(values)) for pixels in found)
        open_images(made.good_folder(tmp_path / "set", 2), cache=tmp_path / "cache")
        (kept,) = (tmp_path / "cache").rglob("*.npz")
        assert all(pool.map(index.load, [kept] * 8))
