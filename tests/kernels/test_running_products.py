import textwrap

import pytest
from running_products import check_running_products

LOOP = """
    .L_x_1:
        /*0100*/                   WARPGROUP.ARRIVE ;
        /*0110*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT, gsb0 ;
        /*0120*/                   HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR16].tnspB, R56 ;
        /*0130*/                   HGMMA.64x64x16.F32.BF16 R56, R92, gdesc[UR16].tnspB, R56, gsb0 ;
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, {first} ;
        /*0150*/                   {beside} ;
        /*0160*/                   WARPGROUP.DEPBAR.LE gsb0, {last} ;
        /*0170*/                   {after} ;
        /*0180*/              @!P0 BRA `(.L_x_1) ;
        /*0190*/                   EXIT ;
"""
"""Scores of a block, and the weighted values of the one before, which a softmax runs beside."""

RUNS = """
    /*0010*/                   HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR16].tnspB, R24 ;
    /*0020*/                   HGMMA.64x16x16.F32.BF16 R32, R44, gdesc[UR16].tnspB, R32, gsb0 ;
"""
"""Two products that are waited for together: R24 to R47 are theirs."""


def check(first="0x1", beside="FADD R3, R24, R55", last="0x0", after="MOV R88, R3") -> int:
    return check_running_products(textwrap.dedent(LOOP).format(first=first, beside=beside, last=last, after=after))


def check_after(*lines: str) -> int:
    """Lines of code, or labels, after products that run."""
    numbered = (
        line if line.startswith(".L") else f"    /*{number:04x}*/ {line} ;" for number, line in enumerate(lines, 256)
    )
    return check_running_products("\n".join([RUNS, *numbered]))


def test_registers_of_finished_products_are_anybody_s():
    assert check() == 3


@pytest.mark.parametrize(
    "beside",
    [
        "MOV R91, R3",  # a left operand is written
        "@P1 MOV R95, R3",
        "FADD R3, R4, R87",  # an accumulator is read
        "FADD R3, R4, -R56.reuse",
        "LDS.128 R53, [R3+UR10]",  # what is not named is touched, too
        "LDS.64 R55, [R3]",
        "LDSM.16.M88.4 R53, [R3]",
        "LDSM.16.MT88.4 R53, [R3]",
        "IMAD.WIDE R55, R3, 0x4, R4",
        "IMAD.WIDE R4, R3, 0x4, R55",
        "IMAD.WIDE R4, R3, R56, R4",
        "LDG.E R3, desc[UR4][R55.64+0x10]",
        "HGMMA.64x64x16.F32.BF16 R88, R120, gdesc[UR16].tnspB, R88, gsb0",  # adds up where a left operand is,
        "HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR16].tnspB, R24, gsb0",  # takes one from an accumulator,
        "HGMMA.64x16x16.F32.BF16 R64, gdesc[UR12], RZ, !UPT, gsb0",  # and adds up in a part of one
    ],
)
def test_registers_of_running_products_are_not(beside):
    with pytest.raises(SystemExit, match=r"at 0150, .*touches what a running product needs"):
        check(beside=beside)


@pytest.mark.parametrize(
    "beside",
    [
        "LDS.128 R52, [R3+UR10]",
        "STS.128 [R55], R4",
        "IMAD.WIDE.U32 R4, R55, UR4, RZ",  # factors have 32 bits
        "LDG.E R3, desc[UR56][R54.64]",
        "MOV R96, RZ",
        "HGMMA.64x64x16.F32.BF16 R56, R120, gdesc[UR16].tnspB, R56, gsb0",  # one after the other
    ],
)
def test_those_beside_them_are(beside):
    check(beside=beside)


@pytest.mark.parametrize("register", [24, 31, 32, 39, 40, 43, 44, 47])
def test_all_products_of_a_group_run(register):
    with pytest.raises(SystemExit, match=f"at 0100, MOV R{register}, R3"):
        check_after(f"MOV R{register}, R3", "EXIT")
    assert check_after("MOV R23, R3", "MOV R48, R3", "EXIT") == 2


