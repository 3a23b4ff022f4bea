"""Registers of each role, followed along the control flow, against what setmaxnreg grants."""

import pytest

from dsv3_kernels.aot import registers, sass

# Two roles that part at the entry: a copier that gives registers up, a multiplier that retries until it has more, whose
# wait has its slow path at the end and whose division is called. Both end in a common store.
KERNEL = """
        /*0000*/                   IMAD.MOV.U32 R100, RZ, RZ, RZ ;
        /*0010*/              @P0 BRA `(.L_x_1) ;
        /*0020*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;
        /*0030*/                   LDG.E.128 R8, desc[UR6][R20.64] ;
        /*0040*/                   BRA `(.L_x_4) ;
.L_x_1:
        /*0050*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
        /*0060*/                   BRA.U !UP0, `(.L_x_1) ;
.L_x_2:
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R4 ;
        /*0080*/             @!P1 BRA `(.L_x_5) ;
.L_x_3:
        /*0090*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR16], R24, gsb0 ;
        /*00a0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_u16) ;
.L_x_4:
        /*00b0*/                   STG.E.64 desc[UR4][R2.64], R14 ;
        /*00c0*/                   EXIT ;
.L_x_5:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R5 ;
        /*00e0*/                   BRA `(.L_x_3) ;
$__internal_0_$__cuda_sm20_div_u16:
        /*00f0*/                   MUFU.RCP R88, R88 ;
        /*0100*/                   RET.REL.NODEC R4 `(body_mosaic_gpu_kernel) ;
"""


def test_each_role_may_use_what_it_was_granted():
    assert registers.find_faults(sass.parse_blocks(KERNEL), launched=168) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("0x18", "0x8", "touches R21 after setmaxnreg 8, which ends at R7 (LDG.E.128 R8, desc[UR6][R20.64])"),
        ("LDG.E.128 R8", "LDG.E.128 R21", "touches R24 after setmaxnreg 24"),  # the last of four
        ("0xe8", "0x58", "touches R88 after setmaxnreg 88, which ends at R87 (MUFU.RCP R88, R88)"),
        ("64x128x32", "64x256x32", None),
        (
            "64x128x32.F32.E4M3.E4M3 R24, gdesc[UR16], R24",
            "64x256x32.F32.E4M3.E4M3 R112, R24, gdesc[UR16], R112",
            "R239",
        ),
        ("TRYWAIT P1, [UR5], R5", "TRYWAIT P1, [UR5], R240", "touches R240 after setmaxnreg 232"),
        ("desc[UR4][R2.64], R14", "desc[UR4][R2.64], R23", "touches R24 after setmaxnreg 24"),
        ("R100", "R168", "touches R168 after the 168 of the launch"),
    ],
)
def test_a_register_beyond_them_is_refused(old, new, fault):
    changed = KERNEL.replace(old, new)
    assert changed != KERNEL
    faults = registers.find_faults(sass.parse_blocks(changed), launched=168)
    if fault is None:
        assert faults == []
    else:
        assert len(faults) == 1
        assert fault in faults[0]


@pytest.mark.parametrize(
    ("line", "highest"),
    [
        ("LDSM.16.MT88.4 R8, [R40+UR4]", 40),
        ("STSM.16.M88.4 [R8+0x400], R40", 43),
        ("IMAD.WIDE.U32 R6, R9, R8, R10", 11),
        ("HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR16].tnspB, R24", 55),
        ("HGMMA.64x64x16.F16 R24, gdesc[UR16], RZ, !UPT", 39),
        ("LDG.E.64 R30, desc[UR6][R2.64+0x7e00]", 31),
        ("CS2R R60, SRZ", 61),
        ("CS2R.32 R60, SR_CLOCKLO", 60),
        ("UTMALDG.3D [UR8], [UR4], desc[UR200]", -1),
    ],
)
def test_operands_of_several_registers_reach_further(line, highest):
    (block,) = sass.parse_blocks(f"        /*0000*/                   {line} ;")
    assert registers.highest_register(block.instructions[0]) == highest
