"""What each decoder puts out, against plain Pillow; who is chosen; images that only Pillow reads.

test_data_pillow_decoder.py sets the two decoders side by side.
"""

import io

import corrupt_images as made
import numpy as np
import pytest
import torch
from PIL import Image

from cjepa_fast.config import DataSection
from cjepa_fast.data import dali, decoder_choice, formats
from cjepa_fast.data.decoder import DecodeRequest, DecodeSettings
from cjepa_fast.data.decoder_choice import DALI, PILLOW, choose_decoder, open_decoder
from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.loader import BatchSplit, Loader
from cjepa_fast.data.sources import ImageSet, open_images
from cjepa_fast.data.whole_images import WholeImages

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECODERS = [DALI, PILLOW]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# nvJPEG repeats chroma where libjpeg interpolates it: smooth pictures differ by a level or two.
LEVELS = {"cpu": 1.0, "cuda": 3.0}  # in the mean


def settings(device="cpu", dtype=torch.float32, image_size=48, **options):
    return DecodeSettings(image_size, MEAN, STD, torch.device(device), dtype, 1, **options)


@pytest.fixture(params=DECODERS)
def kind_of_decoder(request):
    return request.param


def in_levels(images_BCHW):
    """Undo the normalisation: (B, H, W, 3) in 0..255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (255 * (images_BCHW.float().cpu() * std + mean)).permute(0, 2, 3, 1).numpy()


def by_pillow(upright: Image.Image, window, size=(48, 48)) -> np.ndarray:
    top, left, height, width = (int(v) for v in window)
    crop = upright.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize(size[::-1], Image.Resampling.BILINEAR)).astype(float)


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
KINDS |= {
    f"{kind} exif {first} and {second}": made.two_exif(kind, first, second)
    for kind in ("JPEG", "PNG")
    for first, second in ((3, 1), (1, 6), (6, 3))
}


@pytest.mark.parametrize("device", DEVICES)
def test_every_kind_is_upright_rgb_as_by_pillow(tmp_path, device, kind_of_decoder):
    """All kinds in one batch, each through ImageSet.read, so the converting path counts too."""
    for number, data in enumerate(KINDS.values()):
        made.write(tmp_path / "set" / f"{number:02d}.jpg", data)
    images = open_images(tmp_path / "set", cache=tmp_path / "cache")
    assert len(images) == len(KINDS) and not images.skipped
    wide = np.array([17, 23, 51, 84]), np.array([23, 17, 84, 51])
    window_B4 = np.array([wide[0] if h < w else wide[1] for h, w in images.sizes_N2], np.int32)
    decoder = open_decoder(kind_of_decoder, settings(device), len(KINDS))
    decoder.submit(DecodeRequest([images.read(i) for i in range(len(images))], window_B4))
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
def test_flip_colour_and_dtype(device, dtype, kind_of_decoder):
    data = made.encoded(SMOOTH, subsampling=0)
    window_B4 = np.array([[0, 0, 90, 130]] * 3, np.int32)
    factors_B3 = np.array([[1, 1, 1], [0.5, 1, 1], [1, 1, 0]], np.float32)
    decoder = open_decoder(kind_of_decoder, settings(device, dtype, flip=True, colour=True), 3)
    decoder.submit(DecodeRequest([data] * 3, window_B4, np.array([0, 1, 0], np.int32), factors_B3))
    images = decoder.collect()
    assert images.dtype == dtype and images.shape == (3, 3, 48, 48) and images.device.type == device
    plain, dark, grey = in_levels(images)
    tolerance = 1.5 if dtype == torch.float32 else 3
    assert np.abs(plain - by_pillow(IMAGE, window_B4[0])).mean() < tolerance
    assert np.abs(dark[:, ::-1] - plain / 2).mean() < tolerance
    assert grey.std(axis=-1).mean() < 1.5 < plain.std(axis=-1).mean()


@pytest.mark.parametrize("size", [(24, 64), (64, 24)])
def test_an_oblong_is_height_by_width(size, kind_of_decoder):
    """Both shrunk and enlarged, for the filter reaches further along one side."""
    data = made.encoded(SMOOTH, subsampling=0)
    window_B4 = np.array([[0, 0, 90, 130], [5, 9, 70, 20]], np.int32)
    augmented = {"rand_augment": (0, 9, 0)}  # no change, but DALI is told of the size
    for options in ({}, augmented):
        how = settings(image_size=size, flip=True, **options)
        decoder = open_decoder(kind_of_decoder, how, 2)
        nothing = np.zeros((2, 0)) if options else None
        flip_B = np.array([0, 1], np.int32)
        decoder.submit(DecodeRequest([data] * 2, window_B4, flip_B, augment_BC=nothing))
        images_BCHW = decoder.collect()
        assert images_BCHW.shape == (2, 3, *size)
        plain, mirrored = in_levels(images_BCHW)
        assert np.abs(plain - by_pillow(IMAGE, window_B4[0], size)).mean() < 1.5
        assert np.abs(mirrored[:, ::-1] - by_pillow(IMAGE, window_B4[1], size)).mean() < 1.5


def test_batches_come_in_order_and_a_partial_one_too(kind_of_decoder):
    decoder = open_decoder(kind_of_decoder, settings(), 4)
    window = np.array([[0, 0, 60, 80]], np.int32)
    requests = [DecodeRequest([made.encoded(made.picture(k))] * n, window.repeat(n, 0)) for k, n in
             enumerate([4, 4, 1, 3])]  # fmt: skip
    decoder.submit(requests[0])
    got = []
    for request in requests[1:]:
        decoder.submit(request)
        got.append(decoder.collect())
    got.append(decoder.collect())
    assert [len(g) for g in got] == [4, 4, 1, 3]
    for k, images in enumerate(got):
        want = by_pillow(Image.fromarray(made.picture(k)), window[0])
        assert all(np.abs(image - want).mean() < 1.5 for image in in_levels(images))


@pytest.mark.parametrize("batch_size", [3, 4, 100])
def test_evaluation_is_in_order_centred_and_drops_the_bad(tmp_path, batch_size, kind_of_decoder):
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
        "decoder": kind_of_decoder,
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


def test_evaluation_of_bad_images_alone_is_empty(tmp_path, kind_of_decoder):
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
        "decoder": kind_of_decoder,
    }
    assert list(eval_batches(images, batch_size=2, log=lambda line: None, **options)) == []
    with pytest.raises(ValueError, match="share of the largest centred window"):
        next(eval_batches(images, batch_size=2, resize=1.2, **options))


@pytest.mark.parametrize("cut_short", [False, True])
def test_a_batch_that_goes_as_a_whole_shifts_none_of_those_after_it(
    tmp_path, kind_of_decoder, cut_short
):
    """The first of two batches is dropped while both are inside the decoder, and more follow."""
    levels = [20, 60, 100, 140, 180, 220]
    bad = made.encoded(made.picture(1, 200, 200)), made.damaged_tables(1)
    for i, level in enumerate(levels):
        picture = made.encoded(np.full((60, 80, 3), level, np.uint8), "PNG")
        made.write(tmp_path / "set" / f"{2 * i}.png", picture)
    made.write(tmp_path / "set" / "1.jpg", bad[0][:-4000] + b"\xff\xd9" if cut_short else bad[1])
    images = open_images(tmp_path / "set", cache=tmp_path / "cache")
    options = EVALUATION | {"batch_size": 1, "decoder": kind_of_decoder}
    shown = {
        images.name(int(index_B)): in_levels(image_1CHW).mean()
        for image_1CHW, index_B in eval_batches(images, log=lambda line: None, **options)
    }
    want = {f"{2 * i}.png": level for i, level in enumerate(levels)}
    assert shown.keys() == want.keys()
    assert all(abs(shown[name] - level) < 2 for name, level in want.items()), shown


# ------------------------------------------------------------------------------------- the choice


@pytest.fixture
def broken_dali(monkeypatch):
    """As on a machine for which there is no DALI."""
    missing = "No module named 'nvidia.dali'"
    monkeypatch.setattr(decoder_choice, "_problem_of_dali", lambda *_: missing)
    monkeypatch.setattr(decoder_choice, "_said", set())


CPU = torch.device("cpu")


def test_dali_is_chosen_where_it_works_and_what_is_demanded_elsewhere(monkeypatch):
    monkeypatch.delenv(decoder_choice.VARIABLE, raising=False)
    said = []
    assert choose_decoder("auto", CPU, said.append) == choose_decoder(DALI, CPU) == DALI
    assert choose_decoder(PILLOW, CPU, said.append) == PILLOW
    monkeypatch.setenv(decoder_choice.VARIABLE, PILLOW)
    assert choose_decoder("auto", CPU, said.append) == PILLOW
    assert choose_decoder(DALI, CPU, said.append) == DALI  # the configuration's word is the last
    assert said == []


def test_pillow_is_chosen_where_dali_does_not_work_and_that_is_said_once(broken_dali):
    said = []
    assert [choose_decoder("auto", CPU, said.append) for _ in range(3)] == [PILLOW] * 3
    assert said == [
        "Pillow decodes the images, since DALI does not work here: No module named 'nvidia.dali'"
    ]


def test_what_cannot_be_had_is_told(broken_dali, monkeypatch):
    with pytest.raises(ValueError, match=r"decoder = 'dali': DALI does not work here \(No module"):
        choose_decoder(DALI, CPU)
    monkeypatch.setenv(decoder_choice.VARIABLE, "opencv")
    with pytest.raises(ValueError, match=r"CJEPA_DECODER = 'opencv': must be auto, dali, pillow"):
        choose_decoder("auto", CPU)


@pytest.mark.parametrize(
    "wrong, says", [((2, 31), "from 0 to 30"), ((-1, 3), "number of changes"), ((1, 2.5), "whole")]
)
def test_a_rand_augment_that_there_is_none_of_is_told(wrong, says):
    with pytest.raises(ValueError, match=rf"rand_augment = \[{wrong[0]}, {wrong[1]}\].*{says}"):
        settings(rand_augment=(*wrong, 0))


def test_a_dali_that_is_installed_and_does_not_run_is_a_problem(monkeypatch):
    def fails(message):
        def build(*args):
            raise RuntimeError(message)

        monkeypatch.setattr(dali, "build", build)

    assert dali.problem(CPU) is None
    fails("CUDA driver version is insufficient\nStacktrace")
    assert dali.problem(CPU) == "CUDA driver version is insufficient"
    fails("CUDA out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):  # that says nothing about DALI
        dali.problem(CPU)


# ------------------------------------------------------------------- images that DALI cannot read


@pytest.fixture
def unread(tmp_path, monkeypatch):
    """16 JPEGs and 2 GIFs under such a name, all as they lie on the disk."""
    root = made.good_folder(tmp_path / "set", 16, classes=1)
    for i in (3, 9):
        made.write(root / "c0" / f"gif{i}.jpg", made.encoded(IMAGE.quantize(64), "GIF"))
    monkeypatch.setattr(ImageSet, "read", lambda self, i, _: self.read_original(i))
    return open_images(root, cache=tmp_path / "cache")


EVALUATION = {
    "image_size": 48, "mean": MEAN, "std": STD, "batch_size": 4, "device": "cpu",
    "dtype": torch.float32, "threads": 1,
}  # fmt: skip


def test_what_dali_cannot_read_pillow_reads(unread):
    """The images that are used do not depend on the decoder; neither do their pixels."""
    said = []
    seen = {
        kind: list(eval_batches(unread, decoder=kind, log=said.append, **EVALUATION))
        for kind in DECODERS
    }
    names = [unread.name(int(i)) for _, index_B in seen[DALI] for i in index_B]
    assert names == [unread.name(i) for i in range(18)]
    assert said == [
        f"image decoded by Pillow, since DALI cannot: c0/gif{i}.jpg" for i in (3, 9)
    ]  # said of DALI alone
    by_dali, by_pillow = (in_levels(torch.cat([x for x, _ in seen[k]])) for k in DECODERS)
    assert np.abs(by_dali - by_pillow)[:, 1:-1, 1:-1].max() < 1.01


def test_what_pillow_alone_reads_costs_one_rebuild_each_not_one_an_epoch(unread, monkeypatch):
    """Nor is DALI asked about it again, once that is known."""
    calls = {"restart": [], "decode_alone": []}
    for name, noted in calls.items():
        whole = getattr(dali.DaliDecoder, name)
        monkeypatch.setattr(
            dali.DaliDecoder, name, lambda *a, w=whole, noted=noted: (noted.append(1), w(*a))[1]
        )
    said = []
    data = DataSection(image_size=48, mean=MEAN, std=STD, threads=1, prefetch=1)
    options = {"seed": 0, "device": "cpu", "dtype": torch.float32}
    source = Loader(unread, data, BatchSplit(6, 6), log=said.append, **options)
    batches = source.iterate(0)
    epochs = [sorted(i for _ in range(3) for i in next(batches).index_B.tolist())]
    batches.close()
    asked = len(calls["decode_alone"])
    batches = source.iterate(3)
    for _ in range(4):
        epochs.append(sorted(i for _ in range(3) for i in next(batches).index_B.tolist()))
    source.close()
    assert epochs == [[*range(18)]] * 5
    assert len(said) == 2 and not source.skipped.reasons
    assert len(calls["restart"]) <= 2 + 2  # two iterations' first builds, and one each
    assert 0 < asked == len(calls["decode_alone"])


@pytest.mark.parametrize("turns", [(3, 1), (1, 6), (6, 3)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_whole_images_with_two_exif_blocks_are_pillows(kind, turns):
    """DALI itself turns them otherwise, or ends the process."""
    data = made.two_exif(kind, *turns)
    (image_3HW,) = WholeImages(1, 1)([data], ["a"])
    assert np.array_equal(image_3HW.permute(1, 2, 0).numpy(), formats.decode_rgb(data))
    counts = turns[0] if kind == "JPEG" else turns[1]
    turned = {1: SMOOTH, 3: SMOOTH[::-1, ::-1], 6: np.rot90(SMOOTH, -1)}[counts].astype(int)
    assert np.abs(turned - formats.decode_rgb(data)).mean() < 2


def test_whole_images_that_dali_cannot_read(tmp_path):
    gif, jpeg = made.encoded(IMAGE.quantize(64), "GIF"), made.encoded(SMOOTH)
    images = WholeImages(3, 1)([jpeg, gif, jpeg], ["a", "b", "c"])
    assert torch.equal(images[0], images[2])
    for image, data in zip(images, (jpeg, gif), strict=False):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), formats.decode_rgb(data))
    with pytest.raises(ValueError, match="b cannot be decoded: replace or remove it"):
        WholeImages(3, 1)([jpeg, b"GIF89a nothing", jpeg], ["a", "b", "c"])
