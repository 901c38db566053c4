"""Detection in COCO's format: the encoder fine-tuned in a Mask R-CNN, and its average precision.

The recipe is ViTDet's (Li et al. 2022, arXiv 2203.16527) with global attention in all blocks.
"""

import argparse
import dataclasses
import os
from pathlib import Path

import torch
from torch import nn

from cjepa_fast.checkpoint.encoders import run_of
from cjepa_fast.data.sets.coco import Coco, ValImages, check_same_classes
from cjepa_fast.eval.dense.average_precision import KINDS, as_results, average_precision
from cjepa_fast.eval.dense.boxes import draw
from cjepa_fast.eval.dense.pyramid import Pyramid
from cjepa_fast.eval.dense.rcnn_training import Recipe, as_input, fine_tune, read
from cjepa_fast.eval.features import digest
from cjepa_fast.eval.finetuning.layer_decay import add_drop_path
from cjepa_fast.eval.finetuning.saved import SavedTraining
from cjepa_fast.eval.options import (
    above_zero,
    add_checkpoint,
    from_zero,
    positive,
    rgb_encoders_of,
    up_to_one,
)
from cjepa_fast.eval.records import report
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.distributed import (
    all_gather_objects,
    broadcast_from_rank_0,
    rank,
    world_size,
)
from cjepa_fast.runtime.files import sha256
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.telemetry.progress import shown_bar, shown_clock

# ViTDet's layer decay and drop path by the number of blocks, up to which they hold.
BY_DEPTH = {12: (0.7, 0.1), 24: (0.8, 0.4), 10**9: (0.9, 0.5)}
SETTINGS = ("data", "train", "val", *(field.name for field in dataclasses.fields(Recipe)))
PICTURES = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="COCO's, or laid out so")
    for name in ("train", "val"):
        parser.add_argument(
            f"--{name}", default=f"{name}2017", metavar="SPLIT",
            help="annotations/instances_SPLIT.json, images in SPLIT/; or the path of a .json file, "
            "which names its images from FOLDER",
        )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="the state, to resume from, and the figure; default: eval/detect in the run's folder",
    )  # fmt: skip
    options = parser.add_argument_group("recipe, ViTDet's by default")
    whole, above = positive, above_zero
    types = {
        "image_size": (whole, "side of the square canvas in pixels"),
        "epochs": (whole, ""),
        "batch_size": (whole, "images a step, all ranks together"),
        "micro_batch_size": (whole, "images of a rank in memory at once; default: all"),
        "lr": (above, "of the heads"),
        "layer_decay": (up_to_one, "lr of a block over the next one's; default: by depth"),
        "drop_path": (from_zero, "stochastic depth of the last block; default: by depth"),
        "weight_decay": (from_zero, ""),
        "warmup_steps": (whole, ""),
        "channels": (whole, "width of pyramid and heads"),
    }
    known = {field.name: field.default for field in dataclasses.fields(Recipe)}
    known |= dict.fromkeys(("layer_decay", "drop_path"))
    for name, (kind, text) in types.items():
        option = f"--{name.replace('_', '-')}"
        options.add_argument(option, type=kind, default=known[name], help=text)
    parser.add_argument("--bf16", action="store_true", help="the encoder and the pyramid in bf16")
    parser.add_argument("--threads", type=int, default=4, help="reading processes")


def run(args: argparse.Namespace) -> None:
    needed()
    out = folder_of(args)
    train, val = (open_split(args.data, name) for name in (args.train, args.val))
    check_same_classes(train, val)
    kinds = kinds_of(train, val)
    rows = []
    for name, encoder in rgb_encoders_of(args).items():
        recipe = recipe_of(args, encoder)
        model = trained(encoder, train, recipe, out / name, "mask" in kinds, args.threads)
        results = detections(model, val, default_device(), args.threads)
        counts = {"train_images": len(train), "val_images": len(val)}
        scores = broadcast_from_rank_0(lambda found=results: scored(val, found, kinds))
        rows.append({"encoder": name, **counts, **scores})
    drawn = None
    if rank() == 0:
        drawn = draw(
            val,
            results,
            out / "detections.png",
            PICTURES,
            f"Detections of {Path(args.checkpoint).resolve().name}",
        )
        print(drawn)
    headings = {f"{ap}_{kind}": f"{word} {kind}"
                for kind in kinds
                for ap, word in (("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75"))}  # fmt: skip
    counted = {"train_images": "train", "val_images": "val"}
    report(args, rows, counted | headings, SETTINGS, drawn)


