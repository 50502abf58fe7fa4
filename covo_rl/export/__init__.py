"""Adapters and merged weights that surely work elsewhere: written, then loaded in a fresh process and compared.

    adapter.save_policy(modes, folder)            the policy of a checkpoint, in PEFT format or published key names
    adapter.load_policy_state(modes, folder)      its inverse, strict
    exporting.export_adapter / export_merged      a folder for others, verified
    exporting.export_run_adapter(modes, run, ...) RUN/adapter or RUN/model at the end of a run
    card.update_card(folder, run)                 the model card again, once result.json exists

Importing this package pulls in no torch.
"""

from covo_rl.types import UserError


class ExportError(UserError, RuntimeError):
    """An export that was not made; nothing is left under its final name."""
