"""What a device does during a piece of work: operations, milliseconds, and which of them take the most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from covo_rl.run.speed import device_drained


def device_profile(device: torch.device, work: Callable[[], Any], *, top: int = 12) -> dict[str, Any]:
    """`busy_ms` and `operations` of the device, and the `top` ones as (name, calls, ms); on a CPU aten's own times.

    On CUDA only what ran there is counted, once: kernels, copies and fills, not the calls that launched them.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        work()
        device_drained(device)
    events = [event for event in profiler.key_averages() if (event.device_type.name != "CPU") == cuda]
    rows = [
        (event.key[:80], event.count, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000)
        for event in events
        if not getattr(event, "is_user_annotation", False)
    ]
    rows.sort(key=lambda row: -row[2])
    return {
        "busy_ms": sum(ms for _, _, ms in rows), "operations": sum(count for _, count, _ in rows), "top": rows[:top]
    }  # fmt: skip
