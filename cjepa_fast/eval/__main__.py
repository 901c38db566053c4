"""Evaluate a run: `python -m cjepa_fast.eval knn RUN --data shapes`.

knn, linear: how well a run's features tell classes apart. attention, curves, masks: pictures.
RUN is a run's folder, a checkpoint's folder or an encoder's .safetensors file.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import cjepa_fast
from cjepa_fast import build, draws
from cjepa_fast import config as configuration
from cjepa_fast.data.sources import ImageSet, open_images
from cjepa_fast.eval import attention, curves, features, knn, linear, pictures
from cjepa_fast.vit import Encoder


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        args.command(args)
    except (ValueError, OSError) as error:  # the user's input: said, without a traceback
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# -------------------------------------------------------------------------------------- measures


def measure(args: argparse.Namespace) -> None:
    """`knn` and `linear`: a row for each encoder, on the terminal and to --json."""
    encoder = cjepa_fast.load_encoder(args.run)
    config = config_of(args.run)
    settings = eval_settings(config)
    for name in ("crop", "k", "temperature"):  # the run's own, where the command line says nothing
        if getattr(args, name) is None:
            setattr(args, name, getattr(settings, name))
    sides = labelled_sides(args.data, args.test, args.max_train)
    encoders = {"trained": encoder}
    if args.untrained:
        encoders["untrained"] = fresh_like(encoder, config.run.seed if config else 0)
    rows = []
    if args.pixels:
        rows += pixel_rows(sides, args)
    for name, each in reversed(encoders.items()):
        rows.append({"encoder": name, **score(each, sides, args)})
    print_table(rows, args)
    if args.json:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        named = ("metric", "run", "data", "test", "crop", "k", "temperature")
        facts = {name: getattr(args, name) for name in named}
        path.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


Side = tuple[ImageSet, torch.Tensor]  # a set and the positions used of it


def labelled_sides(data: str, test: str | None, max_train: int | None) -> tuple[Side, Side]:
    """Training and test images. Without `test`, 20 % of `data` by a hash of the names; the
    embedded set has its own held-out split. Raises ValueError where labels are missing."""
    train_set = labelled(data)
    if test is None and data == "shapes":
        test = "shapes:val"
    if test is None:
        train_keep, test_keep = features.split_by_name(train_set)
        test_set = train_set
    else:
        test_set = labelled(test)
        train_keep, test_keep = torch.arange(len(train_set)), torch.arange(len(test_set))
        if train_set.classes != test_set.classes:
            raise ValueError(f"{data} and {test} do not have the same classes")
    if not len(train_keep) or not len(test_keep):
        raise ValueError(
            f"{data}: splitting its {len(train_set)} images leaves {len(train_keep)} for training "
            f"and {len(test_keep)} for testing; name a test set with --test"
        )
    if max_train is not None:
        chosen = draws.permutation(0, 0, len(train_keep))[:max_train]
        train_keep = train_keep[chosen.sort().values]
    return (train_set, train_keep), (test_set, test_keep)


def labelled(path: str) -> ImageSet:
    images = open_images(configuration.expanded(path))
    if images.labels is None:
        raise ValueError(
            f"{path} has no labels: it needs a folder for each class, or a .cls beside each image"
        )
    return images


def score(encoder: Encoder, sides: tuple[Side, Side], args) -> dict:
    """Percent right of the encoder's features, with and without centring for kNN."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vectors = []
    for images, keep in sides:
        found, place = features.extract(
            encoder, images, keep=keep, crop=args.crop, device=device, bf16=args.bf16,
            batch_size=args.batch_size, threads=args.threads,
        )  # fmt: skip
        vectors += [found, images.labels[place]]
    encoder.cpu()
    counts = {"train_images": len(vectors[0]), "test_images": len(vectors[2])}
    if args.metric == "linear":
        return {**counts, "top1": linear.top1(*vectors)}
    found = knn.both(*vectors, k=args.k, temperature=args.temperature)
    probe = {"linear": linear.top1(*vectors)} if args.linear else {}
    return {**counts, **found, **probe}


def pixel_rows(sides: tuple[Side, Side], args) -> list[dict]:
    (train, train_keep), (test, test_keep) = sides
    found = knn.pixel_baselines(
        train, test, train_keep=train_keep, test_keep=test_keep, crop=args.crop, k=args.k,
        temperature=args.temperature, threads=args.threads,
    )  # fmt: skip
    counts = {"train_images": len(train_keep), "test_images": len(test_keep)}
    return [{"encoder": name, **counts, **tops} for name, tops in found.items()]


