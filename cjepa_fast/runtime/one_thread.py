"""Threads beside the training's that compute without an OpenMP pool of their own."""

import torch
from threadpoolctl import threadpool_limits


def compute_on_one_thread() -> None:
    """Call first in a thread that computes beside the training's step.

    OpenMP would else give it a pool of threads that stays, and where that pool and the step's
    outnumber the cores, both sleep instead of spinning at every one of the step's small operations:
    on 2 cores the demo's step then takes half as long again (measured). The other threads keep
    theirs.
    """
    torch.get_num_threads()  # at its first use in a thread torch sets their number
    threadpool_limits(1, user_api="openmp")  # of this thread alone
