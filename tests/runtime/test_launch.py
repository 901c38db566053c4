"""Starting on several nodes: SLURM's scripts under stand-ins for its commands, and each launcher as
two nodes of one machine, which must train as one launch of two ranks does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forks
import psutil
import pytest
import tiny
from test_train import same_weights

from cjepa_fast import checkpoint
from cjepa_fast.runtime import launchers

SCRIPTS = tiny.ROOT / "scripts"
TRAIN = tiny.ROOT / "cjepa_fast" / "train.py"
PIPED = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

# --- SLURM

# srun starts TASKS processes on the nodes of NODES (as many on each), kills them all for a SIGTERM
# of its own, and hands on the worst status. scancel signals the step's own processes alone.
SRUN = """
import os, signal, subprocess, sys
args = sys.argv[1:]
while args[0].startswith("--"):
    del args[0]
nodes, tasks = os.environ["NODES"], int(os.environ["TASKS"])
each = tasks // len(nodes.split(","))
step = {"SLURM_NTASKS": str(tasks), "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_NUM_NODES": str(len(nodes.split(",")))}
running = [
    subprocess.Popen(args, env=os.environ | step | {
        "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % each)})
    for task in range(tasks)
]
signal.signal(signal.SIGTERM, lambda *_: [process.kill() for process in running])
with open("pids", "w") as file:
    print(*(process.pid for process in running), file=file)
statuses = [process.wait() for process in running]
sys.exit(max(128 - status if status < 0 else status for status in statuses))
"""
SCANCEL = """
import os, sys
assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
for pid in open("pids").read().split():
    os.kill(int(pid), 15)
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print(*sys.argv[3].split(","), sep="\\n")
elif sys.argv[1:3] == ["show", "job"]:
    print("PreemptEligibleTime=2026-01-01 PreemptTime=" + os.environ.get("PREEMPTED", "None"))
else:
    print(*sys.argv[1:], file=open("scontrol.log", "a"))
"""


def on_the_cpu() -> dict[str, str]:
    return tiny.environment() | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a job: stand-ins for SLURM's commands, and the tree, in tmp_path."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, code in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (commands / name).write_text(f"#!{sys.executable}\n{code}")
        (commands / name).chmod(0o755)
    for name in ("cjepa_fast", "scripts"):
        (tmp_path / name).symlink_to(tiny.ROOT / name)
    job = {"SLURM_JOB_ID": str(tiny.free_port()), "NODES": "localhost", "TASKS": "1"}
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    return on_the_cpu() | job | {"SLURM_JOB_NUM_NODES": "1", "PATH": path}


def submitted(folder: Path, environment: dict, *args) -> subprocess.Popen:
    command = ["bash", SCRIPTS / "train.sbatch", *map(str, args)]
    return subprocess.Popen(command, env=environment, cwd=folder, **PIPED)


def wait_for(condition, process: subprocess.Popen) -> None:
    def holds() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return condition()

    tiny.wait_for(holds)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "nodes", "steps"),  # enough that the signal comes long before the end
    [
        ("1", "localhost", 200),
        pytest.param("2", "localhost,other", 80, marks=pytest.mark.multiprocess),
    ],
)
def test_a_slurm_job_saves_before_its_limit_is_requeued_and_finishes(
    cluster, tmp_path, tasks, nodes, steps
):
    cluster |= {"TASKS": tasks, "NODES": nodes, "SLURM_JOB_NUM_NODES": tasks}
    config = tiny.write_config(tmp_path, run={"epochs": steps // 2}, checkpoint={"every_steps": 0})
    log, queue = tmp_path / "run" / "log.jsonl", tmp_path / "scontrol.log"
    job = submitted(tmp_path, cluster, "--config", config)
    wait_for(lambda: log.exists() and log.read_text(), job)
    job.send_signal(signal.SIGUSR1)  # as SLURM does, of the batch script alone
    out, err = job.communicate(timeout=tiny.HANG_S)
    assert job.returncode == 0, err
    step = json.loads((checkpoint.latest(tmp_path / "run") / "state.json").read_text())["step"]
    assert 1 <= step < steps and f"stopped after step {step}; resume with: sbatch " in out
    assert queue.read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"

    for _ in ("resumes to its end", "finds nothing left to do")[: 2 if tasks == "1" else 1]:
        job = submitted(tmp_path, cluster, "--config", config)  # by SLURM, as it was
        out, err = job.communicate(timeout=tiny.HANG_S)
        assert job.returncode == 0 and "done: " in out, err
        assert list(tiny.losses(tmp_path / "run")) == list(range(1, steps + 1))
        assert (tmp_path / "run" / "encoder.safetensors").exists()
    assert len(queue.read_text().splitlines()) == 1


@pytest.mark.parametrize("preempted", ["None", "2026-01-01T12:00:00"])
def test_a_slurm_job_that_ends_while_it_is_preempted_is_requeued(cluster, tmp_path, preempted):
    cluster |= {"PREEMPTED": preempted}
    job = submitted(tmp_path, cluster, "--config", tiny.write_config(tmp_path), "--print-config")
    _, err = job.communicate(timeout=tiny.HANG_S)
    assert job.returncode == 0, err
    assert (tmp_path / "scontrol.log").exists() == (preempted != "None")


def test_a_slurm_job_that_fails_is_not_requeued(cluster, tmp_path):
    job = submitted(tmp_path, cluster, "--config", tiny.write_config(tmp_path), "--set", "x.y=1")
    _, err = job.communicate(timeout=tiny.HANG_S)
    assert job.returncode == 2 and "error: x = " in err
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize("option", [["--resume", "x"], ["--resume=x"]])
def test_a_slurm_job_refuses_another_checkpoint_in_one_line(cluster, tmp_path, option):
    job = submitted(tmp_path, cluster, "--config", "tiny.json", *option)
    out, err = job.communicate(timeout=tiny.HANG_S)
    assert job.returncode == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {option[0]}: this script resumes by itself")


def test_slurm_tasks_are_numbered_and_meet_on_the_first_node(cluster, tmp_path):
    cluster |= {"TASKS": "4", "NODES": "first,second"}
    names = ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    shown = f"import os; os.write(1, (' '.join(map(os.environ.get, {names})) + '\\n').encode())"
    command = ["srun", "--nodes=2", "scripts/slurm_task.sh", sys.executable, "-c", shown]
    done = subprocess.run(command, env=cluster, cwd=tmp_path, capture_output=True, text=True)
    ends = f"4 first {cluster['SLURM_JOB_ID']}"  # the port is of the job's number
    lines = sorted(done.stdout.splitlines())
    ranks = ["0 0 2", "1 1 2", "2 0 2", "3 1 2"]
    assert lines == [f"{rank} {ends}" for rank in ranks], done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.iterdir()))
def test_scripts_are_bash(script):
    checked = subprocess.run(["bash", "-n", SCRIPTS / script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert os.access(SCRIPTS / script, os.X_OK)


def test_the_page_on_nodes_names_only_what_exists():
    text = (tiny.ROOT / "docs" / "multi_node.md").read_text()
    for path in re.findall(r"\b(?:cjepa_fast|bench|scripts|tests)/\w+\.(?:py|sh|sbatch)", text):
        assert (tiny.ROOT / path).is_file(), path
    assert len(text.splitlines()) < 150


# --- the command that resumes

MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8"}
DEEPSPEED = {"LOCAL_SIZE": "8"}
SLURM = {"SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16"}
TAIL = "cjepa_fast/train.py --config vit_h.json --resume auto"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, f"python {TAIL}"),
        ({"GROUP_WORLD_SIZE": "1", **TORCHRUN}, f"torchrun --nproc_per_node=8 {TAIL}"),
        (
            {"GROUP_WORLD_SIZE": "2", **TORCHRUN, **MEETING, **SLURM, "RANK": "0"},
            "torchrun --nproc_per_node=8 --nnodes=2 --node_rank=NODE_RANK --master_addr=n1 "
            f"--master_port=29500 {TAIL}",
        ),
        ({"CROSS_SIZE": "1", **DEEPSPEED}, f"deepspeed --num_gpus 8 {TAIL}"),
        (
            {"CROSS_SIZE": "2", **DEEPSPEED, **MEETING},
            "deepspeed --num_gpus 8 --num_nodes=2 --hostfile=HOSTFILE --master_addr=n1 "
            f"--master_port=29500 {TAIL}",
        ),
        (
            {"RANK": "0", "CJEPA_SLURM_TASK": "1", "SLURM_GPUS_PER_NODE": "8", **SLURM},
            "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 scripts/train.sbatch "
            "--config vit_h.json",
        ),
        (SLURM, f"python {TAIL}"),  # a shell inside a job
        ({"RANK": "0", "SLURM_PROCID": "0"}, f"python {TAIL}"),  # numbered by hand in one
    ],
)
def test_the_command_that_goes_on_is_of_the_launcher_that_started(monkeypatch, environment, told):
    known = {**MEETING, **TORCHRUN, **DEEPSPEED, **SLURM}
    own = ("RANK", "CJEPA_SLURM_TASK", "GROUP_WORLD_SIZE", "CROSS_SIZE", "SLURM_GPUS_PER_NODE")
    for name in [*known, *own]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    typed = ["train.py", "--local_rank=0", "--config", "vit_h.json", "--resume", "x"]
    monkeypatch.setattr(sys, "argv", typed)
    assert launchers.resume_command() == told


def test_where_there_is_no_checkout_it_is_the_installed_module(monkeypatch, tmp_path):
    for name in ("RANK", "GROUP_WORLD_SIZE", "CROSS_SIZE", "TORCHELASTIC_RUN_ID", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["cjepa-train", "--config", "demo"])
    monkeypatch.chdir(tmp_path)
    told = "-m cjepa_fast.train --config demo --resume auto"
    assert launchers.resume_command() == f"python {told}"
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    assert launchers.resume_command() == f"deepspeed --num_gpus 8 --module{told[2:]}"


# --- two nodes


@pytest.fixture(scope="module")
def one_node(tmp_path_factory) -> Path:
    """The run's folder of two ranks started together, on the CPU as all here."""
    folder = tmp_path_factory.mktemp("one_node")
    args = ["--config", str(tiny.write_config(folder))]
    done = forks.run(TRAIN, args, 2, on_the_cpu(), tiny.HANG_S)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def begun(command: list[str], environment: dict, folder: Path) -> tuple:
    """A node's command, begun, and the files with its stdout and stderr."""
    folder.mkdir()
    out, err = folder / "stdout", folder / "stderr"
    for file in (out, err):
        file.touch()
    return forks.begin(command, environment, out, err), out, err


def ended(nodes: list[tuple]) -> list[tuple[str, str]]:
    """stdout and stderr of each, once all have ended."""
    try:
        for node, *_ in nodes:
            node.wait(tiny.HANG_S)
    finally:
        for node, *_ in nodes:
            if node.poll() is None:
                os.kill(node.pid, signal.SIGKILL)
    return [(out.read_text(), err.read_text()) for _, out, err in nodes]


def torchrun(*options: str, config: Path) -> list[str]:
    command = [sys.executable, f"{sys.prefix}/bin/torchrun", *options]
    return [*command, str(TRAIN), "--config", str(config)]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.multiprocess
def test_torchrun_starts_again_where_a_rank_died(tmp_path):
    """Without the variable the second attempt finds the first one's ports in the shared store."""
    config = tiny.write_config(tmp_path, run={"epochs": 30}, checkpoint={"every_steps": 5})
    options = ["--nproc_per_node=2", "--max-restarts=2", "--rdzv_backend=c10d"]
    command = torchrun(*options, f"--rdzv_endpoint=127.0.0.1:{tiny.free_port()}", config=config)
    own = on_the_cpu() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    node = begun([*command, "--resume", "auto"], own, tmp_path / "node")
    tiny.wait_for(lambda: checkpoint.latest(tmp_path / "run") or node[0].poll() is not None)
    psutil.Process(node[0].pid).children()[-1].kill()
    ((out, err),) = ended([node])
    assert node[0].poll() == 0 and "done: " in out, err
    assert "exitcode: -9" in err
    assert list(tiny.losses(tmp_path / "run")) == list(range(1, 61))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.multiprocess
def test_nodes_that_have_other_images_are_refused(tmp_path):
    config = tiny.write_config(tmp_path, data={"path": "$IMAGES_OF_NODE", "batch_size": 16})
    tiny.write_images(tmp_path / "fewer", count=39)
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
    meeting += [f"--master_port={tiny.free_port()}"]
    nodes = [
        begun(
            torchrun(*meeting, f"--node_rank={n}", config=config),
            on_the_cpu() | {"IMAGES_OF_NODE": str(tmp_path / images)},
            tmp_path / f"node_{n}",
        )
        for n, images in enumerate(("images", "fewer"))
    ]
    said = [err for _, err in ended(nodes)]
    assert all(node.poll() for node, *_ in nodes)
    assert (
        "the nodes see different image sets: 40 images on" in said[0] and ", 39 images" in said[0]
    )
    assert not (tmp_path / "run").exists()


def train_on_nodes(commands: list[list[str]], environment: dict, folder: Path) -> list[str]:
    """Run a command a node, all at once. Returns what each printed."""
    nodes = [begun(one, environment, folder / f"node_{n}") for n, one in enumerate(commands)]
    printed = ended(nodes)
    for (node, *_), (_, err) in zip(nodes, printed, strict=True):
        assert node.poll() == 0, err
    return [out for out, _ in printed]


def assert_trained_as(one: Path, other: Path) -> None:
    """The same losses at every step and the same state at the end, bit for bit."""
    assert len(tiny.losses(one)) == 4 and tiny.losses(one) == tiny.losses(other)
    assert same_weights(checkpoint.latest(one), checkpoint.latest(other))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.multiprocess
def test_torchrun_on_two_nodes_trains_as_on_one(one_node, tmp_path):
    config, port = tiny.write_config(tmp_path), tiny.free_port()
    meeting = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
    ]
    commands = [torchrun(*meeting, f"--node_rank={n}", config=config) for n in range(2)]
    train_on_nodes(commands, on_the_cpu(), tmp_path)
    assert_trained_as(one_node, tmp_path / "run")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_hostfile_of_two_nodes_trains_as_one(one_node, tmp_path):
    config, hosts = tiny.write_config(tmp_path), tmp_path / "hostfile"
    hosts.write_text("a slots=1\nb slots=1\n")
    launch = [
        sys.executable, f"{sys.prefix}/bin/deepspeed", "--no_ssh", "--num_nodes=2",
        f"--hostfile={hosts}",
        "--master_addr=127.0.0.1", f"--master_port={tiny.free_port()}",
    ]  # fmt: skip
    train = [str(TRAIN), "--config", str(config)]
    commands = [[*launch, f"--node_rank={n}", *train] for n in range(2)]
    train_on_nodes(commands, on_the_cpu(), tmp_path)
    assert_trained_as(one_node, tmp_path / "run")


@pytest.fixture
def network():
    """Two network namespaces on one wire: (name, address) of each."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    ends = [(f"cj{os.getpid()}{end}", f"10.197.5.{n}") for n, end in enumerate("ab", 1)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        for name, _ in ends:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        (a, _), (b, _) = ends
        ip("link", "add", "wire", "netns", a, "type", "veth", "peer", "name", "wire", "netns", b)
        for name, address in ends:
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    else:
        yield ends
    finally:
        for name, _ in ends:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.multiprocess
def test_nodes_with_addresses_of_their_own_train_as_one(one_node, tmp_path, network):
    config = tiny.write_config(tmp_path)
    meeting = ["--nnodes=2", "--nproc_per_node=1", f"--master_addr={network[0][1]}"]
    commands = [
        ["ip", "netns", "exec", name, *torchrun(*meeting, f"--node_rank={n}", config=config)]
        for n, (name, _) in enumerate(network)
    ]
    train_on_nodes(commands, on_the_cpu() | {"GLOO_SOCKET_IFNAME": "wire"}, tmp_path)
    assert_trained_as(one_node, tmp_path / "run")
