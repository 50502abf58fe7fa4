"""What a speech set is: sub-sets, each of one task kind; what is spoken and heard there, and what has been published.

A set of `covo_rl.evaluate.sets` is choices and a letter. Here a reply may be audio, a judge may score it, and one name
stands for several files. The sets are the files in eval_sets/; their data, judge prompts and replies are the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from covo_rl.evaluate.sets import SetFacts

if TYPE_CHECKING:
    from covo_rl.evaluate.speech.reading import SetReader


@dataclass(frozen=True)
class TaskKind:
    """How a sub-set is scored: `task` names the scorer of its rows.

    `needs`: without these engines it has no score; `also`: with them it has more figures.
    `rule` says what our version of the official rule was checked against: rows of the official script (`fixture`), rows
    of an own implementation of the written rule (`derived`), cases worked by hand (`worked`), nothing (`unverified`).
    `--transcriber` is not needed where the replies come with `asr_text`, `words` or the turns of a session.
    """

    task: str
    score: str
    needs: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    rule: str = "worked"
    #: a reply answers each round of a row on its own
    dialogue: bool = False
    #: a row is scored by log-probs of its candidates, without a reply
    likelihood: bool = False
    higher_is_better: bool = True


_JUDGED = ("--transcriber", "--judge")
_SPOKEN = ("--scorer-model utmos",)
_ONE_TO_FIVE = TaskKind("rating", "judge 1-5, mean x 20", _JUDGED, _SPOKEN)
_DIALOGUE = TaskKind("rating", "judge 1-5 of a dialogue, mean x 20", _JUDGED, _SPOKEN, dialogue=True)
_MTR = TaskKind("mtr_turns", "success, latency, frequency", ("--transcriber",), rule="fixture")
#: task kind -> how it is scored
KINDS: dict[str, TaskKind] = {
    "uro_open": _ONE_TO_FIVE,
    "uro_semi_open": TaskKind("rating", "judge 1-5 with the reference, mean x 20", _JUDGED, _SPOKEN),
    "uro_qa": TaskKind("yes_no", "judge Yes/No with the reference, share of Yes x 100", _JUDGED, _SPOKEN),
    "uro_wer": TaskKind("repeat", "share of replies with WER <= 0.5, times 1 - their WER, x 100", ("--transcriber",),
                        _SPOKEN, "fixture"),
    "uro_ge": TaskKind("emotion", "P(emotion) x (1 - min(WER, 1)) x 100", ("--transcriber", "--scorer-model emotion"),
                       _SPOKEN, "fixture"),
    "uro_gs": _ONE_TO_FIVE,
    "uro_ue": _ONE_TO_FIVE,
    "uro_sf": _ONE_TO_FIVE,
    "uro_ml": _ONE_TO_FIVE,
    "uro_multi": _DIALOGUE,
    "uro_sa": _DIALOGUE,
    "uro_srt": TaskKind("srt", "audio judge 1-5, mean x 20", ("--audio-judge",), _SPOKEN),
    "vstyle": TaskKind("style", "audio judge 1-5, mean", ("--audio-judge",), rule="fixture"),
    "fdb_pause": TaskKind("take_over", "share of pauses in which it took the turn", ("--transcriber",), rule="derived",
                          higher_is_better=False),
    "fdb_turn_taking": TaskKind("take_over", "share of turns taken; latency", ("--transcriber",), rule="derived"),
    "fdb_backchannel": TaskKind("backchannel", "share of turns taken; back-channels a second; JSD",
                                ("--transcriber", "--scorer-model vad"), rule="derived", higher_is_better=False),
    "fdb_interruption": TaskKind("take_over", "share of turns taken; latency; judge 0-5", ("--transcriber",),
                                 ("--judge",), "derived"),
    "fdb_overlap": TaskKind("overlap", "response and stop latency; behaviour", ("--scorer-model vad",),
                            ("--transcriber", "--judge"), "derived", higher_is_better=False),
    "mtr_turn": _MTR,
    "mtr_interruption": _MTR,
    "mtr_pause": _MTR,
    "mtr_background": _MTR,
    "judge_5": TaskKind("rating", "judge 1-5, mean x 20", ("--judge",), ("--transcriber",), "unverified",
                        dialogue=True),
    "judge_yes_no": TaskKind("yes_no", "judge Yes/No, share of Yes x 100", ("--judge",), ("--transcriber",),
                             "unverified", dialogue=True),
    "air_foundation": TaskKind("air_choice", "letter, share right x 100", rule="fixture"),
    "air_chat": TaskKind("air_chat", "judge 1-10 against a reference reply, both orders", ("--judge",), rule="fixture"),
    "voicebench_open": TaskKind("voicebench_open", "judge 1-5, mean", ("--judge",), rule="fixture"),
    "voicebench_qa": TaskKind("voicebench_qa", "judge yes/no, majority of three x 100", ("--judge",), rule="fixture"),
    "voicebench_mcq": TaskKind("mcq", "letter, share right x 100", rule="fixture"),
    "voicebench_harm": TaskKind("refusal", "share of refusals x 100", rule="fixture"),
    "asr": TaskKind("asr", "corpus WER (en) or CER (zh) x 100", higher_is_better=False),
    "tts": TaskKind("tts", "mean WER (en) or CER (zh) x 100", ("--transcriber",), _SPOKEN, "derived",
                    higher_is_better=False),
    "pairs": TaskKind("likelihood", "right candidate more probable, x 100", likelihood=True),
    "tsc": TaskKind("likelihood", "right ending more probable, x 100", likelihood=True),
    "translation": TaskKind("translation", "BLEU (sacrebleu)", rule="unverified"),
    "mmau_pro_closed": TaskKind("closed", "nearest option by embedding, and strict match, x 100", (),
                                ("--scorer-model embed",)),
    "mmau_pro_open": TaskKind("open", "judge 1-5, mean x 20", ("--judge",)),
    "mmau_pro_instruction": TaskKind("instruction", "rule checks, share met x 100"),
    "mmar_rubrics": TaskKind("rubric", "0 where the answer is wrong, else judged by the rubric, x 100", ("--judge",)),
}  # fmt: skip


@dataclass(frozen=True)
class Subset:
    """One part of a set. `path`: its file (or folder) below --data; several parts may share one.

    `groups` are the official means that it belongs to; `published` holds scores of models, by the models' names.
    """

    name: str
    kind: str
    rows: int | None = None
    language: str = "en"
    groups: tuple[str, ...] = ()
    path: str = ""
    published: Mapping[str, float] = field(default_factory=dict)

    def is_asked(self, wanted: Iterable[str]) -> bool:
        """Whether one of the names, of sub-sets or groups, means this one; no name means all."""
        names = set(wanted)
        return not names or self.name in names or bool(names & set(self.groups))


@dataclass(frozen=True)
class SpeechSet(SetFacts):
    """One benchmark of speech. `read` fills a SetReader from the official files; see layout_*.py for what they hold."""

    #: whom the official rules were read from, and which edition of the data
    version: str = ""
    subsets: tuple[Subset, ...] = ()
    read: Callable[[SetReader], None] = lambda reader: None
    #: rows of the whole set, where those of the parts are not known
    rows: int | None = None
    #: further parts come from the rows themselves (tasks, categories, sets of one's own)
    open_parts: bool = False
    #: rows are numbered from 0 in the official files of results, whatever ids they have
    numbered: bool = False
    #: name of a published figure, which is of a group or of no single sub-set -> our group, where names differ
    figure_groups: Mapping[str, str] = field(default_factory=dict)
    #: sha256 of a judge's published wording -> its edition
    known_prompts: Mapping[str, str] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(subset.kind for subset in self.subsets))

    @property
    def row_count(self) -> int | None:
        """Rows of the whole set, where they are known for every part."""
        counts = [subset.rows for subset in self.subsets]
        return self.rows if self.rows is not None or None in counts else sum(filter(None, counts))

    @property
    def published_count(self) -> int:
        return sum(map(len, [*(subset.published for subset in self.subsets), *self.published.values()]))
