"""Replies of a model to a set of speech, by the same path as any evaluation: text, and sound where it can speak.

    one question, one reply        the model itself, or a cascade
    several rounds                 rounds.py
    when does it speak?            live.py, in a session
    how likely is a text?          endings.py

A reply's codes are heard with `--voice FOLDER` (the decoder that makes sound of them), a cascade's voice by itself;
without either a spoken set is scored by the text alone, which its report says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from covo_rl.evaluate.inputs import Inputs
from covo_rl.evaluate.records import Record
from covo_rl.evaluate.runner import answer_rows
from covo_rl.evaluate.sets import EvalSet, PromptStyle
from covo_rl.evaluate.speech.endings import EndingScorer, ending_replies, has_written_endings, is_likelihood
from covo_rl.evaluate.speech.hearing import spoken_language
from covo_rl.evaluate.speech.inputs import SpeechInputs
from covo_rl.evaluate.speech.live import LiveExaminer, is_live, live_notes, live_replies
from covo_rl.evaluate.speech.rounds import RoundsAnswerer, has_rounds, question_of, round_records
from covo_rl.evaluate.speech.rows import GivenReply, SpeechItem, round_count
from covo_rl.evaluate.speech.sets import KINDS
from covo_rl.evaluate.speech.voiced import sound_files, voiced_codes
from covo_rl.prompt import parse
from covo_rl.types import Example

if TYPE_CHECKING:
    from covo_rl.evaluate.answer import PolicyAnswerer
    from covo_rl.evaluate.runner import Request
    from covo_rl.train.ranks import Ranks

#: the question is the row's own, with nothing of ours around it
AS_WRITTEN = PromptStyle("{question}", "the set's own words")
#: task kind -> why its score does not belong beside published ones, in a word and in a sentence
TOLD = {
    "tts": ("own voice", "texts were said in the voice of the decoder or cascade: that of the prompt is not imitated"),
    "tsc": ("chat format", "log-probs are of the ending as a reply to the prompt, in the model's chat format"),
}


def not_generated(row: SpeechItem, *, speaks: bool = True, scores: bool = True, one_round: bool = False) -> str | None:
    """Why a model is not asked this row here; None where it is. `speaks`: its replies are heard; `scores`: it gives
    log-probs; `one_round`: it cannot be told what was said before."""
    if KINDS[row.kind].likelihood and not (scores and has_written_endings(row)):
        return "it is scored by log-probs of audio codes: give --predictions" if scores else "no log-probs are had here"
    if row.kind == "tts" and not speaks:
        return "its sound alone is scored: give --voice, or --predictions"
    if one_round and round_count(row) > 1:
        return "it has several rounds, and here one question is asked at a time: use covo-rl eval without --use-vllm"
    return None


def answerable(
    inputs: SpeechInputs, *, speaks: bool = True, scores: bool = True, one_round: bool = False
) -> tuple[SpeechInputs, list[str]]:
    """The rows that a model can be asked here, and what is said of them and of the others."""
    left_out: dict[str, str] = {}
    for row in inputs.rows:
        if why := not_generated(row, speaks=speaks, scores=scores, one_round=one_round):
            left_out[row.subset] = why
    rows = tuple(row for row in inputs.rows if row.subset not in left_out)
    subsets = {name: subset for name, subset in inputs.subsets.items() if name not in left_out}
    notes = [f"{name} was not asked, as {why}" for name, why in left_out.items()]
    told = {name: TOLD[subset.kind] for name, subset in subsets.items() if subset.kind in TOLD}
    notes += [f"{name}: {sentence}" for name, (_, sentence) in told.items()]
    return replace(inputs, rows=rows, subsets=subsets, caveats={name: word for name, (word, _) in told.items()}), notes


def wording(inputs: SpeechInputs) -> PromptStyle | None:
    """The set's own words; None, the wording that the model was trained with, where its reasoning is scored."""
    return None if inputs.rows and all(row.kind == "mmar_rubrics" for row in inputs.rows) else AS_WRITTEN


