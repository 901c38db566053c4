"""model_card.md: what an exported encoder is, what it was trained on, and how to load it.

Its head is YAML as Hugging Face's hub reads it. Of paths only the last part is told.
"""

import platform
from collections.abc import Iterable, Sequence
from pathlib import PurePath

import torch

from cjepa_fast.data.sources import LIMITS
from cjepa_fast.eval.features import digest
from cjepa_fast.export.formats import Source
from cjepa_fast.export.origin import Origin
from cjepa_fast.interop import huggingface
from cjepa_fast.model.vit import Encoder, count_parameters
from cjepa_fast.runtime.image_size import height_width, shown
from cjepa_fast.runtime.printable import in_markdown, markdown_code
from cjepa_fast.runtime.provenance import own_commit
from cjepa_fast.runtime.version import VERSION

UNKNOWN = "Unknown: it was exported from an encoder's files, without the run that made it."
LIBRARIES = {
    "hf": "transformers",
    "safetensors": "cjepa_fast",
    "timm": "timm",
    "onnx": "onnx",
    "torch": "pytorch",
}
TAGS = ("vision", "self-supervised-learning", "i-jepa", "c-jepa")
TERMS = {
    "loss": "loss",
    "jepa": "prediction",
    "sim": "invariance",
    "std": "variance",
    "cov": "covariance",
    "sigreg": "SIGReg's statistic",
    "feature_std": "std of the features, per dimension",
    "rankme": "RankMe of the features",
    "knn": "kNN while training, %",
    "linear": "ridge probe while training, %",
}
# What begins and ends most snippets. {C}, {H}, {W}: the images' shape.
BANDS = "hf of bands"  # more of them than image processors read
NORMALISED = "images = torch.zeros(1, {C}, {H}, {W})  # normalised, as below"
SNIPPETS = {
    "hf": """\
import torch
{loaded[0]}
from transformers import AutoImageProcessor, AutoModel

folder = "."  # where this card lies
model = AutoModel.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
images = processor({loaded[1]}, return_tensors="pt")
with torch.no_grad():
    tokens = model(**images).last_hidden_state
features = tokens.mean(1)""",
    BANDS: f"""\
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained(".")  # where this card lies
{NORMALISED}
with torch.no_grad():
    tokens = model(images).last_hidden_state
features = tokens.mean(1)""",
    "safetensors": f"""\
import torch
from cjepa_fast import load_encoder

encoder = load_encoder("{{file}}")
{NORMALISED}
with torch.no_grad():
    tokens = encoder(images)
features = tokens.mean(1)""",
    "timm": f"""\
import json

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

with open("config.json") as file:
    model = VisionTransformer(**json.load(file)["model_args"]).eval()
model.load_state_dict(load_file("model.safetensors"))
{NORMALISED}
with torch.no_grad():
    tokens = model.forward_features(images)
    features = model(images)  # their mean""",
    "onnx": """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("encoder.onnx")
images = np.zeros((1, {C}, {H}, {W}), np.float32)  # normalised, as below
(tokens,) = session.run(["tokens"], {{"images": images}})
features = tokens.mean(1)""",
    "torch": f"""\
import torch

model = torch.export.load("encoder.pt2").module()
{NORMALISED}
with torch.no_grad():
    tokens = model(images)
features = tokens.mean(1)""",
}


# Of a square transformers' processor cuts the window; of an oblong it cannot.
SQUARE = "from PIL import Image", 'Image.open("image.{ending}")'
OBLONG = (
    "from PIL import Image, ImageOps",
    'ImageOps.fit(Image.open("image.{ending}"), ({W}, {H}), Image.Resampling.BILINEAR, {bleed:g})',
)
KINDS = {1: "gray", 2: "gray with alpha", 3: "RGB", 4: "RGB with alpha"}  # by channels


def card(source: Source, origin: Origin, form: str, name: str, files: Sequence[str]) -> str:
    """The text. form: a name in FORMATS; name: the export's; files: those beside the card."""
    parts = [
        _head(form),
        f"# {in_markdown(name)}",
        _description(source, origin),
        "## Use",
        _use(source, form, files),
        "## Training",
        _training(origin),
        "## Evaluation",
        _evaluation(source, origin),
        "## Versions",
        _versions(origin),
        "## Licence",
        "To be filled in by whoever publishes these weights, here and as `license` at the top.",
    ]
    return "\n\n".join(parts) + "\n"


