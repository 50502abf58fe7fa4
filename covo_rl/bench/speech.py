"""What speech costs: the decoder whole and as a stream, and an update of each training beside what `doctor` planned.

All weights are random: time and memory do not depend on them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from covo_rl.bench.meter import GIB, Meter
from covo_rl.models.covo_audio.token2wav import Token2Wav, Token2WavConfig
from covo_rl.resolve import find
from covo_rl.run.doctor import Plan
from covo_rl.run.speech_memory import speech_plan
from covo_rl.speech.clips import collate, row_of
from covo_rl.speech.decoder_training import read_decoder_training
from covo_rl.speech.grid import CODE_SECONDS, RATE, count_codes
from covo_rl.speech.rows import SpeechRow
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.speech.tokenizer_trainer import TokenizerTrainer
from covo_rl.speech.train_decoder import DecoderTrainer
from covo_rl.speech.train_tokenizer import start_tokenizer
from covo_rl.speech.training import read_training
from covo_rl.synth.speech import DIGITS, say_digits, speakers
from covo_rl.types import Clip

PROMPT_SECONDS = 3


def decoding(
    shape: str, device: torch.device, dtype: torch.dtype, batches: tuple[int, ...], seconds: float
) -> Iterator[tuple[str, Any]]:
    """(name, figures) of replies of so many seconds, whole in batches, and of one as it is streamed.

    `shape`: "published", or "tiny" with the same kinds of layers. The real-time factor is seconds of work for a second
    of speech.
    """
    torch.manual_seed(0)
    config = Token2WavConfig() if shape == "published" else Token2WavConfig.tiny("vae", "bigvgan")
    decoder = Token2Wav(config).to(device, dtype).eval()
    flow, prompt = config.flow, round(min(PROMPT_SECONDS, seconds) / CODE_SECONDS)
    voice: dict[str, Any] = {
        "prompt_codes": torch.randint(flow.token_vocab_size, (1, prompt)),
        "prompt_latent": torch.randn(1, 4 * prompt, flow.z_dim), "speaker": torch.randn(1, flow.spkr_embed_dim),
    }  # fmt: skip
    codes_BL = torch.randint(flow.token_vocab_size, (max(batches), round(seconds / CODE_SECONDS)))
    for rows in batches:
        figures = _measured(device, lambda rows=rows: decoder.synthesise(codes_BL[:rows], **voice).cpu())
        yield f"B{rows}", figures | {"real_time_factor": figures["update_s"] / rows / seconds}
    arrivals: list[float] = []
    for _ in range(2):  # the first call chooses kernels
        start, arrivals = time.perf_counter(), []
        for piece in decoder.stream(codes_BL[0].tolist(), **voice):
            piece.cpu()
            arrivals.append(time.perf_counter() - start)
    yield "stream", {"first_piece_s": arrivals[0], "pieces": len(arrivals), "seconds": arrivals[-1],
                     "real_time_factor": arrivals[-1] / seconds}  # fmt: skip


def updates(shape: str, device: torch.device, seconds: float) -> Iterator[tuple[str, Any]]:
    """(name, figures) of an update of the tokenizer's training, of the vocoder's and of the flow's, on this rank alone.

    `shape` names recipes/configs/{tokenizer,decoder}_SHAPE.yaml. Clips are of `seconds`.
    """
    path, rows = find("recipes", "configs") / f"tokenizer_{shape}.yaml", long_rows(8, seconds)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(read_training(path), output=folder, workers=0, pieces=None)
        trainer = TokenizerTrainer(config, start_tokenizer(config, rows), rows)
        sizes = trainer.tokenizer.config
        trainer.quantiser.begin(normalize(torch.randn(2 * sizes.codebook_size, sizes.code_dim), dim=-1).to(device))
        batch = collate([trainer.clips[i % len(rows), i % len(rows)] for i in range(config.batch_size)])
        batches = [batch] * config.gradient_accumulation_steps
        figures = _measured(device, lambda trainer=trainer: trainer.update(batches))
        yield "tokenizer", figures | _planned(speech_plan("tokenizer", path, seconds, str(device)))
        tokenizer = trainer.tokenizer.cpu()
        del trainer  # its optimiser's memory is the decoder's now
        yield from _decoder_updates(shape, device, rows, tokenizer, folder)


def _decoder_updates(
    shape: str, device: torch.device, rows: list[SpeechRow], tokenizer: SpeechTokenizer, folder: str
) -> Iterator[tuple[str, Any]]:
    path = find("recipes", "configs") / f"decoder_{shape}.yaml"
    config = read_decoder_training(path, {"output": folder})
    codes = [torch.randint(len(tokenizer.codebook), (count_codes(len(row.wave())),)) for row in rows]
    trainer = DecoderTrainer(config, rows, codes, tokenizer)
    for name, update, draw in (
        ("vocoder", trainer.update_vocoder, trainer.clips.crops),
        ("flow", trainer.update_flow, trainer.clips.sequences),
    ):
        parts = [trainer.clips[item] for item in draw(0)]
        batch = [torch.stack(values).to(device) for values in zip(*parts, strict=True)]
        yield name, _measured(device, lambda update=update, batch=batch: update(*batch))
    yield "decoder", _planned(speech_plan("decoder", path, 0, str(device)))


def long_rows(count: int, seconds: float) -> list[SpeechRow]:
    """Recordings of digits, cut at `seconds`, each of a voice of its own."""
    rows = []
    for i, speaker in enumerate(speakers(count, 0, "train")):
        rng = np.random.default_rng([0, i])
        spoken = say_digits(rng.choice(DIGITS, round(5 * seconds)).tolist(), speaker, rng)
        clip = Clip(array=spoken.wave[: round(RATE * seconds)], sampling_rate=RATE)
        text = " ".join(word for word, _, end in spoken.words if end <= seconds)
        rows.append(replace(row_of(spoken, str(i)), clip=clip, text=text, words=None))
    return rows


def _measured(device: torch.device, work: Any) -> dict[str, Any]:
    """Seconds and peak memory of the third call."""
    meter = Meter(device)
    for _ in range(3):
        meter("update", work)
    return meter.figures


def _planned(plan: Plan) -> dict[str, Any]:
    return {"planned_gib": plan.peak / GIB, "planned": list(plan.notes)}
