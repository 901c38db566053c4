"""The step: the networks under their engine, the target encoder, the schedules."""

import copy
import json
import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from cjepa_fast.config import Config, ConfigError
from cjepa_fast.data import rng
from cjepa_fast.data.loader import Batch
from cjepa_fast.data.masks import Masks
from cjepa_fast.kernels.common.dependent_launch import use_dependent_launch
from cjepa_fast.kernels.ema import Number
from cjepa_fast.model import fp8
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.vit import Encoder, count_parameters
from cjepa_fast.runtime import distributed, hardware
from cjepa_fast.telemetry import position_share, representation_stats
from cjepa_fast.training import optim
from cjepa_fast.training.backends import choose_attention, choose_linear
from cjepa_fast.training.build import (
    build_engine,
    build_networks,
    check_fp8,
    compile_networks,
    fuse_networks,
    regularised_width,
)
from cjepa_fast.training.engines.cuda_graph import Graphed
from cjepa_fast.training.engines.single import SingleEngine
from cjepa_fast.training.engines.target_stream import TargetStream
from cjepa_fast.training.init_from import initialise

SHARE_IMAGES = 32  # of a micro-batch, whose target tokens tell what position explains
FEATURE_ROWS = 1024  # pooled target features that RankMe and the per-dimension std are taken over


class DataFacts(NamedTuple):
    """What a checkpoint says of the images, so that a resume on others is told apart."""

    fingerprint: str = ""  # of the image set
    usable_fingerprint: str | None = None  # of the images in it that are usable
    count: int | None = None  # of them
    decoder: str = ""  # who decodes them


NO_DATA = DataFacts()  # of a trainer whose batches come from elsewhere


