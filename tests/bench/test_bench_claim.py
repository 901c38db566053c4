"""The study of C-JEPA's claim: its scores, its lines and its tables."""

import argparse
import json
import sys

import pytest
import tiny
import torch

sys.path.insert(0, str(tiny.ROOT / "bench"))  # no package: its scripts import each other by name

import claim
import claim_report


def asked(**changes) -> argparse.Namespace:
    values = {"set": "cifar10", "length": 3, "final": False, "overrides": [], "seeds": [0]}
    return argparse.Namespace(**{**values, "data": "/a/folder/of/this/machine", **changes})


def test_scores_of_separable_features_are_perfect_and_of_noise_are_chance(seed):
    label_n = torch.arange(200) % 4
    apart_nD = 10 * torch.eye(4)[label_n] + 0.1 * torch.randn(200, 4)
    found = claim.scores((apart_nD, label_n, apart_nD.flip(0), label_n.flip(0)), 5, 0.07)
    assert all(found[name] == 100 for name in ("knn", "knn_centred", "ridge", "logistic"))
    noise = (torch.randn(200, 4), label_n, torch.randn(200, 4), label_n)
    assert all(claim.scores(noise, 5, 0.07)[name] < 50 for name in ("knn", "ridge", "logistic"))


def test_a_penalty_is_chosen_without_the_scored_images():
    """Only the fitted images decide: whatever is scored, the choice is the same."""
    torch.manual_seed(0)
    features_nD, label_n = torch.randn(100, 6), torch.arange(100) % 2
    choices = {
        claim.chosen_probe((features_nD, label_n, torch.randn(20, 6), torch.arange(20) % 2))[1]
        for _ in range(3)
    }
    assert len(choices) == 1


def test_a_penalty_is_chosen_on_the_classes_that_are_fitted(monkeypatch):
    """Also of images that come a class after the other, as those of folders do."""
    label_n, asked = torch.arange(100) // 10, []

    def top1(train_nD, train_n, test_mD, test_m, inverse_penalty):
        asked.append((train_n, test_m))
        assert torch.equal(train_nD[:, 0], train_n) and torch.equal(test_mD[:, 0], test_m)
        return -abs(inverse_penalty - 0.3)

    monkeypatch.setattr(claim.linear, "top1", top1)
    vectors = label_n[:, None].float(), label_n, label_n[:4, None].float(), label_n[:4]
    assert claim.chosen_probe(vectors)[1] == 0.3
    fitted, held = asked[0]
    assert (len(fitted), len(held)) == (80, 20)
    assert len(held.unique()) >= 8 and set(held.tolist()) <= set(fitted.tolist())
    both = torch.cat([fitted, held]).sort().values
    assert torch.equal(both, label_n) and torch.equal(asked[-1][0], label_n)


def test_a_line_names_no_folder_of_this_machine_and_is_found_again():
    args, about = asked(), {"commit": "of the start"}
    line = claim.record(args, "I-JEPA", 2, [], about)
    assert "/a/folder" not in json.dumps(line["on"]["command"])
    assert "--rows I-JEPA --seeds 2 --length 3" in line["on"]["command"]
    assert line["on"]["commit"] == "of the start"
    pixels = claim.record(args, "raw pixels", None, [], about)["on"]["command"]
    assert claim.parse(pixels.split()[2:]).rows == []  # they come with any row, so with none
    assert claim.same(line, args, "I-JEPA", 2) and not claim.same(line, args, "I-JEPA", 1)
    assert not claim.same(line, asked(final=True), "I-JEPA", 2)


def test_each_seed_has_its_untrained_encoder_and_all_share_the_pixels(tmp_path, monkeypatch):
    made = {"pixels": [], "untrained": [], "trained": [], "folders": set()}

    def line(args, row, seed):
        return claim.record(args, row, seed, [{"images": 0}], {})

    def pixels(args, ablation):
        made["pixels"].append(None)
        return line(args, "raw pixels", None)

    def untrained(args, ablation, seed):
        made["untrained"].append(seed)
        return line(args, "untrained", seed)

    def trained(args, ablation, trial):
        made["trained"].append((trial.row, trial.seed))
        trial.folder.mkdir(parents=True)
        made["folders"].add(trial.folder.name)
        return line(args, trial.row, trial.seed) | {"settings": ablation.rows[trial.row]}

    monkeypatch.setattr(claim, "pixels_record", pixels)
    monkeypatch.setattr(claim, "untrained_record", untrained)
    monkeypatch.setattr(claim, "trial_record", trained)
    own = {"data": tmp_path, "results": tmp_path, "work": tmp_path / "work", "rows": ["I-JEPA"]}
    for seeds in ([0], [0, 1]):
        claim.train(asked(**own, seeds=seeds))
    assert made["pixels"] == [None] and made["untrained"] == [0, 1]
    assert made["trained"] == [("I-JEPA", 0), ("I-JEPA", 1)]
    assert len(claim.lines_of(tmp_path / "cifar10.jsonl")) == 5
    assert not list((tmp_path / "work").iterdir())
    claim.train(asked(**own, overrides=["optim.lr=0.002"]))
    assert len(made["folders"]) == 3  # other overrides, another folder
    claim.train(asked(**{**own, "rows": []}, seeds=[2]))
    assert made["untrained"] == [0, 1, 0, 2] and len(made["trained"]) == 3


