"""The kernels are built for real GPUs, which a machine without one can do too. build_kernels.py has the checks."""

import sys

import pytest
from conftest import process

import gates_triton


@pytest.mark.skipif(sys.platform != "linux" or not gates_triton.triton, reason="triton's compilers ship for Linux")
@pytest.mark.parametrize("part", ["gates", "norms", "passes"])
def test_kernels_built_for_real_gpus(part):
    done = process("-m", "tests.build_kernels", part, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
