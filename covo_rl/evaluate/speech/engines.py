"""The engines of a speech benchmark, each by one string: who judges, who listens, who scores.

    --judge SPEC               openai:MODEL@URL, transformers:PATH, command:PROGRAM or file:REPLIES.jsonl
    --audio-judge SPEC         openai-audio:MODEL@URL, command:PROGRAM or file:REPLIES.jsonl
    --transcriber SPEC         transformers:PATH, funasr:PATH, command:PROGRAM or file:ASR.jsonl; LANGUAGE=SPEC for one
    --scorer-model NAME=SPEC   utmos, emotion, vad, embed: command:PROGRAM or file:RESULTS.jsonl
    --judge-prompt NAME=FILE   a published wording in place of ours (judge_prompts.py)

What a benchmark needs and nobody is named for is absent, and said: its metric is left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covo_rl.data.transport import hidden
from covo_rl.evaluate.sets import EvalInputError
from covo_rl.evaluate.speech.judge_prompts import JudgePrompt, own_prompt, read_judge_prompt
from covo_rl.evaluate.speech.votes import FileJudge
from covo_rl.rewards.judge import judge_from_spec
from covo_rl.rewards.specs import RewardError
from covo_rl.speech.listeners import FORMS, SpeechListener, listener_from_spec

#: name of a scorer model -> what it gives (speech/listeners.py)
SCORER_MODELS = {"utmos": "score", "emotion": "score", "vad": "segments", "embed": "vector"}
JUDGE_FORMS = "openai:MODEL@URL, transformers:PATH, command:PROGRAM or file:REPLIES.jsonl"
AUDIO_JUDGE_FORMS = "openai-audio:MODEL@URL, command:PROGRAM or file:REPLIES.jsonl"


@dataclass(frozen=True)
class SpeechEngines:
    """Those of one evaluation. `transcribers`: language -> engine, "" for all others."""

    judge: Any = None
    audio_judge: Any = None
    transcribers: Mapping[str, SpeechListener] = field(default_factory=dict)
    scorer_models: Mapping[str, SpeechListener] = field(default_factory=dict)
    prompts: Mapping[str, JudgePrompt] = field(default_factory=dict)

    def transcriber(self, language: str = "") -> SpeechListener | None:
        """Who hears a language, if anybody does."""
        return self.transcribers.get(language, self.transcribers.get(""))

    def prompt(self, name: str, language: str = "") -> JudgePrompt:
        """The wording for a language: the user's for it, the user's for all, else ours.

        Raises:
            FileNotFoundError: there is no prompt of this name.
        """
        return self.prompts.get(f"{name}.{language}") or self.prompts.get(name) or own_prompt(name)

    def missing(self, needs: Iterable[str], language: str = "") -> dict[str, str]:
        """What is needed and not there -> which flag names it. `needs`: judge, audio_judge, transcriber, SCORER_MODELS.

        >>> SpeechEngines().missing(["judge", "utmos"])["utmos"]
        'no --scorer-model utmos=SPEC: command:PROGRAM or file:RESULTS.jsonl'
        """
        there = {"judge": self.judge, "audio_judge": self.audio_judge, "transcriber": self.transcriber(language)}
        one = f"{language}=" * bool(language and self.transcribers)
        flags = {
            "judge": f"--judge SPEC: {JUDGE_FORMS}",
            "audio_judge": f"--audio-judge SPEC: {AUDIO_JUDGE_FORMS}",
            "transcriber": f"--transcriber {one}SPEC: {FORMS['text']}",
            **{name: f"--scorer-model {name}=SPEC: {FORMS['other']}" for name in SCORER_MODELS},
        }
        there |= {name: self.scorer_models.get(name) for name in SCORER_MODELS}
        return {need: f"no {flags[need]}" for need in needs if there[need] is None}

    def record(self) -> dict[str, Any]:
        """For a report: each engine's string, version and counts, and the wordings of the user's."""
        judges = {"judge": self.judge, "audio_judge": self.audio_judge}
        return {
            **{role: _judge_record(judge) for role, judge in judges.items() if judge is not None},
            **{f"transcriber{f' {name}' * bool(name)}": one.record() for name, one in self.transcribers.items()},
            **{name: listener.record() for name, listener in self.scorer_models.items()},
            "judge_prompts": {name: prompt.record() for name, prompt in self.prompts.items()},
        }


def _judge_record(judge: Any) -> dict[str, Any]:
    program = getattr(judge, "program", None)
    version = program.version if program else getattr(judge, "version", None)
    faults = getattr(judge, "cache_faults", 0)
    return {
        "engine": judge.name,
        **({"version": version} if version else {}),
        **({"faults": dict(program.faults)} if program and program.faults else {}),
        **({"cache_faults": faults} if faults else {}),
    }


def speech_engines(
    judge: str | None = None, audio_judge: str | None = None, transcriber: Sequence[str] = (),
    scorer_model: Sequence[str] = (), judge_prompt: Sequence[str] = (), *,
    known_prompts: Mapping[str, str] | None = None,
) -> SpeechEngines:  # fmt: skip
    """The engines that flags name; models are loaded when they are first asked. `known_prompts`: sha256 of a wording
    that a set has published -> edition.

    Raises:
        EvalInputError: everything wrong with all of them, with the forms that exist.
    """
    problems: list[str] = []

    def made(flag: str, spec: str, make: Callable[[str], Any]) -> Any:
        try:
            return make(spec)
        except (RewardError, OSError) as error:
            problems.extend(f"{flag} {hidden(spec)}: {line}" for line in str(error).split("\n"))
        return None

    def named(
        flag: str, specs: Sequence[str], wanted: Callable[[str], str | None], forms: str
    ) -> dict[str, SpeechListener]:
        found: dict[str, SpeechListener] = {}
        names = [_split(spec)[0] for spec in specs]
        for place, spec in enumerate(specs):
            name, rest = _split(spec)
            if name in names[:place]:
                problems.append(
                    f"{flag} {hidden(spec)}: there is another for {name or 'all languages'}; name each once"
                )
            elif (wants := wanted(name)) is None:
                problems.append(f"{flag} {hidden(spec)}: {forms}")
            elif (engine := made(flag, rest, lambda text, wants=wants: listener_from_spec(text, wants))) is not None:
                found[name] = engine
        return found

    names = f"write NAME=SPEC; the names are {', '.join(SCORER_MODELS)}"
    prompts: dict[str, JudgePrompt] = {}
    for spec in judge_prompt:
        read = read_judge_prompt(spec, known_prompts or {})
        if isinstance(read, str):
            problems.append(read)
        elif read[0] in prompts:
            problems.append(f"--judge-prompt {spec}: there is another for {read[0]}; name each once")
        else:
            prompts[read[0]] = read[1]
    engines = SpeechEngines(
        judge and made("--judge", judge, text_judge),
        audio_judge and made("--audio-judge", audio_judge, hearing_judge),
        named("--transcriber", transcriber, lambda name: "text", ""),
        named("--scorer-model", scorer_model, SCORER_MODELS.get, names),
        prompts,
    )
    if problems:
        raise EvalInputError(problems)
    return engines


def _split(spec: str) -> tuple[str, str]:
    """`zh=funasr:PATH` -> (zh, funasr:PATH); without a name before the kind ("", spec)."""
    name, equals, rest = spec.partition("=")
    return (name, rest) if equals and ":" not in name else ("", spec)


def text_judge(spec: str) -> Any:
    """A judge that reads. Raises RewardError: the spec is none of JUDGE_FORMS."""
    kind, _, rest = spec.partition(":")
    if kind == "file" and rest:
        return FileJudge(Path(rest))
    if kind not in ("openai", "transformers", "command") or not rest:
        raise RewardError(f"names no judge; write {JUDGE_FORMS}")
    return judge_from_spec(spec)


def hearing_judge(spec: str) -> Any:
    """A judge that hears. Raises RewardError: the spec is none of AUDIO_JUDGE_FORMS."""
    kind, _, rest = spec.partition(":")
    if kind == "file" and rest:
        return FileJudge(Path(rest))
    if kind not in ("openai-audio", "command") or not rest:
        raise RewardError(f"names no judge that hears; write {AUDIO_JUDGE_FORMS}")
    return judge_from_spec(f"openai:{rest}" if kind == "openai-audio" else spec, hears=True)
