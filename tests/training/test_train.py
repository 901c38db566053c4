"""The command as users give it: errors, dry run, interruption and exact resume, bad steps."""

import json
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file

import cjepa_fast
from cjepa_fast import checkpoint
from cjepa_fast.telemetry.jsonl import read_log

TRAIN = tiny.ROOT / "cjepa_fast" / "train.py"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--set", "optim.lrr=1"], ["optim.lrr = 1", "nearest is optim.lr"]),
        (["--set", "data.path=/nowhere"], ["/nowhere", "does not exist"]),
        (["--set", "model.heads=5"], ["24", "5", "heads"]),
        (["--set", "data.batch_size=1000"], ["1000", "40"]),
        (["--set", "data.batch_size=1"], ["data.batch_size", "at least 2", "beta=0"]),
        (["--resume", "/nowhere"], ["--resume /nowhere", "no checkpoint"]),
    ],
)
def test_bad_input_is_one_message_and_status_2(tmp_path, args, said):
    result = tiny.train("--config", tiny.write_config(tmp_path), *args)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(part in lines[0] for part in said), result.stderr
    assert not (tmp_path / "run").exists()


def test_print_config_is_the_resolved_one(tmp_path):
    config = tiny.write_config(tmp_path)
    result = tiny.train("--config", config, "--set", "optim.lr=3e-4", "--print-config")
    printed = json.loads(result.stdout)
    assert printed["optim"]["lr"] == 3e-4
    assert printed["data"]["image_size"] == 24 and printed["loss"]["vicreg"]["beta"] == 0.001


@pytest.mark.slow
def test_dry_run_prints_what_a_run_is_made_of_and_leaves_nothing(tmp_path):
    """And a step that compiles nothing loads no compiler, which takes as long as the rest."""
    command = [sys.executable, "-X", "importtime", TRAIN]
    command += ["--config", tiny.write_config(tmp_path), "--dry-run"]
    result = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch.nn" in result.stderr and "torch._dynamo" not in result.stderr
    for word in (
        "parameters",
        "tokens",
        "6 x 6 patches",
        "GFLOP/image",
        "memory",
        "GiB",
        "40 in 2 classes",
        "2 an epoch, 4 in 2 epochs: 0:00:0",
        "at this rate",
    ):
        assert word in result.stdout, result.stdout
    assert not (tmp_path / "run").exists()


def test_a_dry_run_draws_the_first_masks(tmp_path):
    config, out = tiny.write_config(tmp_path), tmp_path / "masks.png"
    result = tiny.train("--config", config, "--dry-run", "--masks", out)
    assert result.returncode == 0 and f"masks        {out}" in result.stdout, result.stderr
    assert out.read_bytes().startswith(b"\x89PNG") and not (tmp_path / "run").exists()
    result = tiny.train("--config", config, "--masks", out)
    assert result.returncode == 2 and "--dry-run" in result.stderr


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of 2 epochs, 4 steps of 2 micro-batches, never interrupted: folder and config."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny.write_config(folder, checkpoint={"every_steps": 1, "keep": 9})
    result = tiny.train("--config", config)
    assert result.returncode == 0, result.stderr
    return folder, config


def test_a_run_leaves_encoders_that_load_in_two_lines(whole_run):
    folder, _ = whole_run
    encoder = cjepa_fast.load_encoder(folder / "run")
    tokens = encoder(torch.zeros(2, 3, 24, 24))
    assert tokens.shape == (2, 36, 24) and encoder.mean == (0.485, 0.456, 0.406)
    last = folder / "run" / "checkpoints" / "step_00000004"
    assert checkpoint.state_of(last)["machine"].startswith("1 x ")
    for which, file in (("target", "encoder"), ("context", "context_encoder")):
        stored = load_file(folder / "run" / f"{file}.safetensors")
        from_checkpoint = cjepa_fast.load_encoder(last, which).state_dict()
        assert stored.keys() == from_checkpoint.keys()
        assert all(torch.equal(stored[name], from_checkpoint[name]) for name in stored)
    target, context = (cjepa_fast.load_encoder(last, w).state_dict() for w in ("target", "context"))
    assert not torch.equal(target["norm.weight"], context["norm.weight"])


