"""Triton kernels without a GPU: correct in the interpreter, and compiled for sm_90 without spilling registers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_cm3leon.generation import attention_kernels, kernels, products
from megatron_cm3leon.generation.fused_step import CHUNK, AttentionConstants

ROOT = Path(__file__).parents[2]
H100 = GPUTarget("cuda", 90, 32)
SIZES = {"350m": (1024, 16), "7b": (4096, 32)}
WEIGHTS = {"bf16": "*bf16", "int8": "*i8", "fp8": "*fp8e4nv"}


def run_interpreted(marks: str) -> None:
    """Run tests/interpreted in a process with the interpreter of Triton."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/interpreted",
        "-m",
        marks,
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "timeout=3600",
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_the_kernels_are_correct():
    run_interpreted("not slow")


@pytest.mark.slow
def test_the_kernels_are_correct_at_width_4096():
    run_interpreted("slow")


def compile_kernel(kernel, name: str, types: dict[str, str], constants: dict, warps: int, stages: int = 3) -> str:
    """Compile for an H100, print the resources of the kernel, and fail on spilled registers; returns the assembly."""
    aligned = [number for number, kind in enumerate(types.values()) if kind[0] == "*" or kind == "i32"]
    attributes = {(number,): [["tt.divisibility", 16]] for number in aligned if list(types)[number] != "w_ptr"}
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=H100, options={"num_warps": warps, "num_stages": stages})
    registers, stack, local = read_usage(compiled.asm["cubin"])
    print(f"{name}: {registers} registers, {compiled.metadata.shared} bytes of shared memory, {stack} of stack")
    assert registers <= 255 and stack == local == 0, name
    assert compiled.metadata.shared <= 227 << 10, name
    return compiled.asm["ptx"]


def read_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers of a thread, bytes of stack (where spilled registers go) and of local memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"kernel-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    try:
        printed = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    finally:
        path.unlink()
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed).groups()))


def compile_rows(name, units, width, rows, kind, norm, epilogue, overlap=False) -> str:
    itemsize = 2 if kind == "bf16" else 1
    tile = products.choose_tile(rows, units, width, itemsize)
    types = dict.fromkeys(("x_ptr", "w_ptr", "scale_ptr", "weight_sums_ptr", "gain_ptr", "y_ptr"), "*bf16")
    types |= {"w_ptr": WEIGHTS[kind], "scale_ptr": "*fp32", "weight_sums_ptr": "*fp32", "N": "i32", "epsilon": "fp32"}
    constants = {
        "K": width, "ROWS": rows, "NORM": norm, "EPILOGUE": epilogue, "SCALED": kind != "bf16", "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k, "LANE": products.lane_width(width, 2), "UNROLL": tile.unroll, "OVERLAP": overlap,
    }  # fmt: skip
    return compile_kernel(kernels.multiply_kernel, f"{name} {kind}, {rows} rows", types, constants, tile.warps)


def compile_attention(name: str, heads: int, groups: int, width: int, qk_norm: bool, rope: bool) -> None:
    setting = AttentionConstants.of(heads, groups, width)
    types = dict.fromkeys(("qkv_ptr", "keys_ptr", "values_ptr", "lengths_ptr", "gain_ptr"), "*bf16")
    types |= dict.fromkeys(("cosine_ptr", "sine_ptr", "part_ptr", "largest_ptr", "sum_ptr"), "*fp32")
    types |= {"lengths_ptr": "*i64", "size": "i32", "chunks": "i32", "scale": "fp32", "epsilon": "fp32"}
    shared = {"HEADS": heads, "D": width, "BLOCK_D": setting.block_d, "CHUNK": CHUNK, "OVERLAP": False}
    constants = {**shared, "GROUPS": groups, "QK_NORM": qk_norm, "ROPE": rope, "M": setting.members}
    compile_kernel(attention_kernels.attend_kernel, f"attention {name}", types, constants, setting.warps)
    types = {"part_ptr": "*fp32", "largest_ptr": "*fp32", "sum_ptr": "*fp32", "lengths_ptr": "*i64", "y_ptr": "*bf16"}
    constants = {**shared, "CHUNKS": 64}
    compile_kernel(attention_kernels.combine_kernel, f"combination {name}", {**types, "chunks": "i32"}, constants, 4)


def test_a_product_compiles_for_sm_90():
    """The kernel that takes most of the time of a step: qkv of 7b, for both prompts of guidance."""
    plain = compile_rows("7b qkv", 3 * 4096, 4096, 2, "int8", kernels.LAYER_NORM, kernels.STORE)
    assert "griddepcontrol" not in plain


def test_an_overlapping_kernel_waits_before_it_reads():
    assembly = compile_rows("7b fc2", 4096, 16384, 2, "bf16", kernels.NO_NORM, kernels.ADD, overlap=True)
    assert 0 < assembly.index("griddepcontrol.launch_dependents") < assembly.index("griddepcontrol.wait")
    assert assembly.index("griddepcontrol.wait") < assembly.index("ld.global")


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(WEIGHTS))
@pytest.mark.parametrize("size", list(SIZES))
def test_every_product_of_a_step_compiles_without_spills(size, kind):
    hidden, _ = SIZES[size]
    for rows in (2, 4):
        compile_rows(f"{size} qkv", 3 * hidden, hidden, rows, kind, kernels.LAYER_NORM, kernels.STORE)
        compile_rows(f"{size} fc1", 4 * hidden, hidden, rows, kind, kernels.LAYER_NORM, kernels.GELU)
        compile_rows(f"{size} fc2", hidden, 4 * hidden, rows, kind, kernels.NO_NORM, kernels.ADD)
    compile_rows(f"{size} gate and up", 22016, hidden, 2, kind, kernels.RMS_NORM, kernels.SWIGLU)


@pytest.mark.slow
def test_attention_compiles_without_spills():
    compile_attention("350m", 16, 16, 64, False, False)
    compile_attention("760m, heads 96 wide", 16, 16, 96, False, False)
    compile_attention("7b", 32, 32, 128, False, False)
    compile_attention("llama 7b, grouped queries", 32, 8, 128, False, True)
    compile_attention("qwen3 8b", 32, 8, 128, True, True)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 64, 2048])
def test_products_of_more_rows_compile_without_spills(rows):
    block_m, block_n, block_k, warps, stages = products.product_blocks(rows, 12288, 4096)
    types = {"x_ptr": "*bf16", "w_ptr": "*i8", "scale_ptr": "*fp32", "y_ptr": "*bf16", "rows": "i32", "units": "i32"}
    constants = {"K": 4096, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    compile_kernel(products.product_kernel, f"int8, {rows} rows", types, constants, warps, stages)
