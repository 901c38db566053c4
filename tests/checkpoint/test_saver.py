"""Saving while training continues: what is written, when it counts, and what goes wrong."""

import builtins
import contextlib
import errno
import io
import json
import os
import shutil
import threading
from unittest import mock

import pytest
import tiny
import torch

from cjepa_fast import checkpoint
from cjepa_fast.checkpoint import format as checkpoint_format
from cjepa_fast.checkpoint import owned, writer
from cjepa_fast.checkpoint.owned import Fragment, OwnedState, Snapshot
from cjepa_fast.checkpoint.writer import Saver
from cjepa_fast.data import faults
from cjepa_fast.runtime import files
from cjepa_fast.training import resume


class Engine:
    """What a Saver needs of an engine: one parameter of ten values, and its EMA."""

    sharded = False

    def __init__(self):
        self.values, self.ema_values = torch.arange(10.0), torch.zeros(10)
        moments = {"exp_avg": torch.ones(10), "exp_avg_sq": torch.ones(10)}
        self._state = [OwnedState(Fragment("x", 0, self.values), moments)]
        self.ema = type("EMA", (), {"fragments": [Fragment("x", 0, self.ema_values)]})
        self.snapshot = Snapshot()

    def state(self):
        return self._state

    def optimizer_step(self):
        return 7

    def update(self):
        self.snapshot.wait()
        self.values += 1


@pytest.fixture
def made(tmp_path):
    """(engine, saver, what it said)."""
    engine, said = Engine(), []
    return engine, Saver(tmp_path / "checkpoints", engine, "{}", keep=2, say=said.append), said


def stored(folder, step: int) -> torch.Tensor:
    path = folder / "checkpoints" / f"step_{step:08d}"
    assert checkpoint.damage(path) == []
    return checkpoint.StoredCheckpoint(path).whole("master", "x")


def test_what_is_saved_is_the_state_of_its_step_while_updates_go_on(tmp_path, made, monkeypatch):
    engine, save, said = made
    go, written = threading.Event(), files.write_tensors
    slow = lambda *args: go.wait(tiny.HANG_S) and written(*args)  # noqa: E731
    monkeypatch.setattr(files, "write_tensors", slow)
    save.begin(1, {"epoch": 0.5})
    for _ in range(3):  # the disk is slow: nobody waits for it
        engine.update()
    assert save.busy and checkpoint.latest(tmp_path) is None
    go.set()
    assert save.finish() and not said
    assert torch.equal(stored(tmp_path, 1), torch.arange(10.0))
    state = checkpoint.state_of(checkpoint.latest(tmp_path))
    assert (state["step"], state["optimizer_step"], state["epoch"]) == (1, 7, 0.5)
    save.begin(2, {})
    assert save.finish()
    assert torch.equal(stored(tmp_path, 2), torch.arange(10.0) + 3)


def test_an_update_waits_for_the_copy(tmp_path, made, monkeypatch):
    engine, save, _ = made
    go, copy = threading.Event(), owned.Snapshot.copy
    monkeypatch.setattr(owned.Snapshot, "copy", lambda self: go.wait(tiny.HANG_S) and copy(self))
    save.begin(1, {})
    updating = threading.Thread(target=engine.update)
    updating.start()
    updating.join(0.2)
    assert updating.is_alive() and engine.values[0] == 0
    go.set()
    updating.join(tiny.HANG_S)
    assert save.finish() and engine.values[0] == 1
    assert torch.equal(stored(tmp_path, 1), torch.arange(10.0))


def test_a_full_disk_is_said_and_the_last_good_one_stays(tmp_path, made, monkeypatch):
    engine, save, said = made
    save.begin(1, {})
    assert save.finish()
    full = OSError(errno.ENOSPC, "No space left on device")
    for module, name in ((files, "write_tensors"), (checkpoint_format, "write_manifest")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *args: (_ for _ in ()).throw(full))
            save.begin(2, {})
            engine.update()
            assert not save.finish()
        assert "step 2 could not be saved" in said[-1] and "No space left" in said[-1]
        assert "step_00000001" in said[-1] and checkpoint.latest(tmp_path).name == "step_00000001"
        assert not list((tmp_path / "checkpoints").glob(".*"))
    save.begin(3, {})
    assert save.finish() and len(said) == 2
    assert torch.equal(stored(tmp_path, 3), torch.arange(10.0) + 2)


