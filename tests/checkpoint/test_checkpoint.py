"""Checkpoints on disk: fragments read back by range, atomic names, encoders loaded."""

import itertools
import json
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cjepa_fast import checkpoint, load_encoder
from cjepa_fast.checkpoint import encoders
from cjepa_fast.checkpoint.owned import Fragment
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import files


def stored_in_pieces(folder, weight: torch.Tensor, cuts: list[int]) -> checkpoint.StoredCheckpoint:
    """A checkpoint of one parameter, cut as ranks would cut it."""
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"step": 1, "world_size": len(cuts) - 1}))
    pieces = list(itertools.pairwise(cuts))
    for rank, (a, b) in enumerate(pieces):
        name = f"shard_{rank:05d}_of_{len(pieces):05d}.safetensors"
        save_file({f"master/x@{a}": weight[a:b].clone()}, folder / name)
    return checkpoint.StoredCheckpoint(folder)


@pytest.mark.parametrize("cuts", [[0, 10], [0, 3, 10], [0, 1, 2, 9, 10]])
def test_any_run_is_read_from_any_cut(tmp_path, cuts):
    weight = torch.randn(10)
    stored = stored_in_pieces(tmp_path / "step_00000001", weight, cuts)
    assert torch.equal(stored.whole("master", "x"), weight)
    for start in range(10):
        for end in range(start + 1, 11):
            fragment = Fragment("x", start, torch.full((end - start,), float("nan")))
            stored.read_into("master", fragment)
            assert torch.equal(fragment.values, weight[start:end])


def test_each_shard_is_opened_once(tmp_path, monkeypatch):
    """Under ZeRO-3 each rank's shard has a run of every parameter: many ranks make many runs."""
    opened = []

    class Watched:
        def __init__(self, path, framework):
            opened.append(path)
            self.file = safe_open(path, framework)

        def keys(self):
            return self.file.keys()

        def get_slice(self, key):
            return self.file.get_slice(key)

    monkeypatch.setattr("cjepa_fast.checkpoint.format.safe_open", Watched)
    stored = stored_in_pieces(tmp_path / "step_00000001", torch.arange(10.0), [0, 4, 8, 10])
    for start in (0, 5, 9):
        stored.read_into("master", Fragment("x", start, torch.empty(1)))
    stored.whole("master", "x")
    assert len(opened) == len(set(opened)) == 3


def test_encoders_of_each_end_are_kept(tmp_path):
    names = [f"{which}{s}" for which in encoders.FINAL.values() for s in (".safetensors", ".json")]
    for end in ("first", "second", "third"):
        for name in names:
            (tmp_path / name).write_text(end)
        encoders.set_aside(tmp_path)
        encoders.set_aside(tmp_path)  # resumed once more before its end
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    prefixes = {"previous_": "first", "previous_2_": "second", "previous_3_": "third"}
    assert kept == {f"{p}{name}": end for p, end in prefixes.items() for name in names}


def test_final_encoders_are_known_by_their_weights(tmp_path):
    step, weights = tmp_path / "step_00000001", {"context": torch.ones(4), "target": torch.zeros(4)}
    step.mkdir()
    (step / "state.json").write_text(json.dumps({"step": 1, "world_size": 1}))
    flat = {"master/encoder.x@0": weights["context"], "ema/x@0": weights["target"]}
    save_file(flat, step / "shard_00000_of_00001.safetensors")
    assert encoders.are_of(step, tmp_path)  # none is there
    for which, name in encoders.FINAL.items():
        path = tmp_path / f"{name}.safetensors"
        save_file({"x": weights[which].view(2, 2), "pos_embed": torch.ones(1)}, path)
        assert encoders.are_of(step, tmp_path)
        whole = path.read_bytes()
        for other in ({"x": torch.full((2, 2), 0.5)}, {"y": weights[which].view(2, 2)}):
            save_file(other, path)
            assert not encoders.are_of(step, tmp_path)
        path.write_bytes(whole[:50])
        assert not encoders.are_of(step, tmp_path)
        path.write_bytes(whole)


