"""The study of C-JEPA's claim: its scores, its lines and its tables."""

import argparse
import json
import sys

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
    args = asked()
    line = claim.record(args, "I-JEPA", 2, [])
    assert "/a/folder" not in json.dumps(line["on"]["command"])
    assert "--rows I-JEPA --seeds 2 --length 3" in line["on"]["command"]
    assert claim.same(line, args, "I-JEPA", 2) and not claim.same(line, args, "I-JEPA", 1)
    assert not claim.same(line, asked(final=True), "I-JEPA", 2)


def line_of(row: str, seed: int, *scores: float) -> dict:
    measures = ("knn", "knn_centred", "ridge", "logistic", "rankme", "by_position")
    readings = [
        {"images": 1000 * (i + 1), **dict.fromkeys(measures, score), "scored": 2400}
        for i, score in enumerate(scores)
    ]
    on = {"hardware": {"device": "a processor"}, "versions": {"torch": "2"}, "commit": "0123456789"}
    return {"row": row, "seed": seed, "set": "cifar10", "length": 3, "scored_on": "held",
            "readings": readings, "on": on}  # fmt: skip


def test_the_table_pairs_the_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(claim_report, "RESULTS", tmp_path)
    assert claim_report.main() == 1
    written = [line_of("I-JEPA", 0, 20, 30), line_of("I-JEPA", 1, 22, 32)]
    written += [line_of("blocks 0.001", 0, 21, 34), line_of("blocks 0.001", 1, 25, 38)]
    (tmp_path / "cifar10.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    assert claim_report.main() == 0
    page = (tmp_path / "README.md").read_text()
    assert "| blocks 0.001 | 2 | 2,000 | 36.0 ± 2.8 (+5.0 ± 1.4) |" in page
    assert "| I-JEPA | 2 | 1,000 | 21.0 ± 1.4 |" in page and "about 1.0." in page
    assert (tmp_path / "cifar10_3_held.png").stat().st_size > 5000
