"""The command lines of the evaluations: their arguments, and the encoders that these name."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cjepa_fast import config
from cjepa_fast.checkpoint.encoders import crop_of, held_in, limits_of, load_encoder, run_of
from cjepa_fast.data.sources import LIMITS, Limits
from cjepa_fast.eval.features import digest
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.printable import say

PATHS = ("data", "test", "labels", "test_labels", "images")
OF_THE_RUN = ("seed", "crop", "k", "temperature")  # where the command says nothing


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def up_to_one(text: str) -> float:
    if (value := above_zero(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0 and at most 1")
    return value


def from_zero(text: str) -> float:
    """A probability: 0 or more, and less than 1."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")


def add_checkpoint(parser: argparse.ArgumentParser, untrained: bool = True) -> None:
    """CHECKPOINT and the encoders made of it, for a table. untrained: one may be asked for."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run, a checkpoint, an encoder")
    parser.add_argument("--which", choices=("target", "context"), default="target", help="encoder")
    if untrained:
        parser.add_argument("--untrained", action="store_true", help="also a fresh encoder")
    parser.add_argument("--seed", type=int, help="of fresh weights; default: the run's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")


def add_sets(parser: argparse.ArgumentParser, own_labels: bool = True) -> None:
    """Labelled images, and how they are read. own_labels: they may have a file of labels."""
    parser.add_argument("--data", required=True, metavar="SET", help="labelled; or 'shapes'")
    parser.add_argument("--test", metavar="SET", help="default: val/ beside train/ in --data, else "
                        "20 %% of --data, by name")  # fmt: skip
    if own_labels:
        add_label_lists(parser)
    else:
        parser.set_defaults(labels=None, test_labels=None)
    parser.add_argument("--max-train", type=positive, metavar="N", help="use N training images")
    add_reading(parser)


def add_crop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="whose eval and seed to take: not the run's"
    )
    parser.add_argument("--crop", type=up_to_one, help="centre crop; default: the run's eval.crop")


def add_reading(parser: argparse.ArgumentParser) -> None:
    add_crop(parser)
    parser.add_argument("--batch-size", type=positive, default=128, help="images encoded at once")
    parser.add_argument("--threads", type=positive, default=2, help="decoding threads")


def add_label_lists(parser: argparse.ArgumentParser) -> None:
    for name, images in ("--labels", "--data"), ("--test-labels", "--test"):
        parser.add_argument(name, metavar="FILE", help=f"labels of {images}, a line an image")


def add_features(parser: argparse.ArgumentParser) -> None:
    """How features are made of the images."""
    parser.add_argument("--bf16", action="store_true", help="the encoder in bf16")
    parser.add_argument("--no-cache", action="store_true", help="keep no features on disk")


def add_figure_options(parser: argparse.ArgumentParser, count: int = 6, images: str = "") -> None:
    """images: where they are from if nothing is said."""
    known = f"default: {images}" if images else "a folder, shards or 'shapes'"
    parser.add_argument("--images", required=not images, metavar="SET", help=known)
    parser.add_argument("--count", type=positive, default=count, help="how many images")
    add_out(parser)


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")


def fill_defaults(args: argparse.Namespace) -> None:
    """Put in what the command line leaves to the run or to the environment."""
    first, *_ = getattr(args, "checkpoints", None) or [None]
    checkpoint = getattr(args, "checkpoint", first)
    run = run_of(checkpoint) if checkpoint else None
    made_with = config.load_run(run) if run else config.Config()
    crop = crop_of(checkpoint) if checkpoint else None
    if getattr(args, "config", None):
        made_with, crop = config.load(args.config), None
    args.limits = (checkpoint and limits_of(checkpoint)) or Limits.of(made_with.data)
    known = {"seed": made_with.run.seed, **made_with.eval.model_dump()}
    known["crop"] = crop or known["crop"]
    for name in OF_THE_RUN:
        if getattr(args, name, 0) is None:
            setattr(args, name, known[name])
    for name in PATHS:
        if getattr(args, name, None):
            setattr(args, name, config.expand_path(getattr(args, name)))


def encoders_of(args: argparse.Namespace) -> dict[str, Encoder]:
    """By the name of their row: the untrained one first, where it is asked for.

    For `report`, args.weights becomes the digest of the trained one's, as CHECKPOINT may move on,
    and args.which the one that CHECKPOINT holds, where that is a file of one encoder.
    """
    trained = load_encoder(args.checkpoint, args.which)
    args.which = held_in(args.checkpoint, args.which)
    args.weights = digest(trained)
    fresh = {"untrained": fresh_like(trained, args.seed)} if args.untrained else {}
    return {**fresh, "trained": trained}


def rgb_encoders_of(args: argparse.Namespace) -> dict[str, Encoder]:
    """encoders_of, for a task whose images are RGB. Raises ValueError for others."""
    found = encoders_of(args)
    if (channels := found["trained"].channels) != 3:
        raise ValueError(
            f"{args.task} reads RGB images, and {args.checkpoint} is an encoder of {channels} "
            "channels: knn, linear and finetune take it"
        )
    return found


def fresh_like(encoder: Encoder, seed: int) -> Encoder:
    """A newly initialised encoder of the same architecture and normalisation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = Encoder(**encoder.architecture).eval()
    fresh.mean, fresh.std = encoder.mean, encoder.std
    return fresh


def tell_other_limits(checkpoints: Sequence[str | Path], limits: Limits) -> None:
    """Say which of several have not the limits that the images are read by, the first's."""
    for checkpoint in checkpoints[1:]:
        own = (limits_of(checkpoint) or LIMITS)._asdict()
        other = [f"{k} {v}" for k, v in own.items() if v != getattr(limits, k)]
        if other and distributed.rank() == 0:
            say(
                f"{checkpoint} was trained with data.{', data.'.join(other)}: here its images are "
                f"read as those of {checkpoints[0]}",
                sys.stderr,
            )
