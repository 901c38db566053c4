"""What a training keeps to resume from: checkpoints as pretraining writes them, the newest alone.

    FOLDER/checkpoints/step_00001000/
        shard_00000_of_00001.safetensors   master/NAME@0, exp_avg/..., exp_avg_sq/..., step/...,
                                           ema/...; of each the values, flat
        state.json                         the steps done, and the facts that decide the training
        encoder.json                       the encoder's architecture
        manifest.json                      each file's size and SHA-256
checkpoint/writer.py writes them, checkpoint/restore.py puts them back; no pickle is read.
"""

import hashlib
import json
import operator
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cjepa_fast.checkpoint import damage, restore, state_of
from cjepa_fast.checkpoint.owned import Fragment, OwnedState, Snapshot
from cjepa_fast.checkpoint.writer import Saver
from cjepa_fast.eval.finetuning.layer_decay import layer_decay_groups
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.distributed import all_gather_objects, local_rank_0_first
from cjepa_fast.runtime.printable import say

ADAM = ("exp_avg", "exp_avg_sq", "step")  # its state of a weight
# Facts that earlier versions left out: absent, they agree.
LATER = ("labels", "annotations_sha256", "label_maps_sha256", "bf16", "micro_batch")


class FragmentsEMA(NamedTuple):
    """checkpoint.owned.EMA of fragments that are the module's own weights."""

    fragments: list[Fragment]

    def write_working_copy(self) -> None:
        """There is none to write."""


def digest_of_labels(label_n: torch.Tensor) -> str:
    """For the facts of a training: of the class of each image, (n,) int64."""
    return hashlib.sha256(label_n.contiguous().numpy().tobytes()).hexdigest()


class Learner:
    """A model with an encoder, its AdamW by layer decay, and the EMA of its weights, if any.

    clip: the largest norm of all gradients together; 0: none.
    It is checkpoint.owned.Saved: whole on every rank, of which the first writes it.
    """

    sharded = False

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        layer_decay: float,
        weight_decay: float,
        average: AveragedModel | None = None,
        clip: float = 0.0,
    ):
        self.module, self.encoder, self.average, self.clip = model, encoder, average, clip
        groups = layer_decay_groups(model, encoder, layer_decay, weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0)
        for p in self._trained().values():
            moments = {name: torch.zeros_like(p) for name in ADAM[:2]}
            self.optimizer.state[p] = {"step": torch.zeros(()), **moments}
        self.snapshot = Snapshot()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next step, of which each group takes its own share."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def set_weight_decay(self, weight_decay: float) -> None:
        """That of the next step, for the groups that take it."""
        for group in self.optimizer.param_groups:
            group["weight_decay"] = weight_decay if group["decays"] else 0.0

    def step(self) -> None:
        """Update the weights and their EMA by the gradients, and clear those."""
        if self.clip:
            nn.utils.clip_grad_norm_(self._trained().values(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.module)

    @property
    def encoder_json(self) -> str:
        images = {"mean": self.encoder.mean, "std": self.encoder.std}
        return json.dumps({**self.encoder.architecture, **images})

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    # ------------------------------------------------------------------------------------- as Saved

    @property
    def ema(self) -> FragmentsEMA:
        if self.average is None:
            return FragmentsEMA([])
        emas = dict(self.average.module.named_parameters())
        return FragmentsEMA([_whole(name, emas[name]) for name in self._trained()])

    def state(self) -> list[OwnedState]:
        """Weights with Adam's state of them, and buffers, which have none."""
        adam = self.optimizer.state
        found = [
            OwnedState(_whole(name, p), {kind: _flat(adam[p][kind]) for kind in ADAM})
            for name, p in self._trained().items()
        ]
        buffers = self.module.named_buffers()
        return found + [OwnedState(_whole(name, values), {}) for name, values in buffers]

    def optimizer_step(self) -> int:
        return max(int(state["step"]) for state in self.optimizer.state.values())

    def set_optimizer_step(self, step: int) -> None:
        """Adam's own counts are in its state; the EMA has one too."""
        if self.average is not None:
            self.average.n_averaged.fill_(step)

    def write_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """The weights are their own fp32 masters; the EMA's buffers are as the model's."""
        if self.average is not None:
            pairs = zip(self.average.module.buffers(), self.module.buffers(), strict=True)
            for copy, values in pairs:
                copy.copy_(values)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1)


