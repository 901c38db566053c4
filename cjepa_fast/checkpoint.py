"""Save and resume, exactly, on any number of processes and under any ZeRO stage.

A checkpoint is a folder of safetensors files, one a process, each with the fragments it owns:
    RUN/checkpoints/step_00001000/
        shard_00000_of_00002.safetensors   master/NAME@START, exp_avg/..., exp_avg_sq/..., ema/...
        state.json                         step, epoch, optimiser's step, config, images, versions
        encoder.json                       the encoder's architecture
The shards also hold the state of torch's generators. A checkpoint is written under a temporary
name, synced and renamed, so what bears the final name is whole; then `checkpoints/latest` names it,
for scripts. No pickle is written or read.
"""

import contextlib
import itertools
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cjepa_fast import __version__
from cjepa_fast.engine import Engine, rank, world_size
from cjepa_fast.local import LocalEngine
from cjepa_fast.vit import Encoder

FORMAT = 1
FINAL = {"target": "encoder", "context": "context_encoder"}  # file names at the end of a run


def save(
    folder: Path,
    step: int,
    engine: Engine | LocalEngine,
    facts: dict,
    encoder_json: str,
    keep: int,
) -> Path:
    """Write the checkpoint of optimiser step `step` (updates done so far) below `folder`.

    facts: what else state.json is to hold ("config", "epoch", "images"). Every process must call
    it. Keeps the newest `keep` checkpoints. Returns its path.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f".{final.name}.partial"
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    owned = owned_tensors(engine)
    owned |= generator_states()
    shard = partial / f"shard_{rank():05d}_of_{world_size():05d}.safetensors"
    save_file(owned, shard)
    sync_file(shard)
    _barrier()
    if rank() == 0:
        write_text(partial / "encoder.json", encoder_json)
        write_text(partial / "state.json", json.dumps(_describe(step, engine) | facts))
        if final.exists():
            set_aside(final)
        partial.rename(final)
        sync_file(folder)
        write_text(folder / "latest", final.name + "\n")
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
    _barrier()
    return final


def owned_tensors(engine: Engine | LocalEngine) -> dict[str, torch.Tensor]:
    """The fragments this process must write, by key "KIND/NAME@START"; replicas write none."""
    tensors = {}
    if engine.sharded or rank() == 0:
        for owned in engine.state():
            at = f"{owned.master.name}@{owned.master.start}"
            tensors[f"master/{at}"] = owned.master.values
            tensors |= {f"{moment}/{at}": values for moment, values in owned.moments.items()}
        tensors |= {f"ema/{f.name}@{f.start}": f.values for f in engine.ema.fragments}
    return {key: values.detach().cpu().clone() for key, values in tensors.items()}


def generator_states() -> dict[str, torch.Tensor]:
    states = {f"generator/cpu@{rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"generator/cuda@{rank()}"] = torch.cuda.get_rng_state()
    return states


def _describe(step: int, engine: Engine | LocalEngine) -> dict:
    return {
        "format": FORMAT,
        "step": step,
        "optimizer_step": engine.optimizer_step(),
        "world_size": world_size(),
        "versions": {
            "cjepa_fast": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def restore(path: Path, engine: Engine | LocalEngine) -> int:
    """Put a checkpoint's state in place and return the number of steps it had done.

    Raises ValueError naming the first parameter that is missing or of another size.
    """
    stored = Stored(path)
    for owned in engine.state():
        stored.read_into("master", owned.master)
        for moment, values in owned.moments.items():
            stored.read_into(moment, owned.master._replace(values=values))
    for fragment in engine.ema.fragments:
        stored.read_into("ema", fragment)
    names = [n for n, p in engine.module.named_parameters() if p.requires_grad]
    engine.write_weights({name: stored.whole("master", name) for name in names})
    engine.ema.write_working_copy()
    engine.set_optimizer_step(stored.state["optimizer_step"])
    stored.restore_generators()
    return stored.state["step"]


def differences(path: Path, facts: dict) -> list[str]:
    """ "KEY: X, saved with Y" for each fact that is not as the checkpoint has it, by dotted key.

    A longer run, another place or another rate of saving is no difference.
    """
    free = ("config.run.epochs", "config.run.dir", "config.data.path", "config.data.threads")
    free += ("config.checkpoint", "config.telemetry", "config.eval", "config.run.init_from")
    saved = _flat(json.loads((path / "state.json").read_text()))
    return [
        f"{key.removeprefix('config.')}: {value}, saved with {saved.get(key)}"
        for key, value in _flat(facts).items()
        if value != saved.get(key) and not key.startswith(free)
    ]


def _flat(tree: dict, prefix: str = "") -> dict:
    leaves = {}
    for key, value in tree.items():
        inner = isinstance(value, dict) and value
        leaves |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return leaves


class Stored:
    """A checkpoint on disk: its state.json and its fragments, read by range."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.state = json.loads((path / "state.json").read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is not a checkpoint: it has no state.json") from None
        self.runs: dict[tuple[str, str], list[tuple[int, Path, str]]] = {}
        for shard in sorted(path.glob("shard_*.safetensors")):
            with _opened(shard) as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    kind, _, rest = key.partition("/")
                    name, _, start = rest.rpartition("@")
                    self.runs.setdefault((kind, name), []).append((int(start), shard, key))

    def _stored_runs(self, kind: str, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        if (kind, name) not in self.runs:
            raise ValueError(f"{self.path} holds no {kind} of {name}: was it saved by this model?")
        for start, shard, key in sorted(self.runs[kind, name]):
            with _opened(shard) as file:
                yield start, file.get_tensor(key)

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """A parameter's flattened values, all of them."""
        return torch.cat([values for _, values in self._stored_runs(kind, name)])

    def read_into(self, kind: str, fragment) -> None:
        """Fill a fragment from whatever runs of the parameter were stored."""
        end, filled = fragment.start + len(fragment.values), 0
        for start, values in self._stored_runs(kind, fragment.name):
            low, high = max(start, fragment.start), min(start + len(values), end)
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
            for start, shard, key in self.runs.get(("generator", device), []):
                if start == rank() and (device == "cpu" or torch.cuda.is_available()):
                    with _opened(shard) as file:
                        setter(file.get_tensor(key))

    def encoder_weights(self, which: str) -> dict[str, torch.Tensor]:
        """Flat fp32 values of the encoder's trained parameters by name."""
        kind, prefix = {"target": ("ema", ""), "context": ("master", "encoder.")}[which]
        return {
            name[len(prefix) :]: self.whole(kind, name)
            for stored_kind, name in self.runs
            if stored_kind == kind and name.startswith(prefix)
        }


@contextlib.contextmanager
def _opened(path: Path):
    """A safetensors file. Raises ValueError where it is damaged, FileNotFoundError if missing."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def find(run: Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from: "auto" is the run's latest, if any; else a path.

    Raises FileNotFoundError for a path that holds none.
    """
    if resume is None:
        return None
    if resume == "auto":
        return latest(run)
    path = Path(resume)
    found = path if (path / "state.json").is_file() else latest(path)
    if found is None:
        raise FileNotFoundError(f"--resume {resume}: no checkpoint there")
    return found


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run folder, or None."""
    complete = _complete(run / "checkpoints")
    return complete[-1] if complete else None


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that it no longer counts, without losing it. Returns the new name."""
    number = itertools.count(1)
    free = (checkpoint.with_name(f"abandoned_{n}_{checkpoint.name}") for n in number)
    return checkpoint.rename(next(path for path in free if not path.exists()))


def set_aside_later_than(run: Path, step: int) -> list[Path]:
    """What a run that goes on from an earlier step leaves behind: it is a branch of its own."""
    complete = _complete(run / "checkpoints")
    return [set_aside(path) for path in complete if int(path.name.removeprefix("step_")) > step]


def set_aside_encoders(run: Path) -> None:
    """A run that goes on has no final encoders yet: those there become previous_*."""
    for which in FINAL.values():
        for suffix in (".safetensors", ".json"):
            path = run / f"{which}{suffix}"
            if path.exists():
                path.replace(path.with_name(f"previous_{path.name}"))


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step_*") if (p / "state.json").is_file())


def write_encoder(path: Path, which: str, checkpoint: Path) -> None:
    """Write one encoder of a checkpoint as PATH.safetensors with PATH.json beside it."""
    encoder = load_encoder(checkpoint, which)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, partial)
    sync_file(partial)
    write_text(path.with_suffix(".json"), (checkpoint / "encoder.json").read_text())
    partial.rename(path.with_suffix(".safetensors"))


