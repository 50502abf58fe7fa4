"""The rows of a run: which files, which rows train, which are held out, and what is wrong with them. No torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from covo_rl.audio import ClipStore, decode
from covo_rl.config import SPOKEN_SET, ConfigError, DataConfig, Options, PromptConfig
from covo_rl.data import load_examples, overlap, row_problems
from covo_rl.data.check import sound_of
from covo_rl.data.memory import IN_MEMORY
from covo_rl.data.read import data_notes, some
from covo_rl.prompt import PromptError, PromptFamily, build_prompt
from covo_rl.synth import builtin_questions
from covo_rl.synth.dialogue import spoken_questions
from covo_rl.train.ranks import Ranks
from covo_rl.types import Clip, Example, Prompt, visible


@dataclass(frozen=True)
class Rows:
    """`files` maps data and eval_data to the question files, or to what the rows in memory are called; `notes` are
    lines for the user."""

    train: list[Example]
    held_out: list[Example]
    files: Mapping[str, Path]
    notes: tuple[str, ...] = ()


def read_questions(
    options: Options,
    clips: ClipStore | None = None,
    ranks: Ranks | None = None,
    memory: Mapping[str, Any] | None = None,
) -> Rows:
    """Training and held-out rows. Without `data` the built-in set, rendered on first use.

    Where held-out rows are asked for and there is no `eval_data`, a share of the user's rows is held out, all rows of a
    clip on the same side. `clips` names every file of them here, which rank 0 alone reads for it. `memory` maps data
    and eval_data to rows that a program hands over, where the options say IN_MEMORY.

    Raises:
        DataError: rows that cannot be used, all named.
        ConfigError: no row is left to train on, or the options name rows of another program.
    """
    config, memory = options.data, memory or {}
    _check_memory(config, memory)
    builtin = rendered_set(config)
    data, eval_data = builtin.get("train", config.data), config.eval_data or builtin.get("test")
    files = {name: Path(path) for name, path in (("data", data), ("eval_data", eval_data)) if path is not None}
    folder = None if builtin else config.audio_dir
    eval_folder = config.eval_audio_dir or config.audio_dir if config.eval_data is not None else None
    columns = None if builtin else config.columns  # the built-in sets have their own names
    eval_columns = config.eval_columns or config.columns if config.eval_data is not None else None

    def load(name: str, audio_dir: str | None, columns: str | None) -> list[Example]:
        source, outside = memory.get(name, files[name]), config.allow_outside_audio
        with data_notes() as lines:
            examples = load_examples(source, audio_dir, columns=columns, allow_outside=outside)
        about_rows.extend(visible(f"{name}: {line}") for line in lines)
        return examples

    about_rows: list[str] = []
    rows, held_out, notes = load("data", folder, columns), [], ()
    measured = options.eval.evaluate or options.eval.eval_every or options.eval.listen_every
    splits = measured and "eval_data" not in files
    if not measured:
        files = {"data": files["data"]}
    elif not splits:
        held_out = load("eval_data", eval_folder, eval_columns)
    clips = ClipStore() if clips is None else clips
    files |= {name: Path(_memory_name(part, clips)) for name, part in (("data", rows), ("eval_data", held_out))
              if name in memory and name in files}  # fmt: skip
    if not splits:
        rows, held_out = rows[: config.limit], held_out[: config.eval_limit]
    ranks = ranks or Ranks()
    files_of_rows = [clip for row in (*rows, *held_out) for clip in row.clips]
    clips.watch(files_of_rows, ranks.from_main(clips.watch(files_of_rows) if ranks.main else None))
    if splits:
        train, held_out = hold_out(rows, config.eval_fraction, clips)
        notes = (f"no eval_data: {len(held_out)} of {len(rows)} rows are held out, all rows of a clip together",)
        if not train:
            what = f"eval_fraction {config.eval_fraction} holds out all {len(rows)} rows, which have too few clips"
            raise ConfigError([f"{what}: name eval_data, or --eval_fraction 0"])
        rows, held_out = train[: config.limit], held_out[: config.eval_limit]
    return Rows(rows, held_out, files, (*notes, *about_rows, *_system_notes([*rows, *held_out], options.prompt)))


def rendered_set(config: DataConfig) -> Mapping[str, Path]:
    """The files of the built-in set that these options name, by split, rendered on first use; none of other data."""
    return {None: builtin_questions, SPOKEN_SET: spoken_questions}.get(config.data, dict)()


def _check_memory(config: DataConfig, memory: Mapping[str, Any]) -> None:
    """Raises ConfigError where the options name rows that no program hands over."""
    if absent := [name for name in ("data", "eval_data")
                  if (getattr(config, name) or "").startswith(IN_MEMORY) and name not in memory]:  # fmt: skip
        raise ConfigError([f"{name} {getattr(config, name)!r}: these rows were in the memory of a Python program: hand "
                           "the same to GRPO, or write them to a file and name it" for name in absent])  # fmt: skip


def _system_notes(rows: Sequence[Example], config: PromptConfig) -> list[str]:
    own = [row.id for row in rows if row.system and config.system_prompt]
    what = f"{len(own)} rows ({some(own)}) have a system message of their own, which takes the place of system_prompt"
    return [visible(what)] * bool(own)


def _memory_name(rows: Sequence[Example], clips: ClipStore) -> str:
    """What a record calls rows that no file holds: how many, and a sha256 over their text, sound and columns."""
    from covo_rl.train.checkpoint.identity import rows_sha256  # torch, which is there by now

    return f"{IN_MEMORY}: {len(rows)}, sha256 {rows_sha256(rows, clips.key)}"


def question_problems(rows: Rows, config: DataConfig, longest: float | None, clips: ClipStore) -> list[str]:
    """Broken and over-long clips, duplicate ids, what training and held-out rows share, held-out rows without another
    clip to swap with; empty when all is well."""
    limit = longest if config.long_audio == "error" else None
    problems = [
        f"{name} row {problem}"
        for name, part in (("data", rows.train), ("eval_data", rows.held_out))
        for problem in row_problems(part, max_clip_seconds=limit)
    ]
    if rows.held_out and not config.allow_overlap:
        problems += [str(item) for item in overlap(rows.train, rows.held_out) if item.serious]
    sounding = [row for row in rows.held_out if row.clips]
    if sounding and not problems and len({tuple(map(clips.key, row.clips)) for row in sounding}) == 1:
        problems.append(f"held-out rows: the {len(sounding)} with audio share one clip, so that none can be asked with "
                        "another's: name eval_data with more, raise eval_fraction, or set evaluate false")  # fmt: skip
    return problems


def hold_out(
    examples: Sequence[Example], fraction: float, clips: ClipStore | None = None
) -> tuple[list[Example], list[Example]]:
    """(training rows, held-out rows): about `fraction` of the rows, all rows of a clip on the same side.

    A row's side depends on the stored bytes of its clips alone (its id where it has none that can be read): not on
    how their paths are written, on the folder they lie in, on the other rows or their order.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"eval_fraction {fraction}: must be in [0, 1)")
    train, held_out, clips = [], [], ClipStore() if clips is None else clips
    for example in examples:
        name = sound_of(example, clips).encode("utf-8", "surrogatepass")
        draw = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64
        (held_out if draw < fraction else train).append(example)
    return train, held_out


