"""Official files of what a model finds more probable: ZeroSpeech 2021's pairs, and the spoken topic StoryCloze.

sWUGGY, sBLIMP   {lexical|syntactic}/dev/gold.csv: id (of the pair), filename, voice, correct (1 or 0), frequency?
                 ("oov": not in the vocabulary); wavs FILENAME.wav beside it
tSC              tsc.jsonl: id, prompt_audio, prompt_text, right_audio, wrong_audio, right_text, wrong_text; the
                 published set is audio in folders, which one writes into such rows
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from covo_rl.evaluate.speech.reading import SetReader
from covo_rl.evaluate.speech.row_fields import RowFields
from covo_rl.evaluate.speech.rows import SpokenRound
from covo_rl.evaluate.speech.sets import Subset
from covo_rl.types import Clip

_AUDIO = ("prompt_audio", "right_audio", "wrong_audio")


def read_spoken_lm(reader: SetReader) -> None:
    """Pairs, a row a pair and voice (round 0 is the right one), and stories, a row a story and modality."""
    for path, subsets in reader.parts():
        if subsets[0].kind == "pairs":
            _read_pairs(reader, path, subsets[0])
            continue
        stories = list(reader.lines(path, *_AUDIO))
        for subset in subsets:
            names = _story_fields(subset)
            if not any(fields.has(name) for fields in stories for name in names):
                reader.notes.append(f"{path}: no {', '.join(names)} in any row, so {subset.name} has none")
                continue
            for fields in stories:
                _read_story(reader, fields, subset)


def _read_pairs(reader: SetReader, path: Path, subset: Subset) -> None:
    pairs: dict[tuple[str, str], list[tuple[RowFields, str]]] = defaultdict(list)
    for fields in reader.lines(path, "filename"):
        correct = fields.text("correct")
        if not fields.failed and correct not in ("0", "1"):
            fields.wrong(f"correct is {correct!r}, not 1 or 0")
        pairs[fields.text("id"), fields.text("voice")].append((fields, correct))
    for number, ((pair, voice), members) in enumerate(pairs.items()):
        first = members[0][0]
        if any(fields.failed for fields, _ in members):
            continue
        if sorted(correct for _, correct in members) != ["0", "1"]:
            count = sum(correct == "1" for _, correct in members)
            first.wrong(f"pair {pair} of voice {voice} has {len(members)} rows, {count} of them correct; one of two is")
            continue
        right, wrong = sorted(members, key=lambda member: member[1], reverse=True)
        rounds = [SpokenRound(_sound(fields), fields.maybe("word") or fields.maybe("transcription"))
                  for fields, _ in (right, wrong)]  # fmt: skip
        frequency = right[0].maybe("frequency")
        columns = {"pair": pair, "voice": voice, "in_vocabulary": None if frequency is None else frequency != "oov"}
        row = RowFields(reader, columns, first.place, number)
        if not right[0].failed and not wrong[0].failed:
            reader.add(row, subset, rounds, row_id=f"{pair}/{voice}")


def _sound(fields: RowFields) -> tuple[Clip, ...]:
    name = fields.text("filename")
    return fields.clip("filename", name if name.endswith(".wav") else f"{name}.wav")


def _story_fields(subset: Subset) -> list[str]:
    """The fields of a modality: `tsc-a2t` hears the prompt and reads the endings."""
    prompt, ending = ("audio" if letter == "a" else "text" for letter in subset.name.removeprefix("tsc-").split("2"))
    return [f"prompt_{prompt}", f"right_{ending}", f"wrong_{ending}"]


def _read_story(reader: SetReader, whole: RowFields, subset: Subset) -> None:
    fields = RowFields(reader, whole.values, whole.place, whole.index)
    rounds = [
        SpokenRound(fields.clip(name)) if name in _AUDIO else SpokenRound(text=fields.text(name))
        for name in _story_fields(subset)
    ]
    reader.add(fields, subset, rounds, row_id=fields.text("id"))
