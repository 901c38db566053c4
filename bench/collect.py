"""What bench/gpu_gate.sh brought back from a GPU, into bench/results/ and kernels/tuned.py.

Only a GPU's rows at a configuration's own sizes are taken, each once.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import files
from files import loaded

# Of a folder of bench/gpu_gate.sh: what is appended to a list here, what replaces a file here, and
# what goes into the folder of its GPU.
APPENDED, REPLACED = "throughput*.json", ("ops.json", "attention.json", "saving.json")
OF_A_GPU = ("ceilings.json", "matmuls.json", "fp8.json", "fp8_trained.json", "tuned.json")
AS_THEY_ARE = ("profile_*.txt", "summary.txt", "knn.json", "train_log.jsonl", "curves.png")
PACKED = "results.tar.gz"  # the same files in one
# Overrides after which a model is another.
SIZES = (
    *(f"model.{key}=" for key in ("name", "width", "depth", "heads", "patch_size", "mlp_ratio")),
    *(f"predictor.{key}=" for key in ("width", "depth", "heads")),
    "data.image_size=", "data.channels=",
)  # fmt: skip


def on_gpu(row: dict) -> bool:
    """Where it ran: torch's build may have CUDA on a machine that has not."""
    return row["hardware"]["kind"] == "cuda"


def at_full_size(row: dict) -> bool:
    """Whether a row is a GPU's, and of a configuration's own sizes."""
    return on_gpu(row) and not any(text.startswith(SIZES) for text in row.get("overrides", ()))


def collect(given: Path, results: Path, tuned: Path | None = None) -> list[str]:
    """Take over what the gate measured on a GPU, each row once; says what was taken.

    given: the gate's folder, or its results.tar.gz. tuned: the table of the kernels' configurations
    (kernels/tuned.py) to write what the gate's tuner found into. Raises ValueError where nothing is
    of a GPU at full size.
    """
    packed = given if given.is_file() else given / PACKED
    if not packed.exists():
        return taken(given, results, tuned)
    with tempfile.TemporaryDirectory() as folder:
        files.unpack(packed, Path(folder))
        return taken(Path(folder), results, tuned)


def taken(folder: Path, results: Path, tuned: Path | None) -> list[str]:
    said = []
    kept = loaded(results, "throughput.json") or []
    for path in sorted(folder.glob(APPENDED)):
        rows = [row for row in loaded(folder, path.name) if "failed" not in row]
        new = [row for row in rows if at_full_size(row) and row not in kept]
        if new:
            kept += new
            said.append(f"{path.name}: {len(new)} of {len(rows)} rows appended")
    if said:
        files.write(kept, results / "throughput.json")
    whose: set[str] = set()
    for name in (*REPLACED, *OF_A_GPU):
        found = loaded(folder, name)
        # a batch of None: each model's own
        if not (found and at_full_size(found) and found.get("batch") is None):
            continue
        own = short_name(found["hardware"]["device"])
        path = results / name if name in REPLACED else results / own / name
        whose.add(own)
        files.write(found, path)
        said.append(f"{name}: to {path.relative_to(results)}")
        if name == "tuned.json" and tuned:
            said.append(take_configurations(found, tuned))
    if len(whose) == 1:
        said += [*take_as_they_are(folder, results / whose.pop())]
    if not said:
        raise ValueError(f"{folder}: holds no new figures of a GPU at a configuration's own sizes")
    return said


def short_name(device: str) -> str:
    """ "h200" of "NVIDIA H200", "h100_80gb_hbm3" of "NVIDIA H100 80GB HBM3"."""
    name = device.lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "gpu"


def take_as_they_are(folder: Path, own: Path) -> Iterator[str]:
    for pattern in AS_THEY_ARE:
        for path in sorted(folder.glob(pattern)):
            own.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, own / f"gate_{path.name}")
            yield f"{path.name}: to {own.name}/gate_{path.name}"


def take_configurations(found: dict, table: Path) -> str:
    """The tuner's choices of one architecture into kernels/tuned.py, as numbers alone. Raises
    ValueError for what is no such table."""
    from tune import TUNED, source  # imports Triton

    architecture, chosen = found.get("architecture", ""), found.get("table")
    if not re.fullmatch(r"sm_\d+", architecture) or not isinstance(chosen, dict):
        raise ValueError(f"tuned.json: no table of an architecture ({architecture!r})")
    new = {}
    for key, numbers in chosen.items():
        each = numbers if isinstance(numbers, list) else [numbers]
        if not re.fullmatch(r"[\w ]+", key) or not all(type(n) in (int, type(None)) for n in each):
            raise ValueError(f"tuned.json: {key!r}: {numbers!r} is no configuration of a kernel")
        new[key] = tuple(numbers) if isinstance(numbers, list) else numbers
    table.write_text(source(TUNED | {architecture: new}), encoding="utf-8")
    return f"{table.name}: {len(new)} keys of {architecture}; now make kernels-check"