def test_nothing_is_finished_that_was_not_waited_for():
    with pytest.raises(SystemExit, match="at 0150, FADD R3, R24, R55"):
        check(first="0x2")
    with pytest.raises(SystemExit, match="at 0170, MOV R88, R3"):
        check(last="0x1")


def test_a_loop_is_followed_into_its_next_turn():
    """As Triton 3.6 compiles a product in a loop whose left operand is converted on the way: it is waited for too late,
    and in the first turn nothing is wrong."""
    turn = ["MOV R88, R3", "HGMMA.64x16x16.F32.BF16 R64, R88, gdesc[UR16].tnspB, R64, gsb0"]
    waits = "WARPGROUP.DEPBAR.LE gsb0, {}"
    assert check_after(waits.format("0x0"), ".L_x_1:", *turn, waits.format("0x0"), "@P0 BRA `(.L_x_1)", "EXIT") == 3
    with pytest.raises(SystemExit, match="at 0102, MOV R88, R3"):
        check_after(waits.format("0x0"), ".L_x_1:", *turn, waits.format("0x1"), "@P0 BRA `(.L_x_1)", "EXIT")


TOUCHES = "MOV R24, R3"


@pytest.mark.parametrize(
    "lines",
    [
        ["@P0 EXIT", TOUCHES, "EXIT"],
        ["@P0 BRA `(.L_x_1)", TOUCHES, ".L_x_1:", "EXIT"],
        ["BRA P1, `(.L_x_1)", TOUCHES, ".L_x_1:", "EXIT"],
        ["BRA.DIV UR4, `(.L_x_1)", TOUCHES, ".L_x_1:", "EXIT"],
        ["BRA `(.L_x_1)", "EXIT", ".L_x_1:", TOUCHES],
        ["BSSY B0, `(.L_x_1)", "BSYNC B0", "EXIT", ".L_x_1:", TOUCHES],
        ["BSSY B0, `(.L_x_2)", "BSSY B0, `(.L_x_1)", "BSYNC B0", ".L_x_2:", "EXIT", ".L_x_1:", TOUCHES],
    ],
)
def test_every_path_is_followed(lines):
    with pytest.raises(SystemExit, match="MOV R24, R3 touches"):
        check_after(*lines)


@pytest.mark.parametrize(
    "lines",
    [
        ["EXIT", TOUCHES],
        ["BRA `(.L_x_1)", TOUCHES, ".L_x_1:", "EXIT"],
        ["BSSY B0, `(.L_x_1)", "BSYNC B0", TOUCHES, ".L_x_1:", "EXIT"],
        [".L_x_1:", "BRA `(.L_x_1)", TOUCHES],
    ],
)
def test_and_no_other(lines):
    assert check_after(*lines) == 2


@pytest.mark.parametrize(
    "line",
    [
        "BRX R4 -0x100",
        "CALL.REL.NOINC `(.L_x_1)",
        "QGMMA.64x64x32.F32.E4M3.E4M3 R64, gdesc[UR4], RZ, !UPT, gsb0",
        "@P0 HGMMA.64x64x16.F32.BF16 R64, gdesc[UR4], RZ, !UPT, gsb0",
        "HGMMA.64x64x16.F32.BF16 R64, gdesc[UR4], R96, gsb0",
        "@P0 WARPGROUP.DEPBAR.LE gsb0, 0x0",
    ],
)
def test_what_is_not_known_is_refused(line):
    with pytest.raises(SystemExit, match="such an instruction is not followed"):
        check_after(line, "EXIT")


def test_products_without_an_end_are_refused():
    with pytest.raises(SystemExit, match=r"WARPGROUP.DEPBAR.LE gsb0, 0x0: such an instruction is not followed"):
        check_running_products(RUNS.replace(", gsb0", "") + "    /*0100*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;")
