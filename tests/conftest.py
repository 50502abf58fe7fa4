"""The ordinary suite tests the CPU, also on a machine that has a GPU; `-m gpu` tests the GPU (tests/gpu/).

Tests compare with models on the CPU, start two ranks, and expect one precision and one order of sums. So accelerators
are hidden before torch looks for them, from workers and from the processes that tests start as well.
"""

import os
import re
import sys

import pytest

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ZE_AFFINITY_MASK": ""}


def wants_gpu(expression: str) -> bool:
    """Whether `-m EXPRESSION` asks for tests marked gpu."""
    rest = re.sub(r"not ?\([^)]*\)", "", " ".join(expression.split()))
    return re.search(r"(?<!not )\bgpu\b", rest) is not None


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # xdist would end with files of few tests, some of them long
        config.option.loadscopereorder = False
    if wants_gpu(config.option.markexpr):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic kernels need it, from the start
        return
    os.environ.update(HIDDEN)
    if sys.platform == "darwin":  # no variable hides mps from torch; this one names accelerate's device
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


@pytest.fixture(autouse=True)
def one_precision():
    """accelerate keeps one state per process: a trainer in bf16 (TRL's default) would leave it to the next tests."""
    yield
    state = sys.modules.get("accelerate.state")
    if state and state.AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        state.AcceleratorState._reset_state(True)
