"""What a training leaves out, it names: in its folder, in its events, counted on the terminal."""

import json

import corrupt_images as made
import tiny
import torch

from cjepa_fast.data import decoder_choice
from cjepa_fast.telemetry import read_log


def test_every_name_is_in_the_run_s_folder(tmp_path):
    config = tiny.write_config(tmp_path, data={"max_skipped": 0.2})
    folder = tmp_path / "images" / "class_0"
    for i in range(30):
        made.write(folder / f"empty_{i}.jpg", b"")
    made.write(folder / "x\nerror: forged \x1b[31m.heic", b"\0\0\0\x18ftypheic" + bytes(99))
    made.write(folder / "late.jpg", made.damaged_tables(1))  # only the decoder finds it
    odd = made.encoded(made.picture(1)).replace(b"JFIF\0\1", b"JFIF\0\7")
    made.write(folder / "odd.jpg", odd)  # of which only libjpeg says anything
    done = tiny.train("--config", config)
    assert done.returncode == 0, done.stderr
    assert "JFIF" not in done.stderr and "ERROR" not in done.stderr
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "unusable.jsonl").read_text().splitlines()]
    why = {row["name"].removeprefix("class_0/"): row["why"] for row in rows}
    assert len(why) == len(rows) == 32 and why["late.jpg"] == "cannot be decoded"
    assert why["empty_7.jpg"] == "empty file"
    assert "31 of 73 images are left out (empty file: 30, HEIC" in done.stdout
    assert str(run / "unusable.jsonl") in done.stdout and "\x1b" not in done.stdout
    assert not any(line.startswith("error") for line in done.stdout.splitlines())
    said = [row["text"] for row in read_log(run / "events.jsonl")]
    assert any(text.startswith("31 images are left out (empty file: 30") for text in said)
    assert "bad image skipped: class_0/late.jpg: cannot be decoded" in said
    if decoder_choice.choose_decoder("auto", torch.device("cpu")) == decoder_choice.DALI:
        assert any("unknown JFIF revision" in text for text in said)
        assert any(text.startswith("the decoder warned ") for text in said)


def test_a_dry_run_whose_loss_is_not_finite_fails(tmp_path):
    config = tiny.write_config(tmp_path, data={"std": [1e-12, 1e-12, 1e-12]})
    done = tiny.train("--config", config, "--dry-run", "--set", "optim.lr=1e9")
    assert done.returncode == 1, done.stdout
    assert "not finite" in done.stderr and "Traceback" not in done.stderr
