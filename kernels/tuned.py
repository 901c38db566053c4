"""Which configuration of a kernel is the fastest: written by `python bench/ops.py --tune`.

By architecture and kernel, the place in its list of candidates; the first where nothing is named.
"""

TUNED: dict[str, dict[str, int]] = {}
