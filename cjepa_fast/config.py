"""The configuration of a run: frozen, typed, validated once, read from JSON.

`load("vit_h.json", ["optim.lr=3e-4"])` finds the file, resolves its "extends", applies the
overrides and checks everything; whatever is wrong raises one ConfigError that names the key, the
value, what is allowed and, for an unknown key, the nearest valid one.
"""

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]

MODEL_NAMES = ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant")

OWN_OPTIMISER = "brings an optimiser of its own, whose state could not be saved; leave it out"
NVME = 'what lies on a disk can be neither averaged nor saved; take "cpu"'
# Keys of DeepSpeed's JSON that engine.py cannot live with, the values that are harmless, and why.
# Found by training with each against training without (DeepSpeed 0.19), or in DeepSpeed's source.
REFUSED_OF_DEEPSPEED: dict[str, tuple[tuple, str]] = {
    "zero_optimization.mics_shard_size": (
        (None,),
        "DeepSpeed has MiCS no longer; take zero_hpz_partition_size, the GPUs of a node",
    ),
    "zero_optimization.round_robin_gradients": (
        (None, False),
        "several processes then train to other weights; leave it out",
    ),
    "zero_optimization.compute_grad_norm": (
        (None, True),
        "the gradient's norm is what bad steps are told by; leave it out",
    ),
    "zero_optimization.zero_quantized_nontrainable_weights": (
        (None, False),
        "the positions are such weights, and would be kept in 8 bits; leave it out",
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
        "weights and average would lose their digits; leave it out",
    ),
}


