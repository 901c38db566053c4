"""A contact sheet: images, and the others of the set that are nearest to each by their features.

Shapes: n images of the set, q queries, k neighbours, D width.
"""

import argparse
import itertools

import torch
import torch.nn.functional as F

from cjepa_fast.checkpoint.encoders import load_encoder, load_encoders
from cjepa_fast.data.sources import ImageSet, open_images
from cjepa_fast.eval.features import extract
from cjepa_fast.eval.figures import style
from cjepa_fast.eval.figures.curves import short_names
from cjepa_fast.eval.figures.sheets import as_arrays, frame, load_images, spread_over
from cjepa_fast.eval.figures.style import STYLE, save
from cjepa_fast.eval.options import add_features, add_out, add_reading, positive, tell_other_limits
from cjepa_fast.eval.records import Row, print_numbers
from cjepa_fast.eval.splits import cache_of
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.distributed import rank
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.runtime.image_size import ImageSize, with_short_side

Neighbours = tuple[torch.Tensor, torch.Tensor]  # similarities and rows, as `nearest` gives them
HEADINGS = {
    "similarity": "similarity",
    "any_two": "of any two images",
    "agreement": "of the query's class %",
    "chance": "chance %",
}
PIXELS = 128  # the short side of each image
LONGEST = 14  # letters of a class's name
RIGHT, WRONG, QUERY = (style.BLUE, "-"), (style.ORANGE, (0, (2, 1.2))), ("0.4", "-")  # frames


def nearest(features_nD: torch.Tensor, query_q: torch.Tensor, k: int) -> Neighbours:
    """Cosine similarities (q, k) of the images at rows query_q to their nearest others, falling,
    and the rows of these (q, k). Raises ValueError for more neighbours than there are others."""
    if not 1 <= k < len(features_nD):
        raise ValueError(f"{k} neighbours of {len(features_nD)} images: take fewer")
    unit_nD = F.normalize(features_nD.float(), dim=1)
    similarity_qn = unit_nD[query_q] @ unit_nD.T
    similarity_qn[torch.arange(len(query_q)), query_q] = -torch.inf
    return tuple(similarity_qn.topk(k, dim=1))


def figure(
    images: ImageSet,
    index_n: torch.Tensor,
    query_q: torch.Tensor,
    found: dict[str, Neighbours],
    title: str,
    crop: float = 1.0,
    image_size: ImageSize = PIXELS,
    channels: int = 3,
):
    """A row a query: it first, then by encoder its neighbours, what `nearest` found of features of
    the images at the indices index_n. image_size, channels: of what is shown. Where the set is
    labelled, a frame says if the class is the query's."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    similarity_qk = torch.cat([similarity_qk for similarity_qk, _ in found.values()], 1)
    rows_qc = torch.cat([query_q[:, None], *(near_qk for _, near_qk in found.values())], 1)
    begins = itertools.accumulate((near.shape[1] for _, near in found.values()), initial=1)
    headings = dict(zip(begins, found, strict=False)) if len(found) > 1 else {}
    wanted = index_n[rows_qc]  # of the set
    keep, inside = wanted.unique(return_inverse=True)
    look = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    loaded = load_images(images, len(keep), image_size=image_size, crop=crop, keep=keep, **look)
    shown = as_arrays(loaded, **look)
    q, c = wanted.shape
    with rc_context(STYLE | {"axes.titlesize": 7}):
        figure = Figure(figsize=(1.25 * c, 1.45 * q + 0.9), layout="constrained")
        for row, axes_c in enumerate(figure.subplots(q, c, squeeze=False)):
            for column, axes in enumerate(axes_c):
                axes.imshow(shown[inside[row, column]])
                said = f"{similarity_qk[row, column - 1]:.3f}" if column else "query"
                (colour, dashes), width = QUERY, 1.0
                if images.labels is not None:
                    label, of_query = images.labels[wanted[row, [column, 0]]].tolist()
                    said += f"  {_short(images.classes, label)}"
                    if column:
                        (colour, dashes), width = RIGHT if label == of_query else WRONG, 2.5
                if row == 0 and headings:
                    said = f"{headings.get(column, '')}\n{said}"
                axes.set_title(said, loc="left" if column in headings else "center")
                frame(axes, colour, width, dashes)
        figure.suptitle(title, size=9)
    return figure


def _short(classes: list[str] | None, label: int) -> str:
    """A class's name, short enough to stand over its image."""
    if not classes:
        return f"class {label}"
    name = classes[label]
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def any_two(features_nD: torch.Tensor) -> float:
    """The mean cosine similarity of two different images."""
    n, sum_D = len(features_nD), F.normalize(features_nD.double(), dim=1).sum(0)
    return ((sum_D.square().sum() - n) / (n * (n - 1))).item()


