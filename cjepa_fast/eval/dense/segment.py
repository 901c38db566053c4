"""Semantic segmentation: a linear head on frozen patch features, or UPerNet, fine-tuned.

Shapes: C classes, n images of a figure.
"""

import argparse
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cjepa_fast.data.sets.labelmaps import colours, read_label_map
from cjepa_fast.data.sets.pairs import (
    IGNORE,
    TRAINING,
    VALIDATION,
    Classes,
    Pairs,
    classes_of,
    is_ade20k,
    named_classes,
    open_pairs,
)
from cjepa_fast.data.sources import LIMITS
from cjepa_fast.data.whole_images import WholeImages, ahead
from cjepa_fast.eval.dense.confusion import confusion, scores
from cjepa_fast.eval.dense.resize import fitted, normalised, resized
from cjepa_fast.eval.dense.segment_training import Recipe, train
from cjepa_fast.eval.dense.segmenter import Segmenter, logits_sliding, logits_whole
from cjepa_fast.eval.figures.style import STYLE, save
from cjepa_fast.eval.options import (
    above_zero,
    add_checkpoint,
    from_zero,
    positive,
    rgb_encoders_of,
    up_to_one,
)
from cjepa_fast.eval.records import report
from cjepa_fast.runtime.distributed import all_gather_objects, rank, world_size
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.telemetry.progress import shown_bar

HEADINGS = {
    "train_images": "train",
    "test_images": "test",
    "classes": "classes",
    "miou": "mIoU %",
    "macc": "mAcc %",
    "aacc": "aAcc %",
}
# The heads' usual settings on ADE20K: DINOv2's for the linear one, MAE's for UPerNet.
RECIPES = {
    "linear": {
        "steps": 40_000, "lr": 1e-3, "weight_decay": 1e-4, "layer_decay": 1.0, "drop_path": 0.0,
    },
    "upernet": {
        "steps": 160_000, "lr": 1e-4, "weight_decay": 0.05, "layer_decay": 0.65, "drop_path": 0.1,
    },
}  # fmt: skip
WARMUP = 1500  # steps, or a tenth of them where that is less
SIDE = 512  # pixels: the short side, and about the crop's
SETTINGS = (
    "data", "head", "layers", "frozen", "steps", "batch_size", "lr", "weight_decay", "layer_decay",
    "drop_path", "short_side", "crop_size", "plain_colours", "slide", "ignore_index", "bf16",
    "seed",
)  # fmt: skip
IGNORED = "count nowhere, beside 255; default: 0 for ADE20K's folders, else none"
SHOWN_CLASSES = 24  # in a legend


@torch.inference_mode()
def evaluate(
    model: Segmenter, pairs: Pairs, classes: Classes, *, short_side: int, window: int | None = None,
    stride: int | None = None, threads: int = 2, bf16: bool = False, keep: tuple[int, ...] = (),
) -> tuple[np.ndarray, dict[int, np.ndarray]]:  # fmt: skip
    """The confusion matrix (C, C) over all images at their own sizes, and the classes found of
    those in `keep`, (H, W) uint8 each.

    stride: of windows of that side; None: each image whole.
    """
    model.eval()
    device = next(model.parameters()).device
    matrix_CC, kept = np.zeros((len(classes),) * 2, dtype=np.int64), {}
    share = range(rank(), len(pairs), world_size())
    with shown_bar(len(share), "evaluation") as bar:
        for i, image, labels_HW in ahead(_read(pairs, classes, share, threads)):
            size = fitted(labels_HW.shape, short_side, model.encoder.patch_size)
            images_BCHW = normalised(resized(image.to(device), size)[None], model.encoder)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                if stride:
                    logits = logits_sliding(model, images_BCHW, window, stride)
                else:
                    logits = logits_whole(model, images_BCHW)
            fine = F.interpolate(logits, labels_HW.shape, mode="bilinear")
            found_HW = fine[0].argmax(0).to(torch.uint8).cpu().numpy()
            matrix_CC += confusion(labels_HW, found_HW, len(classes), IGNORE)
            if i in keep:
                kept[i] = found_HW
            bar.update()
    shares = all_gather_objects((matrix_CC, kept))
    return sum(matrix for matrix, _ in shares), {
        i: x for _, part in shares for i, x in part.items()
    }


def _read(pairs: Pairs, classes: Classes, share: range, threads: int):
    decode = WholeImages(1, threads)
    for i in share:
        (image_3HW,) = decode([pairs.images.read(i)], [pairs.image_name(i)])
        yield i, image_3HW, pairs.labels(i, classes)


