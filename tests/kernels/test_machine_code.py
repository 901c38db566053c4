"""What is read from machine code, and that a step back is told."""

import aot_table
import machine_code
import pytest
from machine_code import Code

CODE = """
\t.section\t.text._kernel
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_1:
        /*0030*/             @!P0  LDG.E.128 R8, desc[UR4][R6.64] ;
        /*0040*/                   LDG.E.U16.CONSTANT R8, desc[UR4][R6.64] ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/                   HFMA2.MMA R4, -RZ, RZ, 0, 0 ;
        /*0070*/              @!P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R6.64] ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00a0*/              @!P2 BRA `(.L_x_2) ;
        /*00b0*/                   STL [R1], R4 ;
        /*00c0*/                   LDL.64 R4, [R1] ;
        /*00d0*/              @!P3 BRA `(.L_x_0) ;
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00f0*/              @!P3 BRA `(.L_x_4) ;
        /*0100*/                   STG.E desc[UR4][R6.64], R4 ;
.L_x_4:
        /*0110*/                   EXIT ;
.L_x_3:
        /*0120*/                   BRA `(.L_x_3);
"""


def test_a_kernel_is_read_from_its_disassembly():
    code = machine_code.read(CODE, 4)
    assert code == Code(
        programs=4, hgmma=1, hmma=1, local=2, barriers=1,
        instructions=5, bytes=32 * (16 + 2),  # of the inner loop that moves more
    )  # fmt: skip
    assert code.gb_per_s == pytest.approx(132 * 4 * 1.8 * 576 / 5)


def test_without_a_loop_all_of_it_counts():
    straight = "\n".join(line for line in CODE.splitlines() if "BRA" not in line)
    code = machine_code.read(straight, 1)
    assert code.instructions == 14 and code.barriers == 0
    assert code.bytes == 32 * (16 + 16 + 2 + 16 + 4)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "fitting"),
    [
        (142, 48 * 1024, 8, 1),  # as docs/performance.md says of attention's backward
        (69, 12 * 1024, 4, 7),
        (103, 12 * 1024, 4, 4),
        (32, 0, 4, 16),  # warps
        (16, 0, 1, 32),  # programs
        (32, 112 * 1024, 4, 2),  # shared memory, its KiB of the system's included
        (32, 114 * 1024, 4, 1),
    ],
)
def test_programs_a_multiprocessor(registers, shared, warps, fitting):
    assert machine_code.programs(registers, shared, warps, 90) == fitting


GOOD = Code(4, 8, 0, 0, 2, 400, 4096)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"local": 3}, "3 local loads and stores, where there were 0"),
        ({"programs": 3}, "3 programs a multiprocessor, where there were 4"),
        ({"hgmma": 0, "hmma": 32}, "no HGMMA, where there was"),
    ],
)
def test_a_step_back_is_wrong(change, told):
    assert machine_code.worse(GOOD, GOOD._replace(**change)) == [told]
    assert machine_code.worse(GOOD._replace(**change), GOOD) == []


def test_the_table_says_what_was_read():
    rows = [{"name": "gelu bf16 4096 8", "code": GOOD}, {"name": "attention bf16", "code": GOOD}]
    lines = machine_code.markdown(rows)
    text = "# Title\n\n| another | table |\n|---|---|\n| a | b |\n\n" + "\n".join(lines) + "\n"
    assert machine_code.committed(text) == {row["name"]: GOOD for row in rows}
    assert machine_code.committed("| a |\n") == {}
    assert lines[2] == "| attention bf16 | 4 | 8 : 0 | 0 | 2 | 400 | 4096 | 9732 |"


def test_the_committed_table_has_all_that_is_launched():
    """And the tables of registers and of machine code are told apart."""
    import shipped

    text = aot_table.TABLE.read_text(encoding="utf-8")
    found = machine_code.committed(text)
    assert found.keys() == shipped.shipped(90)[0]
    assert all(code.local == 0 for code in found.values())
    assert {arch for _, arch in aot_table.cells()} == {80, 90, 100}


def test_contexts_of_one_length_are_launched_too():
    """By the gate: ViT-H's predictor has K = 91 and P = 42 then, for which the backward's first
    choice was one of one program a multiprocessor."""
    import shipped

    stack = shipped.Stack("predictor", 384, 24, 91 + 42)
    assert stack in shipped.stacks()
    names = [n for n in shipped._attention(shipped.Chooser(90), stack) if "backward" in n]
    found = machine_code.committed(aot_table.TABLE.read_text(encoding="utf-8"))
    assert [found[name].programs for name in names] == [2]


PTX = """
\tld.param.b64 \t%rd1, [_kernel_param_0];
\tmov.u32 \t%r1, %ctaid.x;
\tst.shared.b32 \t[%r2], %r1;
\tgriddepcontrol.wait; // dummy %r3
\tgriddepcontrol.launch_dependents; // dummy %r4
\t@%p1 ld.global.v4.b32 { %r5, %r6, %r7, %r8 }, [ %rd2 + 0 ];
"""
WAITS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   ACQBULK ;
        /*0020*/                   S2R R0, SR_CTAID.X ;
        /*0030*/                   PREEXIT ;
        /*0040*/             @!P0  LDG.E.128 R8, desc[UR4][R6.64] ;
"""


def moved(text: str, what: str, before: str) -> str:
    """The line with `what` before the one with `before`."""
    lines = text.splitlines(keepends=True)
    (line,) = (one for one in lines if what in one)
    lines.remove(line)
    lines.insert(next(i for i, one in enumerate(lines) if before in one), line)
    return "".join(lines)


def test_what_may_begin_early_waits_before_it_touches_device_memory():
    assert machine_code.early(PTX, WAITS, True) == []
    for load in ("ld.global.v4", "cp.async.cg.shared.global", "ld.b32", "red.global.add", "st.v2"):
        early = moved(PTX.replace("ld.global.v4", load), load, "griddepcontrol.wait")
        assert machine_code.early(early, WAITS, True)[0].startswith(load)
    early = moved(WAITS, "LDG", "ACQBULK")
    assert machine_code.early(PTX, early, True) == ["LDG before the wait"]
    assert machine_code.early(PTX, early.replace("LDG.E.128", "UTMALDG.4D"), True)
    early = moved(PTX, "launch_dependents", "griddepcontrol.wait")
    assert machine_code.early(early, WAITS, True) == ["dependents launched before the wait"]
    for wrong in (moved(WAITS, "PREEXIT", "ACQBULK"), WAITS.replace("ACQBULK", "NOP")):
        (told,) = machine_code.early(PTX, wrong, True)
        assert told.startswith("machine code waits at")


def test_what_begins_in_its_turn_neither_waits_nor_lets_the_next_begin():
    assert machine_code.early(PTX, "", False) == ["griddepcontrol in the PTX"]
    assert machine_code.early(PTX.replace("griddepcontrol", "bar"), "", False) == []
