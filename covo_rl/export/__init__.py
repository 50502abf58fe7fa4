"""Adapters and merged weights that surely work elsewhere: written, then loaded in a fresh process and compared.

    save_policy(modes, folder)               the policy of a checkpoint, in PEFT format or published key names
    load_policy_state(modes, folder)         its inverse, strict
    export_run_adapter(modes, family, ...)   RUN/adapter or RUN/model at the end of a run, verified
    export_adapter / export_merged           the same to any folder
    update_card(folder, run_folder)          the model card again, once result.json exists

Importing this package pulls in no torch; the functions do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covo_rl.export.card import update_card
    from covo_rl.export.errors import ExportError
    from covo_rl.export.exporting import export_adapter, export_merged, export_run_adapter
    from covo_rl.export.policy_files import load_policy_state, save_policy

_WHERE = {
    "ExportError": "errors",
    "export_adapter": "exporting",
    "export_merged": "exporting",
    "export_run_adapter": "exporting",
    "load_policy_state": "policy_files",
    "save_policy": "policy_files",
    "update_card": "card",
}

__all__ = [
    "ExportError",
    "export_adapter",
    "export_merged",
    "export_run_adapter",
    "load_policy_state",
    "save_policy",
    "update_card",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
