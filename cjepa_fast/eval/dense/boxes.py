"""Figures of what is annotated on images and what was detected: boxes, masks and names."""

from pathlib import Path

import numpy as np

from cjepa_fast.data.sets.coco import Coco
from cjepa_fast.eval.figures.style import STYLE, save

SHOWN_SCORE, SHOWN_COUNT = 0.5, 20  # detections drawn: from this score on, the best at most


def draw(coco: Coco, results: list[dict], out: Path | str, count: int, title: str) -> Path:
    """A row for each of `count` images spread over the split: annotated, then detected.

    results: in COCO's result format. Returns the file written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    indices = np.unique(np.linspace(0, len(coco) - 1, min(count, len(coco))).round().astype(int))
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4 * len(indices) + 0.5), layout="constrained")
        axes_r2 = figure.subplots(len(indices), 2, squeeze=False)
        for (left, right), i in zip(axes_r2, indices, strict=True):
            image = coco.picture(i)
            _show(left, coco, image, coco.objects(i), "annotated")
            found = [r for r in results if r["image_id"] == coco.ids[i]]
            found = sorted(found, key=lambda r: -r["score"])[:SHOWN_COUNT]
            sure = [r for r in found if r["score"] >= SHOWN_SCORE]
            _show(right, coco, image, sure, f"{len(sure)} detected, score {SHOWN_SCORE} or more")
        figure.suptitle(title)
        return save(figure, out)


def _show(axes, coco: Coco, image, entries: list[dict], title: str) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shown = np.asarray(image) / 255
    for entry in entries:
        label = coco.label[entry["category_id"]]
        colour = np.array(colormaps["tab20"](2 * label % 20 + 2 * label // 20 % 2)[:3])
        x, y, width, height = entry["bbox"]
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, lw=1.2))
        score = f" {entry['score']:.2f}" if "score" in entry else ""
        label_style = {"fc": colour, "ec": "none", "pad": 0.8, "alpha": 0.85}
        axes.text(
            x, y, coco.names[label - 1] + score, color="white", size=6, va="top",
            bbox=label_style, clip_on=True,
        )  # fmt: skip
        if entry.get("segmentation"):
            mask_HW1 = coco.api.annToMask(entry).astype(bool)[..., None]
            shown = np.where(mask_HW1, 0.55 * shown + 0.45 * colour, shown)
    axes.imshow(shown, extent=(0, image.width, image.height, 0))  # a box's 0 is an edge
    axes.set_title(title)
    axes.set_axis_off()
