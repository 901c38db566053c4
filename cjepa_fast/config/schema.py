"""The sections of a configuration: frozen, typed, each key with its default."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]

MODEL_NAMES = ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant")


class ConfigError(ValueError):
    """The message is for the user, whole: no traceback is needed."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def later(default: Any, *, was: Any, **described: Any) -> Any:
    """A field whose key, or whose default, came later than some saved run.

    was: what the code did before: a run that lacks the key did that, and one that has it by an
    earlier default keeps it. See load.as_begun.
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
