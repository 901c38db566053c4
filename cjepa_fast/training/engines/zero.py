"""A model under DeepSpeed: its step, and the fp32 state behind it.

`ZeroEngine.state()` lists, for any ZeRO stage, the fragments of the fp32 weights and Adam moments
that this rank owns, as views. The target's EMA and the checkpoints are built on it alone.
One rank has nothing to shard and trains without DeepSpeed: single.py.
"""

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from cjepa_fast.checkpoint.owned import Fragment, OwnedState, Snapshot, fragment_of
from cjepa_fast.runtime import hardware
from cjepa_fast.runtime.distributed import deepspeed, mean_over_ranks, rank, world_size
from cjepa_fast.training.ema import FragmentView, TargetEMA
from cjepa_fast.training.engines.base import DTYPES, MOMENTS, masters_below, total_norm


def adamw(implementation: str, groups: list[dict], **numbers) -> torch.optim.Optimizer:
    """AdamW by torch ("fused"), by DeepSpeed's own kernels, or by apex. numbers: betas, eps.

    Raises ValueError where the package does not load. DeepSpeed compiles its own at the first use.
    """
    numbers["lr"] = 0.0  # some ZeRO stages allocate Adam's state by a step with zero gradients
    if implementation == "fused":
        return torch.optim.AdamW(groups, fused=True, **numbers)
    if implementation == "deepspeed":
        deepspeed()
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        of_device = FusedAdam if hardware.has_gpu() else DeepSpeedCPUAdam
        return of_device(groups, **numbers)
    try:
        from apex.optimizers import FusedAdam as ApexAdam
    except ImportError as error:
        raise ValueError(
            f'optim.implementation = "apex": it does not load ({error}); docs/install.md tells '
            'how it is built from NVIDIA\'s source; or take "fused"'
        ) from error
    return ApexAdam(groups, adam_w_mode=True, **numbers)


