"""Points 1 to 3: the weights are all there, clips fill the slots they say, and sound the same in any company."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from covo_rl.audio import AudioError
from covo_rl.config import PromptConfig
from covo_rl.models.base import ClipFeatures
from covo_rl.policy.patterns import part_of
from covo_rl.prompt import PromptError, build_prompt
from covo_rl.run.conformance.outcome import Figure, Gap
from covo_rl.run.conformance.subject import RATE, Subject, largest_difference
from covo_rl.types import Clip, Example

SECONDS = (0.1, 1.0, 2.35, 29.99, 30.0, 30.01, 41.0)
#: words of parameter names of what no family here uses: seeing, and speaking
UNHEARD = ("vision", "visual", "image", "video", "talker", "token2wav", "code2wav")


def is_unheard(name: str) -> bool:
    """A tensor of the half that sees or speaks."""
    return any(word in name.lower() for word in UNHEARD)


# -- 1. weights --------------------------------------------------------------------------------------------------------


def weights_and_parts(subject: Subject) -> Iterator[Figure | Gap]:
    """Loads from its folder; every key is read; the parts cover all parameters but vision."""
    family = subject.family
    if subject.folder is None:
        yield Gap("tensors in the files", "the model was made in memory")
    else:
        left = [name for name in unread_tensors(type(family.model), subject.folder) if not is_unheard(name)]
        yield Figure("tensors in the files that nothing reads", len(left), 0,
                     f"the class has no place for them: {', '.join(left[:3])}")  # fmt: skip
    names = [name for name, _ in family.model.named_parameters()]
    outside = [name for name in names if part_of(name, family) == "other" and not is_unheard(name)]
    yield Figure("parameters outside every part", len(outside), 0, f"`parts` misses {', '.join(outside[:3])}")
    counts = Counter(part_of(name, family) for name in names)
    tied = family.model.get_output_embeddings().weight is family.model.get_input_embeddings().weight
    empty = [part for part in family.parts if not counts[part] and not (part == "lm_head" and tied)]
    yield Figure("parts without a parameter", len(empty), 0, f"wrong prefix of {', '.join(empty)}")


def unread_tensors(model_class: Any, folder: str) -> list[str]:
    """Tensors of a checkpoint that `model_class` has no place for; read without memory for them."""
    with _quiet():
        _, report = model_class.from_pretrained(folder, device_map="meta", output_loading_info=True)
    return sorted(report["unexpected_keys"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of the same, and its bar."""
    from transformers.utils import logging as words

    logger, bars = logging.getLogger("transformers"), words.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    words.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            words.enable_progress_bar()


# -- 2. slots ----------------------------------------------------------------------------------------------------------


def slots(subject: Subject) -> Iterator[Figure | Gap]:
    """Slots = rows of `encode` = audio ids of the prompt, at seven lengths; longer ones are refused by row id."""
    limit = subject.family.max_clip_seconds
    features = {seconds: subject.family.clip_features(subject.wave(7, seconds), RATE) for seconds in SECONDS
                if not limit or seconds <= limit}  # fmt: skip
    wrong = [text for seconds, clip in features.items() if (text := _disagreement(subject, seconds, clip))]
    yield Figure("lengths whose counts disagree", len(wrong), 0, "; ".join(wrong))
    if limit:
        beyond = {seconds: subject.clip(7, seconds) for seconds in SECONDS if seconds > limit}
        beyond[limit + 1.0] = Clip(array=np.zeros(round((limit + 1.0) * RATE), np.float32), sampling_rate=RATE)
        taken = [seconds for seconds, clip in beyond.items() if not _refused(subject, clip, seconds)]
        yield Figure("lengths beyond the limit that are taken", len(taken), 0,
                     f"max_clip_seconds {limit:g} is not held at {taken} s: the rest is cut silently")  # fmt: skip
    yield from _as_stock(subject, features)


def _disagreement(subject: Subject, seconds: float, clip: ClipFeatures) -> str:
    """What the four counts of a clip are, where they are not one."""
    family = subject.family
    with torch.no_grad():
        rows = len(family.encode([clip])[0])
    row = Example(f"{seconds} s", (subject.clip(7, seconds),), "What do you hear?")
    ids = build_prompt(row, family, subject.clips, PromptConfig(instruction="")).input_ids
    counted, placed = family.clip_slots(subject.wave(7, seconds), RATE), ids.count(family.audio_token_id)
    same = clip.slots == counted == rows == placed
    return "" if same else f"{seconds} s: slots {clip.slots}, clip_slots {counted}, encode {rows}, ids {placed}"


