"""Trains a speech tokenizer: its codes must tell the words, the sound given the voice, and the pitch.

    rows -> clips -> WavLM -> quantiser -> CTC + log-mel + pitch + commitment -> SpeechTokenizer folder

`python recipes/train_tokenizer.py --config recipes/configs/tokenizer_tiny.yaml`; several GPUs: `accelerate launch`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import WavLMModel

from covo_rl.data.noise import quiet
from covo_rl.models.weights import load_whole
from covo_rl.speech.clips import digit_rows, training_rows
from covo_rl.speech.configuration import SpeechTokenizerConfig
from covo_rl.speech.pieces import Pieces
from covo_rl.speech.rows import SpeechRow
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.speech.tokenizer_trainer import TokenizerTrainer
from covo_rl.speech.training import TokenizerTraining, owned_folder
from covo_rl.train.launch import process_state

EVAL_CLIPS = 100


def train_tokenizer(config: TokenizerTraining) -> Path:
    """Train in `config.output`, or go on there with `resume`; returns that folder, which is a saved tokenizer.

    Raises:
        ConfigError: the folder is taken or in use; a resume with other options, or of nothing.
        DataError: rows without audio or text, or that cannot be read: all of them.
        DivergedError: the loss is not finite.
    """
    quiet()
    process_state()
    with owned_folder(config) as ranks:
        if config.data is None:
            rows = digit_rows("train", config.clips, config.seed)
        else:
            rows = training_rows(config.data, config.audio_dir, ranks, needs=("audio", "text"))
        if config.eval_data is not None:
            held_out = training_rows(config.eval_data, config.audio_dir, ranks, needs=("audio", "text"))[:EVAL_CLIPS]
        else:
            held_out = [] if config.data else digit_rows("validation", EVAL_CLIPS, config.seed)
        trainer = TokenizerTrainer(config, start_tokenizer(config, rows), rows, ranks)
        trainer.train()
        return trainer.finish(held_out)


def start_tokenizer(config: TokenizerTraining, rows: Sequence[SpeechRow]) -> SpeechTokenizer:
    """A new tokenizer of the seed, that writes the words of the rows; its WavLM is a checkpoint's, if one is named."""
    torch.manual_seed(config.seed)
    pieces = Pieces.learn([row.text for row in rows], config.pieces)
    if config.shape == "tiny":
        return SpeechTokenizer(SpeechTokenizerConfig.tiny(len(pieces)), pieces)
    shape = dataclasses.replace(SpeechTokenizerConfig.published(), pieces=len(pieces))
    if config.wavlm is None:
        return SpeechTokenizer(shape, pieces)
    wavlm = load_whole(WavLMModel, config.wavlm)
    known = vars(type(wavlm.config)())
    fields = {name: value for name, value in wavlm.config.to_diff_dict().items()
              if name in known and name not in ("dtype", "architectures", "transformers_version")}  # fmt: skip
    tokenizer = SpeechTokenizer(dataclasses.replace(shape, wavlm=fields), pieces)
    tokenizer.wavlm.load_state_dict(wavlm.state_dict())
    return tokenizer
