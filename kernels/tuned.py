"""Which configuration of a kernel is the fastest: written by `python bench/ops.py --tune`.

By architecture and kernel, the numbers of one of its candidates; the first where nothing is named.
"""

TUNED: dict[str, dict[str, int | tuple]] = {
    "sm_90": {
        "add_norm backward 1408": (1, 2048, 8, 528, 1),
        "attention 128x128": (64, 32, 4, 2),
        "attention 128x32": (32, 32, 2, 2),
        "attention 128x64": (64, 32, 4, 2),
        "attention 256x24": (64, 32, 4, 2),
        "attention backward 64x64": (64, 0, 32, 4, 2, None),
    },
}
