"""The stage before RL of timing: supervised updates that make a model listen, speak and stop, and answer too early.

taught = teach_duplex(options, folder)      a checkpoint there, and what was measured
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from covo_rl import models
from covo_rl.data.files import plain, read_record, write_json
from covo_rl.duplex.config import NEW, DuplexOptions
from covo_rl.duplex.features import draw_streams
from covo_rl.duplex.figures import timing_figures
from covo_rl.duplex.ids import DuplexIds
from covo_rl.duplex.perception import TINY_EARS, TINY_LEFT_CHUNKS, PerceptionOptions, perceive
from covo_rl.duplex.questions import DuplexLesson, TimingQuestion
from covo_rl.duplex.recorded import recorded_sha256, take_recorded
from covo_rl.duplex.stream_files import read_streams
from covo_rl.duplex.supervised import LessonWeights, supervised_loss
from covo_rl.duplex.training import question_logits
from covo_rl.duplex.waves import feature_world
from covo_rl.export.merged import write_merged
from covo_rl.models.builtin import resolve_model
from covo_rl.models.covo_audio.configuration import LEFT_CHUNKS
from covo_rl.models.covo_audio.duplex_tokens import prepare_duplex
from covo_rl.models.covo_audio.persona import SPOKEN_SYSTEM
from covo_rl.models.covo_audio.streaming_encoder import StreamingEncoder
from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer
from covo_rl.policy.trainable import adamw
from covo_rl.records.console import ProgressDisplay
from covo_rl.speech.training import DivergedError
from covo_rl.synth.speech import DIGITS
from covo_rl.train.schedule import advance_schedule, schedule_of

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

RESERVED = ("<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>")
VOCABULARY = 330
SYSTEM_WORDS = 60
SILENCE = len(DIGITS) * 4  # the first of the codes that sound like nothing
#: a tiny head has few rotations, and with 1e6 nearly all are too slow to count the chunks of a silence
ROPE_THETA = 100.0
#: lessons of about the same length are drawn together: their places in the order of lengths
WINDOW = 64
#: updates from one look at held-out streams to the next; those are of another draw than the test's
EVERY, HELD_OUT_SEED = 25, 1
#: share of held-out barge-ins that is to be heard within a second
BARGE_IN = 0.6
FIGURES = "taught.json"


def new_duplex_family(width: int, layers: int, seed: int, *, ears: bool = False) -> AudioFamily:
    """A small Covo-Audio of random weights, with ids to listen and speak at once, and codes for ten digits.

    `ears`: its encoder is to be used; then streams begin as a session does, and its tokenizer is short of it.
    """
    sizes: dict[str, Any] = TINY_EARS if ears else {"encoder_width": 32, "adapter_hidden": 32}
    texts = [" ".join(("", *DIGITS))] * 20 + [f"system {SPOKEN_SYSTEM}"] * 10 * ears
    tokenizer = tiny_tokenizer(texts, VOCABULARY + SYSTEM_WORDS * ears, reserved=RESERVED)
    model, processor = tiny_covo_audio(
        tokenizer, **sizes, decoder_width=width, decoder_layers=layers,
        audio_codes=SILENCE + 4, initializer_range=0.03, rope_theta=ROPE_THETA, seed=seed,
    )  # fmt: skip
    prepare_duplex(
        model, processor.tokenizer, silence_codes=range(SILENCE, SILENCE + 4),
        left_chunks=TINY_LEFT_CHUNKS if ears else LEFT_CHUNKS,
    )  # fmt: skip
    return models.family_class(model.config.model_type)(model, processor)


def family_to_teach(options: DuplexOptions) -> AudioFamily:
    """The model that is named, with a duplex section, or a new one."""
    name, duplex = options.model.model, options.duplex
    if name == NEW:
        ears = duplex.features == "wav"
        return new_duplex_family(duplex.duplex_width, duplex.duplex_layers, options.train.seed, ears=ears)
    family = models.load_family(resolve_model(name), dtype="float32", trust_remote_code=options.model.trust_remote_code)
    DuplexIds.of(family)  # says what the model lacks
    return family


def teach_duplex(options: DuplexOptions, folder: Path) -> dict[str, Any]:
    """Supervised updates on drawn streams, or those of `sft_data`; the checkpoint goes to `folder`, complete once
    FIGURES lies there.

    A new model that is to hear their sound learns to hear first.

    Raises:
        ConfigError: streams of `sft_data` that cannot be used.
        DivergedError: the loss is not finite; nothing is written.
    """
    duplex, seed = options.duplex, options.train.seed
    torch.manual_seed(seed)
    family = family_to_teach(options)
    recorded = options.recorded("sft_data")
    taken = take_recorded(family, recorded) if recorded else None
    heard = {}
    if duplex.features == "wav" and options.model.model == NEW:
        learning = PerceptionOptions(duplex.perception_streams, duplex.perception_steps)
        heard = {"perception": perceive(StreamingEncoder.of(family.model), learning, seed)}
    if taken:
        world, lessons, held_out = taken[0], taken[0].lessons(taken[1]["sft_data"]), []
    else:
        world = feature_world(family, duplex)
        lessons = world.lessons(draw_streams("sft", duplex.sft_streams, seed))
        held_out = world.questions(draw_streams("test", {"single": 100, "barge_in": 60}, HELD_OUT_SEED))
    decoder: Any = family.decoder
    trained = [*decoder.parameters(), *family.lm_head.parameters()]
    family.model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    family.model.train()
    figures = _updates(family, trained, lessons, held_out, world.ids, options)
    family.model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    write_merged(family, folder)
    write_json(folder / FIGURES, {"settings": _settings(options), **heard, **figures})
    return figures


def taught_already(options: DuplexOptions, folder: Path) -> bool:
    """Whether a checkpoint of just these options lies there, complete."""
    try:
        return read_record(folder / FIGURES).get("settings") == plain(_settings(options))
    except ValueError:
        return False


def _settings(options: DuplexOptions) -> dict[str, Any]:
    """All that the stage depends on."""
    duplex = asdict(options.duplex)
    kinds = ("sft_", "duplex_", "perception_", "decision_", "text_", "code_")
    own = {name: value for name, value in duplex.items() if name.startswith(kinds)}
    if options.duplex.sft_data:
        own["sft_data"] = recorded_sha256(read_streams(options.duplex.sft_data))
    names = "features", "noise"
    return {"seed": options.train.seed, **own, **{name: duplex[name] for name in names}}


def _updates(
    family: AudioFamily, trained: Sequence[torch.nn.Parameter], lessons: Sequence[DuplexLesson],
    held_out: Sequence[TimingQuestion], ids: DuplexIds, options: DuplexOptions,
) -> dict[str, Any]:  # fmt: skip
    """Updates, until held-out streams, if any, are answered and barge-ins heard; the means of the last ones."""
    duplex = options.duplex
    weights = LessonWeights(duplex.decision_weight, duplex.text_weight, duplex.code_weight)
    optimizer = adamw(trained, lr=duplex.sft_learning_rate, weight_decay=0.01)
    schedule = schedule_of("cosine", optimizer, warmup_steps=duplex.sft_warmup, steps=duplex.sft_steps)
    rng, order = np.random.default_rng(options.train.seed), sorted(lessons, key=lambda lesson: len(lesson.ids))
    lines: list[dict[str, float]] = []
    single, barge_in = None, None
    with ProgressDisplay("sft", duplex.sft_steps) as display:
        for step in range(1, duplex.sft_steps + 1):
            batch = next_batch(order, duplex.sft_batch, rng)
            loss, line = supervised_loss(family, batch, ids, weights)
            if not torch.isfinite(loss):
                raise DivergedError(f"step {step}: loss {float(loss)}: lower sft_learning_rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            advance_schedule(schedule)
            lines.append({"loss": float(loss.detach()), **line})
            display.update(step, f"loss {lines[-1]['loss']:.3f}")
            if held_out and step % EVERY == 0:
                single, barge_in = held_out_success(family, held_out, ids)
                if single >= duplex.sft_until and barge_in >= BARGE_IN:
                    break
    last = lines[-EVERY:]
    names = dict.fromkeys(name for line in last for name in line)
    return {"steps": len(lines), "single_turn_success": single, "barge_in_success": barge_in} | {
        name: float(np.mean([line[name] for line in last if name in line])) for name in names
    }


def next_batch(order: Sequence[DuplexLesson], size: int, rng: np.random.Generator) -> list[DuplexLesson]:
    """Lessons of about the same length, from `order` by length: little of a batch is padding."""
    window = min(max(WINDOW, size), len(order))
    first = int(rng.integers(len(order) - window + 1))
    return [order[first + int(i)] for i in rng.choice(window, min(size, window), replace=False)]


def held_out_success(family: AudioFamily, questions: Sequence[TimingQuestion], ids: DuplexIds) -> tuple[float, float]:
    """Shares, greedily, of single turns that are answered neither early nor late, and of barge-ins that are heard."""
    z = question_logits(family, questions, ids)
    figures = timing_figures([question.stream for question in questions], z)
    return figures["single_turn_success"], figures["barge_in_success"]
