"""Features from Python: each kind of image is seen as evaluation sees it, or refused in words."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import cjepa_fast as cj
from cjepa_fast.checkpoint.encoders import load_encoders, save_encoder
from cjepa_fast.checkpoint.pretrained import PretrainedEncoder
from cjepa_fast.data.decoder_choice import PILLOW
from cjepa_fast.data.evaluation import eval_batches
from cjepa_fast.data.sources import open_images
from cjepa_fast.model.vit import Encoder


def fresh() -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(24, 4, 48, 4, 2).eval()
    encoder.mean, encoder.std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    return encoder


@pytest.fixture
def encoder() -> PretrainedEncoder:
    return PretrainedEncoder(fresh(), 0.8)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def of(channels: int, **sizes) -> PretrainedEncoder:
    torch.manual_seed(0)
    encoder = Encoder(**{"image_size": (16, 32), **sizes}, patch_size=4, width=24, depth=1, heads=2,
                      channels=channels)  # fmt: skip
    encoder.mean, encoder.std = (0.5,) * channels, (0.25,) * channels
    return PretrainedEncoder(encoder, 0.8)


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_an_oblong_of_any_channels_is_seen_as_evaluation_sees_it(tmp_path, channels):
    """A file by its path, its pixels as an array and as a tensor."""
    values = np.random.default_rng(0).integers(0, 256, (40, 90, channels), dtype=np.uint8)
    files = {"npy": tmp_path / "npy" / "a.npy", "png": tmp_path / "png" / "a.png"}
    for file in files.values():
        file.parent.mkdir()
    np.save(files["npy"], values.transpose(2, 0, 1))
    if channels == 5:
        del files["png"]
    else:
        mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        Image.fromarray(values[..., 0] if channels == 1 else values, mode).save(files["png"])
    encoder = of(channels)
    for kind, file in files.items():
        (batch,) = eval_batches(
            open_images(file.parent), image_size=(16, 32), mean=encoder.mean, std=encoder.std,
            batch_size=1, device="cpu", dtype=torch.float32, threads=1, resize=0.8, decoder=PILLOW,
        )  # fmt: skip
        within = 1.01 / 255 / 0.25  # a level: evaluation rounds pictures, and no arrays
        exact = kind == "npy" or channels == 3
        assert (encoder.transform(file) - batch[0][0]).abs().max() <= (1e-5 if exact else within)
        others = [values, torch.from_numpy(values).permute(2, 0, 1)]
        others += [Image.open(file)] if kind == "png" else []
        for image in others:
            assert (encoder.transform(image) - batch[0][0]).abs().max() <= within
        assert encoder.embed([file]).shape == (1, 24)
        assert encoder.attention(file).shape == (1, 2, 4, 8)


def test_other_channels_than_the_encoder_s_are_refused(tmp_path):
    encoder, rgb = of(5), np.zeros((40, 40, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    for image in (rgb, torch.zeros(3, 40, 40), Image.fromarray(rgb), tmp_path / "a.png"):
        with pytest.raises(ValueError, match=r"shape \(40, 40, 3\), for an encoder of 5 channels"):
            encoder.embed([image])
    with pytest.raises(ValueError, match="int64: must be uint8"):
        encoder.embed([np.zeros((40, 40, 5), np.int64)])
    (tmp_path / "b.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.npy: "):
        encoder.embed(tmp_path / "b.npy")


def test_it_is_the_encoder(encoder):
    plain, images = fresh(), torch.randn(2, 3, 24, 24)
    assert torch.equal(encoder(images), plain(images)) and not encoder.training
    assert encoder.architecture == plain.architecture and encoder.mean == plain.mean
    assert encoder.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("pool", ["mean", "none", "last4"])
def test_features_are_those_of_evaluation(tmp_path, encoder, pool):
    """By Pillow, to the bit of the pixels: files are decoded, cropped and resized alike."""
    tiny.write_images(tmp_path / "images", 5)
    images = open_images(str(tmp_path / "images"))
    (batch,) = eval_batches(
        images, image_size=24, mean=encoder.mean, std=encoder.std, batch_size=5, device="cpu",
        dtype=torch.float32, threads=1, resize=0.8, decoder=PILLOW,
    )  # fmt: skip
    with torch.no_grad():
        tokens = encoder.layers(batch[0], [1, 2, 3, 4])
    wanted = {
        "mean": tokens[3].mean(1), "none": tokens[3], "last4": torch.cat(tokens, 2).mean(1)
    }[pool]  # fmt: skip
    files = [images.root / images.name(i) for i in range(len(images))]
    found = encoder.embed(files, pool=pool, batch_size=2)
    shape = {"mean": (5, 48), "none": (5, 36, 48), "last4": (5, 192)}[pool]
    assert found.shape == shape and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert torch.equal(torch.stack([encoder.transform(file) for file in files]), batch[0])


def test_every_kind_of_one_image_is_the_same_image(tmp_path, encoder, pixels):
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    wanted = encoder.transform(path)
    assert wanted.shape == (3, 24, 24) and wanted.dtype == torch.float32
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for image in (
        str(path), Image.open(path), pixels, pixels / 255, (pixels / 255).astype(np.float32),
        tensor, tensor / 255, pixels.astype(np.uint16) * 257,
    ):  # fmt: skip
        assert torch.equal(encoder.transform(image), wanted)
    one = encoder.embed(path)
    for several in ([path], pixels[None], tensor[None], iter([pixels]), tensor, pixels):
        assert torch.equal(encoder.embed(several), one)


def test_what_a_photograph_has_is_seen_too(encoder, pixels):
    """Turned by its EXIF, gray, of 16 bits, with alpha."""
    turned = Image.Exif()
    turned[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=turned)
    upright = encoder.transform(np.rot90(pixels, -1))
    assert torch.equal(encoder.transform(Image.open(file)), upright)
    gray = pixels[..., 0]
    wanted = encoder.transform(gray[..., None].repeat(3, 2))
    deep = gray.astype(np.uint16) * 257
    for image in (gray, gray[..., None], torch.from_numpy(gray)[None], Image.fromarray(deep)):
        assert torch.equal(encoder.transform(image), wanted)
    alpha = Image.fromarray(np.dstack([pixels, gray]))
    assert torch.equal(encoder.transform(alpha), encoder.transform(pixels))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("/nowhere/a.jpg", "/nowhere/a.jpg does not exist"),
        (tiny.ROOT, "is a folder"),
        (tiny.ROOT / "setup.py", r"setup\.py: cannot be decoded"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\).*channels last"),
        (torch.zeros(8, 8, 3), r"\(8, 8, 3\).*channels first"),
        (np.zeros((8, 8, 3)) - 1.5, "from -1.5 to -1.5.*as it is"),
        (torch.full((3, 8, 8), torch.nan), "from nan"),
        (np.zeros((8, 8), np.int64), "int64"),
        (7, "not <class 'int'>"),
    ],
)
def test_what_is_no_image_is_refused_in_words(encoder, image, said):
    with pytest.raises(ValueError, match=said):
        encoder.embed([image])


def test_no_images_and_unknown_pools_are_refused(encoder, pixels):
    with pytest.raises(ValueError, match="list is empty"):
        encoder.embed([])
    with pytest.raises(ValueError, match="pool='max'"):
        encoder.embed(pixels, pool="max")


def test_attention_is_a_map_a_head(encoder, pixels):
    maps = encoder.attention([pixels, pixels[::-1]])
    assert maps.shape == (2, 2, 6, 6)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 2))
    assert not torch.equal(maps[0], maps[1])


def test_features_can_be_trained_on(encoder, pixels):
    probe = torch.nn.Linear(48, 2)
    probe(encoder.embed(pixels)).sum().backward()
    assert probe.weight.grad is not None


def test_a_run_says_how_its_images_are_cropped(tmp_path, monkeypatch):
    run = tiny.write_run(tmp_path / "runs", fresh(), eval={"crop": 0.6})
    assert cj.load_encoder(run).crop == 0.6
    assert cj.load_encoder(run / "encoder.safetensors").crop == 0.6
    save_encoder(fresh(), tmp_path / "alone.safetensors")
    assert cj.load_encoder(tmp_path / "alone.safetensors").crop == cj.Config().eval.crop
    encoder = fresh()
    encoder.crop = 0.6  # as that of a run leaves it
    save_encoder(encoder, tmp_path / "copied.safetensors")
    assert cj.load_encoder(tmp_path / "copied.safetensors").crop == 0.6
    described = json.loads((tmp_path / "copied.json").read_text())
    (tmp_path / "copied.json").write_text(json.dumps(described | {"crop": 7}))
    with pytest.raises(ValueError, match=r"copied\.json: its crop 7 must be"):
        cj.load_encoder(tmp_path / "copied.safetensors")
    monkeypatch.chdir(tmp_path)
    assert cj.load_encoder("run").crop == 0.6  # by its name in runs/
    (tmp_path / "runs" / "export").mkdir()
    save_encoder(fresh(), tmp_path / "runs" / "export" / "encoder.safetensors")
    assert load_encoders("export").keys() == {"target"}
    with pytest.raises(FileNotFoundError, match="yours"):
        cj.load_encoder("yours")


def test_a_hub_is_asked_only_by_its_prefix(tmp_path, monkeypatch):
    from cjepa_fast.interop import huggingface

    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        if name == "a/missing":
            raise OSError("404")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    huggingface.write_encoder(fresh(), tmp_path, 0.875)
    loaded = cj.load_encoder("hf:a/model")
    assert asked == ["a/model"] and torch.equal(loaded.norm.weight, fresh().norm.weight)
    assert load_encoders("hf:a/model").keys() == {"target"}
    with pytest.raises(ValueError, match="hf:a/missing cannot be fetched: 404"):
        cj.load_encoder("hf:a/missing")
    huggingface.from_hub.cache_clear()  # one download serves a whole command
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install"):
        cj.load_encoder("hf:a/model")
    with pytest.raises(FileNotFoundError):
        cj.load_encoder("a/model")
    assert asked == ["a/model", "a/missing"]
