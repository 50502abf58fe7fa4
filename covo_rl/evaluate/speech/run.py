"""A whole evaluation on a set of speech: rows, replies, engines, scores, means, report. Behind `covo-rl eval`.

    reader -> replies (a file's or a model's) -> who hears, judges and scores them -> the official rules -> report.json

Engines keep their answers by content, so that an interrupted evaluation asks only for the rest.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.data.files import file_sha256
from covo_rl.evaluate.cascade import is_cascade, voice_from_spec
from covo_rl.evaluate.folder import check_folder, claim_folder, joined_ranks, owned
from covo_rl.evaluate.sets import FILES, EvalInputError, load_set
from covo_rl.evaluate.speech.endings import ending_problems, is_likelihood
from covo_rl.evaluate.speech.engines import SpeechEngines, speech_engines
from covo_rl.evaluate.speech.generate import answerable, generate_replies, letter_inputs, wording
from covo_rl.evaluate.speech.groups import group_figures, published_figures, uro_figures
from covo_rl.evaluate.speech.hearing import NO_REPLY, TIMED, hear_replies
from covo_rl.evaluate.speech.inputs import SpeechInputs, read_speech_inputs
from covo_rl.evaluate.speech.live import is_live, live_problems
from covo_rl.evaluate.speech.material import Evidence
from covo_rl.evaluate.speech.neutral import add_neutral_voice, is_judged_by_ear
from covo_rl.evaluate.speech.questions import ask_judges
from covo_rl.evaluate.speech.report import write_speech_report
from covo_rl.evaluate.speech.scoring import score_subset
from covo_rl.evaluate.speech.sets import KINDS, SpeechSet
from covo_rl.evaluate.speech.sounds import ask_scorers
from covo_rl.evaluate.speech.votes import JudgeCounts
from covo_rl.evaluate.through_duplex import given_options, session_prompt
from covo_rl.records.folder import package_versions
from covo_rl.rewards.specs import RewardError

if TYPE_CHECKING:
    from covo_rl.evaluate.answer import PolicyAnswerer
    from covo_rl.evaluate.runner import Request

#: options of `covo-rl eval` that only a set of letters has
_OF_LETTERS = ("through", "columns", "listen", "prompt", "instruction", "choice_style", "rewards")
#: name of a list of phrases -> (the task that reads it, and its argument)
PHRASES = {"mcq": ("mcq", "patterns"), "refusal": ("refusal", "phrases")}
#: package -> tasks that cannot do without it
_PACKAGES = {"jiwer": ("repeat", "emotion", "asr", "tts"), "sacrebleu": ("translation",)}
#: what of a kind's published figures is not computed here
NOT_SCORED = {
    "voicebench_harm": "the score rests on two phrases unless --phrases refusal=FILE gives the published list",
    "voicebench_mcq": "without --phrases mcq=FILE letters are read strictly, not by the published patterns",
}  # fmt: skip


def is_speech_set(name: str | None) -> bool:
    """Whether --set names one."""
    return name in FILES and isinstance(load_set(str(name)), SpeechSet)


def run_speech(request: Request, *, answerer: PolicyAnswerer | None = None, quiet: bool = False) -> None:
    """One evaluation from options to report, which rank 0 writes, and shows unless `quiet`.

    Raises:
        EvalInputError: everything wrong with options, engines, data and predictions, before anything is written.
    """
    speech_set = load_set(str(request.set_))
    assert isinstance(speech_set, SpeechSet)
    engines, inputs, options, notes = checked_speech(request, speech_set)
    voice = voice_from_spec(request.neutral_voice) if request.neutral_voice else None
    request = replace(request, rewards="none")
    assert request.output is not None
    ranks, settings = joined_ranks(), _settings(request, inputs)
    with owned(request.output, ranks):
        check_folder(request.output, settings, ranks, overwrite=request.overwrite)
        if request.model is not None:
            if (generated := generate_replies(request, inputs, settings, ranks, answerer)) is not None:
                inputs, notes = replace(inputs, replies=generated[0]), [*notes, *generated[1]]
        else:
            claim_folder(request.output, settings, ranks, overwrite=request.overwrite)
        if ranks.main:
            report, records = score_inputs(inputs, engines, options)
            if voice is not None:
                folder = request.output / "neutral"
                add_neutral_voice(report, records, inputs, voice, folder, lambda own: score_inputs(own, engines))
            problems = [*inputs.meta["problems"], *notes, *report.pop("problems")]
            whole = {**_facts(speech_set), **settings, **_scored_with(request), **report, "problems": problems}
            write_speech_report(whole, records, request.output, quiet=quiet)


def score_inputs(
    inputs: SpeechInputs, engines: SpeechEngines, options: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures of a report, records of all rows): hear, judge and score replies that are there."""
    counts: dict[str, JudgeCounts] = {}
    said = hear_replies(inputs, engines)
    verdicts, wordings = ask_judges(inputs, said, engines, counts)
    evidence = Evidence(inputs, said, verdicts, ask_scorers(inputs, said, engines))
    blocks, records, by_subset = {}, [], {}
    for name, rows in inputs.by_subset().items():
        block, own = score_subset(inputs.subsets[name], rows, evidence, engines, options or {})
        blocks[name] = {**block, **({"judge_prompts": wordings[name]} if name in wordings else {})}
        blocks[name] |= {"caveat": inputs.caveats[name]} if name in inputs.caveats else {}
        by_subset[name] = own
        records += own
    for name, block in _heard_blocks(inputs, engines, options).items():
        blocks[name]["from_asr"] = block
    groups = group_figures(inputs.speech_set, inputs.subsets, blocks, by_subset)
    kinds = dict.fromkeys(subset.kind for subset in inputs.subsets.values())
    notes = [NOT_SCORED[kind] for kind in kinds if kind in NOT_SCORED and (options or {}).get(KINDS[kind].task) is None]
    notes += [f"{name}: no score, {block['absent']}" for name, block in blocks.items() if "absent" in block]
    notes += [f"{name}: {block['missing']} of {block['n']} rows are missing; {why}" for name, block in blocks.items()
              if (why := next((why for why in block.get("missing_why", ()) if why != NO_REPLY), None))]  # fmt: skip
    return {
        "n": len(records), "subsets": blocks, "groups": groups,
        **({"official_means": uro_figures(blocks)} if inputs.speech_set.name == "uro-bench" else {}),
        "published": published_figures(inputs.speech_set, blocks, groups),
        "published_in": dict(inputs.speech_set.published_in),
        "engines": _engine_records(engines, counts), "problems": notes,
    }, records  # fmt: skip


