"""torch's CPU threads spin as briefly as the package asks, or as its user does."""

import re
import subprocess
import sys

import pytest
from tiny import environment


def counts(**given: str) -> set[str]:
    """What libgomp says of its count, as torch is imported by the package."""
    kept = {
        k: v for k, v in environment().items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    command = [sys.executable, "-c", "import cjepa_fast.runtime.hardware"]
    env = kept | {"OMP_DISPLAY_ENV": "VERBOSE"} | given
    told = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stderr
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("torch's OpenMP is not libgomp here")
    return set(re.findall(r"GOMP_SPINCOUNT = '(\w+)'", told))


def test_threads_sleep_soon_and_a_users_choice_stays():
    assert counts() == {"4000"}
    assert counts(GOMP_SPINCOUNT="77") == {"77"}
    assert "4000" not in counts(OMP_WAIT_POLICY="active")
