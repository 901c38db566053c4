"""The order, its independence of the world size, exact resume, bad files, and the thread."""

import subprocess
import sys
import textwrap
import threading
from collections import Counter

import corrupt_images as made
import pytest
import tiny
import torch

from cjepa_fast.config import DataSection
from cjepa_fast.data import loader as loader_module
from cjepa_fast.data.decode_pipeline import ImagesGone, Skipped
from cjepa_fast.data.loader import BatchSplit, Loader, _Iteration
from cjepa_fast.data.masks import MaskSampler
from cjepa_fast.data.sources import open_images

DECODERS = ["dali", "pillow"]
OPTIONS = {
    "max_skipped": 1.0,
    "image_size": 16,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "seed": 5,
    "device": "cpu",
    "dtype": torch.float32,
    "threads": 1,
    "prefetch": 2,
}


def loader(images, global_batch=12, micro_batch=2, said=None, **options):
    said = [] if said is None else said
    options = OPTIONS | options
    own = ("seed", "device", "dtype", "rand_augment", "masks")
    share = BatchSplit(
        global_batch, micro_batch, options.pop("rank", 0), options.pop("world_size", 1)
    )
    others = {name: options.pop(name) for name in own if name in options}
    return Loader(images, DataSection(**options), share, log=said.append, **others)


def take(source: Loader, steps: int, start: int = 0) -> list:
    """The batches of `steps` optimiser steps."""
    iterator = source.iterate(start)
    batches = [next(iterator) for _ in range(steps * source.accumulation)]
    iterator.close()
    return batches


def indices(batches) -> list[int]:
    return torch.cat([b.index_B for b in batches]).tolist()


@pytest.fixture(params=["folder", "shards"])
def images(request, tmp_path):
    make = made.good_folder if request.param == "folder" else made.good_shards
    return open_images(make(tmp_path / "set", 41), cache=tmp_path / "cache")


def test_world_sizes_share_one_global_order(images):
    """Each step's images are the same for 1, 2 and 3 ranks, to the bit; a micro-batch of all ranks
    is a range of indices."""
    whole = take(loader(images, micro_batch=12), 4)
    for world_size in (2, 3):
        ranks = [
            take(loader(images, rank=rank, world_size=world_size), 4) for rank in range(world_size)
        ]
        accumulation = 6 // world_size
        for k, want in enumerate(whole):
            parts = [r[k * accumulation : (k + 1) * accumulation] for r in ranks]
            joined = [batch for micro in zip(*parts, strict=True) for batch in micro]
            assert indices(joined) == want.index_B.tolist()
            assert torch.equal(torch.cat([b.images_BCHW for b in joined]), want.images_BCHW)
            assert (
                {(b.epoch, b.step) for b in joined} == {(want.epoch, want.step)} == {divmod(k, 3)}
            )


def test_an_epoch_has_each_image_once_less_the_tail(images):
    source = loader(images)
    assert source.steps_per_epoch == 3 and source.accumulation == 6
    batches = take(source, 9)
    epochs = [indices(b for b in batches if b.epoch == e) for e in range(3)]
    for epoch, got in enumerate(epochs):
        assert len(got) == 36 == len(set(got))
        assert got == source.order(epoch)[:36].tolist()
        assert sorted(got + source.order(epoch)[36:].tolist()) == list(range(41))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [b.micro for b in batches[:7]] == [0, 1, 2, 3, 4, 5, 0]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("decoder", DECODERS)
def test_resume_at_any_step_is_exact(images, start, decoder):
    options = {"flip": True, "colour": 0.4, "decoder": decoder}
    whole = take(loader(images, **options), 7)
    resumed = take(loader(images, **options), 7 - start, start)
    for got, want in zip(resumed, whole[start * 6 :], strict=True):
        assert torch.equal(got.images_BCHW, want.images_BCHW)
        assert torch.equal(got.index_B, want.index_B)
        assert (got.epoch, got.step, got.micro) == (want.epoch, want.step, want.micro)


