"""A trained classifier in two files, and the images it is asked about from Python.

    FOLDER/classifier.safetensors   the weights, encoder and head
    FOLDER/classifier.json          the encoder and its images' mean, std, crop and limits as in
                                    encoder.json; pooling, head, the classes' names, and the
                                    weights' SHA-256

`cjepa-eval finetune` and `attentive` leave them at their end. Neither is unpickled.
Shapes: n images, B images of a batch, C classes.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cjepa_fast.checkpoint.encoders import (
    described_encoder,
    description_of,
    require_checksum,
    save_described,
)
from cjepa_fast.checkpoint.pretrained import Transform, batches_of
from cjepa_fast.data.sources import ImageSet, Limits
from cjepa_fast.eval.finetuning.recipe import Classifier
from cjepa_fast.eval.probes.attentive_probe import AttentiveProbe
from cjepa_fast.interop.weights import fill, mismatches
from cjepa_fast.model.vit import Encoder
from cjepa_fast.runtime.distributed import rank
from cjepa_fast.runtime.files import read_json, read_tensors
from cjepa_fast.runtime.printable import printable, say

FILE = "classifier.safetensors"
TRAINED = "trained"  # the folder below --out of the encoder that CHECKPOINT names
MEAN, ATTENTIVE = "mean", "attentive"  # how the patches become a vector
NETWORKS = {MEAN: Classifier, ATTENTIVE: AttentiveProbe}
LINEAR = "linear"


class ImageClassifier(nn.Module):
    """Images to classes, in evaluation mode.

    network: images to logits, of an `encoder` and a `head`. classes: the names, in the logits'
    order. crop: the share of the largest centred window that evaluation keeps; limits: as the
    training had them; transform: what makes an image for `forward` of any other.
    """

    def __init__(self, network: nn.Module, classes: list[str], crop: float, limits: Limits):
        super().__init__()
        self.network, self.classes, self.crop, self.limits = network, classes, crop, limits
        self.mean, self.std = network.encoder.mean, network.encoder.std
        self.image_size = network.encoder.image_size
        self.eval()

    @property
    def transform(self) -> Transform:
        return Transform(self.image_size, self.mean, self.std, self.crop, self.limits)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of images that are transformed already."""
        return self.network(images_BCHW)

    @torch.no_grad()
    def probabilities(self, images: Any, batch_size: int = 64) -> torch.Tensor:
        """(n, C) fp32, on the CPU, of images as PretrainedEncoder.embed takes them: paths, PIL
        images, arrays or tensors, one or many. Raises ValueError, naming it, for an image that
        cannot be read."""
        head = self.network.head.weight
        batches = batches_of(images, self.transform, batch_size)
        return torch.cat([self(x_BCHW.to(head)).float().softmax(1).cpu() for x_BCHW in batches])

    def predict(self, images: Any, batch_size: int = 64) -> list[tuple[str, float]]:
        """(class's name, its probability) of each image, of one as of a list of one. Images and
        errors are those of `probabilities`."""
        best_n, class_n = (x.tolist() for x in self.probabilities(images, batch_size).max(1))
        return [(self.classes[c], p) for p, c in zip(best_n, class_n, strict=True)]


# ------------------------------------------------------------------------------------------- save


def keep_classifier(
    network: nn.Module, pooling: str, encoder: Encoder, images: ImageSet, numbers_C: torch.Tensor,
    crop: float, folder: Path,
) -> None:  # fmt: skip
    """Write a trained classifier into `folder`, on the first rank.

    pooling: MEAN or ATTENTIVE. images: trained on; numbers_C: of the classes in their labels.
    crop: what it is tested with. What cannot be written is said, and costs no score.
    """
    if rank() != 0:
        return
    described = description_of(encoder, crop, images.limits)
    described |= {"pooling": pooling, "head": LINEAR, "classes": names_of(images, numbers_C)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_described(network, described, folder / FILE)
        print(f"classifier of {len(numbers_C)} classes: {printable(folder / FILE)}", flush=True)
    except OSError as error:
        say(f"the classifier could not be kept in {printable(folder)}: {error}", sys.stderr)


def names_of(images: ImageSet, numbers_C: torch.Tensor) -> list[str]:
    """Of classes by their numbers in the set's labels; of a set without names the numbers."""
    return [images.classes[c] if images.classes else str(c) for c in numbers_C.tolist()]


# ------------------------------------------------------------------------------------------- load


def load_classifier(path: str | os.PathLike) -> ImageClassifier:
    """A trained classifier, fp32, on the CPU, in evaluation mode; `predict` takes images as they
    are.

    path: the folder that `cjepa-eval finetune` or `attentive` was given as --out, the encoder's
    folder in it, or its classifier.safetensors. Raises FileNotFoundError or ValueError, naming the
    file.
    """
    file = _located(Path(path))
    description = file.with_suffix(".json")
    if not description.is_file():
        raise FileNotFoundError(f"{description} is missing, which says what {file.name} holds")
    described = read_json(description)
    checksum = described.pop("sha256", None)
    pooling, classes = _head_of(described, description)
    with torch.device("meta"):
        encoder = described_encoder(described, description)
        network = NETWORKS[pooling](encoder, len(classes))
    if {len(encoder.mean), len(encoder.std)} != {encoder.channels}:
        raise ValueError(f"{description}: mean and std must have {encoder.channels} numbers each")
    weights = read_tensors(file)
    require_checksum(file, checksum, description)
    if problems := mismatches("classifier", network.state_dict(), weights):
        raise ValueError("\n  ".join([f"{file} does not fit {description.name}:", *problems]))
    fill(network, weights)
    return ImageClassifier(network, classes, encoder.crop, encoder.limits)


def _located(path: Path) -> Path:
    """The file of the weights."""
    weights = path.suffix == Path(FILE).suffix
    places = [path] if weights else [path / FILE, path / TRAINED / FILE]
    if found := next(filter(Path.is_file, places), None):
        return found
    below = [*path.glob(f"*/{FILE}"), *path.glob(f"*/{TRAINED}/{FILE}")]
    if below:
        folders = " or ".join(str(file.parent) for file in sorted(below))
        raise FileNotFoundError(f"{places[0]} is missing: give {folders}")
    raise FileNotFoundError(
        f"{places[0]} is missing: give the --out FOLDER of `cjepa-eval finetune` or `attentive`, "
        "by default RUN/finetune and RUN/attentive. A training that has not ended, or that an "
        "earlier version made, leaves it there by the same command with --resume"
    )


def _head_of(described: dict, file: Path) -> tuple[str, list[str]]:
    """(pooling, the classes' names) of a description, which loses them."""
    if "classes" not in described:
        raise ValueError(f"{file} describes no classifier; an encoder is for load_encoder")
    classes, pooling, head = (described.pop(name, None) for name in ("classes", "pooling", "head"))
    if not (isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)):
        raise ValueError(f"{file}: its classes must be a list of names")
    if pooling not in list(NETWORKS) or head != LINEAR:
        raise ValueError(
            f"{file}: pooling {pooling!r} and head {head!r}: this version knows "
            f"{MEAN!r} and {ATTENTIVE!r} with {LINEAR!r}"
        )
    return pooling, classes
