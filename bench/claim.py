"""C-JEPA's claim at small size: each reading of VICReg beside I-JEPA, on images held out from both.

    python bench/claim.py --set cifar10 --data FOLDER              every row, one seed
    python bench/claim.py --set cifar10 --data FOLDER --rows "I-JEPA" "blocks 0.001" --seeds 0 1 2

FOLDER holds train/, held/ and test/. Encoders train on train/; probes are fitted on 5,000 of its
images and scored on held/, by which rows are chosen; `--final` scores on test/ instead, once, for
the rows that were chosen. Every training of configs/ablations/claim.json becomes one line of
bench/results/claim/SET.jsonl, and its folder goes. Stopped and started again it continues.
`python bench/claim_report.py` makes tables and curves of what is there.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hardware import ROOT, here, provenance

import cjepa_fast
from cjepa_fast import config as configuration
from cjepa_fast.checkpoint.encoders import load_encoder
from cjepa_fast.config import Config
from cjepa_fast.data import rng
from cjepa_fast.eval.features import extract, image_vectors
from cjepa_fast.eval.probes import knn, linear, spread
from cjepa_fast.eval.splits import labelled_splits, subsample
from cjepa_fast.telemetry import representation_stats
from cjepa_fast.tools import ablate
from cjepa_fast.training.build import build_networks

RESULTS = ROOT / "bench" / "results" / "claim"
IMAGENET = {"data.mean": [0.485, 0.456, 0.406], "data.std": [0.229, 0.224, 0.225]}
# By name: epochs to a reading of about 50,000 images, and what differs from claim.json.
SETS = {
    "cifar10": (1, {}),
    "imagenette128": (7, {"data.image_size": 96, "model.patch_size": 16, **IMAGENET}),
}
READINGS = (1, 3, 11)  # times that: 50,000, 150,000 and 500,000 images
PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT = 0.2  # share of the fitted images that a probe's penalty is chosen on
TOKEN_IMAGES = 256
RAW_PIXELS, UNTRAINED = WITHOUT_TRAINING = ("raw pixels", "untrained")
Vectors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


# ------------------------------------------------------------------------------------- the scores


def scores(vectors: Vectors, k: int, temperature: float) -> dict[str, float]:
    """Percent right: features (n, D) and labels (n,) to fit on, then (m, D) and (m,) to score."""
    tops = knn.both(*vectors, k=k, temperature=temperature)
    logistic, penalty = chosen_probe(vectors)
    return {
        "knn": tops["top1"],
        "knn_centred": tops["top1_centred"],
        "ridge": chosen_ridge(vectors),
        "logistic": logistic,
        "logistic_C": penalty,
        "scored": len(vectors[3]),
    }


def chosen_probe(vectors: Vectors) -> tuple[float, float]:
    """Logistic regression, its inverse penalty chosen on a fifth of the images it is fitted on,
    drawn by their indices: in folders the last fifth would be classes that are not fitted."""
    features_nD, label_n, *_ = vectors
    order, cut = rng.permutation(0, 0, len(label_n)), round(len(label_n) * (1 - HELD_OUT))
    fit, held = order[:cut], order[cut:]
    inner = (features_nD[fit], label_n[fit], features_nD[held], label_n[held])
    best = max(PENALTIES, key=lambda C: linear.top1(*inner, inverse_penalty=C))
    return linear.top1(*vectors, inverse_penalty=best), best


def chosen_ridge(vectors: Vectors) -> float:
    """Ridge regression on standardised features, its penalty chosen by leaving one out."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features_nD, label_n, test_mD, test_label_m = (x.numpy() for x in vectors)
    alphas = [len(label_n) * share for share in (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)]
    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas))
    probe.fit(features_nD.astype("float64"), label_n)
    return 100 * float((probe.predict(test_mD.astype("float64")) == test_label_m).mean())


