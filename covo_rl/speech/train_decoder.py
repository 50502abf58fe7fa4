"""Trains a decoder of our own latents: the vocoder on recordings, then the flow from codes to latents.

    rows -> codes, latents -> vocoder: spectra, or discriminators | flow: matching -> Token2Wav folder

`python recipes/train_decoder.py --config recipes/configs/decoder_tiny.yaml`; several GPUs: `accelerate launch`.
An update depends on (seed, step) and the state before it only: a resumed run computes what it would have computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from covo_rl.data.files import append_lines, json_line, write_json
from covo_rl.data.terminal import say
from covo_rl.models import damage_named
from covo_rl.models.builtin import resolve_model
from covo_rl.models.covo_audio.token2wav import Token2Wav, Token2WavConfig
from covo_rl.models.covo_audio.token2wav.harmonic import F0_CHANNEL
from covo_rl.records.console import ProgressDisplay
from covo_rl.resolve import ConfigError
from covo_rl.speech.clips import digit_rows, training_rows
from covo_rl.speech.decoder_clips import DecoderClips, speaker_width
from covo_rl.speech.decoder_losses import discriminator_loss, draw_flow, flow_loss, spectral_loss, vocoder_loss
from covo_rl.speech.decoder_training import DecoderTraining
from covo_rl.speech.discriminators import Discriminators
from covo_rl.speech.grid import FRAME_SAMPLES
from covo_rl.speech.rows import SpeechRow
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.speech.training import METRICS, STATE, DivergedError, begin_folder, check_state, owned_folder, save_state
from covo_rl.train.launch import device_of, process_state
from covo_rl.train.ranks import Ranks
from covo_rl.train.schedule import advance_schedule, place_schedule, schedule_of

LOG_STEPS, STATISTICS_CLIPS = 10, 200
UNHEARD = 4  # frames at a crop's beginning whose past is cut off
ENCODED_TOGETHER = 64


def train_decoder(config: DecoderTraining) -> Path:
    """Train in `config.output`, or go on there with `resume`; returns that folder, which is a saved decoder.

    Raises:
        ConfigError: the folder is taken or in use; a resume with other options, or of nothing.
        DataError: rows without audio, or that cannot be read: all of them.
        DivergedError: the loss is not finite.
    """
    process_state()
    with owned_folder(config) as ranks:
        tokenizer = SpeechTokenizer.from_pretrained(resolve_model(config.tokenizer)).to(device_of())
        if config.data is None:
            rows = digit_rows("train", config.clips, config.seed)
        else:
            rows = training_rows(config.data, config.audio_dir, ranks, needs=("audio",),
                                 codebook=len(tokenizer.codebook), tokenizer=tokenizer.digest())  # fmt: skip
        speaker_width(rows)  # refused before they are encoded
        trainer = DecoderTrainer(config, rows, codes_of_rows(rows, tokenizer), tokenizer, ranks)
        return trainer.train()


def codes_of_rows(rows: Sequence[SpeechRow], tokenizer: SpeechTokenizer) -> list[Tensor]:
    """The codes of every row, int64 (L,): its own, or made now."""
    codes: list[Tensor | None] = [None if row.codes is None else torch.from_numpy(row.codes) for row in rows]
    missing = [i for i, made in enumerate(codes) if made is None]
    if missing:
        say(f"encoding {len(missing)} rows (`covo-rl speech encode` does it once and for all)")
    for start in range(0, len(missing), ENCODED_TOGETHER):
        part = missing[start : start + ENCODED_TOGETHER]
        for i, made in zip(part, tokenizer.encode([rows[i].wave() for i in part]), strict=True):
            codes[i] = made
    return [made for made in codes if made is not None]


class _Optimizer:
    """AdamW on a part, its rate warmed up and then on a cosine, its gradients cut."""

    def __init__(self, part: nn.Module, rate: float, betas: tuple[float, float], steps: int, trainer: Any) -> None:
        config = trainer.config
        self.part, self.limit, self.ranks = part, config.max_grad_norm, trainer.ranks
        self.adam = torch.optim.AdamW(part.parameters(), rate, betas, weight_decay=config.weight_decay)
        warmup = min(config.warmup_steps, steps // 2)
        self.schedule = schedule_of("cosine", self.adam, warmup_steps=warmup, steps=max(1, steps))

    def update(self, loss: Tensor) -> None:
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.ranks.average_gradients(self.part)
        nn.utils.clip_grad_norm_(self.part.parameters(), self.limit)
        self.adam.step()
        advance_schedule(self.schedule)


class DecoderTrainer:
    """A decoder, and the updates that train its vocoder (the first `vocoder_steps`) and its flow."""

    def __init__(
        self, config: DecoderTraining, rows: Sequence[SpeechRow], codes: Sequence[Tensor], tokenizer: SpeechTokenizer,
        ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.config, self.ranks, self.folder = config, ranks or Ranks(), Path(config.output)
        torch.manual_seed(config.seed)
        self.decoder = _start(config, tokenizer, speaker_width(rows))
        self.clips = DecoderClips(rows, codes, config)
        if config.start is None:
            self._set_statistics()
        self.clips.mean_E, self.clips.deviation_E = self.decoder.mean_E, self.decoder.variance_E.sqrt()
        self.device = device_of()
        self.field = self.decoder.token2latent.to(self.device).train()
        self.vocoder = self.decoder.wavegan.to(self.device).train()
        self.discriminators = Discriminators().to(self.device) if config.discriminators else None
        betas = (0.8, 0.99) if config.discriminators else (0.9, 0.999)
        parts: dict[str, tuple[nn.Module, float, tuple[float, float], int]] = {}
        parts["flow"] = (self.field, config.flow_learning_rate, (0.9, 0.999), config.flow_steps)
        if config.vocoder_steps:
            parts["vocoder"] = (self.vocoder, config.vocoder_learning_rate, betas, config.vocoder_steps)
        if self.discriminators is not None:
            parts["discriminators"] = (self.discriminators, *parts["vocoder"][1:])
        self.optimizers = {name: _Optimizer(*part, self) for name, part in parts.items()}
        self.step = 0

    def train(self) -> Path:
        """All updates that are left, from the saved state with `resume`; returns the folder of the decoder."""
        if self.config.resume:
            self.load_state()
        if self.ranks.main:
            begin_folder(self.config, self.step)
        with ProgressDisplay("decoder", self.config.steps, done=self.step, active=self.ranks.main) as display:
            for batch in self._batches():
                torch.manual_seed((self.config.seed * 1_000_003 + self.step) * self.ranks.world + self.ranks.rank)
                in_flow = self.step >= self.config.vocoder_steps
                figures = (self.update_flow if in_flow else self.update_vocoder)(
                    *(part.to(self.device) for part in batch)
                )
                self.step += 1
                if self.step % LOG_STEPS == 0 or self.step in (self.config.vocoder_steps, self.config.steps):
                    self._log(figures, display)
                if self.ranks.main and self.step % self.config.save_steps == 0:
                    self.save_state()
        return self._finish()

    def _batches(self) -> Iterator[list[Tensor]]:
        def items() -> Iterator[list[Any]]:
            for step in range(self.step, self.config.steps):
                draw = self.clips.crops if step < self.config.vocoder_steps else self.clips.sequences
                yield draw(step, self.ranks.rank, self.ranks.world)

        return iter(DataLoader(self.clips, batch_sampler=items(), num_workers=self.config.workers))  # pyright: ignore

    def update_flow(self, latents_BZE: Tensor, codes_BL: Tensor, speaker_BS: Tensor) -> dict[str, Tensor]:
        """One update of the flow."""
        mask_BZ = torch.ones(latents_BZE.shape[:2], dtype=torch.bool, device=self.device)
        draw = draw_flow(self.field.config, mask_BZ)
        total = None
        if self.ranks.world > 1:  # spans differ: every frame counts the same, whichever rank has it
            total = float(self.ranks.reduced(draw.span_BZ.sum()[None].double().cpu(), "sum")) / self.ranks.world
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            loss = flow_loss(self.field, latents_BZE, codes_BL, speaker_BS, mask_BZ, draw, total,
                             self.config.pitch_weight)  # fmt: skip
        self.optimizers["flow"].update(loss)
        return {"flow": loss.detach()}

    def update_vocoder(self, latents_BZE: Tensor, wave_BT: Tensor) -> dict[str, Tensor]:
        """One update of the vocoder, in float32, and of its discriminators if it has any."""
        cut = UNHEARD * FRAME_SAMPLES
        heard_BT, wave_BT = self.vocoder(latents_BZE.mT)[:, 0, cut:], wave_BT[:, cut:]
        judge, verdict = self.discriminators, torch.zeros(())
        if judge is None:
            losses = {"spectra": spectral_loss(heard_BT, wave_BT)}
        else:
            verdict = discriminator_loss(judge(wave_BT), judge(heard_BT.detach()))
            self.optimizers["discriminators"].update(verdict)
            with torch.no_grad():
                true = judge(wave_BT)
            losses = vocoder_loss(true, judge(heard_BT), wave_BT, heard_BT)
        self.optimizers["vocoder"].update(torch.stack(list(losses.values())).sum())
        figures = losses if judge is None else losses | {"verdict": verdict}
        return {name: loss.detach() for name, loss in figures.items()}

    def _set_statistics(self) -> None:
        """Mean and variance of the first rows' latents; that of F0 is told smaller, so that noise hides it less."""
        first = [self.clips.clip(i)[0] for i in range(min(STATISTICS_CLIPS, len(self.clips.rows)))]
        variance_E, mean_E = torch.var_mean(torch.cat(first), dim=0)
        variance_E = variance_E.clamp(min=1e-4)
        variance_E[F0_CHANNEL:][:1] /= self.config.pitch_gain**2
        self.decoder.mean_E, self.decoder.variance_E = mean_E, variance_E

    def _log(self, figures: dict[str, Tensor], display: ProgressDisplay) -> None:
        values = {name: float(value) for name, value in figures.items()}
        if not np.isfinite(list(values.values())).all():
            raise DivergedError(f"the loss is not finite after step {self.step} ({values}): lower the learning rate")
        if self.ranks.main:
            append_lines(self.folder / METRICS, [json_line({"step": self.step, **values})])
            display.update(self.step, " ".join(f"{name} {value:.3f}" for name, value in values.items()))

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """All that a resume needs, whole or not at all."""
        judge = {} if self.discriminators is None else self.discriminators.state_dict()
        state = {"step": self.step, "decoder": self.decoder.state_dict(), "discriminators": judge,
                 "optimizers": {name: part.adam.state_dict() for name, part in self.optimizers.items()},
                 "updates": {name: part.schedule.last_epoch for name, part in self.optimizers.items()}}  # fmt: skip
        save_state(self.folder, self.config, state)

    def load_state(self) -> None:
        """Go on from the saved state; raises ConfigError where it is of other options or damaged."""
        state = check_state(self.folder / STATE, self.config)
        with damage_named(str(self.folder / STATE)):
            self.decoder.load_state_dict(state["decoder"])
            if self.discriminators is not None:
                self.discriminators.load_state_dict(state["discriminators"])
            for name, part in self.optimizers.items():
                part.adam.load_state_dict(state["optimizers"][name])
                place_schedule(part.schedule, state["updates"][name])
        self.step = state["step"]

    def _finish(self) -> Path:
        """Save the decoder; returns its folder."""
        if self.ranks.main:
            self.decoder.eval().save_pretrained(self.folder)
            write_json(self.folder / "training.json", dataclasses.asdict(self.config))
        self.ranks.wait()
        return self.folder