class ConfigError(ValueError):
    """The message is for the user, whole: no traceback is needed."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def later(default: Any, *, was: Any, **described: Any) -> Any:
    """A field whose key, or whose default, came later than some saved run.

    was: what the code did before: a run that lacks the key did that, and one that has it by an
    earlier default keeps it. See `as_begun`.
    """
    return Field(default, json_schema_extra={"was": was}, **described)


class RunSection(Section):
    dir: str = Field("runs/{config}", description="folder of the run; {config} is the file's name")
    seed: Seed = 0
    epochs: Count = 300
    precision: Literal["auto", "bf16", "fp32"] = later(
        "auto", was="bf16", description="auto: bf16 where the hardware multiplies it, else fp32"
    )
    compile: Literal["none", "blocks", "whole"] = Field(
        "none", description='torch.compile; "whole" wants mask.context "fixed" or "packed"'
    )
    cuda_graph: bool = Field(
        False,
        description='record the step once and replay it; wants mask.context "fixed" or "packed"',
    )
    target_stream: bool = Field(
        False, description="on a GPU: the target's forward beside the context encoder's"
    )
    max_bad_steps: Count = Field(10, description="skipped steps in a row before the run stops")
    on_spike: Literal["log", "skip", "rewind"] = Field(
        "log", description="of the loss or the gradient's norm: tell, skip the update, or go back"
    )
    spike_z: Positive = Field(8.0, description="standard deviations above the last 128 steps")
    timeout_s: NonNegative = Field(
        600, description="without progress before the run ends and says where it hangs; 0: never"
    )
    init_from: str | None = Field(None, description="an I-JEPA checkpoint to start from")


class DataSection(Section):
    path: str = Field("data/imagenet/train", description="folder, shards, or 'shapes'")
    image_size: Count = 224
    batch_size: Count = Field(2048, description="images a step, over all processes")
    micro_batch_size: Count = Field(128, description="most images a process takes at a time")
    crop_scale: tuple[Share, Share] = (0.3, 1.0)
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: bool = False
    colour: NonNegative = Field(0.0, description="strength of colour jitter")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    threads: Count = Field(4, description="decoding threads of a process")
    prefetch: Count = Field(2, description="batches made ahead")
    hw_decoder_load: Fraction = Field(0.65, description="share of the GPU's JPEG engines")
    decoder: Literal["auto", "dali", "pillow"] = later(
        "auto", was="auto", description="DALI where it works, else Pillow, on the CPU"
    )


class MaskSection(Section):
    sampler: Literal["uniform", "ijepa"] = "uniform"
    context: Literal["random", "prefix", "fixed", "packed"] = "random"
    targets: Count = 4
    target_scale: tuple[Share, Share] = (0.15, 0.2)
    target_aspect: tuple[Positive, Positive] = (0.75, 1.5)
    context_scale: tuple[Share, Share] = (0.85, 1.0)
    min_keep: Count = 10


class ModelSection(Section):
    name: Literal[MODEL_NAMES] = "vit_huge"  # type: ignore[valid-type]
    patch_size: Count = 14
    width: Count | None = Field(None, description="instead of the named model's")
    depth: Count | None = None
    heads: Count | None = None
    mlp_ratio: Positive | None = None
    attention: Literal[
        "auto", "plain", "sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn", "triton"
    ] = Field("auto", description="the fastest by trial on a GPU, plain on a CPU")
    fused: bool = Field(
        True,
        description="the blocks by our own kernels, on a GPU in bf16 without run.compile",
    )
    target_precision: Literal["bf16", "fp8"] = Field(
        "bf16", description="of the target's products; fp8 wants run.precision bf16 and sm_89"
    )
    residual: Literal["bf16", "fp32"] = Field(
        "bf16", description="dtype of the stream between the blocks, where run.precision is bf16"
    )
    checkpointing: Literal["none", "norm_gelu", "selective", "full"] = Field(
        "none", description="what is computed again in the backward, to save memory: see vit.Block"
    )


class PredictorSection(Section):
    width: Count = 384
    depth: Count = 12
    heads: Count | None = Field(None, description="null: the encoder's")
    mlp_ratio: Positive = 4.0
    mode: Literal["per_target", "one_pass"] = Field(
        "per_target", description='"one_pass" runs the context once an image: other maths'
    )


class VICRegSection(Section):
    beta: NonNegative = Field(0.001, description="0 is exactly I-JEPA")
    sim: NonNegative = 25.0
    std: NonNegative = 25.0
    cov: NonNegative = 1.0
    gamma: Positive = 1.0
    eps: Positive = 1e-4
    views: Literal["blocks", "context_target", "tokens"] = "blocks"
    projector: tuple[Count, ...] | None = None


class LossSection(Section):
    prediction: Literal["smooth_l1", "l2"] = "smooth_l1"
    vicreg: VICRegSection = VICRegSection()


class OptimSection(Section):
    implementation: Literal["auto", "adamw_ema", "fused", "apex", "deepspeed"] = Field(
        "auto", description="adamw_ema (weights and average in one pass) on one process, else fused"
    )
    lr: Positive = 1e-3
    start_lr: NonNegative = 1e-4
    final_lr: NonNegative = 1e-6
    warmup_epochs: NonNegative = 15
    weight_decay: NonNegative = 0.04
    final_weight_decay: NonNegative = 0.4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip: NonNegative = Field(0.0, description="largest gradient norm; 0: no clipping")
    momentum: Fraction = Field(0.996, description="of the target's average")
    final_momentum: Fraction = 1.0


class CheckpointSection(Section):
    every_steps: Whole = Field(1000, description="0: only at the end")
    every_minutes: NonNegative = Field(0, description="besides; 0: not by the clock")
    keep: Count = Field(2, description="of the newest")
    keep_every_epochs: Whole = Field(0, description="saved and kept for good besides; 0: none")


class TelemetrySection(Section):
    every_steps: Count = 20
    tensorboard: bool = True
    wandb: str | None = Field(None, description="a project of Weights & Biases; needs .[wandb]")
    rankme_floor: NonNegative = Field(2.0, description="of the target's features; below: warned of")
    feature_std_floor: NonNegative = Field(0.02, description="the same, of their mean std")


class OnlineSection(Section):
    data: str | None = Field(None, description="labelled images to judge by; null: none")
    test: str | None = Field(None, description="null: 20 % of data, by name")
    every_epochs: Count = 10
    share: Share = Field(0.01, description="of the run's time that it may take")
    max_train: Count = 4096
    max_test: Count = 1024
    pictures: Whole = Field(6, description="images that TensorBoard shows masks and features of")


class EvalSection(Section):
    crop: Share = Field(0.875, description="centre crop, as a share of the short side")
    k: Count = 20
    temperature: Positive = 0.07
    online: OnlineSection = OnlineSection()


class Config(Section):
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    mask: MaskSection = MaskSection()
    model: ModelSection = ModelSection()
    predictor: PredictorSection = PredictorSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    checkpoint: CheckpointSection = CheckpointSection()
    telemetry: TelemetrySection = TelemetrySection()
    eval: EvalSection = EvalSection()
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="passed to DeepSpeed")

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a file, with `key.path=value` overrides. Raises ConfigError."""
    values = _resolved(find(name))
    for override in overrides:
        _override(values, override)
    return validate(values, Path(name).stem)


