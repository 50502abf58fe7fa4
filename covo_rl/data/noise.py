"""What libraries say that tells a user nothing, left out: one list, by message, category and module. No torch.

All other warnings, those of rewards and plugins among them, are shown as ever. To see these too: PYTHONWARNINGS=always
(`covo-rl` then silences nothing).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

#: (beginning of the message as a regex, category, module): why it tells nothing
WARNINGS: dict[tuple[str, type[Warning], str], str] = {
    (r"The PEFT config's `base_model_name_or_path` was renamed", UserWarning, r"peft\.mapping_func"):
        "the base is checked against the adapter by covo_rl.policy.saved_adapter",
    (r"`gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning, r"transformers\.training_args"):
        "the new name does not exist in every version that we allow",
    (r"Support for mismatched key_padding_mask and attn_mask is deprecated", UserWarning, r"torch\.nn\.functional"):
        "transformers' WavLM gives a mask of bools and a bias of numbers, as it must",
}  # fmt: skip
#: (logger, beginning of the message): why it tells nothing
LOGS = {
    ("transformers.generation.utils", "Setting `pad_token_id`"): "a judge's batch is padded as its tokenizer says",
    ("transformers.generation.configuration_utils", "The following generation flags are not valid"):
        "sampling flags of a checkpoint's generation_config, where a judge decodes greedily",
    ("transformers.modeling_rope_utils", "This model config has set a `rope_parameters['original_max_position_emb"):
        "Phi-4 is published so, and the factor that is asked for is the ratio that is taken",
}  # fmt: skip
#: progress bars of transformers about files on this disk; those of downloads stay
BARS = ("Loading weights", "Writing model shards", "Loading checkpoint shards")


class _Unsaid(logging.Filter):
    """Drops the messages of one logger that begin in one way."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginning)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unsaid) and other.beginning == self.beginning

    def __hash__(self) -> int:
        return hash(self.beginning)


def quiet() -> None:
    """Leave out the messages listed here, in this process; a second call changes nothing."""
    if os.environ.get("PYTHONWARNINGS") == "always":
        return
    for message, category, module in WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)
    for name, beginning in LOGS:
        logging.getLogger(name).addFilter(_Unsaid(beginning))  # one that is equal is not added twice


def quiet_bars() -> None:
    """Leave out the bars listed here. For where transformers is imported anyway."""
    from transformers.utils import logging as transformers_logging

    def hook(make: Callable[..., Any], words: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("desc") in BARS and os.environ.get("PYTHONWARNINGS") != "always":
            options = {**options, "disable": True}
        return make(*words, **options) if earlier is None else earlier(make, words, options)

    if not _hooked:
        earlier = transformers_logging.set_tqdm_hook(hook)
        _hooked.append(True)


_hooked: list[bool] = []
