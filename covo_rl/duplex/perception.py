"""Teach a streaming encoder to hear what a turn's end sounds like: which word, how its pitch and level move.

    report = perceive(StreamingEncoder.of(model), PerceptionOptions(), seed)      encoder and adapter, in place, once
    world = feature_world(family, config)                                         waves.py: what SFT and RL hear

`report["auc"]` says whether a pause can be told from an end in voices that have not taught: RL wants 0.85 or more.

A linear head on the features names, in every chunk, what was heard in it and in the one before, where a word that had
just begun is known by now. RL of timing cannot teach this: what the features do not hold, no reward finds. The head is
thrown away, encoder and adapter are frozen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covo_rl.data.terminal import say
from covo_rl.duplex.features import (
    FALL,
    LEVEL,
    PITCH,
    TEST_COUNTS,
    WORDS,
    FeatureStream,
    draw_streams,
    encoder_features,
    percepts,
)
from covo_rl.duplex.grid import CHUNK_SAMPLES
from covo_rl.duplex.probe import GATE, probe_auc, probe_places
from covo_rl.duplex.rollout import TimingStream
from covo_rl.duplex.waves import hear, stream_wave, wave_listener
from covo_rl.models.tiny.covo_audio import fold_feature_statistics
from covo_rl.policy.trainable import adamw
from covo_rl.rewards.rules.turns import LISTENING

#: tags of one chunk: level, movement of pitch and of level; how much of it is silence, and each of the words
MOVEMENTS = 3
TAGS = MOVEMENTS + 1 + WORDS
#: movements are squared errors, far smaller than the cross entropy of words, and few words have any
MOVEMENT_WEIGHT = 16.0
#: chunks of features that the probe is given, the last one 0.3 s into a silence: a decoder has them all
PROBE_CHUNKS = 4
#: of the probe on features: they are many, and silences few
PROBE_RIDGE = 100.0
LOG_EVERY = 50
#: streams over which mel and features are measured
MEASURED = 64
#: sizes of a tiny model's encoder and adapter that learn this in minutes, and what its duplex section says of it
TINY_EARS = {"encoder_width": 96, "encoder_layers": 2, "mel_bins": 80, "adapter_hidden": 192, "segment_seconds": 2.56}
TINY_LEFT_CHUNKS = 8
#: streams of perception are drawn from seeds that SFT and RL do not use
PERCEPTION_SEED = 1_000_000
SIMULATED_WIDTH = 64


@dataclass(frozen=True)
class PerceptionOptions:
    """Updates of `perception_batch` crops of `perception_chunks`; the rate is the highest of one cycle."""

    perception_streams: int = 400
    perception_steps: int = 400
    perception_batch: int = 16
    perception_chunks: int = 24
    perception_learning_rate: float = 2e-3


def perceive(encoder: Any, options: PerceptionOptions, seed: int = 0) -> dict[str, Any]:
    """Draw the encoder's weights and train them on simulated streams; says and returns the AUC on others.

    {"auc", "simulated_auc", "silences", "seconds", "losses"}; `simulated_auc` is that of `encoder_features`.
    """
    begun = time.process_time()
    streams = draw_streams("rl", options.perception_streams, PERCEPTION_SEED + seed)
    waves = [stream_wave(stream) for stream in streams]
    fresh_ears(encoder, waves, seed)
    losses = learn_to_hear(encoder, streams, waves, options, seed)
    listening = {kind: count for kind, count in TEST_COUNTS.items() if kind in LISTENING}
    held_out = draw_streams("test", listening, PERCEPTION_SEED + seed)
    listen = wave_listener(encoder)
    auc = feature_auc(held_out, [listen(stream) for stream in held_out])
    simulated = [torch.from_numpy(encoder_features(stream, SIMULATED_WIDTH)) for stream in held_out]
    report = {
        "auc": auc, "simulated_auc": feature_auc(held_out, simulated), "seconds": time.process_time() - begun,
        "silences": sum(len(probe_places(stream)) for stream in held_out), "losses": losses,
    }  # fmt: skip
    say(f"perception: AUC {auc:.3f} of a pause against an end 0.3 s into {report['silences']} silences of new voices "
        f"(simulated features: {report['simulated_auc']:.3f}; RL wants {GATE} or more)")  # fmt: skip
    return report


def chunk_tags(stream: FeatureStream) -> np.ndarray:
    """(chunks, 2, TAGS) float32: what is heard in each chunk, and what was in the one before."""
    heard_KF = percepts(stream)
    words_KW = heard_KF[:, MOVEMENTS:]
    silence_K1 = np.clip(1 - words_KW.sum(1, keepdims=True), 0, 1)
    tags_KT = np.concatenate([heard_KF[:, [LEVEL, PITCH, FALL]], silence_K1, words_KW], 1)
    nothing_1T = np.eye(TAGS, dtype=np.float32)[[MOVEMENTS]]
    return np.stack([tags_KT, np.concatenate([nothing_1T, tags_KT[:-1]])], 1)


@torch.no_grad()
def fresh_ears(encoder: Any, waves: Sequence[np.ndarray], seed: int = 0) -> None:
    """Draw encoder and adapter of a tiny model anew, so that sound of the level of these waves reaches the features.

    The usual small weights make what is heard ten thousand times smaller on its way, and learning slow.
    """
    model, generator = encoder.model, torch.Generator().manual_seed(seed)
    for part, within in ((model.encoder, "linear"), (model.audio_adapter, "relu")):
        for name, weight in part.named_parameters():
            if weight.ndim > 1 and "embed_positions" not in name:
                kind: Any = "relu" if "conv" in name else within
                nn.init.kaiming_normal_(weight, nonlinearity=kind, generator=generator)
    mels = [encoder.mel.whole(torch.from_numpy(wave_T)[None], torch.tensor([encoder.mel_peak]))[0]
            for wave_T in waves[:MEASURED]]  # fmt: skip
    mel_MF = torch.cat(mels, 1)
    fold_feature_statistics(model, mel_MF.mean(1), mel_MF.std(1))


def learn_to_hear(
    encoder: Any,
    streams: Sequence[FeatureStream],
    waves: Sequence[np.ndarray],
    options: PerceptionOptions,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Train encoder and adapter of a StreamingEncoder in place on crops of the waves; returns losses by step.

    Afterwards every feature has mean 0 and deviation 1 over these streams, and neither part trains any more.
    """
    torch.manual_seed(seed)
    rng, tags = np.random.default_rng([seed, 23]), [chunk_tags(stream) for stream in streams]
    parts = (encoder.model.encoder, encoder.model.audio_adapter)
    device, width = parts[0].conv1.weight.device, encoder.model.config.llm_config.hidden_size
    head = nn.Linear(width, 2 * TAGS).to(device)
    for part in parts:
        part.train().requires_grad_(True)
    parts[0].embed_positions.requires_grad_(False)
    parameters = [p for part in (*parts, head) for p in part.parameters() if p.requires_grad]
    rate, steps = options.perception_learning_rate, options.perception_steps
    optimizer = adamw(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    log: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        wave_BT, tags_BKT, inside_BK = crops(waves, tags, options, rng)
        named_BKT = head(encoder.offline_features(wave_BT)).unflatten(-1, (2, TAGS))
        losses = tag_losses(named_BKT, tags_BKT.to(device), inside_BK.to(device))
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros((), device=device)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % LOG_EVERY == 0 or step == steps:
            log.append({"step": step} | {name: float(loss.detach()) for name, loss in losses.items()})
            say(f"perception: {step}/{steps}  words {log[-1]['words']:.3f}  movements {log[-1]['movements']:.3f}")
    for part in parts:
        part.eval().requires_grad_(False)
    standardise_features(encoder, waves[:MEASURED])
    return log


def tag_losses(named_BKT: Tensor, tags_BKT: Tensor, inside_BK: Tensor) -> dict[str, Tensor]:
    """Cross entropy of what part of a chunk is silence or which word, and squared errors of movements.

    `named` and `tags` (B, K, 2, TAGS), the former logits; only chunks where `inside` is 1 count.
    """
    words_BK2 = -(tags_BKT[..., MOVEMENTS:] * F.log_softmax(named_BKT[..., MOVEMENTS:], -1)).sum(-1)
    errors_BK2 = (named_BKT[..., :MOVEMENTS] - tags_BKT[..., :MOVEMENTS]).square().sum(-1)
    weight_BK = inside_BK / inside_BK.sum()
    losses = {"words": words_BK2, "movements": MOVEMENT_WEIGHT * errors_BK2}
    return {name: (weight_BK * loss_BK2.mean(-1)).sum() for name, loss_BK2 in losses.items()}


def crops(
    waves: Sequence[np.ndarray], tags: Sequence[np.ndarray], options: PerceptionOptions, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Waves (B, T), tags (B, K, 2, TAGS), and (B, K) 1 where a stream is: a short one is followed by silence."""
    chunks = options.perception_chunks
    tags_BKT = torch.zeros(options.perception_batch, chunks, 2, TAGS)
    inside_BK = torch.zeros(tags_BKT.shape[:2])
    pieces = []
    for row, stream in enumerate(rng.integers(len(waves), size=options.perception_batch)):
        first = int(rng.integers(max(1, len(tags[stream]) - chunks + 1)))
        here_KT = torch.from_numpy(tags[stream][first : first + chunks])
        tags_BKT[row, : len(here_KT)], inside_BK[row, : len(here_KT)] = here_KT, 1
        pieces.append(waves[stream][CHUNK_SAMPLES * first : CHUNK_SAMPLES * (first + chunks)])
    wave_BT = np.stack([np.pad(piece_T, (0, CHUNK_SAMPLES * chunks - len(piece_T))) for piece_T in pieces])
    return torch.from_numpy(wave_BT), tags_BKT, inside_BK


@torch.no_grad()
def standardise_features(encoder: Any, waves: Sequence[np.ndarray]) -> None:
    """Mean 0 and deviation 1 of every feature over these waves, folded into the adapter's last layer."""
    features_ND = torch.cat([hear(encoder, wave_T) for wave_T in waves])
    last = encoder.model.audio_adapter.downsample_layers[-1].linear2
    std_D = features_ND.std(0).clamp(min=1e-6).to(last.weight.device)
    last.bias.copy_((last.bias - features_ND.mean(0).to(last.bias.device)) / std_D)
    last.weight.div_(std_D[:, None])


def feature_auc(streams: Sequence[TimingStream], features: Sequence[Tensor], chunks: int = PROBE_CHUNKS) -> float:
    """AUC of a linear probe, 0.3 s into silences, on the last `chunks` features: is the turn over? 0.5 is guessing.

    Raises:
        ValueError: too few streams for the probe, or only pauses, or only ends.
    """
    states, over, names = [], [], []
    for stream, feature_KD in zip(streams, features, strict=True):
        before_KD = F.pad(feature_KD, (0, 0, chunks, 0))  # row k + chunks is feature k
        for decision, ends in probe_places(stream):
            after = stream.first_chunk + decision + 1 + chunks
            states.append(before_KD[after - chunks : after].flatten().numpy())
            over.append(ends)
            names.append(stream.id)
    return probe_auc(np.array(states), np.array(over), names, ridge=PROBE_RIDGE)
