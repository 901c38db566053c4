"""Keys that follow from others: the learning rate from the batch, epochs from the images."""

import json
import math
from typing import Any

from cjepa_fast.config.schema import Config, ConfigError, fitting_batch

RATE_IMAGES = 256  # that optim.lr_per_256 is for
# run.epochs "auto": a judgement. The small configurations take 6,200 to 7,200 steps; recipes for
# ViTs seldom go beyond 800 epochs (MAE's longest is 1,600).
AUTO_STEPS, LEAST_EPOCHS, MOST_EPOCHS = 10_000, 20, 800
RIVALS = ("lr", "lr_per_256")  # keys of optim of which the later one counts


def with_rate(config: Config) -> Config:
    """optim.lr by optim.lr_per_256 and the batch, where that is given. Raises ConfigError where
    both are and say otherwise, and where the warm-up would begin above it."""
    optim, batch = config.optim, config.data.batch_size
    if optim.lr_per_256 is None:
        return config
    rate = optim.lr_per_256 * (batch / RATE_IMAGES)
    if "lr" in optim.model_fields_set and not math.isclose(optim.lr, rate, rel_tol=1e-9):
        raise ConfigError(
            f"optim.lr = {optim.lr:g}: optim.lr_per_256 = {optim.lr_per_256:g} and "
            f"data.batch_size = {batch} make it {rate:g}; give one of the two keys"
        )
    if optim.start_lr > rate:
        raise ConfigError(
            f"optim.start_lr = {optim.start_lr:g}: above the learning rate of {rate:g} that "
            f"optim.lr_per_256 = {optim.lr_per_256:g} makes for data.batch_size = {batch}; set it "
            f"to {rate / 10:g}"
        )
    return config.model_copy(update={"optim": optim.model_copy(update={"lr": rate})})


def lr_message(config: Config) -> str | None:
    """For the start of a training; None where the rate was given as it is."""
    optim = config.optim
    if optim.lr_per_256 is None:
        return None
    return (
        f"optim.lr {optim.lr:g}: optim.lr_per_256 {optim.lr_per_256:g} for a batch of "
        f"{config.data.batch_size}"
    )


def warmup_message(config: Config) -> str | None:
    """A warning where the warm-up goes down."""
    optim = config.optim
    if optim.start_lr <= optim.lr or not optim.warmup_epochs:
        return None
    return (
        f"WARNING: optim.start_lr = {optim.start_lr:g} is above optim.lr = {optim.lr:g}: the "
        "learning rate falls in the warm-up"
    )


def micro_batch_message(config: Config, world_size: int) -> str | None:
    """A warning where the ranks' shares of the batch divide into far smaller micro-batches than
    they may be: a step is slow then, and the regulariser's statistics are of few images."""
    data = config.data
    images, times = data.micro_batches(world_size)
    limit = min(data.micro_batch_size, images * times)
    if 2 * images >= limit:
        return None
    fitting = fitting_batch(data.batch_size, world_size, limit)
    return (
        f"WARNING: micro-batches of {images}: the {images * times} images a rank takes of "
        f"data.batch_size = {data.batch_size} divide into no larger ones of at most {limit}; "
        f"data.batch_size={fitting} gives {limit}"
    )


def with_epochs(config: Config, steps_per_epoch: int) -> Config:
    """run.epochs "auto" resolved. Raises ConfigError where the warm-up is longer."""
    if config.run.epochs != "auto":
        return config
    epochs = auto_epochs(steps_per_epoch)
    if config.optim.warmup_epochs > epochs:
        raise ConfigError(
            f"optim.warmup_epochs = {config.optim.warmup_epochs:g}: longer than the {epochs} "
            'epochs that run.epochs = "auto" makes here; set it lower, or run.epochs'
        )
    return config.model_copy(update={"run": config.run.model_copy(update={"epochs": epochs})})


def auto_epochs(steps_per_epoch: int) -> int:
    """The fewest that make AUTO_STEPS, from LEAST_EPOCHS to MOST_EPOCHS."""
    return min(max(math.ceil(AUTO_STEPS / steps_per_epoch), LEAST_EPOCHS), MOST_EPOCHS)


def epochs_message(epochs: int, steps_per_epoch: int) -> str:
    """A line that says what run.epochs "auto" became."""
    return f"run.epochs {epochs}: auto, {epochs * steps_per_epoch:,} steps"


def without_rival(values: dict, over: Any) -> dict:
    """A file's values, without the one of RIVALS that what is laid over them replaces."""
    given = over.get("optim") if isinstance(over, dict) else None
    if not isinstance(given, dict) or not isinstance(values.get("optim"), dict):
        return values
    named = [key for key in RIVALS if given.get(key) is not None]
    if len(named) != 1:
        return values
    kept = {key: value for key, value in values["optim"].items() if key not in RIVALS}
    return {**values, "optim": kept}


def refuse_both(given: dict) -> None:
    """Raises ConfigError where one command line, or one call, names both of RIVALS."""
    optim = given.get("optim")
    if isinstance(optim, dict) and all(optim.get(key) is not None for key in RIVALS):
        listed = " and ".join(f"optim.{key} = {json.dumps(optim[key])}" for key in RIVALS)
        raise ConfigError(f"{listed}: give one of the two keys")
