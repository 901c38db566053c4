"""Features of a set: the mean of the encoder's tokens, of the right pixels, at the right index."""

import io
import os

import corrupt_images
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from cjepa_fast.data.sources import open_images
from cjepa_fast.eval import features
from cjepa_fast.model.vit import Encoder

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def images(tmp_path):
    tiny.write_images(tmp_path / "images", count=14)
    return open_images(tmp_path / "images", cache=tmp_path / "index")


@pytest.fixture
def encoder(seed):
    encoder = Encoder(image_size=24, patch_size=8, width=24, depth=2, heads=3).eval()
    encoder.mean, encoder.std = MEAN, STD
    return encoder


def by_hand(encoder, images, i: int) -> torch.Tensor:
    """Pillow instead of DALI: centre square, resized, normalised; tokens averaged."""
    picture = Image.open(io.BytesIO(images.read(i))).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    size = (encoder.image_size,) * 2
    picture = picture.resize(size, Image.BILINEAR, box=(left, top, left + side, top + side))
    x = torch.tensor(np.asarray(picture)).permute(2, 0, 1) / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        return encoder(x[None])[0].mean(0)


def test_features_are_the_mean_of_the_tokens_of_each_image(encoder, images):
    """Pillow and DALI decode and resize a little apart: far less than two images differ."""
    found, index = features.extract(encoder, images, batch_size=4)
    assert index.tolist() == list(range(14))
    assert found.shape == (14, 24) and found.dtype == torch.float32
    theirs = torch.stack([by_hand(encoder, images, i) for i in range(14)])
    assert torch.cdist(found, theirs).argmin(1).tolist() == list(range(14))
    assert (found - theirs).norm() < 0.1 * (theirs - theirs.mean(0)).norm()


def test_a_part_of_the_set_has_the_same_features(encoder, images):
    whole, _ = features.extract(encoder, images, batch_size=14)
    keep = torch.tensor([1, 5, 6, 13])
    some, index = features.extract(encoder, images, keep=keep, batch_size=3)
    assert torch.equal(index, keep)
    torch.testing.assert_close(some, whole[keep], rtol=1e-5, atol=1e-5)


def test_bf16_is_near_and_not_the_same(encoder, images):
    exact, _ = features.extract(encoder, images)
    rough, _ = features.extract(encoder, images, bf16=True)
    assert 0 < (rough - exact).norm() / exact.norm() < 0.05


def test_the_last_layers_stand_side_by_side(encoder, images):
    last, _ = features.extract(encoder, images)
    both, _ = features.extract(encoder, images, layers=encoder.last(2))
    assert both.shape == (14, 48)
    torch.testing.assert_close(both[:, 24:], last)
    encoder.blocks = encoder.blocks[:1]  # the first block's output, through the same norm
    encoder.depth = 1
    first, _ = features.extract(encoder, images)
    torch.testing.assert_close(both[:, :24], first)
    with pytest.raises(ValueError, match="last 4 layers of an encoder of 1"):
        encoder.last(4)
    with pytest.raises(ValueError, match=r"blocks \[1, 4\] of an encoder that has 1 to 1"):
        features.extract(encoder, images, layers=[1, 4])


def test_one_vector_a_patch(encoder, images):
    pooled, _ = features.extract(encoder, images)
    patches, _ = features.extract(encoder, images, pooled=False, batch_size=5)
    assert patches.shape == (14, 9, 24)
    torch.testing.assert_close(patches.mean(1), pooled)


def test_features_are_kept_by_what_decides_them(encoder, images, tmp_path, monkeypatch):
    cache = tmp_path / "features"
    made, _ = features.extract(encoder, images, cache=cache)
    monkeypatch.setattr(features, "image_vectors", None)  # from here on nothing can be made
    kept, index = features.extract(encoder, images, cache=cache)
    assert torch.equal(kept, made) and index.tolist() == list(range(14))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(TypeError):
        features.extract(encoder, images, cache=cache)
    file.write_bytes(whole)
    changes = ({"crop": 0.9}, {"bf16": True}, {"layers": [1, 2]}, {"keep": torch.arange(13)})
    for change in changes:
        with pytest.raises(TypeError):
            features.extract(encoder, images, cache=cache, **change)
    encoder.norm.bias.data[0] += 1
    with pytest.raises(TypeError):
        features.extract(encoder, images, cache=cache)
    encoder.norm.bias.data[0] -= 1
    (tmp_path / "images" / images.name(3)).write_bytes(b"another")
    again = open_images(tmp_path / "images", cache=tmp_path / "index", log=lambda text: None)
    with pytest.raises(TypeError):
        features.extract(encoder, again, cache=cache)


def test_a_file_written_anew_in_its_size_is_read_anew(encoder, images, tmp_path, monkeypatch):
    """Features of earlier versions, which did not look at the times, serve if they are younger than
    the images."""
    cache, root = tmp_path / "features", tmp_path / "images"
    made, _ = features.extract(encoder, images, cache=cache)
    (file,) = cache.iterdir()
    monkeypatch.setattr(features, "image_vectors", None)  # from here on nothing can be made
    earlier, whole = [], features._file
    with monkeypatch.context() as patch:
        patch.setattr(features, "_file", lambda *key: earlier.append(whole(*key)) or earlier[-1])
        features.extract(encoder, images, cache=cache)
    assert earlier[0] == file != earlier[1]
    newest_ns = int(images.times_ns.max())
    file.rename(earlier[1])
    os.utime(earlier[1], ns=(newest_ns + 1, newest_ns + 1))
    assert torch.equal(features.extract(encoder, images, cache=cache)[0], made)
    os.utime(root / images.name(3), ns=(newest_ns + 2, newest_ns + 2))
    again = open_images(root, cache=tmp_path / "index", log=lambda text: None)
    assert again.fingerprint == images.fingerprint  # a training resumes
    with pytest.raises(TypeError):
        features.extract(encoder, again, cache=cache)
    earlier[1].rename(file)
    with pytest.raises(TypeError):
        features.extract(encoder, again, cache=cache)