def test_a_step_reached_again_whose_save_fails_is_not_saved(tmp_path, saved, monkeypatch):
    """As after a rewind: its first checkpoint has been set aside."""
    save, _ = saved
    checkpoint.set_aside_later_than(tmp_path, 0)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_tensors", lambda *args: (_ for _ in ()).throw(full))
        save.begin(1, {})
        assert not save.finish()
    save.begin(1, {})
    assert save.finish()


class OnGPU(torch.Tensor):
    """A tensor on the host that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def short_of_memory(made, monkeypatch):
    """Takes whether the host lacks memory altogether, or pinned memory alone. Lists, by whether it
    was to be pinned, the memory that is asked for. The engine's tensors are on a GPU."""
    engine, asked, empty = made[0], [], torch.empty
    engine._state[0].moments["exp_avg"] = torch.ones(10).as_subclass(OnGPU)
    engine._state[0].moments["exp_avg_sq"] = torch.ones(10).as_subclass(OnGPU)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())

    def lack(all_of_it: bool):
        def refuse(*shape, pin_memory=False, **how):
            asked.append(pin_memory)
            if pin_memory or all_of_it:
                raise RuntimeError("CUDA error: out of memory\nand a long advice")
            return empty(*shape, **how)

        monkeypatch.setattr(torch, "empty", refuse)
        return asked

    return lack


def test_without_pinned_memory_it_saves_and_says_so_once(tmp_path, made, short_of_memory, capsys):
    engine, save, _ = made
    asked = short_of_memory(all_of_it=False)
    for step in (1, 2):
        save.begin(step, {})
        engine.update()
        assert save.finish()
    assert asked.count(True) == 1 and asked.count(False) == 4
    assert torch.equal(stored(tmp_path, 2), torch.arange(10.0) + 1)
    told = capsys.readouterr().err
    assert told.count("pinned memory") == 1 and "(CUDA error: out of memory): " in told


def test_without_memory_for_the_copy_that_save_fails_and_the_training_continues(
    tmp_path, saved, made, short_of_memory
):
    engine, _, said = made
    engine.snapshot = Snapshot()
    save = Saver(tmp_path / "checkpoints", engine, "{}", keep=2, say=said.append)
    short_of_memory(all_of_it=True)
    save.begin(2, {})
    assert save.pending and not save.busy
    engine.update()
    assert not save.finish()
    (line,) = said
    assert "step 2 could not be saved: rank 0: CUDA error: out of memory" in line
    assert "step_00000001" in line
    short_of_memory(all_of_it=False)
    save.begin(3, {})
    assert save.finish() and torch.equal(stored(tmp_path, 3), torch.arange(10.0) + 1)


def test_who_may_read_one_file_may_read_all(tmp_path, made):
    _, save, _ = made
    save.begin(1, {})
    save.finish()
    assert len({path.stat().st_mode for path in checkpoint.latest(tmp_path).iterdir()}) == 1


def test_values_that_are_not_finite_are_never_saved(tmp_path, made):
    engine, save, said = made
    engine.ema_values[3] = torch.inf
    save.begin(1, {})
    assert not save.finish() and "ema/x holds values that are not finite" in said[0]
    assert checkpoint.latest(tmp_path) is None


def test_some_are_kept_by_number_and_some_for_good(tmp_path, made):
    _, save, _ = made
    save.keep_period = 4
    for step in range(1, 12):
        save.begin(step, {})
    save.finish()
    kept = [checkpoint.step_of(path) for path in checkpoint.newest_first(tmp_path)]
    assert kept == [11, 10, 8, 4]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


