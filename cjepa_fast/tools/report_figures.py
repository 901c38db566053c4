"""The figures of a report: masks, attention, features and neighbours of its runs."""

import argparse

import torch

from cjepa_fast import config
from cjepa_fast.checkpoint.encoders import load_encoder
from cjepa_fast.data.sources import ImageSet, Limits, open_images
from cjepa_fast.eval.figures import attention, mask_columns, pca, retrieve, side_by_side
from cjepa_fast.eval.figures.sheets import load_images, spread_over
from cjepa_fast.model.vit import count_parameters
from cjepa_fast.runtime.hardware import default_device
from cjepa_fast.tools import html_page
from cjepa_fast.tools.report_run import RunRecord
from cjepa_fast.training import build

SHOWN = 6  # images of a figure; half as many of several runs' masks
SEARCHED = 500  # images that neighbours are looked for among


def sections(runs: list[RunRecord], named: str | None) -> list[tuple[str, str]]:
    """(heading, HTML) of each, or why they are not there. named: images instead of the first
    run's."""
    paths = [config.expand_path(named)] if named else config.image_paths(runs[0].settings.data)
    try:
        limits = Limits.of(runs[0].settings.data)
        images = open_images(paths, limits=limits, log=lambda text: None)
    except (ValueError, OSError) as error:
        why = f"Not drawn, since the images are not here ({error}); --images SET names others."
        return [("Figures", html_page.note(why, "warn"))]
    found = [("Masks", "".join(_masks(run, runs, images) for run in runs))]
    try:
        return found + _of_features(runs, paths, images)
    except (ValueError, OSError) as error:
        return [*found, ("Features", html_page.note(f"Not drawn: {error}", "warn"))]


def _masks(run: RunRecord, runs: list[RunRecord], images: ImageSet) -> str:
    data, sampler = run.settings.data, build.build_masks(run.settings)
    count = SHOWN if len(runs) == 1 else SHOWN // 2
    images_BCHW = load_images(
        images, count, image_size=data.image_size, mean=data.mean, std=data.std
    )
    masks = sampler(epoch=0, step=0, index_B=torch.arange(len(images_BCHW)))
    title = run.name if len(runs) > 1 else ""
    figure = mask_columns.figure(images_BCHW, data.mean, data.std, masks, sampler.grid, title)
    return html_page.figure_image(figure, "images with their context and target blocks")


@torch.inference_mode()
def _of_features(
    runs: list[RunRecord], paths: list[str], images: ImageSet
) -> list[tuple[str, str]]:
    crop = runs[0].settings.eval.crop
    asked = argparse.Namespace(
        images=paths, count=SHOWN, crop=crop, checkpoints=[run.folder for run in runs],
        limits=images.limits,
    )  # fmt: skip
    heads = attention.SINGLE_HEADS if len(runs) == 1 else 0

    def maps(encoders, images_BCHW):
        first = next(iter(encoders.values()))
        return attention.maps(encoders, images_BCHW, first.mean, first.std, heads)

    def nothing(encoder, images_BCHW) -> dict:
        return {}

    column, found, *_ = side_by_side.gather(asked, maps, nothing)
    drawn = {"Attention": (attention.figure(column, found, ""), ATTENTION)}
    column, found, *_ = side_by_side.gather(asked, pca.scores, nothing)
    drawn["PCA of the patch features"] = (pca.figure(column, found, ""), PCA)
    targets = {run.name: load_encoder(run.folder, "target") for run in runs}
    near, _ = retrieve.sheet_of(
        targets, images, queries=SHOWN, k=7 if len(runs) == 1 else max(3, 8 // len(runs)),
        crop=crop, keep=spread_over(images, SEARCHED), device=default_device(),
        bf16=default_device().type == "cuda", title="neighbours",
    )  # fmt: skip
    sizes = ", ".join(f"{count_parameters(encoder):,}" for encoder in targets.values())
    drawn["Neighbours"] = (near, f"By the features of the target encoder ({sizes} parameters).")
    return [
        (name, html_page.note(about) + html_page.figure_image(figure, name))
        for name, (figure, about) in drawn.items()
    ]


ATTENTION = (
    "What each patch receives in the last block, on one scale: 1 is an even share. Evenness is the "
    "maps' entropy as a share of an even map's; near 100 % the encoder looks nowhere in particular."
)
PCA = (
    "The patches along three principal components as red, green and blue, in one basis and on one "
    "scale. Above each column the share of the variance that each colour shows, and the variance "
    "of an image's patches over their squared length: near 0 all patches are alike."
)
