"""What the evaluations' command lines share: their arguments, encoders, sets and reports.

A task is a module with `add_options(parser)` and `run(args)`. What it finds it gives to `report`:
a table on the terminal, and JSON, also in the folder of the run, where model cards, `compare` and
the report of a run read it.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cjepa_fast import config
from cjepa_fast.checkpoint.encoders import (
    crop_of,
    held_in,
    limits_of,
    load_encoder,
    located,
    run_of,
)
from cjepa_fast.data import locations, rng
from cjepa_fast.data.sources import LIMITS, ImageSet, Limits, NothingUsable, open_images
from cjepa_fast.eval.features import digest, extract, split_by_name
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import caches, distributed, hardware
from cjepa_fast.runtime.files import read_json, write_text
from cjepa_fast.runtime.memory import free_bytes
from cjepa_fast.runtime.printable import printable, say

LABELLED = (
    "it needs a folder for each class, a .cls or .json for each image, or a file of labels "
    "(--labels, --test-labels; a list)"
)
USUAL_LIMITS = ("detect", "video")  # tasks that read whole images by the usual ones
PATHS = ("data", "test", "labels", "test_labels", "images")
OF_THE_RUN = ("seed", "crop", "k", "temperature")  # where the command says nothing
SPLITS = {locations.TRAINING, *locations.OTHER_SPLITS}
Row = dict[str, object]
Split = tuple[ImageSet, torch.Tensor]  # a set and the indices used of it
VERSIONS = (
    "cjepa_fast", "torch", "nvidia-dali-cuda130", "scikit-learn", "torchvision", "pycocotools",
)  # fmt: skip


# ------------------------------------------------------------------------------------- arguments


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


def share(text: str) -> float:
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
    parser.add_argument("--crop", type=share, help="centre crop; default: the run's eval.crop")


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


def complete(args: argparse.Namespace) -> None:
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


# --------------------------------------------------------------------------- encoders and images


def device() -> torch.device:
    """Of this process."""
    return torch.device("cuda" if hardware.has_gpu() else "cpu")


def inside(checkpoint: str | Path) -> str | None:
    """Its path below the run's folder, "." for the run itself; None outside of any run."""
    if (run := run_of(checkpoint)) is None:
        return None
    path = located(checkpoint)  # RUN/best keeps its name, whatever links lead to RUN
    return "." if path == run else os.path.relpath(path.parent.resolve() / path.name, run.resolve())


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


def labelled(
    path: str, label_list: str | None = None, limits: Limits = LIMITS, part: bool = False
) -> ImageSet:
    """The images that have a label; the others are left out aloud. Raises ValueError where those
    are more, unless a part of the images is meant. label_list: a file of labels, instead of the
    images' own."""
    try:
        images = open_images(path, labelled=True, label_list=label_list, limits=limits)
    except NothingUsable as error:
        raise ValueError(f"{path} has no labels: {LABELLED} ({error})") from error
    without = images.unlabelled
    if without > len(images) and not part:
        raise ValueError(
            f"{path}: {without} of {without + len(images)} images have no label: {LABELLED}"
        )
    if images.classes and {name.lower() for name in images.classes} <= SPLITS:
        raise ValueError(
            f"{path} holds splits, not classes ({', '.join(images.classes)}): name one of these "
            "folders, and another as the test set"
        )
    return images