@pytest.mark.parametrize("options", [{}, {"crop_scale": (1, 1), "flip": True, "colour": 0.4}])
def test_each_index_and_epoch_has_its_own_look(tmp_path, options):
    """Of one picture many times over, every index of every epoch shows something else."""
    for i in range(12):
        made.write(tmp_path / "set" / f"{i:02d}.jpg", made.encoded(made.picture(1)))
    images = open_images(tmp_path / "set", cache=tmp_path / "cache")
    source = loader(images, micro_batch=12, **options)
    looks = torch.cat([batch.images_BCHW for batch in take(source, 3)]).flatten(1)
    assert len(torch.unique(looks, dim=0)) == 36
    other = take(loader(images, micro_batch=12, **options, seed=6), 1)[0]
    assert len(torch.unique(torch.cat([looks, other.images_BCHW.flatten(1)]), dim=0)) == 48
    assert other.index_B.tolist() != source.order(0).tolist()


def test_values_are_normalised_crops(images):
    """A crop of everything, unflipped, is the whole image resized: its mean is the image's mean."""
    import io

    import numpy as np
    from PIL import Image

    whole = loader(images, crop_scale=(1.0, 1.0), crop_ratio=(1e-3, 1e3), micro_batch=12)
    batch = take(whole, 1)[0]
    for image, i in zip(batch.images_BCHW, batch.index_B.tolist(), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(images.read(i)))) / 255
        got = (image * 0.25 + 0.5).mean((1, 2)).numpy()
        np.testing.assert_allclose(got, pixels.mean((0, 1)), atol=0.02)


def test_masks_are_made_with_the_batch(images):
    seen = []
    sampler = MaskSampler((8, 8), "uniform", "random", min_keep=4, seed=3)

    def masks(epoch, step, index_B):
        seen.append((epoch, step, index_B.tolist(), threading.current_thread().name))
        return sampler(epoch, step, index_B)

    batches = take(loader(images, rank=1, world_size=2, masks=masks), 4)
    assert [s[:3] for s in seen[:2]] == [(0, 0, [2, 3]), (0, 0, [6, 7])]
    assert seen[9][:3] == (1, 0, [2, 3]) and {s[3] for s in seen} == {"loader"}
    want = sampler(0, 0, torch.tensor([2, 3]))
    assert torch.equal(batches[0].masks.context_idx_BK, want.context_idx_BK)
    assert torch.equal(batches[0].masks.target_idx_BMP, want.target_idx_BMP)


# ------------------------------------------------------------------------------------ bad files


@pytest.fixture
def corrupt(tmp_path):
    """230 good images and 12 corrupt ones: 5 %, of which the decoder must find two."""
    root = made.good_folder(tmp_path / "set", 230)
    at_once, later = made.break_folder(root)
    images = open_images(root, cache=tmp_path / "cache", log=lambda line: None)
    assert len(at_once) == 10 and len(images) == 232
    return images, later


def bad_indices(images, names):
    return {i for i in range(len(images)) if images.name(i) in names}


def check_epoch(source, images, bad, batches, epoch):
    """Each index holds its own image if that is good, else a good stand-in from the tail."""
    order = source.order(epoch).tolist()
    used = source.steps_per_epoch * 8
    got = indices(b for b in batches if b.epoch == epoch)
    stand_ins = set(order[used:] or order) - bad
    assert len(got) == used
    for index, i in enumerate(got):
        assert i == order[index] if order[index] not in bad else i in stand_ins
    return sum(i in bad for i in order[:used])


@pytest.mark.parametrize("decoder", DECODERS)
def test_corrupt_files_never_stop_an_epoch(corrupt, decoder):
    images, later = corrupt
    said, bad = [], bad_indices(images, later)
    source = loader(
        images, 8, 8, said, decoder=decoder
    )  # 232 = 29 * 8: no tail, so stand-ins come from anywhere
    batches = take(source, 2 * 29)
    for epoch in range(2):
        assert check_epoch(source, images, bad, batches, epoch) == 2
        good = set(range(232)) - bad
        counts = Counter(indices(b for b in batches if b.epoch == epoch))
        assert set(counts) == good and sum(counts.values()) == 232
    assert {name for name, _ in source.skipped.names} == later
    assert len(said) == 2 and all(any(name in line for line in said) for name in later)
    assert sum(batch.holes for batch in batches) == 4


