"""Who started these processes, and the command that does it again."""

import os
import shlex
import sys
from pathlib import Path

MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
SLURM_TASK = "CJEPA_SLURM_TASK"  # set by scripts/slurm_task.sh


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def by_deepspeed() -> bool:
    return "LOCAL_SIZE" in os.environ and not by_torchrun()


def by_srun() -> bool:
    """Through scripts/slurm_task.sh; SLURM's own variables are in a shell of its job too."""
    return SLURM_TASK in os.environ and not by_torchrun() and not by_deepspeed()


def ranks_here() -> int:
    """On this node: as torchrun, slurm_task.sh or deepspeed says."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


def launcher() -> list[str]:
    """The command that started this process and its like, up to the script's name.

    In capitals stands what no environment tells: the deepspeed launcher's hostfile, and the rank of
    each node where a torchrun is started.
    """
    if by_torchrun():
        nodes = os.environ["GROUP_WORLD_SIZE"]
        command = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
        joined = [f"--nnodes={nodes}", "--node_rank=NODE_RANK"]
    elif by_deepspeed():
        nodes = os.environ.get("CROSS_SIZE", "1")
        command = ["deepspeed", "--num_gpus", os.environ["LOCAL_SIZE"]]
        joined = [f"--num_nodes={nodes}", "--hostfile=HOSTFILE"]
    elif by_srun():
        return ["srun", *_slurm_sizes(), "scripts/slurm_task.sh", "python"]
    else:
        return ["python"]
    if nodes == "1":
        return command
    return [*command, *joined, *(f"--{name.lower()}={os.environ[name]}" for name in MEETING_POINT)]


def resume_command() -> str:
    """The command line that resumes this process's training, by the launcher it came from."""
    kept = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
    while "--resume" in kept:
        at = kept.index("--resume")
        del kept[at : at + 2]
    if by_srun():  # the batch script itself says --resume auto
        return shlex.join(["sbatch", *_slurm_sizes(), "scripts/train.sbatch", *kept])
    return shlex.join([*launcher(), *_program(), *kept, "--resume", "auto"])


def _program() -> list[str]:
    """What a launcher is given: the file of a checkout, or the installed module."""
    if Path("cjepa_fast/train.py").is_file():
        return ["cjepa_fast/train.py"]
    return ["--module" if launcher()[0] == "deepspeed" else "-m", "cjepa_fast.train"]


def _slurm_sizes() -> list[str]:
    nodes, gpus = int(os.environ["SLURM_JOB_NUM_NODES"]), os.environ.get("SLURM_GPUS_PER_NODE")
    each = int(os.environ["SLURM_NTASKS"]) // nodes
    of_gpus = [f"--gpus-per-node={gpus}"] if gpus else []
    return [f"--nodes={nodes}", f"--ntasks-per-node={each}", *of_gpus]
