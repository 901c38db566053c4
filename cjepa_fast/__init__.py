"""C-JEPA pretraining of Vision Transformers (Mo & Tong, NeurIPS 2024, arXiv 2410.19560).

import cjepa_fast as cj

run = cj.pretrain("vit_s", data="/my/images", epochs=100, overrides={"optim.lr": 3e-4})
encoder = run.encoder()  # or cj.load_encoder("runs/vit_s")
features = encoder.embed(["a.jpg", "b.jpg"])  # (2, D), of paths, PIL images, arrays, tensors
maps = encoder.attention("a.jpg")  # (1, heads, rows, cols)

pretrain           a training, as `cjepa-train` runs it; returns its Run
load_classifier    what `cjepa-eval finetune` has trained: predict(images)
load_encoder       of a run, a checkpoint, a file, or "hf:USER/NAME"
Run                a training's folder: its log as a table, its encoders
PretrainedEncoder  the network, with transform, embed and attention
Callback           what a training calls at a step, an evaluation, a checkpoint
masks              a figure of the masks that a configuration draws
Config             a configuration, checked
ConfigError        what is wrong with one, in words for its user
"""

import sys

if sys.platform == "win32":
    raise ImportError("cjepa_fast runs on Linux and macOS, and not on Windows: use WSL2")

from cjepa_fast.runtime.lazy import exports
from cjepa_fast.runtime.spin import spin_briefly
from cjepa_fast.runtime.version import VERSION as __version__

spin_briefly()

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "checkpoint.encoders": "load_encoder",
        "checkpoint.pretrained": "PretrainedEncoder",
        "config": "Config ConfigError",
        "eval.figures.mask_columns": "masks",
        "eval.finetuning.classifier": "load_classifier",
        "train": "pretrain",
        "training.callbacks": "Callback",
        "training.run": "Run",
    },
)
__all__ += ["__version__"]
