"""Prints what the kernels of the scan's backward compile to, as JSON; runs without a GPU.

python compiled_backward.py TARGET GATE TYPE WINDOW, with TARGET sm_90, sm_80 or gfx942.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from umamba.ops.layout import CHUNK
from umamba.ops.triton_backward_kernels import segment_carries, sweep
from umamba.ops.triton_scan_backward import GROUP, PART, WINDOW_GROUP

BLOCK_E, N = 32, 16
TILE = BLOCK_E * N // 32  # (channel, state) pairs of a lane
TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
IO = ("u", "delta", "z", "dout", "du", "ddelta", "dz", "B", "C")
INTEGERS = {"table": "*i64", "places": "*i32"}
SIZES = ("n_batch", "n_directions", "E", "L", "n_tiles", "n_segments", "segment_chunks")


def compile_kernel(kernel, target: str, gate: bool, io: str, window: int):  # type: ignore[no-untyped-def]
    """Compiles for contiguous channels of one group, every option but those of the ends."""
    group, n_kept = (WINDOW_GROUP, 2) if window else (GROUP, 1)
    constants: dict[str, object] = {
        "N": N, "BLOCK_N": N, "BLOCK_E": BLOCK_E, "SOFTPLUS": True, "CHUNK": CHUNK,
        "ADD_U": False, "ADD_Z": False, "SHARED_U": False, "SHARED_Z": False,
        "GROUP": group, "PART": PART, "WINDOW": window, "dinitial": None,
        "SCRATCH": CHUNK * (4 * BLOCK_E + 2 * N + n_kept * BLOCK_E * N // group),
        **dict.fromkeys(("G", "u_e", "delta_e", "z_e", "dout_e", "B_n", "C_n"), 1),
    }  # fmt: skip
    if not gate:
        constants |= {"z": None, "dz": None, "z_b": 0, "z_k": 0, "z_l": 0}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        is_size = name in SIZES or name == "first"
        is_stride = bool(re.fullmatch(r"\w+_[bkgl]", name))
        if name in constants:
            signature[name] = "constexpr"
        elif is_size or is_stride:
            signature[name] = "i32"
        else:
            signature[name] = INTEGERS.get(name, f"*{io if name in IO else 'fp32'}")
        if name not in constants and (name == "E" or not is_size):
            attributes[(i,)] = [["tt.divisibility", 16]]
    given = {name: x for name, x in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=given, attrs=attributes)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS[target], options=options)


def disassemble(compiled) -> tuple[list[str], dict[str, int], int]:  # type: ignore[no-untyped-def]
    """Return the instructions, where labels stand among them, and the registers of a lane."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, usage = (
            subprocess.run([TOOLS / tool, flag, file.name], capture_output=True, text=True).stdout
            for tool, flag in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?(.*?);", line):
            instructions.append(found[1].strip())
    return instructions, labels, int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]


def find_loops(instructions: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Return the loops as ranges of instructions, in the order of the program."""
    found = []
    for i, instruction in enumerate(instructions):
        jump = re.match(r"BRA.*?(\.L\w+)", instruction)
        if jump and labels[jump[1]] < i:
            found.append((labels[jump[1]], i + 1))
    return sorted(found)


def measure(instructions: list[str], loop: tuple[int, int]) -> dict[str, int]:
    part = instructions[slice(*loop)]
    counts = collections.Counter(instruction.split(maxsplit=1)[0] for instruction in part)
    kinds = {"shuffles": "SHFL", "exponentials": "MUFU.EX2", "spills": ("LDL", "STL")}
    return {"slots": len(part)} | {
        kind: sum(n for name, n in counts.items() if name.startswith(start))
        for kind, start in kinds.items()
    }


def main(target: str, gate: str, io: str, window: str) -> None:
    compiled = compile_kernel(sweep, target, gate == "gate", io, int(window))
    carries = compile_kernel(segment_carries, target, gate == "gate", io, 0)
    if target == "gfx942":
        print(json.dumps({"compiled": "amdgcn" in compiled.asm and "amdgcn" in carries.asm}))
        return
    instructions, labels, registers = disassemble(compiled)
    whole, *inner = find_loops(instructions, labels)
    assert len(inner) == 4 and all(a[1] <= b[0] for a, b in itertools.pairwise(inner))
    names = ("prepare", "walk", "return", "finish")
    group = WINDOW_GROUP if int(window) else GROUP
    tokens = dict(zip(names, (PART, group, group, PART), strict=True))
    loops = {name: measure(instructions, x) for name, x in zip(names, inner, strict=True)}
    slots = {name: x["slots"] / (tokens[name] * TILE) for name, x in loops.items()}
    rest = measure(instructions, whole)["slots"] - sum(x["slots"] for x in loops.values())
    result = {"registers": registers, "rest": rest / (CHUNK * TILE), "slots": slots}
    result |= {
        kind: {name: x[kind] / tokens[name] for name, x in loops.items()}
        for kind in ("shuffles", "exponentials", "spills")
    }
    result["total"] = sum(slots.values()) + result["rest"]
    instructions, labels, result["carry_registers"] = disassemble(carries)
    (loop,) = find_loops(instructions, labels)
    result["carry"] = measure(instructions, loop)["slots"] / (4 * TILE)
    result["carry_spills"] = measure(instructions, loop)["spills"]
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
