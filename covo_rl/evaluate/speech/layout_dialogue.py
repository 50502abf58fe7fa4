"""Official files in which a spoken question is answered: URO-Bench, VStyle, VCB-Bench, VoiceBench.

URO-Bench   {basic|pro}/{NAME}/test.jsonl: id, source_wav, source_text, target_text (a text or a list; absent: the
            source_text); several rounds: num_round, dialogue [{source_wav, source_text, target_text}]
VStyle      {en|zh}/metadata.jsonl: id, ability ("category/sub"), instruct_text, instruction_audio_path?,
            response_audio_path? (the reply)
VCB-Bench   manifest.yaml or .json: part -> {kind: judge-5 or judge-yes-no, file, language?}; files of JSON lines
            with id, audio, text?, reference?, or dialogue [{audio, text?, reference?}]
VoiceBench  {subset}.jsonl: prompt, reference?, audio?, response? (the reply)
"""

from __future__ import annotations

from pathlib import Path

from covo_rl.data.read import printable
from covo_rl.evaluate.speech.reading import SetReader
from covo_rl.evaluate.speech.row_fields import RowFields
from covo_rl.evaluate.speech.rows import GivenReply, SpokenRound
from covo_rl.evaluate.speech.sets import KINDS, Subset
from covo_rl.resolve import ConfigError, read_yaml

#: kinds whose rows cannot be scored without the field
_NEEDS_REFERENCE = ("voicebench_qa", "voicebench_mcq")
#: what a VCB manifest may say of a part
_PART_KEYS = ("kind", "file", "language")


def read_uro(reader: SetReader) -> None:
    """URO-Bench, one sub-set a file. The number of a row, from 0, is its key in all official result files."""
    for path, (subset, *_) in reader.parts():
        for fields in reader.lines(path, "source_wav"):
            if KINDS[subset.kind].dialogue or fields.has("dialogue"):
                turns = fields.parts("dialogue")
                count = fields.number("num_round")
                if count is not None and turns and count != len(turns):
                    fields.wrong(f"num_round is {count:g}, dialogue has {len(turns)} rounds")
            else:
                turns = [fields]
            rounds = [_uro_round(turn) for turn in turns]
            language = fields.maybe("language") if subset.language == "multi" else None
            reader.add(fields, subset, rounds, row_id=fields.maybe("id"), language=language)


def _uro_round(fields: RowFields) -> SpokenRound:
    text = fields.text("source_text")
    is_list = isinstance(fields.values.get("target_text"), list)
    target = " / ".join(fields.texts("target_text")) if is_list else fields.maybe("target_text")
    return SpokenRound(fields.clip("source_wav"), text, text if target is None else target)


def read_vstyle(reader: SetReader) -> None:
    """VStyle, one file a language. An ability that is not among the official ones is read, and weighs nothing."""
    for path, subsets in reader.parts():
        language = subsets[0].language
        known = {subset.name: subset for subset in subsets}
        for fields in reader.lines(path, "instruction_audio_path", "response_audio_path"):
            ability = fields.text("ability")
            name = f"{language}/{ability}"
            if not fields.failed and ability.count("/") != 1:
                fields.wrong(f"ability is {printable(ability)}, not category/sub")
            category = ability.split("/")[0]
            subset = known.get(name) or Subset(name, "vstyle", language=language, groups=(language,))
            rounds = [SpokenRound(fields.maybe_clip("instruction_audio_path"), fields.text("instruct_text"))]
            reply = fields.maybe_clip("response_audio_path")
            row = reader.add(fields, subset, rounds, row_id=fields.text("id"), columns={"category": category})
            reader.keep_reply(row, GivenReply(audio=tuple(clip.path for clip in reply)))


def read_voicebench(reader: SetReader) -> None:
    """VoiceBench, in the form of its own result files. The text of the question is the row's; audio may be left out."""
    for path, (subset, *_) in reader.parts():
        for fields in reader.lines(path, "audio"):
            reference = fields.maybe("reference")
            if reference is None and subset.kind in _NEEDS_REFERENCE and not fields.failed:
                fields.wrong("no reference")
            if subset.kind == "voicebench_mcq" and not fields.failed and reference not in tuple("ABCD"):
                fields.wrong(f"reference is {printable(reference)}; it is the letter of an option, A to D")
            rounds = [SpokenRound(fields.maybe_clip("audio"), fields.text("prompt"), reference)]
            row = reader.add(fields, subset, rounds, row_id=fields.maybe("id"))
            reader.keep_reply(row, GivenReply(texts=(fields.maybe("response"),)))


# -- VCB-Bench -------------------------------------------------------------------------------------------------------


def read_vcb(reader: SetReader) -> None:
    """VCB-Bench by a manifest: its repository is not read here, so the user says how each part is judged."""
    names = ("manifest.yaml", "manifest.yml", "manifest.json")
    places = [reader.root / name for name in names] if reader.root.is_dir() else [reader.root]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        reader.problems.append(f"{reader.root}: no {' or '.join(names)}. {reader.speech_set.how_to_get}")
        return
    for name, file, subset in _manifest_parts(reader, path):
        if not subset.is_asked(reader.wanted):
            continue
        if not file.is_file():
            reader.problems.append(f"{path}: {name}: no such file {file}")
            continue
        reader.subsets[name] = subset
        for fields in reader.lines(file, "audio"):
            turns = fields.parts("dialogue") if fields.has("dialogue") else [fields]
            rounds = [SpokenRound(t.clip("audio"), t.maybe("text"), t.maybe("reference")) for t in turns]
            if subset.kind == "judge_yes_no" and not fields.failed and any(r.reference is None for r in rounds):
                fields.wrong("no reference, which judge-yes-no compares with")
            reader.add(fields, subset, rounds, row_id=fields.text("id"))


def _manifest_parts(reader: SetReader, path: Path) -> list[tuple[str, Path, Subset]]:
    """(name, file, sub-set) of every part of a manifest in which nothing is wrong."""
    try:
        content = read_yaml(path)
    except ConfigError as error:
        reader.problems += error.problems
        return []
    reader.files.append(path)
    published = {subset.name: subset.published for subset in reader.speech_set.subsets}
    parts = []
    for name, value in content.items():
        fields = RowFields(reader, value, f"{path}: {name}")
        kind = fields.text("kind").replace("-", "_")
        if not fields.failed and kind not in ("judge_5", "judge_yes_no"):
            fields.wrong(f"kind is {printable(fields.values['kind'])}; choose judge-5 or judge-yes-no")
        if extra := [key for key in fields.values if key not in _PART_KEYS]:
            fields.wrong(f"unknown key {', '.join(map(str, extra))}; allowed are {', '.join(_PART_KEYS)}")
        file, language = fields.text("file"), fields.maybe("language") or ("en" if name.endswith("-En") else "zh")
        if not fields.failed:
            subset = Subset(name, kind, language=language, published=published.get(name, {}))
            parts.append((name, path.parent / file, subset))
    return parts
