"""How fast this machine is, measured in a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

MIB = 2**20


class Speed(NamedTuple):
    """What the device does: products per second and bytes read per second, in use rather than on paper."""

    flops: float
    bandwidth: float


def measure_speed(device: str = "auto") -> Speed:
    """A quick measurement of this machine: one product, one copy."""
    import torch

    from covo_rl.train.launch import device_of

    chosen = device_of(device)
    gpu = chosen.type == "cuda"
    n = 4096 if gpu else 768
    square, large = torch.randn(n, n, device=chosen), torch.empty((256 if gpu else 64) * MIB // 4, device=chosen)

    def rate(work: float, function: Callable[[], Any]) -> float:
        def seconds() -> float:
            start = time.perf_counter()
            function()
            if gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        return work / min([seconds() for _ in range(4)][1:])  # the first warms up

    return Speed(rate(2.0 * n**3, lambda: square @ square), rate(4.0 * large.numel(), lambda: large.sum()))
