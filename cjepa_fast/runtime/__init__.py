"""The machine and its processes: what the hardware can do, ranks, locks, signals, reports."""
