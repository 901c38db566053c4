"""What works on this machine, and what a training would use: `cjepa-doctor`, one page.

    python -m cjepa_fast.tools.doctor [--config FILE] [--set KEY=VALUE] [--fast]

Every part is tried with a tiny call, in a process of its own, since a part that is broken may take
its process with it. Put the page into a question or a bug report.
"""

import argparse
import concurrent.futures
import importlib
import importlib.metadata
import io
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from cjepa_fast import config as configuration
from cjepa_fast.config import Config, ConfigError
from cjepa_fast.data.decoder_choice import VARIABLE
from cjepa_fast.model import attention, attention_trial, cpu_linear
from cjepa_fast.runtime import caches, children, hardware, memory, rates
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.printable import printable_lines, say
from cjepa_fast.runtime.provenance import own_commit
from cjepa_fast.runtime.version import VERSION
from cjepa_fast.training import build, cpu_micro_batch
from cjepa_fast.training.sizes import model_sizes

TRIAL_S = 180  # of a part; torch.compile may take a minute the first time
GIB = 2**30
NVJPEG = "nvJPEG (DALI)"
WORKS, ABSENT, BROKEN = "works", "not here", "BROKEN"


class Absent(Exception):
    """The part is not installed, or has no hardware here: no fault."""


# --- the parts, each tried; a function returns what is worth knowing, or raises


def _device() -> torch.device:
    if hardware.has_gpu():
        return torch.device("cuda", hardware.local_rank())
    return torch.device("cpu")


def _gpu() -> torch.device:
    if not hardware.has_gpu():
        raise Absent("no GPU")
    return _device()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Absent("not installed") from None


def _imported(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"not installed ({error})") from None


def try_onednn() -> str:
    found = [
        name
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        if hardware.onednn_linear_works(dtype)
    ]
    if not found:
        raise Absent("this torch, or this processor, has no fused Linear")
    return f"fused Linear in {', '.join(found)}; tier {hardware.tier()}"


def try_triton() -> str:
    version = _version("triton")
    from cjepa_fast.kernels.common import launch

    device = _gpu()
    if problem := launch.problem_on(device):
        raise RuntimeError(problem)
    return f"{version}, {launch.architecture(device)}"


def try_compile() -> str:
    if problem := hardware.compile_problem(_device()):
        raise RuntimeError(problem)
    return "torch.compile of a small function"


def _attention(name: str) -> str:
    device = _gpu()
    shape = attention_trial.Shape(2, 4, 64, 64, 64, True)
    if problem := attention_trial.problem(shape, device, torch.bfloat16, name):
        raise RuntimeError(problem)
    if (runs := attention_trial.kernel_for(shape, device, torch.bfloat16, name)) != name:
        raise RuntimeError(f"{runs} runs in its place")
    return "forward and backward of 64 tokens, bf16"


def try_flash_attn() -> str:
    try:
        attention.flash_attention()
    except ValueError:
        raise Absent(
            "not installed: pip install --no-build-isolation flash-attn, which needs nvcc"
        ) from None
    return _attention("flash_attn")


def try_fp8() -> str:
    if not hardware.gpu_multiplies_fp8(_gpu()):
        raise Absent("begins with sm_89")
    return "torch._scaled_mm by rows"


def try_nccl() -> str:
    device = _gpu()
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    x = torch.ones(4, device=device)
    dist.all_reduce(x)
    dist.destroy_process_group()
    return f"{'.'.join(map(str, torch.cuda.nccl.version()))}, all-reduce of one process"


def try_gloo() -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(4))
    dist.destroy_process_group()
    return "all-reduce of one process"


def _jpeg() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(out, "jpeg")
    return out.getvalue()


def _by_dali(device: str) -> str:
    fn, dali = _imported("nvidia.dali.fn"), _imported("nvidia.dali")
    import numpy as np

    pipe = dali.Pipeline(1, 1, None if device == "cpu" else hardware.local_rank())
    with pipe:
        encoded = fn.external_source(name="encoded", dtype=dali.types.UINT8, ndim=1)
        pipe.set_outputs(fn.decoders.image(encoded, device=device))
    pipe.build()
    pipe.feed_input("encoded", [np.frombuffer(_jpeg(), np.uint8)])
    (images,) = pipe.run()
    if tuple(images.shape()[0]) != (256, 256, 3):
        raise RuntimeError(f"an image of 256 x 256 came out as {images.shape()[0]}")
    return f"{dali.__version__}, a JPEG decoded"


def try_dali() -> str:
    return _by_dali("cpu")