def labelled_splits(
    data: str,
    test: str | None,
    max_train: int | None = None,
    max_test: int | None = None,
    labels: str | None = None,
    test_labels: str | None = None,
    limits: Limits = LIMITS,
) -> tuple[Split, Split]:
    """Training and test images, at most so many. labels, test_labels: files of them. limits: what
    counts as usable, and how it is read.

    Without `test`, what `held_out` says, else 20 % of `data` by a hash of the names; the synthetic
    dataset has its own held-out split. `test` may be `data`, where files of labels divide its
    images. Says how many test images no probe can name. Raises ValueError where labels are missing,
    or an image is in both.
    """
    test = held_out(data, test)
    same = test is not None and _same_file(data, test)
    if same and _same_file(labels, test_labels):
        which = f"with the labels of {labels}" if labels else "with its own labels"
        raise ValueError(
            f"{data} is the training set and the test set, both {which}: name another test set, "
            "files of labels for each, or no test set, which keeps 20 % of the images for testing"
        )
    train_set = labelled(data, labels, limits=limits, part=same)
    if test is None and data == "shapes":
        test = "shapes:val"
    if test is None and test_labels:
        raise ValueError(f"--test-labels {test_labels}: name the images too, by --test")
    if test is None:
        train_keep, test_keep = split_by_name(train_set)
        test_set = train_set
    else:
        test_set = labelled(test, test_labels, limits=limits, part=same)
        train_keep, test_keep = torch.arange(len(train_set)), torch.arange(len(test_set))
        names = (labels or data, test_labels or test) if same else (data, test)
        _refuse_shared(train_set, test_set, " and ".join(names))
        _match_classes(list(zip(names, (train_set, test_set), strict=True)))
    if not len(train_keep) or not len(test_keep):
        raise ValueError(
            f"{data}: splitting its {len(train_set)} images leaves {len(train_keep)} for training "
            f"and {len(test_keep)} for testing; name a test set with --test"
        )
    splits = (train_set, some(train_keep, max_train)), (test_set, some(test_keep, max_test))
    say_unlearnt(*splits)
    return splits


def say_unlearnt(train: Split, test: Split) -> None:
    """Say, on the first rank, how many test images are of classes without a training image: no
    probe can name these."""
    learnt_n, label_m = (images.labels[keep] for images, keep in (train, test))
    strange_k = label_m[~torch.isin(label_m, learnt_n)]
    if len(strange_k) and distributed.rank() == 0:
        print(
            f"{len(strange_k.unique())} of the {len(label_m.unique())} classes tested have no "
            f"training image, so {len(strange_k)} of {len(label_m)} test images cannot be named "
            "rightly: train on more images"
        )


def held_out(data: str, test: str | None) -> str | None:
    """The test set, where none is named that of a folder which holds splits: its val/ or the like,
    as its train/ is trained on; None without."""
    beside = locations.split_beside(Path(data)) if test is None else None
    return str(beside) if beside else test


def splits_of(args: argparse.Namespace) -> tuple[Split, Split]:
    """`labelled_splits` by the options of `add_sets`. args.test becomes what is tested on, where
    that is a set of its own, for `report`."""
    args.test = held_out(args.data, args.test)
    files = {"labels": args.labels, "test_labels": args.test_labels}
    return labelled_splits(args.data, args.test, args.max_train, **files, limits=args.limits)