@pytest.mark.parametrize("decoder", DECODERS)
def test_stand_ins_come_from_the_dropped_tail_on_any_rank_and_after_resume(corrupt, decoder):
    images, later = corrupt
    (images.root / "c1" / "0003.jpg").unlink()
    made.write(images.root / "c0" / "0004.jpg", b"\xff\xd8 shrunk")
    bad = bad_indices(images, later | {"c1/0003.jpg", "c0/0004.jpg"})
    assert len(bad) == 4
    options = {"seed": 9, "decoder": decoder}
    source = loader(images, 18, 18, **options)  # 232 = 12 * 18 + 16
    batches = take(source, 24)
    holes = 0
    for epoch in range(2):
        order, got = source.order(epoch).tolist(), indices(b for b in batches if b.epoch == epoch)
        for index, i in enumerate(got):
            hole = order[index] in bad
            holes += hole
            assert i in set(order[216:]) - bad if hole else i == order[index]
    assert holes >= 4
    ranks = [take(loader(images, 18, 3, rank=r, world_size=2, **options), 24) for r in range(2)]
    for step in range(24):
        micros = zip(*(rank[step * 3 : step * 3 + 3] for rank in ranks), strict=True)
        parts = [batch for micro in micros for batch in micro]
        joined = torch.cat([part.images_BCHW for part in parts])
        assert torch.equal(joined, batches[step].images_BCHW)
    for start in (1, 7, 13, 20):
        for got, want in zip(take(loader(images, 18, 18, **options), 4, start),
                             batches[start : start + 4], strict=True):  # fmt: skip
            assert torch.equal(got.images_BCHW, want.images_BCHW)


def test_a_bad_image_costs_one_rebuild_not_one_an_epoch(corrupt, monkeypatch):
    from cjepa_fast.data.dali import DaliDecoder

    images, _ = corrupt
    restarts = []
    restart = DaliDecoder.restart
    monkeypatch.setattr(DaliDecoder, "restart", lambda self: (restarts.append(1), restart(self)))
    take(loader(images, 8, 8), 29 * 3)
    assert len(restarts) <= 1 + 2  # the first build, and at most one for each of the two


def test_a_set_that_vanishes_is_an_error(tmp_path):
    root = made.good_folder(tmp_path / "set", 20)
    images = open_images(root, cache=tmp_path / "cache")
    root.rename(tmp_path / "gone")
    with pytest.raises(RuntimeError, match="are the files still there"):
        next(loader(images, 4, 4).iterate(0))


# ----------------------------------------------------------------------------------- the thread


def loader_threads():
    names = ("loader", "read", "decode")
    return [t for t in threading.enumerate() if t.name.startswith(names)]


def wait_until_gone(others=()):
    """others: threads of decoders that other tests have left to the garbage collector."""
    tiny.wait_for(lambda: not set(loader_threads()) - set(others), "the loader's threads to end")


@pytest.mark.parametrize("end", ["close", "loader", "del", "generator"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_thread_ends(images, end, decoder):
    others = loader_threads()
    source = loader(images, decoder=decoder)
    iterator = source.iterate(0)
    next(iterator)
    started = {t.name.split("_")[0] for t in set(loader_threads()) - set(others)}
    assert started == {"loader", "read"} | ({"decode"} if decoder == "pillow" else set())
    if end == "close":
        iterator.close()
        with pytest.raises(StopIteration):
            next(iterator)
    elif end == "loader":
        source.close()
    elif end == "generator":
        generator = (batch for batch in iterator)
        next(generator)
        del iterator
        generator.close()
    else:
        del iterator
    wait_until_gone(others)


def test_an_error_in_the_thread_reaches_the_consumer(images):
    def masks(epoch, step, index_B):
        if step == 1:
            raise ZeroDivisionError("from the masks")
        return None

    others = loader_threads()
    iterator = loader(images, masks=masks).iterate(0)
    for _ in range(6):
        next(iterator)
    with pytest.raises(ZeroDivisionError, match="from the masks"):
        next(iterator)
    wait_until_gone(others)


def test_an_error_of_dali_that_no_image_explains_is_raised(images, monkeypatch):
    from cjepa_fast.data.dali import DaliDecoder
    from cjepa_fast.data.decoder import DecodeFailed

    def collect(self):
        raise DecodeFailed("out of memory")

    monkeypatch.setattr(DaliDecoder, "collect", collect)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(loader(images).iterate(0))


@pytest.mark.parametrize(
    "ending",
    ["", *(pytest.param(e, marks=pytest.mark.long) for e in ("raise SystemExit(3)", "1 / 0"))],
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_interpreter_exits_with_a_loader_running(tmp_path, ending, decoder):
    root = made.good_folder(tmp_path / "set", 16)
    script = textwrap.dedent(f"""
        import torch
        from cjepa_fast.config import DataSection
        from cjepa_fast.data.loader import Loader, BatchSplit
        from cjepa_fast.data.sources import open_images
        images = open_images({str(root)!r}, cache={str(tmp_path / "cache")!r})
        data = DataSection(image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, threads=1,
                           decoder={decoder!r})
        source = Loader(images, data, BatchSplit(4, 4), seed=0, device="cpu", dtype=torch.bfloat16)
        iterator = source.iterate(0)
        assert next(iterator).images_BCHW.dtype == torch.bfloat16
    """)
    script += f"\n{ending}\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=tiny.HANG_S)
    want = {"": 0, "raise SystemExit(3)": 3, "1 / 0": 1}[ending]
    assert done.returncode == want, done.stderr.decode()
    assert b"Fatal" not in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"global_batch": 50}, "41 usable images do not fill one global batch of 50"),
        ({"global_batch": 50}, "set data.batch_size to at most 41, or bring more images"),
        ({"global_batch": 64, "world_size": 2}, "to at most 40, or"),
        ({"global_batch": 64, "world_size": 64, "micro_batch": 1}, "of 64: bring more images"),
        ({"micro_batch": 5}, "multiple of 5"),
        ({"world_size": 5}, "cannot be split"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"micro_batch": 0}, "micro-batches of 0"),
    ],
)
def test_impossible_sizes(images, options, says):
    with pytest.raises(ValueError, match=says):
        loader(images, **options)


