"""DAVIS: how well frozen patch features carry the objects of a first frame through a video.

propagate.py carries the labels and jf_score.py measures them. Each object counts alike, whichever
sequence it is from.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cjepa_fast.data.sets.davis import Clip, open_davis
from cjepa_fast.data.sets.labelmaps import colours, write_label_map
from cjepa_fast.data.whole_images import WholeImages, ahead
from cjepa_fast.eval.dense import jf_score
from cjepa_fast.eval.dense.propagate import frame_labels, patch_labels, propagate
from cjepa_fast.eval.dense.resize import fitted, normalised, resized
from cjepa_fast.eval.figures.style import STYLE, save
from cjepa_fast.eval.options import above_zero, add_checkpoint, positive, rgb_encoders_of
from cjepa_fast.eval.records import report
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.distributed import all_gather_objects, rank, world_size
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.telemetry.progress import shown_bar

FRAMES_AT_ONCE = 4  # decoded and encoded together
HEADINGS = {
    "objects": "objects",
    "jf": "J&F %",
    "j": "J",
    "j_recall": "J recall",
    "j_decay": "J decay",
    "f": "F",
    "f_recall": "F recall",
    "f_decay": "F decay",
}
SETTINGS = ("data", "short_side", "topk", "context", "radius", "temperature", "bf16")


@torch.inference_mode()
def follow(
    encoder: Encoder,
    clip: Clip,
    *,
    short_side: int,
    threads: int = 2,
    bf16: bool = False,
    **options,
) -> list[np.ndarray]:
    """The label map of each frame, (H, W) uint8: the first as it is given, the others found.

    short_side: of the frames that the encoder sees, in pixels; options: as of `propagate`.
    Raises ValueError for a label map of another size than its frame.
    """
    batches = ahead(_batches(clip, threads))
    first = next(batches)
    frame_size = tuple(first[0].shape[1:])
    size = fitted(frame_size, short_side, encoder.patch_size)
    grid = (size[0] // encoder.patch_size, size[1] // encoder.patch_size)
    given_HW = labels_of(clip, 0, frame_size)
    device = next(encoder.parameters()).device

    def features() -> Iterator[torch.Tensor]:
        for images in (first, *batches):
            images_BCHW = torch.stack([resized(image.to(device), size) for image in images])
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                tokens_BND = encoder(normalised(images_BCHW, encoder))
            yield from tokens_BND.float()

    labels_NK = patch_labels(given_HW, grid, clip.objects + 1).to(device)
    soft = propagate(features(), labels_NK, grid, **options)
    return [
        given_HW,
        *(frame_labels(label_NK, grid, encoder.patch_size, frame_size) for label_NK in soft),
    ]


def _batches(clip: Clip, threads: int) -> Iterator[list[torch.Tensor]]:
    decode = WholeImages(FRAMES_AT_ONCE, threads)
    for start in range(0, len(clip.frames), FRAMES_AT_ONCE):
        paths = clip.frames[start : start + FRAMES_AT_ONCE]
        yield decode([path.read_bytes() for path in paths], [str(path) for path in paths])


def labels_of(clip: Clip, t: int, frame_size: tuple[int, int]) -> np.ndarray:
    """A frame's annotation. Raises ValueError where it does not fit the frame."""
    labels_HW = clip.labels(t)
    if labels_HW.shape != frame_size:
        raise ValueError(
            f"{clip.masks[t]} is {labels_HW.shape[1]}x{labels_HW.shape[0]}, "
            f"its frame {frame_size[1]}x{frame_size[0]}: they must be of one size"
        )
    return labels_HW


def measure(clip: Clip, found: list[np.ndarray]) -> list[dict[str, float]]:
    """The benchmark's measures in percent, of each object; `found`: as from `follow`."""
    values_TO2 = []
    for t in range(1, len(found) - 1):
        truth_HW = labels_of(clip, t, found[t].shape)
        pairs = [(truth_HW == k, found[t] == k) for k in range(1, clip.objects + 1)]
        values_TO2.append([(jf_score.region(*pair), jf_score.boundary(*pair)) for pair in pairs])
    return [_percent(*values_2T) for values_2T in np.array(values_TO2).transpose(1, 2, 0)]


def _percent(j_T: np.ndarray, f_T: np.ndarray) -> dict[str, float]:
    values = {}
    for name, values_T in (("j", j_T), ("f", f_T)):
        numbers = zip(("", "_recall", "_decay"), jf_score.statistics(values_T), strict=True)
        values |= {f"{name}{suffix}": 100 * number for suffix, number in numbers}
    return {"jf": (values["j"] + values["f"]) / 2, **values}


def mean_of(objects: list[dict[str, float]]) -> dict[str, float]:
    return {"objects": len(objects)} | {
        key: float(np.mean([values[key] for values in objects])) for key in objects[0]
    }


