"""Rows with their features, kept within a budget however many stages use them, and the texts that a stage teaches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from covo_rl.audio import ClipStore
from covo_rl.policy.features import FeatureStore
from covo_rl.prompt import build_prompt, reference_completion
from covo_rl.speech.rows import read_speech_rows
from covo_rl.supervised.checks import check_apart, check_rows, check_stage_rows
from covo_rl.supervised.config import ColdStartConfig, Stage
from covo_rl.supervised.held_out import split_held_out
from covo_rl.types import Clip, Example, UserError, shown, visible

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily, ClipFeatures

#: how a completion is damaged: tags that are missing
BROKEN = (
    "{think}<answer>{answer}</answer>",
    "<think>{think}<answer>{answer}</answer>",
    "<think>{think}</think>{answer}",
    "<think>{think}</think><answer>{answer}",
)


class TeacherError(UserError, ValueError):
    """A row lacks what its teacher needs; the message names rows and columns."""


@dataclass(frozen=True)
class Row:
    """An example with the token ids of its prompt, and the slots and keys of its clips."""

    example: Example
    prompt_ids: tuple[int, ...]
    slots: tuple[int, ...]
    keys: tuple[str, ...]
    store: FeatureStore

    @property
    def clips(self) -> tuple[ClipFeatures, ...]:
        """The features of its clips, made again where the store has dropped them."""
        return tuple(self.store.clip_features(key) for key in self.keys)


def used_rows(config: ColdStartConfig) -> tuple[int, int | None]:
    """First and last + 1 row that the stages to be run look at; None is the end of the data."""
    stages = config.stages[config.start_stage :]
    ends = [stage.first_row + stage.rows for stage in stages if stage.rows is not None]
    return min(stage.first_row for stage in stages), max(ends) if len(ends) == len(stages) else None


def stage_examples(config: ColdStartConfig, clips: ClipStore | None = None) -> tuple[list[Example], list[Example]]:
    """(Rows that the stages use, held-out rows) of `data` or of the built-in train split; clips as files or arrays.
    `clips` names those of `data` here. The held-out rows are a share of `data`, or those of `eval_data`.

    Raises:
        DataError: rows or clips that cannot be used, all named; sounds of `eval_data` that `data` has too.
        ConfigError: a stage asks for rows that there are not.
    """
    first, end = used_rows(config)
    if config.data is None and config.eval_data is None and not config.held_out_share:
        check_stage_rows(config, config.rows)
        return _rendered(config, range(first, min(end or config.rows, config.rows))), []
    if config.data is None:
        rows = _rendered(config, range(config.rows))
    else:
        rows = _loaded(config.data, config.audio_dir, config.columns)
    clips = ClipStore(memory_mb=64) if clips is None else clips
    if config.eval_data is not None:
        columns = config.eval_columns or config.columns
        train, held_out = rows, _loaded(config.eval_data, config.eval_audio_dir or config.audio_dir, columns)
        check_apart(train, held_out, config.eval_data, clips)
    else:
        train, held_out = split_held_out(rows, config.held_out_share, config.seed, clips)
    check_stage_rows(config, len(train))
    return train[first:end], held_out


def _loaded(source: str, audio_dir: str | None, columns: str | None) -> list[Example]:
    from covo_rl.data import load_examples

    rows = load_examples(source, audio_dir, columns=columns)
    check_rows(rows, source)
    return rows


def examples(config: ColdStartConfig) -> list[Example]:
    """The rows that the stages use."""
    return stage_examples(config)[0]


def _rendered(config: ColdStartConfig, numbers: Iterable[int]) -> list[Example]:
    from covo_rl import synth

    result = []
    for number in numbers:
        row, clip = synth.render_sample("train", number, config.synth_seed)
        own = {name: row.pop(name) for name in ("id", "question", "answer")}
        clips = (Clip(array=clip.astype("float32") / 32_768, sampling_rate=synth.RATE),)
        result.append(Example(**own, clips=clips, choices=tuple(row.pop("choices")), columns=row))
    return result


def prepare_rows(
    rows: Sequence[Example], family: AudioFamily, config: ColdStartConfig,
    progress: Callable[[Sequence[Example]], Iterable[Example]] = iter, clips: ClipStore | None = None,
) -> list[Row]:  # fmt: skip
    """Prompts of all rows, and the features of as many clips as `feature_memory_mb` holds.

    `progress` passes rows on and shows how far it is.
    """
    import torch

    clips, result = ClipStore(memory_mb=64) if clips is None else clips, []
    store = FeatureStore(family, clips, config.feature_memory_mb)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations, which waiting for a second thread only slows
    try:
        for example in progress(rows):
            prompt = build_prompt(example, family, clips, config.prompt)
            result.append(row := Row(example, prompt.input_ids, prompt.slots, prompt.clip_keys, store))
            if not store.full:
                _ = row.clips  # now, while it is decoded
    finally:
        torch.set_num_threads(threads)
    return result


def completions(rows: Sequence[Example], stage: Stage, seed: int, column: str = "completion") -> list[str]:
    """One target text per row, from one random stream.

    Raises:
        TeacherError: names the first ten rows that lack something and how many there are.
    """
    rng, texts, problems = random.Random(seed), [], []
    for row in rows:
        try:
            texts.append(completion(row, stage, rng, column))
        except ValueError as error:  # TeacherError, or evidence that no completion can hold
            name = visible(row.id)
            problems.append(str(error) if str(error).startswith(name) else f"{name}: {error}")
    if problems:
        more = [f"and {len(problems) - 10} more rows"] if len(problems) > 10 else []
        raise TeacherError("\n".join([*problems[:10], *more]))
    return texts


def reply_codes(rows: Sequence[Example], count: int) -> list[list[int]]:
    """The codes of every reply, from the column `codes` as rows of speech have it; the model has `count` codes.

    Raises:
        TeacherError: the model has none, or the rows are of several tokenizers (column `tokenizer`).
        DataError: codes that are missing, malformed or outside 0 to count - 1, of all rows.
    """
    if not count:
        raise TeacherError("speak: this model has no codes to speak in; a new tiny one gets them by audio_codes")
    if len(makers := {str(row.columns.get("tokenizer")) for row in rows}) > 1:
        raise TeacherError(f"the codes are of {len(makers)} tokenizers ({shown(sorted(makers))}): encode all with one")
    spoken = [{"id": row.id, "text": row.answer or "reply", "codes": row.columns.get("codes")} for row in rows]
    read = read_speech_rows(spoken, needs={"codes"}, codebook=count)
    return [row.codes.tolist() for row in read if row.codes is not None]  # none is: they are needed


def completion(example: Example, stage: Stage, rng: random.Random, column: str = "completion") -> str:
    """The text after the prompt, without the end token: right, wrong or broken on purpose.

    Raises:
        TeacherError: the row lacks what the teacher needs; names the row and the column.
    """
    name = visible(example.id)
    if stage.teacher == "column":
        text = example.columns.get(column)
        if not isinstance(text, str) or not text.strip():
            has = ", ".join(example.columns) or "no further columns"
            raise TeacherError(f"{name}: no text in column {column!r}; it has {has}")
        return text

    def other(value: str) -> str:
        others = [choice for choice in example.choices if choice != value]
        if not others:
            raise TeacherError(f"{name}: a wrong conclusion needs another choice; the row has {example.choices}")
        return rng.choice(others)

    if stage.teacher == "answer":
        said = example.answer
        if said is not None and rng.random() >= stage.right:
            said = other(said)
        try:
            return reference_completion("-", said or "").removeprefix("<think>-</think>")
        except ValueError as error:
            raise TeacherError(f"{name}: the answer teacher needs an answer, it is {said!r}") from error

    evidence = example.columns.get("evidence")
    if not isinstance(evidence, str) or example.answer is None:
        has = ", ".join(example.columns) or "no further columns"
        raise TeacherError(
            f"{name}: the evidence teacher needs an answer and a text in column 'evidence'; the answer is "
            f"{example.answer!r}, the columns are {has}"
        )
    conclusion = example.answer if rng.random() < stage.right else other(example.answer)
    answer = other(conclusion) if rng.random() < stage.inconsistent else conclusion
    think = f"{evidence} So the answer is {conclusion}."
    if rng.random() < stage.broken:
        return rng.choice(BROKEN).format(think=think, answer=answer)
    try:
        return reference_completion(think, answer)
    except ValueError as error:
        raise TeacherError(f"{name}: {error}") from error
