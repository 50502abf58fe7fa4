"""Official files of what is said, is to be said, or is to be translated: recognition, synthesis, CoVoST 2.

recognition   JSON lines: id, audio, text, language (en or zh), subset? (else the file's name)
Seed-TTS-eval {en|zh}/meta.lst, zh/hardcase.lst: utterance|prompt text|prompt wav|text to say[|wav], wavs from the
              folder of the list
CoVoST 2      covost_v2.{en_zh-CN|zh-CN_en}.tsv: path, sentence, translation, split? (test rows are read); audio in
              clips/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from covo_rl.data.read import DataError, read_text
from covo_rl.evaluate.speech.reading import SetReader
from covo_rl.evaluate.speech.row_fields import RowFields
from covo_rl.evaluate.speech.rows import SpokenRound
from covo_rl.evaluate.speech.sets import Subset

_LANGUAGES = ("en", "zh")
_LIST = ("utterance", "prompt_text", "prompt_wav", "text", "wav")


def read_asr(reader: SetReader) -> None:
    """Recordings with their wording; a sub-set that is not among the known ones is one's own."""
    files = [reader.root] if reader.root.is_file() else sorted(reader.root.glob("*.jsonl"))
    if not files:
        reader.problems.append(f"--data {reader.root}: no .jsonl in it. {reader.speech_set.how_to_get}")
    for path in files:
        for fields in reader.lines(path, "audio"):
            name = fields.maybe("subset") or path.stem
            known = reader.subsets.get(name)
            language = fields.text("language")
            if not fields.failed and language not in _LANGUAGES:
                fields.wrong(f"language is {language!r}; choose one of {', '.join(_LANGUAGES)}")
            if not fields.failed and known is not None and known.language != language:
                fields.wrong(f"language is {language!r}, other rows of {name} are {known.language!r}")
            subset = known or Subset(name, "asr", language=language)
            rounds = [SpokenRound(fields.clip("audio"), None, fields.text("text"))]
            reader.add(fields, subset, rounds, row_id=fields.text("id"))


def read_seed_tts(reader: SetReader) -> None:
    """Seed-TTS-eval: a voice to imitate, and what it shall say."""
    for path, (subset, *_) in reader.parts():
        rows = [dict(zip(_LIST, line.split("|"), strict=False)) | {"fields": len(line.split("|"))}
                for line in _text_lines(reader, path)]  # fmt: skip
        reader.audio_from(path.parent, [str(row["prompt_wav"]) for row in rows if "prompt_wav" in row])
        for number, row in enumerate(rows):
            count = row.pop("fields")
            fields = RowFields(reader, row, f"{path}, line {number + 1}", number)
            if count not in (4, 5):
                fields.wrong(f"{count} fields between |, not utterance|prompt text|prompt wav|text[|wav]")
                continue
            rounds = [SpokenRound(fields.clip("prompt_wav"), fields.text("prompt_text"), fields.text("text"))]
            reader.add(fields, subset, rounds, row_id=fields.text("utterance"))


def read_covost(reader: SetReader) -> None:
    """CoVoST 2: tables whose cells are not quoted. Rows of other splits than test are counted and left out."""
    for path, (subset, *_) in reader.parts():
        head, *lines = [line.split("\t") for line in _text_lines(reader, path)] or [[]]
        if absent := [name for name in ("path", "sentence", "translation") if name not in head]:
            reader.problems.append(f"{path}: no column {', '.join(absent)}; its columns are {', '.join(head)}")
            continue
        column = head.index("path")
        reader.audio_from(path.parent, [f"clips/{cells[column]}" for cells in lines if column < len(cells)])
        others = 0
        for number, cells in enumerate(lines):
            fields = RowFields(reader, dict(zip(head, cells, strict=False)), f"{path}, line {number + 2}", number)
            if len(cells) != len(head):
                fields.wrong(f"{len(cells)} cells, the header has {len(head)}")
                continue
            if fields.values.get("split", "test") != "test":
                others += 1
                continue
            sound = fields.text("path")
            clip = fields.clip("path", f"clips/{sound}", sound)
            rounds = [SpokenRound(clip, fields.text("sentence"), fields.text("translation"))]
            reader.add(fields, subset, rounds, row_id=Path(sound).stem)
        if others:
            reader.notes.append(f"{path}: {others} rows of other splits than test are left out")


def _text_lines(reader: SetReader, path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without those that are blank at its end."""
    reader.files.append(path)
    try:
        text = read_text(path, "lists are read as UTF-8")
    except DataError as error:
        reader.problems.append(str(error))
        return
    if not text.strip():
        reader.problems.append(f"{path}: no rows in it")
    yield from text.rstrip().split("\n") if text.strip() else ()
