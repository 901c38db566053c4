"""A checkpoint put back in place, and what differs from the training that wrote it."""

from pathlib import Path

from cjepa_fast.checkpoint.format import StoredCheckpoint
from cjepa_fast.checkpoint.owned import SavedEngine


def restore(path: Path, engine: SavedEngine) -> dict:
    """Put a checkpoint's state in place and return its state.json.

    Raises ValueError naming the first parameter that is missing or of another size.
    """
    stored = StoredCheckpoint(path)
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
    return stored.state


# Of these another value changes no number of the training but its rounding.
HARMLESS = (
    "linear",
    "decoder",  # what data.decoder "auto" came to
    "attention",  # and model.attention
    *(f"config.{key}" for key in (
        *("checkpoint", "deepspeed", "eval", "telemetry", "data.path", "data.threads"),
        "data.readers",
        *("data.max_skipped", "data.max_pixels", "data.min_jpeg"),
        *("data.prefetch", "data.hw_decoder_load", "data.micro_batch_size", "model.attention"),
        *("model.checkpointing", "model.fused", "optim.implementation", "run.dir", "run.init_from"),
        *("run.compile", "run.cuda_graph", "run.target_stream", "run.weight_stream"),
        "run.dependent_launch",
        *("run.max_bad_steps", "run.on_spike", "run.spike_z", "run.timeout_s", "data.decoder"),
    )),
)  # fmt: skip
# Of the image set: a hash of its files, one of those that are usable, and the number of these.
OF_IMAGES = ("images", "usable_images", "image_count")


def differences(saved: dict, facts: dict) -> tuple[list[str], list[str]]:
    """ "KEY: X, saved with Y" for each fact that is not as a checkpoint's state.json has it.

    Those that change nothing but rounding, and those that make it another training.
    """
    old, new = flat(saved), flat(facts)
    changed = {key: value for key, value in new.items() if value != old.get(key)}
    # What an earlier version did not save is not another: it had "images" alone, then a count too.
    saved_keys = [key for key in OF_IMAGES if key == "images" or old.get(key) is not None]
    told_by = next((key for key in saved_keys if key in changed), None)
    for key in (*OF_IMAGES, *["config.data.path"] * bool(told_by)):
        if key != told_by:  # one line tells of all of them, with the path
            changed.pop(key, None)
    lines: tuple[list[str], list[str]] = [], []
    for key, value in changed.items():
        told = f"{key.removeprefix('config.')}: {value}, saved with {old.get(key)}"
        if key in OF_IMAGES:
            told = f"data.path: {_images_of(new)}, saved with {_images_of(old)}"
            if key != "images":
                told += "; the files are the same in name and size, but other ones are usable"
            elif new.get("image_count") == old.get("image_count"):
                told += "; their names or files differ"
        lines[not key.startswith(HARMLESS)].append(told)
    return lines


def _images_of(facts: dict) -> str:
    """In words, of flat facts; earlier versions' have no count."""
    path, count = facts.get("config.data.path"), facts.get("image_count")
    of = "" if count is None else f"{count:,} "
    return f"{of}images in {path if isinstance(path, str) else ' and '.join(path or ['?'])}"


def deciding(config: dict) -> dict:
    """The values of a configuration (as JSON) that decide the training beside its seed, by dotted
    key."""
    also = ("config.data.path", "config.run.init_from")  # a resumed run may change them: a new one
    keys = {f"config.{key}": value for key, value in flat(config).items() if key != "run.seed"}
    return {
        key.removeprefix("config."): value
        for key, value in keys.items()
        if key in also or not key.startswith(HARMLESS)
    }


def flat(tree: dict, prefix: str = "") -> dict:
    """The leaves of nested dicts by dotted key."""
    leaves = {}
    for key, value in tree.items():
        inner = isinstance(value, dict) and value
        leaves |= flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return leaves
