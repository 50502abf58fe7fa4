"""The updates that train a speech tokenizer: `train_tokenizer.py` is their command.

An update depends on (seed, step) and the state before it only: a resumed run computes what it would have computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from covo_rl.data.files import append_lines, json_line, write_json
from covo_rl.data.terminal import say
from covo_rl.models import damage_named
from covo_rl.records.console import ProgressDisplay
from covo_rl.resolve import ConfigError
from covo_rl.speech.clips import ClipBatch, TrainingClips, collate
from covo_rl.speech.grid import CODE_FRAMES
from covo_rl.speech.measures import measure_tokenizer
from covo_rl.speech.objectives import commitment_loss, ctc_loss, mel_loss, pitch_loss, shortest_path
from covo_rl.speech.quantiser import Quantiser
from covo_rl.speech.rows import SpeechRow
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.speech.training import (
    METRICS,
    STATE,
    DivergedError,
    TokenizerTraining,
    begin_folder,
    check_state,
    save_state,
)
from covo_rl.train.launch import device_of
from covo_rl.train.ranks import Ranks
from covo_rl.train.schedule import advance_schedule, place_schedule, schedule_of

LOG_STEPS, STATISTICS_CLIPS = 10, 200


class TokenizerTrainer:
    """A tokenizer, its quantiser, and the updates that train both."""

    def __init__(
        self,
        config: TokenizerTraining,
        tokenizer: SpeechTokenizer,
        rows: Sequence[SpeechRow],
        ranks: Ranks | None = None,
    ) -> None:
        if tokenizer.pieces is None:
            raise ConfigError(["a tokenizer without heads cannot be trained: make one with pieces"])
        self.config, self.ranks, self.folder = config, ranks or Ranks(), Path(config.output)
        self.device = device_of()
        self.tokenizer = tokenizer.to(self.device).train()
        shape = tokenizer.config
        self.clips = TrainingClips(rows, tokenizer.pieces, shape.front_end, config.cache_mb)
        if shape.front_end == "conv":
            self.tokenizer.wavlm.feature_extractor.requires_grad_(False)
        self.quantiser = Quantiser(
            shape.codebook_size, shape.code_dim, decay=config.ema_decay, restart_below=config.restart_below,
            ranks=self.ranks.world,
        ).to(self.device).train()  # fmt: skip
        pretrained = set(self.tokenizer.wavlm.parameters()) if config.wavlm else set()
        trained = [weight for weight in self.tokenizer.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in trained if (weight in pretrained) == old], "lr": rate}
            for old, rate in ((True, config.encoder_learning_rate), (False, config.learning_rate))
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        warmup = round(config.warmup * config.steps)
        self.schedule = schedule_of("cosine", self.optimizer, warmup_steps=warmup, steps=config.steps)
        self.step, self.short = 0, set()

    # -- the run -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """All updates that are left, from the saved state with `resume`."""
        if self.config.resume:
            self.load_state()
        else:
            self.begin()
        if self.ranks.main:
            begin_folder(self.config, self.step)
        with ProgressDisplay("tokenizer", self.config.steps, done=self.step, active=self.ranks.main) as display:
            for batches in self._updates():
                figures = self.update(batches)
                if self.step % LOG_STEPS == 0 or self.step == self.config.steps:
                    self._log(figures, display)
                if self.ranks.main and self.step % self.config.save_steps == 0:
                    self.save_state()

    def _updates(self) -> Iterator[list[ClipBatch]]:
        """The micro-batches of this rank, update by update."""
        config, passes = self.config, self.config.gradient_accumulation_steps
        size = config.batch_size * passes * self.ranks.world

        def micro_batches() -> Iterator[list[tuple[int, int]]]:
            for step in range(self.step, config.steps):
                own = self.clips.draw(step, size, config.seed)[self.ranks.rank :: self.ranks.world]
                yield from (own[i::passes] for i in range(passes))

        loader = iter(DataLoader(self.clips, batch_sampler=micro_batches(), collate_fn=collate,
                                 num_workers=config.workers))  # fmt: skip  # pyright: ignore
        for _ in range(self.step, config.steps):
            yield [next(loader) for _ in range(passes)]

    @torch.no_grad()
    def begin(self) -> None:
        """Standardise the mels by their statistics, and put the codes by k-means on `init_vectors` vectors each."""
        tokenizer, heads = self.tokenizer, self.tokenizer.heads
        first = [self.clips.clip(i) for i in range(min(STATISTICS_CLIPS, len(self.clips)))]
        _set_statistics(heads, torch.cat([clip.mel_ZE for clip in first]))
        if self.tokenizer.config.front_end == "mel":
            front: Any = tokenizer.wavlm.feature_extractor
            mels = [front(clip.input_T[None].to(self.device))[0].T for clip in first]
            _set_statistics(front, torch.cat(mels))
        wanted = self.config.init_vectors * tokenizer.config.codebook_size // self.ranks.world
        vectors: list[Tensor] = []
        place = self.ranks.rank
        while sum(map(len, vectors)) < wanted and (place < len(self.clips) or not vectors):
            index = range(place, len(self.clips), self.ranks.world)[: self.config.batch_size]
            inputs = [self.clips.clip(i).input_T for i in index]
            vectors_BLC, mask_BL = tokenizer.features(inputs)
            vectors.append(vectors_BLC[mask_BL])
            place += self.config.batch_size * self.ranks.world
        there = sum(self.ranks.gathered(sum(map(len, vectors))))
        if there < wanted * self.ranks.world:
            raise ConfigError([
                f"init_vectors {self.config.init_vectors}: the rows have {there} codes, k-means of "
                f"{tokenizer.config.codebook_size} codes wants {wanted * self.ranks.world}; give more rows, or a "
                "smaller init_vectors (1 or more)"])  # fmt: skip
        self.quantiser.begin(torch.cat(vectors))

    def update(self, batches: Sequence[ClipBatch]) -> dict[str, Tensor]:
        """One optimiser update on the micro-batches of this rank; returns its losses, summed over them."""
        seed = (self.config.seed * 1_000_003 + self.step) * self.ranks.world + self.ranks.rank
        torch.manual_seed(seed)
        counts = torch.tensor([[b.mask_BZ.sum(), (b.f0_BZ > 0).sum()] for b in batches], dtype=torch.float64).sum(0)
        frames, voiced = (self.ranks.reduced(counts, "sum") / self.ranks.world).tolist()
        figures: dict[str, Tensor] = {}
        for batch in batches:
            losses = self.losses(batch, frames, voiced, len(batches))
            torch.stack([losses[name] for name in losses]).sum().backward()
            for name, loss in losses.items():
                figures[name] = figures.get(name, torch.zeros((), device=self.device)) + loss.detach()
        self.ranks.average_gradients(self.tokenizer)
        torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        advance_schedule(self.schedule)
        self.step += 1
        return figures

    def losses(self, batch: ClipBatch, frames: float, voiced: float, passes: int = 1) -> dict[str, Tensor]:
        """The weighted losses of a micro-batch, as its share of an update with so many frames, a rank."""
        config, heads = self.config, self.tokenizer.heads
        assert heads is not None
        mel_BZE, f0_BZ, mask_BZ, speaker_BE = (
            part.to(self.device) for part in (batch.mel_BZE, batch.f0_BZ, batch.mask_BZ, batch.speaker_BE)
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            vectors_BLC, mask_BL = self.tokenizer.features(batch.inputs)
            with torch.autocast(self.device.type, enabled=False):
                quantised_BLC, codes_BL = self.quantiser(vectors_BLC, mask_BL)
            embeds_BLW = self.tokenizer.from_code(quantised_BLC)
            logits = heads.asr(embeds_BLW, mask_BL)
            speaker = (speaker_BE - heads.mean_E) / heads.deviation_E
            drawn = heads.draw_mel(embeds_BLW, speaker, mask_BL)
            voicing, contour = heads.read_pitch(embeds_BLW, mask_BL)
        self._report_short(batch)
        target = (mel_BZE - heads.mean_E) / heads.deviation_E
        chosen_BLC = self.quantiser.codebook[codes_BL.clamp(min=0)]
        return {
            "ctc": config.ctc_weight * ctc_loss(logits, batch.lengths_B, batch.targets) / passes,
            "mel": config.mel_weight * mel_loss(drawn.float(), target, mask_BZ, frames),
            "pitch": config.pitch_weight
            * pitch_loss(voicing.float(), contour.float(), f0_BZ, mask_BZ, (frames, voiced)),
            "commitment": config.commitment_weight
            * commitment_loss(vectors_BLC, chosen_BLC, mask_BL, frames / CODE_FRAMES),
        }

    def _report_short(self, batch: ClipBatch) -> None:
        """Say once of every row that CTC cannot use it: its codes are too few for its text."""
        for id, ids, length in zip(batch.ids, batch.targets, batch.lengths_B.tolist(), strict=True):
            if not 0 < shortest_path(ids) <= length and id not in self.short:
                self.short.add(id)
                say(f"{id}: {length} codes cannot say {len(ids)} pieces; CTC leaves the row out")

    def _log(self, figures: dict[str, Tensor], display: ProgressDisplay) -> None:
        values = {name: float(value) for name, value in figures.items()}
        if not all(map(torch.isfinite, map(torch.tensor, values.values()))):
            raise DivergedError(f"the loss is not finite after step {self.step} ({values}): lower learning_rate")
        if self.ranks.main:
            use = float((self.quantiser.vq._codebook.cluster_size > 0.1).float().mean())
            line = {"step": self.step, **values, "live_codes": use, "rows_too_short": len(self.short)}
            append_lines(self.folder / METRICS, [json_line(line)])
            display.update(self.step, " ".join(f"{name} {value:.3f}" for name, value in values.items()))

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """All that a resume needs, whole or not at all."""
        state = {"step": self.step, "tokenizer": self.tokenizer.state_dict(),
                 "quantiser": self.quantiser.state_dict(), "optimizer": self.optimizer.state_dict()}  # fmt: skip
        save_state(self.folder, self.config, state)

    def load_state(self) -> None:
        """Go on from the saved state; raises ConfigError where it is of other options or damaged."""
        state = check_state(self.folder / STATE, self.config)
        with damage_named(str(self.folder / STATE)):
            self.tokenizer.load_state_dict(state["tokenizer"])
            self.quantiser.load_state_dict(state["quantiser"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        place_schedule(self.schedule, self.step)

    def finish(self, held_out: Sequence[SpeechRow]) -> Path:
        """Save the tokenizer, and how it does on held-out rows, in the folder."""
        self.tokenizer.codebook.copy_(F.normalize(self.quantiser.codebook, dim=-1))
        self.tokenizer.eval()
        if self.ranks.main:
            self.tokenizer.save_pretrained(self.folder)
            if held_out:
                figures = measure_tokenizer(self.tokenizer, held_out)
                write_json(self.folder / "figures.json", figures)
                say(f"on {len(held_out)} held-out rows: " + ", ".join(f"{k} {v:.3g}" for k, v in figures.items()))
            write_json(self.folder / "training.json", dataclasses.asdict(self.config))
        self.ranks.wait()
        return self.folder


def _set_statistics(module: Any, mel_ZE: Tensor) -> None:
    module.mean_E.copy_(mel_ZE.mean(0))
    module.deviation_E.copy_(mel_ZE.std(0).clamp(min=0.05))