def of_an_earlier_version(path, epoch: float, every: int | None) -> None:
    """Its state.json does not say whether it is for good. every: None in one of no training."""
    state = checkpoint.state_of(path)
    state.pop("for_good", None)
    if every is not None:
        config = {"checkpoint": {"keep_every_epochs": every}}
        state |= {"epoch": epoch, "config": config}
    (path / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("period", [0, 3])
def test_what_was_kept_for_good_stays_whatever_is_kept_later(tmp_path, made, period):
    """As after a resume with another keep_every_epochs, or with epochs of another length."""
    engine, save, said = made
    save.keep_period = 4
    for step in range(1, 10):
        save.begin(step, {})
    save.finish()
    later = Saver(tmp_path / "checkpoints", engine, "{}", keep=2, keep_period=period)
    for step in range(10, 15):
        later.begin(step, {})
    assert later.finish() and not said
    kept = [checkpoint.step_of(path) for path in checkpoint.newest_first(tmp_path)]
    assert kept == [14, 13, *[12] * bool(period), 8, 4]


def test_an_earlier_version_kept_for_good_what_ended_its_own_epochs(tmp_path, made):
    """Epochs had 2 steps, and each second one was kept; epochs of 3 steps come after them."""
    _, save, _ = made
    save.keep, folder = 9, tmp_path / "checkpoints"
    for step in range(1, 9):
        save.begin(step, {})
    save.finish()
    for step in range(1, 8):
        every = {6: 0, 7: None}.get(step, 2)
        of_an_earlier_version(folder / f"step_{step:08d}", step / 2, every)
    (folder / "step_00000003" / "state.json").write_text("cut off")
    save.keep, save.keep_period = 1, 3
    save.begin(10, {})
    save.finish()
    kept = [checkpoint.step_of(path) for path in checkpoint.newest_first(tmp_path)]
    assert kept == [10, 4, 3]  # what cannot be judged stays


def test_steps_are_ordered_as_numbers(tmp_path, made):
    """Their names are not, from the ninth digit on."""
    _, save, _ = made
    steps = [99_999_998, 99_999_999, 100_000_000, 100_000_001]
    for step in steps:
        save.begin(step, {})
    (tmp_path / "checkpoints" / ".step_99999999.partial").mkdir()  # of a save that was killed
    save.begin(100_000_002, {})
    save.finish()
    kept = [checkpoint.step_of(path) for path in checkpoint.newest_first(tmp_path)]
    assert kept == [100_000_002, 100_000_001]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    (aside,) = checkpoint.set_aside_later_than(tmp_path, 100_000_001)
    assert aside.name == "abandoned_1_step_100000002"


@pytest.fixture
def saved(tmp_path, made):
    """(saver, the folder of its checkpoints): that of step 1 is there."""
    _, save, _ = made
    save.begin(1, {})
    assert save.finish()
    return save, tmp_path / "checkpoints"


def test_what_a_killed_save_left_does_no_harm(tmp_path, saved):
    """Of the same step on more ranks, and of an earlier one."""
    save, folder = saved
    shutil.copytree(folder / "step_00000001", folder / ".step_00000003.partial")
    (folder / ".step_00000003.partial" / "manifest.json").unlink()
    shard = next((folder / ".step_00000003.partial").glob("shard*"))
    shard.rename(shard.with_name("shard_00001_of_00002.safetensors"))
    (folder / ".step_00000002.partial").mkdir()
    save.begin(3, {})
    assert save.finish()
    assert torch.equal(stored(tmp_path, 3), torch.arange(10.0))
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000001",
        "step_00000003",
    ]


def test_what_cannot_be_cleared_away_costs_no_checkpoint(tmp_path, saved, made, monkeypatch):
    """On NFS a file that another process has open stays, under another name."""
    save, folder = saved
    (folder / ".step_00000002.partial").mkdir()

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", busy)
    save.begin(3, {})
    assert save.finish() and made[2] == []


def test_without_links_the_best_one_is_kept_and_that_said_once(tmp_path, saved, made, monkeypatch):
    save, _ = saved

    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(files, "point", refuse)
    for save.best in (2, 3):
        save.begin(save.best, {})
        assert save.finish()
    assert save.point_at_best(3) and save.best == 3 and save.point_at_best(3)
    named, at_start = made[2]
    assert "checkpoints are saved" in named and "Operation not supported" in named
    assert f"{tmp_path / 'best'} cannot be made" in at_start


def test_the_best_one_stays_until_its_successor_is_saved(tmp_path, made, monkeypatch):
    """Where the save of that fails, and where an older one is named while the score comes in."""
    _, save, said = made
    save.keep, save.best = 1, 1
    full = OSError(errno.ENOSPC, "No space left on device")
    link = tmp_path / "best"
    save.begin(1, {})
    assert save.finish()
    save.best = 2
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_tensors", lambda *args: (_ for _ in ()).throw(full))
        save.begin(2, {})
        assert not save.finish() and len(said) == 1
    for step in (3, 4):
        save.begin(step, {})
        assert save.finish() and checkpoint.damage(link.resolve()) == []
    save.best = 1
    save.begin(5, {})
    save.best = 6
    assert save.finish() and link.resolve().name == "step_00000001"
    save.begin(6, {})
    assert save.finish() and link.resolve().name == "step_00000006"
    assert [checkpoint.step_of(path) for path in checkpoint.newest_first(tmp_path)] == [6]


