"""The breaks of break_kernels.py still fit the kernels' source."""

import break_kernels
import pytest


@pytest.mark.parametrize("one", break_kernels.BREAKS, ids=lambda b: f"{b.function}-{b.what}")
def test_a_break_fits_the_source(one):
    assert break_kernels.source_with(one) != break_kernels.text_of(one)
