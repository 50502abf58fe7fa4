"""Numbers of a benchmark: sizes of its model, shape of a step, and its floating-point operations, counted by hand."""

from __future__ import annotations

from dataclasses import dataclass

from covo_rl.config import ConfigError
from covo_rl.models.covo_audio.configuration import ENCODER_DEFAULTS, LLM_DEFAULTS, CovoAudioConfig

SECONDS, RATE, FRAMES_PER_SECOND = 30.0, 16000, 100
#: audio positions of 30 s -> adapter down-sampling (1500 encoder positions)
DOWNSAMPLE = {94: 16, 188: 8, 375: 4, 750: 2}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmark model; the defaults are the published comparison's. 0 stands for the usual proportion."""

    decoder_layers: int = 8
    decoder_width: int = 512
    decoder_heads: int = 8
    encoder_layers: int = 4
    encoder_width: int = 256
    vocabulary: int = 8192
    lora_r: int = 16
    lora_alpha: float = 32.0
    mel_bins: int = 80
    key_value_heads: int = 0
    mlp_width: int = 0
    adapter_hidden: int = 0

    def __post_init__(self) -> None:
        usual = {
            "key_value_heads": max(1, self.decoder_heads // 2),
            "mlp_width": 3 * self.decoder_width,
            "adapter_hidden": 2 * self.encoder_width,
        }
        for name, value in usual.items():
            object.__setattr__(self, name, getattr(self, name) or value)

    @property
    def linear_parameters(self) -> int:
        """Of the decoder's linear layers: q and o, k and v, three of the MLP."""
        D, K = self.decoder_width, self.key_value_heads * self.decoder_width // self.decoder_heads
        return self.decoder_layers * (2 * D * D + 2 * D * K + 3 * D * self.mlp_width)


#: what --model-size takes: the published comparison's, the published depth at tiny widths, Covo-Audio as published
MODEL_SIZES = {
    "small": Sizes(),
    "tiny": Sizes(28, 64, 4, encoder_layers=1, encoder_width=64, vocabulary=1000, lora_r=8),
    "7b": Sizes(
        decoder_layers=LLM_DEFAULTS["num_hidden_layers"],
        decoder_width=LLM_DEFAULTS["hidden_size"],
        decoder_heads=LLM_DEFAULTS["num_attention_heads"],
        encoder_layers=ENCODER_DEFAULTS["encoder_layers"],
        encoder_width=ENCODER_DEFAULTS["d_model"],
        vocabulary=LLM_DEFAULTS["vocab_size"],
        lora_r=8,
        mel_bins=ENCODER_DEFAULTS["num_mel_bins"],
        key_value_heads=LLM_DEFAULTS["num_key_value_heads"],
        mlp_width=LLM_DEFAULTS["intermediate_size"],
        adapter_hidden=CovoAudioConfig.adapter_hidden_dim,
    ),
}


@dataclass(frozen=True)
class Cell:
    """`positions` P audio positions per prompt, `generations` G, `completion` C ids, over `clips` unique clips."""

    positions: int
    generations: int
    completion: int
    clips: int = 2

    def __post_init__(self) -> None:
        if self.positions not in DOWNSAMPLE:
            known = ", ".join(map(str, DOWNSAMPLE))
            raise ConfigError([f"cells of P {self.positions}: a 30 s clip can fill {known} positions"])
        if min(self.generations, self.completion, self.clips) < 1:
            raise ConfigError(
                [f"a cell of G {self.generations}, C {self.completion} and {self.clips} clips: at least 1"]
            )

    @property
    def rows(self) -> int:
        """N, completions of a step."""
        return self.clips * self.generations


def flops(cell: Cell, sizes: Sizes, prompt_length: int, *, stock: bool) -> dict[str, float]:
    """Floating-point operations of a step by phase: the ratio of stock to ours is the ceiling of any speed-up.

    A product of (a, b) and (b, c) counts 2abc. The backward of a frozen linear layer costs its forward once more (the
    gradient of its input), that of attention twice. LoRA, norms and activations are left out: they are small, and the
    same per position in both variants; so is what checkpointing computes again.
    """
    T, C, N = prompt_length, cell.completion, cell.rows
    copies = N if stock else cell.clips
    linear = 2 * sizes.linear_parameters  # per position
    # scores and weighted values of each pair of query and key
    pair = 4 * sizes.decoder_layers * sizes.decoder_width
    prompt_linear, prompt_attention = copies * T * linear, copies * T * (T + 1) / 2 * pair
    row_linear, row_attention = N * C * linear, N * (C * T + C * (C + 1) / 2) * pair
    prompt, completion = prompt_linear + prompt_attention, row_linear + row_attention
    head = N * C * 2 * sizes.decoder_width * sizes.vocabulary
    encode = copies * encoder_flops(cell, sizes)
    audio = encode if stock else 0.0
    return {
        "encode": encode,
        "prefill": prompt,
        "decode": completion + head,
        "old": audio + completion + head + (prompt if stock else 0.0),
        "loss": audio + 2 * (prompt_linear + row_linear + head) + 3 * (prompt_attention + row_attention),
    }


def encoder_flops(cell: Cell, sizes: Sizes) -> float:
    """Encoder and adapter over one 30 s clip."""
    width, hidden, frames = sizes.encoder_width, sizes.adapter_hidden, SECONDS * FRAMES_PER_SECOND
    length = frames / 2
    convolutions = 2 * 3 * (sizes.mel_bins * width * frames + width * width * length)
    layers = sizes.encoder_layers * (2 * 12 * width**2 * length + 4 * length**2 * width)
    adapter, stage, factor = 0.0, length, DOWNSAMPLE[cell.positions]
    while factor > 1:
        factor //= 2
        stage = -(-stage // 2)
        out = sizes.decoder_width if factor == 1 else width
        adapter += 2 * stage * (3 * width**2 + width * hidden + hidden * out)
    return convolutions + layers + adapter
