"""Which configuration of a kernel is the fastest: written by `python bench/ops.py --tune`.

By architecture and kernel, the index in its list of candidates; the first where nothing is named.
"""

TUNED: dict[str, dict[str, int]] = {
    "sm_90": {
        "add_norm backward 1280": 1,
        "add_norm backward 1408": 1,
        "attention 128x128": 2,
        "attention 128x32": 3,
        "attention 128x64": 2,
        "attention 256x24": 2,
        "attention backward 64x64": 2,
    },
}
