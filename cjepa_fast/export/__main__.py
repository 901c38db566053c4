"""Export an encoder: `python -m cjepa_fast.export CHECKPOINT --to hf --out FOLDER`.

CHECKPOINT is what load_encoder takes: a run, a checkpoint, an encoder's file, a Hugging Face folder
or one of I-JEPA's files. The weights are written in fp32, with a model_card.md beside them, which
Hugging Face's hub reads under the name README.md.
  hf           transformers: AutoModel.from_pretrained(FOLDER)
  safetensors  cjepa_fast.load_encoder(FOLDER)
  timm         timm's VisionTransformer: names of its weights, its arguments in config.json
  onnx         encoder.onnx and its weights, for onnxruntime and others
  torch        encoder.pt2, a program that torch alone runs
Each is opened again, where its library is installed, and compared with the encoder.
"""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from cjepa_fast.checkpoint.encoders import held_in, load_encoder
from cjepa_fast.export import hub
from cjepa_fast.export.card import card
from cjepa_fast.export.formats import FORMATS, Format, Source, is_installed
from cjepa_fast.export.origin import origin_of
from cjepa_fast.runtime import caches
from cjepa_fast.runtime.command_line import Parser
from cjepa_fast.runtime.image_size import height_width
from cjepa_fast.runtime.printable import printable_lines, say
from cjepa_fast.telemetry.progress import shown_clock

CARD = "model_card.md"
# Features are of the order of one, and another order of summation moves them by a millionth.
LARGEST_ERROR = 1e-3


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    caches.root()
    try:
        if args.push:
            hub.check(args.push)
        error = export(args.checkpoint, args.to, args.out, args.which)
        _tell(args, error)
        if args.push:
            print(f"pushed: {hub.push(args.out, args.push, CARD, args.public)}")
    except (ValueError, OSError) as problem:  # the user's input: said, without a traceback
        say(f"error: {printable_lines(problem)}", sys.stderr)
        return 2
    return 0


def _tell(args: argparse.Namespace, error: float | None) -> None:
    opener = FORMATS[args.to].opened_by
    if error is None:
        print(f"{args.out}: not compared with the encoder, since {opener} is not installed")
    else:
        print(f"{args.out}: opened by {opener}, its features differ by {error:.1g} at most")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="cjepa-export",
        description=__doc__.strip(),
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--to", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new one")
    parser.add_argument("--which", choices=("target", "context"), default="target", help="encoder")
    parser.add_argument("--push", metavar="USER/NAME", help="also to Hugging Face's hub, private")
    parser.add_argument("--public", action="store_true", help="a model that --push makes is public")
    args = parser.parse_args(argv)
    if args.public and not args.push:
        parser.error("--public is for --push USER/NAME")
    return args


def export(checkpoint: Path, to: str, out: Path, which: str = "target") -> float | None:
    """Write the folder `out`, all of it or nothing.

    which: "target" or "context"; of a .safetensors file, what its name says.
    Returns the largest difference of features, None where the library to open it is missing.
    Raises ValueError or OSError for a checkpoint that cannot be read, a folder that is there, a
    package that is missing to write the form, and features that came out otherwise.
    """
    form = FORMATS[to]
    if missing := form.missing():
        raise ValueError(
            f"--to {to} needs {', '.join(missing)}: pip install '.[export]', or take "
            f"another of {', '.join(FORMATS)}"
        )
    with shown_clock(f"export to {to}"), new_folder(out) as folder:
        origin = origin_of(checkpoint)
        encoder = load_encoder(checkpoint, which)
        source = Source(encoder, held_in(checkpoint, which), encoder.crop)
        form.write(source, folder)
        error = difference(source, form, folder)
        files = sorted(path.name for path in folder.iterdir())
        (folder / CARD).write_text(
            card(source, origin, to, out.resolve().name, files), encoding="utf-8"
        )
    return error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which bears its name once it is whole. Raises ValueError where one is."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"--out {path} is there already, and not empty: name another, or remove it"
        )
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by one that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def difference(source: Source, form: Format, folder: Path) -> float | None:
    """The largest of any feature of two images of noise, encoder against export.

    None where the library to open it is not installed. Raises ValueError above LARGEST_ERROR.
    """
    if not is_installed(form.opened_by):
        return None
    shape = source.encoder.channels, *height_width(source.encoder.image_size)
    images_BCHW = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    exported_BND = form.open(folder)(images_BCHW)
    error = (exported_BND - source.encoder(images_BCHW)).abs().max().item()
    if not error <= LARGEST_ERROR:
        raise ValueError(
            f"the export's features differ from the encoder's by {error:.2g}: nothing was written. "
            f"Is {form.opened_by} of a version with other defaults?"
        )
    return error


if __name__ == "__main__":
    sys.exit(main())
