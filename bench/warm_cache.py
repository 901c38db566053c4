"""Triton's cache of the step's kernels for sm_90, made without a GPU.

    python bench/warm_cache.py --out .whl/triton_cache.tar.xz        # here
    python bench/warm_cache.py --unpack .whl/triton_cache.tar.xz     # there, into TRITON_CACHE_DIR
    python bench/warm_cache.py --fill --config vit_h                 # or there, without such a file

A kernel takes some seconds to compile, a step has some forty, and a lease of a GPU is short. Triton
finds a kernel by a hash of its source, of Triton itself, of the assembler's version, and of the
launch: so the file serves the build of Triton that made it, best in an environment like the one it
is for. Steps of the models in the variants that the gate times, and the tuner's candidates with
--tune, run with a stand-in for the driver (stand_in.py), at their own shapes. `--unpack` then has
Triton look for one kernel, and exits with 1 where it was not found, or where kernels/ has changed
since: the others are compiled there.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
if "--out" in sys.argv:
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")

import files
import stand_in
import torch
import tune
import variants
from hardware import ROOT, versions

from cjepa_fast import config as configuration
from cjepa_fast.kernels.common import launch
from cjepa_fast.kernels.ema.rows_update import launch_ema_rows
from cjepa_fast.training import build
from cjepa_fast.training import trainer as trainer_module
from cjepa_fast.training.sizes import model_sizes

ABOUT = "about.json"
MOST_BYTES = 20 * 2**20
SHALLOW = ["model.depth=1", "predictor.depth=1"]  # the blocks of a network launch the same kernels
# The gate's other variants launch the same kernels.
VARIANTS = ["fused", "tanh", "graph_fp8_k78", "graph_tanh_fp8_k78"]
MORE = ["graph_dependent_launch"]  # in a file alone: --fill must end before the gate's first row
NARROW = ["model.width=64", "model.heads=4", "predictor.width=64", "predictor.heads=4"]


def step_of(name: str, overrides: list[str]) -> None:
    """One step of a configuration, forward, backward and update, under stand_in.compiling."""
    from measure import EPOCH_STEPS, synthetic_batches

    fixed = ["mask.context=fixed", "model.attention=triton", "run.precision=bf16"]
    config = configuration.load(name, [*fixed, *overrides])
    batch = config.data.micro_batch_size
    config = configuration.load(name, [*fixed, *overrides, f"data.batch_size={batch}"])
    cpu = torch.device("cpu")
    trainer = trainer_module.Trainer(config, cpu, EPOCH_STEPS)
    trainer.step(next(synthetic_batches(config, cpu, build.build_masks(config))), 0)


def of_lists(launched: stand_in.Launch) -> bool:
    """Whether it is one of kernels/ema/, to which the number of a network's tensors matters."""
    return launched.kernel.fn.__module__.startswith("cjepa_fast.kernels.ema.")


def of_narrow_lists(launched: stand_in.Launch) -> bool:
    """But for the one to which the width of a row matters too: `update_rows`."""
    return of_lists(launched) and launched.name != "ema_rows"


def update_rows(name: str, overrides: list[str]) -> None:
    """The EMA of a target's matrices in FP8, in the number and widths of a configuration: one row
    stands for a matrix, since a launch is of their number."""
    sizes = model_sizes(configuration.load(name, overrides))
    depth, width = sizes["depth"], sizes["width"]
    for count, size in ((3 * depth, width), (depth, round(width * sizes["mlp_ratio"]))):
        rows = [torch.zeros(1, size)] * count
        values = [torch.zeros(1, size, dtype=torch.uint8)] * count
        launch_ema_rows(rows, rows, values, [torch.zeros(1, 1)] * count, torch.zeros(1))


def overrides_of(name: str, which: str) -> list[str] | None:
    """The overrides of a variant that change its kernels; None where it has another
    configuration."""
    variant = variants.VARIANTS[which]
    if variant.only not in ("", Path(name).stem):
        return None
    others = (text for text in variant.overrides if not text.startswith("run."))
    return [*others, *(text for text in variant.overrides if text == variants.DEPENDENT)]


