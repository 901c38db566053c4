"""How long torch's CPU threads spin for each other before they sleep."""

import os

COUNT = 4000  # libgomp has 300,000. 1,000 costs a small step a fifth where nothing else runs


def spin_briefly() -> None:
    """Call before torch is imported: its OpenMP on Linux (libgomp) reads the count once.

    At each barrier the early threads wait for the last one. While they spin they keep their
    processors, perhaps the one that the last thread needs because another process has its own. With
    libgomp's count that lasts for milliseconds (bench/spin.py). What a user has set stays.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(COUNT)
