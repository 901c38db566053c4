"""The sections of a configuration: frozen, typed, each key with its default."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from cjepa_fast.runtime.image_size import simplest

# Every number has bounds: beyond them it is a slip, and would fail later, with other words.
MOST = 1e12  # of a weight, a rate, a factor
Positive = Annotated[float, Field(gt=0, le=MOST)]
NonNegative = Annotated[float, Field(ge=0, le=MOST)]
Seconds = Annotated[float, Field(ge=0, le=1e7)]  # 115 days
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Whole = Annotated[int, Field(ge=0, le=10**9)]
Side = Annotated[int, Field(ge=1, le=2**14)]  # of an image or a patch, in pixels
ImageSides = Annotated[  # of a square, or height and width; told apart, so that an error is of one
    Annotated[Side, Tag("side")] | Annotated[tuple[Side, Side], Tag("height, width")],
    Discriminator(lambda size: "height, width" if isinstance(size, (list, tuple)) else "side"),
    AfterValidator(simplest),
]
Epochs = Annotated[  # told apart as above
    Annotated[Count, Tag("epochs-number")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(lambda epochs: "word" if isinstance(epochs, str) else "epochs-number"),
]
Width = Annotated[int, Field(ge=1, le=2**16)]  # of tokens or layers
Few = Annotated[int, Field(ge=1, le=1024)]  # blocks, heads, threads, batches ahead
Level = Annotated[float, Field(ge=-1e6, le=1e6)]  # of an image's values

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
    earlier default keeps it. See load.keep_saved_values.
    """
    return Field(default, json_schema_extra={"was": was}, **described)