def try_nvjpeg() -> str:
    _gpu()
    return _by_dali("mixed")


def try_pillow() -> str:
    version = _version("pillow")
    from PIL import Image

    Image.open(io.BytesIO(_jpeg())).load()
    return f"{version}, a JPEG decoded"


def try_deepspeed() -> str:
    version = _version("deepspeed")
    from cjepa_fast.runtime import distributed

    distributed.deepspeed()
    distributed.leave_group()
    return f"{version}, joined a group of one"


def try_apex() -> str:
    _imported("apex.optimizers").FusedAdam  # noqa: B018
    return "FusedAdam imports"


def try_nvml() -> str:
    pynvml = _imported("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Absent(str(error)) from None
    watts = pynvml.nvmlDeviceGetPowerUsage(pynvml.nvmlDeviceGetHandleByIndex(0)) / 1000
    return f"driver {pynvml.nvmlSystemGetDriverVersion()}, {watts:.0f} W now"


def try_compiler() -> str:
    command = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++")]
    if not command[0]:
        raise Absent("no C++ compiler: wanted by torch.compile, Triton and DeepSpeed's own kernels")
    line = subprocess.run(
        [*command, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=True
    ).stdout
    return line.splitlines()[0]


def try_git() -> str:
    if not shutil.which("git"):
        raise Absent("runs then do not know the commit of the code")
    return own_commit() or "no checkout here"


PARTS: dict[str, Callable[[], str]] = {
    "oneDNN": try_onednn,
    "Triton": try_triton,
    "torch.compile": try_compile,
    "SDPA flash": lambda: _attention("sdpa_flash"),
    "SDPA cuDNN": lambda: _attention("sdpa_cudnn"),
    "our attention": lambda: _attention("triton"),
    "flash-attn": try_flash_attn,
    "FP8 matmul": try_fp8,
    "NCCL": try_nccl,
    "gloo": try_gloo,
    "DALI": try_dali,
    NVJPEG: try_nvjpeg,
    "Pillow": try_pillow,
    "DeepSpeed": try_deepspeed,
    "apex": try_apex,
    "NVML": try_nvml,
    "C++ compiler": try_compiler,
    "git": try_git,
}


class PartState(NamedTuple):
    """A part's state (WORKS, ABSENT, BROKEN) and what is to be known of it."""

    state: str
    text: str


def trial(name: str) -> PartState:
    """One part, in this process."""
    try:
        return PartState(WORKS, PARTS[name]())
    except Absent as reason:
        return PartState(ABSENT, str(reason))
    except Exception as error:  # whatever a broken installation raises is what is asked for
        line = str(error).strip().split("\n")[0]
        return PartState(BROKEN, f"{type(error).__name__}: {line}"[:160])


def trial_apart(name: str) -> PartState:
    """One part, in a process of its own."""
    command = [sys.executable, "-m", "cjepa_fast.tools.doctor", "--try", name]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TRIAL_S,
            env=children.environment(),
        )
    except subprocess.TimeoutExpired:
        return PartState(BROKEN, f"gave no answer for {TRIAL_S} s")
    answer = [line for line in done.stdout.splitlines() if line.startswith(f"{name}\t")]
    if answer:
        _, state, text = answer[-1].split("\t", 2)
        return PartState(state, text)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return PartState(BROKEN, f"its process ended with status {done.returncode}: {last}"[:160])


# --- the page


def machine_lines() -> Iterator[tuple[str, str]]:
    free, disk = memory.free_bytes(), shutil.disk_usage(".")
    yield (
        "processor",
        (
            f"{hardware.processor_name()}, {hardware.cores()} cores, tier {hardware.tier()}, bf16 "
            f"{'multiplied' if hardware.cpu_multiplies_bf16() else 'not multiplied'}"
        ),
    )
    yield "memory", "unknown" if free is None else f"{free / GIB:.1f} GiB free"
    yield "disk here", f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.0f}"
    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield "torch", f"{torch.__version__} ({built}), {torch.get_num_threads()} threads"
    yield "cjepa_fast", f"{VERSION}, commit {own_commit() or 'unknown'}"
    yield from gpu_lines()


def gpu_lines() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        yield "GPU", hardware.unseen_gpus() or "none"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        problem = hardware.gpu_problem(index)
        yield (
            f"GPU {index}",
            (
                f"{properties.name}, sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / GIB:.0f} GiB; {problem or 'works'}"
            ),
        )


