"""What the judges of a benchmark are asked about its rows, and what they say.

JUDGED[kind]                                   the prompt's name, how many votes, how a reply is read
judge_questions(row, said, prompt)             the questions about a row
ask_judges(inputs, said, engines, counts)      id -> Verdicts, of all that the engines which are there can judge
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from covo_rl.evaluate.sets import token_set_match
from covo_rl.evaluate.speech.choices import air_pair
from covo_rl.evaluate.speech.engines import SpeechEngines
from covo_rl.evaluate.speech.hearing import Said, sound_id, spoken_language
from covo_rl.evaluate.speech.inputs import SpeechInputs
from covo_rl.evaluate.speech.judge_prompts import JudgePrompt
from covo_rl.evaluate.speech.judged import (
    mmau_pro_rating,
    read_rating,
    read_yes_no,
    rubric_points,
    voicebench_rating,
    vstyle_score,
)
from covo_rl.evaluate.speech.rows import SpeechItem
from covo_rl.evaluate.speech.timing import took_turn
from covo_rl.evaluate.speech.votes import (
    OFFICIAL_SAMPLING,
    OFFICIAL_VOTES,
    JudgeCounts,
    JudgeQuestion,
    Verdicts,
    ask_votes,
)
from covo_rl.types import Clip

RUBRIC_VOTES = 5  # of MMAR-Rubrics, of which the lowest and the highest are dropped
RUBRIC_SAMPLING = {"temperature": 0.0, "max_tokens": 2048}
BEHAVIOURS = ("respond", "resume", "uncertain", "unknown")
SWAPPED = "swapped"


@dataclass(frozen=True)
class JudgeTask:
    """How one kind is judged. `prompt` is the wording's name, before a VStyle category; `read` the rule of a reply."""

    prompt: str
    read: Callable[[str], Any]
    votes: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    hears: bool = False

    @property
    def engine(self) -> str:
        return "audio_judge" if self.hears else "judge"


def _asked_thrice(prompt: str, read: Callable[[str], Any] = read_rating) -> JudgeTask:
    return JudgeTask(prompt, read, OFFICIAL_VOTES, OFFICIAL_SAMPLING)


def _yes_no(reply: str) -> str | None:
    """VoiceBench's, whatever the case."""
    return reply if reply.lower() in ("yes", "no") else None


def _behaviour(reply: str) -> str | None:
    return word if (word := reply.strip().lower()) in BEHAVIOURS else None


#: task kind -> how it is judged
JUDGED: dict[str, JudgeTask] = {
    **{f"uro_{mode}": _asked_thrice(f"uro-{mode}") for mode in ("open", "gs", "ue", "sf", "ml", "multi", "sa")},
    "uro_semi_open": _asked_thrice("uro-semi-open"),
    "uro_qa": _asked_thrice("uro-qa", read_yes_no),
    "uro_srt": JudgeTask("uro-srt", read_rating, hears=True),
    "vstyle": JudgeTask("vstyle", vstyle_score, hears=True),
    "judge_5": JudgeTask("vcb-judge-5", read_rating),
    "judge_yes_no": JudgeTask("vcb-judge-yes-no", read_yes_no),
    "air_chat": JudgeTask("air-chat", air_pair),
    "voicebench_open": _asked_thrice("voicebench-open", voicebench_rating),
    "voicebench_qa": _asked_thrice("voicebench-qa", _yes_no),
    "mmau_pro_open": JudgeTask("mmau-pro-open", lambda reply: mmau_pro_rating(reply).ours),
    "mmar_rubrics": JudgeTask("mmar-rubric", str, RUBRIC_VOTES, RUBRIC_SAMPLING),  # read by the row's own rubric
    "fdb_interruption": JudgeTask("fdb-relevance", partial(read_rating, low=0)),
    "fdb_overlap": JudgeTask("fdb-behaviour", _behaviour),
}


def prompt_name(row: SpeechItem) -> str:
    """The name of the wording that a row is judged by."""
    name = JUDGED[row.kind].prompt
    return f"{name}-{row.columns.get('category')}" if row.kind == "vstyle" else name


def ask_judges(
    inputs: SpeechInputs, said: Mapping[str, Sequence[Said]], engines: SpeechEngines, counts: dict[str, JudgeCounts]
) -> tuple[dict[str, Verdicts], dict[str, dict[str, Any]]]:
    """(question's id -> verdicts, sub-set -> the wordings that its rows were judged by); a kind whose judge is not
    there is left out. `counts` are filled, by judge."""
    by_kind: dict[str, list[SpeechItem]] = defaultdict(list)
    for row in inputs.rows:
        if row.kind in JUDGED:
            by_kind[row.kind].append(row)
    verdicts: dict[str, Verdicts] = {}
    wordings: dict[str, dict[str, Any]] = defaultdict(dict)
    for kind, rows in by_kind.items():
        task = JUDGED[kind]
        if (judge := getattr(engines, task.engine)) is None:
            continue
        questions: dict[str, JudgeQuestion] = {}
        prompts: dict[tuple[str, str], JudgePrompt | None] = {}
        for row in rows:
            name = prompt_name(row), spoken_language(row)
            if name not in prompts:
                prompts[name] = _wording(engines, *name)
            if (prompt := prompts[name]) is None:
                continue
            asked = {question.id: question for question in judge_questions(row, said[row.name], prompt)}
            questions |= asked
            if asked:
                wordings[row.subset][prompt.name] = prompt.record()
        answers = ask_votes(
            judge, list(questions.values()), task.read, votes=task.votes, sampling=task.sampling,
            counts=counts.setdefault(task.engine, JudgeCounts()),
        )  # fmt: skip
        verdicts |= zip(questions, answers, strict=True)
    return verdicts, dict(wordings)


