"""`--model cascade:FILE.yaml`: a transcriber, a text model and a voice in a row, the baseline of what hears and speaks.

    transcriber: transformers:whisper-large-v3    # any of speech/listeners.py
    llm: openai:MODEL@https://host/v1             # a judge's spec: transformers:PATH and command:PROGRAM too
    voice: command:python tts.py                  # may be left out: {"id", "text", "path"} -> writes the wav, {"id"}
    system: You are a helpful voice assistant.    # may be left out

A row's clips become their transcripts; what the row writes (question, options, instruction) follows as for any model.
Of a dialogue the text model is told all that was said before, after "User:" and "Assistant:".
Whatever hears, answers or speaks and fails ends the evaluation with its reason: finished rows are kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.audio import AudioError, ClipStore, decode
from covo_rl.config import PromptConfig, RolloutConfig, typed_values
from covo_rl.evaluate.inputs import count_rows
from covo_rl.evaluate.records import SpokenRollout, group_from_text
from covo_rl.evaluate.sets import EvalInputError, PromptStyle
from covo_rl.evaluate.through_duplex import without_use
from covo_rl.prompt import messages
from covo_rl.resolve import ConfigError, read_yaml
from covo_rl.rewards.judge import judge_from_spec
from covo_rl.rewards.program import Program
from covo_rl.rewards.replies import AnswerError
from covo_rl.rewards.specs import RewardError
from covo_rl.speech.listeners import Heard, SpeechListener, listener_from_spec
from covo_rl.types import Clip, Example, Group, UserError, visible

if TYPE_CHECKING:
    from covo_rl.evaluate.runner import Request

KIND = "cascade:"
KEYS = {"transcriber": str, "llm": str, "voice": str | None, "system": str | None}
#: options that only a checkpoint has
_OF_MODELS = (
    "adapter", "load_in_4bit", "dtype", "device", "family", "trust_remote_code", "speech_mode", "through",
)  # fmt: skip


#: who said what, in a conversation that is told as one text
_SPEAKERS = {"user": "User: ", "assistant": "Assistant: "}


class CascadeError(UserError, RuntimeError):
    """A part of a cascade gave nothing for a row."""


@dataclass
class CascadeAnswerer:
    """Answers as PolicyAnswerer does. `folder` is where spoken replies go."""

    transcriber: SpeechListener
    llm: Any
    voice: Program | None
    clips: ClipStore
    prompt_config: PromptConfig
    rollout_config: RolloutConfig
    folder: Path
    style: PromptStyle | None = None

    def answer(self, examples: Sequence[Example], *, greedy: bool, num_generations: int, seed: int) -> list[Group]:
        """As Answerer has it; each draw of a row is a vote of the text model, whose replies are kept on disk."""
        prompts = self._prompts(examples)
        how = {"max_tokens": self.rollout_config.max_completion_length, "temperature": 0}
        if not greedy:
            how |= {"temperature": self.rollout_config.temperature, "top_p": self.rollout_config.top_p}
        draws = [
            _whole("llm", self.llm.vote(1000 * seed + g, **how).ask(prompts), examples) for g in range(num_generations)
        ]
        groups = [group_from_text(row, texts) for row, texts in zip(examples, zip(*draws, strict=True), strict=True)]
        return self._spoken(groups) if self.voice else groups

    def _prompts(self, examples: Sequence[Example]) -> list[str]:
        """What each row is to the text model: the system message, its transcripts, its own words."""
        sounds = [
            Heard(f"{example.id} clip {place}", clip, str(example.columns.get("language") or ""))
            for example in examples for place, clip in enumerate(example.clips)
        ]  # fmt: skip
        owners = [example for example in examples for _ in example.clips]
        heard = iter(_whole("transcriber", self.transcriber.hear(sounds), owners))
        config, rows = self.prompt_config, list(examples)
        if self.style is not None:
            config, rows = replace(config, instruction="", written_question=True), list(map(self.style.apply, examples))
        prompts = []
        for row in rows:
            lines = []
            for message in messages(row, config):
                texts = [
                    next(heard)["text"] if part["type"] == "audio" else part["text"] for part in message["content"]
                ]
                said = "\n\n".join(filter(None, texts))
                lines.append(f"{_SPEAKERS.get(message['role'], '')}{said}" if row.history else said)
            prompts.append("\n\n".join(filter(None, [*lines, "Assistant:" if row.history else ""])))
        return prompts

    def _spoken(self, groups: list[Group]) -> list[Group]:
        assert self.voice is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for group in groups:
            for g, rollout in enumerate(group.rollouts):
                row = group.prompt.example
                file = self.folder / f"{_file_name(row.id)}-{g}.wav"
                language = str(row.columns.get("language") or "")
                lines.append(
                    {"id": file.stem, "text": rollout.text, "language": language, "path": str(file.absolute())}
                )
        paths = {line["id"]: Path(line["path"]) for line in lines}
        owners = [group.prompt.example for group in groups for _ in group.rollouts]
        spoken = iter(_whole("voice", self.voice.ask(lines, lambda answer: spoken_file(paths[answer["id"]])), owners))
        return [
            replace(group, rollouts=tuple(
                SpokenRollout((), (), r.text, "stop", r.think, r.answer, r.problems, audio=f"audio/{next(spoken)}")
                for r in group.rollouts
            ))
            for group in groups
        ]  # fmt: skip


def _whole(part: str, results: Sequence[Any], examples: Sequence[Example]) -> list[Any]:
    """All results. Raises CascadeError: some are errors; rows are named, and the first reason."""
    lost = {row.id: result for row, result in zip(examples, results, strict=True) if isinstance(result, AnswerError)}
    if lost:
        raise CascadeError(f"cascade: {part} gave nothing for {count_rows(list(lost))}; {next(iter(lost.values()))}")
    return list(results)


def _file_name(name: str) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9_-]', '_', name)[:60]}-{digest}"


def spoken_file(path: Path) -> str:
    """The name of a file that a voice has written. Raises ValueError: it is not there, or no sound."""
    try:
        decode(Clip(path=str(path)))
    except AudioError as error:
        raise ValueError(f"its sound cannot be read: {error}") from None
    return path.name


# -- options ---------------------------------------------------------------------------------------------------------


def is_cascade(model: str | None) -> bool:
    """Whether --model names one."""
    return (model or "").startswith(KIND)


def cascade_problems(request: Request) -> list[str]:
    """What is wrong with the file, its engines, and with options that only a checkpoint has."""
    problems = without_use(request, _OF_MODELS, f"--model {request.model} is a cascade")
    try:
        _parts(str(request.model))
    except EvalInputError as error:
        problems += error.problems
    return problems


def cascade_record(model: str) -> dict[str, Any]:
    """For the record of an evaluation: its file as it stands, and the versions of its engines."""
    content, transcriber, llm, voice = _parts(model)
    programs = {"llm": getattr(llm, "program", None), "voice": voice}
    versions = {name: program.version for name, program in programs.items() if program}
    return {**content, "versions": {"transcriber": transcriber.version, **versions}}


def load_cascade(request: Request, clips: ClipStore, style: PromptStyle | None = None) -> CascadeAnswerer:
    """The answerer of `--model cascade:FILE`. Raises EvalInputError: everything wrong with the file."""
    content, transcriber, llm, voice = _parts(str(request.model))
    assert request.output is not None
    config = replace(request.prompt_config(), **({"system_prompt": content["system"]} if content.get("system") else {}))
    return CascadeAnswerer(
        transcriber, llm, voice, clips, config, request.rollout_config(), request.output / "audio", style
    )


def _parts(model: str) -> tuple[dict[str, Any], SpeechListener, Any, Program | None]:
    """(content, transcriber, llm, voice) of `cascade:FILE`. Raises EvalInputError: all that is wrong."""
    path = model.removeprefix(KIND)
    if not path:
        raise EvalInputError([f"--model {model}: write cascade:FILE.yaml, with {', '.join(KEYS)} in it"])
    try:
        raw = read_yaml(path)
    except ConfigError as error:
        raise EvalInputError(error.problems) from None
    problems: list[str] = []
    content = typed_values(KEYS, raw, problems, path)
    problems += [f"{path}: {name} is missing" for name in ("transcriber", "llm") if not content.get(name)]
    made: dict[str, Any] = {}
    makers = {"transcriber": listener_from_spec, "llm": judge_from_spec, "voice": voice_from_spec}
    for name, make in makers.items():
        try:
            made[name] = make(content[name]) if content.get(name) else None
        except (RewardError, OSError) as error:
            problems.append(f"{path}: {name}: {error}")
    if problems:
        raise EvalInputError([visible(problem, "\n") for problem in problems])
    return content, made["transcriber"], made["llm"], made["voice"]


def voice_from_spec(spec: str) -> Program:
    """A voice. Raises RewardError: it is no command:PROGRAM, or there is no such program."""
    kind, _, rest = spec.partition(":")
    if kind != "command" or not rest:
        raise RewardError(f"{spec!r} has no voice: write command:PROGRAM")
    return Program(rest)
