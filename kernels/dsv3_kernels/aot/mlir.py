"""The launch of a kernel as Mosaic first writes it in MLIR: shared memory, descriptors of TMA.

Mosaic dumps its module before each pass; the first is read, in which every argument of the host's calls is a constant
or has a type that gives it. What follows the launch runs on the GPU and is not read.
"""

import re
from collections.abc import Iterable, Mapping

from dsv3_kernels.aot.descriptor import Descriptor

SUFFIX = ".mlir-passes.log"
"""How the name of a dump ends."""
DUMP_MARK = "// -----// IR Dump"
"""How the module before each pass starts."""
_DEFINITION = re.compile(r"^\s*(%[\w.$-]+) = (.*)$", re.MULTILINE)
_VALUE = re.compile(r"%[\w.$-]+")
_CONSTANT = re.compile(r"arith\.constant (-?\d+)\b")
_STORE = re.compile(r"memref\.store (%[\w.$-]+), (%[\w.$-]+)\[(%[\w.$-]+)\]")
_DESCRIPTOR = re.compile(r"call @mosaic_gpu_init_tma_desc\(([^)]*)\)")
_MEMREF = re.compile(r": memref<((?:\d+x)+)([a-z]+(\d+)\w*)(?:, strided<\[([\d, ]*)\](?:, offset: (\d+))?>)?")


def first_module(lines: Iterable[str]) -> str:
    """The module before the first pass, from the lines of a dump; the others are not read."""
    marks = 0
    module = []
    for line in lines:
        marks += line.startswith(DUMP_MARK)
        if marks > 1:
            break
        module.append(line)
    return "".join(module)


def parse_shared_bytes(module: str) -> int:
    """Dynamic shared memory of a block, from the launch.

    Raises: ValueError if there is no launch.
    """
    size = re.search(r"dynamic_shared_memory_size (%[\w.$-]+)", module)
    if size is None:
        raise ValueError("Mosaic's MLIR launches no kernel with a size of shared memory")
    return _constant(size[1], _definitions(_host(module)))


def parse_descriptors(module: str) -> list[Descriptor]:
    """What the host gives to cuTensorMapEncodeTiled before the launch, in that order.

    Raises: ValueError for an argument that is neither a constant nor given by a type.
    """
    host = _host(module)
    definitions = _definitions(host)
    arrays: dict[str, dict[int, int]] = {}
    for value, array, index in _STORE.findall(host):
        if _CONSTANT.match(definitions.get(value, "")):
            arrays.setdefault(array, {})[_constant(index, definitions)] = _constant(value, definitions)
    found = []
    for call in _DESCRIPTOR.finditer(host):
        _, base, _, _, _, _, swizzle, box = _VALUE.findall(call[1])
        array = arrays[_origin(box, "memref.alloca", definitions)]
        memref = _MEMREF.search(definitions[_origin(base, "builtin.unrealized_conversion_cast", definitions)])
        if memref is None:
            raise ValueError(f"Mosaic's MLIR has a descriptor of no memref: {call[0]}")
        dimensions, dtype, bits, strides, offset = memref.groups()
        sizes = tuple(map(int, dimensions.rstrip("x").split("x")))
        found.append(
            Descriptor(
                sizes=sizes,
                strides=tuple(map(int, strides.split(","))) if strides else _contiguous(sizes),
                box=tuple(array[index] for index in sorted(array)),
                dtype=dtype,
                item_bytes=int(bits) // 8,
                swizzle=_constant(swizzle, definitions),
                offset=int(offset or 0),
            )
        )
    return found


def _host(module: str) -> str:
    """What runs before the kernel, up to the line of its launch."""
    launch = re.search(r"^.*gpu\.launch .*$", module, re.MULTILINE)
    return module[: launch.end()] if launch else module


def _definitions(host: str) -> dict[str, str]:
    """What each value with one result is."""
    return dict(_DEFINITION.findall(host))


def _constant(name: str, definitions: Mapping[str, str]) -> int:
    found = _CONSTANT.match(definitions.get(name, ""))
    if found is None:
        raise ValueError(f"{name} of Mosaic's MLIR is no constant but {definitions.get(name)!r}")
    return int(found[1])


def _origin(name: str, operation: str, definitions: Mapping[str, str]) -> str:
    """The value of `operation` that `name` is computed from, by its first operands."""
    while not definitions.get(name, "").startswith(operation):
        operand = _VALUE.search(definitions.get(name, ""))
        if operand is None:
            raise ValueError(f"Mosaic's MLIR computes {name} from no {operation}")
        name = operand[0]
    return name


def _contiguous(sizes: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)
