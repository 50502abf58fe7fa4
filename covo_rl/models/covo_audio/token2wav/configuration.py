"""Sizes of a token2wav decoder, in the layout of the published config.json.

Fields have the published names and, as defaults, the published values. What the file says and nobody reads
(`hop_size` 480, `use_flow`, `downsample_*`, ...) is accepted and left out when saved. Beside "model" ours are
`latent`, what a latent frame holds, and `vocoder`, what makes a wave of it (`harmonic_width`: how wide that one's net
is); a file without them is a published one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from covo_rl.models.weights import WeightsError

#: latent frames a second, and samples of each
FRAME_RATE, HOP = 100, 240
#: frames (10 ms) of one code (40 ms)
CODE_FRAMES = 4
#: what a latent frame holds -> its numbers (the published space has any); `mel_pitch`: F0 and voicing beside the mel
LATENTS = {"vae": None, "mel": 64, "mel_pitch": 66}
#: vocoder -> latents that it can read
VOCODERS = {"bigvgan": tuple(LATENTS), "griffin_lim": ("mel", "mel_pitch"), "harmonic": ("mel_pitch",)}
#: of any size in a file: the published ones end at 16384, and a damaged file shall not ask for all memory
LARGEST, MOST_LAYERS = 2**20, 512


class DecoderConfigError(WeightsError, ValueError):
    """A decoder's config.json cannot be used; the message names the field."""


@dataclass(frozen=True)
class TransformerConfig:
    """The field's blocks. `dropout` acts in training, on both branches of a block."""

    num_layers: int = 12
    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_heads: int = 16
    dropout: float = 0.1


@dataclass(frozen=True)
class FlowConfig:
    """Codes to latents. `cfg_dropout`, `sigma` and `bert_mask_rate0..1` (the span to fill in) are for training."""

    token_vocab_size: int = 16384
    token_input_dim: int = 512
    upsample_factor: int = CODE_FRAMES
    z_dim: int = 64
    spkr_embed_dim: int = 1024
    cfg_dropout: float = 0.2
    sigma: float = 1e-5
    bert_mask_rate0: float = 0.7
    bert_mask_rate1: float = 1.0
    transformer: TransformerConfig = field(default_factory=TransformerConfig)