def needed() -> None:
    """Raises ValueError, with the way out, where the extra is not there."""
    way_out = "pip install '.[detect]'"
    try:
        import pycocotools  # noqa: F401
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f"detect needs {error.name}: {way_out}") from error
    except RuntimeError as error:  # its operators did not load
        raise ValueError(
            f"torchvision is not of the same build as torch {torch.__version__} ({error}): "
            "install both from the same index, as https://pytorch.org says"
        ) from error


def folder_of(args: argparse.Namespace) -> Path:
    run = run_of(args.checkpoint)
    if args.out is None and run is None:
        raise ValueError(f"{args.checkpoint} lies in no run's folder: say --out FOLDER")
    return args.out or run / "eval" / "detect"


def open_split(data: str | os.PathLike, name: str) -> Coco:
    folder = Path(data)
    file, images = folder / "annotations" / f"instances_{name}.json", folder / name
    if name.endswith(".json"):
        file, images = folder / name, folder
    with shown_clock(f"reading {file.name}"):
        return Coco(file, images)


def kinds_of(train: Coco, val: Coco) -> list[str]:
    """ "box" and, where every object has one, "mask"."""
    for coco in (train, val):
        if coco.unmasked is not None:
            if rank() == 0:
                print(f"{coco.file}: annotation {coco.unmasked} has no mask; boxes alone, then")
            return ["box"]
    return list(KINDS)


def recipe_of(args: argparse.Namespace, encoder: Encoder) -> Recipe:
    by_depth = next(values for depth, values in BY_DEPTH.items() if encoder.depth <= depth)
    for name, value in zip(("layer_decay", "drop_path"), by_depth, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})


def facts_of(encoder: Encoder, train: Coco, recipe: Recipe, masks: bool) -> dict:
    """What must be the same for a training to be resumed."""
    return dataclasses.asdict(recipe) | {
        "encoder": digest(encoder), "annotations": str(train.file.resolve()), "masks": masks,
        "annotations_sha256": sha256(train.file),
    }  # fmt: skip


def trained(
    encoder: Encoder, train: Coco, recipe: Recipe, folder: Path, masks: bool, threads: int
) -> nn.Module:
    """The encoder in a detector, fine-tuned as far as what `folder` holds has not been."""
    from cjepa_fast.eval.dense import rcnn

    facts = facts_of(encoder, train, recipe, masks)
    torch.manual_seed(recipe.seed)  # of the heads
    pyramid = Pyramid(encoder, recipe.channels, recipe.bf16)
    model = rcnn.mask_rcnn(pyramid, len(train.names), recipe.image_size, masks)
    add_drop_path(encoder, recipe.drop_path)
    fine_tune(model, train, recipe, SavedTraining(folder, facts), default_device(), threads)
    return model


@torch.inference_mode()
def detections(model: nn.Module, val: Coco, device: torch.device, threads: int) -> list[dict]:
    """On all images of a split, in COCO's result format; of several ranks each has a share."""
    model.to(device).eval()
    indices = list(range(len(val)))[rank() :: world_size()]
    results = []
    with shown_bar(len(indices), "detect") as bar:
        for images, (index,) in read(ValImages(val, indices), threads):
            (found,) = model([as_input(image, device) for image in images])
            results += as_results(val, index, found)
            bar.update()
    return [result for share in all_gather_objects(results) for result in share]


def scored(val: Coco, results: list[dict], kinds: list[str]) -> dict[str, float | None]:
    parts = [average_precision(val, results, kind) for kind in kinds]
    return {name: value for part in parts for name, value in part.items()}