def validate(values: dict, name: str = "run") -> Config:
    """Check a dict of sections; `name` fills {config} in run.dir. Raises ConfigError."""
    try:
        config = Config.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None
    problems = list(_impossible(config))
    if problems:
        raise ConfigError("\n".join(problems))
    run = config.run.model_copy(update={"dir": config.run.dir.replace("{config}", name)})
    return config.model_copy(update={"run": run})


def read(run: Path) -> Config:
    """The configuration a run was made with, from its folder. Raises ConfigError."""
    return validate(completed(json.loads((run / "config.json").read_text())))


def completed(saved: dict, section: type[Section] = Config) -> dict:
    """A saved configuration with the keys that came later, each at what the code did before."""
    values = dict(saved)
    for key, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            values[key] = completed(values.get(key, {}), inner)
        elif key not in values:
            values[key] = _was(field, field.get_default(call_default_factory=True))
    return values


def _was(field: FieldInfo, otherwise: Any) -> Any:
    extra = field.json_schema_extra
    return extra.get("was", otherwise) if isinstance(extra, dict) else otherwise


def as_begun(config: Config, saved: dict) -> Config:
    """The configuration of a resumed run; `saved`: the one of its checkpoint, completed.

    A key that the user has not set, and whose default is another than when the run began, keeps
    the value of then; and what "auto" became stays as it is.
    """
    values = _as_begun(config, saved)
    if config.run.precision == "auto":
        values["run"]["precision"] = saved["run"]["precision"]
    return Config.model_validate_json(json.dumps(values))


def _as_begun(section: Section, saved: dict) -> dict:
    values = section.model_dump(mode="json")
    for key, field in type(section).model_fields.items():
        inner, before = getattr(section, key), saved.get(key)
        if isinstance(inner, Section):
            values[key] = _as_begun(inner, before or {})
        elif key not in section.model_fields_set and before == _was(field, values[key]):
            values[key] = before
    return values


def find(name: str) -> Path:
    """The file itself, or the one of that name (".json" may be left out) in configs/."""
    shipped = configs_folder()
    for path in (Path(name), Path(f"{name}.json"), shipped / name, shipped / f"{name}.json"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.name for path in shipped.glob("*.json")))
    raise ConfigError(f"--config {name}: no such file here or in configs/, which has {names}")


def configs_folder() -> Path:
    """configs/ of the source tree, or of the installed package."""
    root = Path(__file__).resolve().parent.parent
    beside = root / "configs"
    own = (root / "setup.py").is_file()  # in site-packages a folder beside us is somebody else's
    return beside if own and beside.is_dir() else Path(str(resources.files("cjepa_fast.configs")))


def _resolved(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The file's values laid over those of the file it extends."""
    if path.resolve() in seen:
        raise ConfigError(f'{path}: "extends" goes in a circle')
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a JSON object of sections")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    beside = path.parent / str(parent)
    base = beside if beside.is_file() else find(str(parent))
    return _merged(_resolved(base, (*seen, path.resolve())), values)


def _merged(base: dict, over: dict) -> dict:
    both = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            both[key] = _merged(base[key], over[key])
    return both


def _override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text  # a bare word is a string
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {section} is a value, it has no key below it")
    values[last] = value


def _section_at(path: Sequence) -> type[Section] | None:
    model: Any = Config
    for part in path:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field else None
    return model if hasattr(model, "model_fields") else None


def _explain(error: dict) -> str:
    """One line for one of pydantic's errors."""
    path = [str(part) for part in error["loc"]]
    key, value = ".".join(path), json.dumps(error["input"])
    if error["type"] == "extra_forbidden":
        section = _section_at(path[:-1])
        valid = sorted(section.model_fields) if section else []
        near = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0.0)
        nearest = ".".join([*path[:-1], near[0]]) if near else ""
        return f"{key} = {value}: no such key; nearest is {nearest}; valid: {', '.join(valid)}"
    reason = error["msg"][0].lower() + error["msg"][1:]
    return f"{key} = {value}: {reason}{_nearest_word(error)}"


