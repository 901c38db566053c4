"""What this processor and these GPUs can do: each ability is probed once, by a tiny call.

Nothing is assumed from a dtype or a device's name. bench/ and the doctor print the same answers.
"""

import contextlib
import functools
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cjepa_fast.runtime import cgroups
from cjepa_fast.runtime.printable import say

PRECISIONS = ("fp32", "bf16")  # "auto" is fp32 if any rank's device is better at fp32, else bf16
OLDEST_BF16 = (8, 0)  # compute capability of GPUs that multiply bf16
OLDEST_FP8 = (8, 9)
# Tiers that oneDNN can be told to stop at (ONEDNN_MAX_CPU_ISA): below the first with bf16 matmuls,
# and from there on.
WITHOUT_BF16 = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI",
)  # fmt: skip
WITH_BF16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX512_CORE_AMX")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of /proc/cpuinfo; the last is ARM's


class Choice(NamedTuple):
    """A precision (PRECISIONS) and why it was taken, in words."""

    precision: str
    reason: str


# --- processors


def processor_name() -> str:
    """As the system calls it, else the architecture: Linux on aarch64 has no name."""
    names = _cpuinfo("model name")
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found = subprocess.check_output(
                command, encoding="utf-8", errors="replace", stderr=subprocess.DEVNULL
            )
            names = [found.strip()]
    return names[0] if names and names[0] else platform.machine()


def cores() -> int:
    """Those that this process may use: by its affinity, and by the time that a container allows."""
    on_linux = hasattr(os, "sched_getaffinity")
    found = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    quota = cgroups.cpu_quota()
    return found if quota is None else max(1, min(found, int(quota)))


def _cpuinfo(*keys: str) -> list[str]:
    """The values of these keys of /proc/cpuinfo, [] where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for key, _, value in pairs if key.strip() in keys]


def cpu_flags() -> set[str]:
    """What the first core can do, by the kernel's names ("avx2", "amx_bf16"); ARM's too."""
    return set(" ".join(_cpuinfo("flags", "Features")[:1]).split())


def onednn_limit() -> str:
    """The tier that the environment holds oneDNN to, "ALL" without one."""
    names = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    return next((os.environ[n].upper() for n in names if os.environ.get(n)), "ALL")


def tier() -> str:
    """The instructions that matmuls use here, as "AVX2" or "AVX-512 bf16"."""
    flags, limit, order = cpu_flags(), onednn_limit(), (*WITHOUT_BF16, *WITH_BF16)
    has = {
        "SSE41": True,
        "AVX2": "avx2" in flags,
        "AVX512_CORE": {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags,
        "AVX512_CORE_BF16": "avx512_bf16" in flags,
        "AVX512_CORE_AMX": "amx_bf16" in flags,
    }
    if not flags & {"sse4_1", "avx2"}:
        return f"{platform.machine()}{' bf16' if 'bf16' in flags else ''}"
    allowed = order[: order.index(limit) + 1] if limit in order else order
    return [name for name in allowed if has.get(name)][-1]


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 matmuls, and torch and oneDNN use them.

    Without them oneDNN emulates: on AVX-512 2.7 times slower than fp32, below it 5 to 40 times.
    """
    if not cpu_flags() & BF16_FLAGS or onednn_limit() in WITHOUT_BF16:
        return False
    return torch.backends.mkldnn.enabled and onednn_linear_works(torch.bfloat16)


@functools.cache
def onednn_linear_works(dtype: torch.dtype, approximate: str = "none") -> bool:
    """Whether oneDNN's fused Linear, with and without a GELU, takes this dtype here, and is right.
    approximate: as F.gelu has it.

    It is an operator of torch's own compiler, without promises: some builds lack it, and some
    processors have no primitive for bf16.
    """
    call = onednn_linear()
    if call is None:
        return False
    # Whoever asks first may do so under autocast or another default device.
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        x, weight, bias = (torch.arange(n, dtype=torch.float32) % 5 - 2 for n in (48, 128, 8))
        x, weight = x.view(3, 16), weight.view(8, 16) / 8
        wanted = F.linear(x, weight, bias)
        args = [t.to(dtype) for t in (x, weight, bias)]
        try:
            found = [call(*args, "none", [], ""), call(*args, "gelu", [], approximate)]
        except RuntimeError:  # oneDNN has no primitive
            return False
        pairs = zip(found, (wanted, F.gelu(wanted, approximate=approximate)), strict=True)
        return all(torch.allclose(f.float(), w, rtol=1e-2, atol=1e-2) for f, w in pairs)


def onednn_linear():
    """oneDNN's x W^T + b with an activation, None in a build of torch without it."""
    try:
        return torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None


# --- GPUs


