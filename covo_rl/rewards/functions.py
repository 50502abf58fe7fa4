"""Functions of the program that runs: closures, lambdas, objects of a notebook. They have no name that another process
could load, so they run in a thread of this one, and the record of a run holds their source in place of a file.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import textwrap
import threading
from collections.abc import Callable
from typing import Any

from covo_rl.rewards.call import Interrupted
from covo_rl.rewards.specs import Reward, Source


class FunctionReward(Reward):
    """A live object as a reward, under its own name."""

    def __init__(self, function: Callable[..., Any]) -> None:
        name = getattr(function, "__name__", type(function).__name__)
        super().__init__(Source(name, name, "object", repr(function)), function)

    @property
    def code(self) -> str | None:
        """Its source text; None where Python keeps none (built in, or typed into a bare interpreter).

        What a closure caught, and what other functions of the program do, is not in it.
        """
        try:
            return textwrap.dedent(inspect.getsource(self.target if _has_code(self.target) else type(self.target)))
        except (TypeError, OSError):
            return None

    @property
    def sha256(self) -> str | None:
        """Of `code`, else of the instructions and constants; None where there are none (built in)."""
        if (text := self.code) is not None:
            return hashlib.sha256(text.encode()).hexdigest()
        code = getattr(self.target, "__code__", None)
        return hashlib.sha256(repr((code.co_code, code.co_names)).encode()).hexdigest() if code else None


def _has_code(target: Any) -> bool:
    return hasattr(target, "__code__") or inspect.ismethod(target)


def interrupt(thread: threading.Thread) -> None:
    """Raise Interrupted in a thread at its next line of Python; what C code does in it goes on until it returns."""
    if thread.ident is not None and thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupted))
