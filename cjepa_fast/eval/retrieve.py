"""A contact sheet: images, and the others of the set that are nearest to each by their features.

Shapes: n images of the set, q queries, k neighbours, D width.
"""

import argparse

import torch
import torch.nn.functional as F

from cjepa_fast.data.sources import ImageSet, open_images
from cjepa_fast.encoders import load_encoder
from cjepa_fast.eval import command
from cjepa_fast.eval.curves import short_names
from cjepa_fast.eval.features import extract
from cjepa_fast.eval.pictures import FIGURE, as_pictures, load_images, save, spread_over

PIXELS = 128  # a side of each picture
RIGHT, WRONG, QUERY = "#31a354", "#d62728", "0.4"  # colours of the frames


def nearest(
    features_nD: torch.Tensor, query_q: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
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
    place_n: torch.Tensor,
    query_q: torch.Tensor,
    found: tuple[torch.Tensor, torch.Tensor],
    title: str,
    crop: float = 1.0,
):
    """A row a query: it first, then its neighbours, what `nearest` found of features of the images
    at positions place_n. Where the set is labelled, a frame says if the class is the query's."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    similarity_qk, near_qk = found
    rows_qc = torch.cat([query_q[:, None], near_qk], 1)
    wanted = place_n[rows_qc]  # of the set
    keep, inside = wanted.unique(return_inverse=True)
    loaded = load_images(images, len(keep), image_size=PIXELS, crop=crop, keep=keep)
    pictures = as_pictures(loaded, (0.0,) * 3, (1.0,) * 3)
    q, c = wanted.shape
    with rc_context(FIGURE | {"axes.titlesize": 7}):
        figure = Figure(figsize=(1.25 * c, 1.45 * q + 0.6), layout="constrained")
        for row, axes_c in enumerate(figure.subplots(q, c, squeeze=False)):
            for column, axes in enumerate(axes_c):
                axes.imshow(pictures[inside[row, column]])
                said = f"{similarity_qk[row, column - 1]:.3f}" if column else "query"
                colour, width = QUERY, 1.0
                if images.labels is not None:
                    label, of_query = images.labels[wanted[row, [column, 0]]].tolist()
                    said += f"  {images.classes[label] if images.classes else f'class {label}'}"
                    if column:
                        colour, width = (RIGHT if label == of_query else WRONG), 2.5
                axes.set_title(said)
                _frame(axes, colour, width)
        figure.suptitle(title)
    return figure


def _frame(axes, colour: str, width: float) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=width)


def agreement(labels: torch.Tensor, place_n, query_q, near_qk) -> float:
    """Percent of the neighbours that have their query's class."""
    same_qk = labels[place_n[near_qk]] == labels[place_n[query_q]][:, None]
    return 100 * same_qk.double().mean().item()


def sheet_of(encoder, images: ImageSet, name: str, *, queries: int, k: int, crop: float, **reading):
    """The figure, for an encoder on a set. reading: the rest of what `extract` takes."""
    features_nD, place_n = extract(encoder, images, crop=crop, **reading)
    query_q = spread_over(place_n, queries)
    found = nearest(features_nD, query_q, k)
    title = f"Nearest neighbours by cosine similarity: {name}"
    if images.labels is not None:
        right = agreement(images.labels, place_n, query_q, found[1])
        title += f"; {right:.0f} % of those shown are of the query's class (green)"
    return figure(images, place_n, query_q, found, title, crop)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--which", choices=("target", "context"), default="target", help="encoder")
    parser.add_argument("--data", required=True, metavar="SET", help="labels are used where it has")
    parser.add_argument("--out", required=True, metavar="FILE.png")
    parser.add_argument("--count", type=command.positive, default=8, help="queries")
    parser.add_argument("--neighbours", type=command.positive, default=8, metavar="K")
    parser.add_argument("--max-images", type=command.positive, metavar="N", help="search N images")
    command.add_reading(parser)
    command.add_features(parser)


def run(args: argparse.Namespace) -> None:
    images = open_images(args.data)
    encoder = load_encoder(args.checkpoint, args.which)
    (name,) = short_names([args.checkpoint])
    drawn = sheet_of(
        encoder, images, name, queries=args.count, k=args.neighbours, crop=args.crop,
        keep=spread_over(images, args.max_images or len(images)),
        batch_size=args.batch_size, threads=args.threads, bf16=args.bf16, device=command.device(),
        cache=command.cache_of(args),
    )  # fmt: skip
    print(save(drawn, args.out))
