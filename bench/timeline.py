"""What a GPU did in a profiler's trace: the share of time it was busy, and that of each kernel.

python bench/timeline.py traces/vit_h_synthetic.json 3      # a trace of 3 steps
"""

import argparse
import json
from collections import Counter
from pathlib import Path

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LINES = 45
NAME = 110  # characters of a kernel's


def summary(trace: Path, steps: int) -> str:
    """The busy times of all CUDA streams together, in us a step; "" for a trace without a
    device."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((e for e in events if e.get("cat") in ON_DEVICE), key=lambda e: e["ts"])
    if not events:
        return ""
    took, calls = Counter(), Counter()
    busy, end = 0.0, events[0]["ts"]
    for event in events:
        took[event["name"]] += event["dur"]
        calls[event["name"]] += 1
        finished = event["ts"] + event["dur"]
        busy += max(0.0, finished - max(end, event["ts"]))
        end = max(end, finished)
    span = end - events[0]["ts"]
    lines = [
        f"a step: {span / steps:.0f} us, busy {100 * busy / span:.1f} %, "
        f"{len(events) / steps:.0f} kernels and copies",
        f"{'us a step':>10s} {'%':>5s} {'calls':>7s} {'us a call':>10s}  kernel",
    ]
    for name, us in took.most_common(LINES):
        count = calls[name]
        figures = f"{us / steps:10.1f} {100 * us / span:5.1f} {count / steps:7.1f}"
        lines.append(f"{figures} {us / count:10.1f}  {name[:NAME]}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace", type=Path, help="a file that bench/throughput.py --profile wrote")
    parser.add_argument("steps", type=int, help="how many of them it holds")
    args = parser.parse_args()
    print(summary(args.trace, args.steps), end="")
