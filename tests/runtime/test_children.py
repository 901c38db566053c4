"""What a process has started ends with it, also where it is killed without notice."""

import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

CHILD = """
import time
from cjepa_fast.runtime import children
children.end_with_parent()
print("ready", flush=True)
time.sleep(600)
"""
PARENT = f"""
import signal, subprocess, sys
from cjepa_fast.runtime import children
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
command = [sys.executable, "-c", {CHILD!r}]
child = subprocess.Popen(command, env=children.environment(), stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_child_ends_with_its_parent(number):
    command = [sys.executable, "-c", PARENT]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=tiny.environment())
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.send_signal(number)
    parent.wait()
    give_up_s = time.monotonic() + tiny.HANG_S
    while alive(child) and time.monotonic() < give_up_s:
        time.sleep(0.05)
    assert not alive(child)


def test_a_child_whose_parent_ended_while_it_imported_ends_too():
    parent = subprocess.Popen(["true"])
    parent.wait()
    own = tiny.environment() | {"CJEPA_PARENT": str(parent.pid)}
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, env=own, timeout=500)
    assert done.returncode == -signal.SIGTERM


def test_where_a_shell_is_the_parent_nothing_is_watched():
    """`nohup cjepa-train ... &` outlives its shell."""
    code = f"import threading\n{CHILD.replace('time.sleep(600)', 'print(threading.enumerate())')}"
    own = {k: v for k, v in tiny.environment().items() if k not in ("CJEPA_PARENT", "LOCAL_SIZE")}
    own.pop("TORCHELASTIC_RUN_ID", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own)
    assert "ready" in done.stdout and "parent" not in done.stdout
    own["CJEPA_PARENT"] = str(os.getpid())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own)
    assert "parent" in done.stdout


@pytest.mark.parametrize(
    "file",
    ["cjepa_fast/demo.py", "cjepa_fast/tools/ablate.py", "cjepa_fast/tools/doctor.py",
     "cjepa_fast/eval/compare.py", "cjepa_fast/data/sets/shapes.py", "bench/throughput.py"],
)  # fmt: skip
def test_every_process_of_ours_is_told_its_parent(file):
    text = (tiny.ROOT / file).read_text()
    assert "children.environment(" in text and "subprocess." in text
