"""The target encoder in fp8 beside bf16: how far off its features are, and how fast it is.

    python bench/fp8.py                         # vit_b, vit_l and vit_h; at toy size on a CPU
    python bench/fp8.py --encoder runs/vit_h --json fp8.json --data TRAIN --test TEST

The error is that of all tokens against bf16, relative, of smooth random images; "bf16" is bf16's
own against fp32. Without --encoder the weights are untrained, and a trained encoder's features are
what counts: --data adds kNN on them. On a CPU fast sums are simulated (model/fp8.py: short_sums).
The variants take turns on one micro-batch; a figure is the median.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import files
import hardware
import torch
import torch.nn.functional as F
from stopwatch import Stopwatch

from cjepa_fast import config as configuration
from cjepa_fast import load_encoder
from cjepa_fast.eval.features import image_vectors
from cjepa_fast.eval.probes import knn
from cjepa_fast.eval.splits import labelled_splits
from cjepa_fast.model import fp8
from cjepa_fast.model.attention_trial import Shape, fastest
from cjepa_fast.model.flops import block_flop
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.image_size import height_width
from cjepa_fast.training import build

TOY = ["data.image_size=64", "model.patch_size=16", "model.width=48", "model.heads=3"]
TOY += ["model.depth=2", "data.micro_batch_size=2"]
CHECKED = 8  # images whose features are compared
MOST = 5000  # images to fit kNN on, and to score


def encoders(
    names: list[str], trained: str | None, device: torch.device
) -> Iterator[tuple[str, Encoder, int]]:
    """Name, encoder and images a micro-batch. Weights are drawn on the device: ViT-H's take a CPU
    ten seconds."""
    toy = device.type == "cpu"
    if trained:
        yield trained, load_encoder(trained), 2 if toy else 128
        return
    for name in names:
        config = configuration.load(name, TOY if toy else [])
        torch.manual_seed(0)
        with device:
            encoder = build.build_networks(config).encoder
        yield name, encoder, config.data.micro_batch_size


def pictures(count: int, encoder: Encoder, device: torch.device) -> torch.Tensor:
    height, width = height_width(encoder.image_size)
    coarse = torch.randn(count, encoder.channels, height // 8, width // 8, device=device)
    return F.interpolate(coarse, size=(height, width), mode="bicubic")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def knn_of(tokens_of: Callable, encoder: Encoder, splits: list, device: torch.device) -> float:
    """Percent right by the 20 nearest of one variant's features, pooled as evaluation does."""
    vectors = []
    for images, keep in splits:
        features_nD, index_n = image_vectors(
            images, lambda x: tokens_of(x.bfloat16()).float().mean(1), keep=keep, crop=1.0,
            image_size=encoder.image_size, mean=encoder.mean, std=encoder.std, batch_size=128,
            device=device, threads=2, title="features",
        )  # fmt: skip
        vectors += [features_nD, images.labels[index_n]]
    return knn.both(*vectors, k=20, temperature=0.07)["top1"]


@torch.no_grad()
def row_of(
    name: str, encoder: Encoder, batch: int, device: torch.device, seconds: float, splits: list = ()
) -> dict:
    """splits: the images to fit kNN on and to score, as labelled_splits gives them."""
    encoder = encoder.to(device).eval()
    images = pictures(batch, encoder, device).bfloat16()
    some = images[:CHECKED]
    exact, plain = encoder(some.float()), copy.deepcopy(encoder).bfloat16()
    N, heads = encoder.grid[0] * encoder.grid[1], encoder.heads
    shape = Shape(batch, heads, N, N, encoder.width // heads, False)
    backend, _ = fastest(shape, device, torch.bfloat16)
    plain.fused = True  # where there is a GPU
    for block in plain.blocks:
        block.attn.backend = backend
    narrow = copy.deepcopy(plain)
    fp8.linears_to_fp8(narrow)
    wanted = plain(some)

    def with_fast_sums(images: torch.Tensor) -> torch.Tensor:
        fp8.FAST_SUMS = True
        tokens = narrow(images)
        fp8.FAST_SUMS = False
        return tokens

    errors = {
        "bf16": relative(wanted, exact),
        "fp8": relative(narrow(some), wanted),
        "fp8, fast sums": relative(with_fast_sums(some), wanted),
    }

    variants = {"bf16": plain, "fp8": narrow, "fp8, fast sums": with_fast_sums}
    scores = {
        name: knn_of(tokens_of, encoder, splits, device)
        for name, tokens_of in variants.items() if splits
    }  # fmt: skip
    calls = {name: lambda f=tokens_of: f(images) for name, tokens_of in variants.items()}
    for call in calls.values():  # compile, and warm up
        call()
        call()
    times = Stopwatch(device).turns(calls, seconds)
    ms = {variant: statistics.median(us) / 1e3 for variant, us in times.items()}
    flop = batch * encoder.depth * block_flop(N, encoder.width, encoder.mlp_ratio)
    return {
        "encoder": name, "batch": batch, "tokens": N, "attention": backend, "errors": errors,
        "ms": ms, "tflops": {variant: flop / t / 1e9 for variant, t in ms.items()},
        "speedup": {variant: ms["bf16"] / t for variant, t in ms.items() if variant != "bf16"},
        "knn": scores,
    }  # fmt: skip


def table(rows: list[dict], about: dict) -> str:
    lines = [
        f"{about['hardware']['device']}; torch {about['versions']['torch']}; `{about['command']}`",
        "",
        "| encoder | images | error of bf16 % | of fp8 % | with fast sums % | bf16 ms | fp8 ms "
        "| × bf16 | fast sums × | fp8 TFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors, ms, speedup = row["errors"], row["ms"], row["speedup"]
        cells = [row["encoder"], str(row["batch"])]
        cells += [f"{100 * errors[name]:.2f}" for name in ("bf16", "fp8", "fp8, fast sums")]
        cells += [f"{ms[name]:.2f}" for name in ("bf16", "fp8")]
        cells += [f"{speedup[name]:.2f}" for name in ("fp8", "fp8, fast sums")]
        lines.append(f"| {' | '.join(cells)} | {row['tflops']['fp8']:.4g} |")
        for variant, top1 in row["knn"].items():
            lines.append(f"\nkNN of {row['encoder']}, {variant}: {top1:.1f} %")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", nargs="+", default=["vit_b", "vit_l", "vit_h"])
    parser.add_argument("--encoder", metavar="RUN", help="a trained one instead, as load_encoder's")
    parser.add_argument("--data", metavar="SET", help="labelled: kNN on the features")
    parser.add_argument("--test", metavar="SET", help="of --data's classes; default: a part of it")
    parser.add_argument(
        "--most", type=int, default=MOST, metavar="N", help="images of either split"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing an encoder, about")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    device = hardware.here()
    try:
        fp8.check_device(device)
        found = encoders(args.config, args.encoder, device)
        splits = labelled_splits(args.data, args.test, args.most, args.most) if args.data else ()
        about, rows = hardware.provenance(device), []
        for one in found:
            rows.append(row_of(*one, device, args.seconds, splits))
            if args.json:
                files.write(about | {"rows": rows}, args.json)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows, about))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