def chance(labels_n: torch.Tensor, query_q: torch.Tensor) -> float:
    """Percent of all other images that have their query's class: what random neighbours reach."""
    same_qn = labels_n[query_q][:, None] == labels_n
    return 100 * ((same_qn.sum(1) - 1) / (len(labels_n) - 1)).double().mean().item()


def agreement(labels: torch.Tensor, index_n, query_q, near_qk) -> float:
    """Percent of the neighbours that have their query's class."""
    same_qk = labels[index_n[near_qk]] == labels[index_n[query_q]][:, None]
    return 100 * same_qk.double().mean().item()


def sheet_of(
    encoders: dict[str, Encoder], images: ImageSet, *, queries: int, k: int, crop: float, **reading
) -> tuple[object, list[Row]]:
    """The figure, for encoders by name on a set, and a row of HEADINGS for each. reading: the rest
    of what `extract` takes. Raises ValueError where an image could be read for one of them only."""
    found, indices, rows = {}, [], []
    for name, encoder in encoders.items():
        features_nD, index_n = extract(encoder, images, crop=crop, **reading)
        query_q = spread_over(index_n, queries)
        found[name] = nearest(features_nD, query_q, k)
        indices.append(index_n)
        near = found[name][0].mean().item()
        rows.append({"encoder": name, "similarity": near, "any_two": any_two(features_nD)})
        if images.labels is not None:
            rows[-1]["agreement"] = agreement(images.labels, index_n, query_q, found[name][1])
            rows[-1]["chance"] = chance(images.labels[index_n], query_q)
    if not all(torch.equal(index_n, indices[0]) for index_n in indices):
        raise ValueError(f"{images.root}: some images could be read only now and then: try again")
    title = "\n".join(["Nearest neighbours by cosine similarity", *map(describe, rows)])
    if images.labels is not None:
        title += "\nframe: solid blue the query's class, dashed orange another"
    first = next(iter(encoders.values()))
    seen = with_short_side(first.image_size, PIXELS), first.channels
    return figure(images, indices[0], query_q, found, title, crop, *seen), rows


def describe(row: Row) -> str:
    """A row of HEADINGS in words."""
    text = f"{row['encoder']}: similarity {row['similarity']:.2f}, of any two images "
    text += f"{row['any_two']:.2f}"
    if "agreement" in row:
        text += f"; {row['agreement']:.0f} % have the query's class, chance {row['chance']:.1f} %"
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="runs or checkpoints")
    parser.add_argument("--which", choices=("target", "context", "both"), default="target")
    parser.add_argument("--data", required=True, metavar="SET", help="labels are used where it has")
    add_out(parser)
    parser.add_argument("--count", type=positive, default=8, help="queries")
    parser.add_argument(
        "--neighbours", type=positive, metavar="K", help="default: 8, fewer side by side"
    )
    parser.add_argument("--max-images", type=positive, metavar="N", help="search N images")
    add_reading(parser)
    add_features(parser)


def run(args: argparse.Namespace) -> None:
    tell_other_limits(args.checkpoints, args.limits)
    images = open_images(args.data, limits=args.limits)
    encoders = {}
    for name, checkpoint in zip(short_names(args.checkpoints), args.checkpoints, strict=True):
        if args.which == "both":
            both = load_encoders(checkpoint).items()
            encoders |= {f"{name}, {which}": encoder for which, encoder in both}
        else:
            encoders[name] = load_encoder(checkpoint, args.which)
    k = args.neighbours or max(3, 8 // len(encoders))
    drawn, rows = sheet_of(
        encoders, images, queries=args.count, k=k, crop=args.crop,
        keep=spread_over(images, args.max_images or len(images)),
        batch_size=args.batch_size, threads=args.threads, bf16=args.bf16, device=default_device(),
        cache=cache_of(args),
    )  # fmt: skip
    print_numbers(args, rows, HEADINGS, "encoder")
    if rank() == 0:
        print(save(drawn, args.out))
