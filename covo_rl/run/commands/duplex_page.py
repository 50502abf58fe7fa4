"""The options of the duplex recipes, with the default that holds. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields

from covo_rl.config import rooms
from covo_rl.duplex.config import SHARED, DuplexConfig
from covo_rl.resolve import find, read_yaml
from covo_rl.run.commands.options_page import option_lines

#: what the supervised stage depends on
TAUGHT_BY = (
    "model", "seed", "output", "trust_remote_code", "features", "noise", "perception_streams", "perception_steps",
    "sft_data", "sft_streams", "sft_steps", "sft_until", "sft_batch", "sft_learning_rate", "sft_warmup", "duplex_width",
    "duplex_layers", "decision_weight", "text_weight", "code_weight",
)  # fmt: skip


NOTE = """Beside an option stands its default, in brackets that of recipes/configs/tiny_duplex.yaml, which is
taken without --config. Flags win over the file. In names - and _ are one. --full is --lora false.
"""


def duplex_page(title: str, names: Collection[str] | None = None) -> str:
    """`title`, then every option of learning when to speak and those that it shares with GRPO, or those of `names`."""
    config = read_yaml(find("recipes", "configs/tiny_duplex.yaml"))
    others = {name: {"tiny_duplex": value} for name, value in config.items()}
    own = [item for item in fields(DuplexConfig) if names is None or item.name in names]
    chosen = SHARED if names is None else names
    shared = [item for room in rooms().values() for item in fields(room) if item.name in chosen]
    lines = [line for item in own for line in option_lines(item, others)]
    lines += ["", "Shared with covo-rl train:", *(line for item in shared for line in option_lines(item, others))]
    return "\n".join([title, NOTE, *lines])