def fill(names: list[str], tuned: list[str], which: list[str]) -> None:
    """which: variants of bench/variants.py."""
    with stand_in.no_matmuls():
        for name, one in itertools.product(names, which):
            began = time.perf_counter()
            if (overrides := overrides_of(name, one)) is None:
                continue
            with stand_in.compiling(lambda launched: not of_lists(launched)):
                step_of(name, [*SHALLOW, *overrides])
            with stand_in.compiling(of_narrow_lists):
                step_of(name, [*NARROW, *overrides, "data.micro_batch_size=2"])
            if variants.FP8 in overrides:
                with stand_in.compiling():
                    update_rows(name, overrides)
            took = time.perf_counter() - began
            print(f"{name}, {one}: {took:.0f} s", file=sys.stderr, flush=True)
        for family in tuned:
            with stand_in.compiling():
                count = tune.prepare(tune.knobs(torch.device("cpu"), [family]), (0, 1))
            print(f"{family}: {count} candidates", file=sys.stderr, flush=True)
        with stand_in.compiling():
            probe()


def probe() -> None:
    """The smallest kernel of all, that launch.runs_on tries too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    launch._count_kernel[(1,)](torch.zeros(16, device=device), N=16)


def cache_dir() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def sources() -> str:
    """A hash of the kernels' code; their configurations (tuned.py) are launched as they come."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        if path.name != "tuned.py":
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def packed(out: Path) -> str:
    """Write the cache into `out`. Raises ValueError where it is larger than MOST_BYTES."""
    folder = cache_dir()
    kernels = [path for path in folder.iterdir() if path.is_dir()]
    about = {
        "versions": versions(), "sources": sources(), "architecture": stand_in.ARCHITECTURE,
        "kernels": len(kernels),
    }  # fmt: skip
    (folder / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:xz") as tar:
        tar.add(folder, arcname=".")
    size = out.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{out}: {size / 2**20:.1f} MiB, over {MOST_BYTES / 2**20:.0f}")
    return f"{out}: {len(kernels)} kernels, {size / 2**20:.1f} MiB"


def unpack(file: Path) -> dict:
    """Into Triton's cache; its lists of a kernel's files name them by their whole paths."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    files.unpack(file, folder)
    for path in folder.glob("*/__grp__*"):
        found = json.loads(path.read_text(encoding="utf-8"))
        found["child_paths"] = {name: str(path.parent / name) for name in found["child_paths"]}
        path.write_text(json.dumps(found), encoding="utf-8")
    return json.loads((folder / ABOUT).read_text(encoding="utf-8"))


def written() -> dict[Path, int]:
    """The machine code that is there: on a GPU Triton's driver writes modules of its own beside."""
    return {path: path.stat().st_mtime_ns for path in cache_dir().rglob("*.cubin")}


def is_found() -> bool:
    """Whether Triton finds the probe's kernel in its cache, and writes none."""
    before = written()
    if torch.cuda.is_available():
        probe()
    else:
        with stand_in.compiling():
            probe()
    return before == written()


def check(file: Path) -> int:
    about = unpack(file)
    if about.get("sources") != sources():
        print(f"a miss: kernels/ has changed since {file} was made")
        return 1
    if is_found():
        print(f"a hit: Triton finds the {about['kernels']} kernels of {file}")
        return 0
    made, here = about["versions"], versions()
    differ = [f"{n}: {made.get(n)} there, {here[n]} here" for n in here if made.get(n) != here[n]]
    print(f"a miss: Triton looks for other kernels than those of {file}; {'; '.join(differ)}")
    return 1


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--out", type=Path, metavar="FILE", help="make it: a .tar.xz")
    way.add_argument("--unpack", type=Path, metavar="FILE", help="and say whether it serves")
    way.add_argument("--fill", action="store_true", help="Triton's cache of this machine")
    parser.add_argument("--config", nargs="*", default=["vit_h", "vit_b", "vit_l"], metavar="NAME")
    parser.add_argument("--variant", nargs="+", choices=variants.VARIANTS)
    parser.add_argument(
        "--tune", nargs="*", default=[], choices=tune.FAMILIES, help="also the candidates of these"
    )
    args = parser.parse_args(argv)
    if args.unpack:
        if not args.unpack.is_file():
            parser.error(f"--unpack {args.unpack}: no such file")
        return check(args.unpack)
    if args.fill:
        fill(args.config, args.tune, args.variant or VARIANTS)
        return 0
    try:
        fill(args.config, args.tune, args.variant or VARIANTS + MORE)
        print(packed(args.out))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(cache_dir())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
