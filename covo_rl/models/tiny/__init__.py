"""Tiny models of the same classes as the published ones, for tests, the demo and a first run on a laptop.

Nothing is fetched: the tokenizer is trained on the texts given, the weights are random from a seed. One module per
family, named as the family's, with `tiny_NAME(*, seed=0) -> (model, processor)`; `builtin:tiny_NAME` is its folder.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from covo_rl.data.noise import quiet_bars
from covo_rl.models.builtin import TINY_MODELS
from covo_rl.models.tiny.covo_audio import fold_feature_statistics, tiny_covo_audio
from covo_rl.models.tiny.qwen2_audio import QWEN2_AUDIO_TOKENS, tiny_qwen2_audio
from covo_rl.models.tiny.tokenizer import (
    BUILTIN_TEXTS,
    COVO_AUDIO_TOKENS,
    END_OF_TEXT,
    SPECIAL_TOKENS,
    TAGS,
    TURN_END,
    tiny_tokenizer,
)
from covo_rl.models.tiny.weights import SCALE, decoder_sizes, encoder_sizes, random_weights

__all__ = [
    "BUILTIN_TEXTS", "COVO_AUDIO_TOKENS", "END_OF_TEXT", "QWEN2_AUDIO_TOKENS", "SCALE", "SPECIAL_TOKENS", "TAGS",
    "TURN_END", "decoder_sizes", "encoder_sizes", "fold_feature_statistics", "random_weights", "tiny_covo_audio",
    "tiny_model", "tiny_qwen2_audio", "tiny_tokenizer", "write_tiny",
]  # fmt: skip
#: of those whose defaults are for training from nothing
OPTIONS: dict[str, dict[str, Any]] = {
    "covo_audio": {
        "encoder_width": 32, "decoder_width": 64, "decoder_layers": 2, "adapter_hidden": 64, "mel_bins": 32,
        "initializer_range": 0.02 * SCALE,
    },
    "qwen2_audio": {"texts": BUILTIN_TEXTS, "scale": SCALE},
}  # fmt: skip


def tiny_model(name: str, *, seed: int = 0) -> tuple[Any, Any]:
    """Model (float32) and processor of a name in TINY_MODELS; raises KeyError for another."""
    module = import_module(f"{__name__}.{TINY_MODELS[name]}")
    return getattr(module, f"tiny_{name}")(**OPTIONS.get(name, {}), seed=seed)


def write_tiny(name: str, folder: str | Path, *, seed: int = 0) -> None:
    """Write `tiny_model` as a checkpoint folder, like a published one."""
    quiet_bars()
    model, processor = tiny_model(name, seed=seed)
    # of several ranks transformers 5.23 lets the first one write alone; here the folder of the quickest is taken
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
