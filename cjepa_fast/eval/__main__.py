"""Evaluate a checkpoint: `python -m cjepa_fast.eval TASK CHECKPOINT --data ...`, or `cjepa-eval`.

CHECKPOINT is a run's folder, a checkpoint's folder or an encoder's file. `TASK --help` says more;
`torchrun --nproc_per_node N -m cjepa_fast.eval ...` spreads the images over N GPUs.
"""

import argparse
import importlib
import sys

from cjepa_fast.data.decode_pipeline import ImagesGone
from cjepa_fast.eval.options import fill_defaults
from cjepa_fast.runtime import distributed, hardware
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.printable import printable_lines, say

TASKS = {  # by name: the module below cjepa_fast.eval, imported when it is asked for; help
    "all": ("all_tasks", "kNN, linear probes, signs of collapse and figures, in one table"),
    "embed": ("embed", "features of images, in a file with their names"),
    "knn": ("probes.knn", "k nearest neighbours on frozen features"),
    "linear": ("probes.linear", "linear probes on frozen features, the best of a sweep"),
    "attentive": (
        "probes.attentive",
        "V-JEPA's attentive probe: cross-attention over frozen patch features",
    ),
    "semi": ("probes.semi", "fine-tuning or probing with few labels"),
    "finetune": ("finetuning.classify", "fine-tuning of the whole encoder"),
    "predict": ("predict", "classes of images by what finetune has trained, in a file"),
    "clevr": (
        "probes.clevr",
        "linear probes that count objects and tell the nearest one's distance",
    ),
    "segment": ("dense.segment", "semantic segmentation: a linear head, or UPerNet"),
    "video": ("dense.video", "objects followed through DAVIS's videos by frozen patch features"),
    "detect": ("dense.detect", "boxes and masks in COCO's format, by fine-tuning in a Mask R-CNN"),
    "collapse": ("probes.collapse", "signs of collapse: RankMe, LiDAR, spectra; no labels"),
    "compare": ("compare", "several checkpoints in one table"),
    "attention": (
        "figures.attention",
        "figure: where target and context encoders look, side by side",
    ),
    "pca": ("figures.pca", "figure: patch features as colours, side by side"),
    "retrieve": ("figures.retrieve", "figure: nearest neighbours on frozen features"),
    "curves": ("figures.curves", "figure: the log of one or several runs"),
    "masks": ("figures.masks", "figure: a run's masks on its images"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="cjepa-eval",
        description=__doc__.strip(),
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher's
    commands = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    chosen = next((word for word in argv if word in TASKS), None)
    for name, (module, text) in TASKS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name == chosen:
            task = importlib.import_module(f"cjepa_fast.eval.{module}")
            task.add_options(sub)
    args = parser.parse_args(argv)
    try:
        fill_defaults(args)
        device = distributed.start(getattr(args, "seed", 0))
        if getattr(args, "bf16", False):
            hardware.warn_of_slow_bf16(device, "--bf16")
        task.run(args)
    except (ValueError, OSError, ImagesGone) as error:  # the user's, without a traceback
        say(f"error: {printable_lines(error)}", sys.stderr)
        return 2
    finally:
        distributed.leave_group()
    return 0


def embed() -> int:
    """The console script cjepa-embed."""
    return main(["embed", *sys.argv[1:]])


if __name__ == "__main__":
    distributed.leave(main())
