"""CPU time that tests hold code to, on any machine: without other tests' garbage, in units of what this core does."""

import gc
import time
from collections.abc import Callable


def unit() -> float:
    """Seconds of one core for half a million steps of Python: what this machine, as busy as it is, does in them."""
    start = time.process_time()
    sum(i * i for i in range(500_000))
    return time.process_time() - start


def units(call: Callable[[], object]) -> float:
    """CPU time of `call()` in units measured just before and after it."""
    gc.freeze()  # what other tests left is not this call's to look through
    try:
        before, start = unit(), time.process_time()
        call()
        took = time.process_time() - start
        return 2 * took / (before + unit())
    finally:
        gc.unfreeze()


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of `call()` on a core that does a unit in 0.02 s."""
    return units(call) * 0.02
