"""The loader's batches as fast as they come, beside DALI's own reader with the same options.

    python bench/decode.py --data-path /my/images --config vit_b --turns 7
    python bench/decode.py --data-path /my/few/images --epochs 10      # and the memory of 10 epochs

    python bench/decode.py --data-path /my/images --pillow             # and the loader by Pillow

DALI's own way: readers.file, decoders.image_random_crop, resize, crop_mirror_normalize, as many
threads and as large a batch, copied to a tensor of the run's dtype. They take turns, each on a
pipeline that has been filled; figures are medians over the turns. Processor time is that of all
threads of this process, and says more on a busy machine.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import files
import numpy as np
import torch
from hardware import provenance

from cjepa_fast import config as configuration
from cjepa_fast.config import Config, ConfigError
from cjepa_fast.data import sources
from cjepa_fast.data.loader import Loader
from cjepa_fast.runtime import distributed
from cjepa_fast.runtime.image_size import aspect, height_width, shown
from cjepa_fast.runtime.rates import synchronize
from cjepa_fast.training import build

FILLED = 3  # batches beside the loader's own that are made before the clock starts
PAGE_MIB = 4096 / 2**20


def dali_batches(paths: list[str], config: Config, device: torch.device) -> Iterator[torch.Tensor]:
    """Endless (B, C, H, W) batches of JPEG files, by DALI alone."""
    from nvidia.dali import Pipeline, fn, types

    data, gpu = config.data, device.type == "cuda"
    gpu_options = {"hw_decoder_load": data.hw_decoder_load} if gpu else {}
    kind = {1: types.GRAY, 3: types.RGB}.get(data.channels, types.ANY_DATA)
    ratio = [limit * aspect(data.image_size) for limit in data.crop_ratio]
    pipe = Pipeline(data.micro_batch_size, data.threads, 0 if gpu else None, seed=config.run.seed)
    with pipe:
        encoded, _ = fn.readers.file(files=paths, random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(
            encoded, device="mixed" if gpu else "cpu", output_type=kind,
            random_area=data.crop_scale, random_aspect_ratio=ratio, **gpu_options,
        )  # fmt: skip
        size = height_width(data.image_size)
        images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW",
            mean=[255.0 * m for m in data.mean], std=[255.0 * s for s in data.std],
            mirror=fn.random.coin_flip() if data.flip else 0,
        )  # fmt: skip
        pipe.set_outputs(images)
    pipe.build()
    dtype = build.compute_dtype(config)
    while True:
        (made,) = pipe.run()
        yield on_torch(made.as_tensor(), dtype, device)


def on_torch(tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.from_numpy(np.asarray(tensor)).to(dtype, copy=True)
    from nvidia.dali.plugin.pytorch import feed_ndarray

    copy = torch.empty(tensor.shape(), device=device)
    feed_ndarray(tensor, copy, cuda_stream=torch.cuda.current_stream(device))
    return copy.to(dtype)


def ours_batches(loader: Loader) -> Iterator[torch.Tensor]:
    with contextlib.closing(loader):
        for batch in loader.iterate(0):
            yield batch.images_BCHW


def timed_turn(
    made: Iterator[torch.Tensor], batches: int, filled: int, device: torch.device
) -> dict[str, float]:
    """images/s and processor milliseconds an image, of `batches` after `filled` others."""
    for _ in range(filled):
        next(made)
    synchronize(device)
    began, used = time.perf_counter(), time.process_time()
    images = sum(len(images) for images in itertools.islice(made, batches))
    synchronize(device)
    took_s, used_s = time.perf_counter() - began, time.process_time() - used
    return {"images_per_s": images / took_s, "cpu_ms_per_image": 1e3 * used_s / images}


def take_turns(
    readers: dict[str, Callable[[], Iterator[torch.Tensor]]],
    turns: int,
    batches: int,
    filled: int,
    device: torch.device,
) -> dict[str, dict[str, list[float]]]:
    """By reader and figure, the turns' values. A reader runs only in its turns."""
    found: dict[str, dict[str, list[float]]] = {reader: {} for reader in readers}
    for _ in range(turns):
        for reader, begin in readers.items():
            with contextlib.closing(begin()) as made:
                for name, value in timed_turn(made, batches, filled, device).items():
                    found[reader].setdefault(name, []).append(value)
    return found


