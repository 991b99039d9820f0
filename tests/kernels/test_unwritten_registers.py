import pytest
from unwritten_registers import check_unwritten_registers

PRODUCT = "HGMMA.64x32x16.F32 R56, R24, gdesc[UR20].tnspB, R56, gsb0"
LEFT = ["LDG.E.128 R24, desc[UR4][R2.64]", "ULDC.64 UR4, c[0x0][0x208]", "LDC.64 R2, c[0x0][0x230]"][::-1]


def check(*lines: str) -> int:
    """Lines of code, or labels."""
    numbered = (
        line if line.startswith(".L") else f"    /*{number:04x}*/ {line} ;" for number, line in enumerate(lines, 256)
    )
    return check_unwritten_registers("\n".join(numbered))


def test_a_descriptor_from_a_register_that_nothing_wrote_is_found():
    """As ptxas 12.8 did it: the address of the values is in UR6, and taken from UR22."""
    values = ["UIADD3 UR5, UR24, 0x1000, URZ", "USGXT.U32 UR6, UR5, 0xe"]
    right = ["UIADD3 UR22, UP0, UR6, 0x40, URZ", "UIADD3.X UR23, URZ, -0x7fffffe0, URZ, UP0, !UPT"]
    start = ["ULDC UR24, c[0x0][0x210]", *LEFT, *values]
    assert check(*start, *right, PRODUCT, "EXIT")
    with pytest.raises(SystemExit, match="UIADD3 UR22, UP0, UR22, 0x40, URZ reads UR22, which nothing wrote before"):
        check(*start, right[0].replace("UR6", "UR22"), right[1], PRODUCT, "EXIT")
    with pytest.raises(SystemExit, match="reads UR22 and UR23, which nothing wrote before"):
        check(*start, PRODUCT, "EXIT")


@pytest.mark.parametrize(
    "line",
    [
        "FADD R3, R4, R9",
        "@P0 FADD R3, R9, R4",
        "STG.E desc[UR4][R2.64], R9",
        "STS [R9+UR4], R2",
        "LDG.E R3, desc[UR4][R8.64]",  # of the address two registers
        "LDG.E R3, desc[UR6][R2.64]",
        "ISETP.GE.AND P0, PT, R9, R2, PT",
        "SHFL.BFLY PT, R3, R9, 0x1, 0x1f",
        "LOP3.LUT P0, R3, R9, 0x7f, RZ, 0xc0, !PT",
        "LOP3.LUT R9, R9, 0xffff, RZ, 0xc0, !PT",
        "HGMMA.64x16x16.F32 R24, gdesc[UR4], RZ, !UPT, gsb0",  # both operands in shared memory: UR4 to UR7
        "HGMMA.64x16x16.F32 R24, R6, gdesc[UR2], RZ, !UPT, gsb0",  # the left one in R6 to R9
        "REDUX.MAX.S32 UR9, R9",
        "PRMT R8, R9, 0x7610, R8",
        "LOP3.LUT R8, R9, 0xffffffdf, RZ, 0xc0, !PT",
    ],
)
def test_what_nothing_wrote_is_not_read(line):
    with pytest.raises(SystemExit, match="which nothing wrote before"):
        check(
            "ULDC.64 UR4, c[0x0][0x208]", "LDC.64 R2, c[0x0][0x230]", "CS2R R4, SRZ", "LDS.64 R6, [UR4]", line, "EXIT"
        )


@pytest.mark.parametrize(
    "lines",
    [
        ["LDS.128 R8, [UR4]", "FADD R3, R8, R11"],
        ["LDSM.16.MT88.4 R8, [R2]", "FADD R3, R8, R11"],
        ["CS2R R8, SRZ", "FADD R3, R8, R9"],
        ["IMAD.WIDE R8, R2, 0x4, R2", "LDG.E R3, desc[UR4][R8.64]"],
        ["UIADD3.64 UR8, UR4, UR4, URZ", "UMOV UR3, UR9"],
        ["IADD3 R8, P1, R2, R3, RZ", "IADD3.X R9, R8, R3, RZ, P1, !PT"],
        ["REDUX.MAX.S32 UR9, R2", "MOV R8, UR9"],
        ["SHFL.BFLY PT, R8, R2, 0x1, 0x1f", "FADD R3, R8, R2"],
        ["VOTE.ANY R8, PT, P0", "POPC R3, R8"],
        ["@P0 MOV R8, R2", "FADD R3, R8, R2"],  # by whom a predicate is true is not followed
        ["PRMT R8, RZ, 0x7610, R8"],  # the other half is kept, which holds nothing
        ["LOP3.LUT R8, R8, 0xffffffdf, RZ, 0xc0, !PT", "@P0 LOP3.LUT R8, R8, 0x20, RZ, 0xfc, !PT"],
        ["MOV R8, UR9", "R2UR UR9, R8"],  # kept for later, though it holds nothing
        ["STL [R2+0x8], R9", "LDL R9, [R2+0x8]"],
        ["EXIT", "FADD R3, R4, R9"],
        ["BRA `(.L_x_1)", "FADD R3, R4, R9", ".L_x_1:"],
    ],
)
def test_what_was_written_is(lines):
    assert check("ULDC.64 UR4, c[0x0][0x208]", "LDC.64 R2, c[0x0][0x230]", *lines, "EXIT")


def test_a_copy_of_nothing_is_nothing():
    with pytest.raises(SystemExit, match="FADD R3, R8, R8 reads R8"):
        check("MOV R8, UR9", "FADD R3, R8, R8", "EXIT")
    with pytest.raises(SystemExit, match="UIADD3 UR3, UR9, 0x1, URZ reads UR9"):
        check("IMAD.U32 R8, RZ, RZ, UR9", "R2UR UR9, R8", "UIADD3 UR3, UR9, 0x1, URZ", "EXIT")


def test_every_path_is_followed():
    around = ["MOV R2, RZ", "@P0 BRA `(.L_x_1)", "MOV R8, RZ", ".L_x_1:", "FADD R3, R8, R2", "EXIT"]
    with pytest.raises(SystemExit, match="at 0104, FADD R3, R8, R2 reads R8"):
        check(*around)
    assert check("MOV R8, RZ", *around)
    # In the first turn of a loop nothing was carried over from the last one.
    turn = [".L_x_1:", "FADD R3, R8, R2", "MOV R8, R3", "@P0 BRA `(.L_x_1)", "EXIT"]
    with pytest.raises(SystemExit, match="at 0102, FADD R3, R8, R2 reads R8"):
        check("MOV R2, RZ", *turn)
    assert check("MOV R2, RZ", "MOV R8, RZ", *turn)


def test_threads_meet_where_their_barrier_says():
    once = ["BSSY B0, `(.L_x_1)", "@P0 BRA `(.L_x_2)", "MOV R8, RZ", ".L_x_2:", "BSYNC B0", ".L_x_1:"]
    again = [line.replace("_1", "_3").replace("_2", "_4") for line in once]
    code = ["MOV R2, RZ", "MOV R8, RZ", *once, "FADD R3, R8, R2", *again, "EXIT"]
    assert check(*code)
    with pytest.raises(SystemExit, match=r"at 0107, FADD R3, R8, R2 reads R8"):
        check(*code[:1], *code[2:])
