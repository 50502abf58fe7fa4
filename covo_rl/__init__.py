"""covo_rl: reinforcement learning for large audio language models.

    from covo_rl import GRPO, load     # docs/python.md

Importing this pulls in no torch; the two names are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covo_rl.run.python.grpo import GRPO
    from covo_rl.run.python.model import load

__version__ = "0.1.0"
__all__ = ["GRPO", "__version__", "load"]

_HOMES = {"GRPO": "covo_rl.run.python.grpo", "load": "covo_rl.run.python.model"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'covo_rl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