class Trainer:
    """One training: the networks under their engine, the target encoder, and the step."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        steps_per_epoch: int,
        *,
        data: DataFacts = NO_DATA,
        restoring: bool = False,
        linear: dict | None = None,
        attention: dict | None = None,
    ):
        """config: its run.precision resolved (build.with_precision); data: for `facts`;
        restoring: a checkpoint will give the weights; linear, attention: its choices
        (backends.choose_linear, ...)."""
        self.config, self.device, self.restoring = config, device, restoring
        use_dependent_launch(config.run.dependent_launch)
        check_fp8(config, device)
        self.steps_per_epoch, self.data = steps_per_epoch, data
        self.total_steps = config.run.epochs * steps_per_epoch
        self.micro_batch, self.accumulation = config.data.micro_batches(distributed.world_size())
        self._check_micro_batch()
        networks, target = self._build_networks()
        self.attention = choose_attention(
            networks, target, config, device, self.micro_batch, attention
        )
        self.linear = choose_linear(networks, config, device, self.micro_batch, linear)
        self.engine = build_engine(networks, target, config, self.micro_batch, self.accumulation)
        self.ema = self.engine.ema
        self._check_stage()
        self._check_compiler()
        if config.model.context_precision == "fp8":
            fp8.train_in_fp8(networks.encoder)
        compile_networks(networks, target, config.run.compile)
        fuse_networks(networks, target, config, self.engine.stage)
        self.target, self.context_encoder = target, networks.encoder
        if config.run.target_stream and device.type == "cuda":
            self.target = TargetStream(target, networks.predictor, device)
        self.features: deque[torch.Tensor] = deque(maxlen=-(-FEATURE_ROWS // self.micro_batch))
        self.tokens_bND = torch.empty(0)  # the target's, of the last micro-batch's first images
        self._run = self.micro_step
        if config.run.cuda_graph:
            self._check_graph()
            self._run = Graphed(self.micro_step, device)

    def _check_micro_batch(self) -> None:
        """Raises ConfigError where it has too few images for the regulariser's statistics."""
        loss = self.config.loss
        if self.micro_batch >= loss.smallest_micro_batch(distributed.world_size()):
            return
        statistics = {"vicreg": "VICReg's variance", "sigreg": "SIGReg's statistic"}
        raise ConfigError(
            f"data.batch_size or data.micro_batch_size = 1: "
            f"{statistics[loss.regulariser]} needs at least 2 images at a time; or set "
            f"loss.{loss.regulariser}.beta=0"
        )

    def _build_networks(self) -> tuple[JEPA, Encoder]:
        """The networks and the target encoder in fp32, on the device, and what there is to say of
        them: started_from, encoder_json, parameters."""
        config = self.config
        networks = build_networks(
            config, distributed.AllRanks() if distributed.world_size() > 1 else None
        )
        target = copy.deepcopy(networks.encoder)
        self.started_from: list[str] = []  # what the user should know of it, a line each
        if config.run.init_from and not self.restoring:
            self.started_from = initialise(networks, target, config)
        self.encoder_json = json.dumps(
            {**target.architecture, "mean": config.data.mean, "std": config.data.std}, indent=2
        )
        self.parameters = {name: count_parameters(part) for name, part in networks.named_children()}
        networks.to(self.device)
        target.to(self.device)
        return networks, target

    def _check_stage(self) -> None:
        """Raises ConfigError for what ZeRO-3 leaves no room: it gathers weights between modules."""
        run = self.config.run
        if self.engine.stage < 3:
            return
        for key, on in {
            "compile": run.compile != "none",
            "target_stream": run.target_stream,
        }.items():
            if on:
                raise ConfigError(
                    f"run.{key} = {json.dumps(getattr(run, key))}: not with ZeRO stage 3, which "
                    "gathers the weights as the forward comes to them; leave it out, or --set "
                    "deepspeed.zero_optimization.stage=2"
                )

    def _check_compiler(self) -> None:
        """Raises ConfigError where torch.compile does not work: a small function is tried."""
        how = self.config.run.compile
        if how != "none" and (problem := hardware.compile_problem(self.device)):
            raise ConfigError(
                f'run.compile = "{how}": torch.compile does not work here ({problem}); leave it out'
            )

    def _check_graph(self) -> None:
        """Raises ConfigError where the step cannot be recorded."""
        refused = {
            f"the device is {self.device}": self.device.type != "cuda",
            f"a step is {self.accumulation} micro-batches: raise data.micro_batch_size": (
                self.accumulation > 1
            ),
            "DeepSpeed steps cannot be recorded: that takes one rank": (
                not isinstance(self.engine, SingleEngine)
            ),
        }
        for reason in (text for text, holds in refused.items() if holds):
            raise ConfigError(f"run.cuda_graph = true: {reason}; or leave it out")

    def step(
        self,
        batches: list[Batch],
        index: int,
        after_micro_batch: Callable[[], object] = lambda: None,
    ) -> tuple[dict[str, torch.Tensor], bool | torch.Tensor]:
        """Optimiser step number `index` (from 0) over the step's micro-batches.

        Returns the terms' means over the step's images, of all ranks (0-d tensors by name), and
        whether the update was applied, perhaps as a tensor that nobody has waited for.
        """
        schedules, drawn = self.schedules(index), self.drawn(index)
        sums: dict[str, torch.Tensor] = {}
        if self.config.run.cuda_graph:  # it holds the update, which cannot wait inside it
            self.engine.snapshot.wait()
        for batch in batches:
            terms, features_BD, tokens_bND, applied = self._run(
                batch.images_BCHW, batch.masks, *schedules, *drawn
            )
            self.features.append(features_BD.clone())
            self.tokens_bND = tokens_bND.clone()  # else the whole target's output stays
            sums = {name: sums.get(name, 0) + term for name, term in terms.items()}
            after_micro_batch()
        means = {name: total / self.accumulation for name, total in sums.items()}
        return distributed.mean_over_ranks(means), applied

    def micro_step(
        self,
        images_BCHW: torch.Tensor,
        masks: Masks,
        lr: Number,
        weight_decay: Number,
        momentum: Number,
        *drawn: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, bool | torch.Tensor]:
        """One micro-batch, and the update after a step's last. drawn: see `drawn`.

        Returns the terms, the target's mean tokens (B, D), the tokens of its first images
        (b, N, D), and what the engine's step returns.
        """
        with torch.no_grad():
            target_BND = self.target(images_BCHW)
        terms = self.engine(images_BCHW, masks.context, masks.target_idx_BMP, target_BND, *drawn)
        self.engine.backward(terms["loss"])
        applied = self.engine.step(lr, weight_decay, momentum)
        told = {name: term.detach() for name, term in terms.items()}
        return told, target_BND.mean(1), target_BND[:SHARE_IMAGES], applied

    def drawn(self, index: int) -> tuple[torch.Tensor, ...]:
        """What the loss of step `index` (from 0) draws: SIGReg's directions (D, K), or nothing.

        A function of the seed and the step, the same for all ranks and all its micro-batches.
        """
        loss = self.config.loss
        if loss.regulariser != "sigreg":
            return ()
        width, seed = regularised_width(self.config), self.config.run.seed
        return (rng.directions(seed, index, width, loss.sigreg.directions, self.device),)

    def schedules(self, index: int) -> tuple[float, float, float]:
        """Learning rate, weight decay and EMA momentum of step `index` (from 0)."""
        o, total = self.config.optim, self.total_steps
        warmup = int(o.warmup_epochs * self.steps_per_epoch)
        return (
            optim.learning_rate(index + 1, total, warmup, o.start_lr, o.lr, o.final_lr),
            optim.weight_decay(index + 1, total, o.weight_decay, o.final_weight_decay),
            optim.ema_momentum(index, total, o.momentum, o.final_momentum),
        )

    def scalars(self, terms: dict, batches: list[Batch]) -> dict:
        """What is averaged over a telemetry interval, without waiting for the device."""
        masks = [batch.masks for batch in batches]
        return {
            **terms,
            "grad_norm": self.engine.grad_norm,
            "context_k": sum(m.context_k for m in masks) / len(masks),
            "targets_p": sum(m.target_idx_BMP.shape[2] for m in masks) / len(masks),
        }

    def details(self, index: int, skipped_steps: int, skipped_images: int) -> dict:
        """What is logged of a single step, at the end of a telemetry interval.

        RankMe grows with the images it is taken of: it is NaN after a start until there are
        FEATURE_ROWS, or all of a run that has fewer.
        """
        lr, weight_decay, momentum = self.schedules(index)
        stats = representation_stats(torch.cat(list(self.features)))
        whole = min(self.features.maxlen, self.total_steps * self.accumulation)
        if len(self.features) < whole:
            stats["rankme"] = math.nan
        return {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "skipped_steps": skipped_steps,
            "skipped_images": skipped_images,
            **stats,
            "by_position": position_share(self.tokens_bND),
        }

    def facts(self) -> dict:
        """What a run that resumes from here must share, or it becomes another training."""
        facts = {"config": self.config.model_dump(mode="json"), "images": self.data.fingerprint}
        facts["decoder"] = self.data.decoder
        if self.data.usable_fingerprint is not None:
            facts["usable_images"] = self.data.usable_fingerprint
        if self.data.count is not None:
            facts["image_count"] = self.data.count
        if self.linear:
            facts["linear"] = self.linear
        if self.config.model.attention == "auto" and self.device.type == "cuda":
            facts["attention"] = self.attention
        if self.config.loss.active_regulariser.beta > 0:
            name = {"vicreg": "VICReg", "sigreg": "SIGReg"}[self.config.loss.regulariser]
            facts[f"images a {name} statistic"] = self.micro_batch * distributed.world_size()
        return facts
