"""From the configuration to the parts: networks, engine, masks, loader."""

import json
import socket
from pathlib import Path

import torch

from cjepa_fast import config as configuration
from cjepa_fast.config import Config, ConfigError
from cjepa_fast.data import sources
from cjepa_fast.data.loader import BatchSplit, Loader
from cjepa_fast.data.masks import Masks, MaskSampler
from cjepa_fast.kernels.common.ranks import Ranks
from cjepa_fast.kernels.norm import WIDEST
from cjepa_fast.model import fp8
from cjepa_fast.model.jepa import JEPA
from cjepa_fast.model.loss import CJEPALoss, build_projector
from cjepa_fast.model.predictor import Predictor
from cjepa_fast.model.sigreg import SIGReg
from cjepa_fast.model.vit import Encoder, initialisation
from cjepa_fast.runtime import distributed, hardware
from cjepa_fast.runtime.image_size import patch_grid
from cjepa_fast.runtime.printable import say
from cjepa_fast.training.engines.base import DTYPES
from cjepa_fast.training.engines.single import SingleEngine
from cjepa_fast.training.engines.zero import ZeroEngine
from cjepa_fast.training.optim import parameter_groups
from cjepa_fast.training.sizes import model_sizes


def build_networks(config: Config, ranks: Ranks | None = None) -> JEPA:
    """Context encoder, predictor, projector and loss, freshly initialised in fp32."""
    model, part = model_sizes(config), config.predictor
    options = config.model.model_dump(include={"attention", "residual", "checkpointing", "gelu"})
    check_heads("model", model["width"], model["heads"])
    check_heads("predictor", part.width, part.heads or model["heads"])
    options["init"] = initialisation(config.model.init, model["width"])
    encoder = Encoder(
        config.data.image_size,
        config.model.patch_size,
        channels=config.data.channels,
        learned_positions=config.model.positions == "learned",
        **model,
        **options,
    )
    encoder.mean, encoder.std = config.data.mean, config.data.std
    predictor = Predictor(
        encoder.width,
        encoder.grid,
        part.width,
        part.depth,
        part.heads or encoder.heads,
        part.mlp_ratio,
        mode=part.mode,
        **options,
    )
    projector = build_projector(encoder.width, projector_widths(config), ranks)
    return JEPA(encoder, predictor, build_loss(config, ranks), projector)


def projector_widths(config: Config) -> tuple[int, ...] | None:
    """None too where nothing would train it."""
    own = config.loss.active_regulariser
    return own.projector if own.beta else None


def regularised_width(config: Config) -> int:
    """D of the rows that the regulariser sees."""
    return (projector_widths(config) or (model_sizes(config)["width"],))[-1]


def build_loss(config: Config, ranks: Ranks | None) -> CJEPALoss:
    own = config.loss
    sigreg = None
    if own.regulariser == "sigreg":
        sigreg = SIGReg(**own.sigreg.model_dump(exclude={"projector", "directions"}), ranks=ranks)
    return CJEPALoss(
        prediction=own.prediction,
        weight=own.prediction_weight,
        sigreg=sigreg,
        ranks=ranks,
        **own.vicreg.model_dump(exclude={"projector"}),
    )


def build_engine(
    networks: JEPA, target: Encoder, config: Config, micro_batch: int, accumulation: int
) -> ZeroEngine | SingleEngine:
    """By optim.implementation; networks and target, in fp32 and on the device, become its own."""
    optim = config.optim
    options = {
        "accumulation": accumulation,
        "precision": config.run.precision,
        "clip": optim.clip,
        "betas": optim.betas,
        "eps": optim.eps,
        "fp8": config.model.target_precision == "fp8",
    }
    groups = parameter_groups(networks)
    implementation = optimizer_implementation(config)
    if config.run.weight_stream:
        check_weight_stream(config, implementation, next(networks.parameters()).device)
    if implementation == "adamw_ema":
        options["weight_stream"] = config.run.weight_stream
        return SingleEngine(networks, target, groups, **options)
    return ZeroEngine(
        networks,
        target,
        groups,
        config.deepspeed,
        micro_batch=micro_batch,
        implementation=implementation,
        **options,
    )


