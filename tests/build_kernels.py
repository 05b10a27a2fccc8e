"""Build the kernels for GPUs that this machine may lack, and check the machine code. This needs triton, no GPU.

    python -m tests.build_kernels gates     or norms: spilled registers, instructions, width of loads, offsets
    python -m tests.build_kernels passes    loads and stores, against TRANSFERS

test_experiments.py runs all three. Triton compiles only in a process without TRITON_INTERPRET.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

import gates_triton as gates

SM_80, SM_90, GFX942 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
GATES = [getattr(gates, f"_{gate}_{way}") for gate in gates.TRANSFERS if gate != "norm" for way in ("fwd", "bwd")]
NORMS = gates._norm_sums, gates._norm_fwd, gates._norm_bwd_sums, gates._norm_bwd
GROUPS = gates._group_fwd, gates._group_bwd
LARGE = "x_ptr", "g_ptr", "out_ptr", "dx_ptr"  # as large as a photo; the other tensors of a norm are float32
CONSTANTS = dict(BLOCK=gates.BLOCK, SPAN=gates.SPAN, RELU=True, EPS=1e-5, SPLITS=128, WIDTH=8, PIXELS=2048)
MOST = {gates._norm_sums: 23, gates._norm_fwd: 25, gates._norm_bwd_sums: 45, gates._norm_bwd: 45,
        gates._group_fwd: 40, gates._group_bwd: 60}  # instructions of an element; of _group_* they include the sums


def built_for_gpu(kernel, dtype, target, n_type="i32", n_even=True, warps=4, **constants):
    """As Triton's launcher does. n_even: sizes are multiples of 16, as pointers are."""
    constants = CONSTANTS | constants
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[i,] = "constexpr", constants[name]
        else:
            size = name in ("n", "HW", "M", "groups", "width")
            small = kernel not in GATES and name not in LARGE and dtype != "fp64"
            signature[name] = n_type if name == "n" else "i32" if size else "*fp32" if small else f"*{dtype}"
            if not size or n_even and name not in ("groups", "width"):
                attrs[i,] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=target, options={"num_warps": warps})


def nvidia_tool(name, option, built):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        return subprocess.check_output([tool, option, file.name], text=True, stderr=subprocess.STDOUT)


def check_code(kernel, dtype, target=SM_90, most=None, wide=None, **how):
    """No register is spilled, an element takes at most so many instructions, and the wide loads and stores are these.
    cuobjdump calls the bytes that a thread keeps in memory for want of registers STACK or LOCAL."""
    built, at = built_for_gpu(kernel, dtype, target, **how), (kernel, dtype, target, how)
    assert re.findall(" (?:STACK|LOCAL):([0-9]+) ", nvidia_tool("cuobjdump", "-res-usage", built)) == ["0", "0"], at
    if most:
        code = nvidia_tool("nvdisasm", "-c", built)
        elements = 8 if kernel in GATES else 32  # of a thread
        each = len(re.findall(r"^ +/[*][0-9a-f]{4,5}[*]/(?! *NOP)", code, re.M)) / elements
        print(f"{kernel.fn.__name__:16}{dtype:6}{each:5.1f} instructions an element of at most {most}", how)
        assert each <= most, at
        every = set(re.findall("(?:LDG|STG)[.][A-Z0-9.]*", code))  # 128 bits: each moves 16 bytes
        assert (every if kernel in GATES else every & {"LDG.E.128", "STG.E.128"}) == wide, at


def check_amd(kernel, *wide):
    code = built_for_gpu(kernel, "fp32", GFX942).asm["amdgcn"]
    assert all(x in code for x in wide) and set(re.findall("_spill_count: +([0-9]+)", code)) == {"0"}, kernel


