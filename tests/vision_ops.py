"""torchvision for the tests, also where its compiled operators do not load.

The package index's torchvision is built for CUDA. Beside torch's CPU build it cannot be imported,
and whatever finds it installed (transformers does) fails with it. So `make install` lays it in a
folder of its own, and `load` takes it from there. A fresh process tries its compiled operators
first: a library that does not fit may end the process that loads it. Only where that fails do the
two operators that its detectors need stand here in plain PyTorch: registered beside the compiled
ones, they would end the process.
"""

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

ASIDE = Path(sys.prefix) / "torchvision"
PROBE = """
import sys
sys.path += sys.argv[1:]
import torch, torchvision
box, score = torch.tensor([[0.0, 0, 8, 8]]), torch.ones(1)
assert torchvision.ops.nms(box, score, 0.5).tolist() == [0]
assert torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), [box], 2).shape == (1, 1, 2, 2)
"""
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


def installed() -> bool:
    """Whether torchvision lies somewhere; nothing is imported."""
    return importlib.util.find_spec("torchvision") is not None or ASIDE.is_dir()


def failure(folders: Sequence[str] = ()) -> str | None:
    """Why torchvision's compiled operators do not work in a process of their own, None if they do.

    folders: added to the end of its sys.path.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *folders], capture_output=True, text=True, timeout=200
    )
    lines = done.stderr.strip().splitlines()
    return f"exit {done.returncode}: {lines[-1] if lines else ''}" if done.returncode else None


@functools.cache
def load() -> str:
    """Have torchvision importable from here on, by its "compiled" operators or by "stand-ins"."""
    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(str(ASIDE))
    if failure([str(ASIDE)]) is None:
        return "compiled"
    stand_in()
    return "stand-ins"


def stand_in() -> None:
    """Import torchvision with the operators above instead of its own."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):  # torchvision registers fakes of both as it is imported
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    _libraries.append(library)
    import torchvision.ops

    sys.modules["torchvision.ops.roi_align"]._roi_align = roi_align
    torchvision.ops.boxes._assert_has_ops = lambda: None
