"""COCO's average precision: against a hand-computed case and pycocotools run by hand."""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import rectangles
import torch

from cjepa_fast.data.sets.coco import Coco
from cjepa_fast.eval.dense.average_precision import as_results, average_precision
from cjepa_fast.eval.dense.detect import open_split

pytest.importorskip("pycocotools", reason="pycocotools is an extra (detect)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = rectangles.write(tmp_path_factory.mktemp("coco"), "train", count=6, seed=1)
    return rectangles.write(folder, "val", count=3, seed=2)


def exact(coco: Coco) -> list[dict]:
    """What is annotated, as if it had been detected."""
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.9,
         "bbox": a["bbox"], "segmentation": coco.api.annToRLE(a)}
        for a in coco.api.anns.values()
    ]  # fmt: skip


def assert_perfect(coco: Coco) -> None:
    for kind in ("box", "mask"):
        found = average_precision(coco, exact(coco), kind)
        assert found == {f"{name}_{kind}": pytest.approx(100) for name in ("ap", "ap50", "ap75")}


def test_perfect_detections_have_100_percent_and_none_have_0(folder):
    coco = open_split(folder, "val")
    assert_perfect(coco)
    assert set(average_precision(coco, [], "box").values()) == {0.0}


@pytest.mark.parametrize("name", ["coco_sample/test_coco", "voc_style_sample/coco_annotations"])
def test_perfect_detections_of_real_annotations(name):
    if not (real := os.environ.get("CJEPA_REAL_DENSE")):
        pytest.skip("CJEPA_REAL_DENSE names no folder of real images with labels for each pixel")
    folder = Path(real) / "misc" / Path(name).parent
    assert_perfect(open_split(folder, f"{Path(name).name}.json"))


def test_average_precision_of_a_hand_computed_case(folder, tmp_path):
    """One of two objects found, with IoU 0.6; above it in score a detection of nothing."""
    content = json.loads((folder / "annotations/instances_val.json").read_text())
    annotation = {"image_id": 100, "category_id": 3}
    content["annotations"] = [
        {**annotation, "id": 1, "bbox": [0, 0, 10, 10]},
        {**annotation, "id": 2, "bbox": [30, 20, 10, 10]},
    ]
    (tmp_path / "x.json").write_text(json.dumps(content))
    coco = Coco(tmp_path / "x.json", folder / "val")
    results = [
        {**annotation, "score": 0.9, "bbox": [15, 0, 5, 5]},
        {**annotation, "score": 0.8, "bbox": [30, 20, 10, 6]},
    ]
    # Precision 1/2 at 51 of the 101 recalls (0 to 0.5), for 3 of the 10 thresholds (0.5 to 0.6).
    at_one = 100 * 51 / 101 / 2
    expected = {"ap_box": at_one * 3 / 10, "ap50_box": at_one, "ap75_box": 0}
    assert average_precision(coco, results, "box") == pytest.approx(expected)


def test_average_precision_is_pycocotools_own(folder, tmp_path, seed):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco, results = open_split(folder, "train"), []
    for result in exact(coco) * 3:
        shift = torch.randint(-4, 5, (4,)).tolist()
        box = [x + d for x, d in zip(result["bbox"], shift, strict=True)]
        results.append({**result, "bbox": box, "score": float(torch.rand(()))})
    (tmp_path / "results.json").write_text(
        json.dumps([{k: v for k, v in r.items() if k != "segmentation"} for r in results])
    )
    content = json.loads(coco.file.read_text())
    for annotation in content["annotations"]:
        annotation["id"] += 1  # 0 counts as no match in COCOeval
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "truth.json"))
        evaluator = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    found = average_precision(coco, results, "box")
    assert list(found.values()) == pytest.approx((100 * evaluator.stats[:3]).tolist())
    assert 0 < found["ap_box"] < 100


def test_detections_as_results(folder):
    coco = open_split(folder, "val")
    masks = torch.zeros(1, 1, 40, 56)
    masks[0, 0, 5:20, 10:30], masks[0, 0, :, 50] = 0.5, 0.49
    found = {"boxes": torch.tensor([[10.0, 5, 30, 20]]), "labels": torch.tensor([2]),
             "scores": torch.tensor([0.75]), "masks": masks}  # fmt: skip
    (result,) = as_results(coco, 0, found)
    json.dumps(result)
    mask = coco.api.annToMask(result)
    assert mask[5:20, 10:30].all() and mask.sum() == 15 * 20
    plain = {"image_id": 100, "category_id": 7, "bbox": [10, 5, 20, 15], "score": 0.75}
    assert {**result, "segmentation": None} == {**plain, "segmentation": None}
