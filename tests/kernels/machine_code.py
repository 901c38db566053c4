"""What a kernel's machine code says of its speed, without a GPU: read from nvdisasm.

The model of the issue bound. A multiprocessor issues four warps' instructions a cycle at most, so
an H200 (132 of them, 1.80 GHz under load) issues 950 thousand million a second. Of the innermost
loop that moves the most device memory (of the whole program where there is no loop) the
instructions are counted, and the bytes that a warp's loads from and stores to device memory move,
all 32 lanes counted. Bytes over instructions, times that rate, is the GB/s that the kernel cannot
exceed however well its memory latency is hidden: far above a copy's 4,200 it is bound by memory,
below by its own instructions. Waiting, bank conflicts and predicated lanes are not in it, nor that
a read may be from the cache; of attention, which reads little and multiplies much, it says how
much of the issue slots the loads would leave.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MULTIPROCESSORS, CLOCK_GHZ, ISSUED_A_CYCLE = 132, 1.80, 4
LANES = 32
# By architecture, of a multiprocessor: KiB of shared memory, warps. 65,536 registers, 32 programs.
ROOM = {80: (164, 64), 90: (228, 64), 100: (228, 64)}
REGISTERS, PROGRAMS = 65536, 32
GLOBAL = ("LDG", "STG", "LDGSTS", "RED", "ATOMG", "ATOM")
# Of device memory, beside GLOBAL: by an address of any kind, and by the tensor memory accelerator.
OTHERS = ("LD", "ST", "REDG", "UTMALDG", "UTMASTG", "UBLKCP", "UBLKPF", "CCTL", "UTMAPF")
TOUCHES = re.compile(r"\b(?:ld|st|red|atom|cp|prefetch|prefetchu|discard)\.(?!param|shared)[\w.:]+")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes; 4 without one
HEADS = (
    "kernel, dtype, configuration", "programs", "HGMMA : HMMA", "local", "barriers in loops",
    "loop: instructions", "bytes a warp", "issue bound, GB/s",
)  # fmt: skip


class Instruction(NamedTuple):
    opcode: str  # with its modifiers
    target: str | None  # the label a branch goes to

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bytes(self) -> int:
        """That a warp's access to device memory moves."""
        if self.base not in GLOBAL:
            return 0
        parts = self.opcode.split(".")
        return LANES * next((size for name, size in WIDTHS.items() if name in parts), 4)


class Code(NamedTuple):
    """A kernel's machine code. programs: at a time on a multiprocessor. local: loads and stores of
    a thread's own memory, which spills make. The last two are of the loop: see the module."""

    programs: int
    hgmma: int
    hmma: int
    local: int
    barriers: int
    instructions: int
    bytes: int

    @property
    def gb_per_s(self) -> float:
        rate = MULTIPROCESSORS * ISSUED_A_CYCLE * CLOCK_GHZ
        return rate * self.bytes / self.instructions

    def cells(self) -> list[str]:
        counts = self.programs, f"{self.hgmma} : {self.hmma}", self.local, self.barriers
        return [*map(str, counts), str(self.instructions), str(self.bytes), f"{self.gb_per_s:.0f}"]


def disassembled(cubin: bytes, tools: Path) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "nvdisasm", "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parsed(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and the index that each label stands before."""
    found, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*);", line):
            target = re.search(r"`\((\.L_\w+)\)", code[2]) if code[1].startswith("BRA") else None
            found.append(Instruction(code[1], target and target[1]))
    return found, labels


def loops(found: list[Instruction], labels: dict[str, int]) -> Iterator[range]:
    """By their branches back. The jump to itself behind the last exit is none."""
    for index, one in enumerate(found):
        if one.target is not None and labels[one.target] < index:
            yield range(labels[one.target], index + 1)


def hottest(found: list[Instruction], every: list[range]) -> range:
    """Of the innermost loops the one that moves the most bytes; the whole without one."""
    inner = [a for a in every if not any(b != a and b[0] >= a[0] and b[-1] <= a[-1] for b in every)]
    return max(inner, key=lambda loop: moved(found, loop), default=range(len(found)))


def moved(found: list[Instruction], where: range) -> int:
    return sum(found[i].bytes for i in where)


def programs(registers: int, shared: int, warps: int, arch: int) -> int:
    """That fit a multiprocessor; registers come in eights a thread, and each program's shared
    memory with 1 KiB of the system's."""
    kib, most_warps = ROOM[arch]
    a_warp = -(-registers // 8) * 8 * LANES
    return min(
        REGISTERS // (a_warp * warps), kib * 1024 // (shared + 1024), most_warps // warps, PROGRAMS
    )


def read(text: str, fitting: int) -> Code:
    """Of a disassembly. fitting: programs a multiprocessor."""
    found, labels = parsed(text)
    every = list(loops(found, labels))
    bases = [one.base for one in found]
    inside = {index for loop in every for index in loop}
    hot = hottest(found, every)
    return Code(
        programs=fitting,
        hgmma=bases.count("HGMMA"),
        hmma=bases.count("HMMA"),
        local=bases.count("LDL") + bases.count("STL"),
        barriers=sum(bases[index] == "BAR" for index in inside),
        instructions=len(hot),
        bytes=moved(found, hot),
    )


def early(ptx: str, text: str, waits: bool) -> list[str]:
    """What a kernel does too early. waits: it may begin before the kernel before it has ended, and
    has to wait before it touches device memory, and to let the next begin after that; else it does
    neither. text: of a disassembly."""
    if not waits:
        return ["griddepcontrol in the PTX"] * ("griddepcontrol" in ptx)
    before, _, after = ptx.partition("griddepcontrol.wait")
    wrong = [f"{found[0]} before the wait" for found in TOUCHES.finditer(before)]
    wrong += ["dependents launched before the wait"] * ("launch_dependents" not in after)
    bases = [one.base for one in parsed(text)[0]]
    order = [bases.index(name) if name in bases else -1 for name in ("ACQBULK", "PREEXIT")]
    if not 0 <= order[0] < order[1]:
        return [*wrong, f"machine code waits at {order[0]}, launches dependents at {order[1]}"]
    touched = (base for base in bases[: order[0]] if base in (*GLOBAL, *OTHERS))
    return wrong + [f"{base} before the wait" for base in touched]


def worse(before: Code, now: Code) -> list[str]:
    """What of `now` is a step back."""
    wrong = []
    if now.local > before.local:
        wrong.append(f"{now.local} local loads and stores, where there were {before.local}")
    if now.programs < before.programs:
        wrong.append(
            f"{now.programs} programs a multiprocessor, where there were {before.programs}"
        )
    if before.hgmma and not now.hgmma:
        wrong.append("no HGMMA, where there was")
    return wrong


def markdown(rows: list[dict]) -> list[str]:
    """Lines of a table of the rows that have machine code, by name."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for row in sorted(rows, key=lambda row: row["name"]):
        lines.append(f"| {' | '.join([row['name'], *Code(*row['code']).cells()])} |")
    return lines


def committed(text: str) -> dict[str, Code]:
    """What a table of `markdown` says, by kernel; empty for a text without one."""
    _, _, rest = text.partition(f"| {' | '.join(HEADS)} |\n")
    found = {}
    for line in rest.splitlines()[1:]:
        if not line.startswith("| "):
            break
        name, fitting, matrix, *counts = line.strip("| ").split(" | ")
        numbers = [int(n) for n in (fitting, *matrix.split(" : "), *counts[:-1])]
        found[name] = Code(*numbers)
    return found