@dataclass(frozen=True)
class VocoderConfig:
    """Latents to a wave: one stage a rate, whose product is 240, and in it one residual block a kernel."""

    upsample_rates: tuple[int, ...] = (5, 3, 2, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (10, 6, 4, 4, 4, 4)
    upsample_initial_channel: int = 1536
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3


#: fields of which we have one form: another value would be another network, so it is refused
FIXED: dict[str, dict[str, Any]] = {
    "transformer": {"modulation": True, "alibi_bias": False, "rotary_bias": True, "qk_norm": False},
    "wavegan": {"resblock": "1", "activation": "snakebeta", "snake_logscale": True, "causal": True},
}


@dataclass(frozen=True)
class Token2WavConfig:
    """The published decoder by default. `tokenizer`: the digest of the tokenizer whose codes it speaks, if known.

    Raises:
        DecoderConfigError: sizes that do not fit each other.
    """

    flow: FlowConfig = field(default_factory=FlowConfig)
    wavegan: VocoderConfig = field(default_factory=VocoderConfig)
    latent: str = "vae"
    vocoder: str = "bigvgan"
    harmonic_width: int = 128
    tokenizer: str = ""

    def __post_init__(self) -> None:
        flow, body, voice = self.flow, self.flow.transformer, self.wavegan
        product = 1
        for rate in voice.upsample_rates:
            product *= rate
        narrowed = voice.upsample_initial_channel % 2 ** len(voice.upsample_rates)
        blocks = (voice.resblock_kernel_sizes, voice.resblock_dilation_sizes)
        for wrong, text in (
            (self.latent not in LATENTS, f"latent {self.latent!r} is none of {', '.join(LATENTS)}"),
            (self.vocoder not in VOCODERS, f"vocoder {self.vocoder!r} is none of {', '.join(VOCODERS)}"),
            (self.latent not in VOCODERS.get(self.vocoder, LATENTS),
             f"{self.vocoder} needs latent {' or '.join(VOCODERS.get(self.vocoder, ()))}, not {self.latent}"),
            (LATENTS.get(self.latent) not in (None, flow.z_dim),
             f"latent {self.latent} has z_dim {LATENTS.get(self.latent)}, not {flow.z_dim}"),
            (body.num_layers > MOST_LAYERS, f"num_layers {body.num_layers} is more than {MOST_LAYERS}"),
            (flow.upsample_factor != CODE_FRAMES,
             f"upsample_factor {flow.upsample_factor}: a code has {CODE_FRAMES} frames"),
            (body.hidden_size % (2 * body.num_heads), f"hidden_size {body.hidden_size} is no multiple of 2 * num_heads "
             f"{body.num_heads}, as the rotation of half a head needs"),
            (body.hidden_size % CONV_GROUPS, f"hidden_size {body.hidden_size} is no multiple of {CONV_GROUPS}"),
            (product != HOP, f"the product of upsample_rates {voice.upsample_rates} is {product}, not {HOP} samples"),
            (narrowed, f"upsample_initial_channel {voice.upsample_initial_channel} cannot be halved "
             f"{len(voice.upsample_rates)} times"),
            (tuple(2 * rate for rate in voice.upsample_rates) != voice.upsample_kernel_sizes,
             f"upsample_kernel_sizes {voice.upsample_kernel_sizes} are not twice the rates {voice.upsample_rates}"),
            (len(blocks[0]) != len(blocks[1]), "resblock_kernel_sizes and resblock_dilation_sizes differ in number"),
        ):  # fmt: skip
            if wrong:
                raise DecoderConfigError(f"token2wav configuration: {text}")

    @classmethod
    def tiny(cls, latent: str = "mel_pitch", vocoder: str = "harmonic", **changes: Any) -> Token2WavConfig:
        """A decoder that trains on a CPU: 256 codes to mel and pitch, 4 layers of width 128 (BigVGAN: of 4 stages)."""
        body = TransformerConfig(num_layers=4, hidden_size=128, ffn_hidden_size=384, num_heads=4)
        width = LATENTS.get(latent) or 64
        flow = FlowConfig(256, 64, z_dim=width, spkr_embed_dim=width, bert_mask_rate0=0.4, transformer=body)
        wavegan = VocoderConfig((5, 4, 4, 3), (10, 8, 8, 6), 96, (7,), ((1, 3, 5),))
        return replace(cls(flow, wavegan, latent, vocoder), **changes)

    @classmethod
    def from_dict(cls, data: Any, where: str = "config.json") -> Token2WavConfig:
        """Of the published layout: "model" with "token2latent" and "wavegan".

        Raises:
            DecoderConfigError: a part is missing, or a value is of another type or one that we have no network for.
        """
        data = _mapping(data, where)
        model = _part(data, "model", where)
        flow = _part(model, "token2latent", where)
        transformer = _read(TransformerConfig, _part(flow, "transformer", where), f"{where}: transformer")
        wavegan = _part(model, "wavegan", where)
        latent_dim, z_dim = wavegan.get("latent_dim"), flow.get("z_dim", FlowConfig.z_dim)
        if latent_dim not in (None, z_dim):
            raise DecoderConfigError(f"{where}: wavegan.latent_dim {latent_dim!r} is not token2latent.z_dim {z_dim!r}")
        parts = {
            "flow": _read(FlowConfig, flow, f"{where}: token2latent", transformer=transformer),
            "wavegan": _read(VocoderConfig, wavegan, f"{where}: wavegan"),
        }
        return _read(cls, data, where, **parts)

    @classmethod
    def from_file(cls, path: Path) -> Token2WavConfig:
        """Raises DecoderConfigError for a file that is missing or no JSON, and as `from_dict`."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DecoderConfigError(f"{path} cannot be read: {error}") from error
        return cls.from_dict(data, str(path))

    def to_dict(self) -> dict[str, Any]:
        """The published layout, with our keys where they differ from the published decoder."""
        flow, wavegan = asdict(self.flow), asdict(self.wavegan)
        flow["transformer"] |= FIXED["transformer"]
        wavegan |= FIXED["wavegan"] | {"latent_dim": self.flow.z_dim}
        ours = {name: value for name, value in asdict(self).items() if name not in ("flow", "wavegan")}
        audio = {"sample_rate": FRAME_RATE * HOP}
        return {"data": {"audio": audio}, "model": {"token2latent": flow, "wavegan": wavegan}, **ours}


#: of the convolution before the blocks
CONV_GROUPS = 16


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DecoderConfigError(f"{where}: {value!r:.80} is no JSON object")
    return value


def _part(data: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    if name not in data:
        raise DecoderConfigError(f"{where} has no {name!r} (only {', '.join(sorted(data)) or 'nothing'}): is this the "
                                 "config.json of a token2wav decoder?")  # fmt: skip
    return _mapping(data[name], f"{where}: {name}")


def _read(kind: type, data: Mapping[str, Any], where: str, **values: Any) -> Any:
    """One of the dataclasses above from its part of the file; unknown names are left out, strange values refused."""
    for name, only in FIXED.get(where.rsplit(" ", 1)[-1], {}).items():
        if data.get(name, only) != only:
            raise DecoderConfigError(f"{where}.{name} is {data[name]!r}; only {only!r} is implemented")
    hints = get_type_hints(kind)
    for name in (entry.name for entry in fields(kind) if entry.name in data and entry.name not in values):
        value = _tuples(data[name])
        if not _fits(value, hints[name]):
            what = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise DecoderConfigError(f"{where}.{name} is {data[name]!r:.80}, which is no {what} in its range")
        values[name] = value
    return kind(**values)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whole numbers are sizes, 1 to LARGEST; others are shares, 0 to 1; lists are not empty and short."""
    if hint is str:
        return isinstance(value, str)
    if hint is int:
        return type(value) is int and 1 <= value <= LARGEST
    if hint is float:
        return type(value) in (int, float) and 0 <= value <= 1
    return isinstance(value, tuple) and 0 < len(value) <= 16 and all(_fits(part, hint.__args__[0]) for part in value)