def optimizer_implementation(config: Config) -> str:
    """ "auto" resolved. Raises ConfigError for "adamw_ema" on several ranks or with DeepSpeed
    settings, which it does not read (but for a ZeRO stage: one rank has nothing to shard)."""
    asked, alone = config.optim.implementation, distributed.world_size() == 1
    zero = config.deepspeed.get("zero_optimization", {})
    own = set(config.deepspeed) <= {"zero_optimization"} and set(zero) <= {"stage"}
    if asked == "auto":
        return "adamw_ema" if alone and own else "fused"
    if asked == "adamw_ema" and not (alone and own):
        reason = (
            f"the deepspeed section holds more than a ZeRO stage: {json.dumps(config.deepspeed)}"
            if alone
            else f"there are {distributed.world_size()} ranks"
        )
        raise ConfigError(
            f'optim.implementation = "adamw_ema": it trains on one rank without DeepSpeed, but '
            f'{reason}. Take "auto" or "fused"'
        )
    return asked


def check_weight_stream(config: Config, implementation: str, device: torch.device) -> None:
    """Raises ConfigError where run.weight_stream would give wrong gradients, or do nothing."""
    if implementation != "adamw_ema":
        raise ConfigError(
            "run.weight_stream = true: DeepSpeed reads gradients before the backward ends; take "
            'optim.implementation = "adamw_ema", on one rank, or leave it out'
        )
    widths = model_sizes(config)["width"], config.predictor.width
    fused = config.run.precision == "bf16" and any(fuses(config, width) for width in widths)
    if device.type == "cuda" and not fused:
        raise ConfigError(
            "run.weight_stream = true: only fused blocks use it (model.fused), and here none is: "
            f'run.precision is "{config.run.precision}" and must be "bf16", the widths are '
            f"{widths[0]} and {widths[1]}, of which one must be at most {WIDEST}; leave it out"
        )


def compile_networks(networks: JEPA, target: Encoder, how: str, backend: str = "inductor") -> None:
    """torch.compile, in place: of each block, or of the target encoder and of the rest "whole".

    Whole networks fuse across blocks, take longer to compile, and are compiled anew for a few of
    the lengths that the masks draw: mask.context "fixed" and "packed" have but one.
    """
    if how == "whole":
        parts = [target, networks]
    else:
        parts = [*target.blocks, *networks.encoder.blocks, *networks.predictor.predictor_blocks]
    for part in parts if how != "none" else []:
        part.compile(backend=backend)


def fuses(config: Config, width: int) -> bool:
    """Whether the blocks of a network of that width may run by our kernels."""
    return config.model.fused and config.run.compile == "none" and width <= WIDEST


def fuse_networks(networks: JEPA, target: Encoder, config: Config, stage: int) -> None:
    """Let the blocks run by our kernels (Block.fused), by model.fused, where nothing forbids it.

    That is a compiler, which makes its own, ZeRO stage 3, which gathers weights from module to
    module, and rows wider than the kernels hold. On a CPU and in fp32 they run as they are all the
    same.
    """
    if stage == 3:
        return
    networks.encoder.fused = target.fused = fuses(config, target.width)
    networks.predictor.fused = fuses(config, config.predictor.width)


def check_fp8(config: Config, device: torch.device) -> None:
    """Raises ConfigError where an encoder is to compute in FP8 and cannot."""
    keys = [f"model.{part}_precision" for part in ("target", "context")
            if getattr(config.model, f"{part}_precision") == "fp8"]  # fmt: skip
    if not keys:
        return
    asked = f'{" and ".join(keys)} = "fp8"'
    sizes = model_sizes(config)
    hidden = round(sizes["width"] * sizes["mlp_ratio"])
    for key, value in (("width", sizes["width"]), ("width * mlp_ratio", hidden)):
        if value % fp8.MULTIPLE:
            raise ConfigError(
                f"model.{key} = {value}: must be a multiple of {fp8.MULTIPLE} for {asked}"
            )
    if config.run.precision != "bf16":
        reason = hardware.best_precision(device).reason
        raise ConfigError(
            f'{asked}: wants run.precision = "bf16", which is '
            f'"{config.run.precision}" here ({reason}); set run.precision=bf16, or take "bf16"'
        )
    try:
        fp8.check_device(device)
    except ValueError as error:
        raise ConfigError(f'{asked}: {error}; take "bf16"') from None


