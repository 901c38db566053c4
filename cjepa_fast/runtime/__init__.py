"""The machine and its ranks: what the hardware can do, ranks, locks, signals, reports."""
