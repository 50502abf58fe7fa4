"""Every test here takes `device`: on a GPU under `pytest -m gpu`, and on the CPU as part of the ordinary suite."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: run pytest -m gpu on a machine that has one")
    return torch.device(request.param)


@pytest.fixture
def whole_float32():
    """No TF32: what the tolerances of float32 are stated for. Convolutions have it by default."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def launched(device, monkeypatch):
    """`launched("bf16")`: from here on accelerate takes this process as one started with that mixed precision."""
    if device.type == "cpu":
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")

    def launch(mixed_precision: str = "no") -> None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed_precision)
        AcceleratorState._reset_state(True)

    yield launch
    monkeypatch.undo()
    AcceleratorState._reset_state(True)
    Accelerator(cpu=True)


@pytest.fixture
def repeatable():
    """Only deterministic kernels; conftest.py of the suite sets cuBLAS's workspace for them."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
