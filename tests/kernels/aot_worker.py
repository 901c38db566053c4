"""Compile every kernel in every configuration without a GPU, and report what came out.

    aot_worker.py [--module gather ema.adamw ...] [--arch 80 90 100] [--only TEXT] [--shipped]
                  [--sample N] [--processes N] [--json F] [--markdown F] [--machine F]

A process of its own, since one that interprets kernels cannot compile them. Exits with 1 where a
kernel spills, needs more shared memory or registers than the device has, or lacks an instruction
that it must have; the report names it. With --sample, N drawn at random are compiled, and must be
as the committed table has them. Of what configs/ launch on sm_90 the machine code is read too
(machine_code.py); where it has taken a step back from the committed table, that is wrong as well,
unless --accept is given. Of other compilers than that table's, spills are told and are not wrong,
since the tiles were not chosen by them. --machine writes that part alone: of another version of
Triton, by the Python of its environment.
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import aot_table
import machine_code
import shipped
import triton
from kernel_checks import modules_to_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that a program may have (CUDA C++ Programming Guide, compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTER_FILE = 65536  # 4-byte registers of a multiprocessor, on all of these
READ = 90  # the architecture whose machine code is read


def compiled(one, arch: int):
    """Triton's compilation of a launch.Compiled for sm_`arch`."""
    names = one.kernel.arg_names
    signature = {n: one.signature.get(n, "constexpr") for n in names}
    aligned = {n for n, kind in signature.items() if kind.startswith("*")} | set(one.divisible)
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned}
    defaults = {p.name: p.default for p in one.kernel.params if p.has_default}
    source = ASTSource(one.kernel, signature, defaults | one.constexprs, attrs)
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, "debug": one.debug}
    options |= {"launch_pdl": True} if _waits(one) else {}
    options |= {"maxnreg": one.maxnreg} if one.maxnreg else {}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _waits(one) -> bool:
    """Whether it may begin before the kernel before it has ended, and has to wait for it."""
    return one.constexprs.get("PDL", False)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack (spills) a thread, as the assembler wrote them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BIN / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"]) + int(found["LOCAL"])}


def report(one, arch: int) -> dict:
    """One row: what the kernel takes on sm_`arch`, and what is wrong with it."""
    made = compiled(one, arch)
    row = {"name": one.name, "arch": arch, "warps": one.num_warps, **usage(made.asm["cubin"])}
    row["shared"] = made.metadata.shared
    row["found"] = sorted(
        {m.group() for p in one.must_have for m in re.finditer(p, made.asm["ptx"])}
    )
    wrong = [f"no {p}" for p in one.must_have if not re.search(p, made.asm["ptx"])]
    # A debug build keeps a stack for the assertion's call.
    kept = row["spills"] <= one.may_spill or one.debug
    spilled = [f"{row['spills']} bytes of spills"] * (not kept)
    code = machine_code.disassembled(made.asm["cubin"], BIN) if _waits(one) else ""
    wrong += machine_code.early(made.asm["ptx"], code, _waits(one))
    wrong += [f"{row['shared']} bytes of shared memory"] * (row["shared"] > SHARED[arch])
    wrong += ["too many registers"] * (row["registers"] * 32 * one.num_warps > REGISTER_FILE)
    if arch == READ and one.name in _read_names():
        fitting = machine_code.programs(row["registers"], row["shared"], one.num_warps, arch)
        row["code"] = machine_code.read(machine_code.disassembled(made.asm["cubin"], BIN), fitting)
    return row | {"wrong": wrong, "spilled": spilled}


@functools.cache
def _read_names() -> set[str]:
    """The kernels whose machine code is read: what the trainings in configs/ launch."""
    return shipped.shipped(READ)[0]


def hold_against(rows: list[dict], before: dict[str, machine_code.Code]) -> None:
    """Adds to what is wrong with a row where its machine code has taken a step back."""
    for row in rows:
        if "code" in row and row["name"] in before:
            row["wrong"] += machine_code.worse(before[row["name"]], row["code"])


def judge_spills(rows: list[dict], of_these: bool) -> None:
    """They are wrong where the tiles were chosen by these compilers; of others they are told."""
    for row in rows:
        row["wrong"] += row["spilled"] * of_these
        for told in row["spilled"] * (not of_these):
            print(f"{row['name']} on sm_{row['arch']}: {told} by {aot_table.compilers()[3:]}")


def compare(rows: list[dict]) -> None:
    """Adds to what is wrong with a row that the committed table has another one."""
    cells = aot_table.cells()
    for row in rows:
        there = cells.get((row["name"], row["arch"]))
        if there != _cell(row):
            row["wrong"].append(f"{_cell(row)}, where the table has {there}")