def _start(config: DecoderTraining, tokenizer: SpeechTokenizer, speaker: int | None) -> Token2Wav:
    """A new decoder for the tokenizer's codes and `speaker` numbers of a speaker, or the one of `start`.

    Raises:
        ConfigError: that one has other latents, another vocoder, or speakers of other numbers.
    """
    codebook, digest = len(tokenizer.codebook), tokenizer.digest()
    if config.start is not None:
        decoder = Token2Wav.from_pretrained(resolve_model(config.start))
        decoder.check_tokenizer(digest)
        kind = decoder.config.latent, decoder.config.vocoder
        if kind != (config.latent, config.vocoder):
            raise ConfigError([f"start {config.start}: latent {kind[0]} and vocoder {kind[1]}, the options say "
                               f"{config.latent} and {config.vocoder}"])  # fmt: skip
        flow = decoder.config.flow
        if flow.spkr_embed_dim != (speaker or flow.z_dim):
            raise ConfigError([f"start {config.start}: its speakers are {flow.spkr_embed_dim} numbers each, those of "
                               f"the rows {speaker or flow.z_dim}"])  # fmt: skip
        return decoder
    return Token2Wav(decoder_shape(config, codebook, digest, speaker))


def decoder_shape(
    config: DecoderTraining, codebook: int | None = None, digest: str = "", speaker: int | None = None
) -> Token2WavConfig:
    """The sizes of a new decoder; `codebook`: how many codes its tokenizer has, `speaker`: how many numbers tell one,
    where those are others than the shape's."""
    shape = Token2WavConfig.tiny(config.latent, config.vocoder)
    if config.shape == "published":
        width = shape.flow.z_dim
        flow = replace(Token2WavConfig().flow, z_dim=width, spkr_embed_dim=width)
        shape = Token2WavConfig(flow, latent=config.latent, vocoder=config.vocoder, harmonic_width=512)
    sizes = {"token_vocab_size": codebook, "spkr_embed_dim": speaker}
    flow = replace(shape.flow, **{name: size for name, size in sizes.items() if size})
    return replace(shape, flow=flow, tokenizer=digest)
