"""Signs of collapse, without labels: how much room the features of a set take.

Views are random crops, as training draws them before it masks. LiDAR's authors take the views of
the method itself, crops and masks both; here the encoder sees whole crops, since that is what every
evaluation reads, needs no more than an encoder's file, and does not change with the settings of
the masks, so that any two runs compare.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from cjepa_fast.checkpoint.encoders import load_encoders, located
from cjepa_fast.data import crops, rng
from cjepa_fast.data.sources import ImageSet, open_images
from cjepa_fast.eval.features import extract, image_vectors
from cjepa_fast.eval.figures import style
from cjepa_fast.eval.figures.sheets import spread_over
from cjepa_fast.eval.figures.style import STYLE, save
from cjepa_fast.eval.options import add_checkpoint, add_features, add_reading, encoders_of, positive
from cjepa_fast.eval.probes import spread
from cjepa_fast.eval.records import Row, report
from cjepa_fast.eval.splits import cache_of
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.telemetry import representation_stats
from cjepa_fast.telemetry.progress import shown_clock

HEADINGS = {
    "images": "images",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "std_mean": "std",
    "std_min": "least std",
    "dead": "dead dims %",
    "uniformity": "uniformity",
    "alignment": "alignment",
    "by_position": "by position %",
    "by_image": "by image %",
    "by_both": "by both %",
}
SETTINGS = ("data", "count", "views", "crop", "bf16", "seed")
CROP_SCALE, CROP_RATIO = (0.3, 1.0), (3 / 4, 4 / 3)  # I-JEPA's
TOKEN_IMAGES = 256  # whose patches are held at once


def measure(
    encoder: Encoder,
    images: ImageSet,
    *,
    count: int = 1000,
    views: int = 5,
    seed: int = 0,
    crop: float = 1.0,
    cache: Path | None = None,
    keep: torch.Tensor | None = None,
    clean_nD: torch.Tensor | None = None,
    **reading,
) -> dict[str, float | list[float] | None]:
    """HEADINGS' measures of `count` images spread over the set, and two spectra, largest first:
    `singular_values` of the features as they are, `stds` of their dimensions. None is what is not
    defined, as shares of the variance of patches that are all alike.

    crop: of the centre, for all but LiDAR and alignment, which take `views` random crops an image.
    keep: positions instead, and clean_nD: their features, where these are known.
    reading: device, batch_size, threads, bf16. Raises ValueError for fewer than two images, or
    views.
    """
    if views < 2:
        raise ValueError(f"--views {views}: LiDAR and alignment need at least 2 crops of an image")
    keep = spread_over(images, count) if keep is None else keep
    own = {"crop": crop, **reading}
    if clean_nD is None:
        clean_nD, _ = extract(encoder, images, keep=keep, cache=cache, **own)
    tokens_nND, _ = extract(
        encoder, images, keep=keep[:: -(-len(keep) // TOKEN_IMAGES)], pooled=False, title="patches",
        **own,
    )  # fmt: skip
    views_nqD = _views(encoder, images, keep, views, seed, **reading)
    with shown_clock("signs of collapse"):
        stats, stds = representation_stats(clean_nD), spread.deviations(clean_nD)
        shares = {name: 100 * share for name, share in spread.token_shares(tokens_nND).items()}
        measures = {
            "rankme": stats["rankme"].item(),
            "lidar": spread.lidar(views_nqD),
            "std_mean": stds.mean().item(),
            "std_min": stds.min().item(),
            "dead": 100 * spread.dead_share(clean_nD),
            "uniformity": spread.uniformity(clean_nD),
            "alignment": spread.alignment(views_nqD),
            **shares,
        }
        return {
            "images": len(clean_nD),
            **{k: x if math.isfinite(x) else None for k, x in measures.items()},
            "singular_values": torch.linalg.svdvals(clean_nD).tolist(),
            "stds": stds.tolist(),
        }


@torch.inference_mode()
def _views(encoder, images, keep, views, seed, *, device, bf16=False, **reading) -> torch.Tensor:
    """Features of random crops of each image: (n, q, D), of those of keep (n,) all whose crops can
    be used. How many are left out is said."""
    keep_nq = keep.repeat_interleave(views)
    uniforms = rng.uniforms(seed, rng.CROP, 0, torch.arange(len(keep_nq)), crops.CROP_UNIFORMS)
    windows_nq4 = crops.random_resized(
        images.sizes_N2[keep_nq.numpy()],
        uniforms.numpy(),
        CROP_SCALE,
        CROP_RATIO,
        encoder.image_size,
    )
    encoder = encoder.to(device)

    def pooled(images_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            return encoder(images_BCHW).float().mean(1)

    features, index = image_vectors(
        images, pooled, image_size=encoder.image_size, mean=encoder.mean, std=encoder.std,
        keep=keep_nq, crop=1.0, windows_n4=windows_nq4, device=device, title="views", **reading,
    )  # fmt: skip
    _, count_i = index.unique_consecutive(return_counts=True)
    whole_i = count_i == views  # of a JPEG that ends early some crops may be left out
    if (others := len(keep) - int(whole_i.sum())) and distributed.rank() == 0:
        print(f"{others} of {len(keep)} images left out of LiDAR and alignment: not all of their "
              f"{views} crops can be used")  # fmt: skip
    return features[whole_i.repeat_interleave(count_i)].unflatten(0, (-1, views))


def draw(rows: list[Row], out: Path | str, title: str) -> Path:
    """Both spectra, and how the variance of the patch tokens divides, an encoder a colour."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        singular, stds, tokens = figure.subplots(1, 3)
        for i, row in enumerate(rows):
            look = {k: v for k, v in style.line(i).items() if k != "marker"}
            look["linewidth"] = 1.2 + 0.8 * (len(rows) - 1 - i)  # lines may lie on each other
            known = [
                f"{HEADINGS[k]} {row[k]:.1f}" for k in ("rankme", "lidar") if row[k] is not None
            ]
            label = f"{row['encoder']} ({', '.join(known)})"
            values = np.array(row["singular_values"])
            singular.plot(range(1, len(values) + 1), values / values.sum(), label=label, **look)
            stds.plot(range(1, len(row["stds"]) + 1), row["stds"], **look)
        singular.set_ylabel("singular value of the features (share of sum)")
        stds.set_ylabel("standard deviation of a dimension")
        singular.set_yscale("log")
        singular.set_ylim(bottom=1e-6)
        stds.set_ylim(bottom=0)
        for axes in (singular, stds):
            axes.set_xlabel("rank")
            axes.grid()
        _divided(tokens, rows)
        figure.suptitle(title)
        figure.legend(*singular.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return save(figure, out)


def _divided(axes, rows: list[Row]) -> None:
    names = [row["encoder"] for row in rows]
    left = np.zeros(len(rows))
    parts = {"by_position": "0.75", "by_image": style.SKY, "by_both": style.ORANGE}
    for key, colour in parts.items():
        widths = np.array([row[key] or 0.0 for row in rows])
        bars = axes.barh(names, widths, left=left, color=colour, label=key.replace("_", " "))
        axes.bar_label(bars, [f"{w:.0f}" if w >= 5 else "" for w in widths], label_type="center")
        left += widths
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("variance of the patch tokens (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--data", required=True, metavar="SET", help="needs no labels")
    parser.add_argument(
        "--count",
        type=positive,
        default=1000,
        help="of its images; RankMe wants more than the width",
    )
    parser.add_argument("--views", type=positive, default=5, help="crops of an image")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="draw the spectra there")
    add_reading(parser)
    add_features(parser)


def run(args: argparse.Namespace) -> None:
    """A row for each encoder: the other one of the run too, where it is there."""
    images = open_images(args.data, limits=args.limits)
    encoders = encoders_of(args)
    others = load_encoders(args.checkpoint) if located(args.checkpoint).is_dir() else {}
    encoders |= {which: other for which, other in others.items() if which != args.which}
    options = {name: getattr(args, name) for name in ("count", "views", "seed", "crop", "bf16")}
    options |= {"batch_size": args.batch_size, "threads": args.threads}
    rows = []
    for name, encoder in encoders.items():
        found = measure(encoder, images, device=default_device(), cache=cache_of(args), **options)
        rows.append({"encoder": name, **found})
    if args.out and distributed.rank() == 0:
        of = f"{Path(args.checkpoint).resolve().name} on {Path(args.data).name}"
        print(draw(rows, args.out, f"Room that the features take: {of}"))
    report(args, rows, HEADINGS, SETTINGS, figure=args.out)