def _head(form: str) -> str:
    lines = [
        f"library_name: {LIBRARIES[form]}",
        "pipeline_tag: image-feature-extraction",
        f"tags: [{', '.join(TAGS)}]",
        "# license: (to be filled in)",
    ]
    return "\n".join(["---", *lines, "---"])


def _description(source: Source, origin: Origin) -> str:
    encoder = source.encoder
    kind = {
        "target": "the target encoder, the EMA of the trained one",
        "context": "the context encoder, the one that gradients trained",
    }[source.which]
    return (
        f"{_pretrained(origin.config)}: {kind}. "
        f"{encoder.depth} blocks of width {encoder.width} with {encoder.heads} heads, "
        f"{count_parameters(encoder):,} parameters. For an image of {shown(encoder.image_size)} "
        f"pixels it gives {encoder.grid[0]} x {encoder.grid[1]} tokens, one a "
        f"patch of {encoder.patch_size} pixels; there is no class token, and an image's features "
        "are the mean of its tokens."
    )


def _pretrained(config: dict) -> str:
    """Starting weights may have been trained with labels, and so may those of unknown origin."""
    if not config:
        return "A pretrained Vision Transformer"
    start = " from starting weights (see Training)" if config["run"].get("init_from") else ""
    now = " in this training" if start else ""
    return f"A Vision Transformer pretrained{start} without labels{now}{_method(config)}"


def _method(config: dict) -> str:
    regulariser = config["loss"]["regulariser"]
    if config["loss"][regulariser]["beta"] == 0:
        return " by I-JEPA (arXiv 2301.08243)"
    if regulariser == "sigreg":
        return " by I-JEPA with SIGReg (arXiv 2301.08243, 2511.08544)"
    return " by C-JEPA (I-JEPA with VICReg's regularisation, arXiv 2410.19560)"


def _use(source: Source, form: str, files: Sequence[str]) -> str:
    encoder, (H, W) = source.encoder, height_width(source.encoder.image_size)
    C = encoder.channels
    arrays = huggingface.in_own_units(encoder)
    form = BANDS if form == "hf" and (arrays or C not in KINDS) else form
    weights = next((file for file in files if file.endswith(".safetensors")), "")
    bleed = (1 - source.crop) / 2  # what ImageOps.fit leaves out at each edge
    ending = "jpg" if C in (1, 3) else "png"  # which has alpha
    parts = SQUARE if H == W else OBLONG
    loaded = [part.format(H=H, W=W, bleed=bleed, ending=ending) for part in parts]
    code = SNIPPETS[form].format(C=C, H=H, W=W, file=weights, loaded=loaded)
    window = (
        f"square of {source.crop:g} times the short side"
        if H == W
        else f"window of their shape, {source.crop:g} times as long and wide as the largest,"
    )
    kind = KINDS[C] if C in KINDS and not arrays else f"of {C} channel{'s' * (C > 1)}"
    values = "the numbers of their arrays" if arrays else f"values in 0..1{_of_bits(encoder)}"
    numbers = [", ".join(f"{value:g}" for value in pair) for pair in (encoder.mean, encoder.std)]
    return (
        f"```python\n{code}\n```\n\n"
        f"Images are {kind}, their centred {window} resized "
        f"(bilinear, antialiased) to {H} x {W}, {values} normalised with mean "
        f"{numbers[0]} and std {numbers[1]}. Weights are fp32."
    )


def _of_bits(encoder: Encoder) -> str:
    """How values of more than 8 bits a channel become shares, where not all bits are in use."""
    bits = getattr(encoder, "limits", LIMITS).bit_depth
    return f" (of more than 8 bits: value / {2**bits - 1})" if bits else ""


def _training(origin: Origin) -> str:
    if not origin.config:
        return UNKNOWN
    start = origin.config["run"].get("init_from")
    facts = {
        "images": _images(origin),
        **({"starting weights": PurePath(start).name} if start else {}),
        "duration": _duration(origin),
        **_settings(origin.config),
    }
    table = _table(["", ""], facts.items())
    logged = {word: origin.log.get(key) for key, word in TERMS.items()}
    terms = {word: f"{value:.4g}" for word, value in logged.items() if value is not None}
    if not terms:
        return table
    return f"{table}\n\nAt step {origin.log['step']:,}:\n\n{_table(list(terms), [terms.values()])}"


