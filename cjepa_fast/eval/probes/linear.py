"""Linear probes of frozen features: the paper's sweep, and a quick one for where one will do.

The sweep's best is chosen on a tenth of the training images, never on the test images, unless
`--choose test` asks for what papers report. The quick one, `predict`, is scikit-learn's logistic
regression by L-BFGS; its penalty C is the inverse of the L2 weight.
Shapes: n training images, m test images, D width.
"""

import argparse
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from cjepa_fast.data import rng
from cjepa_fast.eval.options import add_checkpoint, add_features, add_sets, encoders_of, positive
from cjepa_fast.eval.probes.probe_sweep import GRIDS, ProbePlan, fit
from cjepa_fast.eval.records import Row, report
from cjepa_fast.eval.splits import Split, numbers_of, require_classes, splits_of, vectors_of
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.distributed import broadcast_from_rank_0
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.telemetry.progress import shown_clock

HEADINGS = {
    "layers": "layers",
    "train_images": "train",
    "test_images": "test",
    "chosen": "chosen",
    "held_out": "held out %",
    "top1": "LARS %",
    "top5": "top 5 %",
}
BEST_ON_TEST = {"top1": "best on test %", "top5": "its top 5 %"}
SETTINGS = ("data", "labels", "test", "test_labels", "max_train", "crop", "bf16")
SWEEP_SETTINGS = ("optimizer", "epochs", "batch", "sweep", "layers", "choose")
EPOCHS = 50
HELD_OUT = 0.1  # share of the training images that the best probe is chosen on
# Of memory at the peak, for each value of the features, its own four among them: measured with
# 60,000 images of 512 values.
BYTES = {"ridge": 37, "logistic": 22, "lbfgs": 20, "lars": 12, "adamw": 12}
Vectors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def predict(
    train_nD: torch.Tensor,
    label_n: torch.Tensor,
    test_mD: torch.Tensor,
    *,
    inverse_penalty: float = 0.1,
    iterations: int = 3000,
) -> torch.Tensor:
    """The probe's class for each test image: (m,) int64.

    Features are standardised by the training images' mean and standard deviation. Raises
    ValueError where there is but one class to learn.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    require_classes(label_n, "a linear probe")
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=iterations)
    )
    with shown_clock("linear probe"):
        probe.fit(train_nD.double().numpy(), label_n.numpy())
    return torch.from_numpy(probe.predict(test_mD.double().numpy()))


def top1(train_nD, label_n, test_mD, test_label_m, **options) -> float:
    """Percent of the test images classified rightly; options as in `predict`."""
    return percent(predict(train_nD, label_n, test_mD, **options), test_label_m)


def percent(named_m: torch.Tensor, label_m: torch.Tensor) -> float:
    """How many of the classes named are right."""
    return 100 * (named_m == label_m).double().mean().item()


def ridge(train_nD: torch.Tensor, label_n: torch.Tensor, test_mD: torch.Tensor) -> torch.Tensor:
    """The classes (m,) that ridge regression on standardised features gives: a linear probe in one
    solution, where logistic regression takes a thousand steps. Penalty: a hundredth of n."""
    with shown_clock("ridge regression"):  # its import takes seconds too
        from sklearn.linear_model import RidgeClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=len(train_nD) / 100))
        probe.fit(train_nD.double().numpy(), label_n.numpy())
        return torch.from_numpy(probe.predict(test_mD.double().numpy()))


def sweep(
    vectors: Vectors, widths: list[int], plan: ProbePlan, choose: str = "held-out", copies: int = 1
) -> list[dict[str, object]]:
    """The best probe on each of `widths` last columns: one row each, of HEADINGS, all in "probes".

    vectors: features (n, D) and labels (n,) for training, then (m, D) and (m,) for the test.
    choose: "held-out": by a tenth of the training images, drawn by their indices; the winner is
    then trained on all of them. "test": by the test images, as papers do, and named so. copies: how
    many times all training images stand one after the other, as they are and mirrored.
    """
    train_nD, label_n, test_mD, test_label_m = vectors
    settings, device = plan.settings(), default_device()
    numbers_C = numbers_of(torch.cat([label_n, test_label_m]))
    classes = len(numbers_C)
    label_n, test_label_m = (torch.searchsorted(numbers_C, x) for x in (label_n, test_label_m))
    if choose == "test":
        probes = fit(train_nD, label_n, classes, widths, plan, device)
        scores = probes.percent(test_mD, test_label_m)
    else:
        images = len(label_n) // copies
        order = rng.permutation(0, 0, images)
        held, rest = order.split([cut := max(1, round(HELD_OUT * images)), images - cut])
        rest = torch.cat([rest + copy * images for copy in range(copies)])
        probes = fit(train_nD[rest], label_n[rest], classes, widths, plan, device)
        scores = probes.percent(train_nD[held], label_n[held])
    rows = []
    for i, width in enumerate(widths):
        mine = range(i * len(settings), (i + 1) * len(settings))
        best = max(mine, key=lambda p: scores[p]["top1"])
        chosen = settings[best - mine.start]
        if choose == "test":
            found = scores[best]
        else:
            grid = {name: (value,) for name, value in chosen.items()}
            again = fit(train_nD, label_n, classes, [width], replace(plan, grid=grid), device)
            found = {"held_out": scores[best]["top1"], **again.percent(test_mD, test_label_m)[0]}
        tried = [{**setting, **scores[p]} for setting, p in zip(settings, mine, strict=True)]
        text = ", ".join(f"{name} {value:g}" for name, value in chosen.items())
        rows.append({"chosen": text, "settings": chosen, **found, "probes": tried})
    return rows


class Reading(NamedTuple):
    """Blocks to read at once, and by name how many of the last of these a probe is to see."""

    blocks: list[int]
    probes: dict[str, int]


def rows_of(
    name: str, encoder: Encoder, vectors: Vectors, reading: Reading, args: argparse.Namespace,
    copies: int = 1,
) -> list[Row]:  # fmt: skip
    """`sweep` as the command line has it, one row for each of the reading's probes. The first rank
    has the features, so it alone calls it."""
    plan = ProbePlan(args.optimizer, args.epochs, args.batch, args.sweep)
    widths = [count * encoder.width for count in reading.probes.values()]
    found = sweep(vectors, widths, plan, args.choose, copies)
    counts = {"train_images": len(vectors[0]) // copies, "test_images": len(vectors[2])}
    return [
        {"encoder": name, "layers": which, **counts, **row}
        for which, row in zip(reading.probes, found, strict=True)
    ]


def headings(args: argparse.Namespace) -> dict[str, str]:
    """The probe is named by its optimiser; what was chosen by the test images is named so."""
    name = {"lars": "LARS", "lbfgs": "logistic"}.get(args.optimizer, args.optimizer)
    return HEADINGS | {"top1": f"{name} %"} | (BEST_ON_TEST if args.choose == "test" else {})


def readings(encoder: Encoder, asked: list[int | list[int]]) -> list[Reading]:
    """Numbers of last layers, as far as the encoder has them, are read at once; a list of blocks is
    read by itself."""
    last = sorted({min(layers, encoder.depth) for layers in asked if isinstance(layers, int)})
    names = {"last" if count == 1 else f"last {count}": count for count in last}
    found = [Reading(list(encoder.last(max(last))), names)] if last else []
    lists = [layers for layers in asked if isinstance(layers, list)]
    return found + [Reading(blocks, {"+".join(map(str, blocks)): len(blocks)}) for blocks in lists]


def layer_list(text: str) -> list[int | list[int]]:
    """ "1,4,3+6" -> [1, 4, [3, 6]]."""
    parts = [[positive(number) for number in part.split("+")] for part in text.split(",")]
    return [sorted(set(part)) if len(part) > 1 else part[0] for part in parts]


def values(text: str) -> tuple[str, tuple[float, ...]]:
    """ "lr=0.01,0.05" -> ("lr", (0.01, 0.05))."""
    name, _, listed = text.partition("=")
    try:
        found = tuple(float(part) for part in listed.split(","))
    except ValueError:
        found = (-1.0,)
    if min(found) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as lr=0.01,0.05")
    return name, found


def add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizer", choices=GRIDS, default="lars", help="lars: the paper's")
    parser.add_argument("--epochs", type=positive, default=EPOCHS)
    parser.add_argument("--probe-batch-size", dest="batch", type=positive, metavar="N",
                        help="default: 16384, or 1/78 of a small set, with LARS's learning rates "
                        "times 64; with N they are times N/256")  # fmt: skip
    parser.add_argument("--sweep", type=values, nargs="+", metavar="NAME=LIST",
                        help="such as lr=0.01,0.05 wd=0; of lbfgs C=0.1,1")  # fmt: skip
    parser.add_argument("--layers", type=layer_list, default=[1, 4], metavar="LIST",
                        help="numbers of last layers, or blocks as 3+6+9")  # fmt: skip
    parser.add_argument("--choose", choices=("held-out", "test"), default="held-out",
                        help="the images that decide which probe is best")  # fmt: skip


def complete_sweep(args: argparse.Namespace) -> None:
    """Check the options against the optimiser, and make --sweep the whole grid."""
    given = {"--epochs": args.epochs != EPOCHS, "--probe-batch-size": args.batch is not None}
    if args.optimizer == "lbfgs" and any(given.values()):
        name = next(name for name in given if given[name])
        raise ValueError(f"{name}: --optimizer lbfgs solves for all images at once; leave it out")
    known, given = GRIDS[args.optimizer], dict(args.sweep or ())
    if foreign := sorted(given.keys() - known):
        raise ValueError(
            f"--sweep {foreign[0]}: --optimizer {args.optimizer} has {' and '.join(known)}"
        )
    args.sweep = {**known, **given}


def probed(
    name: str, encoder: Encoder, splits: tuple[Split, Split], reading: Reading,
    args: argparse.Namespace,
) -> list[Row]:  # fmt: skip
    """`rows_of` by the first rank, of features that are gone when the next are read."""
    vectors = vectors_of(encoder, splits, args, reading.blocks, BYTES[args.optimizer])
    return broadcast_from_rank_0(partial(rows_of, name, encoder, vectors, reading, args))


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    add_sets(parser)
    add_features(parser)
    add_sweep(parser)


def run(args: argparse.Namespace) -> None:
    """A row for each encoder and number of layers."""
    complete_sweep(args)
    splits = splits_of(args)
    rows = []
    for name, encoder in encoders_of(args).items():
        for reading in readings(encoder, args.layers):
            rows += probed(name, encoder, splits, reading, args)
    report(args, rows, headings(args), (*SETTINGS, *SWEEP_SETTINGS))