def kernels(chosen: list[str] | None, only: str) -> list:
    """Of the chosen modules and folders of kernels/, or of all."""
    modules = modules_to_compile()
    wanted = tuple(f"{name}." for name in chosen or modules)
    assert all(any(f"{name}.".startswith(w) for name in modules) for w in wanted), wanted
    taken = [module for name, module in modules.items() if f"{name}.".startswith(wanted)]
    made = [one for module in taken for one in module.ahead_of_time()]
    assert len({one.name for one in made}) == len(made), "two of one name"
    return [one for one in made if only in one.name]


_jobs: list = []  # (a launch.Compiled, an architecture): kernels cannot be sent to a process


def _report(job: int) -> dict:
    return report(*_jobs[job])


def reports(jobs: list, processes: int) -> list[dict]:
    """The rows of (kernel, architecture)s, by forked processes."""
    _jobs[:] = jobs
    if processes == 1:
        return [*map(_report, range(len(jobs)))]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return pool.map(_report, range(len(jobs)), chunksize=4)


def markdown(rows: list[dict]) -> str:
    """A line a kernel and configuration, a column an architecture."""
    archs = sorted({row["arch"] for row in rows})
    heads = [f"sm_{arch}" for arch in archs]
    lines = [
        "# Kernels compiled ahead of time",
        "",
        aot_table.ingredients(),
        "By `make kernels-check`: no GPU is needed. For each architecture: registers a thread,"
        " bytes of spills (none; 8 at most of LayerNorm and FP8, which the assembler trades for one"
        " more program a multiprocessor; any of attention), KiB of shared memory a program, and the"
        " instructions that must be there. Empty: an architecture without the kernel's"
        " 8-bit types.",
        "",
        f"| kernel, dtype, configuration | warps | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(archs)}",
    ]
    by_name: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["arch"]] = row
    for name, found in by_name.items():
        cells = [_cell(found[arch]) if arch in found else "" for arch in archs]
        warps = next(iter(found.values()))["warps"]
        lines.append(f"| {name} | {warps} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *machine_markdown(rows)]) + "\n"


def machine_markdown(rows: list[dict]) -> list[str]:
    model = " ".join(machine_code.__doc__.split("\n\n")[1].split())
    return [
        f"## Machine code of what configs/ launch, sm_{READ}",
        "",
        "Programs a multiprocessor; matrix instructions of a warpgroup and of a warp; loads and"
        " stores of a thread's own memory (spills); barriers in loops; and the issue bound.",
        "",
        model,
        "",
        *machine_code.markdown([row for row in rows if "code" in row]),
    ]


def _cell(row: dict) -> str:
    sizes = f"{row['registers']} / {row['spills']} / {row['shared'] / 1024:.1f}"
    return f"{sizes}; {', '.join(f'`{i}`' for i in row['found'])}" if row["found"] else sizes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--module", nargs="+", help="or folders of kernels/; without it, all")
    parser.add_argument("--arch", nargs="+", type=int, default=sorted(SHARED), choices=SHARED)
    parser.add_argument("--only", default="", help="kernels whose name has this text")
    parser.add_argument("--shipped", action="store_true", help="what configs/ launch")
    parser.add_argument("--sample", type=int, metavar="N")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--machine", type=Path, help="write the machine code's table alone there")
    parser.add_argument("--accept", action="store_true", help="a step back of the machine code")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = kernels(args.module, args.only)
    wanted = {arch: shipped.shipped(arch)[0] for arch in args.arch} if args.shipped else {}
    jobs = [
        (one, arch)
        for one in chosen
        for arch in args.arch
        if arch >= one.since and (not args.shipped or one.name in wanted[arch])
    ]
    if args.sample:
        jobs = random.sample(jobs, min(args.sample, len(jobs)))
    rows = reports(jobs, args.processes)
    if args.sample:
        compare(rows)
    table = args.machine or aot_table.TABLE
    writes = args.markdown or args.machine
    known = table.exists() and (writes or aot_table.is_of_these_compilers(table))
    if known and not args.accept:
        hold_against(rows, machine_code.committed(table.read_text(encoding="utf-8")))
    judge_spills(rows, of_these=bool(args.markdown) or (known and not args.machine))
    wrong = [row for row in rows if row["wrong"]]
    if args.json:
        args.json.write_text(json.dumps(rows), encoding="utf-8")
    if args.markdown and not wrong:  # a table that is current says that nothing is
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(rows), encoding="utf-8")
    if args.machine and not wrong:
        lines = ["# Machine code by another Triton", "", aot_table.ingredients(), ""]
        text = "\n".join([*lines, *machine_markdown(rows)])
        args.machine.write_text(text + "\n", encoding="utf-8")
    for row in wrong:
        print(f"{row['name']} on sm_{row['arch']}: {'; '.join(row['wrong'])}")
    print(f"{len(rows)} compiled, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
