"""torchvision for the tests, also where its compiled operators do not load.

The package index's torchvision is built for CUDA: beside torch's CPU build it cannot be imported,
and whatever finds it installed (transformers does) fails with it. So `make install` lays it in a
folder of its own, and the two operators that its detectors need stand here in plain PyTorch.
"""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

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


def roi_align(maps_BCHW, rois_n5, scale, height, width, samples, aligned) -> torch.Tensor:
    """The mean of samples x samples points of each cell of each box: (n, C, height, width).

    Of boxes inside the image, `aligned` false. torchvision's own plain version takes 100 times as
    long to go backward.
    """
    samples = max(samples, 2)  # -1: as many as the box needs
    low_n2 = rois_n5[:, 1:3] * scale
    size_n2 = (rois_n5[:, 3:] * scale - low_n2).clamp(min=1)

    def points(axis: int, cells: int, side: int) -> torch.Tensor:
        """(n, cells * samples), from -1 to 1 over the map."""
        at = (torch.arange(cells * samples) + 0.5) / (cells * samples)
        return 2 * (low_n2[:, axis, None] + at * size_n2[:, axis, None]) / max(1, side - 1) - 1

    x, y = points(0, width, maps_BCHW.shape[3]), points(1, height, maps_BCHW.shape[2])
    found = maps_BCHW.new_zeros(len(rois_n5), maps_BCHW.shape[1], height, width)
    for b in rois_n5[:, 0].unique().long():
        mine = (rois_n5[:, 0] == b).nonzero().flatten()
        grid = torch.stack(torch.broadcast_tensors(x[mine, None, :], y[mine, :, None]), -1)
        read = F.grid_sample(
            maps_BCHW[b][None], grid.flatten(0, 1)[None], padding_mode="border", align_corners=True
        )
        cells = F.avg_pool2d(read, samples)[0].unflatten(1, (-1, height)).transpose(0, 1)
        found = found.index_copy(0, mine, cells)
    return found


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

    sys.modules["torchvision.ops.roi_align"]._roi_align = roi_align
    torchvision.ops.boxes._assert_has_ops = lambda: None
    return True