class ZeroEngine:
    """A model under DeepSpeed, its target's EMA, and the schedules taken from outside.

    target: a copy of the model's encoder in fp32, moved to the compute dtype here. groups: from
    optim.parameter_groups; config: the user's own DeepSpeed JSON, completed here. implementation:
    see adamw. fp8: of the target.
    """

    def __init__(
        self,
        model: nn.Module,
        target: nn.Module,
        groups: list[dict],
        config: dict,
        *,
        micro_batch: int,
        accumulation: int,
        precision: str = "bf16",
        clip: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fp8: bool = False,
        implementation: str = "fused",
    ):
        initial = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
        trained = sum(p.numel() for group in groups for p in group["params"])
        self._config = complete_config(config, micro_batch, accumulation, precision, clip, trained)
        self._deepspeed, *_ = deepspeed().initialize(
            model=model,
            optimizer=adamw(implementation, groups, betas=betas, eps=eps),
            config=copy.deepcopy(self._config),
            dist_init_required=False,
        )
        self.stage = self._deepspeed.zero_optimization_stage()
        self.precision = precision
        self.device = next(model.parameters()).device
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._allocate_moments()
        self.set_optimizer_step(0)
        self._write_masters(initial)
        masters = self.masters("encoder.")
        self.ema = TargetEMA(
            target,
            masters,
            DTYPES[precision],
            self.owner_group,
            fp8,
            self._partition if self.stage == 3 and self.sharded and not fp8 else None,
        )
        self.grad_norm: torch.Tensor | float = 0.0
        self.snapshot = Snapshot()
        self._accumulation = accumulation
        self._loss: torch.Tensor | float = 0.0  # summed over micro-batches
        self._limits = (math.inf, math.inf)
        self._refuse_by_norm()

    @property
    def module(self) -> nn.Module:
        return self._deepspeed.module

    @property
    def sharded(self) -> bool:
        """Whether each rank owns only a share of the fp32 state."""
        return self.stage > 0 and world_size() > 1

    @property
    def owner_group(self) -> dist.ProcessGroup | None:
        """The ranks that together own the whole fp32 state; None where each has it all."""
        return dist.group.WORLD if self.sharded else None

    def _partition(self, target: nn.Module) -> FragmentView:
        """Under ZeRO-3: the target's weights shared out as the encoder's, gathered in its forward.

        Of no weight a second copy is kept, nor the small ones whole: an update of the EMA would
        leave those as they were.
        """
        zero = {**self._config["zero_optimization"], "stage3_param_persistence_threshold": 0}
        dropped = ("offload_optimizer", "offload_param", "zero_hpz_partition_size")
        dropped += ("zero_quantized_weights",)
        zero = {key: value for key, value in zero.items() if key not in dropped}
        kept = {key: self._config[key] for key in ("train_micro_batch_size_per_gpu", "bf16")}
        with _without_second_copies():
            deepspeed().initialize(
                model=target, config={**kept, "zero_optimization": zero}, dist_init_required=False
            )

        def view_of(weight: nn.Parameter, fragment: Fragment) -> torch.Tensor:
            share = weight.ds_tensor
            first = fragment.start - rank() * share.ds_numel
            return share.data[first : first + len(fragment.values)]

        return view_of

    def __call__(self, *args, **kwargs):
        return self._deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch; the mean over micro-batches and ranks."""
        self._loss = self._loss + loss.detach()
        self._deepspeed.backward(loss)

    def limit(self, loss: float, grad_norm: float) -> None:
        """From now on, a step above either is not applied."""
        self._limits = (loss, grad_norm)

    def step(self, lr: float, weight_decay: float, momentum: float) -> bool:
        """Call after each micro-batch; at the last of a step, update weights and EMA.

        Returns False where a gradient was not finite or above a limit: then nothing is updated.
        A snapshot is waited for before anything of the state changes.
        """
        boundary = self._deepspeed.is_gradient_accumulation_boundary()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decay"] else 0.0
        if not boundary:
            self._deepspeed.step()
            return True
        self.snapshot.wait()
        self._refused = self._loss_is_above()
        if self.stage == 0:
            self.grad_norm = total_norm([p.grad for p in self._parameters if p.grad is not None])
            if self._refuses(self.grad_norm):
                self._end_window_without_update()
                return False
        self._checked_norm = None
        self._deepspeed.step()
        if self.stage > 0:
            self.grad_norm = self._checked_norm or self._deepspeed.get_global_grad_norm()
        applied = self._deepspeed.was_step_applied()
        if applied:
            self.ema.update(momentum)
        return applied

    def _loss_is_above(self) -> bool:
        """Whether the step's mean loss, of all ranks, is above its limit."""
        loss, self._loss = self._loss, 0.0
        if self._limits[0] == math.inf:
            return False
        mean = mean_over_ranks({"loss": loss / self._accumulation})["loss"]
        return bool(mean > self._limits[0])

    def _refuses(self, grad_norm: float | torch.Tensor) -> bool:
        return self._refused or not grad_norm <= min(
            self._limits[1], torch.finfo(torch.float32).max
        )

    def _refuse_by_norm(self) -> None:
        """The higher stages learn their gradients' norm in the midst of a step, which they skip
        where that is not finite: a norm above the limit is handed on as such."""
        if self.stage == 0:
            return
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        original = getattr(self._optimizer, name)

        def checked():
            norms = original()
            if not self._refused and self._limits[1] == math.inf:
                return norms
            parts = norms if isinstance(norms, list) else [norms]
            parts = [torch.as_tensor(part, device=self.device) for part in parts]
            stacked = torch.stack(parts)
            invalid = not (stacked >= 0).all()  # DeepSpeed writes -1 for what is not finite
            self._checked_norm = math.inf if invalid else float(torch.linalg.vector_norm(stacked))
            if not self._refuses(self._checked_norm):
                return norms
            infinite = torch.full_like(parts[0], math.inf)
            return [infinite] if isinstance(norms, list) else infinite

        setattr(self._optimizer, name, checked)

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        return self._deepspeed.optimizer

    def _end_window_without_update(self) -> None:
        """Drop the gradients and let DeepSpeed begin the next accumulation window."""
        self._deepspeed.zero_grad()
        self._deepspeed.micro_steps += 1

    def _allocate_moments(self) -> None:
        """Adam's moments as zeros where no stage has made them yet."""
        if self.stage == 3:  # its optimiser is lent each flat partition only for its update
            optimised = self._optimizer.fp32_partitioned_groups_flat
        else:
            optimised = [p for g in self._base_optimizer.param_groups for p in g["params"]]
        for p in optimised:
            state = self._base_optimizer.state[p]
            if isinstance(self._base_optimizer, torch.optim.AdamW):
                state.setdefault("step", torch.zeros((), dtype=torch.float32, device=p.device))
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(p)

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self._deepspeed.basic_optimizer

    def set_optimizer_step(self, step: int) -> None:
        """Adam's own count of updates, which decides its bias correction."""
        for holder in self._step_holders():
            if isinstance(holder.get("step"), torch.Tensor):
                holder["step"].fill_(step)
            else:
                holder["step"] = step

    def optimizer_step(self) -> int:
        return int(next(self._step_holders())["step"])

    def _step_holders(self) -> Iterator[dict]:
        """Apex counts by parameter group, the others by parameter."""
        optimizer = self._base_optimizer
        by_group = type(optimizer).__module__.startswith("apex")
        yield from optimizer.param_groups if by_group else optimizer.state.values()

    def state(self) -> list[OwnedState]:
        """This rank's share of the fp32 weights and moments; every stage's shares cover all."""
        if self.stage == 3:
            return self._state_stage_3()
        if self.stage > 0:
            return self._state_stage_1_2()
        return self._state_stage_0()

    def masters(self, prefix: str) -> list[Fragment]:
        return masters_below(prefix, self.state())

    def _owned(self, name: str, start: int, key: nn.Parameter, offset: int, numel: int):
        """The slice [offset, offset + numel) of an optimiser's (flat) parameter and its moments."""
        state = self._base_optimizer.state[key]
        owned = slice(offset, offset + numel)
        moments = {moment: state[moment].view(-1)[owned] for moment in MOMENTS}
        return OwnedState(Fragment(name, start, key.data.view(-1)[owned]), moments)

    def _state_stage_0(self) -> list[OwnedState]:
        masters = {id(p): p for p in self._parameters}
        if self.precision == "bf16":
            for low, high in zip(
                self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True
            ):
                masters.update({id(p): q for p, q in zip(low, high, strict=True)})
        return [
            self._owned(self._names[id(p)], 0, masters[id(p)], 0, p.numel())
            for p in self._parameters
        ]

    def _state_stage_1_2(self) -> list[OwnedState]:
        flats = self._flat_partitions()
        owned = []
        for p in self._parameters:
            mapping = p._hp_mapping
            if mapping is None:
                continue
            at = mapping.hp_fragment_address
            flat = flats[mapping.param_group_index]
            start = mapping.lp_fragment_address.start
            owned.append(self._owned(self._names[id(p)], start, flat, at.start, at.numel))
        return owned

    def _flat_partitions(self) -> list[nn.Parameter]:
        zero = self._optimizer
        if hasattr(zero, "single_partition_of_fp32_groups"):
            return zero.single_partition_of_fp32_groups
        return zero.fp32_groups_flat_partition

    def _state_stage_3(self) -> list[OwnedState]:
        zero, owned = self._optimizer, []
        for p in self._parameters:
            group, offset, size = zero.grad_position[zero.get_param_id(p)]
            start = rank() * size
            numel = min(size, p.ds_numel - start)  # the last share is padded
            if numel > 0:
                flat = zero.fp32_partitioned_groups_flat[group]
                owned.append(self._owned(self._names[id(p)], start, flat, offset, numel))
        return owned

    @torch.no_grad()
    def _write_masters(self, weights: dict[str, torch.Tensor]) -> None:
        """DeepSpeed takes its fp32 masters from weights it has rounded: give them their digits."""
        for master, _ in self.state():
            master.values.copy_(fragment_of(weights[master.name], master))

    @torch.no_grad()
    def write_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Set the compute-dtype weights from whole fp32 tensors by name, after a restore."""
        if self.stage == 3:  # the small ones are kept whole after a step
            self._optimizer._partition_all_parameters()
        for p in self._parameters:
            whole = weights[self._names[id(p)]]
            if self.stage < 3:
                p.data.copy_(whole.view(p.shape))
                continue
            share = p.ds_tensor
            start = rank() * share.ds_numel
            part = whole.flatten()[start : start + share.ds_numel]
            share.data[: len(part)].copy_(part)
        if self.stage == 3:
            self._optimizer.invalidate_secondary_tensor()  # zero_hpz_partition_size's second copies


@contextlib.contextmanager
def _without_second_copies() -> Iterator[None]:
    """A model set up within it keeps none, though another has zero_hpz_partition_size: DeepSpeed
    takes the group of that from any model's settings for all."""
    from deepspeed.utils import groups

    made, groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP, None
    try:
        yield
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = made