def test_a_shard_written_anew_in_its_size_is_known_by_its_time(tmp_path):
    files = {f"{i}.jpg": corrupt_images.encoded(corrupt_images.picture(i)) for i in range(3)}
    corrupt_images.write_shard(tmp_path / "x.tar", files)
    found = []
    for time_ns in (10**18, 10**18, 10**18 + 1):
        os.utime(tmp_path / "x.tar", ns=(time_ns, time_ns))
        images = open_images(tmp_path / "x.tar", cache=tmp_path / "index", log=lambda text: None)
        found.append(features.digest_of_times(images))
    assert found[0] == found[1] != found[2]


def test_what_could_not_be_read_this_time_is_read_the_next(encoder, images, tmp_path, monkeypatch):
    cache, read = tmp_path / "features", features.Subset.read

    def failing(subset, i, channels=3):
        if subset.name(i) == images.name(4):
            raise OSError("the network is away")
        return read(subset, i, channels)

    monkeypatch.setattr(features.Subset, "read", failing)
    made, index = features.extract(encoder, images, cache=cache)
    assert len(made) == 13 and 4 not in index
    monkeypatch.setattr(features.Subset, "read", read)
    assert len(features.extract(encoder, images, cache=cache)[0]) == 14
    with monkeypatch.context() as patch:
        patch.setattr(features.Subset, "read", lambda *_: failing(images, 4))
        with pytest.raises(ValueError, match="none of the 14 images could be read"):
            features.extract(encoder, images)


def test_features_that_are_not_finite_are_refused(encoder, images):
    encoder.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="features are not finite"):
        features.extract(encoder, images)


SHARES = """
import sys, torch
from pathlib import Path
from cjepa_fast.runtime import distributed
from cjepa_fast.data.sources import open_images
from cjepa_fast.eval import features
from cjepa_fast.model.vit import Encoder

distributed.start(0)
encoder = Encoder(image_size=24, patch_size=8, width=24, depth=2, heads=3).eval()
encoder.mean, encoder.std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
seen, plain = [], features.Subset.read
features.Subset.read = lambda self, i, channels: seen.append(i) or plain(self, i, channels)
keep = torch.tensor([0, 2, 3, 5, 7, 11, 13])
images, cache = open_images(sys.argv[1]), Path(sys.argv[2]) / "features"
distributed.PIECE_ROWS = 2
made, index = features.extract(encoder, images, keep=keep)
count = len(seen)
kept, _ = features.extract(encoder, images, keep=keep, cache=cache)
single, _ = features.extract(encoder, images, keep=keep[:1])

def away(self, i, channels):  # of two ranks, all of the first one's images and one of the second's
    if self.keep_n[i] in (0, 3, 7, 11, 13):
        raise OSError("the network is away")
    return plain(self, i, channels)

features.Subset.read = away
some = features.extract(encoder, images, keep=keep, cache=cache / "none")
features.Subset.read = plain
torch.save((made, kept, single, some, index, count), f"{sys.argv[2]}/{distributed.rank()}.pt")
encoder.norm.weight.data[0] = float("nan")
try:
    features.extract(encoder, images, keep=keep, cache=cache)
except ValueError as error:
    print(error)
distributed.leave(0)
"""


@pytest.mark.multiprocess
def test_two_ranks_take_half_the_images_each(images, tmp_path):
    script = tmp_path / "shares.py"
    script.write_text(SHARES)
    alone, both = tmp_path / "alone", tmp_path / "both"
    for folder, ranks in ((alone, 1), (both, 2)):
        folder.mkdir()
        done = tiny.run(script, tmp_path / "images", folder, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("features are not finite") == ranks
        assert len(list((folder / "features").iterdir())) == 1
    (whole, *_, index, _), *halves = map(torch.load, (alone / "0.pt", both / "0.pt", both / "1.pt"))
    assert [half[-1] for half in halves] == [4, 3]
    for made, kept, single, (some, some_at), at, _ in halves:
        assert some_at.tolist() == [2, 5]
        torch.testing.assert_close(some, whole[[1, 3]])
        assert torch.equal(at, index)
        torch.testing.assert_close(made, whole)
        torch.testing.assert_close(kept, whole)
        torch.testing.assert_close(single, whole[:1])


def test_an_image_that_cannot_be_read_keeps_the_others_in_place(encoder, images, tmp_path):
    whole, _ = features.extract(encoder, images)
    name = images.name(3)
    path = tmp_path / "images" / name
    path.write_bytes(path.read_bytes()[:40].ljust(path.stat().st_size, b"\0"))
    found, index = features.extract(encoder, images, batch_size=4)
    assert index.tolist() == [i for i in range(14) if i != 3]
    torch.testing.assert_close(found, whole[index], rtol=1e-4, atol=1e-4)


class Named:
    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]


def test_the_split_is_by_name_and_about_a_fifth(seed):
    names = [f"class/{n}.jpg" for n in torch.randperm(10_000).tolist()]
    train, test = features.split_by_name(Named(names))
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(10_000))
    assert 1_850 < len(test) < 2_150  # binomial: 2,000 with a standard deviation of 40
    side = {names[i] for i in test}
    fewer = sorted(names)[::2]
    _, again = features.split_by_name(Named(fewer))
    assert {fewer[i] for i in again} == side & set(fewer)
