"""Every kernel compiles for every architecture, fits its shared memory and does not spill.

On sm_90 its products are asynchronous: ptxas serialises them, with a remark that Triton hides,
where other instructions write their accumulators.

Compiling needs kernels that are not interpreted, so each architecture is a process of its own.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cut_cross_entropy.device_support import triton_version

KERNELS = Path(__file__).parents[2] / "cut_cross_entropy" / "kernels"

# Kernels whose few products wait for each other: a factor is made in registers or is transposed,
# or (with Triton 3.3) two sums of products are added.
WAITING = ("centers", "split_nodes", "sample_tail-terms")
# Bytes of stack per thread, where spills land, by the start of a variant's name; on sm_90, where
# the kernels are tuned, and with this release of Triton or newer: older ones spill more. 0 in the
# main loop of a plain loss; elsewhere the measured value, with a margin.
STACK_SINCE = (3, 9)
STACK = {
    # With energies and masses: training. Once for each tile, behind its products; with Triton 3.6 a
    # sixth of it.
    "lse-plain-001": 288,
    "lse-plain-000": 0,  # without: evaluation
    "lse-plain": 960,  # the short pass over frequent classes, and the repair of an overflow
    "lse-softcap-bias-001": 400,
    "lse-softcap-bias-000": 32,
    "lse-softcap-bias": 960,
    # Further sums of the same pass: outside of its main loop.
    "sums-plain": 704,
    "sums-softcap-bias": 1248,
    "terms-plain": 64,
    "terms-softcap-bias": 768,
    "exact-plain": 64,
    "exact-softcap-bias": 768,
    # Two programs share a multiprocessor, which leaves each 128 registers.
    "strips-plain-terms": 544,  # an entropy and a temperature; after its loop
    "strips-softcap-bias-terms": 800,
    "strips-plain": 288,
    "strips-softcap-bias": 512,
    # Columns of an adapter: loaded once for each tile, outside of the main loop.
    "adapted_lse": 448,
    "adapted_exact": 320,
    "adapted_strips-plain": 192,
    "adapted_strips-softcap-bias": 512,
    "added_grad_e": 32,  # around its loop, where the sums of earlier strips are loaded and stored
    "grad_c-0": 96,  # after its loop, where the tail is added
    "powers-softcap-bias": 16,
    "powers-softcap-bias-01": 48,  # with a temperature
    "powers-softcap-bias-11": 48,
    "centers-0": 192,  # float16 by float32 products
    "centers-1": 240,  # sums of twice the columns
    "counted-1": 640,  # after its loop, where float32 sums of earlier chunks are added
    "kept": 48,  # its two-dimensional tiles
    "split_nodes-1": 256,  # one program for 8,192 tokens
    "sampled_gradients-1": 256,  # after its loop
    "sampled_sums-*fp32": 64,
    "grad_c-1": 256,  # after its loop, where the sums of earlier superblocks are added
    "": 0,  # all others
}

SCRIPT = """
import json, sys
from tests.kernels.compiling import TARGETS, compile_variant, tiles_of, variants

name = sys.argv[1]
target, shared = TARGETS[name]
for variant in variants(tiles_of(name), everything=name == "sm_90"):
    found = {"name": variant.name, "kernel": variant.kernel.__name__, "limit": shared}
    try:
        found.update(vars(compile_variant(variant, target)))
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(found), flush=True)
"""


def compile_all(target: str) -> list[dict]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_DEFAULT_FP_FUSION": "1",  # the default; Triton 3.9 warns where it is not stated
    }
    command = [sys.executable, "-c", SCRIPT, target]
    root = KERNELS.parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# The architectures that take longest first, so that two processes end together.
@pytest.mark.parametrize("target", ["sm_100", "sm_90", "sm_80", "sm_120", "gfx942"])
def test_kernels_compile_and_fit(target):
    found = compile_all(target)
    failed = [f"{usage['name']}: {usage['error']}" for usage in found if "error" in usage]
    assert not failed, "\n".join(failed)
    too_large = [
        f"{usage['name']}: {usage['shared']} > {usage['limit']} bytes of shared memory"
        for usage in found
        if usage["shared"] > usage["limit"]
    ]
    assert not too_large, "\n".join(too_large)
    serialised = [
        usage["name"]
        for usage in found
        if usage["serialised"] and not usage["name"].startswith(WAITING)
    ]
    assert not serialised, f"products that wait for each other: {', '.join(serialised)}"
    if target == "sm_90" and triton_version() >= STACK_SINCE:
        spilled = [
            f"{usage['name']}: {usage['stack']} > {allowed} bytes of stack"
            for usage in found
            if usage["stack"] > (allowed := stack_allowed(usage["name"]))
        ]
        assert not spilled, "\n".join(spilled)
    assert {usage["kernel"] for usage in found} == defined_kernels()


def stack_allowed(name: str) -> int:
    return STACK[max((start for start in STACK if name.startswith(start)), key=len)]


def defined_kernels() -> set[str]:
    """Read the names of the kernels from the source of the package: none may be left out here."""
    return {
        node.name
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
