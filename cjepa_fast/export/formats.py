"""The forms that an encoder leaves in: how each is written, and opened by the library it is for.

A writer fills an empty folder. An opener gives, for a folder, the function of normalised images
(B, 3, H, W) that its library computes: their patch tokens (B, N, D). Each export is compared with
the encoder itself by it.
"""

import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from cjepa_fast.checkpoint.encoders import FINAL, load_encoder, save_encoder
from cjepa_fast.interop import huggingface
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.files import read_tensors, write_tensors, write_text
from cjepa_fast.runtime.image_size import height_width

Tokens = Callable[[torch.Tensor], torch.Tensor]

ONNX, PROGRAM = "encoder.onnx", "encoder.pt2"


class Source(NamedTuple):
    """What is exported. which: "target" or "context"; crop: the share of the largest
    centred window that the evaluation shows."""

    encoder: Encoder
    which: str
    crop: float


class Format(NamedTuple):
    """needs: packages without which it cannot be written; opened_by: the one that opens it."""

    write: Callable[[Source, Path], None]
    open: Callable[[Path], Tokens]
    opened_by: str
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        return [name for name in self.needs if not is_installed(name)]


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# ----------------------------------------------------------------------------- transformers, ours


def write_huggingface(source: Source, folder: Path) -> None:
    huggingface.write_encoder(source.encoder, folder, source.crop)


def open_huggingface(folder: Path) -> Tokens:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, local_files_only=True)
    return lambda images_BCHW: model(images_BCHW).last_hidden_state


def write_safetensors(source: Source, folder: Path) -> None:
    save_encoder(source.encoder, folder / f"{FINAL[source.which]}.safetensors")


def open_safetensors(folder: Path) -> Tokens:
    (path,) = folder.glob("*.safetensors")
    return load_encoder(path)


# ------------------------------------------------------------------------------------------- timm


def write_timm(source: Source, folder: Path) -> None:
    """model.safetensors and config.json, the arguments of timm's VisionTransformer in it.

    The names are timm's own already: its blocks are I-JEPA's.
    """
    write_text(folder / "config.json", json.dumps(timm_config(source), indent=2) + "\n")
    weights = {name: p.contiguous() for name, p in source.encoder.state_dict().items()}
    write_tensors(weights, folder / "model.safetensors", {"format": "pt"})


def timm_config(source: Source) -> dict:
    """timm's config.json. Any of its plain ViTs serves as `architecture`: model_args say all."""
    encoder = source.encoder
    return {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "avg",
        "weights_init": encoder.init,  # ours: timm keeps what it does not know
        "model_args": {
            "img_size": encoder.image_size,
            "patch_size": encoder.patch_size,
            "in_chans": encoder.channels,
            "embed_dim": encoder.width,
            "depth": encoder.depth,
            "num_heads": encoder.heads,
            "mlp_ratio": timm_ratio(encoder),
            "num_classes": 0,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,  # the last norm comes before the mean over the patches
            **({"act_layer": "gelu_tanh"} if encoder.gelu == "tanh" else {}),
        },
        "pretrained_cfg": {
            "input_size": [encoder.channels, *height_width(encoder.image_size)],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": source.crop,
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "num_classes": 0,
            # timm makes what it names fit other channels than 3, and by some versions at random
            **({"first_conv": "patch_embed.proj"} if encoder.channels == 3 else {}),
            "classifier": "head",
        },
    }


def timm_ratio(encoder: Encoder) -> float:
    """The ratio from which timm, which rounds down, makes the MLP's width."""
    hidden = encoder.blocks[0].mlp.fc1.out_features
    ratio = hidden / encoder.width
    return ratio if int(encoder.width * ratio) == hidden else math.nextafter(ratio, math.inf)


def open_timm(folder: Path) -> Tokens:
    from timm.models.vision_transformer import VisionTransformer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = VisionTransformer(**config["model_args"])
    model.load_state_dict(read_tensors(folder / "model.safetensors"))
    return model.eval().forward_features


# ----------------------------------------------------------------------------------- onnx, torch


def portable(encoder: Encoder) -> Encoder:
    """The encoder with torch's own attention, which is fast wherever the program runs."""
    with torch.device("meta"):
        copy = Encoder(**encoder.architecture, attention="sdpa")
    copy.load_state_dict(encoder.state_dict(), assign=True)
    return copy.eval()


def example(encoder: Encoder) -> tuple[torch.Tensor]:
    return (torch.zeros(2, encoder.channels, *height_width(encoder.image_size)),)


def any_batch() -> tuple[dict]:
    return ({0: torch.export.Dim("batch")},)


def write_onnx(source: Source, folder: Path) -> None:
    """encoder.onnx, images -> tokens, any batch; its weights beside it, in encoder.onnx.data."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of a missing torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch to itself
        program = torch.onnx.export(
            portable(source.encoder),
            example(source.encoder),
            dynamo=True,
            dynamic_shapes=any_batch(),
            input_names=["images"],
            output_names=["tokens"],
            verbose=False,
        )
    for node in program.model.graph:
        node.metadata_props.clear()  # the source's lines, with this machine's paths
    program.save(folder / ONNX, external_data=True)  # the format ends at 2 GiB


def open_onnx(folder: Path) -> Tokens:
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(folder / ONNX, providers=providers)
    return lambda images_BCHW: torch.from_numpy(
        session.run(["tokens"], {"images": images_BCHW.numpy()})[0]
    )


def write_program(source: Source, folder: Path) -> None:
    """encoder.pt2, which torch loads without this package; any batch."""
    encoder = portable(source.encoder)
    program = torch.export.export(encoder, example(encoder), dynamic_shapes=any_batch())
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths
    torch.export.save(program, folder / PROGRAM)


def open_program(folder: Path) -> Tokens:
    return torch.export.load(folder / PROGRAM).module()


FORMATS = {
    "hf": Format(write_huggingface, open_huggingface, "transformers"),
    "safetensors": Format(write_safetensors, open_safetensors, "cjepa_fast"),
    "timm": Format(write_timm, open_timm, "timm"),
    "onnx": Format(write_onnx, open_onnx, "onnxruntime", needs=("onnx", "onnxscript")),
    "torch": Format(write_program, open_program, "torch"),
}
