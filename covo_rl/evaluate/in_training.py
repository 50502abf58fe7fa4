"""Sets of `covo-rl eval` that a run measures every few steps (`eval_set`), with the policy as it is then.

    mmar=MMAR-meta.jsonl,audio_dir=clips,limit=200 -> rows and engines, all checked -> replies -> eval/mmar/accuracy ...

All that `covo-rl eval` would refuse is refused before training. Nothing is kept but the figures: an evaluation that was
interrupted is made again with its step. Of a set of speech the written reply is scored, as nothing makes it a sound.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.config import ConfigError, Options, RewardConfig
from covo_rl.data import overlap
from covo_rl.data.read import some
from covo_rl.evaluate.answer import PolicyAnswerer, evaluate
from covo_rl.evaluate.evaluation import checked_inputs
from covo_rl.evaluate.inputs import Inputs, repeated_ids
from covo_rl.evaluate.lengths import too_long
from covo_rl.evaluate.records import Record
from covo_rl.evaluate.runner import Request
from covo_rl.evaluate.sets import EvalInputError, EvalSet, PromptStyle, load_set
from covo_rl.evaluate.speech.engines import JUDGE_FORMS, SpeechEngines
from covo_rl.evaluate.speech.generate import given_replies, letter_inputs, wording
from covo_rl.evaluate.speech.inputs import SpeechInputs
from covo_rl.evaluate.speech.live import is_live_kind
from covo_rl.evaluate.speech.run import checked_speech, score_inputs
from covo_rl.evaluate.speech.scoring import engine_name
from covo_rl.evaluate.speech.sets import KINDS, SpeechSet
from covo_rl.evaluate.summary import summarize
from covo_rl.records.console import ProgressDisplay, percent
from covo_rl.resolve import typed_values
from covo_rl.types import Example, visible

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.engines.base import RolloutEngine
    from covo_rl.policy import Policy
    from covo_rl.train.ranks import Ranks

#: what of `covo-rl eval` an entry may say behind its data; of some several times
_SEVERAL = ("subset", "judge_prompt", "scorer_model", "phrases")
_OPTIONS: dict[str, Any] = {
    "audio_dir": str, "columns": str, "limit": int, "prompt": str, "judge": str, "allow_outside_audio": bool,
    **dict.fromkeys(_SEVERAL, list[str]),
}  # fmt: skip


@dataclass(frozen=True)
class InTrainingSet:
    """One set, read and checked. `speech`: engines, rows, and options of the scorers, where its replies are spoken."""

    inputs: Inputs
    style: PromptStyle | None
    speech: tuple[SpeechEngines, SpeechInputs, Mapping[str, Mapping[str, Any]]] | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.inputs.eval_set.name

    def styled(self) -> list[Example]:
        """The rows in the wording that they are asked in."""
        return [self.style.apply(row) if self.style else row for row in self.inputs.examples]

    def length_problems(self, policy: Policy, clips: ClipStore, options: Options) -> list[str]:
        """Rows that the model has too few positions for."""
        answerer = PolicyAnswerer(policy, clips, options.prompt, options.rollout, self.style)
        return [f"eval_set {self.name}: {text}" for text in answerer.length_problems(self.inputs.examples)]

    def figures(
        self, policy: Policy, clips: ClipStore, options: Options, reward_config: RewardConfig | None, ranks: Ranks,
        engine: RolloutEngine | None, title: str,
    ) -> dict[str, float | None]:  # fmt: skip
        """`eval/NAME/FIGURE` of greedy replies, on every rank; all of them take part. `reward_config` is None unless a
        reward takes the whole reply as the answer."""
        with ProgressDisplay(f"{title}, {self.name}", len(self.inputs.examples), active=ranks.main) as display:

            def progress(done: int, total: int, right: float) -> None:
                display.update(done, "scored at the end" if self.speech else f"{percent(right)} % right")

            records = evaluate(
                policy, self.inputs.examples, prompt_config=options.prompt, rollout_config=options.rollout,
                reward_config=None if self.speech else reward_config, clips=clips, seed=options.train.seed,
                batch_size=options.eval.eval_batch_size, ranks=ranks, engine=engine, eval_set=self.inputs.eval_set,
                style=self.style, progress=progress,
            ).records  # fmt: skip
        figures = _letter_figures(records) if not self.speech else None
        if self.speech:
            figures = ranks.from_main(_speech_figures(records, *self.speech) if ranks.main else None)
        return {f"eval/{self.name}/{name}": value for name, value in (figures or {}).items()}


def _letter_figures(records: Sequence[Record]) -> dict[str, float | None]:
    """Strict accuracy, the official one over raw reply and extracted answer, rows, those that the official rule leaves
    out, and those whose answer cannot be read."""
    summary = summarize(records)
    official = {name: summary[name]["accuracy"] for name in ("official", "official_extracted")}
    missing, unreadable = summary["official"]["n_dropped"], summary["n_unparseable"]
    return {"accuracy": summary["accuracy"], **official, "n": summary["n"], "missing": missing,
            "unreadable": unreadable}  # fmt: skip


def _speech_figures(
    records: Sequence[Record], engines: SpeechEngines, inputs: SpeechInputs, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, float | None]:
    """`score` of every sub-set, and of every mean that is whole; rows and those without a score, in all and of each.
    What a judge draws in this process is not taken from the training."""
    from covo_rl.train.checkpoint.state import load_random_state, random_state

    before = random_state()
    report, _ = score_inputs(replace(inputs, replies=given_replies(records, Path())), engines, options)
    load_random_state(*before)
    blocks = report["subsets"]
    means = {f"{name}/score": block["score"] for name, block in report["groups"].items() if not block["partial"]}
    parts = {f"{name}/{key}": block[key] for name, block in blocks.items() for key in ("score", "n", "missing")}
    return {**means, **parts, **{key: sum(block[key] for block in blocks.values()) for key in ("n", "missing")}}


# -- what an entry says ------------------------------------------------------------------------------------------------


def read_in_training_sets(
    options: Options, longest: float | None, train: Sequence[Example], clips: ClipStore
) -> tuple[list[InTrainingSet], list[str]]:
    """The sets of `eval_set`, and all that is wrong with any of them: names, data, sub-sets, engines, clips of more
    than `longest` seconds, rows that are among those of `train`."""
    sets, names, problems = [], [], []
    for entry in options.eval.eval_set:
        first, *more = re.split(r",(?=[a-z_-]+=)", entry)
        name, _, data = first.partition("=")
        names.append(name)
        try:
            found = _read_set(_request(name, data, more, options))
            names[-1] = found.name
            sets.append(found)
            wrong = too_long(found.inputs.examples, longest, clips)
            shared = [] if options.data.allow_overlap else overlap(train, found.inputs.examples)
            wrong += [str(item) for item in shared if item.serious]
        except (EvalInputError, ConfigError) as error:
            wrong = error.problems
        problems += [visible(f"eval_set {name}: {text.removeprefix(f'--set {name}: ')}") for text in wrong]
    problems += [f"eval_set {name}: it is there twice; one run has one set of a name" for name in repeated_ids(names)]
    return sets, problems


def _request(name: str, data: str, more: Sequence[str], options: Options) -> Request:
    """What `covo-rl eval` would be asked. Raises ConfigError: options that it has not, or that mean nothing here."""
    pairs = [(key.replace("-", "_"), value) for key, _, value in (part.partition("=") for part in more)]
    keys, problems = [key for key, _ in pairs], []
    given = {key: [v for k, v in pairs if k == key] if key in _SEVERAL else value for key, value in pairs}
    values = typed_values(_OPTIONS, given, problems, "behind its data")
    problems += [f"{key} occurs twice: give it one value" for key in repeated_ids(keys) if key not in _SEVERAL]
    if values.get("limit", 1) < 1:
        problems.append(f"limit {values['limit']}: must be at least 1")
    if problems:
        raise ConfigError(problems)
    values |= {"audio_dir": Path(values["audio_dir"])} if "audio_dir" in values else {}
    return Request(
        set_=name, data=Path(data) if data else None, output=Path(options.train.output), model=options.model.model,
        family=options.model.family, trust_remote_code=options.model.trust_remote_code, **values,
    )  # fmt: skip


def _read_set(request: Request) -> InTrainingSet:
    """Raises EvalInputError: there is no such set, or what is wrong with its data and options."""
    found = load_set(str(request.set_))
    sessions = found.streams if isinstance(found, EvalSet) else all(map(is_live_kind, found.kinds))
    if sessions or (isinstance(found, EvalSet) and not found.has_answers):
        why = "asks a live session" if sessions else "has answers that only its host knows"
        raise EvalInputError([f"{found.title} {why}: export checkpoints (export_checkpoints) for `covo-rl eval`"])
    if request.data is None and (isinstance(found, SpeechSet) or found.prepare is None):
        raise EvalInputError([f"it needs data: write {request.set_}=DATA. {found.how_to_get}"])
    if isinstance(found, EvalSet):
        inputs, style = checked_inputs(request, eval_set=found)
        return InTrainingSet(inputs, style, notes=tuple(inputs.meta["problems"]))
    engines, speech, scorers, notes = checked_speech(request, found, one_reply=True)
    if problems := _engine_problems(engines, speech):
        raise EvalInputError(problems)
    notes = (*speech.meta["problems"], *notes)
    return InTrainingSet(letter_inputs(speech), wording(speech), (engines, speech, scorers), notes)


def _engine_problems(engines: SpeechEngines, inputs: SpeechInputs) -> list[str]:
    """Sub-sets that would have no score: what needs sound, and what needs a judge that is not named."""
    needs = {name: {engine_name(flag) for flag in KINDS[subset.kind].needs} - {"transcriber"}
             for name, subset in inputs.subsets.items()}  # fmt: skip
    spoken = [name for name, own in needs.items() if own - {"judge"}]
    judged = [name for name, own in needs.items() if own == {"judge"} and engines.judge is None]
    problems = []
    if spoken:
        problems.append(f"{some(spoken)}: scored by sound, which a run does not make: name other parts with "
                        "subset=NAME, or export checkpoints for `covo-rl eval --voice`")  # fmt: skip
    if judged:
        problems.append(f"{some(judged)}: no judge; add judge=SPEC: {JUDGE_FORMS}")
    return problems