def same_weights(one, other) -> bool:
    """Whether two checkpoints hold the same bits of everything but the generators."""
    one, other = checkpoint.StoredCheckpoint(one), checkpoint.StoredCheckpoint(other)
    kinds = [key for key in one.slices if key[0] != "generator"]
    assert kinds and one.slices.keys() == other.slices.keys()
    return all(torch.equal(one.whole(*key), other.whole(*key)) for key in kinds)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3])
def test_resume_is_exact(whole_run, tmp_path, at):
    """From the checkpoint of any step, mid-epoch too: the same losses and weights, bit for bit."""
    folder, config = whole_run
    held = folder / "run" / "checkpoints" / f"step_{at:08d}"
    where = ("--resume", held, "--set", f"run.dir={tmp_path}")
    result = tiny.train("--config", config, *where, fresh=at == 2)
    assert result.returncode == 0, result.stderr
    whole, resumed = tiny.losses(folder / "run"), tiny.losses(tmp_path)
    assert list(resumed) == list(range(at + 1, 5))
    assert all(resumed[step] == whole[step] for step in resumed)
    rows = read_log(folder / "run") + read_log(tmp_path)
    # RankMe is of all images of so short a run, and a start has not those of the one before
    assert [row["rankme"] is None for row in rows] == [True] * 3 + [False] + [True] * len(resumed)
    last = "checkpoints/step_00000004"
    assert same_weights(folder / "run" / last, tmp_path / last)


def test_a_run_is_not_overwritten(whole_run):
    _, config = whole_run
    result = tiny.train("--config", config)
    assert result.returncode == 2
    assert "--resume auto" in result.stderr and "already holds a run" in result.stderr


@pytest.mark.slow
def test_a_finished_run_that_goes_on_says_what_changed_and_keeps_its_encoder(tmp_path):
    config = tiny.write_config(tmp_path)
    assert tiny.train("--config", config).returncode == 0
    first = (tmp_path / "run" / "encoder.safetensors").read_bytes()
    longer = ["run.epochs=3", "data.batch_size=8", "loss.vicreg.beta=0.01"]
    sets = [part for override in longer for part in ("--set", override)]
    refused = tiny.train("--config", config, "--resume", "auto", *sets)
    assert refused.returncode == 2 and "--accept-changes" in refused.stderr
    assert "run.epochs: 3, saved with 2" in refused.stderr
    result = tiny.train("--config", config, "--resume", "auto", "--accept-changes", *sets)
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stdout.splitlines() if "resumed with another" in line]
    changed = ["run.epochs:", "data.batch_size:", "loss.vicreg.beta:"]
    assert [line.split()[3] for line in told] == changed
    assert (tmp_path / "run" / "previous_encoder.safetensors").read_bytes() == first
    assert (tmp_path / "run" / "encoder.safetensors").read_bytes() != first


