"""Stands in for the Python of bench/gpu_gate.sh on an H200: notes how it was called, and writes
what a GPU would have given, in invented figures. Fails where the test asks for it, in FAILING."""

import json
import os
import sys
import time
from pathlib import Path

GPU = {
    "hardware": {"device": "NVIDIA H200", "kind": "cuda"}, "versions": {"torch": "2.11.0"},
    "commit": "c", "time": "2026-01-01T00:00:00+00:00",
}  # fmt: skip
SPEED = {"vit_h": 700.0, "vit_b": 4800.0, "vit_l": 2000.0}
GAIN = {
    "fused": 1.0, "graph": 1.05, "compiled": 0.8, "tanh": 1.1, "fp8": 1.15, "fp8_fast": 1.2,
    "k78": 1.3, "stream": 1.02, "weight_stream": 1.02, "batch256": 1.01, "graph_tanh": 1.2,
    "graph_fp8_k78": 1.5, "graph_tanh_fp8_k78": 1.6, "graph_dependent_launch": 1.03,
    "graph_fp8": 1.25, "graph_fp8_all": 1.3,
}  # fmt: skip
FAST = ("fp8_fast", "graph_fp8_k78", "graph_tanh_fp8_k78")
SETS = {
    "graph": ["run.cuda_graph=true"], "fp8": ["model.target_precision=fp8"],
    "fp8_fast": ["model.target_precision=fp8"], "stream": ["run.target_stream=true"],
    "weight_stream": ["run.weight_stream=true"],
    "compiled": ["run.compile=blocks", "run.cuda_graph=true"], "tanh": ["model.gelu=tanh"],
    "graph_dependent_launch": ["run.cuda_graph=true", "run.dependent_launch=true"],
    "graph_fp8": ["run.cuda_graph=true", "model.target_precision=fp8"],
    "graph_fp8_all": [
        "run.cuda_graph=true", "model.target_precision=fp8", "model.context_precision=fp8",
    ],
    "k78": ["mask.keep=78"], "graph_tanh": ["run.cuda_graph=true", "model.gelu=tanh"],
    "graph_fp8_k78": ["run.cuda_graph=true", "model.target_precision=fp8", "mask.keep=78"],
    "graph_tanh_fp8_k78": [
        "run.cuda_graph=true", "model.gelu=tanh", "model.target_precision=fp8", "mask.keep=78",
    ],
}  # fmt: skip
PARTS = ("target", "context", "predictor", "loss", "backward", "optimiser", "average", "rest")


def after(name: str) -> list[str]:
    """The values of an option, to the next one."""
    if name not in sys.argv:
        return []
    rest = sys.argv[sys.argv.index(name) + 1 :]
    return rest[: next((i for i, text in enumerate(rest) if text[:2] == "--"), len(rest))]


def row(config: str, variant: str, command: str) -> dict:
    speed = SPEED.get(config, 1000.0) * GAIN[variant]
    if (config, variant) == ("vit_h", "batch256"):
        return {"config": config, "variant": variant, "failed": f"{variant}: out of memory"}
    return GPU | {
        "config": config, "variant": variant, "data": "synthetic", "precision": "bf16",
        "batch": 128, "processes": 1, "command": command, "images_per_s": speed, "step_ms": 1e3,
        "mfu_sheet_pct": speed / 14, "context_k": 78.0 if "k78" in variant else 91.0,
        "joules_per_image": 670 / speed, "also": ["fast sums"] * (variant in FAST),
        "overrides": ["mask.context=fixed", *SETS.get(variant, [])],
        "phases_ms": {} if "graph" in variant else dict.fromkeys(PARTS, 20.0),
    }  # fmt: skip


def turns(config: str, command: str) -> list[dict]:
    times = {"ours": 1.0, "reference, fp32": 7.5, "reference, bf16 autocast": 2.5}
    about = GPU | {"config": config, "batch": 32, "overrides": [], "command": command}
    return [
        about | {"step": step, "ours_times": t, "images_per_s": 700 / t}
        for step, t in times.items()
    ]


def found(script: str, command: str) -> list[dict] | dict:
    if script == "variants.py":
        return [row(c, v, command) for v in after("--variant") for c in after("--config")]
    if script == "throughput.py" and "--against" in sys.argv:
        return [one for config in after("--config") for one in turns(config, command)]
    if script == "throughput.py":
        return [row(c, "fused", command) for c in after("--config")]
    made = GPU | {"batch": None, "overrides": [], "command": command}
    if "--tune" in sys.argv:
        return made | {"architecture": "sm_90", "table": {"gelu": [4096, 8], "x 5": 3}, "rows": []}
    return made | {"rows": [{"op": script}]}


def main() -> int:
    command = " ".join(sys.argv[1:])
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(command + "\n")
    if "not torch.cuda" in command:
        return int(os.environ["NO_GPU"])
    if os.environ.get("HANGING", "nothing") in command:
        time.sleep(600)
    if "--unpack" in command:
        Path(os.environ["TRITON_CACHE_DIR"]).mkdir(exist_ok=True)
    if os.environ["FAILING"] in command:
        return 3
    script = Path(sys.argv[1]).name
    for path in map(Path, after("--json")):
        path.write_text(json.dumps(found(script, command)))
    for folder in map(Path, after("--profile")):
        (folder / "fused").mkdir(parents=True)
        (folder / "fused" / "vit_h_synthetic.txt").write_text("a step: 180000 us, busy 98 %\n")
        (folder / "fused" / "vit_h_synthetic.json").write_text("a trace" * 10**6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