def _as_stock(subject: Subject, features: Mapping[float, ClipFeatures]) -> Iterator[Figure | Gap]:
    """Counts and features against the stock processor's."""
    stock, why = stock_processor(subject)
    if stock is None:
        yield Gap("the stock processor", why)
        return
    counts, differences = [], []
    for seconds, clip in features.items():
        count, theirs = stock(subject.wave(7, seconds))
        if theirs.keys() <= {"input_ids", "attention_mask"}:
            yield Gap("the stock processor", "it takes audio in its own template only")
            return
        counts.append(abs(count - clip.slots))
        differences.append(_difference(clip, theirs))
    yield Figure("slots of the stock processor, difference", max(counts), 0, "`slots` counts other positions")
    yield Figure("features of the stock processor, difference", max(differences), 1e-5,
                 "`extract` pads, cuts or normalises otherwise")  # fmt: skip


def _refused(subject: Subject, clip: Clip, seconds: float) -> bool:
    """Whether a prompt with this clip ends in an error that names its row."""
    row = Example(f"clip-of-{seconds:g}", (clip,), "What do you hear?")
    try:
        build_prompt(row, subject.family, subject.clips, PromptConfig(instruction=""))
    except (PromptError, AudioError) as error:
        return row.id in str(error)
    return False


def stock_processor(subject: Subject) -> tuple[Any, str]:
    """waveform -> (audio ids, fields by name) of the checkpoint's own processor; or None and why there is none."""
    import transformers
    from transformers.models.auto.processing_auto import (
        PROCESSOR_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
    )

    if subject.folder is None:
        return None, "the model was made in memory"
    kind = str(PROCESSOR_MAPPING_NAMES.get(subject.family.model_type, "AutoProcessor"))
    try:
        with _quiet():
            processor: Any = getattr(transformers, kind).from_pretrained(subject.folder)
    except (ImportError, OSError, ValueError, TypeError, AttributeError) as error:
        return None, f"{kind}: {' '.join(str(error).split())[:160]}"
    token = subject.family.processor.audio_token

    def ask(wave: np.ndarray) -> tuple[int, Mapping[str, torch.Tensor]]:
        out = processor(text=[token], audio=[wave], sampling_rate=RATE, return_tensors="pt")
        ids = out["input_ids"][0].tolist()
        return ids.count(subject.family.audio_token_id), out

    return ask, ""


def _difference(features: ClipFeatures, theirs: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of a feature, over what both have; one may hold more padding than the other."""
    gaps = [0.0]
    for name, ours in features.tensors.items():
        if name in theirs and ours.is_floating_point() and ours.ndim == theirs[name].ndim:
            area = tuple(slice(0, min(a, b)) for a, b in zip(ours.shape, theirs[name].shape, strict=True))
            gaps.append(float((ours[area].float() - theirs[name][area].float()).abs().max()))
    return max(gaps) if any(name in theirs for name in features.tensors) else float("nan")


# -- 3. company --------------------------------------------------------------------------------------------------------


def company(subject: Subject) -> Iterator[Figure | Gap]:
    """A clip's embedding, alone, beside two others, and a second time."""
    family = subject.family
    clips = [family.clip_features(subject.wave(seed, seconds), RATE)
             for seed, seconds in enumerate((0.8, 2.35, 0.3))]  # fmt: skip
    with torch.no_grad():
        alone = [family.encode([clip])[0] for clip in clips]
        again = [family.encode([clip])[0] for clip in clips]
        together = family.encode(clips)
    yield Figure("a second time, difference", largest_difference(alone, again), 0, "the encoder draws random numbers")
    limit = 0.0 if not (family.rows_independent and alone[0].device.type != "cpu") else subject.exact
    yield Figure("in a batch of three, difference", largest_difference(alone, together), limit,
                 "clips share an encoder call that does not mask them: rows_independent = False")  # fmt: skip
    yield Figure("largest value of an embedding", float(alone[0].abs().max()), 1e-6, "the encoder gives zeros",
                 least=True)  # fmt: skip