def _whole(name: str, tensor: torch.Tensor) -> Fragment:
    return Fragment(name, 0, _flat(tensor))


class SavedTraining:
    """The state of a training below `folder`; where that is None nothing is kept.

    facts: what decides the training, as JSON can hold it; resume: whether to resume from what is
    there. option: what names the folder on the command line, for errors.
    """

    def __init__(
        self, folder: Path | None, facts: dict, *, resume: bool = True, option: str = "--out"
    ):
        self.folder, self.facts = folder, json.loads(json.dumps(facts))
        self._resume, self._option = resume, option
        self._saver: Saver | None = None

    def restore(self, learner: Learner) -> int:
        """How many steps are done, by what lies in the folder, which is put in place; 0 where
        nothing does. Every rank calls it.

        Raises ValueError, on every rank, naming the file that is damaged, of an earlier version or
        of another training, or where it must not be resumed.
        """
        if self.folder is None:
            return 0
        done = local_rank_0_first(lambda: self._restored(learner))
        if len(set(all_gather_objects(done))) > 1:
            raise ValueError(f"{self.folder} must be in a folder that all ranks share")
        self._saver = Saver(
            self.folder / "checkpoints", learner, learner.encoder_json, keep=1, say=_warn
        )
        return done

    def save(self, done: int) -> None:
        """The state after so many steps, in place of what was there. Every rank calls it.

        What cannot be written is said, and the training continues.
        """
        if self._saver is not None:
            self._saver.begin(done, {"facts": self.facts})
            self._saver.finish()
            all_gather_objects(None)  # rank 0 has named it

    def _restored(self, learner: Learner) -> int:
        self._refuse_earlier_versions()
        found = sorted(
            (self.folder / "checkpoints").glob("step_*"), key=lambda p: (len(p.name), p.name)
        )
        if not found:
            return 0
        if not self._resume:
            raise ValueError(f"{found[-1]} is there: resume it with --resume, or {self._elsewhere}")
        if damaged := damage(found[-1]):
            raise ValueError(f"{damaged[0]}: {self._elsewhere} to start anew")
        state = state_of(found[-1])
        self._refuse_other_training(found[-1], state.get("facts"))
        return self._put_back(found[-1], learner)

    @property
    def _elsewhere(self) -> str:
        return f"name another {self._option}"

    def _refuse_earlier_versions(self) -> None:
        files = [self.folder.with_name(f"{self.folder.name}.pt"), *self.folder.glob("epoch_*")]
        for path in files:
            if path.exists():
                raise ValueError(
                    f"{path} was saved by an earlier version, as a pickle, which is not read: "
                    f"{self._elsewhere} to start anew, or remove it"
                )

    def _refuse_other_training(self, path: Path, facts: object) -> None:
        if not isinstance(facts, dict):
            raise ValueError(f"{path} was saved by no such training: {self._elsewhere}")
        for name, value in self.facts.items():
            if name in LATER and name not in facts:
                continue
            if facts.get(name) != value:
                raise ValueError(
                    f"{path} is of another training: {name} was {facts.get(name)}, is {value}; "
                    f"{self._elsewhere}"
                )

    def _put_back(self, path: Path, learner: Learner) -> int:
        """Restore from files that are as they were written, and may yet not be what they should
        be."""
        try:
            return operator.index(restore(path, learner)["step"])
        except (LookupError, TypeError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} cannot be resumed ({reason}); {self._elsewhere}") from error


def _warn(text: str) -> None:
    say(text, sys.stderr)