def letter_inputs(inputs: SpeechInputs) -> Inputs:
    """The rows as those of any evaluation, without a key. Of synthesis a model is given the text alone. A row's column
    `language` is told to the parts of a cascade: what is to be translated is in another than its translation."""
    eval_set = EvalSet(inputs.speech_set.name, inputs.speech_set.title, has_answers=False)
    reasons = wording(inputs) is None
    rows = tuple(
        Example(
            row.name, () if row.kind == "tts" else row.clips, (row.text or "") if reasons else question_of(row),
            row.choices if reasons else (),
            columns={"language": "" if row.kind == "translation" else spoken_language(row)},
        )
        for row in inputs.rows
    )  # fmt: skip
    return Inputs(eval_set, inputs.data, rows, meta=dict(inputs.meta))


def generate_replies(
    request: Request, inputs: SpeechInputs, settings: Mapping[str, Any], ranks: Ranks,
    answerer: PolicyAnswerer | None = None,
) -> tuple[dict[str, GivenReply], list[str]] | None:  # fmt: skip
    """(replies by row's name, notes) on rank 0, None on others; resumable. The folder is `owned`, and claimed here."""
    style = wording(inputs)
    if answerer is not None:
        answerer = replace(answerer, rollout_config=request.rollout_config(), style=style)
    letters = letter_inputs(inputs)
    asks = _asker(request, inputs, letters.eval_set)
    answers = answer_rows(request, letters, settings, ("real",), ranks, style=style, answerer=answerer, asks=asks)
    if answers is None or request.output is None:
        return None
    records = answers["real"]
    if is_live(inputs):
        return live_replies(records, request.voice, request.output), live_notes(records)
    if is_likelihood(inputs):
        return ending_replies(records), []
    rounds = [one for record in records for one in round_records(record)]
    sounds = spoken_records(rounds, request.voice, request.output) if request.voice else {}
    return given_replies(records, request.output, sounds), []


def given_replies(
    records: Iterable[Record], folder: Path, sounds: Mapping[str, str] = MappingProxyType({})
) -> dict[str, GivenReply]:
    """By row's name; `sounds` are wav files by the name of a round, a cascade's own lie in `folder`."""
    return {record["id"]: _given_reply(record, folder, sounds) for record in records}


def _asker(request: Request, inputs: SpeechInputs, eval_set: EvalSet) -> Callable[[Any], Any] | None:
    """Makes of a loaded model what asks it rows that want something else than one reply to one question."""
    if is_live(inputs):
        return partial(LiveExaminer.of, request=request)
    rows = {row.name: row for row in inputs.rows}
    if is_likelihood(inputs):
        return partial(EndingScorer, rows=rows)
    return partial(RoundsAnswerer, rows=rows, eval_set=eval_set, request=request) if has_rounds(inputs) else None


def _given_reply(record: Record, folder: Path, sounds: Mapping[str, str]) -> GivenReply:
    """The first sample of each round: what stands in its answer block, else all of it."""
    rounds = round_records(record)
    texts = tuple(one["answers"][0] or one["replies"][0] for one in rounds)
    audio = tuple(sounds.get(one["id"]) or _own_sound(one, folder) for one in rounds)
    return GivenReply(texts=texts, audio=audio, thinking=parse(record["replies"][0]).think)


def _own_sound(record: Record, folder: Path) -> str | None:
    own = record.get("reply_audio")
    return str(folder / own[0]) if own else None


def spoken_records(records: Iterable[Record], decoder: str, folder: Path) -> dict[str, str]:
    """Id -> the wav file of a record's codes; a reply without codes has none. Raises as `voiced_codes`."""
    codes = {record["id"]: record["completion_codes"][0] for record in records if record.get("completion_codes")}
    return sound_files(voiced_codes(codes, decoder), folder)
