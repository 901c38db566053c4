"""Run the commands that README.md, docs/ and configs/README.md show: `make docs-check`.

Each is run as it stands there, in a folder of its own, with small things instead of large ones: the
images are a handful, RUN a run of them, the configuration that of tests/tiny.py. What cannot be run
so has a line in ELSEWHERE that says where it is tried. Arguments choose pages (docs/kernels.md) and
commands (a word of theirs).
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dense_sets
import tiny

ROOT = tiny.ROOT
PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "configs/README.md", "bench/README.md")
    ),
    *sorted((ROOT / "docs").glob("*.md")),
]
WORDS = r"(python|torchrun|deepspeed|make|source|sbatch|pip|bench/\S+\.sh|cjepa-\w+)"
ELSEWHERE = {
    r"cjepa-eval TASK": "below it, task by task",
    r"make (demo|test)": "continuous integration, and a fresh clone",
    r"source ": "needs no test",
    r"sbatch ": "tests/runtime/test_launch.py, with stand-ins for SLURM",
    r"deepspeed .*--(hostfile|num_nodes)": "tests/runtime/test_launch.py",
    r"torchrun .*--nnodes": "tests/runtime/test_launch.py",
    r"cjepa-eval detect ": "tests/eval/test_eval_detect.py, where torchvision is not installed",
    r"cjepa-eval clevr .*CLEVR": "tests/eval/test_eval_clevr.py",
    r"cjepa-ablate beta": "it wants four GPUs; the other is run",
    r".*data.channels=1": "tests/training/test_channels_run.py: the images here are RGB",
    r"cjepa-train .*run.init_from=FILE": "tests/training/test_init_from.py",
    r"cjepa-export .*--push": "tests/export/test_hub.py: it needs an account",
    r"pip (install|download)": "by hand: it changes the environment",
    r"bench/gpu_gate.sh": "by hand, at toy size: minutes on a CPU",
}
SMALL = (
    "--set data.image_size=24 --set model.width=24 --set model.heads=3 --set model.depth=1 "
    "--set predictor.width=12 --set predictor.depth=1 --set mask.min_keep=4 --set run.epochs=1 "
    "--set data.batch_size=32 --set eval.k=3 --set eval.online.share=1.0"
)
ON_IMAGES = (
    "--set data.path=my/images --set eval.online.data=my/images --set data.micro_batch_size=32 "
    "--set model.patch_size=4"
)
PLAIN = "--set epochs=1 batch=8 rand_augment=null"
SHORT = {  # instead of what would take long
    r"^deepspeed (?=--module|\S+\.py)": "deepspeed --num_gpus 2 ",
    r"(eval finetune .*)": rf"\1 {PLAIN}",
    r"(eval attentive .*)": r"\1 --set epochs=1",
    r"(eval segment .*)": r"\1 --steps 2 --batch-size 2 --crop-size 24 --short-side 24",
    r"--slide \d+": "--slide 12",
    r"--pool last4": "",  # of an encoder of one block
    r"--nproc_per_node[= ]\d+": "--nproc_per_node=2",
    r"--save$": "",
    r"(eval video .*)": r"\1 --short-side 40",
    r"(?<=bench/ops.py)$": " --help",
    r"--size \d+": "--size 48",
    r"(ablate vicreg .*)": rf"\1 {SMALL}",
    r"(ablate demo .*)": rf"\1 {SMALL} {ON_IMAGES}",
}


class Command(NamedTuple):
    page: Path
    line: int
    text: str

    @property
    def elsewhere(self) -> str | None:
        return next((why for how, why in ELSEWHERE.items() if re.match(how, self.text)), None)


def commands(page: Path) -> Iterator[Command]:
    """The shell lines of a page's indented blocks, continuation lines joined, comments cut."""
    begun: Command | None = None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        text = re.sub(r"\s+# .*", "", line).strip()
        if begun:
            begun = begun._replace(text=begun.text[:-1] + text)
        elif re.match(rf"    {WORDS}(\s|$)", line) and not re.match(r"    \S+/?\s{2,}", line):
            begun = Command(page, number, text)
        if begun and not begun.text.endswith("\\"):
            yield begun
            begun = None


def write_parquet(file: Path, images: list[Path]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir()
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in images]
    labels = [path.parent.name for path in images]
    pq.write_table(pa.table({"image": rows, "label": labels}), file)


def write_cifar10(folder: Path) -> None:
    """As CIFAR-10's binary version lies on disk: rows of a label and 3 x 32 x 32 bytes."""
    folder.mkdir()
    names = [f"class{i}" for i in range(10)]
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    for number, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        rows = bytes(
            byte
            for i in range(20)
            for byte in (i % 10, *([number] * 1024 + [i] * 1024 + [255] * 1024))
        )
        (folder / f"{name}.bin").write_bytes(rows)


