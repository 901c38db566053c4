"""The Makefile's install rule: which Python, what is said, what an interruption leaves.

Its Python is a stand-in: a shell script that notes how it is called and installs nothing.
"""

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_setup import needs_make

ROOT = Path(__file__).resolve().parents[2]
pytestmark = needs_make
# $CALLS takes its calls; one that names $HANG waits, one that names $FAIL fails as pip does.
STAND_IN = """#!/bin/sh
if [ "$1" = -c ] && [ $# -gt 2 ]; then  # the script's `begin`
  echo "$4 $$" >"$3"; shift 4; exec setsid "$@"
fi
if [ "$1" = -c ]; then echo VERSION; exit; fi
case "$*" in *--version*) exit ;; esac
echo "$*" >>"$CALLS"
case "$*" in *"${HANG:-nothing}"*) echo "Collecting hanging (from x)"; sleep 100; exit 1 ;; esac
echo "WARNING: Location 'file:///nowhere' is ignored: it is neither a file nor a directory."
case "$*" in *"${FAIL:-nothing}"*) echo "ERROR: no matching distribution"; exit 1 ;; esac
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""
TOOLS = (
    *("make", "sh", "cat", "cp", "date", "find", "grep", "head", "mkdir", "mv"),
    *("ps", "rm", "sed", "setsid", "tail", "touch"),
)
STEPS = ("-m venv", "torch setuptools", "--editable", "--target")


class Clone:
    """A tree with the install rule, and a PATH of the Pythons it is given and a few tools."""

    def __init__(self, folder: Path):
        self.tree, self.bin, self.calls = folder / "tree", folder / "bin", folder / "calls"
        (self.tree / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("Makefile", "setup.py", "constraints.txt", "scripts/install.sh"):
            shutil.copy(ROOT / name, self.tree / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        brief = f'#!/bin/sh\n[ "$1" != 1 ] || set -- 0.05\nexec {shutil.which("sleep")} "$@"\n'
        self.add_script("sleep", brief)  # between two looks at whether a step is done

    def add_python(self, name: str, version: str) -> Path:
        return self.add_script(name, STAND_IN.replace("VERSION", version))

    def add_script(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "CALLS": str(self.calls), **more}

    def make(self, *arguments: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["make", *arguments], cwd=self.tree, env=self.environment(**more),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def start(self, step: str) -> subprocess.Popen:
        """`make install`, at a terminal's mercy, once it hangs in that step."""
        process = subprocess.Popen(
            ["make", "install"], cwd=self.tree, env=self.environment(HANG=step),
            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # a shell's background jobs, as these tests may be one, ignore SIGINT
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        while not any(step in call for call in self.called()):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        return process

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def left(self) -> set[str]:
        """What the install has left beside the tree's own files."""
        return {p.name for p in self.tree.iterdir() if p.name.startswith(".")}


@pytest.fixture
def clone(tmp_path) -> Clone:
    clone = Clone(tmp_path)
    clone.add_python("python3", "3.11")
    return clone


def test_an_install_takes_its_steps_once_and_shows_no_noise(clone):
    done = clone.make("install")
    assert done.returncode == 0, done.stderr
    assert [next(s for s in STEPS if s in call) for call in clone.called()] == list(STEPS)
    assert all("--constraint constraints.txt" in call for call in clone.called()[1:])
    assert "WARNING" not in done.stdout + done.stderr
    assert (clone.tree / ".venv.log").read_text().count("WARNING") == 4
    assert clone.left() == {".venv", ".venv.log"}
    assert not (clone.tree / ".venv" / ".unfinished").exists()
    again = clone.make("install")
    assert "up to date" in again.stdout + again.stderr or "Nothing" in again.stdout
    assert len(clone.called()) == 4


def test_a_changed_pin_installs_into_the_same_environment(clone):
    clone.make("install")
    (clone.tree / ".venv" / "mine").touch()
    os.utime(clone.tree / ".venv" / ".installed", (0, 0))
    assert clone.make("install").returncode == 0
    assert sum("-m venv" in call for call in clone.called()) == 1 and len(clone.called()) == 7
    assert (clone.tree / ".venv" / "mine").exists()


def left_running_in(tree: Path, within_s: float = 10) -> list[int]:
    """Processes whose working directory is there, once those that are dying have gone."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(process / "cwd")) == tree and (process / "cmdline").read_bytes():
                found.append(int(process.name))
    if found and within_s > 0:
        time.sleep(0.1)
        return left_running_in(tree, within_s - 0.1)
    return found


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("step", STEPS)
def test_the_call_after_an_interruption_mends_it(clone, step, sent):
    process = clone.start(step)
    (clone.tree / ".venv" / "half").touch()
    os.killpg(process.pid, sent)  # as a terminal does; pip and what it has started are in another
    said = process.communicate(timeout=20)[0]
    assert process.returncode != 0 and not (clone.tree / ".venv" / ".installed").exists()
    if sent != signal.SIGKILL:
        assert "interrupted" in said and ".venv.lock" not in clone.left()
        assert left_running_in(clone.tree) == []
    again = clone.make("install")
    assert again.returncode == 0 and "beginning anew" in again.stdout, again.stderr
    assert left_running_in(clone.tree) == []  # nor what the killed one had left
    assert not (clone.tree / ".venv" / "half").exists()
    assert (clone.tree / ".venv" / ".installed").exists() and clone.left() == {".venv", ".venv.log"}


def test_an_interruption_in_an_upgrade_is_mended_too(clone):
    clone.make("install")
    os.utime(clone.tree / ".venv" / ".installed", (0, 0))
    clone.calls.unlink()
    process = clone.start("--editable")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert "beginning anew" in clone.make("install").stdout


def test_two_installs_at_once_are_refused(clone):
    process = clone.start("--editable")
    script = int((clone.tree / ".venv.lock").read_text().split()[0])
    refused = clone.make("install")
    assert refused.returncode != 0 and f"process {script} installs" in refused.stderr
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=20)


def test_a_lock_whose_numbers_others_have_now_ends_nobody(clone):
    with subprocess.Popen(["sleep", "100"]) as other:
        (clone.tree / ".venv.lock").write_text(f"999999999 {other.pid}\n")
        assert clone.make("install").returncode == 0
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_failure_shows_the_end_of_the_log_and_no_noise(clone, step):
    done = clone.make("demo", FAIL=step)
    assert done.returncode != 0 and "ERROR: no matching distribution" in done.stderr
    assert ".venv.log" in done.stderr and "WARNING" not in done.stderr
    assert clone.make("install").returncode == 0


def test_a_step_that_somebody_kills_is_said_to_be_killed(clone):
    process = clone.start("--editable")
    os.kill(int((clone.tree / ".venv.lock").read_text().split()[1]), signal.SIGKILL)
    said = process.communicate(timeout=20)[0]
    assert process.returncode != 0 and "killed by signal 9" in said


def test_without_the_venv_module_the_package_is_named(clone):
    done = clone.make("install", FAIL="-m venv")
    assert done.returncode != 0 and "python3-venv" in done.stderr
    assert clone.left() == {".venv.log"}


def test_a_terminal_shows_one_line_of_progress(clone):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["make", "install"], cwd=clone.tree, env=clone.environment(HANG="--editable"),
        start_new_session=True, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = ""
    while "s. Collecting hanging" not in seen:
        seen += os.read(ours, 1000).decode()
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(20)
    os.close(ours)
    line = seen.rpartition("\r\x1b[K")[2]
    assert line.startswith("installing cjepa_fast") and len(line) < 80 and "\n" not in line


@pytest.mark.parametrize(
    ("version", "accepted"),
    [("2.7", False), ("3.9", False), ("3.10", True), ("3.13", True), ("3.14", False)],
)
def test_a_python_that_is_named_must_be_of_a_version_that_fits(clone, version, accepted):
    python = clone.add_python("python-mine", version)
    done = clone.make("test", f"PYTHON={python}", FAIL="-m venv")
    assert done.returncode != 0 and not (clone.tree / ".venv").exists()
    wrong = f"needs Python 3.10 to 3.13; '{python}' is Python {version}. Try: make test PYTHON=py"
    assert (wrong in done.stderr) != accepted
    assert ("python3-venv" in done.stderr) == accepted


@pytest.mark.parametrize("missing", [True, False])
def test_a_python_that_cannot_be_run_is_not_called_of_the_wrong_version(clone, missing):
    """As a shim of pyenv: a command that is there, and ends with an error."""
    if not missing:
        said = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"
        clone.add_script("python3.12", said)
    done = clone.make("install", "PYTHON=python3.12")
    assert done.returncode != 0 and "'python3.12' cannot be run" in done.stderr
    assert "not found" in done.stderr and "needs Python" not in done.stderr


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"python3": "3.9", "python3.12": "3.12"}, "python3.12, since python3 is Python 3.9"),
        ({"python3": "3.14", "python3.10": "3.10"}, "python3.10, since python3 is Python 3.14"),
        ({"python3.13": "3.13"}, "Python 3.13"),
    ],
)
def test_the_first_python_that_fits_is_found(tmp_path, there, said):
    clone = Clone(tmp_path)
    for name, version in there.items():
        clone.add_python(name, version)
    done = clone.make("install")
    assert done.returncode == 0 and said in done.stdout, done.stderr


def test_where_no_python_fits_each_is_named(tmp_path):
    clone = Clone(tmp_path)
    assert "no python3 is on the PATH" in clone.make("install").stderr
    clone.add_python("python3", "3.9")
    done = clone.make("install")
    assert done.returncode != 0 and "python3 is Python 3.9;" in done.stderr


def test_another_python_makes_the_environment_anew(clone):
    clone.make("install")
    other = clone.add_python("python-mine", "3.12")
    done = clone.make("install", f"PYTHON={other}")
    assert done.returncode == 0 and "not of Python 3.12: making it anew" in done.stdout
    same = clone.make("install", f"PYTHON={other}")
    assert same.returncode == 0 and len(clone.called()) == 8