def reading(encoder, splits, config: Config) -> dict[str, float]:
    """All scores of an encoder, RankMe and how much of its tokens' variance position explains."""
    options = {"crop": config.eval.crop, "threads": 1}
    vectors = []
    for images, keep in splits:
        features_nD, index_n = extract(encoder, images, keep=keep, **options)
        vectors += [features_nD, images.labels[index_n]]
    images, keep = splits[1]
    tokens, _ = extract(
        encoder, images, keep=subsample(keep, TOKEN_IMAGES), pooled=False, **options
    )
    return {
        **scores(tuple(vectors), config.eval.k, config.eval.temperature),
        "rankme": representation_stats(vectors[2])["rankme"].item(),
        "by_position": 100 * spread.token_shares(tokens)["by_position"],
    }


def pixels(splits, config: Config) -> dict[str, float]:
    """The scores of raw pixels, as `scores` gives them."""
    vectors = []
    for images, keep in splits:
        flat_nD, index_n = image_vectors(
            images, lambda x: x.flatten(1), image_size=32, mean=(0.0,) * 3, std=(1.0,) * 3,
            keep=keep, crop=config.eval.crop, batch_size=256, device="cpu", threads=1,
            title="pixels",
        )  # fmt: skip
        vectors += [flat_nD, images.labels[index_n]]
    return scores(tuple(vectors), config.eval.k, config.eval.temperature)


# -------------------------------------------------------------------------------------- trainings


def overrides(args: argparse.Namespace) -> list[str]:
    unit, changes = SETS[args.set]
    found = {
        "run.epochs": args.length * unit,
        "optim.warmup_epochs": 0.1 * args.length * unit,
        "checkpoint.keep_every_epochs": unit,
        "data.path": str(args.data / "train"),
        "data.threads": 1,
        "eval.online.data": str(args.data / "train"),
        "eval.online.test": str(args.data / "held"),
        "eval.online.every_epochs": unit,
        "telemetry.tensorboard": False,
        **changes,
    }
    return [f"{key}={json.dumps(value)}" for key, value in found.items()] + args.overrides


def splits_of(args: argparse.Namespace):
    split = "test" if args.final else "held"
    return labelled_splits(str(args.data / "train"), str(args.data / split), 5000, None)


def command(args: argparse.Namespace, row: str, seed: int | None) -> str:
    """That repeats a line, without this machine's folders."""
    words = ["python", "bench/claim.py", "--set", args.set, "--data", "FOLDER"]
    words += ["--rows"] if row in WITHOUT_TRAINING else ["--rows", row]
    words += ["--seeds", str(seed or 0), "--length", str(args.length)]
    words += ["--final"] if args.final else []
    for override in args.overrides:
        words += ["--override", override]
    return shlex.join(words)


def record(
    args: argparse.Namespace, name: str, seed: int | None, readings: list[dict], about: dict
) -> dict:
    """A line of the results. about: hardware, versions and commit, read when its work began."""
    return {
        "row": name,
        "set": args.set,
        "seed": seed,
        "length": args.length,
        "scored_on": "test" if args.final else "held",
        "overrides": args.overrides,
        "readings": readings,
        "on": {**about, "command": command(args, name, seed)},
    }


def trial_record(args: argparse.Namespace, ablation: ablate.Ablation, trial: ablate.Trial) -> dict:
    """Train, and score the target encoder of each reading."""
    began, about = time.monotonic(), provenance(here())
    ablate.check_folders(ablation, [trial], "--work")
    ablate.start(ablation, trial, {"OMP_NUM_THREADS": "1"}).wait()
    if not trial.finished:
        raise RuntimeError(f"{trial.folder}: the training failed; see said.txt there")
    config = configuration.load_run(trial.folder)
    evaluated = [row["step"] for row in ablate.scores_of(trial)]  # untrained, then once a unit
    found = []
    for step in (evaluated[times] for times in READINGS if times < len(evaluated)):
        encoder = load_encoder(trial.folder / "checkpoints" / f"step_{step:08d}")
        scored = reading(encoder, splits_of(args), config)
        found.append({"images": step * config.data.batch_size, **scored})
    line = record(args, trial.row, trial.seed, found, about)
    line["settings"] = ablation.rows[trial.row]
    return line | {"minutes": (time.monotonic() - began) / 60}