def _images(origin: Origin) -> str:
    state, path = origin.state, origin.config["data"]["path"]
    name = " and ".join(PurePath(one).name for one in ([path] if isinstance(path, str) else path))
    count = f"{state['image_count']:,} images" if "image_count" in state else "of unknown number"
    return f"{name}, {count}, fingerprint {state['images'] or 'unknown'}"


def _duration(origin: Origin) -> str:
    state, config = origin.state, origin.config
    batch, world = config["data"]["batch_size"], state["world_size"]
    return (
        f"{state['step']:,} steps of {batch:,} images, {state['epoch']:g} of "
        f"{config['run']['epochs']} epochs, {state['step'] * batch:,} images seen; "
        f"{world} {'rank' if world == 1 else 'ranks'}"
    )


def _settings(config: dict) -> dict[str, str]:
    """The configuration in brief."""
    data, mask, predictor, optim = (config[name] for name in ("data", "mask", "predictor", "optim"))
    return {
        "crops": f"{data['crop_scale'][0]:g} to {data['crop_scale'][1]:g} of the area"
        + (", flipped" if data["flip"] else ""),
        "masks": f'sampler "{mask["sampler"]}", context "{mask["context"]}", {mask["targets"]} '
        f"targets of {mask['target_scale'][0]:g} to {mask['target_scale'][1]:g}",
        "predictor": f"width {predictor['width']}, depth {predictor['depth']}",
        "objective": _objective(config["loss"]),
        "optimiser": f"AdamW, learning rate {optim['lr']:g}, weight decay "
        f"{optim['weight_decay']:g} to {optim['final_weight_decay']:g}; "
        f"momentum of the EMA {optim['momentum']:g} to {optim['final_momentum']:g}",
        "precision": config["run"]["precision"],
    }


def _objective(loss: dict) -> str:
    prediction, own = f'prediction "{loss["prediction"]}"', loss[loss["regulariser"]]
    if loss["prediction_weight"] != 1:
        prediction += f" times {loss['prediction_weight']:g}"
    if own["beta"] == 0:
        return prediction
    sigreg = loss["regulariser"] == "sigreg"
    names = ("beta", "directions", "knots", "t_max") if sigreg else ("beta", "sim", "std", "cov")
    weights = ", ".join(f"{name} {own[name]:g}" for name in names)
    return f'{prediction}; {"SIGReg" if sigreg else "VICReg"} on "{own["views"]}": {weights}'


def _evaluation(source: Source, origin: Origin) -> str:
    """A table for each evaluation of these weights that the run's folder has."""
    weights = digest(source.encoder)
    records = [record for record in origin.evaluations if record.get("weights") == weights]
    if not records:
        return "None is known."
    return "\n\n".join(_one_evaluation(record) for record in records)


def _one_evaluation(record: dict) -> str:
    """The columns that any row fills; of the settings those that are set."""
    settings = [f"{k} {_plain(v)}" for k, v in record["settings"].items() if v not in (None, False)]
    rows = record["rows"]
    shown = {k: word for k, word in record["headings"].items() if any(k in row for row in rows)}
    lines = [[row["encoder"], *(_plain(row.get(key)) for key in shown)] for row in rows]
    task, checkpoint = markdown_code(record["task"]), markdown_code(_plain(record["checkpoint"]))
    said = f"{record['which']} encoder ({', '.join(settings)}), {record['made'][:10]}"
    table = _table(["encoder", *shown.values()], lines)
    return f"{task} of {checkpoint}, {in_markdown(said)}:\n\n{table}"


def _plain(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return PurePath(value).name if isinstance(value, str) else str(value)


def _versions(origin: Origin) -> str:
    """Those of the training, and of the export with the code's commit."""
    now = {
        "cjepa_fast": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    commit = own_commit()
    rows = [["exported with", *now.values(), commit or "unknown"]]
    if trained := origin.state.get("versions"):
        rows.insert(0, ["trained with", *(trained[name] for name in now), "unknown"])
    return _table(["", *now, "commit"], rows)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    shown = [[in_markdown(cell) for cell in line] for line in (headings, *rows)]
    lines = [shown[0], ["---"] * len(headings), *shown[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
