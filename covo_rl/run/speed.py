"""How fast this machine is, measured in a second: products in a dtype, and copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

MIB = 2**20


class Speed(NamedTuple):
    """What the device does: operations of products per second, and bytes per second, read and written together by a
    copy: in use rather than on paper."""

    flops: float
    bandwidth: float


def measure_speed(device: str = "auto", dtype: str = "float32") -> Speed:
    """A quick measurement of this machine: square products in `dtype`, copies of more than its caches hold."""
    import torch

    from covo_rl.train.launch import device_of

    chosen = device_of(device)
    gpu = chosen.type != "cpu"
    n, elements, calls = (8192, 512 * MIB, 10) if gpu else (768, 32 * MIB, 1)
    square = torch.randn(n, n, device=chosen).to(getattr(torch, dtype))
    source = torch.zeros(elements, device=chosen, dtype=torch.float16)
    target = torch.empty_like(source)
    moved = 2.0 * source.numel() * source.element_size()

    def rate(work: float, function: Callable[[], Any]) -> float:
        """Several calls between two waits for the device, which take longer than a call; the best of three."""

        def seconds() -> float:
            device_drained(chosen)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            device_drained(chosen)
            return time.perf_counter() - start

        return calls * work / min([seconds() for _ in range(4)][1:])  # the first warms up

    return Speed(rate(2.0 * n**3, lambda: square @ square), rate(moved, lambda: target.copy_(source)))


def device_drained(device: Any) -> None:
    """Return when the device has done everything that was asked of it; a CPU has."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