def choice_lines(config: Config, decoders: dict[str, PartState]) -> Iterator[tuple[str, str]]:
    """What a training of this configuration would use on one process here, and why."""
    device, asked = _device(), config
    best, given = hardware.best_precision(device), config.run.precision
    as_given = f"{given}: as run.precision has it"
    yield "precision", f"{best.precision}: {best.reason}" if given == "auto" else as_given
    config = cpu_micro_batch.fitted(build.with_precision(config, device), device, None)
    yield "attention", attention_choice(config, device)
    fused = build.fuses(config, model_sizes(config)["width"])
    fused = fused and device.type == "cuda" and config.run.precision == "bf16"
    yield "blocks", "our fused kernels" if fused else "PyTorch's operators"
    yield "optimiser", build.optimizer_implementation(config)
    if device.type == "cpu" and config.run.precision == "fp32":
        uses = [
            cpu_linear.LinearUse(512, 384, 1536, True),
            cpu_linear.LinearUse(512, 384, 1536, False),
        ]
        ways = cpu_linear.fastest(uses)._asdict().items()
        yield "linear layers", ", ".join(f"{kind} by {library}" for kind, library in ways)
    yield "decoder", decoder_choice(config, decoders["DALI" if device.type == "cpu" else NVJPEG])
    for line in cpu_micro_batch.messages(asked, config):
        yield "memory", line


def decoder_choice(config: Config, dali: PartState) -> str:
    """Which decoder reads pictures; arrays are always read on the CPU."""
    for name, asked in (
        ("data.decoder", config.data.decoder),
        (VARIABLE, os.environ.get(VARIABLE)),
    ):
        if asked not in (None, "", "auto"):
            return f"{asked}: as {name} has it"
    return "DALI" if dali.state == WORKS else f"Pillow, since DALI: {dali.text}"


def attention_choice(config: Config, device: torch.device) -> str:
    if config.model.attention != "auto":
        return f"{config.model.attention}: as model.attention has it"
    if device.type == "cpu":
        return "plain: on a CPU the fastest in bf16, and a run's bits do not hang on timing"
    return (
        f"the fastest of {', '.join(attention_trial.candidates(device))} at the run's own lengths"
    )


def rate_lines(device: torch.device, seconds: float) -> Iterator[tuple[str, str]]:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "bf16" and hardware.slow_precision("bf16", device):
            continue  # minutes, and a training multiplies in fp32 there
        matmul = rates.measured_tflops, device, dtype, seconds
        yield f"matmul {name}", _measured("GFLOP/s", 1e3, *matmul)
    yield "copy", _measured("GB/s, read and written", 1, rates.measured_gb_per_s, device, seconds)


def _measured(unit: str, times: float, measure: Callable[..., float], *args) -> str:
    """A rate in its unit; a GPU may be full with another's work."""
    try:
        return f"{times * measure(*args):,.0f} {unit}"
    except RuntimeError as error:
        return f"not measured: {str(error).strip().splitlines()[0]}"


def page(rows: Iterable[tuple[str, str]]) -> None:
    for name, text in rows:
        print(f"  {name:15s} {text}", flush=True)


def examine(config: Config, fast: bool) -> int:
    """Print the page. Returns 1 where a part that a training would use is broken."""
    print("this machine")
    page(machine_lines())
    print("parts, each tried", flush=True)
    names = [name for name in PARTS if not (fast and name == "torch.compile")]
    found = {}
    with concurrent.futures.ThreadPoolExecutor(min(8, max(2, hardware.cores() // 2))) as pool:
        for name, trial in zip(names, pool.map(trial_apart, names), strict=True):
            found[name] = trial
            page([(name, "{:8s} {}".format(*trial))])
    print("a training here would use")
    page(choice_lines(config, found))
    if not fast:
        print("measured")
        page(rate_lines(_device(), seconds=1.0))
    broken = [name for name, (state, _) in found.items() if state == BROKEN]
    if broken:
        print(f"BROKEN: {', '.join(broken)}: a run goes round them where it can, and says so")
    return bool(broken)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="cjepa-doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--config", metavar="FILE", help="what it would use; default: vit_s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--fast", action="store_true", help="nothing compiled, nothing measured")
    parser.add_argument("--try", choices=PARTS, dest="part", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    caches.root()
    if args.part:
        children.end_with_parent()
        print(f"{args.part}\t" + "\t".join(trial(args.part)), flush=True)
        return 0
    try:
        return examine(configuration.load(args.config or "vit_s", args.overrides), args.fast)
    except ConfigError as error:
        say(f"error: {printable_lines(error)}", sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
