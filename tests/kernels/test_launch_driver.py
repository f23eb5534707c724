"""Launches by the installed Triton's own launcher, with a CUDA driver that launches nothing."""

import os
import shutil
import subprocess
import sys

import pytest

COMPILER = shutil.which("gcc") or shutil.which("cc")

# Notes the launches; the parameters are the last 32 bits of an address, an integer and a float.
DRIVER = """
unsigned launched[8];

static int note(unsigned *sizes, unsigned threads, void **parameters) {
    for (int i = 0; i < 3; i++) launched[1 + i] = sizes[i];
    for (int i = 0; i < 3; i++) launched[5 + i] = *(unsigned *)parameters[i];
    launched[4] = threads;
    launched[0]++;
    return 0;
}

int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty,
                   unsigned tz, unsigned shared, void *stream, void **parameters, void **extra) {
    unsigned sizes[] = {x, y, z};
    return note(sizes, threads, parameters);
}

int cuLaunchKernelEx(unsigned *config, void *f, void **parameters, void **extra) {
    return note(config, config[3], parameters);
}

int cuPointerGetAttribute(void **out, int attribute, void *pointer) { *out = pointer; return 0; }
int cuDeviceGetAttribute(int *out) { *out = 200000; return 0; }
int cuFuncGetAttribute(int *out) { *out = 1024; return 0; }
int cuCtxGetCurrent(long *out) { *out = 1; return 0; }
int cuModuleLoadData(long *out) { *out = 1; return 0; }
int cuModuleGetFunction(long *out) { *out = 1; return 0; }
int cuGetErrorString(int error, const char **out) { *out = "stub"; return 0; }
"""
NOT_CALLED = (
    "CtxGetDevice CtxGetLimit CtxSetCurrent CtxSetLimit DeviceGet DevicePrimaryCtxRetain "
    "DriverGetVersion FuncSetAttribute FuncSetCacheConfig ModuleUnload StreamIsCapturing"
)

PROGRAM = """
import ctypes
import torch
import triton
import triton.language as tl

torch._C._cuda_getDevice = torch.cuda.current_device = lambda: 0
torch._C._cuda_getCurrentRawStream = lambda device: 0

from triton.backends.nvidia.driver import CudaDriver

driver = CudaDriver()
driver.get_current_device, driver.get_current_stream = lambda: 0, lambda device: 0
driver.get_device_capability = lambda device: (9, 0)
triton.runtime.driver.set_active(driver)
from cut_cross_entropy.kernels import launch


@triton.jit(do_not_specialize=["N"])
def kernel(x_ptr, N, factor, bias_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr, N * factor + BLOCK)


library = ctypes.CDLL("libcuda.so.1")
launched = (ctypes.c_uint * 8).in_dll(library, "launched")
told = []
enter = launch._HOOKS.launch_enter_hook
for grid in ((3,), (3, 2), (3, 2, 5)):
    for N, x in ((7, torch.zeros(8)), (16, torch.ones(8))):
        arguments = dict(x_ptr=x, N=N, factor=1.5, bias_ptr=None, BLOCK=8, num_warps=4)
        kernel[grid](**arguments)
        count, *expected = launched
        for _ in range(2):
            launch.launch(kernel, grid, **arguments)
            assert list(launched) == [count + 1, *expected], (list(launched), count, expected)
            count += 1
        if hasattr(enter, "add"):
            enter.add(told.append)
        else:
            launch._HOOKS.launch_enter_hook = told.append
        launch.launch(kernel, grid, **arguments)
        assert list(launched) == [count + 1, *expected], (list(launched), expected)
        if hasattr(enter, "remove"):
            enter.remove(told.append)
        else:
            launch._HOOKS.launch_enter_hook = None
(layout,) = launch._layouts.values()
(code,) = layout.codes.values()
print("direct" if code._call is not None else "by Triton", len(told))
"""


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, as Triton does")
def test_the_same_values_reach_the_driver(tmp_path):
    source = tmp_path / "driver.c"
    others = [f"int cu{name}() {{ return 0; }}" for name in NOT_CALLED.split()]
    source.write_text("\n".join([DRIVER, *others]))
    library = tmp_path / "libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    (tmp_path / "program.py").write_text(PROGRAM)  # Triton reads a kernel from its file
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["direct", "6"]
