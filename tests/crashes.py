"""A worker of pytest-xdist that dies: what it was at is named, and all ends. For tests/conftest.py.

xdist names the test that a worker died in, but not the file that it imported: so each worker writes
that down. A new worker would take the same test or file again and die too, up to
eight times, or leave the whole hanging (xdist 3.8 with `--dist loadfile`): so none is started.
"""

import tempfile
from pathlib import Path

import pytest

_notes = pytest.StashKey[tempfile.TemporaryDirectory]()  # the main process's
_note = pytest.StashKey[Path]()  # this worker's


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """In the main process, before a worker starts."""
    folder = node.config.stash.setdefault(_notes, tempfile.TemporaryDirectory())
    node.workerinput["collecting"] = str(Path(folder.name) / node.gateway.id)


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "maxworkerrestart", "") is None:
        config.option.maxworkerrestart = "0"
    if path := getattr(config, "workerinput", {}).get("collecting"):
        config.stash[_note] = Path(path)


def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Module) and (note := collector.config.stash.get(_note, None)):
        note.write_text(collector.nodeid)


def pytest_collection_finish(session: pytest.Session) -> None:
    if note := session.config.stash.get(_note, None):
        note.unlink(missing_ok=True)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """In the main process, as a worker has ended."""
    note = Path(node.workerinput["collecting"])
    if error and note.exists():
        crashed = f"worker {node.gateway.id} crashed while {note.read_text()} was collected"
        pytest.exit(f"{crashed}; its stack is above: pytest {note.read_text()}", returncode=1)
