"""The descriptors of TMA that Mosaic's host code makes, and the driver's rules for them."""

import pytest

from dsv3_kernels.aot import mlir
from dsv3_kernels.aot.descriptor import Descriptor, broken_rules

# What Mosaic writes for a tiled, swizzled factor and for a row of scales, without what is not read.
MODULE = """// -----// IR Dump Before ResolveTrivialLocationsPass: mosaic-gpu-resolve-trivial-locations //----- //
  func.func private @mosaic_gpu_init_tma_desc(!llvm.ptr, !llvm.ptr, i64, i64, !llvm.ptr, !llvm.ptr, i64, !llvm.ptr)
    %bytes = arith.constant 200824 : i32
    %descriptor = llvm.getelementptr %copy_gmem_to_smem3A_92[0] : (!llvm.ptr) -> !llvm.ptr, i8
    %v = memref.transpose %tiled (d0, d1, d2, d3) -> (d0, d2, d1, d3) : memref<512x8x256x128xf8E4M3FN> to T
    %s = builtin.unrealized_conversion_cast %v : memref<512x256x8x128xf8E4M3FN, strided<[262144, 128, 32768, 1]>> to T
    %pointer = llvm.extractvalue %s[1] : !llvm.struct
    %integer = llvm.ptrtoint %pointer : !llvm.ptr to i64
    %sum = llvm.add %integer, %nothing : i64
    %base = llvm.inttoptr %sum : i64 to !llvm.ptr
    %dtype = arith.constant 1 : i64
    %size = arith.index_cast %sizes#0 : index to i64
    %sizes_array = memref.alloca() : memref<4xi64>
    memref.store %size, %sizes_array[%zero] : memref<4xi64>
    %swizzle = arith.constant 128 : i64
    %rows = arith.constant 16 : i64
    %one = arith.constant 1 : i64
    %eight = arith.constant 8 : i64
    %box_array = memref.alloca() : memref<4xi64>
    %zero = arith.constant 0 : index
    memref.store %rows, %box_array[%zero] : memref<4xi64>
    %first = arith.constant 1 : index
    memref.store %one, %box_array[%first] : memref<4xi64>
    %second = arith.constant 2 : index
    memref.store %eight, %box_array[%second] : memref<4xi64>
    %third = arith.constant 3 : index
    memref.store %swizzle, %box_array[%third] : memref<4xi64>
    %box_struct = builtin.unrealized_conversion_cast %box_array : memref<4xi64> to T
    %box = llvm.extractvalue %box_struct[1] : !llvm.struct
    call @mosaic_gpu_init_tma_desc(%descriptor, %base, %dtype, %rank, %a, %b, %swizzle, %box) : -> ()
    %scales = builtin.unrealized_conversion_cast %x : memref<256x4096xf32, strided<[4096, 1], offset: 64>> to T
    %scales_base = llvm.extractvalue %scales[1] : !llvm.struct
    %no_swizzle = arith.constant 16 : i64
    %row_array = memref.alloca() : memref<2xi64>
    memref.store %one, %row_array[%zero] : memref<2xi64>
    memref.store %swizzle, %row_array[%first] : memref<2xi64>
    call @mosaic_gpu_init_tma_desc(%descriptor, %scales_base, %dtype, %rank, %a, %b, %no_swizzle, %row_array) : -> ()
    %launch = gpu.launch async [%token] blocks(%e, %f, %g) in (%h = %i) threads(%j) dynamic_shared_memory_size %bytes {
      %inside = arith.constant 7 : i32
"""
FACTOR = Descriptor((512, 256, 8, 128), (262144, 128, 32768, 1), (16, 1, 8, 128), "f8E4M3FN", 1, 128, 0)
SCALES = Descriptor((256, 4096), (4096, 1), (1, 128), "f32", 4, 16, 64)


def test_descriptors_are_read_from_the_host_s_calls():
    assert mlir.parse_descriptors(MODULE) == [FACTOR, SCALES]


def test_a_view_without_strides_is_contiguous():
    plain = MODULE.replace("memref<256x4096xf32, strided<[4096, 1], offset: 64>>", "memref<2x8x64xbf16>")
    assert mlir.parse_descriptors(plain)[1] == Descriptor((2, 8, 64), (512, 64, 1), (1, 128), "bf16", 2, 16, 0)


def test_a_side_of_a_box_that_is_not_constant_is_refused():
    with pytest.raises(ValueError, match="no constant"):
        mlir.parse_descriptors(MODULE.replace("%swizzle = arith.constant 128", "%swizzle = arith.addi 128"))


def test_shared_memory_is_that_of_the_launch():
    assert mlir.parse_shared_bytes(MODULE) == 200824
    with pytest.raises(ValueError, match="launches no kernel"):
        mlir.parse_shared_bytes("module {}")


def test_only_the_first_module_of_a_dump_is_read():
    lines = [*MODULE.splitlines(keepends=True), "// -----// IR Dump Before CSEPass: cse //----- //\n", "module {}\n"]
    assert mlir.first_module(lines) == MODULE


@pytest.mark.parametrize(
    ("good", "changes", "rule"),
    [
        (FACTOR, {"sizes": (1, 1, 512, 256, 8, 128), "strides": (16,) * 5 + (1,)}, "has 6 dimensions, over 5"),
        (FACTOR, {"box": (264, 1, 8, 128)}, "box outside 1 to 256"),
        (FACTOR, {"box": (0, 1, 8, 128)}, "box outside 1 to 256"),
        (FACTOR, {"sizes": (2**32 + 1, 256, 8, 128)}, "dimension outside 1 to 2^32"),
        (FACTOR, {"strides": (262144, 120, 32768, 1)}, "strides of [120] bytes, no multiples of 16"),
        (FACTOR, {"strides": (2**40, 128, 32768, 1)}, "strides of [1099511627776] bytes, 2^40 or more"),
        (FACTOR, {"strides": (262144, 128, 32768, 2)}, "elements 2 apart in its last dimension"),
        (FACTOR, {"swizzle": 64}, "rows of 128 bytes in its box, over its swizzle of 64"),
        (SCALES, {"box": (1, 6)}, "rows of 24 bytes in its box, no multiple of 16"),
        (SCALES, {"offset": 66}, "starts 264 bytes into its array"),
    ],
)
def test_each_rule_is_checked(good, changes, rule):
    assert broken_rules(good) == []
    (found,) = broken_rules(good._replace(**changes))
    assert rule in found