@pytest.mark.slow
def test_more_images_than_when_it_was_saved_are_told_by_number(tmp_path):
    config = tiny.write_config(tmp_path)
    assert tiny.train("--config", config).returncode == 0
    tiny.write_images(tmp_path / "images", count=48)
    refused = tiny.train("--config", config, "--resume", "auto")
    images = tmp_path / "images"
    assert refused.returncode == 2
    assert f"data.path: 48 images in {images}, saved with 40 images in {images}" in refused.stderr


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_built(tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny.write_config(tmp_path, run={"epochs": 2, "dir": str(tmp_path / "file")})
    result = tiny.train("--config", config)
    assert result.returncode == 2 and result.stderr.startswith("error: ")
    assert "file" in result.stderr and len(result.stderr.splitlines()) == 1


def interrupted(config, number, *args) -> subprocess.CompletedProcess:
    """A run sent a signal once it has logged a step."""
    command = [sys.executable, str(TRAIN), "--config", str(config), *args]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=tiny.environment()
    )
    first = process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=tiny.HANG_S)
    return subprocess.CompletedProcess(command, process.returncode, first + out, err)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_signal_saves_and_tells_how_to_go_on(heard_hangup, tmp_path, number):
    config = tiny.write_config(tmp_path, run={"epochs": 10000}, checkpoint={"every_steps": 0})
    result = interrupted(config, number)
    assert result.returncode == 0, result.stderr
    done = json.loads((checkpoint.latest(tmp_path / "run") / "state.json").read_text())["step"]
    assert done >= 1 and f"stopped after step {done}" in result.stdout
    assert f"{number.name}: stopping after this step" in result.stderr
    assert "resume with: python cjepa_fast/train.py" in result.stdout
    assert "--resume auto" in result.stdout and done in tiny.losses(tmp_path / "run")
    # The command as told, shortened, resumes from there and keeps the log whole.
    again = interrupted(config, number, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    steps = list(tiny.losses(tmp_path / "run"))
    assert steps[: done + 1] == list(range(1, done + 2))
    assert steps[-1] < 20000 and "stopped after step" in again.stdout  # not at its end


POISON = """
import sys, torch
from cjepa_fast import train
from cjepa_fast.model.jepa import JEPA

whole, calls = JEPA.forward, []
def poisoned(self, *args):
    terms = whole(self, *args)
    calls.append(1)
    step = (len(calls) - 1) // 2  # two micro-batches a step
    if str(step) in sys.argv[1].split(","):
        if sys.argv[2] == "loss":
            terms["loss"] = terms["loss"] * float("nan")
        else:  # a finite loss whose gradient is not
            terms["loss"] = terms["loss"] + (self.encoder.norm.weight.sum() * 0).sqrt()
    return terms
JEPA.forward = poisoned
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_changes_nothing(tmp_path, precision, what):
    script = tmp_path / "poison.py"
    script.write_text(POISON)
    config = tiny.write_config(
        tmp_path, run={"epochs": 2, "precision": precision}, checkpoint={"every_steps": 1}
    )
    result = tiny.run(script, "2", what, "--config", config)
    assert result.returncode == 0, result.stderr
    steps = tmp_path / "run" / "checkpoints"
    assert same_weights(steps / "step_00000002", steps / "step_00000003")
    assert not same_weights(steps / "step_00000003", steps / "step_00000004")
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1]
    bad = [json.loads(line) for line in (tmp_path / "run/bad_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in bad] == [3] and len(set(bad[0]["images"])) == 16


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 1])  # 1: checkpoints of the bad steps push the good one out
def test_too_many_bad_steps_stop_the_run_with_the_last_good_state(tmp_path, every):
    script = tmp_path / "poison.py"
    script.write_text(POISON)
    config = tiny.write_config(
        tmp_path,
        run={"epochs": 9, "max_bad_steps": 3},
        checkpoint={"every_steps": every, "keep": 1},
    )
    result = tiny.run(script, "2,3,4,5,6", "loss", "--config", config)
    assert result.returncode == 1
    assert "3 steps in a row" in result.stdout and "bad_steps.jsonl" in result.stdout
    saved = checkpoint.latest(tmp_path / "run")
    assert saved.name == "step_00000002"
    stored = checkpoint.StoredCheckpoint(saved)
    assert all(stored.whole(*key).isfinite().all() for key in stored.slices if key[0] == "master")


@pytest.mark.multiprocess
def test_two_ranks_and_a_resume_on_two_are_exact(tmp_path):
    config = tiny.write_config(tmp_path, checkpoint={"every_steps": 1, "keep": 9})
    whole = tiny.train("--config", config, ranks=2, fresh=True)
    assert whole.returncode == 0, whole.stderr
    held = tmp_path / "run" / "checkpoints" / "step_00000001"
    other = tmp_path / "resumed"
    result = tiny.train("--config", config, "--resume", held, "--set", f"run.dir={other}", ranks=2)
    assert result.returncode == 0, result.stderr
    whole, resumed = tiny.losses(tmp_path / "run"), tiny.losses(other)
    assert len(resumed) == 3 and all(resumed[step] == whole[step] for step in resumed)


@pytest.mark.multiprocess
def test_the_deepspeed_command_trains(tmp_path):
    """As the README has it, on two ranks; --local_rank comes from the launcher."""
    launcher = f"{sys.prefix}/bin/deepspeed"
    command = [launcher, "--num_gpus", "2", "--master_port", str(tiny.free_port()), str(TRAIN)]
    command += ["--config", tiny.write_config(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=tiny.environment(), timeout=tiny.HANG_S
    )
    assert result.returncode == 0, result.stderr
    assert "done: " in result.stdout and len(tiny.losses(tmp_path / "run")) == 4
