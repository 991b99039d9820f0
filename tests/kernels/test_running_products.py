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


def check(first="0x1", beside="FADD R3, R24, R55", last="0x0", after="MOV R88, R3") -> int:
    return check_running_products(textwrap.dedent(LOOP).format(first=first, beside=beside, last=last, after=after))


def test_registers_of_finished_products_are_anybody_s():
    assert check() == 3


@pytest.mark.parametrize(
    "beside",
    [
        "MOV R91, R3",  # a left operand is written
        "LDS.128 R84, [R3+UR10]",
        "@P1 MOV R95, R3",
        "FADD R3, R4, R87",  # an accumulator is read
        "LDS.64 R20, [R86+0x10]",
        "HGMMA.64x64x16.F32.BF16 R72, R96, gdesc[UR16].tnspB, R72, gsb0",  # and shared in part
        "HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR16].tnspB, R24, gsb0",
        "HGMMA.64x64x16.F32.BF16 R64, gdesc[UR12], RZ, !UPT, gsb0",
    ],
)
def test_registers_of_running_products_are_not(beside):
    with pytest.raises(SystemExit, match=r"at 0150, .*touches what a running product needs"):
        check(beside=beside)


def test_nothing_is_finished_that_was_not_waited_for():
    with pytest.raises(SystemExit, match="at 0150, FADD R3, R24, R55"):
        check(first="0x2")
    with pytest.raises(SystemExit, match="at 0170, MOV R88, R3"):
        check(last="0x1")


def test_a_loop_is_followed_into_its_next_turn():
    """As Triton 3.6 compiles a product in a loop whose left operand is converted on the way."""
    with pytest.raises(SystemExit, match="at 0150, MOV R40, R3"):
        check(first="0x2", beside="MOV R40, R3", last="0x2", after="NOP")
    # Harmless in the first turn only: the product of the turn before still runs.
    entered = "/*0090*/                   MOV R92, R3 ;\n" + textwrap.dedent(LOOP)
    code = entered.format(first="0x1", beside="NOP", last="0x1", after="NOP").replace(
        "/*0100*/", "/*0100*/ MOV R92, R3 ;\n        /*0101*/"
    )
    with pytest.raises(SystemExit, match="at 0100, MOV R92, R3"):
        check_running_products(code)
