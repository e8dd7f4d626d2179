"""The Triton forward compiled ahead of time for GPUs that are not here: its budgets."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.triton

# Runs without TRITON_INTERPRET, under which there is nothing to compile.
PROGRAM = '''
import json, os, re, subprocess, sys, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from umamba.ops.triton_forward import carry_kernel, scan_kernel

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


def compiled(kernel, target, absent=(), types=(), **constants):
    """The kernel for tensors of float32 or of `types`, without those that are absent."""
    signature, alignment = {}, {}
    tensors = "u delta A B C D z bias enter out last states ends sums initial".split()
    constants.update(dict.fromkeys(absent))
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in tensors or name == "table":
            signature[name] = "*" + ("i64" if name == "table" else dict(types).get(name, "fp32"))
            alignment[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=alignment)
    return triton.compile(source, target=target, options={"num_warps": 1})


def disassembled(binary, tool, *options):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [os.path.join(TOOLS, tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def token_loop(assembly):
    """The instructions of the innermost loop with the most of them."""
    labels, instructions, loops = {}, [], []
    for line in assembly.splitlines():
        if label := re.match(r"(\\.L_x_\\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"/\\*[0-9a-f]+\\*/\\s+(.*?);", line.strip()):
            instructions.append(re.sub(r"^@!?U?P\\w+ +", "", code[1]))
    for end, code in enumerate(instructions):
        target = re.search(r"^BRA.*`\\((\\.L_x_\\d+)\\)", code)
        if target and labels.get(target[1], end + 1) < end:
            loops.append((labels[target[1]], end + 1))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return instructions[start:end]


options = dict(SOFTPLUS=True, SUM=False, WIDE_B=True, WIDE_C=True, INDEX=tl.int32, N=16, WINDOW=0,
               LANES=32)
training = ("enter", "ends", "sums")
ends_only = ("C", "D", "z", "enter", "out", "last", "states")
hopper, ampere = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32)
report = {}
for name, target, absent, changed in (
    ("training", hopper, training, {}),
    ("ends", hopper, ends_only, {}),
    ("ampere", ampere, training, {}),
    ("window", hopper, training, {"WINDOW": 16}),
):
    made = compiled(scan_kernel, target, absent, **{**options, **changed})
    usage = disassembled(made.asm["cubin"], "cuobjdump", "-res-usage")
    loop = token_loop(disassembled(made.asm["cubin"], "nvdisasm", "-c"))
    names = [code.split()[0].split(".")[0] for code in loop]
    report[name] = {
        "registers": int(re.search(r"REG:(\\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\\d+)", usage)[1]),
        "local": names.count("LDL") + names.count("STL"),
        "shuffles": names.count("SHFL"),
        "special": names.count("MUFU"),
        "loads": names.count("LDG"),
        "instructions": len(loop),
    }
halves = dict.fromkeys(("u", "delta", "z", "out", "B", "C"), "bf16")
compiled(scan_kernel, hopper, ("ends", "sums"), halves, **{**options, "N": 5, "WIDE_B": False,
         "WIDE_C": False, "INDEX": tl.int64, "WINDOW": 4})
compiled(carry_kernel, hopper, (), N=16, BLOCK=128)
amd = compiled(scan_kernel, GPUTarget("hip", "gfx942", 64), training, **{**options, "LANES": 64})
report["amd"] = {"spills": int(re.search(r"vgpr_spill_count: +(\\d+)", amd.asm["amdgcn"])[1])}
print(json.dumps(report))
'''


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, float]]:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True, text=True, check=False, env=variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", ["training", "ends", "ampere", "window"])
def test_states_stay_in_registers_and_lanes_need_not_meet(report, kernel):
    found = report[kernel]
    assert found["stack"] == found["local"] == found["shuffles"] == 0


def test_a_token_costs_few_instructions(report):
    training, ends = report["training"], report["ends"]
    # 16 exp2 of the decay, one of the softplus, and the gate's exp2 and reciprocal
    assert training["special"] == 19 and ends["special"] == 17
    assert training["loads"] == 11 and ends["loads"] == 6
    assert training["registers"] <= 72 and training["instructions"] <= 150
    assert ends["registers"] <= 80 and ends["instructions"] <= 108


def test_it_compiles_for_amd_without_spills(report):
    assert report["amd"]["spills"] == 0