def fresh_like(encoder: Encoder, seed: int) -> Encoder:
    """A newly initialised encoder of the same architecture and normalisation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = Encoder(**encoder.architecture)
    fresh.mean, fresh.std = encoder.mean, encoder.std
    return fresh


def print_table(rows: list[dict], args) -> None:
    headings = {"top1": {"knn": "kNN %", "linear": "linear %"}[args.metric]}
    headings |= {"top1_centred": "mean-subtracted", "linear": "linear %"}
    shown = {key: word for key, word in headings.items() if any(key in row for row in rows)}
    wide = max(len(row["encoder"]) for row in rows)
    widths = {key: max(8, len(word)) for key, word in shown.items()}
    print(f"{'encoder':{wide}s}  {'images':>14s}", end="")
    print("".join(f"  {word:>{widths[key]}s}" for key, word in shown.items()))
    for row in rows:
        images = f"{row['train_images']:,}+{row['test_images']:,}"
        cells = (f"{row[key]:.2f}" if key in row else "-" for key in shown)
        line = "".join(f"  {cell:>{widths[key]}s}" for key, cell in zip(shown, cells, strict=True))
        print(f"{row['encoder']:{wide}s}  {images:>14s}{line}")


# -------------------------------------------------------------------------------------- pictures


def config_of(run: str) -> configuration.Config | None:
    """The configuration a run was made with, None for a bare checkpoint or encoder file."""
    path = Path(run)
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / "config.json").is_file():
            return configuration.validate(json.loads((folder / "config.json").read_text()))
    return None


def eval_settings(config: configuration.Config | None) -> configuration.EvalSection:
    return config.eval if config else configuration.EvalSection()


def draw_attention(args: argparse.Namespace) -> None:
    target = cjepa_fast.load_encoder(args.run, "target")
    context = cjepa_fast.load_encoder(args.run, "context")
    images_B3HW = pictures.load_images(
        open_images(configuration.expanded(args.images)), args.count, image_size=target.image_size,
        mean=target.mean, std=target.std, crop=eval_settings(config_of(args.run)).crop,
    )  # fmt: skip
    title = f"Attention of the last block: {Path(args.run).resolve().name}"
    print(attention.draw(target, context, images_B3HW, args.out, title))


def draw_curves(args: argparse.Namespace) -> None:
    print(curves.draw(args.runs, args.out))


def draw_masks(args: argparse.Namespace) -> None:
    config = config_of(args.run)
    if config is None:
        raise FileNotFoundError(f"{args.run}: no config.json there, so it is not a run's folder")
    data, sampler = config.data, build.build_masks(config)
    images_B3HW = pictures.load_images(
        open_images(configuration.expanded(args.images or data.path)), args.count,
        image_size=data.image_size, mean=data.mean, std=data.std,
    )  # fmt: skip
    masks = sampler(epoch=0, step=0, places_B=torch.arange(len(images_B3HW)))
    title = (
        f'Masks, sampler "{config.mask.sampler}", context "{config.mask.context}": '
        f"{masks.context_k:g} context patches, "
        f"{masks.target_idx_BMP.shape[1]} x {masks.target_idx_BMP.shape[2]} target patches"
    )
    print(
        pictures.draw_masks(images_B3HW, data.mean, data.std, masks, sampler.grid, args.out, title)
    )


# ---------------------------------------------------------------------------------- command line


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


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cjepa_fast.eval",
        description=__doc__.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="knn|linear|attention|curves|masks")
    _measure_options(commands.add_parser("knn", help="k nearest neighbours on features"), "knn")
    _measure_options(commands.add_parser("linear", help="logistic regression on them"), "linear")

    sub = commands.add_parser("attention", help="target and context encoder side by side")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--images", required=True, metavar="SET", help="a folder, shards or 'shapes'")
    sub.set_defaults(command=draw_attention)
    _picture_options(sub)

    sub = commands.add_parser("curves", help="the log of one or several runs")
    sub.add_argument("runs", nargs="+", metavar="RUN")
    sub.add_argument("--out", required=True, metavar="FILE.png")
    sub.set_defaults(command=draw_curves)

    sub = commands.add_parser("masks", help="a run's masks on its images")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--images", metavar="SET", help="default: the run's own")
    sub.set_defaults(command=draw_masks)
    _picture_options(sub)
    return parser.parse_args(argv)


def _measure_options(sub: argparse.ArgumentParser, metric: str) -> None:
    sub.add_argument("run", metavar="RUN")
    sub.add_argument("--data", required=True, metavar="SET", help="labelled; 'shapes' has its own")
    sub.add_argument("--test", metavar="SET", help="default: 20 %% of --data, by name")
    sub.add_argument("--max-train", type=positive, metavar="N", help="use N training images")
    sub.add_argument("--untrained", action="store_true", help="also a fresh encoder beside it")
    sub.add_argument("--crop", type=share, help="centre crop; default: the run's eval.crop")
    sub.add_argument("--bf16", action="store_true", help="the encoder in bf16")
    sub.add_argument("--batch-size", type=positive, default=128)
    sub.add_argument("--threads", type=positive, default=2, help="decoding threads")
    sub.add_argument("--json", metavar="FILE", help="write the numbers there too")
    sub.set_defaults(command=measure, metric=metric, pixels=False, k=None, temperature=None)
    if metric == "knn":
        sub.add_argument("--k", type=positive, help="neighbours; default: the run's eval.k")
        sub.add_argument("--temperature", type=above_zero, help="default: the run's, or 0.07")
        sub.add_argument("--pixels", action="store_true", help="also raw pixels and mean colour")
        sub.add_argument("--linear", action="store_true", help="also a linear probe, on the same")


def _picture_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", required=True, metavar="FILE.png")
    sub.add_argument("--count", type=positive, default=6, help="how many images")


if __name__ == "__main__":
    sys.exit(main())