def micro_batches(batch_size: int, world_size: int, limit: int) -> tuple[int, int]:
    """(images a rank takes at a time, how many times a step): the fewest times within `limit`.

    Raises ConfigError where batch_size does not divide evenly.
    """
    if batch_size % world_size:
        near = fitting_batch(batch_size, world_size, limit)
        raise ConfigError(
            f"data.batch_size = {batch_size}: must be a multiple of the {world_size} ranks, "
            f"such as {near}"
        )
    share = batch_size // world_size
    times = next(n for n in range(-(-share // limit), share + 1) if share % n == 0)
    return share // times, times


def fitting_batch(batch_size: int, world_size: int, limit: int) -> int:
    """The nearest batch size that ranks take in whole micro-batches of `limit`, or in one smaller
    one."""
    step = world_size * min(limit, max(1, batch_size // world_size))
    return max(1, round(batch_size / step)) * step


class RunSection(Section):
    dir: str = Field("runs/{config}", description="folder of the run; {config} is the file's name")
    seed: Seed = Field(
        0, description="decides every draw: weights, order of the images, crops, masks"
    )
    epochs: Epochs = Field(
        300, description="passes over the images; auto: by their number, for small sets"
    )
    precision: Literal["auto", "bf16", "fp32"] = later(
        "auto", was="bf16", description="auto: bf16 where the hardware multiplies it, else fp32"
    )
    compile: Literal["none", "blocks", "whole"] = Field(
        "none",
        description='torch.compile; "whole" does so anew for some lengths, of which mask.context '
        '"fixed" and "packed" have one',
    )
    cuda_graph: bool = Field(
        False,
        description='record the step once, replay it; needs mask.context "fixed" or "packed"',
    )
    target_stream: bool = Field(
        False, description="target encoder's forward on a CUDA stream of its own"
    )
    weight_stream: bool = later(
        False, was=False, description="gradients of fused blocks' weights on a second CUDA stream"
    )
    dependent_launch: bool = later(
        False,
        was=False,
        description="our kernels begin while the one before ends; GPUs of sm_90 and newer alone",
    )
    max_bad_steps: Count = Field(10, description="skipped steps in a row before the run stops")
    on_spike: Literal["log", "skip", "rewind"] = Field(
        "log",
        description="on a spike of loss or gradient norm: log it, skip the update, or rewind",
    )
    spike_z: Positive = Field(
        8.0, description="a spike is this many standard deviations above the last 128 steps"
    )
    timeout_s: Seconds = Field(
        600, description="seconds without progress until the run ends and says where; 0: never"
    )
    init_from: str | None = Field(
        None, description="weights to start from: I-JEPA's, another ViT's, or a run's"
    )


class DataSection(Section):
    path: str | tuple[str, ...] = Field(
        "data/imagenet/train", description="folder, shards, list of images, 'shapes', or several"
    )
    max_pixels: Count = later(
        89_478_485, was=178_956_970, description="larger images are left out, and named"
    )
    min_jpeg: Fraction = later(
        0.9, was=1.0, description="a JPEG that was cut short is used if this share of it is there"
    )
    min_shown: Fraction = later(
        0.9, was=0.0, description="of a JPEG whose pixels end early, crops with less are replaced"
    )
    bit_depth: Annotated[int, Field(ge=9, le=16)] | None = later(
        None,
        was=None,
        description="bits in use of images with more than 8 a channel; null: all",
    )
    max_skipped: Fraction = later(
        0.05, was=1.0, description="share of the images that may turn out unreadable until it stops"
    )
    image_size: ImageSides = Field(
        224, description="pixels that the networks see: a square's side, or [height, width]"
    )
    batch_size: Count = Field(2048, description="images per step, over all ranks")
    micro_batch_size: Count = Field(128, description="most images a rank takes at once")
    crop_scale: tuple[Share, Share] = Field(
        (0.3, 1.0), description="least and most share of the image's area in a crop"
    )
    crop_ratio: tuple[Positive, Positive] = Field(
        (3 / 4, 4 / 3),
        description="least and most width over height of a crop, times those of image_size",
    )
    flip: bool = Field(False, description="mirror half of the crops")
    colour: NonNegative = Field(0.0, description="strength of colour jitter")
    channels: Few = later(
        3,
        was=3,
        description="of every image: 1 gray, 2 with alpha, 3 RGB, 4 RGBA, or so many bands",
    )
    mean: tuple[Level, ...] = Field(
        (0.485, 0.456, 0.406), description="mean of each channel in 0..1, which is subtracted"
    )
    std: tuple[Positive, ...] = Field(
        (0.229, 0.224, 0.225), description="standard deviation of each channel in 0..1, divided by"
    )
    threads: Few = Field(4, description="decoding threads per rank")
    readers: Few = later(
        4, was=4, description="threads per rank that read files: more on a network disk"
    )
    prefetch: Few = Field(2, description="batches prepared ahead")
    hw_decoder_load: Fraction = Field(
        0.65, description="share of JPEG data that the GPU's JPEG engines decode"
    )
    decoder: Literal["auto", "dali", "pillow"] = later(
        "auto", was="auto", description="DALI where it works, else Pillow, on the CPU"
    )

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """(images a rank takes at a time, how many times a step). Raises as `micro_batches`."""
        return micro_batches(self.batch_size, world_size, self.micro_batch_size)


class MaskSection(Section):
    sampler: Literal["uniform", "ijepa"] = Field(
        "uniform", description='draws of block sizes; "ijepa": one number for scale and aspect'
    )
    context: Literal["random", "prefix", "fixed", "packed"] = Field(
        "random", description="how contexts of different sizes make a batch: see configs/README.md"
    )
    targets: Few = Field(4, description="target blocks per image")
    target_scale: tuple[Share, Share] = Field(
        (0.15, 0.2), description="least and most share of the patches in a target block"
    )
    target_aspect: tuple[Positive, Positive] = Field(
        (0.75, 1.5), description="least and most height over width of a target block"
    )
    context_scale: tuple[Share, Share] = Field(
        (0.85, 1.0), description="least and most share of the patches in the context block"
    )
    min_keep: Count = Field(10, description="fewest context patches left beside the targets")
    keep: Count | None = later(
        None, was=None,
        description='context patches that "fixed" keeps; null: as many as nine images in ten have',
    )  # fmt: skip


class ModelSection(Section):
    name: Literal[MODEL_NAMES] = Field(
        "vit_huge", description="width, depth and heads of the encoder"
    )  # type: ignore[valid-type]
    patch_size: Side = Field(14, description="side of a patch, in pixels")
    width: Width | None = Field(None, description="instead of the named model's")
    depth: Few | None = Field(None, description="instead of the named model's")
    heads: Few | None = Field(None, description="instead of the named model's")
    mlp_ratio: Positive | None = Field(None, description="instead of the named model's")
    init: Literal["auto", "ijepa", "xavier"] = later(
        "auto", was="ijepa", description="initial weights; auto: xavier below width 384, else ijepa"
    )
    positions: Literal["sincos", "learned"] = later(
        "sincos", was="sincos", description="fixed, or trained from there or from run.init_from's"
    )
    gelu: Literal["exact", "tanh"] = later(
        "exact",
        was="exact",
        description="\"tanh\": torch's approximation, which a GPU's matmuls compute on their way",
    )
    attention: Literal[
        "auto", "plain", "sdpa", "sdpa_flash", "sdpa_cudnn", "flash_attn", "triton"
    ] = Field("auto", description="auto: the fastest by trial on a GPU, plain on a CPU")
    fused: bool = Field(
        True,
        description="blocks use our own kernels, on a GPU in bf16 without run.compile",
    )
    target_precision: Literal["bf16", "fp8"] = Field(
        "bf16", description="target encoder's matmuls; fp8 needs run.precision bf16 and sm_89"
    )
    context_precision: Literal["bf16", "fp8"] = later(
        "bf16",
        was="bf16",
        description="context encoder's matmuls but for weights' gradients; fp8 as the target's",
    )
    residual: Literal["bf16", "fp32"] = Field(
        "bf16", description="dtype of the residual stream, where run.precision is bf16"
    )
    checkpointing: Literal["none", "norm_gelu", "selective", "full"] = Field(
        "none",
        description="what is recomputed in the backward, to save memory: see configs/README.md",
    )


class PredictorSection(Section):
    width: Width = Field(384, description="width of the predictor's tokens")
    depth: Few = Field(12, description="number of blocks")
    heads: Few | None = Field(None, description="null: the encoder's")
    mlp_ratio: Positive = Field(4.0, description="width of the MLP over predictor.width")
    mode: Literal["per_target", "one_pass"] = Field(
        "per_target", description='"one_pass" runs the context once per image: other maths'
    )


class VICRegSection(Section):
    beta: NonNegative = Field(0.001, description="0 is exactly I-JEPA")
    sim: NonNegative = Field(25.0, description="weight of the invariance term")
    std: NonNegative = Field(25.0, description="weight of the variance term")
    cov: NonNegative = Field(1.0, description="weight of the covariance term")
    gamma: Positive = Field(1.0, description="standard deviation that the variance term aims at")
    eps: Positive = Field(1e-4, description="added to a variance before its root")
    views: Literal["blocks", "context_target", "tokens", "positions"] = Field(
        "blocks", description="what the terms see: VICReg in docs/choosing_a_config.md has each"
    )
    positions_weight: NonNegative = later(
        0.0,
        was=0.0,
        description="of variance and covariance at each position, beside those of views",
    )
    projector: tuple[Width, ...] | None = Field(
        None, description="widths of an expander before the terms; null: none"
    )


class SIGRegSection(Section):
    beta: NonNegative = later(
        0.02, was=0.02, description="weight of the statistic; 0 is exactly I-JEPA"
    )
    views: Literal["blocks", "context_target", "tokens", "positions"] = later(
        "context_target",
        was="context_target",
        description="what it sees, as vicreg.views: see docs/choosing_a_config.md",
    )
    directions: Width = later(
        256, was=256, description="random directions, drawn anew for each step"
    )
    knots: Annotated[int, Field(ge=2, le=1024)] = later(
        17, was=17, description="points of the integral on [0, t_max]"
    )
    t_max: Positive = later(3.0, was=3.0, description="where the integral ends")
    projector: tuple[Width, ...] | None = later(
        None, was=None, description="widths of an expander before the statistic; null: none"
    )


class LossSection(Section):
    prediction: Literal["smooth_l1", "l2"] = Field(
        "smooth_l1", description='"smooth_l1" as in I-JEPA\'s code, "l2" as in the papers'
    )
    prediction_weight: NonNegative = later(
        1.0, was=1.0, description="of the prediction error; 0: regulariser alone, no longer C-JEPA"
    )
    regulariser: Literal["vicreg", "sigreg"] = later(
        "vicreg",
        was="vicreg",
        description="which of the two sections counts; the other's keys are not read",
    )
    vicreg: VICRegSection = VICRegSection()
    sigreg: SIGRegSection = SIGRegSection()

    def smallest_micro_batch(self, world_size: int) -> int:
        """Images a rank: a regulariser's statistic is of 2 or more, over all ranks."""
        return 2 if self.active_regulariser.beta > 0 and world_size == 1 else 1

    @property
    def active_regulariser(self) -> VICRegSection | SIGRegSection:
        """The section that `regulariser` names."""
        return self.sigreg if self.regulariser == "sigreg" else self.vicreg


class OptimSection(Section):
    implementation: Literal["auto", "adamw_ema", "fused", "apex", "deepspeed"] = Field(
        "auto", description="auto: adamw_ema (weights and EMA in one pass) on one rank, else fused"
    )
    lr: Positive = Field(1e-3, description="learning rate after warm-up, for the whole batch")
    lr_per_256: Positive | None = later(
        None, was=None, description="in place of lr: lr is this times data.batch_size / 256"
    )
    start_lr: NonNegative = Field(
        1e-4, description="learning rate where the warm-up begins, one step before the first"
    )
    final_lr: NonNegative = Field(1e-6, description="learning rate at the end of the cosine")
    warmup_epochs: NonNegative = Field(15, description="epochs of linear warm-up")
    weight_decay: NonNegative = Field(
        0.04, description="weight decay at the start; only of matrices"
    )
    final_weight_decay: NonNegative = Field(
        0.4, description="weight decay at the end of its cosine"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's")
    eps: Positive = Field(1e-8, description="AdamW's")
    clip: NonNegative = Field(0.0, description="largest gradient norm; 0: no clipping")
    momentum: Fraction = Field(0.996, description="momentum of the target's EMA at the start")
    final_momentum: Fraction = Field(1.0, description="momentum at the end; it rises linearly")


class CheckpointSection(Section):
    every_steps: Whole = Field(1000, description="steps between checkpoints; 0: only at the end")
    every_minutes: Seconds = Field(0, description="also save this often; 0: never")
    keep: Count = Field(2, description="how many of the newest checkpoints are kept")
    keep_every_epochs: Whole = Field(0, description="also keep one for good this often; 0: none")


class TelemetrySection(Section):
    every_steps: Count = Field(20, description="steps between rows of the log")
    tensorboard: bool = Field(True, description="write TensorBoard's event files")
    wandb: str | None = Field(None, description="project of Weights & Biases; needs .[wandb]")
    mlflow: str | None = later(
        None, was=None, description="experiment of MLflow; needs .[mlflow] and MLFLOW_TRACKING_URI"
    )
    rankme_floor: NonNegative = Field(
        2.0, description="warn where RankMe of the target's features is lower"
    )
    feature_std_floor: NonNegative = Field(0.02, description="warn where their mean std is lower")


class OnlineSection(Section):
    data: str | None = Field(None, description="labelled images to evaluate on; null: none")
    test: str | None = Field(
        None,
        description="labelled images to test on; null: val/ beside train/ in online.data, "
        "else 20 % of it, by name",
    )
    labels: str | None = later(
        None, was=None, description="file with the labels of online.data, a line an image"
    )
    test_labels: str | None = later(None, was=None, description="the same of online.test")
    every_epochs: Count = Field(10, description="epochs between evaluations")
    share: Share = Field(0.01, description="share of the run's time that evaluations may take")
    max_train: Count = Field(4096, description="images to fit on")
    max_test: Count = Field(1024, description="images to score")
    pictures: Whole = Field(6, description="images that TensorBoard shows masks and features of")
    probes: tuple[str, ...] = later(
        (), was=[], description='own ones, "module:function": see docs/python.md'
    )


class EvalSection(Section):
    crop: Share = Field(
        0.875, description="centre crop, as a share of the largest of image_size's shape"
    )
    k: Count = Field(20, description="neighbours of kNN")
    temperature: Positive = Field(0.07, description="temperature of kNN's votes")
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