def test_a_full_disk_is_an_os_error(tmp_path):
    """safetensors raises an error of its own; the limit on a file's size stands in for the disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match=r"x\.safetensors cannot be written: .*File too large"):
            files.write_tensors({"x": torch.zeros(100_000)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_parameter_that_is_not_there_is_named(tmp_path):
    stored = stored_in_pieces(tmp_path / "step_00000001", torch.randn(10), [0, 4, 10])
    with pytest.raises(ValueError, match=r"no master of encoder\.norm"):
        stored.whole("master", "encoder.norm")
    with pytest.raises(ValueError, match="x has 5 values at 5"):
        stored.read_into("master", Fragment("x", 5, torch.empty(7)))


def test_what_was_not_renamed_does_not_exist(tmp_path):
    steps = tmp_path / "checkpoints"
    for name in ("step_00000005", ".step_00000009.partial", "step_00000007"):
        (steps / name).mkdir(parents=True)
    five = steps / "step_00000005"
    for folder in (five, steps / ".step_00000009.partial"):
        (folder / "state.json").write_text("{}")
        (folder / "manifest.json").write_text("{}")
    assert checkpoint.latest(tmp_path) == five
    assert checkpoint.resume_candidates(tmp_path, None) == []
    assert checkpoint.resume_candidates(tmp_path, "auto") == [five]
    assert checkpoint.resume_candidates(tmp_path / "other", str(tmp_path)) == [five]
    assert checkpoint.resume_candidates(tmp_path, str(five)) == [five]
    assert checkpoint.resume_candidates(tmp_path / "new", "auto") == []
    with pytest.raises(FileNotFoundError, match="new"):
        checkpoint.resume_candidates(tmp_path, str(tmp_path / "new"))


def test_write_text_is_whole_or_absent(tmp_path):
    path = tmp_path / "latest"
    for text in ("step_1\n", "step_2\n"):
        files.write_text(path, text)
        assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


@pytest.fixture
def saved_encoder(tmp_path):
    encoder = Encoder(32, 8, 24, 2, 3)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    described = {**encoder.architecture, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    (tmp_path / "encoder.json").write_text(json.dumps(described))
    return encoder


def test_load_encoder_gives_the_module_back(tmp_path, saved_encoder):
    images = torch.randn(2, 3, 32, 32)
    for path in (tmp_path, tmp_path / "encoder.safetensors"):
        loaded = load_encoder(path)
        assert not loaded.training and loaded.mean == (0.1, 0.2, 0.3)
        assert torch.equal(loaded(images), saved_encoder(images))


def test_load_encoder_says_what_is_wrong(tmp_path, saved_encoder):
    with pytest.raises(ValueError, match="teacher"):
        load_encoder(tmp_path, "teacher")
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_encoder(tmp_path / "nothing")
    weights = saved_encoder.state_dict()
    weights["blocks.7.norm1.bias"] = weights.pop("norm.bias")
    save_file(weights, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.7\.norm1\.bias.*norm\.bias"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"width": 48}, r"norm1\.weight \(24,\) where \(48,\) belongs"),
        ({"image_size": 64}, r"pos_embed \(1, 16, 24\) where \(1, 64, 24\) belongs"),
    ],
)
def test_weights_of_another_shape_are_named(tmp_path, saved_encoder, changed, said):
    path = tmp_path / "encoder.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ValueError, match=rf"(?s)encoder\.safetensors does not fit.*{said}"):
        load_encoder(tmp_path)


def test_as_many_values_of_another_shape_are_refused(tmp_path, saved_encoder):
    weights = saved_encoder.state_dict()
    weights["blocks.0.mlp.fc1.weight"] = weights["blocks.0.mlp.fc1.weight"].t().contiguous()
    save_file(weights, tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"fc1\.weight \(24, 96\) where \(96, 24\) belongs"):
        load_encoder(tmp_path)


def test_a_checkpoint_s_weights_of_another_size_are_named(tmp_path, saved_encoder):
    """There they are flat."""
    step = tmp_path / "run" / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    trained = {n: p for n, p in saved_encoder.named_parameters() if p.requires_grad}
    flat = {f"ema/{name}@0": p.detach().flatten() for name, p in trained.items()}
    save_file(flat, step / "shard_00000_of_00001.safetensors")
    (step / "state.json").write_text(json.dumps({"step": 1, "world_size": 1, "config": {}}))
    described = json.loads((tmp_path / "encoder.json").read_text())
    for width in (24, 48):
        (step / "encoder.json").write_text(json.dumps(described | {"width": width}))
        shards = [checkpoint.format.receipt(next(step.glob("shard*")))]
        checkpoint.format.write_manifest(step, shards)
        if width == 24:
            assert torch.equal(encoders._read(step, "target").norm.bias, saved_encoder.norm.bias)
    with pytest.raises(ValueError, match=r"(?s)step_00000001 does not fit.*\(24,\) where \(48,\)"):
        encoders._read(step, "target")


def test_an_encoder_file_is_not_taken_for_the_other_encoder(tmp_path, saved_encoder):
    with pytest.raises(ValueError, match="holds a target encoder"):
        load_encoder(tmp_path / "encoder.safetensors", "context")


def test_damaged_files_are_named(tmp_path, saved_encoder):
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"encoder\.safetensors is damaged"):
        load_encoder(tmp_path)
    (tmp_path / "encoder.json").write_text("{}")
    save_file(saved_encoder.state_dict(), path)
    with pytest.raises(ValueError, match=r"encoder\.json does not describe"):
        load_encoder(tmp_path)


def test_a_run_that_goes_back_sets_its_later_checkpoints_aside(tmp_path):
    steps = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        (steps / f"step_{step:08d}").mkdir(parents=True)
        (steps / f"step_{step:08d}" / "manifest.json").write_text(str(step))
    moved = checkpoint.set_aside_later_than(tmp_path, 1)
    assert [path.name for path in moved] == [
        "abandoned_1_step_00000002",
        "abandoned_1_step_00000003",
    ]
    assert (moved[1] / "manifest.json").read_text() == "3"
    assert checkpoint.latest(tmp_path).name == "step_00000001"