@functools.cache
def gpu_problem(index: int = 0) -> str:
    """Why GPU number `index` cannot be used, in words, "" where it can; the first call tries it."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own words on the same matter
            works = (torch.ones(2, device=torch.device("cuda", index)) * 2).sum().item() == 4
            if works:
                return ""
            problem = "it computes wrongly"
    except (RuntimeError, AssertionError) as error:  # the driver's; "no kernel image"; no such GPU
        problem = str(error).strip().split("\n")[0]
    return f"{_named(index)}: {problem}. {_way_out(index)}"


def _named(index: int) -> str:
    try:
        major, minor = torch.cuda.get_device_capability(index)
        return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"
    except (RuntimeError, AssertionError):
        return f"GPU {index}"


def _way_out(index: int) -> str:
    if 0 < (count := torch.cuda.device_count()) <= index:
        return (
            f"LOCAL_RANK is {index}, and this process sees {count}: let each process see all GPUs "
            "of its node (SLURM: without --gpus-per-task), or start fewer"
        )
    made_for = ", ".join(torch.cuda.get_arch_list()) or "no GPU"
    return (
        f"torch {torch.__version__} has kernels for {made_for}; an older GPU, such as a V100, "
        "needs a build of torch for CUDA 12"
    )


def unseen_gpus() -> str:
    """That there are GPUs which torch does not see; "" where none are, or the user hid them."""
    if torch.cuda.is_available() or "CUDA_VISIBLE_DEVICES" in os.environ:
        return ""
    try:
        import pynvml
    except ImportError:  # not on macOS
        return ""
    try:
        pynvml.nvmlInit()
        count, driver = pynvml.nvmlDeviceGetCount(), pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return ""
    if not count:
        return ""
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"torch {torch.__version__}, built {built}, sees none of the {count} GPUs of driver "
        f"{driver} (CUDA 13 needs driver 580 or newer: docs/install.md)"
    )


def has_gpu() -> bool:
    """Whether this process can train on its GPU, which LOCAL_RANK names."""
    return torch.cuda.is_available() and not gpu_problem(local_rank())


def default_device() -> torch.device:
    """This process's GPU, else the CPU."""
    return torch.device("cuda" if has_gpu() else "cpu")


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, (8, 0) of an A100; (0, 0) of what is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def gpu_multiplies_fp8(device: torch.device) -> bool:
    """Whether torch._scaled_mm with a scale a row and a column runs here, and is right."""
    if capability(device) < OLDEST_FP8:
        return False
    ones, scale = torch.ones(16, 16, device=device), torch.full((16, 1), 0.5, device=device)
    values = ones.to(torch.float8_e4m3fn)
    try:
        found = torch._scaled_mm(
            values, values.t(), scale, scale.t(), out_dtype=torch.bfloat16
        )  # fmt: skip
    except RuntimeError:
        return False
    return bool((found == 4).all())


# --- both


@functools.cache
def compile_problem(device: torch.device) -> str:
    """Why torch.compile cannot be used on this device, in words, "" where it can: it is tried."""
    try:
        found = torch.compile(lambda x: (x * 2 + 1).relu())(torch.ones(8, device=device))
        return "" if bool((found == 3).all()) else "it computes wrongly"
    except Exception as error:  # of a compiler, a driver, a GPU that is too old
        words = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {words[:200]}"


def best_precision(device: torch.device) -> Choice:
    """What run.precision "auto" becomes on this device."""
    if device.type == "cuda":
        major, minor = capability(device)
        name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
        if (major, minor) >= OLDEST_BF16:
            return Choice("bf16", f"{name} multiplies it")
        lost = "without our own kernels, fused blocks and FlashAttention, which begin with sm_80"
        return Choice("fp32", f"{name} multiplies no bf16; {lost}")
    if cpu_multiplies_bf16():
        return Choice("bf16", f"{processor_name()} multiplies it ({tier()})")
    return Choice("fp32", f"{processor_name()} multiplies no bf16 ({tier()})")


def slow_precision(precision: str, device: torch.device) -> str:
    """A warning where a precision is much slower here than the best, else ""."""
    best = best_precision(device)
    if precision != "bf16" or best.precision == "bf16":
        return ""
    return f"bf16 is slower than fp32 here: {best.reason}"


def precision_message(precision: str, device: torch.device, resumed: bool) -> str:
    """What run.precision became, and why; a warning where it is slow here."""
    best = best_precision(device)
    if precision == best.precision:
        return f"precision: {precision} ({best.reason})"
    origin = "as the run began" if resumed else "as run.precision or another rank has it"
    if warning := slow_precision(precision, device):
        way_out = "a new run with run.precision=fp32 does not have that"
        return f"WARNING: precision: {precision}, {origin}; {warning}; {way_out}"
    return f"precision: {precision}, {origin}; bf16 would be faster here ({best.reason})"


def warn_of_slow_bf16(device: torch.device, key: str) -> None:
    """One line to stderr where bf16, asked for by `key`, is slow here."""
    if warning := slow_precision("bf16", device):
        say(f"WARNING: {key}: {warning}", sys.stderr)
