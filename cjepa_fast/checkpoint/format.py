"""Save and resume, exactly, on any number of ranks and under any ZeRO stage.

A checkpoint is a folder of safetensors files, one a rank, each with the fragments it owns:
    RUN/checkpoints/step_00001000/
        shard_00000_of_00002.safetensors   master/NAME@START, exp_avg/..., exp_avg_sq/..., ema/...
        state.json                         step, epoch, optimiser's step, config, images, versions,
                                           for_good (whether later saves leave it)
        encoder.json                       the encoder's architecture
        manifest.json                      each file's size and SHA-256
The shards also hold the state of torch's generators. All is written under a temporary name, the
manifest last, synced and renamed (writer.py): what has no manifest is no checkpoint, and what the
manifest does not bear out is refused by name. No pickle is written or read.
"""

import itertools
import json
import os
import platform
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open

from cjepa_fast.checkpoint.owned import SavedEngine
from cjepa_fast.data import faults
from cjepa_fast.runtime import hardware
from cjepa_fast.runtime.distributed import rank, world_size
from cjepa_fast.runtime.files import read_json, reading, sha256, write_text
from cjepa_fast.runtime.version import VERSION

T = TypeVar("T")
FORMAT = 2
MANIFEST = "manifest.json"
DESCRIPTIONS = ("encoder.json", "state.json")
NAME = re.compile(r"step_\d+", re.ASCII)
SHARD = re.compile(r"shard_\d{5}_of_(\d{5})\.safetensors")
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # by what lies there


class Receipt(NamedTuple):
    """What a file must be: its name in the checkpoint's folder, its size and its SHA-256."""

    name: str
    bytes: int
    sha256: str


def receipt(path: Path) -> Receipt:
    return Receipt(path.name, path.stat().st_size, sha256(path))