def test_folders_that_cannot_be_synced_are_passed_over(tmp_path, monkeypatch):
    def invalid(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(os, "fsync", invalid)
    files.sync_file(tmp_path)
    with pytest.raises(OSError, match="Invalid"):
        files.sync_file(tmp_path / "file")


def test_ranks_that_do_not_share_a_folder_are_told(tmp_path, made, monkeypatch):
    _, save, said = made
    elsewhere = checkpoint_format.Receipt("shard_00001_of_00002.safetensors", 9, "")
    monkeypatch.setattr(writer, "all_gather_objects", lambda mine: [mine, elsewhere])
    save.begin(1, {})
    assert not save.finish() and "run.dir must be a folder that all nodes share" in said[0]


def test_a_copy_of_the_users_is_left_alone(tmp_path, saved):
    save, folder = saved
    shutil.copytree(folder / "step_00000001", folder / "step_00000001_mine")
    for step in range(2, 6):
        save.begin(step, {})
    assert save.finish() and (folder / "step_00000001_mine" / "manifest.json").is_file()
    assert [p.name for p in checkpoint.newest_first(tmp_path)] == ["step_00000005", "step_00000004"]
    assert checkpoint.set_aside_later_than(tmp_path, 5) == []


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "its checksum has changed": flip_a_bit,
    "bytes, and was written with": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "is missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("said", DAMAGES)
@pytest.mark.parametrize("file", ["shard_00000_of_00001.safetensors", "state.json", "encoder.json"])
def test_damage_is_seen_and_named(tmp_path, made, said, file):
    _, save, _ = made
    save.begin(1, {})
    save.finish()
    path = checkpoint.latest(tmp_path)
    assert checkpoint.damage(path) == []
    DAMAGES[said](path / file)
    (line,) = checkpoint.damage(path)
    assert str(path / file) in line and said in line
    shares = [checkpoint.damage(path, part, 2) for part in range(2)]  # two ranks share it
    assert sorted(map(len, shares)) == [0, 1]


@pytest.mark.parametrize("file", ["manifest.json", "shard_00000_of_00001.safetensors"])
@pytest.mark.parametrize("code", ["EIO", "ESTALE", "EMFILE"])
def test_an_error_of_the_machine_is_no_damage(tmp_path, made, monkeypatch, file, code):
    """It is tried again. One that stays ends the start: no checkpoint is set aside for it."""
    _, save, _ = made
    save.begin(1, {})
    save.finish()
    path, left, real = checkpoint.latest(tmp_path), [2], io.open

    def failing(name, *args, **options):
        if str(name) == str(path / file) and left[0] > 0:
            left[0] -= 1
            raise OSError(getattr(errno, code), "no such luck")
        return real(name, *args, **options)

    monkeypatch.setattr(faults, "PAUSES_S", (0.0, 0.0))
    for module in (io, builtins):
        monkeypatch.setattr(module, "open", failing)
    assert checkpoint.damage(path) == []
    left[0] = 99
    with pytest.raises(faults.MachineFailed, match=file):
        resume.first_whole([path], "auto")


@pytest.mark.parametrize("file", ["manifest.json", "shard_00000_of_00001.safetensors"])
def test_what_another_user_saved_is_no_damage(tmp_path, made, monkeypatch, file):
    """Root reads all: the refusal is made up. The file is named, once, and all stays as it is."""
    _, save, _ = made
    for step in (1, 2):
        save.begin(step, {})
    save.finish()
    found, real = checkpoint.newest_first(tmp_path), io.open

    def refused(name, *args, **options):
        if str(name) == str(found[0] / file):
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return real(name, *args, **options)

    for module in (io, builtins):
        monkeypatch.setattr(module, "open", refused)
    way_out = r"cannot be read \(Permission denied\).* chmod"
    with pytest.raises(PermissionError, match=way_out) as told:
        resume.first_whole(found, "auto")
    assert str(found[0] / file) in str(told.value) and str(told.value).count(".json") <= 1
    assert checkpoint.newest_first(tmp_path) == found


def test_a_checkpoint_that_cannot_be_looked_into_is_not_passed_over(tmp_path, saved, monkeypatch):
    """A folder of another user's: what lies in it cannot even be asked about."""
    real = os.stat

    def refused(path, *args, **options):
        if str(path).endswith("step_00000001/manifest.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", refused)
    way_out = r"step_00000001/manifest.json cannot be read .* chmod"
    with pytest.raises(PermissionError, match=way_out):
        checkpoint.resume_candidates(tmp_path, "auto")


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', "{}", "[" * 100_000])
def test_a_manifest_that_is_none_is_damage(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    (line,) = checkpoint.damage(tmp_path)
    assert "manifest.json cannot be read" in line


@pytest.mark.parametrize("name", ["state.json", "encoder.json", "shard_00000_of_00001.safetensors"])
def test_a_manifest_names_what_a_checkpoint_must_have(tmp_path, made, name):
    """One of nothing would else count as whole, and hide the good ones before it."""
    _, save, _ = made
    save.begin(1, {})
    save.finish()
    path = checkpoint.latest(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (line,) = checkpoint.damage(path)
    assert "does not name" in line and str(path) in line
    assert checkpoint.damage(path, 1, 2) == [line]


def test_changes_that_matter_are_told_from_those_that_do_not():
    saved = {"config": {"run": {"dir": "a", "epochs": 2}, "optim": {"lr": 1.0}}, "images": "x"}
    now = json.loads(json.dumps(saved))
    assert checkpoint.differences(saved, now) == ([], [])
    now["config"]["run"] = {"dir": "b", "epochs": 3}
    harmless, others = checkpoint.differences(saved, now)
    assert harmless == ["run.dir: b, saved with a"]
    assert others == ["run.epochs: 3, saved with 2"]


def test_other_images_are_told_by_their_path_and_number_not_by_a_hash():
    def facts(images, count, path):
        return {"images": images, "image_count": count, "config": {"data": {"path": path}}}

    saved = facts("x", 40, "a")
    told = checkpoint.differences(saved, facts("y", 1041, ["a", "b"]))
    assert told == ([], ["data.path: 1,041 images in a and b, saved with 40 images in a"])
    (line,) = checkpoint.differences(saved, facts("y", 40, "a"))[1]
    assert line.endswith("saved with 40 images in a; their names or files differ")
    assert checkpoint.differences(saved, facts("x", 40, "b")) == (
        ["data.path: b, saved with a"], []
    )  # fmt: skip
    (line,) = checkpoint.differences({"images": "x"}, facts("y", 40, "a"))[1]
    assert line == "data.path: 40 images in a, saved with images in ?"


def test_other_usable_images_of_the_same_files_are_another_training():
    """A corrupt file repaired at its size, or one gone bad: all that follow have other numbers."""

    def facts(count, path="a", **usable):
        return {"images": "x", "image_count": count, **usable, "config": {"data": {"path": path}}}

    saved = facts(40, usable_images="u")
    for now in (facts(39, usable_images="v"), facts(40, usable_images="v")):
        harmless, (line,) = checkpoint.differences(saved, now)
        assert harmless == [] and line.startswith(f"data.path: {now['image_count']} images in a, ")
        assert line.endswith("same in name and size, but other ones are usable")
    for earlier in ({"images": "x", "config": saved["config"]}, facts(40)):
        assert checkpoint.differences(earlier, saved) == ([], [])
    (line,) = checkpoint.differences(facts(39), facts(40, "b", usable_images="u"))[1]
    assert line.startswith("data.path: 40 images in b, saved with 39 images in a; the files are")


def test_a_checkpoint_that_knows_nothing_of_fused_blocks_goes_on():
    """Keys that came later and change but rounding: as ones that were saved with another value."""
    saved = {"config": {"model": {"patch_size": 4}}}
    for fused in (True, False):
        now = {"config": {"model": {"patch_size": 4, "fused": fused}}}
        harmless, others = checkpoint.differences(saved, now)
        assert len(harmless) == 1 and not others


def test_the_saver_s_thread_has_no_pool_of_its_own():
    """Beside the step's it would make both sleep on few cores, from the first save on."""
    before, taken = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        worker = writer.Worker("save")
        worker.start(lambda: taken.append(torch.get_num_threads()))
        worker.wait()
        assert taken == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
