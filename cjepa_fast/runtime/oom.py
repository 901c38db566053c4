"""Memory that did not suffice: told from other errors, and the ways out, with their values."""

import shlex
from collections.abc import Iterator

SIGNS = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
BELOW_SELECTIVE = ("none", "norm_gelu")  # settings of model.checkpointing


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, of the GPU (also outside torch's allocator) or of the machine."""
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one too
        return any(sign in str(error).lower() for sign in SIGNS)
    return isinstance(error, MemoryError)


def advice(
    error: BaseException,
    *,
    rank: int,
    ranks: int,
    micro_batch: int,
    smallest: int,
    checkpointing: str,
    stage: int,
    command_line: list[str],
) -> str:
    """For the user. micro_batch: images, and the smallest that the loss can take; checkpointing:
    model.checkpointing; stage: ZeRO's; command_line: --config and --set, as train.py had them."""
    what = str(error).strip().split("\n")[0] or type(error).__name__
    plan = ["cjepa-plan", *command_line, "--gpu"]
    return "\n".join(
        [
            f"out of memory on rank {rank}, with {micro_batch} images at a time: {what}",
            "less is needed with:",
            *(f"  --set {key}" for key in _ways_out(ranks, micro_batch, smallest,
                                                     checkpointing, stage)),
            f"what fits: {shlex.join(plan)} GPU --count {ranks}  (GPU: h100, ...; see --help)",
        ]
    )  # fmt: skip


def _ways_out(
    ranks: int, micro_batch: int, smallest: int, checkpointing: str, stage: int
) -> Iterator[str]:
    if micro_batch // 2 >= smallest:
        yield f"data.micro_batch_size={micro_batch // 2}"
    if checkpointing in BELOW_SELECTIVE:
        yield "model.checkpointing=selective"
    if checkpointing != "full":
        yield "model.checkpointing=full"
    if ranks > 1 and stage < 3:
        yield f"deepspeed.zero_optimization.stage={stage + 1}"
