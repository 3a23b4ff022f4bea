"""Reading machine code: loops by dominance, counts, resources."""

import pytest

from dsv3_kernels.aot import sass

# A kernel in the shape of ours: a wait with its slow path at the very end, an inner loop with two MMAs, an outer loop
# around it, a second inner loop with one. The slow path jumps back into the inner loop, far against the addresses.
KERNEL = """
	.section	.text.body_mosaic_gpu_kernel,"ax",@progbits
body_mosaic_gpu_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*0010*/              @P0 BRA `(.L_x_7) ;
.L_x_0:
        /*0020*/                   MOV R2, RZ ;
.L_x_1:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R4 ;
        /*0040*/             @!P1 BRA `(.L_x_5) ;
.L_x_2:
        /*0050*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR16], RZ, !UPT ;
        /*0060*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR16], R24, gsb0 ;
        /*0070*/                   LDS.128 R8, [R138] ;
        /*0080*/                   LDS R9, [R138+0x20] ;
        /*0090*/                   FFMA R8, R25, R137, R8 ;
        /*00a0*/              @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR16], R24, gsb0 ;
        /*00c0*/                   BRA.U !UP0, `(.L_x_3) ;
        /*00d0*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*00e0*/              @P3 BRA `(.L_x_0) ;
        /*00f0*/                   EXIT ;
.L_x_5:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR5], R4 ;
        /*0110*/             @!P1 BRA `(.L_x_5) ;
        /*0120*/                   BRA `(.L_x_2) ;
.L_x_7:
        /*0130*/                   UTMALDG.3D [UR8], [UR4] ;
        /*0140*/                   EXIT ;
.L_x_8:
        /*0150*/                   BRA `(.L_x_8);
"""


def test_the_innermost_loop_holds_most_of_the_instruction_and_its_slow_path():
    loop = sass.innermost_loop(sass.parse_blocks(KERNEL), r"QGMMA\.64x")
    assert loop is not None
    assert sass.count(loop) == {"SYNCS": 2, "BRA": 4, "QGMMA": 2, "LDS": 2, "FFMA": 1}


def test_loops_are_natural_loops():
    blocks = sass.parse_blocks(KERNEL)
    opcodes = sorted(
        sorted(sass.count([i for b in loop for i in blocks[b].instructions])) for loop in sass.natural_loops(blocks)
    )
    assert opcodes == [
        ["BRA", "FFMA", "LDS", "MOV", "QGMMA", "STG", "SYNCS"],
        ["BRA", "FFMA", "LDS", "QGMMA", "SYNCS"],
        ["BRA", "QGMMA"],
        ["BRA", "SYNCS"],
    ]


def test_what_no_loop_holds_has_none():
    assert sass.innermost_loop(sass.parse_blocks(KERNEL), "UTMALDG") is None
    assert sass.innermost_loop(sass.parse_blocks(KERNEL), "HGMMA") is None


def test_a_backward_jump_into_the_middle_is_no_loop():
    """Without the branch of the inner loop, only the slow path's jump back is left, which closes nothing."""
    straight = KERNEL.replace("@P2 BRA `(.L_x_1)", "NOP").replace("@P3 BRA `(.L_x_0)", "NOP")
    loop = sass.innermost_loop(sass.parse_blocks(straight), "QGMMA")
    assert loop is not None
    assert sass.count(loop) == {"QGMMA": 1, "BRA": 1}


def test_a_call_comes_back():
    """As a division does, which is called by a name or, from further away, by a label."""
    divided = """
.L_x_1:
        /*0000*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_u16) ;
        /*0010*/                   CALL.REL.NOINC `(.L_x_3) ;
        /*0020*/                   MOV R2, RZ ;
.L_x_2:
        /*0030*/                   QGMMA.64x192x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24, gsb0 ;
        /*0040*/               @P2 BRA `(.L_x_2) ;
        /*0050*/               @P3 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
$__internal_0_$__cuda_sm20_div_u16:
        /*0070*/                   I2F.U16 R8, R8 ;
        /*0080*/                   RET.REL.NODEC R4 `(fp8_gemm_mosaic_gpu_kernel) ;
.L_x_3:
        /*0090*/                   MUFU.RCP R8, R8 ;
        /*00a0*/                   RET.REL.NODEC R4 `(fp8_gemm_mosaic_gpu_kernel) ;
"""
    blocks = sass.parse_blocks(divided)
    loop = sass.innermost_loop(blocks, "QGMMA")
    assert loop is not None
    assert sass.count(loop) == {"QGMMA": 1, "BRA": 1}
    called = [blocks[callee].instructions[0].opcode for block in blocks for callee in block.callees]
    assert called == ["I2F.U16", "MUFU.RCP"]
    outer = max(sass.natural_loops(blocks), key=len)
    assert sass.count([i for b in outer for i in blocks[b].instructions]) == {"CALL": 2, "MOV": 1, "QGMMA": 1, "BRA": 2}


def test_control_codes_change_nothing():
    def with_codes(line: str) -> str:
        return line.replace("        /*", "   -:-:1:Y:04        /*", 1).replace(" ;", " ") if "/*0" in line else line

    plain = sass.parse_blocks(KERNEL)
    coded = sass.parse_blocks("\n".join(map(with_codes, KERNEL.splitlines())))
    assert [block.successors for block in coded] == [block.successors for block in plain]
    assert [sass.count(block.instructions) for block in coded] == [sass.count(block.instructions) for block in plain]


def test_resources_of_a_spilling_kernel():
    report = """
ptxas warning : Registers are spilled to local memory in function 'body', 712 bytes spill stores, 640 bytes spill loads
ptxas info    : Compiling entry function 'body' for 'sm_90a'
ptxas info    : Function properties for body
    96 bytes stack frame, 712 bytes spill stores, 640 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
    assert sass.parse_resources(report) == sass.Resources(registers=168, spill_bytes=1352, stack_bytes=96, losses=())
    with pytest.raises(ValueError, match="no report"):
        sass.parse_resources("ptxas fatal   : Unresolved extern function")