def write_manifest(folder: Path, shards: list[Receipt]) -> None:
    """Write the sizes and hashes of all files. Without a manifest the folder is no checkpoint."""
    receipts = shards + [receipt(folder / name) for name in DESCRIPTIONS]
    files = {name: {"bytes": size, "sha256": digest} for name, size, digest in receipts}
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What the manifest does not bear out, a line a file; of every `parts`-th file only.

    Raises OSError, naming the file, where it is there and cannot be read (an error of the machine
    that stays, or another user's file): that is no damage.
    """
    manifest = checkpoint / MANIFEST
    try:
        found = _read(manifest, lambda: read_json(manifest))
        files = sorted(found["files"].items())
        if missing := _unnamed(dict(files)):
            return [f"{manifest} does not name {missing}, without which there is none"]
        return [
            f"{checkpoint / name} {problem}"
            for name, facts in files[part::parts]
            if (problem := _damage_of(checkpoint / name, **facts))
        ]
    except (*NOT_THERE, ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"{manifest} cannot be read: {error!r}"]


def _unnamed(files: dict[str, dict]) -> str | None:
    """The first file that a checkpoint must have and these are without."""
    shards = [name for name in files if SHARD.fullmatch(name)]
    count = int(SHARD.fullmatch(shards[0])[1]) if shards else 1
    if len(shards) < count:
        return "each of its shards"
    return next((name for name in DESCRIPTIONS if name not in files), None)


def _damage_of(path: Path, bytes: int, sha256: str) -> str | None:
    return _read(path, lambda: _differs(path, bytes, sha256))


def _read(path: Path, read: Callable[[], T]) -> T:
    """read(), patiently. An OSError says what to do, but for one of a file that is not there."""
    try:
        return faults.patiently(read, path)
    except (faults.MachineFailed, *NOT_THERE):
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.filename or path} cannot be read ({error.strerror}), which is no damage: make "
            "it readable for this user (as chmod and chown do), or see to the disk it lies on",
        ) from error


def _is_file(path: Path) -> bool:
    """Path.is_file, which since Python 3.14 also denies what cannot be looked at."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except NOT_THERE:
        return False


def _differs(path: Path, bytes: int, sha256: str) -> str | None:
    if not _is_file(path):
        return "is missing"
    if path.stat().st_size != bytes:
        return f"has {path.stat().st_size} bytes, and was written with {bytes}"
    return None if receipt(path).sha256 == sha256 else "is damaged: its checksum has changed"


def owned_tensors(engine: SavedEngine) -> dict[str, torch.Tensor]:
    """The fragments this rank must write, by key "KIND/NAME@START", as they live in the engine;
    replicas write none."""
    tensors = {}
    if engine.sharded or rank() == 0:
        for owned in engine.state():
            at = f"{owned.master.name}@{owned.master.start}"
            tensors[f"master/{at}"] = owned.master.values
            tensors |= {f"{moment}/{at}": values for moment, values in owned.moments.items()}
        tensors |= {f"ema/{f.name}@{f.start}": f.values for f in engine.ema.fragments}
    return {key: values.detach() for key, values in tensors.items()}


def generator_states() -> dict[str, torch.Tensor]:
    states = {f"generator/cpu@{rank()}": torch.get_rng_state()}
    if hardware.has_gpu():
        states[f"generator/cuda@{rank()}"] = torch.cuda.get_rng_state()
    return states


def describe(step: int, engine: SavedEngine) -> dict:
    """What state.json says beside the run's own facts."""
    return {
        "format": FORMAT,
        "step": step,
        "optimizer_step": engine.optimizer_step(),
        "world_size": world_size(),
        "versions": {
            "cjepa_fast": VERSION,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def state_of(path: Path) -> dict:
    """A checkpoint's state.json. Raises ValueError where it is damaged, FileNotFoundError if it is
    missing."""
    try:
        return read_json(path / "state.json")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no state.json") from None


def is_for_good(path: Path) -> bool:
    """Whether a checkpoint was kept for good when it was saved, by its own state.json.

    True where that cannot be read: what cannot be judged stays.
    """
    try:
        state = state_of(path)
        if "for_good" in state:
            return bool(state["for_good"])
        every = state["config"]["checkpoint"]["keep_every_epochs"]  # of an earlier version
        return bool(every) and state["epoch"] % every == 0
    except (OSError, ValueError):
        return True
    except (LookupError, TypeError):  # not of a training, or of a version without this key
        return False


class StoredCheckpoint:
    """A checkpoint on disk: its state and its fragments, read by range."""

    def __init__(self, path: Path):
        self.path, self.state = path, state_of(path)
        # Each shard is opened once: under ZeRO-3 every rank has a slice of every parameter.
        self._shards: dict[Path, Any] = {}
        self.slices: dict[tuple[str, str], list[tuple[int, Path, str]]] = {}
        for shard in sorted(path.glob("shard_*.safetensors")):
            with reading(shard):
                self._shards[shard] = safe_open(shard, "pt")
                for key in self._shards[shard].keys():  # noqa: SIM118 (not a dict)
                    kind, _, rest = key.partition("/")
                    name, _, start = rest.rpartition("@")
                    self.slices.setdefault((kind, name), []).append((int(start), shard, key))

    def _stored_slices(self, kind: str, name: str) -> Iterator[tuple[int, Any]]:
        """The first value's number and the values, of which only what is cut out is read."""
        if (kind, name) not in self.slices:
            raise ValueError(f"{self.path} holds no {kind} of {name}: was it saved by this model?")
        for start, shard, key in sorted(self.slices[kind, name]):
            with reading(shard):
                yield start, self._shards[shard].get_slice(key)

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """A parameter's flattened values, all of them."""
        return torch.cat([values[:] for _, values in self._stored_slices(kind, name)])

    def read_into(self, kind: str, fragment) -> None:
        """Fill a fragment from whatever slices of the parameter were stored."""
        end, filled = fragment.start + len(fragment.values), 0
        for start, values in self._stored_slices(kind, fragment.name):
            size = values.get_shape()[0]
            low, high = max(start, fragment.start), min(start + size, end)
            if low < high:
                part = values[low - start : high - start]
                fragment.values[low - fragment.start : high - fragment.start].copy_(part)
                filled += high - low
        if filled != len(fragment.values):
            raise ValueError(
                f"{self.path}: {fragment.name} has {filled} values at {fragment.start}, the model "
                f"needs {len(fragment.values)}: was it saved by a model of another size?"
            )

    def restore_generators(self) -> None:
        """Where the world is of the same size; every draw of a run is a pure function anyway."""
        if self.state["world_size"] != world_size():
            return
        for device, setter in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
            for start, shard, key in self.slices.get(("generator", device), []):
                if start == rank() and (device == "cpu" or hardware.has_gpu()):
                    with reading(shard):
                        setter(self._shards[shard].get_tensor(key))

    def encoder_weights(self, which: str) -> dict[str, torch.Tensor]:
        """Flat fp32 values of the encoder's trained parameters by name."""
        kind, prefix = {"target": ("ema", ""), "context": ("master", "encoder.")}[which]
        return {
            name[len(prefix) :]: self.whole(kind, name)
            for stored_kind, name in self.slices
            if stored_kind == kind and name.startswith(prefix)
        }


def resume_candidates(run: Path, resume: str | None) -> list[Path]:
    """Checkpoints to resume from, the first that is complete: "auto" is the run's, newest first;
    else a path, to one or to another run. Empty where nothing is to be resumed or nothing is there.

    Raises FileNotFoundError for a path that holds none, OSError where one cannot be looked into.
    """
    if resume is None:
        return []
    path = Path(resume)
    folder = run if resume == "auto" else path
    found = _read(folder, lambda: newest_first(folder))
    if resume != "auto" and not found:
        if not (path / "state.json").is_file():
            raise FileNotFoundError(f"--resume {resume}: no checkpoint there")
        return [path]
    return found


def lies_in(path: Path, run: Path) -> bool:
    """Whether a checkpoint, or a link to one, is a run's own: the run's folder itself also is.

    RUN/checkpoints may be a link to another disk, and so may one in it.
    """
    checkpoints, found = (run / "checkpoints").resolve(), path.resolve()
    homes = run.resolve(), checkpoints
    return path.parent.resolve() == checkpoints or any(found.is_relative_to(one) for one in homes)


def newest_first(run: Path) -> list[Path]:
    """The checkpoints of a run folder, whole or damaged."""
    return _complete(run / "checkpoints")[::-1]


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run folder, or None."""
    return next(iter(newest_first(run)), None)


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that it no longer counts, without losing it. Returns the new name."""
    number = itertools.count(1)
    free = (checkpoint.with_name(f"abandoned_{n}_{checkpoint.name}") for n in number)
    return checkpoint.rename(next(path for path in free if not path.exists()))


def set_aside_later_than(run: Path, step: int) -> list[Path]:
    """What a run that resumes from an earlier step leaves behind: it is a branch of its own."""
    complete = _complete(run / "checkpoints")
    return [set_aside(path) for path in complete if step_of(path) > step]


def _complete(folder: Path) -> list[Path]:
    """By their steps: names have eight digits, and more from step 100,000,000 on."""
    names = os.listdir(folder) if folder.is_dir() else []
    numbered = [folder / name for name in names if NAME.fullmatch(name)]
    return sorted((p for p in numbered if _is_file(p / MANIFEST)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