def load_encoder(path: str | os.PathLike, which: str = "target") -> Encoder:
    """A pretrained encoder, fp32, on the CPU, in evaluation mode.

    path: a run's folder, a checkpoint's folder or a .safetensors file with its .json beside it.
    which: "target" (the averaged one, used for evaluation) or "context"; a .safetensors file holds
    one encoder, the target's unless its name says otherwise. The module also carries `mean` and
    `std`, the normalisation its images had. Raises FileNotFoundError or ValueError.
    """
    if which not in FINAL:
        raise ValueError(f'which={which!r}: must be "target" or "context"')
    path = Path(path)
    if path.suffix == ".safetensors":
        if which == "context" and path.stem != FINAL["context"]:
            raise ValueError(f"{path} holds a target encoder: give the run's folder instead")
        return _build_encoder(path.with_suffix(".json"), _read_weights(path))
    final = path / f"{FINAL[which]}.safetensors"
    if final.is_file():
        return load_encoder(final, which)
    checkpoint = path if (path / "state.json").is_file() else latest(path)
    if checkpoint is None:
        raise FileNotFoundError(f"{path}: neither a checkpoint nor {final.name} is there")
    return _build_encoder(checkpoint / "encoder.json", Stored(checkpoint).encoder_weights(which))


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def _build_encoder(description: Path, weights: dict[str, torch.Tensor]) -> Encoder:
    try:
        described = json.loads(description.read_text())
        normalisation = {name: tuple(described.pop(name)) for name in ("mean", "std")}
        encoder = Encoder(**described).eval()
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{description} does not describe an encoder: {error!r}") from error
    own = {name: p for name, p in encoder.named_parameters() if p.requires_grad or name in weights}
    if own.keys() != weights.keys():
        raise ValueError(f"{description.parent}: weights differ: {sorted(own.keys() ^ weights)}")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name].view(p.shape))
    encoder.mean, encoder.std = normalisation["mean"], normalisation["std"]
    return encoder


def write_text(path: Path, text: str) -> None:
    """Atomic: a reader sees the old text or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    sync_file(partial)
    partial.rename(path)


def sync_file(path: Path) -> None:
    """Make a file, or a folder's names, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier() -> None:
    if world_size() > 1:
        dist.barrier()