def complete_config(
    config: dict, micro_batch: int, accumulation: int, precision: str, clip: float, trained: int
) -> dict:
    """The user's DeepSpeed JSON with what the other sections decide. trained: parameters.

    Raises ValueError for groups within nodes that the ranks do not divide into.
    """
    config = {key: value for key, value in config.items() if value != "auto"}
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["gradient_accumulation_steps"] = accumulation
    config.pop("train_batch_size", None)
    config["bf16"] = {**config.get("bf16", {}), "enabled": precision == "bf16"}
    config.setdefault("gradient_clipping", clip)
    config.setdefault("zero_allow_untested_optimizer", True)
    # DeepSpeed's timer waits for the device twice a micro-batch; the log has its own images/s
    config.setdefault("timers", {"throughput": {"enabled": False}})
    # torch's fused AdamW also serves offloaded masters: DeepSpeed's own would be compiled first
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    # "auto" within it is DeepSpeed's default too
    given = config.get("zero_optimization", {})
    zero = {key: value for key, value in given.items() if value != "auto"}
    if not hardware.has_gpu():
        zero["overlap_comm"] = False  # it needs CUDA streams
    elif world_size() > 1:
        zero.setdefault("overlap_comm", True)
    # A bucket is reduced once it is full, so several must fill in one backward for the reduction
    # and the backward to overlap: not DeepSpeed's 5e8 values, which are allocated whole.
    zero.setdefault("reduce_bucket_size", min(trained, 50_000_000))
    within_nodes = min(zero.get("zero_hpz_partition_size", 1), world_size())
    if within_nodes > 1 and world_size() % within_nodes:
        raise ValueError(
            f"deepspeed.zero_optimization.zero_hpz_partition_size = {within_nodes}: must divide "
            f"the {world_size()} ranks; take the GPUs of a node"
        )
    if precision == "bf16" and accumulation > 1 and zero.get("stage", 0) >= 2:
        # As one rank does. Stage 0 refuses it, and stage 1 takes another of its optimisers for it.
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    config["zero_optimization"] = zero
    return config