def test_a_row_that_has_changed_is_not_taken_for_the_one_that_was_trained(tmp_path):
    args = asked(rows=["I-JEPA"], data=tmp_path, results=tmp_path, work=tmp_path)
    lines = [claim.record(args, row, seed, [], {}) for row, seed in
             (("raw pixels", None), ("untrained", 0), ("I-JEPA", 0))]  # fmt: skip
    lines[-1]["settings"] = {"loss.vicreg.beta": 0.5}
    (tmp_path / "cifar10.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit, match=r"cifar10.jsonl:3: .*0\.5.*claim.json has"):
        claim.train(args)


def test_a_training_is_named_by_the_commit_it_started_from(tmp_path, monkeypatch):
    """Not by one that was made beside it."""
    now = ["start"]
    monkeypatch.setattr(claim, "provenance", lambda _: {"commit": now[0]})
    checked = []
    monkeypatch.setattr(claim.ablate, "check_folders", lambda *given: checked.append(given[2]))

    def start(*_):
        (tmp_path / "encoder.safetensors").touch()
        now[0] = "end"
        return argparse.Namespace(wait=lambda: 0)

    monkeypatch.setattr(claim.ablate, "start", start)
    monkeypatch.setattr(claim.configuration, "load_run", lambda _: None)
    monkeypatch.setattr(claim.ablate, "scores_of", lambda _: [{"step": 0}])
    ablation = argparse.Namespace(rows={"I-JEPA": {}})
    line = claim.trial_record(asked(), ablation, claim.ablate.Trial("I-JEPA", 0, tmp_path))
    assert line["on"]["commit"] == "start" and checked == ["--work"]


def test_another_checkout_s_package_is_refused(tmp_path):
    claim.require_own_package()
    with pytest.raises(SystemExit, match=f"this is {tmp_path}, but .* is of {tiny.ROOT}"):
        claim.require_own_package(tmp_path)


MEASURES = ("knn", "knn_centred", "ridge", "logistic", "rankme", "by_position")


def line_of(row: str, seed: int, *scores: float, overrides=(), start=1000, **settings) -> dict:
    readings = [
        {"images": start * (i + 1), **dict.fromkeys(MEASURES, score), "scored": 2400}
        for i, score in enumerate(scores)
    ]
    on = {"hardware": {"device": "a processor"}, "versions": {"torch": "2"}, "commit": "0123456789"}
    return {"row": row, "seed": seed, "set": "cifar10", "length": 3, "scored_on": "held",
            "overrides": list(overrides), "settings": settings or {"loss.vicreg.beta": 0},
            "readings": readings, "on": on}  # fmt: skip


def blocks(row: str, seed: int, *scores: float, **how) -> dict:
    settings = {"loss.vicreg.views": "blocks", "loss.vicreg.beta": 0.001}
    return line_of(row, seed, *scores, **how, **settings)


def page_of(written: list[dict], folder) -> str:
    (folder / "cifar10.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    assert claim_report.main() == 0
    return (folder / "README.md").read_text()


def test_the_table_pairs_the_seeds(tmp_path, monkeypatch):
    """Each with its standard error: the deviation over the root of the number of seeds."""
    monkeypatch.setattr(claim_report, "RESULTS", tmp_path)
    assert claim_report.main() == 1
    written = [line_of("I-JEPA", 0, 20, 30), line_of("I-JEPA", 1, 22, 32)]
    written += [blocks("blocks 0.001", 0, 21, 34), blocks("blocks 0.001", 1, 25, 38)]
    page = page_of(written, tmp_path)
    assert "| blocks 0.001 | 2 | 2,000 | 36.0 ± 2.0 (+5.0 ± 1.0) |" in page
    assert "| I-JEPA | 2 | 1,000 | 21.0 ± 1.0 |" in page
    assert "error of about 1.0 points" in page and "one of at most 1.4:" in page
    assert (tmp_path / "cifar10_3_held.png").stat().st_size > 5000


def test_headings_are_of_all_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(claim_report, "RESULTS", tmp_path)
    later = line_of("untrained", 1, 19, start=0)
    later["on"] |= {"hardware": {"device": "another"}, "versions": {"torch": "3"}}
    page = page_of([line_of("I-JEPA", 0, 20, 30), later], tmp_path)
    assert "up to 2,000 images\n\na processor, another; torch 2, 3; commits 0123456." in page


def test_scores_of_the_test_set_choose_no_row(tmp_path, monkeypatch):
    lines = [line_of("untrained", 0, 19, start=0), line_of("I-JEPA", 0, 20, 30)]
    lines += [blocks("blocks 0.001", 0, 21, 28), blocks("blocks 0.004", 0, 21, 29)]
    drawn = []
    monkeypatch.setattr(claim_report.seed_bands, "draw", lambda *given: drawn.append(given[3]))
    monkeypatch.setattr(claim_report.seed_bands, "legend", lambda *_: None)
    claim_report.draw(lines, tmp_path / "curves.png", chosen=True)
    assert drawn[:3] == ["I-JEPA", "blocks 0.001", "blocks 0.004"]


def test_a_row_with_overrides_is_a_row_of_its_own(tmp_path, monkeypatch):
    """Beside I-JEPA with the same ones, where that is there."""
    monkeypatch.setattr(claim_report, "RESULTS", tmp_path)
    other = {"overrides": ["optim.lr=0.002"]}
    written = [line_of("I-JEPA", 0, 20, 30), blocks("blocks 0.001", 0, 21, 34)]
    page = page_of([*written, blocks("blocks 0.001", 0, 41, 44, **other)], tmp_path)
    assert "| blocks 0.001 | 1 | 2,000 | 34.0 (+4.0) |" in page
    assert "| blocks 0.001 (optim.lr=0.002) | 1 | 2,000 | 44.0 | 44.0 |" in page
    written.append(line_of("I-JEPA", 0, 35, 40, **other))
    page = page_of([*written, blocks("blocks 0.001", 0, 41, 44, **other)], tmp_path)
    assert "| blocks 0.001 (optim.lr=0.002) | 1 | 2,000 | 44.0 (+4.0) | 44.0 (+4.0) |" in page


def test_a_row_is_compared_with_i_jepa_at_its_own_optimiser(tmp_path, monkeypatch):
    monkeypatch.setattr(claim_report, "RESULTS", tmp_path)
    faster = {"optim.lr": 0.002}
    written = [line_of("I-JEPA", 0, 20), blocks("blocks, faster", 0, 27, **faster)]
    assert "| blocks, faster | 1 | 1,000 | 27.0 (+7.0) |" in page_of(written, tmp_path)
    written.append(line_of("I-JEPA, faster", 0, 25, **{claim_report.BETA: 0}, **faster))
    page = page_of(written, tmp_path)
    assert "| blocks, faster | 1 | 1,000 | 27.0 (+2.0) |" in page
    assert "| I-JEPA, faster | 1 | 1,000 | 25.0 (+5.0) |" in page


def test_the_best_row_of_each_kind_is_drawn_from_the_untrained_encoder_on(tmp_path, monkeypatch):
    lines = [line_of("untrained", 0, 19, start=0), line_of("I-JEPA", 0, 20, 30)]
    lines += [line_of("I-JEPA, EMA from 0.99", 0, 25, 29), blocks("blocks 0.001", 0, 21, 28)]
    lines += [blocks("blocks 0.004", 0, 21, 29), blocks("blocks 0.004", 1, 21, 25)]
    sigreg = {"loss.regulariser": "sigreg", "loss.sigreg.views": "positions"}
    lines.append(line_of("SIGReg", 0, 1, 2, **sigreg, **{"model.init": "ijepa"}))
    best = claim_report.best_rows(claim_report.by_row(lines))
    assert [row for row, _ in best] == ["I-JEPA", "blocks 0.001", "SIGReg"]
    drawn, draw = {}, claim_report.seed_bands.draw

    def noted(axes, i, of, label, points):
        drawn.setdefault(label, []).append(points)
        draw(axes, i, of, label, points)

    monkeypatch.setattr(claim_report.seed_bands, "draw", noted)
    claim_report.draw(lines, tmp_path / "curves.png")
    assert {label: len(panels) for label, panels in drawn.items()} == dict.fromkeys(
        ["I-JEPA", "blocks 0.001", "SIGReg"], 3
    )
    assert drawn["I-JEPA"][0] == [([0, 1, 2], [19, 20, 30])]
    assert drawn["SIGReg"][0] == [([1, 2], [1, 2])]  # from another initialisation


def test_position_is_told_in_whole_percents():
    own = {0: line_of("I-JEPA", 0, 38.8)}
    assert claim_report.cell(own, own, "by_position", 0) == "39"
    assert claim_report.cell(own, own, "rankme", 0) == "38.8"


def test_every_row_of_the_study_has_a_kind():
    rows = json.loads((tiny.ROOT / "configs/ablations/claim.json").read_text())["rows"]
    kinds = {claim_report.family({"settings": settings}) for settings in rows.values()}
    assert kinds == {"I-JEPA", "positions", "context_target", "blocks", "tokens", "SIGReg",
                     "VICReg alone", "pooled and positions"}  # fmt: skip
