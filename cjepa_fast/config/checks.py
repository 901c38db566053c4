"""What no single key shows to be wrong: checks between keys, before any machine is looked at."""

import difflib
import json
from collections.abc import Iterator
from typing import Any

from cjepa_fast.config.schema import Config, DataSection
from cjepa_fast.runtime.image_size import height_width, patch_grid, simplest

# What DeepSpeed 0.19.8 reads at the top of its JSON (runtime/config.py, with what it calls). Some
# it refuses itself, as no longer supported.
KEYS_OF_DEEPSPEED = {
    "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint",
    "comet", "comms_logger", "communication_data_type", "compile", "compression_training",
    "csv_monitor", "curriculum_learning", "data_efficiency", "data_types",
    "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "disable_python_gc",
    "dump_state", "eigenvalue", "elasticity", "expert_parallel", "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "graph_harvesting", "hybrid_engine", "log_level",
    "managed_gradient_accumulation", "memory_breakdown", "nebula", "optimizer", "pipeline",
    "prescale_gradients", "progressive_layer_drop", "quantize_training", "scheduler",
    "seq_parallel_communication_data_type", "sparse_attention", "sparse_gradients",
    "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast",
    "train_batch_size", "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism",
    "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
# Of zero_optimization, those that are most likely to be set beside it.
KEYS_OF_ZERO = (
    "stage", "offload_optimizer", "offload_param", "overlap_comm", "reduce_bucket_size",
    "allgather_bucket_size", "contiguous_gradients", "reduce_scatter", "zero_hpz_partition_size",
)  # fmt: skip
PER_NODE = "zero_hpz_partition_size"
OWN_OPTIMISER = "brings an optimiser of its own, whose state could not be saved; leave it out"
NVME = 'what lies on a disk can be neither averaged nor saved; take "cpu"'
# Keys of DeepSpeed's JSON that engines/zero.py cannot work with, the values that do no harm, and
# why.
# Found by training with each against training without (DeepSpeed 0.19), or in DeepSpeed's source.
REFUSED_OF_DEEPSPEED: dict[str, tuple[tuple, str]] = {
    "zero_optimization.mics_shard_size": (
        (None,),
        "DeepSpeed has MiCS no longer; take zero_hpz_partition_size, the GPUs of a node",
    ),
    "zero_optimization.round_robin_gradients": (
        (None, False),
        "several ranks then train to other weights; leave it out",
    ),
    "zero_optimization.compute_grad_norm": (
        (None, True),
        "the gradient's norm is what bad steps are told by; leave it out",
    ),
    "zero_optimization.zero_quantized_nontrainable_weights": (
        (None, False),
        "the positions are such weights, and would be kept in FP8; leave it out",
    ),
    "zero_optimization.offload_optimizer.device": ((None, "none", "cpu"), NVME),
    "zero_optimization.offload_param.device": ((None, "none", "cpu"), NVME),
    "zero_optimization.offload_optimizer.ratio": (
        (None, 1),
        "a part of the update on the GPU wants DeepSpeed's own CPU Adam; leave it out",
    ),
    "zero_optimization.offload_optimizer.super_offload": ((None, False), OWN_OPTIMISER),
    "zero_optimization.zenflow": ((None,), OWN_OPTIMISER),
    "gradient_clipping": ((None,), "set optim.clip instead"),
    "bf16.check_grad_overflow": (
        (None, True),
        "a step with a NaN would be applied; leave it out",
    ),
    "bf16.bf16_master_weights_and_grads": (
        (None, False),
        "weights and EMA would lose their digits; leave it out",
    ),
}


def find_problems(config: Config) -> Iterator[str]:
    """What no single key shows to be wrong."""
    mask, model, optim = config.mask, config.model, config.optim
    yield from _impossible_grid(config)
    yield from _impossible_channels(config.data)
    yield from _empty_paths(config)
    yield from _reversed_ranges(config)
    if mask.context == "packed" and model.attention == "sdpa_cudnn":
        yield (
            'model.attention = "sdpa_cudnn": has no kernel for mask.context = "packed"; take '
            '"auto", "sdpa_flash" or "flash_attn", or another mask.context'
        )
    if config.run.epochs != "auto" and optim.warmup_epochs > config.run.epochs:
        yield (
            f"optim.warmup_epochs = {optim.warmup_epochs:g}: longer than the run; "
            f"at most run.epochs = {config.run.epochs}"
        )
    if config.run.cuda_graph and mask.context not in ("fixed", "packed"):
        yield (
            f'run.cuda_graph = true: mask.context = "{mask.context}" changes the shapes; '
            'set mask.context to "fixed" or "packed"'
        )
    for key in ("target_precision", "context_precision"):
        if getattr(model, key) == "fp8" and config.run.precision == "fp32":
            yield (
                f'model.{key} = "fp8": not with run.precision = "fp32"; set that to "bf16", or '
                "leave it out"
            )
    if config.run.target_stream and config.run.compile == "whole":
        yield (
            'run.target_stream = true: not with run.compile = "whole", which leaves no point '
            'between predictor and loss to wait at; take "blocks" or "none"'
        )
    yield from _impossible_weight_stream(config)
    if config.predictor.mode == "one_pass" and mask.context == "packed":
        yield (
            'predictor.mode = "one_pass": not with mask.context = "packed", which cuts '
            'its sequences another way; take "fixed" or "random"'
        )
    yield from _impossible_loss(config)
    yield from _impossible_sizes(config)
    yield from _impossible_deepspeed(config)


def _empty_paths(config: Config) -> Iterator[str]:
    data = config.data
    paths = [data.path] if isinstance(data.path, str) else data.path
    if not paths or not all(path.strip() for path in paths):
        yield (
            f"data.path = {json.dumps(data.path)}: an empty path names no images (an unset "
            "variable?); name a folder, shards or a list"
        )
    if not config.run.dir.strip():
        yield (
            f"run.dir = {json.dumps(config.run.dir)}: an empty path is the current folder (an "
            'unset variable?); name a folder, or "." for that one'
        )


def _reversed_ranges(config: Config) -> Iterator[str]:
    for section, key in (
        ("data", "crop_scale"),
        ("data", "crop_ratio"),
        ("mask", "target_scale"),
        ("mask", "target_aspect"),
        ("mask", "context_scale"),
    ):
        low, high = getattr(getattr(config, section), key)
        if low > high:
            yield f"{section}.{key} = [{low}, {high}]: the first must not exceed the second"


def _impossible_loss(config: Config) -> Iterator[str]:
    if not config.loss.prediction_weight and not config.loss.active_regulariser.beta:
        yield (
            f"loss.prediction_weight = 0: with loss.{config.loss.regulariser}.beta = 0 nothing is "
            "left to train on; set one of them above 0"
        )
    vicreg = config.loss.vicreg
    if vicreg.positions_weight and vicreg.views == "positions":
        yield (
            f"loss.vicreg.positions_weight = {vicreg.positions_weight:g}: with loss.vicreg.views = "
            '"positions" they are there already; leave it out, or raise loss.vicreg.beta'
        )


def _impossible_weight_stream(config: Config) -> Iterator[str]:
    """Settings with which no block is fused: no others use it."""
    if not config.run.weight_stream:
        return
    for key, value, wrong, instead in (
        ("run.compile", config.run.compile, ("blocks", "whole"), '"none"'),
        ("run.precision", config.run.precision, ("fp32",), '"bf16"'),
        ("model.fused", config.model.fused, (False,), "true"),
        ("mask.context", config.mask.context, ("packed",), '"fixed"'),
    ):
        if value in wrong:
            yield (
                f"run.weight_stream = true: not with {key} = {json.dumps(value)}, which leaves no "
                f"block fused (model.fused); set that to {instead}, or leave it out"
            )


def _impossible_grid(config: Config) -> Iterator[str]:
    size, patch = config.data.image_size, config.model.patch_size
    written = json.dumps(size)
    if any(side % patch for side in height_width(size)):
        fitting = simplest([max(side // patch, 1) * patch for side in height_width(size)])
        yield (
            f"data.image_size = {written}: must be a multiple of model.patch_size = {patch}, "
            f"such as {json.dumps(fitting)}"
        )
    rows, cols = patch_grid(size, patch)
    if config.mask.min_keep >= rows * cols > 0:
        yield (
            f"mask.min_keep = {config.mask.min_keep}: the grid has only {rows * cols} patches; "
            f"at most {rows * cols - 1} can be kept beside a target"
        )
    if config.mask.sampler == "ijepa" and min(rows, cols) == 1:
        yield (
            f"data.image_size = {written}: its {rows} x {cols} patches leave no room for "
            'mask.sampler = "ijepa", which never uses the last row and column; take "uniform"'
        )


def _impossible_channels(data: DataSection) -> Iterator[str]:
    for key in ("mean", "std"):
        values = list(getattr(data, key))
        if len(values) != data.channels:
            yield (
                f"data.{key} = {json.dumps(values)}: data.channels = {data.channels} wants "
                f"{data.channels} numbers, such as {json.dumps([0.5] * min(data.channels, 4))}"
                f"{'...' * (data.channels > 4)}"
            )
    if data.colour and data.channels != 3:
        yield (
            f"data.colour = {data.colour:g}: colour jitter is of RGB, and data.channels = "
            f"{data.channels}; set it to 0"
        )


def _impossible_sizes(config: Config) -> Iterator[str]:
    for section in ("model", "predictor"):
        part = getattr(config, section)
        for key, value in (("width", part.width), ("heads", part.heads)):
            if key == "width" and value is not None and value % 4:
                yield f"{section}.width = {value}: must be a multiple of 4 (2-D positions)"
        if part.width and part.heads and part.width % part.heads:
            yield (
                f"{section}.width = {part.width}: must be a multiple of {section}.heads = "
                f"{part.heads}"
            )


def _impossible_deepspeed(config: Config) -> Iterator[str]:
    """Keys that another section decides may stand in a user's DeepSpeed JSON only as "auto"."""
    decided = {
        "train_batch_size": "data.batch_size",
        "train_micro_batch_size_per_gpu": "data.micro_batch_size",
        "gradient_accumulation_steps": "data.batch_size and data.micro_batch_size",
        "optimizer": "optim",
        "scheduler": "optim",
    }
    for key, owner in decided.items():
        value = config.deepspeed.get(key, "auto")
        if value != "auto":
            yield f'deepspeed.{key} = {json.dumps(value)}: set {owner} instead, or leave it "auto"'
    for key in ("bf16", "fp16", "zero_optimization"):
        value = config.deepspeed.get(key, {})
        if not isinstance(value, dict):
            yield f"deepspeed.{key} = {json.dumps(value)}: must be an object, as DeepSpeed has it"
        elif key == "fp16" and value.get("enabled", "auto") != "auto" and value["enabled"]:
            written = json.dumps(value["enabled"])
            yield f"deepspeed.fp16.enabled = {written}: set run.precision (bf16 or fp32) instead"
    yield from _unknown_of_deepspeed(config.deepspeed)
    within = config.deepspeed.get("zero_optimization", {})
    within = within.get(PER_NODE, "auto") if isinstance(within, dict) else "auto"
    if within != "auto" and (type(within) is not int or within < 0):
        yield (
            f"deepspeed.zero_optimization.{PER_NODE} = {json.dumps(within)}: must be a whole "
            "number, the GPUs of a node"
        )
    stage = _at(config.deepspeed, "zero_optimization.stage")
    if stage is not None and (type(stage) is not int or not 0 <= stage <= 3):
        yield f"deepspeed.zero_optimization.stage = {json.dumps(stage)}: must be 0, 1, 2 or 3"
    for key, (allowed, reason) in REFUSED_OF_DEEPSPEED.items():
        value = _at(config.deepspeed, key)
        if value not in allowed:
            yield f"deepspeed.{key} = {json.dumps(value)}: {reason}"


def _unknown_of_deepspeed(section: dict[str, Any]) -> Iterator[str]:
    """Keys that DeepSpeed would leave unread, without a word."""
    for key in sorted(section.keys() - KEYS_OF_DEEPSPEED):
        (nearest,) = difflib.get_close_matches(key, sorted(KEYS_OF_DEEPSPEED), n=1, cutoff=0.0)
        if key in KEYS_OF_ZERO:
            nearest = f"zero_optimization.{key}"
        yield (
            f"deepspeed.{key} = {json.dumps(section[key])}: DeepSpeed has no such key, and would "
            f"ignore it; nearest is deepspeed.{nearest}"
        )


def _at(values: Any, path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