def check_heads(section: str, width: int, heads: int) -> None:
    """Check sizes that the model's name decides; config/checks.py has checked those of the file."""
    if width % heads:
        raise ConfigError(f"{section}.width = {width}: must be a multiple of the {heads} heads")


def compute_dtype(config: Config) -> torch.dtype:
    """The dtype of the computation; run.precision is no longer "auto"."""
    return DTYPES[config.run.precision]


def with_precision(config: Config, device: torch.device) -> Config:
    """The configuration with run.precision "auto" resolved, the same on all ranks: fp32 if any
    rank's device is better at fp32, else bf16."""
    if config.run.precision != "auto":
        return config
    best = distributed.all_gather_objects(hardware.best_precision(device).precision)
    precision = min(best, key=hardware.PRECISIONS.index)
    run = config.run.model_copy(update={"precision": precision})
    return config.model_copy(update={"run": run})


def build_masks(config: Config) -> MaskSampler:
    """Raises ConfigError for settings that leave a block empty or can never keep min_keep."""
    grid = patch_grid(config.data.image_size, config.model.patch_size)
    try:
        return MaskSampler(grid=grid, seed=config.run.seed, **config.mask.model_dump())
    except ValueError as error:
        raise ConfigError(f"mask.{error}") from None


def first_masks(config: Config, images: int) -> Masks:
    """Those that a run draws for its first images: their sizes are like any others'."""
    return build_masks(config)(0, 0, torch.arange(images))


def meta_directions(config: Config) -> tuple[torch.Tensor, ...]:
    """What `Trainer.drawn` returns, without values: SIGReg's directions (D, K), or nothing."""
    loss = config.loss
    if loss.regulariser != "sigreg":
        return ()
    return (torch.empty(regularised_width(config), loss.sigreg.directions, device="meta"),)


def check_same_images(paths: list[str], images: sources.ImageSet) -> None:
    """Raises ConfigError where this rank's image set is not the first's, on another node, or
    other files of it are usable there."""
    host = socket.gethostname()
    own = images.fingerprint, images.usable_fingerprint, f"{len(images):,} images on {host}"
    found = distributed.all_gather_objects(own)
    first, first_usable, first_where = found[0]
    for fingerprint, usable, where in found:
        if fingerprint != first:
            raise ConfigError(
                f"data.path = {' and '.join(paths)}: the nodes see different image sets: "
                f"{first_where}, {where}; give all nodes the same files, by a shared folder or "
                "copies"
            )
        if usable != first_usable:
            raise ConfigError(
                f"data.path = {' and '.join(paths)}: the files have the same names and sizes there "
                f"as here, but other ones are usable: {first_where}, {where}; --dry-run on "
                "each node names what is left out there, such as a corrupt copy"
            )


def build_loader(
    config: Config, device: torch.device, masks: MaskSampler, left_out: Path | None = None
) -> Loader:
    """left_out: the file that will name the images that are not used; None: one in the cache."""
    data, paths = config.data, configuration.image_paths(config.data)
    first = distributed.rank() == 0
    images = distributed.local_rank_0_first(
        lambda: sources.open_images(
            paths[0] if len(paths) == 1 else paths,
            limits=sources.Limits.of(data),
            report=left_out if first else None,
            log=say if first else lambda line: None,
        )
    )
    check_same_images(paths, images)
    world_size = distributed.world_size()
    micro_batch, _ = data.micro_batches(world_size)
    return Loader(
        images,
        data,
        BatchSplit(data.batch_size, micro_batch, distributed.rank(), world_size),
        seed=config.run.seed,
        device=device,
        dtype=compute_dtype(config),
        masks=masks,
    )