def _same_file(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one is other
    return os.path.realpath(one) == os.path.realpath(other)


def _refuse_shared(train: ImageSet, test: ImageSet, both: str) -> None:
    tested = set(test.files())
    if shared := [file for file in train.files() if file in tested]:
        first = printable(os.fsdecode(shared[0]))
        raise ValueError(
            f"{both}: {len(shared)} images are in both, {first} among them: an image for testing "
            "must not be trained on"
        )


def _match_classes(splits: list[tuple[str, ImageSet]]) -> None:
    """Number the second split's classes as the first does, by their names. splits: each with what
    names it. Classes of the first alone are said. Raises ValueError for one of the second alone."""
    (one, train), (other, test) = splits
    if (train.classes is None) != (test.classes is None):
        raise ValueError(
            f"{one} and {other}: one has names of classes, the other numbers: name these in a "
            "classes.txt, a name a line from class 0 on, beside the shards or the list of labels"
        )
    own, tested = (set(s.classes or s.labels.unique().tolist()) for s in (train, test))
    if only := tested - own:
        raise ValueError(
            f"{one} and {other} do not have the same classes: {_some(only)} only in {other}, of "
            "which nothing is trained on"
        )
    if (only := own - tested) and distributed.rank() == 0:
        print(f"{other} has no image of {len(only)} of the {len(own)} classes: {_some(only)}")
    if test.classes != train.classes:
        number = torch.tensor([train.classes.index(name) for name in test.classes])
        test.labels, test.classes = number[test.labels], train.classes


def _some(classes: set[str] | set[int]) -> str:
    return f"{', '.join(map(repr, sorted(classes)[:3]))}{', ...' * (len(classes) > 3)}"


def require_classes(label_n: torch.Tensor, what: str) -> None:
    """Raises ValueError where there is but one class to learn."""
    if len(label_n.unique()) < 2:
        raise ValueError(f"{what} needs at least two classes among the training images")


def class_numbers(splits: tuple[Split, Split]) -> torch.Tensor:
    """`numbers_of` both splits' labels."""
    return numbers_of(torch.cat([images.labels[keep] for images, keep in splits]))


def numbers_of(label_n: torch.Tensor) -> torch.Tensor:
    """The number that each of the C classes has in the labels, ascending: (C,). All from 0 on; but
    where most of those would stand empty, as of ids, those alone that are used."""
    used = label_n.unique()
    every = 1 + int(used[-1])
    return torch.arange(every) if every <= 2 * len(used) else used


def some(keep: torch.Tensor, most: int | None) -> torch.Tensor:
    """At most so many positions, drawn evenly, ascending."""
    if most is None or most >= len(keep):
        return keep
    return keep[rng.permutation(0, 0, len(keep))[:most].sort().values]


def vectors_of(
    encoder: Encoder,
    splits: tuple[Split, Split],
    args: argparse.Namespace,
    layers: Sequence[int] | None = None,
    bytes_each: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of both splits features (n, layers * D) and labels (n,), one after the other, on the CPU. The
    features are on the first rank, others may have none. bytes_each: as in `require_memory`."""
    require_memory(splits, encoder.width * len(layers or [0]), bytes_each)
    found = []
    for images, keep in splits:
        vectors, index = extract(
            encoder, images, keep=keep, crop=args.crop, layers=layers, device=device(),
            bf16=args.bf16, batch_size=args.batch_size, threads=args.threads, cache=cache_of(args),
            everywhere=False,
        )  # fmt: skip
        found += [vectors, images.labels[index]]
    encoder.cpu()
    return tuple(found)


def require_memory(splits: Sequence[Split], width: int, bytes_each: int) -> None:
    """Raises ValueError, on all ranks, where the first has not the memory for features of `width`
    of all splits. bytes_each: what a value takes at the peak, with the copies that a probe makes
    of it."""
    images = sum(len(keep) for _, keep in splits)
    needed = width * bytes_each * images

    def check() -> None:
        free = free_bytes()
        if free is not None and needed > free:
            raise ValueError(
                f"{images:,} images with {width:,} values each take {needed / 2**30:.1f} GiB of "
                f"memory at once, of {free / 2**30:.1f} free: use fewer, --max-train N"
            )

    distributed.broadcast_from_rank_0(check)


def cache_of(args: argparse.Namespace) -> Path | None:
    """The folder features are kept in."""
    return None if args.no_cache else caches.folder("features")


# ----------------------------------------------------------------------------------------- report


RECORD = {"task": str, "made": str, "settings": dict, "headings": dict, "rows": list}
COUNTS = ("train_images", "test_images", "images")
WAYS = ("question", "labels", "layers")  # what tells the rows of one encoder apart


def report(
    args: argparse.Namespace,
    rows: list[Row],
    headings: dict[str, str],
    settings: Sequence[str],
    figure: Path | None = None,
) -> None:
    """Print a table, and write it to --json and into the run's folder as eval/TASK-DIGEST.json.

    rows: of plain values, each with "encoder", its name; headings: the columns by key, in order;
    settings: names of the arguments that decide the numbers; figure: a file drawn of them. What an
    earlier record in the run's folder has besides, of the same weights, settings and images, stays
    there. Only rank 0 does so.
    """
    if distributed.rank() != 0:
        return
    print_table(rows, headings)
    chosen = {name: getattr(args, name) for name in settings}
    if (limits := args.limits.changed()) and args.task not in USUAL_LIMITS:
        chosen["limits"] = limits
    record = {
        "task": args.task,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        "command": shlex.join(["cjepa-eval", *sys.argv[1:]]),
        "versions": _versions(),
        "checkpoint": str(args.checkpoint),
        "inside": inside(args.checkpoint),
        "which": args.which,
        "weights": args.weights,
        "settings": chosen,
        "headings": headings,
        "rows": rows,
        "picture": figure and str(figure),
    }
    if args.json:
        _write_record(args.json, record)
    if file := _file_in_run(args, chosen):
        _write_record(file, _with_earlier(file, record))


def _write_record(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2, default=str) + "\n")


def _with_earlier(file: Path, record: dict) -> dict:
    """The record with the rows, and a row's values, that the file has and the record lacks: as of
    `knn --untrained --linear` before `knn`. A row whose other values differ is replaced."""
    try:
        before = read_json(file)
    except (OSError, ValueError):
        return record
    if not _is_record(before) or before.get("weights") != record["weights"]:
        return record
    record = json.loads(json.dumps(record, default=str))
    old, new = ({_way(row): row for row in one["rows"]} for one in (before, record))
    common = old.keys() & new
    if any(old[way].get(key) != new[way].get(key) for way in common for key in COUNTS):
        return record
    for way in common:
        if all(old[way][key] == new[way][key] for key in old[way].keys() & new[way]):
            new[way] = old[way] | new[way]
    rows = [*(row for way, row in old.items() if way not in new), *new.values()]
    return record | {"rows": rows, "headings": before["headings"] | record["headings"]}


def _way(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in ("encoder", *WAYS))


def tell(args: argparse.Namespace, rows: list[Row], headings: dict[str, str], label: str) -> None:
    """Of a figure, print its numbers and write them to --json. label: the key of a row's name.
    Only rank 0 does so."""
    if distributed.rank() != 0:
        return
    print_table(rows, headings, label)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.json, json.dumps({"task": args.task, "rows": rows}, indent=2) + "\n")


def _file_in_run(args: argparse.Namespace, chosen: dict) -> Path | None:
    if not (run := run_of(args.checkpoint)):
        return None
    facts = json.dumps([inside(args.checkpoint), args.which, chosen], default=str)
    digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
    return run / "eval" / f"{args.task}-{digest}.json"


def records(run: Path) -> list[dict]:
    """What `report` has left in a run's folder, the oldest first. Raises ValueError, naming the
    file, for one that is damaged."""
    found = {path: read_json(path) for path in (run / "eval").glob("*-*.json")}
    for path, record in found.items():
        if not _is_record(record):
            raise ValueError(f"{path} is no record of an evaluation: remove it")
    return sorted(found.values(), key=lambda record: record["made"])


def _is_record(found: dict) -> bool:
    return all(isinstance(found.get(key), kind) for key, kind in RECORD.items())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def print_table(rows: list[Row], headings: dict[str, str], label: str = "encoder") -> None:
    """Aligned columns; of `headings` those that any row has."""
    shown = {key: word for key, word in headings.items() if any(key in row for row in rows)}
    lines = [[label, *shown.values()]]
    lines += [[printable(row[label]), *(cell(row.get(key)) for key in shown)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *cells in lines:
        print("  ".join([f"{first:{widths[0]}s}", *map(str.rjust, cells, widths[1:])]).rstrip())


def cell(value: object) -> str:
    """A value as tables show it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) else printable(value)
