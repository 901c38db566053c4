"""COCO's average precision of boxes and masks, by pycocotools, and what it needs of detections."""

import contextlib
import io

import numpy as np
import torch

from cjepa_fast.data.sets.coco import Coco
from cjepa_fast.telemetry.progress import shown_clock

KINDS = {"box": ("bbox", "bbox"), "mask": ("segm", "segmentation")}  # pycocotools' word, the key
MASK_THRESHOLD = 0.5


def as_results(coco: Coco, index: int, found: dict[str, torch.Tensor]) -> list[dict]:
    """torchvision's detections on image `index` as entries of COCO's result format.

    found: "boxes" (n, 4) as x1, y1, x2, y2 in the image's pixels, "labels" (n,), "scores" (n,) and
    perhaps "masks" (n, 1, H, W), the probability of each pixel.
    """
    boxes_n4 = found["boxes"].double().cpu()
    boxes_n4[:, 2:] -= boxes_n4[:, :2]
    results = [
        {"image_id": coco.ids[index], "category_id": coco.category_ids[label - 1],
         "bbox": box, "score": score}
        for box, label, score in zip(
            boxes_n4.tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
        )
    ]  # fmt: skip
    if "masks" in found:
        for result, rle in zip(results, _encoded(found["masks"][:, 0]), strict=True):
            result["segmentation"] = rle
    return results


def _encoded(masks_nHW: torch.Tensor) -> list[dict]:
    from pycocotools import mask

    planes_HWn = (masks_nHW >= MASK_THRESHOLD).byte().permute(1, 2, 0).cpu().numpy()
    encoded = mask.encode(np.asfortranarray(planes_HWn))
    return [{**rle, "counts": rle["counts"].decode("ascii")} for rle in encoded]


def average_precision(coco: Coco, results: list[dict], kind: str) -> dict[str, float | None]:
    """Percent, by name: "ap_box" over IoU 0.5 to 0.95, "ap50_box", "ap75_box"; so too of "mask".

    kind: "box" or "mask". None where nothing is annotated that counts.
    """
    from pycocotools.cocoeval import COCOeval

    names = [f"{name}_{kind}" for name in ("ap", "ap50", "ap75")]
    if not results:
        return dict.fromkeys(names, 0.0)
    word, key = KINDS[kind]
    # With a box beside it, a mask would be sorted into small, medium and large by the box's area.
    kept = ("image_id", "category_id", "score", key)
    with shown_clock(f"average precision, {kind}"), contextlib.redirect_stdout(io.StringIO()):
        found = coco.api.loadRes([{name: result[name] for name in kept} for result in results])
        evaluator = COCOeval(coco.api, found, word)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats = evaluator.stats[:3].tolist()
    return {n: 100 * x if x >= 0 else None for n, x in zip(names, stats, strict=True)}