def _nearest_word(error: dict) -> str:
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    words = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
    near = difflib.get_close_matches(error["input"], words, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def _impossible(config: Config) -> Iterator[str]:
    """What no single key shows to be wrong."""
    data, mask, model, optim = config.data, config.mask, config.model, config.optim
    if data.image_size % model.patch_size:
        below = data.image_size - data.image_size % model.patch_size
        yield (
            f"data.image_size = {data.image_size}: must be a multiple of model.patch_size = "
            f"{model.patch_size}, such as {below or model.patch_size}"
        )
    patches = (data.image_size // model.patch_size) ** 2
    if mask.min_keep >= patches > 0:
        yield (
            f"mask.min_keep = {mask.min_keep}: the grid has only {patches} patches; "
            f"at most {patches - 1} can be kept beside a target"
        )
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
    if mask.context == "packed" and model.attention == "sdpa_cudnn":
        yield (
            'model.attention = "sdpa_cudnn": has no kernel for mask.context = "packed"; take '
            '"auto", "sdpa_flash" or "flash_attn", or another mask.context'
        )
    if optim.warmup_epochs > config.run.epochs:
        yield (
            f"optim.warmup_epochs = {optim.warmup_epochs:g}: longer than the run; "
            f"at most run.epochs = {config.run.epochs}"
        )
    if config.run.cuda_graph and mask.context not in ("fixed", "packed"):
        yield (
            f'run.cuda_graph = true: mask.context = "{mask.context}" changes the shapes; '
            'set mask.context to "fixed" or "packed"'
        )
    if model.target_precision == "fp8" and config.run.precision == "fp32":
        yield (
            'model.target_precision = "fp8": not with run.precision = "fp32"; set that to "bf16"'
        )
    if config.run.target_stream and config.run.compile == "whole":
        yield (
            'run.target_stream = true: not with run.compile = "whole", which leaves no place '
            'between predictor and loss to wait at; take "blocks" or "none"'
        )
    if config.predictor.mode == "one_pass" and mask.context == "packed":
        yield (
            'predictor.mode = "one_pass": not with mask.context = "packed", which cuts '
            'its sequences another way; take "fixed" or "random"'
        )
    yield from _impossible_sizes(config)
    yield from _impossible_deepspeed(config)


def _impossible_sizes(config: Config) -> Iterator[str]:
    given = {"model": ("width", "depth", "heads", "mlp_ratio"), "predictor": ("heads", "mlp_ratio")}
    for section, keys in given.items() if config.run.init_from else ():
        part = getattr(config, section)
        for key in keys:
            if getattr(part, key) != type(part).model_fields[key].default:
                yield (
                    f"{section}.{key} = {getattr(part, key)}: leave it out, since run.init_from "
                    "names an I-JEPA checkpoint, which has its own"
                )
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
        elif key == "fp16" and value.get("enabled") is True:
            yield "deepspeed.fp16.enabled = true: set run.precision (bf16 or fp32) instead"
    for key, (allowed, reason) in REFUSED_OF_DEEPSPEED.items():
        value = _at(config.deepspeed, key)
        if value not in allowed:
            yield f"deepspeed.{key} = {json.dumps(value)}: {reason}"


def _at(values: Any, path: str) -> Any:
    """The value at a dotted path, None where there is none."""
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def micro_batches(batch_size: int, world_size: int, limit: int) -> tuple[int, int]:
    """(images a process takes at a time, how many times a step): the fewest times within `limit`.

    Raises ConfigError where batch_size does not divide evenly.
    """
    if batch_size % world_size:
        raise ConfigError(
            f"data.batch_size = {batch_size}: must be a multiple of the {world_size} processes, "
            f"such as {max(1, batch_size // world_size) * world_size}"
        )
    share = batch_size // world_size
    times = next(n for n in range(-(-share // limit), share + 1) if share % n == 0)
    return share // times, times


def expanded(path: str) -> str:
    """A path with ~ and environment variables put in."""
    return os.path.expandvars(os.path.expanduser(path))