# ---------------------------------------------------------------------------------------- classes


def find_classes(root: str, pairs: Pairs, ignored: set[int]) -> Classes:
    """From the list beside the images, or else from all training label maps."""
    named = named_classes(root)
    if named is None:
        seen = np.zeros(256, dtype=bool)
        with shown_bar(len(pairs), "classes") as bar:
            for path in pairs.masks:
                seen[np.unique(read_label_map(path))] = True
                bar.update()
        named = {int(number): f"class {number}" for number in np.flatnonzero(seen)}
    return classes_of(named, ignored)


def check(pairs: Pairs, classes: Classes) -> None:
    """Read all label maps, so that a wrong one ends the work before its hours rather than after.
    The ranks share them. Raises as `Pairs.labels` does."""
    share = range(rank(), len(pairs), world_size())
    with shown_bar(len(share), "label maps") as bar:
        for i in share:
            pairs.labels(i, classes)
            bar.update()


# ---------------------------------------------------------------------------------------- figure


def draw(
    pairs: Pairs, classes: Classes, found: dict[str, dict[int, np.ndarray]], out: Path | str
) -> Path:
    """A row an image: the image, the truth, what each encoder's head found; and a legend.

    found: by encoder, then by the image's position, as `evaluate` gives it. Ignored pixels of the
    truth are black.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    images = sorted(next(iter(found.values())))
    names = ["image", "truth", *(f"found: {name}" for name in found)]
    seen = np.zeros(len(classes), dtype=bool)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.5 * len(names), 1.9 * len(images) + 1.2), layout="constrained")
        axes_rc = figure.subplots(len(images), len(names), squeeze=False)
        for axes_c, (i, image, truth_HW) in zip(
            axes_rc, _read(pairs, classes, images, 1), strict=True
        ):
            maps = [truth_HW, *(maps[i] for maps in found.values())]
            for labels_HW in maps:
                seen[np.unique(labels_HW[labels_HW != IGNORE])] = True
            shown = [image.permute(1, 2, 0).numpy(), *map(coloured, maps)]
            for axes, name, panel in zip(axes_c, names, shown, strict=True):
                axes.imshow(panel, interpolation="nearest")
                axes.set_title(name)
                axes.set_axis_off()
        listed = np.flatnonzero(seen)[:SHOWN_CLASSES]
        handles = [Patch(color=colours()[c + 1] / 255, label=classes.names[c]) for c in listed]
        handles.append(Patch(color="black", label="ignored"))
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
        return save(figure, out)


def coloured(labels_HW: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: IGNORE black, the classes in the colours after it."""
    return colours()[labels_HW.astype(np.uint8) + np.uint8(1)]  # 255 + 1 is 0


# ---------------------------------------------------------------------------------------- command


def label(text: str) -> int:
    if not text.isdecimal() or int(text) > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 255")
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    add = parser.add_argument
    add("--data", required=True, metavar="FOLDER", help="images/SPLIT with annotations|masks/SPLIT")
    add("--head", choices=tuple(RECIPES), default="linear", help="what is trained")
    add("--layers", type=int, choices=(1, 4), default=1, help="last blocks the linear head reads")
    add("--frozen", action="store_true", help="UPerNet on a frozen encoder")
    add("--ignore-index", type=label, nargs="+", metavar="N", help=f"numbers that {IGNORED}")
    add("--steps", type=positive, help="default: 40,000 linear, 160,000 UPerNet")
    add("--batch-size", type=positive, default=16, help="images a step, of all ranks")
    add("--lr", type=above_zero, help="of the head; default: 1e-3 linear, 1e-4 UPerNet")
    add("--weight-decay", type=above_zero, help="default: 1e-4 linear, 0.05 UPerNet")
    add(
        "--layer-decay",
        type=up_to_one,
        help="of the learning rate, a block; default: 0.65 for UPerNet",
    )
    add("--drop-path", type=from_zero, metavar="RATE", help="of the last block's branches; "
        "default: 0.1 for UPerNet")  # fmt: skip
    add("--plain-colours", action="store_true", help="do not distort them while training")
    add("--short-side", type=positive, default=SIDE, help="images' pixels at scale 1")
    add("--crop-size", type=positive, help="pixels; default: the short side's, in patches")
    add("--slide", type=positive, metavar="STRIDE", help="evaluate by windows of the "
        "crop's size, that many pixels apart; default: images as wholes")  # fmt: skip
    add("--bf16", action="store_true", help="forward passes in bf16")
    add("--threads", type=positive, default=2, help="decoding threads")
    add("--save", type=Path, metavar="FOLDER", help="what is learnt: FOLDER/ENCODER/")
    add("--save-every", type=positive, default=1000, metavar="N", help="steps")
    add("--resume", action="store_true", help="resume from --save")
    add("--out", type=Path, metavar="FILE.png", help="figure of some images")
    add("--count", type=positive, default=4, help="images in the figure")