def test_the_loader_s_thread_has_no_pool_of_its_own():
    """Beside the step's it would make both sleep on few cores. The step keeps its threads."""

    def threads():
        yield torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        iteration = _Iteration(threads, 1, torch.device("cpu"))
        assert next(iteration) == 1 and torch.get_num_threads() == 2
        iteration.close()
    finally:
        torch.set_num_threads(before)


def test_the_loader_s_thread_is_on_its_rank_s_gpu(monkeypatch):
    """By a stand-in for torch.cuda: without it the thread's current device would be GPU 0."""
    said = []

    def note(what):
        said.append((what, threading.current_thread().name))

    def batches():
        note("a batch")
        yield "a batch"

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: note(str(device)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(loader_module, "_claim", lambda batch, stream: None)
    iteration = _Iteration(batches, 1, torch.device("cuda", 3))
    assert next(iteration) == "a batch"
    iteration.close()
    assert said == [("cuda:3", "loader"), ("a batch", "loader")]


# ----------------------------------------------------------------------------- data.max_skipped


def epochs_of_rank_0(images, bad: range, epochs: int, max_skipped: float) -> Skipped:
    """What the loader of one of four ranks counts, after the bad images of its batches."""
    source = loader(images, 20, 5, rank=0, world_size=4, max_skipped=max_skipped)
    requests = source._batch_requests(0)
    for _ in range(epochs * source.steps_per_epoch):
        for i in next(requests).index_B.tolist():
            if i in bad:
                source.skipped.note(i, "bad")
    return source.skipped


def test_max_skipped_is_a_share_of_the_set_over_many_ranks_and_epochs(tmp_path):
    """In each epoch a rank meets another quarter of the set, in time nearly all of its 8 bad
    images. The limit is 16 of 80, of which 4 are the first epoch's share."""
    for i in range(80):
        made.write(tmp_path / "set" / f"{i:02d}.jpg", made.encoded(made.picture(1, 16, 16)))
    images = open_images(tmp_path / "set", cache=tmp_path / "cache")
    assert len(epochs_of_rank_0(images, range(0, 80, 10), 12, max_skipped=0.2).reasons) > 6
    with pytest.raises(ImagesGone, match=r"which is 4 of those that this rank has met: .* raise"):
        epochs_of_rank_0(images, range(0, 80, 2), 1, max_skipped=0.2)
    with pytest.raises(ImagesGone, match=r"nor can \d+ other images of .*: more than"):
        epochs_of_rank_0(images, range(0, 80, 4), 12, max_skipped=0.2)


def test_the_limit_is_written_in_whole_numbers(tmp_path):
    images = open_images(made.good_folder(tmp_path / "set", 2), cache=tmp_path / "cache")
    skipped = Skipped(images, [].append, most=1999.7)
    skipped.reasons = dict.fromkeys(range(2, 2001), "bad")
    with pytest.raises(ImagesGone, match=r"nor can 1,999 other images .* is 1,999 of those"):
        skipped.note(0, "bad")