def check_gates():
    for kernel in GATES:
        for dtype in "fp32", "bf16":  # bf16 has time for 70 instructions
            check_code(kernel, dtype, most=69, wide={"LDG.E.128", "STG.E.128"})
        check_code(kernel, "fp16"), check_code(kernel, "fp64")
        check_code(kernel, "bf16", SM_80, n_even=False)
        check_code(kernel, "fp32", SM_80, n_type="i64")  # n past 2**31
        check_amd(kernel, "global_load_dwordx4", "global_store_dwordx4")
        # Every address is pointer + int64, and the program's number is widened before it is multiplied.
        code = built_for_gpu(kernel, "fp32", SM_90).asm["ttir"]
        assert len(re.findall("tt.addptr .*xi64>", code)) == len(re.findall("tt.addptr", code)) > 0, kernel
        assert re.search("arith.muli .* : i64", code) and not re.search("arith.muli .* : i32", code), kernel
        masked = re.findall(r"tt[.](?:load %\w+|store %\w+, %\w+), %\w+ ", code)  # none reads or writes past the end
        assert len(masked) == len(re.findall(r"tt[.](?:load|store) ", code)), kernel


def check_norms():
    """H200: 7.8 instructions take the time of a byte. A norm moves 4 or 8 forward, 6 or 12 backward and g's sums."""
    for kernel in NORMS + GROUPS:
        how = dict(warps=16) if kernel in GROUPS else dict(BLOCK=gates.SPAN)  # a thread has 32 elements either way
        wide = {"LDG.E.128"} if kernel in NORMS[::2] else {"LDG.E.128", "STG.E.128"}
        for dtype, even in itertools.product(("fp32", "bf16"), (True, False)):
            check_code(kernel, dtype, most=MOST[kernel], wide=wide if even else set(), n_even=even, **how)
        half = how | (dict(PIXELS=1024) if kernel in GROUPS else {})  # a group of float64 is half as large
        check_code(kernel, "fp64", SM_80, n_even=False, **half)
        large = how | ({} if kernel in GROUPS else dict(SPAN=64 * gates.SPAN, SPLITS=256))  # 8 megapixels and more
        check_code(kernel, "fp32", SM_90, n_even=False, **large)
        check_amd(kernel, "global_load_dwordx4")
        # A photo's start is at pointer + int64, multiplied as int64. Within a group int32 suffices.
        code = built_for_gpu(kernel, "fp16", SM_90).asm["ttir"]
        starts = len(re.findall("tt.addptr .*!tt.ptr<f16>, i64", code))
        assert starts == sum(name in LARGE for name in kernel.arg_names), kernel
        assert re.search("arith.muli .* : i64", code), kernel


def check_passes():
    traffic = lambda built: (built.asm["ttir"].count("tt.load"), len(re.findall("tt.load|tt.store", built.asm["ttir"])))
    counts = [fused for gate in gates.TRANSFERS.values() for fused, *_ in gate.values()]  # those of the norm come last
    for kernel, count in zip(GATES, counts):
        assert traffic(built_for_gpu(kernel, "fp32", SM_90))[1] == count, kernel

    # Photo-sized tensors of a norm: x to sum up; x and y; g and x to sum up; g, x and dx; x and y; g, x and dx.
    # The other loads and stores are weight, bias, and two or four partial sums.
    # _norm_sums has two loads of x in its code, for the first block and for the others.
    counts = (2, 5, 6, 9, 3, 4), (2, 1, 2, 1, 1, 3), (2, 2, 2, 3, 2, 3)
    for kernel, loads, stores, large in zip(NORMS + GROUPS, *counts, strict=True):
        built = built_for_gpu(kernel, "fp16", SM_90)
        assert traffic(built) == (loads, loads + stores), kernel
        assert len(re.findall("tt.load.*<f16>|tt.store.*<f16>", built.asm["ttir"])) == large, kernel
    assert [1 + 2, 2 + 3] == [fused for fused, *_ in gates.TRANSFERS["norm"].values()]


if __name__ == "__main__":
    assert not gates.INTERPRETED, "TRITON_INTERPRET is set"
    {"gates": check_gates, "norms": check_norms, "passes": check_passes}[sys.argv[1]]()