def _heard_blocks(
    inputs: SpeechInputs, engines: SpeechEngines, options: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Sub-set -> its block by what is heard of sessions' sound, to stand beside that by their own turns. Judges have
    been asked about the turns, and are not asked again."""
    replies = {name: replace(reply, turns=None) for name, reply in (inputs.replies or {}).items()
               if reply.turns is not None and any(reply.audio)}  # fmt: skip
    rows = tuple(row for row in inputs.rows if row.name in replies and KINDS[row.kind].task in TIMED)
    if not rows or not engines.transcribers:
        return {}
    subsets = {row.subset: inputs.subsets[row.subset] for row in rows}
    heard = replace(inputs, rows=rows, subsets=subsets, replies=replies)
    return score_inputs(heard, replace(engines, judge=None, audio_judge=None), options)[0]["subsets"]


def _engine_records(engines: SpeechEngines, counts: Mapping[str, JudgeCounts]) -> dict[str, Any]:
    record = engines.record()
    for name, count in counts.items():
        record[name] = {**record[name], "asked": count.asked, "asked_again": count.asked_again, **count.missing}
    return record


def _facts(speech_set: SpeechSet) -> dict[str, Any]:
    return {
        "set": speech_set.name, "title": speech_set.title, "source": speech_set.source, "licence": speech_set.licence,
        "version": speech_set.version,
    }  # fmt: skip


# -- checks ----------------------------------------------------------------------------------------------------------


def checked_speech(
    request: Request, speech_set: SpeechSet, *, one_reply: bool = False
) -> tuple[SpeechEngines, SpeechInputs, dict[str, dict[str, Any]], list[str]]:
    """Engines, rows and replies, options of scorers and notes. `one_reply`: what asks for more than one reply a row, or
    for log-probs, is left out.

    Raises:
        EvalInputError: everything wrong with options, engines, data and predictions.
    """
    problems = [*request.problems(), *_option_problems(request, speech_set)]
    problems += request.model_problems() if not problems else []
    options, lists = _phrases(request.phrases or ())
    problems += lists
    engines, inputs, notes = SpeechEngines(), None, []
    try:
        engines = speech_engines(
            request.judge, request.audio_judge, request.transcriber or (), request.scorer_model or (),
            request.judge_prompt or (), known_prompts=speech_set.known_prompts,
        )  # fmt: skip
    except EvalInputError as error:
        problems += error.problems
    try:
        inputs = read_speech_inputs(
            speech_set, request.data, subsets=request.subset or (), predictions=request.predictions,
            audio_dir=request.audio_dir, limit=request.limit, allow_outside=request.allow_outside_audio,
        )  # fmt: skip
        problems += _package_problems(inputs)
        if request.neutral_voice:
            problems += _neutral_problems(request.neutral_voice, inputs)
        if request.predictions is not None and not inputs.replies:
            problems.append(f"--predictions {request.predictions}: no reply to any of the {len(inputs.rows)} rows")
        if request.model is not None:
            cascade = is_cascade(request.model)
            speaks = request.voice is not None or cascade
            scores, one_round = not (cascade or one_reply), one_reply or request.engine.use_vllm
            inputs, notes = answerable(inputs, speaks=speaks, scores=scores, one_round=one_round)
            problems += [] if inputs.rows else [f"--model: nothing to ask. {'; '.join(notes)}"]
            problems += live_problems(request, inputs) if not problems and is_live(inputs) else []
            problems += ending_problems(request, inputs) if inputs.rows and is_likelihood(inputs) else []
    except EvalInputError as error:
        problems += error.problems
    if problems or inputs is None:
        raise EvalInputError(problems)
    return engines, inputs, options, notes


def _option_problems(request: Request, speech_set: SpeechSet) -> list[str]:
    given = given_options(request, _OF_LETTERS)
    problems = [f"{', '.join(given)}: {speech_set.title} is a set of speech, which has no such thing"] if given else []
    if request.voice is not None and request.model is None:
        problems.append("--voice makes sound of a model's codes: it needs a --model")
    elif request.voice is not None and is_cascade(request.model):
        problems.append("--voice: a cascade names its own voice")
    return problems


def _neutral_problems(spec: str, inputs: SpeechInputs) -> list[str]:
    if not any(map(is_judged_by_ear, inputs.rows)):
        return [f"--neutral-voice: no row of {inputs.speech_set.title} is judged by an audio judge"]
    try:
        voice_from_spec(spec)
    except RewardError as error:
        return [f"--neutral-voice: {error}"]
    return []


def _package_problems(inputs: SpeechInputs) -> list[str]:
    tasks = {KINDS[subset.kind].task: name for name, subset in inputs.subsets.items()}
    return [
        f"{next(tasks[task] for task in needed if task in tasks)} needs {package}: pip install 'covo-rl[speech-eval]'"
        for package, needed in _PACKAGES.items()
        if tasks.keys() & set(needed) and importlib.util.find_spec(package) is None
    ]


def _phrases(specs: Iterable[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(task -> argument -> phrases, problems) of NAME=FILE, a phrase a line."""
    options: dict[str, dict[str, Any]] = {}
    problems = []
    for spec in specs:
        name, _, file = spec.partition("=")
        if name not in PHRASES or not file:
            problems.append(f"--phrases {spec}: write NAME=FILE; the names are {', '.join(PHRASES)}")
            continue
        try:
            lines = [line.strip("\r") for line in Path(file).read_text(encoding="utf-8").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"--phrases {spec}: {error}")
            continue
        if not lines:
            problems.append(f"--phrases {spec}: no phrases in it")
        elif name == "mcq" and (lost := [line for line in lines if "[CHOICE]" not in line]):
            problems.append(f"--phrases {spec}: {len(lost)} lines have no [CHOICE], the first: {lost[0]!r}")
        task, argument = PHRASES[name]
        options.setdefault(task, {})[argument] = lines
    return options, problems


def _settings(request: Request, inputs: SpeechInputs) -> dict[str, Any]:
    """What the replies depend on: a folder never mixes two. Engines may change: they are asked again, and only they."""
    from covo_rl.evaluate.evaluation import evaluation_settings

    if request.model is None:
        known = {**inputs.meta, "set": inputs.speech_set.name, "packages": package_versions(["covo-rl"])}
    else:
        style = wording(inputs)
        known = evaluation_settings(request, letter_inputs(inputs), style)
        if is_live(inputs):
            known["prompt"] = session_prompt()
        elif style is not None:
            known["prompt"] = asdict(style)
        known.pop("rewards")
        known |= {"voice": request.voice} if request.voice else {}
    known.pop("problems")
    return known


def _scored_with(request: Request) -> dict[str, Any]:
    """What the scores depend on beside replies and engines."""
    files = {spec.partition("=")[0]: [spec, file_sha256(spec.partition("=")[2])] for spec in request.phrases or ()}
    return {**({"phrases": files} if files else {}), "scored_with": package_versions(list(_PACKAGES))}