def example_module(name: str, page: str = "python.md") -> str:
    """The indented block of a page of docs/ whose first line ends with the file's name."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.endswith(f"  # {name}"))
    block = itertools.takewhile(lambda line: not line or line.startswith("    "), lines[first:])
    return "\n".join(line[4:] for line in block) + "\n"


def prepared(folder: Path) -> Path:
    """The folder in which commands run, which is on sys.path: the sources, sets of images, a module
    of the user's, and a run. Its config file."""
    (folder / "my_probes.py").write_text(example_module("my_probes.py"))
    script = example_module("make_cifar10.py", "choosing_a_config.md")
    (folder / "make_cifar10.py").write_text(script)
    write_cifar10(folder / "cifar-10-batches-bin")
    for name in ("cjepa_fast", "kernels", "bench", "configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    tiny.write_images(folder / "my" / "images", count=60, classes=3)
    (folder / "my" / "labelled").mkdir()
    (folder / "my" / "labelled" / "images").symlink_to(folder / "my" / "images")
    for name in ("train", "val"):
        shutil.copytree(folder / "my" / "images", folder / "my" / name)
    (folder / "imagenette2-320").symlink_to(folder / "my")
    images = sorted((folder / "my" / "images").glob("*/*.jpg"))
    lines = (f"{p.parent.name}/{p.name} {p.parent.name}\n" for p in images)
    (folder / "my" / "val_labels.txt").write_text("".join(lines))
    write_parquet(folder / "my" / "dataset" / "train.parquet", images)
    dense_sets.write_davis(folder / "my" / "DAVIS")
    dense_sets.write_pairs(folder / "my" / "ADEChallengeData2016", {"train": 4, "val": 2})
    config = tiny.write_config(folder, data={"path": str(folder / "my" / "images")}, eval={"k": 3})
    for name in ("vit_s", "vit_b", "vit_h", "cifar10_vit_t"):
        done = tiny.train("--config", config, "--set", f"run.dir={folder / 'runs' / name}")
        if done.returncode:
            raise SystemExit(done.stderr)
    return config


def as_run(command: Command, folder: Path, config: Path, number: int) -> str:
    """The command with what is small instead of what is large."""
    text = command.text.replace("/my/", f"{folder}/my/")
    for pattern, short in SHORT.items():
        text = re.sub(pattern, short, text)
    if not text.startswith("cjepa-plan"):
        names = r"(?<=--config |..--base )(((\w+_)?vit_\w+|demo|ijepa_h)(\.json)? ?)+"
        text = re.sub(names, lambda m: f"{config} " * len(m[0].split()), text)
    if re.search(r"train\.py|cjepa_fast\.train |^cjepa-train ", text) and "run.dir" not in text:
        text += f" --set run.dir={folder}/runs/{number}"
    scripts = {"cjepa-eval": "cjepa_fast.eval", "cjepa-export": "cjepa_fast.export"}
    scripts |= {"cjepa-plan": "cjepa_fast.tools.plan", "cjepa-train": "cjepa_fast.train"}
    scripts |= {"cjepa-report": "cjepa_fast.tools.report", "torchrun": "torch.distributed.run"}
    scripts |= {"cjepa-embed": "cjepa_fast.eval embed", "cjepa-pack": "cjepa_fast.data.pack"}
    scripts |= {"cjepa-ablate": "cjepa_fast.tools.ablate"}
    first, _, rest = text.partition(" ")
    if first == "deepspeed":
        return shlex.join([str(Path(sys.prefix, "bin", "deepspeed"))]) + f" {rest}"
    python = shlex.quote(sys.executable)
    return f"{python} -m {scripts[first]} {rest}" if first in scripts else f"{python} {rest}"


def notebook_commands() -> Iterator[Command]:
    """The cells of docs/'s notebooks as a script, which draws to no screen."""
    for page in sorted((ROOT / "docs").glob("*.ipynb")):
        cells = json.loads(page.read_text())["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        yield Command(page, 1, shlex.join(["python", "-c", code]))


def chosen(command: Command, arguments: list[str]) -> bool:
    pages = {ROOT / name for name in arguments if name.endswith((".md", ".ipynb"))}
    words = [word for word in arguments if ROOT / word not in pages]
    return command.page in (pages or {command.page}) and all(w in command.text for w in words)


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = prepared(folder)
        cache = {"XDG_CACHE_HOME": str(folder / "cache"), "MPLBACKEND": "agg"}
        shown = itertools.chain(*map(commands, PAGES), notebook_commands())
        for number, command in enumerate(shown):
            text = command.text.partition("\n")[0]
            where = f"{command.page.relative_to(ROOT)}:{command.line}: {text}"
            if not chosen(command, sys.argv[1:]):
                continue
            if command.elsewhere:
                print(f"-     {where}  ({command.elsewhere})", flush=True)
                continue
            began = time.monotonic()
            done = subprocess.run(
                as_run(command, folder, config, number), shell=True, cwd=folder, text=True,
                capture_output=True, env={**tiny.environment(), **cache},
            )  # fmt: skip
            bad = done.returncode != 0
            failed += bad
            print(f"{'FAIL' if bad else 'ok  '}  {where}  ({time.monotonic() - began:.0f} s)",
                  flush=True)  # fmt: skip
            if bad:
                print(done.stdout[-2000:] + done.stderr[-2000:])
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