def evaluate(encoder: Encoder, clips: list[Clip], save_to: Path | None, **options):
    """The measures of all sequences by name, and the label maps of three frames of each.

    The ranks take turns at the sequences. save_to: a folder for the label maps found, in the
    layout of a submission; options: as of `follow`.
    """
    measured, maps = {}, {}
    mine = clips[rank() :: world_size()]
    with shown_bar(len(mine), "sequences", unit="sequence") as bar:
        for clip in mine:
            found = follow(encoder, clip, **options)
            measured[clip.name] = measure(clip, found)
            maps[clip.name] = {t: found[t] for t in moments(clip)}
            if save_to:
                for path, labels_HW in zip(clip.masks, found, strict=True):
                    write_label_map(save_to / clip.name / path.name, labels_HW)
            bar.update()
    shares = all_gather_objects((measured, maps))
    objects = {clip.name: next(m[clip.name] for m, _ in shares if clip.name in m) for clip in clips}
    return objects, {name: found for _, share in shares for name, found in share.items()}


def moments(clip: Clip) -> tuple[int, int, int]:
    """The first, middle and last frame."""
    return 0, len(clip.frames) // 2, len(clip.frames) - 1


def draw(clips: list[Clip], found: dict[str, dict], out: Path | str) -> Path:
    """A row for each sequence and encoder: three frames, the objects found in colour, the true
    outlines in white. found: by the encoder's name, then as `evaluate` gives it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    decode = WholeImages(3, 1)
    rows = [(clip, name) for clip in clips for name in found]
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 1.75 * len(rows) + 0.5), layout="constrained")
        axes_rc = figure.subplots(len(rows), 3, squeeze=False)
        for (clip, name), axes_c in zip(rows, axes_rc, strict=True):
            paths = [clip.frames[t] for t in moments(clip)]
            images = decode([path.read_bytes() for path in paths], list(map(str, paths)))
            for t, image_3HW, axes in zip(moments(clip), images, axes_c, strict=True):
                image_HW3 = image_3HW.permute(1, 2, 0).numpy()
                axes.imshow(overlaid(image_HW3, clip.labels(t), found[name][clip.name][t]))
                axes.set_title(f"{clip.name}, frame {t}" + (f": {name}" if t else ": given"))
                axes.set_axis_off()
        figure.suptitle("Objects carried along by patch features; white: the true outlines")
        return save(figure, out)


def overlaid(image_HW3: np.ndarray, truth_HW: np.ndarray, found_HW: np.ndarray) -> np.ndarray:
    """The picture with the labels found in their colours and the true outlines in white."""
    tinted = image_HW3 * 0.45 + colours()[found_HW] * 0.55
    picture = np.where(found_HW[..., None] > 0, tinted, image_HW3).astype(np.uint8)
    for number in np.unique(truth_HW[truth_HW > 0]):
        picture[jf_score.edges(truth_HW == number)] = 255
    return picture


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--data", required=True, metavar="DAVIS", help="JPEGImages, Annotations")
    parser.add_argument("--short-side", type=positive, default=480, help="frames' pixels")
    parser.add_argument("--topk", type=positive, default=5, help="patches that are followed")
    parser.add_argument("--context", type=positive, default=7, help="frames, with the first")
    parser.add_argument("--radius", type=positive, default=12, help="in patches")
    parser.add_argument("--temperature", type=above_zero, default=0.1)
    parser.add_argument("--bf16", action="store_true", help="the encoder in bf16")
    parser.add_argument("--threads", type=positive, default=2, help="decoding threads")
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="label maps: FOLDER/ENCODER/SEQ"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="figure of some sequences")
    parser.add_argument("--count", type=positive, default=4, help="sequences in the figure")


def run(args: argparse.Namespace) -> None:
    """A row for each encoder: the mean over all objects, and the measures of each sequence."""
    clips = open_davis(args.data)
    names = ("short_side", "topk", "context", "radius", "temperature", "bf16", "threads")
    options = {name: getattr(args, name) for name in names}
    rows, found = [], {}
    for name, encoder in rgb_encoders_of(args).items():
        save_to = args.save / name if args.save else None
        objects, found[name] = evaluate(encoder.to(default_device()), clips, save_to, **options)
        encoder.cpu()
        mean = mean_of([values for each in objects.values() for values in each])
        sequences = {clip: {**mean_of(each), "each": each} for clip, each in objects.items()}
        rows.append({"encoder": name, **mean, "sequences": sequences})
    drawn = None
    if args.out and rank() == 0:
        drawn = draw(clips[: args.count], found, args.out)
    report(args, rows, HEADINGS, SETTINGS, figure=drawn)
