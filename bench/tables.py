"""The tables that bench/throughput.py prints of its rows."""

COLUMNS = {  # heading: (key of a row, format)
    "config": ("config", "{}"),
    "data": ("data", "{}"),
    "batch": ("batch", "{}"),
    "images/s": ("images_per_s", "{:.1f}"),
    "step ms": ("step_ms", "{:.1f}"),
    "p10": ("step_ms_p10", "{:.1f}"),
    "p90": ("step_ms_p90", "{:.1f}"),
    "wait %": ("data_wait_pct", "{:.1f}"),
    "GFLOP/image": ("gflop_per_image", "{:.2f}"),
    "TFLOP/s": ("tflops", "{:.2f}"),
    "MFU % sheet": ("mfu_sheet_pct", "{:.1f}"),
    "% of matmul": ("mfu_matmul_pct", "{:.1f}"),
    "peak GiB": ("peak_gib", "{:.2f}"),
    "build s": ("build_s", "{:.1f}"),
    "warm-up s": ("warmup_s", "{:.1f}"),
}
SOMETIMES = {  # of several ranks, and of an NVIDIA GPU: shown where a row has them
    "images/s each": ("images_per_s_each", "{:.1f}"),
    "scaling %": ("scaling_pct", "{:.1f}"),
    "J/image": ("joules_per_image", "{:.3g}"),
    "W": ("power_w", "{:.0f}"),
    "SM MHz": ("sm_mhz", "{:.0f}"),
    "memory MHz": ("memory_mhz", "{:.0f}"),
    "throttled": ("throttled", "{}"),
}
AGAINST_COLUMNS = {
    "config": ("config", "{}"),
    "step": ("step", "{}"),
    "batch": ("batch", "{}"),
    "step ms": ("step_ms", "{:.1f}"),
    "p10": ("step_ms_p10", "{:.1f}"),
    "p90": ("step_ms_p90", "{:.1f}"),
    "images/s": ("images_per_s", "{:.1f}"),
    "ours is faster, times": ("ours_times", "{:.2f}"),
    "kept GiB": ("kept_gib", "{:.3f}"),
    "step GiB": ("step_gib", "{:.3f}"),
}
Columns = dict[str, tuple[str, str]]


def table(rows: list[dict], columns: Columns = COLUMNS) -> str:
    """A line a row, a failed one too."""
    lines = [list(columns)]
    for row in rows:
        if "failed" in row:
            lines.append([row["config"], row["failed"], *[""] * (len(columns) - 2)])
            continue
        cells = [(row.get(key), text) for key, text in columns.values()]
        lines.append(["-" if value is None else text.format(value) for value, text in cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines
    )


def columns_of(rows: list[dict]) -> Columns:
    """COLUMNS, and those of SOMETIMES that a row has."""
    shown = {
        heading: (key, text)
        for heading, (key, text) in SOMETIMES.items()
        if any(row.get(key) is not None for row in rows)
    }
    return COLUMNS | shown


def phase_table(rows: list[dict]) -> str:
    """Lines for each row that has phases: the milliseconds of the step's, and of those ahead."""
    lines = []
    for row in rows:
        kinds = {"ms": row.get("phases_ms"), "made ahead, ms a batch": row.get("ahead_ms")}
        for kind, phases in kinds.items():
            if phases:
                parts = ", ".join(f"{name} {ms:.1f}" for name, ms in phases.items())
                lines.append(
                    f"{row['config']}, {row['data']}, batch {row['batch']}, {kind}: {parts}\n"
                )
    return "".join(lines)