def _wording(engines: SpeechEngines, name: str, language: str) -> JudgePrompt | None:
    """None for an ability that VStyle does not have, which weighs nothing."""
    try:
        return engines.prompt(name, language)
    except FileNotFoundError:
        return None


def judge_questions(row: SpeechItem, said: Sequence[Said], prompt: JudgePrompt) -> Iterator[JudgeQuestion]:
    """Those about one row: one a round, two of AIR-Bench's chat; none about a reply that is not there, is empty, or
    that its rule has settled."""
    task = JUDGED[row.kind]
    for place, one in enumerate(said):
        if not _is_judged(row, one):
            continue
        fields = _fields(row, said, place)
        clips = _clips(row, one) if task.hears else ()
        if row.kind == "air_chat":
            reply, reference = fields["reply"], fields["reference"]
            orders = (("", reference, reply), (SWAPPED, reply, reference))
            for part, first, second in orders:
                filled = prompt.fill(**{**fields, "first": first, "second": second})
                yield JudgeQuestion(sound_id(row, place, part), filled)
        else:
            read = partial(rubric_points, rubric=row.columns["rubric"]) if row.kind == "mmar_rubrics" else None
            yield JudgeQuestion(sound_id(row, place), prompt.fill(**fields), clips, read)


def _is_judged(row: SpeechItem, one: Said) -> bool:
    if JUDGED[row.kind].hears:
        return one.audio is not None
    if one.text is None or (row.kind.startswith(("uro_", "judge_")) and one.text in ("", " ")):
        return False
    if row.kind == "mmar_rubrics":
        return is_answer_right(row, one)
    if row.kind == "fdb_interruption":
        return bool(one.words) and _is_turn(one)
    return row.kind != "fdb_overlap" or _overlap_texts(one) is not None


def is_answer_right(row: SpeechItem, one: Said) -> bool:
    """MMAR's own matcher."""
    return token_set_match(one.text, row.choices, row.reference or "") is True


def _is_turn(one: Said) -> bool:
    words = [{"timestamp": [word.start, word.end]} for word in one.words or ()]
    return took_turn(words, open_end=True)


def _overlap_texts(one: Said) -> tuple[str, str, str] | None:
    """(what the model says before, what is heard then, what it says after) of v1.5; the user's side is heard again
    where its first word after the model's first begins. None where it is not."""
    if not one.words or one.user_words is None:
        return None
    begun = min(word.start for word in one.words)
    if not (heard := [word for word in one.user_words if word.start > begun]):
        return None
    split = min(word.start for word in heard)
    before, after = ([word for word in one.words if (word.start < split) == early] for early in (True, False))
    first, second, third = (" ".join(word.text.strip() for word in words) for words in (before, heard, after))
    return first, second, third


def _fields(row: SpeechItem, said: Sequence[Said], place: int) -> dict[str, str]:
    """What a wording can be filled with; a name that a row has nothing for says so."""
    turn, one, columns = row.rounds[place], said[place], row.columns
    earlier = [f"User: {row.rounds[i].text or '(spoken)'}\nAssistant: {said[i].text or '(silent)'}"
               for i in range(place)]  # fmt: skip
    if row.kind == "fdb_overlap":
        before, heard, after = _overlap_texts(one) or ("", "", "")
        return {"before": before or "(silent)", "question": heard, "reply": after or "(silent)"}
    return {
        "question": turn.text or "(spoken, of which there is no transcript)",
        "reference": turn.reference or "none",
        "reply": f"{one.thinking or ''} The answer is {one.text}." if row.kind == "mmar_rubrics" else one.text or "",
        "dialogue": "\n".join(earlier) or "none",
        "emotion": str(columns.get("emotion") or "not given"),
        "instruction_type": str(columns.get("ability") or "").rpartition("/")[2],
        "input_instruction": turn.text or "",
        "facts": _text(columns.get("meta_info")),
        "context": turn.reference or "none",
        "rubric": _criteria(columns.get("rubric", ())),
        "ideal": _text(columns.get("thinking")),
    }


def _criteria(rubric: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"- {one['name']} (score {_text(one['choices'])}): {one['scoring_point']}" for one in rubric)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _clips(row: SpeechItem, one: Said) -> tuple[Clip, ...]:
    """The instruction's, if there is one, before the reply's."""
    assert one.audio is not None
    return (*(row.clips if row.kind == "vstyle" else ()), Clip(path=one.audio))