def pixels_record(args: argparse.Namespace, ablation: ablate.Ablation) -> dict:
    about, name = provenance(here()), next(iter(ablation.rows))
    config = configuration.load(ablation.base, ablation.settings(name))
    found = [{"images": 0, **pixels(splits_of(args), config)}]
    return record(args, RAW_PIXELS, None, found, about)


def untrained_record(args: argparse.Namespace, ablation: ablate.Ablation, seed: int) -> dict:
    """The record of the untrained encoder that the first row's training with this seed starts
    from."""
    about, name = provenance(here()), next(iter(ablation.rows))
    config = configuration.load(ablation.base, [*ablation.settings(name), f"run.seed={seed}"])
    torch.manual_seed(seed)
    encoder = build_networks(config).encoder.eval()
    encoder.mean, encoder.std = config.data.mean, config.data.std
    found = [{"images": 0, **reading(encoder, splits_of(args), config)}]
    return record(args, UNTRAINED, seed, found, about)


def lines_of(path: Path) -> list[dict]:
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )


def same(line: dict, args: argparse.Namespace, row: str, seed: int | None) -> bool:
    """Whether a line is of this row, seed, length, split and overrides."""
    own = (row, seed, args.length, "test" if args.final else "held", args.overrides)
    keys = ("row", "seed", "length", "scored_on", "overrides")
    return tuple(line[key] for key in keys) == own


def train(args: argparse.Namespace) -> None:
    """Every line that is asked for and not there yet: raw pixels, then seed by seed."""
    ablation = ablate.read("claim", overrides(args))
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{args.set}.jsonl"

    def keep(row: str, seed: int | None, made: Callable[[], dict]) -> bool:
        """Whether it was not there yet. Exits where it is there with other settings."""
        for number, line in enumerate(lines_of(path), 1):
            if same(line, args, row, seed):
                if line.get("settings") != ablation.rows.get(row):
                    raise SystemExit(
                        f'error: {path}:{number}: "{row}" was trained with {line.get("settings")}, '
                        f"and claim.json has {ablation.rows.get(row)} now: give the row another "
                        "name there, or remove the line to train it anew"
                    )
                return False
        line = made()
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        last = line["readings"][-1]
        print(line["row"], line["seed"], {k: round(v, 1) for k, v in last.items()}, flush=True)
        return True

    keep(RAW_PIXELS, None, partial(pixels_record, args, ablation))
    for seed in args.seeds:
        keep(UNTRAINED, seed, partial(untrained_record, args, ablation, seed))
        for row in ablation.rows if args.rows is None else args.rows:
            words = [args.set, str(args.length), row, *args.overrides, str(seed)]
            trial = ablate.Trial(row, seed, args.work / ablate.slug("_".join(words)))
            if keep(row, seed, partial(trial_record, args, ablation, trial)):
                shutil.rmtree(trial.folder)


def require_own_package(root: Path = ROOT) -> None:
    """Exits where the package is another checkout's: lines would name a commit that did not run."""
    imported = Path(cjepa_fast.__file__).resolve().parents[1]
    if imported != root.resolve():
        raise SystemExit(
            f"error: this is {root}, but the cjepa_fast that Python imports is of {imported}: "
            f"install this one (pip install -e {root}), or set PYTHONPATH={root}"
        )


# ------------------------------------------------------------------------------------ the command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=SETS)
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--rows", nargs="*", help="default: all of claim.json; of none the pixels and the untrained"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--length", type=int, default=3, choices=READINGS, help="last reading")
    parser.add_argument("--final", action="store_true", help="score on test/, not on held/")
    parser.add_argument("--override", action="append", default=[], dest="overrides")
    parser.add_argument("--work", type=Path, default=Path("runs/claim"), help="trainings under way")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if not (args.set and args.data):
        parser.error("--set and --data are needed")
    return args


if __name__ == "__main__":
    asked = parse(None)
    require_own_package()
    torch.set_num_threads(1)
    sys.exit(train(asked))
