"""Label propagation: a video's first label map carried along by the likeness of patch features.

DINO's protocol (Caron et al. 2021, arXiv 2104.14294, after Jabri et al. 2020): a patch takes the
labels of the patches most like it, in the first frame and the last few, near its own position.
Shapes: rows x cols = N patches of a frame, S source frames, D width, K labels (background and
objects), T target patches of a part, M patches of a frame that the part can reach.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

AFFINITY_BYTES = 2**28  # similarities held at once; a row of patches is the least


def propagate(
    features: Iterable[torch.Tensor],
    first_NK: torch.Tensor,
    grid: tuple[int, int],
    *,
    topk: int = 5,
    context: int = 7,
    radius: int = 12,
    temperature: float = 0.1,
) -> Iterator[torch.Tensor]:
    """Soft labels (N, K) of each frame but the first, as its features come in.

    features: (N, D) a frame, the first among them; first_NK: the first frame's labels; context: how
    many frames before a target serve, beside the first; radius: in patches, in rows and in columns.
    """
    features = iter(features)
    first = F.normalize(next(features), dim=-1), first_NK
    recent: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=context)
    for feature_ND in features:
        target_ND = F.normalize(feature_ND, dim=-1)
        source_SND, label_SNK = (torch.stack(x) for x in zip(first, *recent, strict=True))
        label_NK = carry(
            target_ND, source_SND, label_SNK, grid, topk=topk, radius=radius,
            temperature=temperature,
        )  # fmt: skip
        recent.append((target_ND, label_NK))
        yield label_NK


def carry(
    target_ND: torch.Tensor,
    source_SND: torch.Tensor,
    label_SNK: torch.Tensor,
    grid: tuple[int, int],
    *,
    topk: int,
    radius: int,
    temperature: float,
) -> torch.Tensor:
    """Labels (N, K): of the `topk` most similar patches within the radius, over all the sources,
    weighted by the softmax of similarity / temperature. Features have unit length.

    Made by some rows of the grid at a time, each against the rows that it can reach.
    """
    rows, cols = grid
    reach = min(rows, 2 * radius + 1)
    step = max(1, AFFINITY_BYTES // (4 * len(source_SND) * cols * cols * reach) - 2 * radius)
    parts = []
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        low, high = max(0, top - radius), min(rows, bottom + radius)
        source_SMD = source_SND[:, low * cols : high * cols]
        label_SMK = label_SNK[:, low * cols : high * cols]
        similarity_TSM = torch.einsum(
            "td,smd->tsm", target_ND[top * cols : bottom * cols], source_SMD
        )
        far_TM = ~_near((top, bottom), (low, high), cols, radius, target_ND.device)
        similarity_TSM.div_(temperature).masked_fill_(far_TM[:, None], -torch.inf)
        best_Tk, index_Tk = similarity_TSM.flatten(1).topk(min(topk, label_SMK[..., 0].numel()))
        chosen_TkK = label_SMK.flatten(0, 1)[index_Tk]
        parts.append((best_Tk.softmax(1)[..., None] * chosen_TkK).sum(1))
    return torch.cat(parts)


def _near(targets, sources, cols: int, radius: int, device) -> torch.Tensor:
    """Which source patches lie within the radius of a target, by rows and by columns: (T, M) bool.

    targets, sources: ranges of rows, as (first, end).
    """
    row_T, row_M = (torch.arange(*span, device=device) for span in (targets, sources))
    col = torch.arange(cols, device=device)
    rows_near = (row_T[:, None] - row_M).abs() <= radius
    cols_near = (col[:, None] - col).abs() <= radius
    near_4d = rows_near[:, None, :, None] & cols_near[None, :, None, :]
    return near_4d.flatten(2).flatten(0, 1)


def patch_labels(labels_HW: np.ndarray, grid: tuple[int, int], count: int) -> torch.Tensor:
    """A label map as one label a patch, that of its centre: (N, count) fp32, one-hot."""
    rows, cols = grid
    small = Image.fromarray(labels_HW).resize((cols, rows), Image.Resampling.NEAREST)
    return F.one_hot(torch.from_numpy(np.array(small)).long().flatten(), count).float()


def frame_labels(
    label_NK: torch.Tensor, grid: tuple[int, int], patch_size: int, size: tuple[int, int]
) -> np.ndarray:
    """Soft labels as a label map of `size`: (H, W) uint8.

    Each label's map is upsampled (bilinear) to the pixels that the encoder saw and spread over 0 to
    1, then the highest wins, and the nearest pixel is taken for the frame's own size.
    """
    maps_K = label_NK.T.unflatten(1, grid)[None]
    maps_KHW = F.interpolate(maps_K, scale_factor=patch_size, mode="bilinear")[0]
    maps_KHW = maps_KHW - maps_KHW.amin((1, 2), keepdim=True)
    maps_KHW = maps_KHW / maps_KHW.amax((1, 2), keepdim=True).clamp(min=1e-12)
    won_HW = Image.fromarray(maps_KHW.argmax(0).to(torch.uint8).cpu().numpy())
    return np.array(won_HW.resize(size[::-1], Image.Resampling.NEAREST))
