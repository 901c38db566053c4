"""torchvision for the tests, also where its compiled operators do not load.

The package index's torchvision is built for CUDA: beside torch's CPU build it cannot be imported,
and whatever finds it installed (transformers does) fails with it. So `make install` lays it in a
folder of its own, and here the operator that its detectors need stands in plain PyTorch.
"""

import importlib.util
import sys
from pathlib import Path

import torch

ASIDE = Path(sys.prefix) / "torchvision"
_libraries = []  # an operator goes when its library does


def nms(boxes_n4: torch.Tensor, score_n: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """The boxes kept, best first: none overlaps a better one of them by more than the threshold."""
    from torchvision.ops import box_iou

    order = score_n.argsort(descending=True, stable=True)
    beaten_nn = (box_iou(boxes_n4[order], boxes_n4[order]) > iou_threshold).triu(1).numpy()
    kept = torch.ones(len(order), dtype=torch.bool).numpy()
    for i, beaten_n in enumerate(beaten_nn):
        if kept[i]:
            kept[beaten_n] = False
    return order[torch.from_numpy(kept)]


def available() -> bool:
    """Whether torchvision can be imported from here on."""
    if importlib.util.find_spec("torchvision"):
        return True
    if not ASIDE.is_dir():
        return False
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):  # torchvision registers fakes of both as it is imported
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    _libraries.append(library)
    sys.path.append(str(ASIDE))
    import torchvision.ops

    align = sys.modules["torchvision.ops.roi_align"]
    align._roi_align = align._roi_align.__wrapped__  # torchvision's plain version, not compiled
    torchvision.ops.boxes._assert_has_ops = lambda: None
    return True