def readable_prompts(
    rows: Sequence[Example], count: int, family: PromptFamily, clips: ClipStore, config: PromptConfig
) -> list[Prompt]:
    """Prompts of the first `count` rows that can be read: rows with audio first, as others cannot show a difference in
    what is heard. Fewer where there are not so many, none where no clip can be read any more."""

    def prompt(row: Example) -> Prompt | None:
        try:
            return build_prompt(row, family, clips, config)
        except PromptError:
            return None

    prompts = map(prompt, sorted(rows, key=lambda row: not row.clips))
    return list(islice(filter(None, prompts), count))


def fit_clips(examples: Sequence[Example], max_seconds: float | None, mode: str) -> tuple[list[Example], list[str]]:
    """Rows whose clips are at most `max_seconds` long, and one line for every clip that was changed.

    `chunk` puts consecutive pieces in the clip's place, each a clip of its own, so that all of it is heard; `crop`
    keeps the first `max_seconds`; `error` changes nothing and leaves the report to `row_problems`.
    """
    if mode not in ("error", "chunk", "crop"):
        raise ValueError(f"long_audio {mode!r}: there are error, chunk, crop")
    if mode == "error" or max_seconds is None:
        return list(examples), []
    fitted, notes = [], []
    for example in examples:
        clips: list[Clip] = []
        for clip in example.clips:
            waveform, rate = decode(clip)
            # as many samples as last at most max_seconds; 0.29 * 100 is 28.999999999999996
            seconds, size = len(waveform) / rate, int(max_seconds * rate + 1e-6)
            pieces = [clip]
            if len(waveform) > size:  # the first part, or the fewest equal parts that fit
                count = math.ceil(len(waveform) / size)
                parts = [waveform[:size]] if mode == "crop" else np.array_split(waveform, count)
                pieces = [Clip(array=part.copy(), sampling_rate=rate) for part in parts]
                change = f"cut into {len(pieces)} clips" if mode == "chunk" else f"cropped to {max_seconds:g} s"
                notes.append(visible(f"row {example.id}: {clip.name}: {seconds:.2f} s long, {change}"))
            clips += pieces
        fitted.append(replace(example, clips=tuple(clips)))
    return fitted, notes
