"""The same words in a neutral synthetic voice, beside scores that an audio judge gives: how much of them is wording.

VStyle's authors warn that their judge rewards what is said more than how; `--neutral-voice command:PROGRAM` says each
reply's text again (a cascade's voice: {"id", "text", "language", "path"} -> the wav file, {"id"}), and judges that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from covo_rl.evaluate.cascade import spoken_file
from covo_rl.evaluate.speech.inputs import SpeechInputs
from covo_rl.evaluate.speech.rows import GivenReply, SpeechItem
from covo_rl.evaluate.speech.sets import KINDS, Subset
from covo_rl.rewards.program import Program

Score = Callable[[SpeechInputs], tuple[dict[str, Any], Any]]


def is_judged_by_ear(row: SpeechItem | Subset) -> bool:
    """Whether an audio judge scores it."""
    return "--audio-judge" in KINDS[row.kind].needs


def add_neutral_voice(
    report: dict[str, Any], records: Sequence[Mapping[str, Any]], inputs: SpeechInputs, voice: Program, folder: Path,
    score: Score,
) -> None:  # fmt: skip
    """Put `neutral_voice` into the blocks of sub-sets that are judged by ear, and into groups of
    nothing else. `records` are those of scores.jsonl, whose texts are said again; files lie in `folder`, by content, so
    that none is said twice."""
    rows = {row.name: row for row in inputs.rows if is_judged_by_ear(row)}
    texts = {record["id"]: next((text for text in (*record["written"][:1], *record["said"][:1]) if text), None)
             for record in records if record["id"] in rows}  # fmt: skip
    files = _said_again({name: (text, rows[name].language) for name, text in texts.items() if text}, voice, folder)
    replies = {name: GivenReply(audio=(str(file),)) for name, file in files.items()}
    subsets = {name: subset for name, subset in inputs.subsets.items() if is_judged_by_ear(subset)}
    neutral, _ = score(replace(inputs, rows=tuple(rows.values()), subsets=subsets, replies=replies))
    for part in ("subsets", "groups"):
        for name, block in neutral[part].items():
            ours = report[part].get(name, {})
            if block["score"] is not None and ours and block.get("sets") == ours.get("sets"):
                kept = ("score", "ci95", "n", "missing")
                ours["neutral_voice"] = {key: block[key] for key in kept if key in block}
    report["engines"]["neutral_voice"] = {
        "engine": f"command:{voice.command}", "version": voice.version, **voice.faults,
    }  # fmt: skip


def _said_again(wanted: Mapping[str, tuple[str, str]], voice: Program, folder: Path) -> dict[str, Path]:
    """Row's name -> file; without the rows for which the voice gave none, which are missing."""
    folder.mkdir(parents=True, exist_ok=True)

    def file_of(text: str, language: str) -> Path:
        content = "\n".join((voice.version, language, text))
        return folder / f"{hashlib.sha256(content.encode('utf-8', 'replace')).hexdigest()[:24]}.wav"

    def is_there(file: Path) -> bool:
        try:
            return bool(spoken_file(file))
        except ValueError:
            return False

    files = {name: file_of(*what) for name, what in wanted.items()}
    lines = {
        file: {"id": file.stem, "text": wanted[name][0], "language": wanted[name][1], "path": str(file.absolute())}
        for name, file in files.items() if not is_there(file)
    }  # fmt: skip
    paths = {line["id"]: file for file, line in lines.items()}
    voice.ask(list(lines.values()), lambda answer: spoken_file(paths[answer["id"]]))
    return {name: file for name, file in files.items() if file not in lines or is_there(file)}
