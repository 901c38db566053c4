"""Where caches lie: the user's cache folder, or a temporary one where that cannot be written to."""

import os
import sys
import tempfile
from pathlib import Path

from cjepa_fast.runtime.printable import say

_found: set[Path] = set()  # that could be written to: asked once, not for each file of a large set


def folder(name: str) -> Path:
    """The folder of one of this package's caches."""
    return root() / "cjepa_fast" / name


def root() -> Path:
    """$XDG_CACHE_HOME or ~/.cache; else a temporary folder of the user's, which stderr names.

    Other packages' caches then go there too, by their variables. So commands call it as they begin.
    """
    wanted = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    nobodys = wanted.parts[0].startswith("~")  # the user has no home: no folder of that name
    if wanted in _found or (not nobodys and _can_be_written_to(wanted)):
        _found.add(wanted)
        return wanted
    own = Path(tempfile.gettempdir()) / f"cjepa_fast-{os.getuid()}"
    if not _can_be_written_to(own) or own.is_symlink() or own.stat().st_uid != os.getuid():
        own = Path(tempfile.mkdtemp(prefix="cjepa_fast-"))  # the name was somebody else's
    if os.environ.get("LOCAL_RANK", "0") == "0":
        said = f"{wanted} cannot be written to: caches go to {own}; XDG_CACHE_HOME names another"
        say(said, sys.stderr)
    os.environ["XDG_CACHE_HOME"] = str(own)
    for variable in ("MPLCONFIGDIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ.setdefault(variable, str(own / variable.lower()))
    return own


def _can_be_written_to(path: Path) -> bool:
    """Whether it is a folder, made here if need be, in which files can be made."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False
