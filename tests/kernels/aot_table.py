"""Whether bench/results/aot.md is of these kernels and these compilers; exits with 1 if not.

The table says what it is of in a line of its own. `make kernels-check` makes it anew. Of
aot_beside.md, by another Triton, it says the same of the kernels; that one fails nothing, since it
takes an environment of its own. This imports neither torch nor Triton.
"""

import hashlib
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "bench" / "results" / "aot.md"
BESIDE = TABLE.with_name("aot_beside.md")
KERNELS = ROOT / "kernels"


def ingredients() -> str:
    """The versions of Triton and torch, and a hash of all files of kernels/."""
    return f"{compilers()} and {sources()}"


def sources() -> str:
    found = hashlib.sha256()
    for path in sorted(KERNELS.rglob("*.py")):
        code = path.read_bytes()
        found.update(f"{path.relative_to(KERNELS).as_posix()} {len(code)}\n".encode() + code)
    return f"kernels/*.py with the hash {found.hexdigest()[:16]}."


def compilers() -> str:
    return "Of " + ", ".join(f"{name} {_version(name)}" for name in ("triton", "torch"))


def _version(name: str) -> str:
    return metadata.version(name).partition("+")[0]  # without "+cpu"


def is_current(table: Path = TABLE) -> bool:
    return ingredients() in table.read_text(encoding="utf-8").splitlines()


def is_of_these_kernels(table: Path = BESIDE) -> bool:
    """By whatever compiler."""
    lines = table.read_text(encoding="utf-8").splitlines()
    return any(x.startswith("Of triton ") and x.endswith(f" and {sources()}") for x in lines)


def is_of_these_compilers(table: Path = TABLE) -> bool:
    """Else it is no measure of what they make."""
    return any(x.startswith(f"{compilers()} ") for x in table.read_text("utf-8").splitlines())


def cells(table: Path = TABLE) -> dict[tuple[str, int], str]:
    """What it says of a kernel on an architecture, by name and number."""
    first = table.read_text().partition("\n## ")[0]  # the machine code's table follows
    rows = [x.strip("| ").split(" | ") for x in first.splitlines() if x[:1] == "|"]
    archs = [int(head.removeprefix("sm_")) for head in rows[0][2:]]
    return {
        (name, arch): cell
        for name, _, *found in rows[2:]
        for arch, cell in zip(archs, found, strict=False)
    }


def main() -> int:
    current = is_current()
    print(f"{TABLE.relative_to(ROOT)}: {_told(current)}. {ingredients()}")
    print(f"{BESIDE.relative_to(ROOT)}: {_told(is_of_these_kernels())}")
    return 0 if current else 1


def _told(current: bool) -> str:
    return "current" if current else "STALE"


if __name__ == "__main__":
    sys.exit(main())