def complete(args: argparse.Namespace, patch_size: int) -> None:
    """Put in what the head and the patches decide. Raises ValueError for what does not fit."""
    args.frozen = args.frozen or args.head == "linear"
    if args.frozen and args.drop_path:
        raise ValueError(f"--drop-path {args.drop_path}: a frozen encoder drops none; leave it out")
    if args.frozen and args.layer_decay not in (None, 1.0):
        raise ValueError(
            f"--layer-decay {args.layer_decay}: a frozen encoder trains no block; leave it out"
        )
    if args.head != "linear" and args.layers != 1:
        raise ValueError(
            f"--layers {args.layers}: {args.head} reads a block of each quarter of the encoder; "
            "leave it out, or take --head linear"
        )
    for name, value in RECIPES[args.head].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.warmup = min(WARMUP, args.steps // 10)
    if args.frozen:
        args.drop_path = 0.0
    if args.ignore_index is None:
        args.ignore_index = [0] if is_ade20k(args.data) else []
    if args.crop_size is None:
        args.crop_size = max(1, args.short_side // patch_size) * patch_size
    if args.crop_size % patch_size:
        raise ValueError(
            f"--crop-size {args.crop_size} is no multiple of the patch: try "
            f"{math.ceil(args.crop_size / patch_size) * patch_size}"
        )
    if args.slide and args.slide > args.crop_size:
        raise ValueError(f"--slide {args.slide} leaves gaps between windows of {args.crop_size}")
    if args.resume and not args.save:
        raise ValueError("--resume resumes from what --save FOLDER kept: name the folder")
    least = 2 if args.head == "upernet" else 1  # BatchNorm of UPerNet's pooling to 1 x 1
    if args.batch_size % world_size() or args.batch_size < least * world_size():
        raise ValueError(
            f"--batch-size {args.batch_size} must be a multiple of the {world_size()} ranks, "
            f"with {least} or more images for each"
        )


def run(args: argparse.Namespace) -> None:
    """A row for each encoder, each with a head of the same initial weights."""
    encoders = rgb_encoders_of(args)
    complete(args, encoders["trained"].patch_size)
    limits = LIMITS._replace(bit_depth=args.limits.bit_depth)  # whole images have their own size
    pairs, tests = (open_pairs(args.data, names, limits) for names in (TRAINING, VALIDATION))
    classes = find_classes(args.data, pairs, set(args.ignore_index))
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    for split in (pairs, tests):
        check(split, classes)
    keep = np.linspace(0, len(tests) - 1, min(args.count, len(tests))).round().astype(int)
    rows, found = [], {}
    for name, encoder in encoders.items():
        torch.manual_seed(args.seed)
        model = Segmenter(
            encoder, args.head, len(classes), layers=args.layers, frozen=args.frozen
        ).to(default_device())
        train(
            model, pairs, classes, recipe, threads=args.threads, save_every=args.save_every,
            save_to=args.save and args.save / name, resume=args.resume, title=name,
        )  # fmt: skip
        matrix_CC, found[name] = evaluate(
            model, tests, classes, short_side=args.short_side, window=args.crop_size,
            stride=args.slide, threads=args.threads, bf16=args.bf16, keep=tuple(keep),
        )  # fmt: skip
        rows.append({"encoder": name, **_row(pairs, tests, classes, matrix_CC)})
        encoder.cpu()
    drawn = draw(tests, classes, found, args.out) if args.out and rank() == 0 else None
    report(args, rows, HEADINGS, SETTINGS, figure=drawn)


def _row(pairs: Pairs, tests: Pairs, classes: Classes, matrix_CC: np.ndarray) -> dict:
    if not matrix_CC.any():
        raise ValueError(f"{tests.masks[0].parent}: all pixels are ignored, so nothing is measured")
    total, iou_C = scores(matrix_CC)
    counts = {"train_images": len(pairs), "test_images": len(tests), "classes": len(classes)}
    return {**counts, **total, "iou": dict(zip(classes.names, iou_C, strict=True))}