def summary(found: dict[str, dict[str, list[float]]]) -> dict:
    """Medians by reader, and ours over DALI's: above 1 is better of images/s, worse of processor.

    Of the loader by Pillow, where it is a reader, over the loader by DALI.
    """
    medians = {
        reader: {name: statistics.median(values) for name, values in figures.items()}
        for reader, figures in found.items()
    }

    def ratios(one: str, other: str) -> dict[str, float]:
        return {name: value / medians[other][name] for name, value in medians[one].items()}

    row = {"medians": medians, "ours_over_dali": ratios("ours", "DALI"), "turns": found}
    return row | ({"pillow_over_ours": ratios("Pillow", "ours")} if "Pillow" in found else {})


def resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * PAGE_MIB


def resident_by_epoch(loader: Loader, epochs: int) -> list[float]:
    """MiB that this process holds after each epoch of decoding alone."""
    found = []
    with contextlib.closing(loader):
        batches = loader.iterate(0)
        for _ in range(epochs):
            for _ in range(loader.steps_per_epoch * loader.accumulation):
                next(batches)
            found.append(resident_mib())
    return found


def configured(args: argparse.Namespace) -> Config:
    config = configuration.load(args.config, args.overrides)
    batch = args.batch or config.data.micro_batch_size
    sizes = [f"data.micro_batch_size={batch}", f"data.batch_size={batch}"]
    # Colour is no part of the comparison; and what DALI is held against is decoded by DALI.
    own = [f"data.path={args.data_path}", "data.colour=0", "data.decoder=dali"]
    return configuration.load(args.config, [*args.overrides, *sizes, *own])


def measure(config: Config, args: argparse.Namespace, device: torch.device) -> dict:
    images = sources.open_images(args.data_path)
    paths = [str(args.data_path / images.name(i)) for i in range(len(images))]
    readers = {
        "ours": lambda: ours_batches(build.build_loader(config, device, masks=None)),
        "DALI": lambda: dali_batches(paths, config, device),
    }
    if args.pillow:
        data = config.data.model_copy(update={"decoder": "pillow"})
        other = config.model_copy(update={"data": data})
        readers["Pillow"] = lambda: ours_batches(build.build_loader(other, device, masks=None))
    filled = config.data.prefetch + FILLED
    row = summary(take_turns(readers, args.turns, args.batches, filled, device))
    if args.epochs:
        loader = build.build_loader(config, device, masks=None)
        row["resident_mib"] = resident_by_epoch(loader, args.epochs)
    sizes = {"images": len(images), "batch": config.data.batch_size, "threads": config.data.threads}
    return {"config": args.config, "image_size": config.data.image_size, **sizes, **row}


def text(row: dict) -> str:
    lines = [f"{row['config']}: {row['images']} files, batch {row['batch']}, "
             f"{row['threads']} threads, {shown(row['image_size'])} pixels"]  # fmt: skip
    for reader, found in row["medians"].items():
        lines.append(f"{reader}: {found['images_per_s']:.0f} images/s, processor "
                     f"{found['cpu_ms_per_image']:.2f} ms an image")  # fmt: skip
    ratios = row["ours_over_dali"]
    lines.append(f"ours over DALI's: {ratios['images_per_s']:.3f} of the images/s, "
                 f"{ratios['cpu_ms_per_image']:.3f} of the processor time")  # fmt: skip
    if ratios := row.get("pillow_over_ours"):
        lines.append(f"ours by Pillow over ours: {ratios['images_per_s']:.3f} of the images/s, "
                     f"{ratios['cpu_ms_per_image']:.3f} of the processor time")  # fmt: skip
    if held := row.get("resident_mib"):
        lines.append("MiB held after each epoch: " + ", ".join(f"{mib:.0f}" for mib in held))
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-path", type=Path, required=True, metavar="FOLDER", help="of JPEGs")
    parser.add_argument("--config", default="vit_b", metavar="NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument(
        "--batch-size", dest="batch", type=int, help="images; default: the config's micro-batch"
    )
    parser.add_argument("--turns", type=int, default=5, help="of each")
    parser.add_argument("--batches", type=int, default=8, help="timed in a turn")
    parser.add_argument("--epochs", type=int, default=0, help="watch the memory of so many")
    parser.add_argument("--pillow", action="store_true", help="also the loader by Pillow")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    for name, least in (("batch", 1), ("turns", 1), ("batches", 1), ("epochs", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    if not args.data_path.is_dir():
        parser.error(f"--data-path {args.data_path}: no folder; DALI's own reader wants files")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        config = configured(args)
        device = distributed.start(config.run.seed)
        row = measure(build.with_precision(config, device), args, device)
    except (ConfigError, ValueError) as error:  # the user's input
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text(row))
    if args.json:
        files.write({**provenance(device), **row}, args.json)
    return 0


if __name__ == "__main__":
    distributed.leave(main(sys.argv[1:]))
