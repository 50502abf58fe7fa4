"""A model, with an adapter or without, to ask from Python.

    model = load("builtin:tiny", adapter=run.adapter)
    reply = model.generate("How many beeps?", audio="clip.wav", choices=["one", "two"])
    reply.answer, reply.think, reply.logps
    model.evaluate("mmar", data="MMAR-meta.jsonl").report

The wording around a question is the one that the adapter or the model was trained with (its prompt.yaml).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covo_rl.audio import ClipStore
from covo_rl.config import ConfigError, RolloutConfig, value_problems
from covo_rl.data.files import read_record
from covo_rl.data.terminal import say
from covo_rl.engines.base import TextDecoder
from covo_rl.evaluate.answer import IN_PROCESS, PolicyAnswerer
from covo_rl.evaluate.evaluation import run_request
from covo_rl.evaluate.runner import Dtype, Request, SpeechMode, load_answerer
from covo_rl.models.text import special_token_notes
from covo_rl.prompt import PromptError, chat_prompt, length_problem, messages, position_limit, written_texts
from covo_rl.run.python.calls import decoding_of, evaluation_options, rows_of
from covo_rl.run.python.chat import Chat
from covo_rl.run.python.keywords import model_problems
from covo_rl.types import Example, Prompt, Rollout, visible

if TYPE_CHECKING:
    import numpy as np

    from covo_rl.data.memory import Source
    from covo_rl.models.covo_audio.token2wav import Token2Wav
    from covo_rl.models.covo_audio.voice import Voice
    from covo_rl.run.python.calls import Sound

    #: a decoder: its folder, builtin:speech_decoder, or loaded, with a voice or without
    Speech = str | os.PathLike[str] | Token2Wav | Voice


@dataclass(frozen=True)
class Reply:
    """What a model wrote, and the parts of it: `think` and `answer` are None where there is not exactly one such block,
    `problems` says what is wrong with its form.

    `tokens` are its tokens as text, `token_ids` their ids, `logps` their log-probs in nats, at the temperature of
    sampling (greedy: 1) and before top-k, top-p and min-p; the end token is among them. `codes` are the audio codes
    among the ids (0 is the first code), and `wave` (T,) float32 at 24 kHz what they sound like, where somebody spoke
    them; a reply of a spoken conversation has no `logps`.
    """

    text: str
    think: str | None
    answer: str | None
    problems: tuple[str, ...]
    stop_reason: str
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    codes: tuple[int, ...] = ()
    wave: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class EvaluationReport:
    """`report` is the content of report.json, `markdown` that of report.md; `folder` holds both, and each row's record,
    where one was named."""

    report: dict[str, Any]
    markdown: str
    folder: Path | None = None

    def _repr_markdown_(self) -> str:
        return self.markdown


def load(
    model: str | os.PathLike[str] = "builtin:tiny",
    adapter: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    load_in_4bit: bool = False,
    instruction: str | None = None,
    choice_style: str | None = None,
    family: str | None = None,
    trust_remote_code: bool = False,
    speech_mode: str = "a2ta",
) -> Model:
    """Load a folder, hub name or builtin:tiny, with a PEFT adapter on it if one is named.

    `instruction` and `choice_style` replace those of prompt.yaml; `family` is one of your own, `./mine.py:Class`.
    `speech_mode` "a2t": replies are text alone, also of a model that speaks.

    Raises:
        ConfigError: a value that no option has, or what is wrong with model, adapter and device: all at once.
        UserError, OSError: weights that do not load.
    """
    problems = model_problems("load", model)
    model = "builtin:tiny" if problems else model
    if dtype not in list(Dtype):
        problems.append(f"dtype {dtype!r}: choose {', '.join(Dtype)}")
        dtype = "auto"
    if speech_mode not in list(SpeechMode):
        problems.append(f"speech_mode {speech_mode!r}: choose {', '.join(SpeechMode)}")
        speech_mode = "a2ta"
    request = Request(
        model=os.fspath(model), adapter=os.fspath(adapter) if adapter is not None else None, dtype=Dtype(dtype),
        device=device, load_in_4bit=load_in_4bit, instruction=instruction, family=family,
        trust_remote_code=trust_remote_code, speech_mode=SpeechMode(speech_mode),
    )  # fmt: skip
    request = replace(request, choice_style=choice_style)
    if choice_style is not None:
        problems += value_problems(replace(request.prompt_config(), choice_style=choice_style))
    problems += [problem.removeprefix("--") for problem in request.model_problems()]
    if problems:
        raise ConfigError(problems)
    return Model(request, load_answerer(request, None, ClipStore()))


class Model:
    """A loaded model; see `load`."""

    def __init__(self, request: Request, answerer: PolicyAnswerer) -> None:
        self.request, self.answerer = request, answerer
        self.policy, self.clips = answerer.policy, answerer.clips
        self._decoder = TextDecoder(self.policy.family)

    def __repr__(self) -> str:
        return f"Model({self.request.model!r}, adapter={self.request.adapter!r})"

    def generate(
        self,
        question: str | Sequence[str],
        audio: Sound | Sequence[Any] | None = None,
        choices: Sequence[Any] = (),
        *,
        greedy: bool | None = None,
        temperature: float | None = None,
        num_generations: int = 1,
        max_completion_length: int = 1024,
        seed: int = 0,
        speak: Speech | None = None,
        voice: str | os.PathLike[str] | None = None,
        **sampling: float,
    ) -> Any:
        """Ask one question, or several at once.

        Args:
            question: a text, or a list of them.
            audio: a path, bytes, (waveform, rate in Hz), or a list of these for a question about several clips. For a
                list of questions, one entry for each of them, or one sound that all of them are about.
            choices: options to choose from; for a list of questions also one list for each.
            greedy: the likeliest token each time; the default, unless a `temperature` is named.
            temperature: of sampling.
            num_generations: replies a question; several need a temperature.
            max_completion_length: limit in tokens.
            seed: of the draws, which depend on it, the weights, the question and its place in the list alone.
            speak: the decoder that makes each reply's `wave`: a folder, builtin:speech_decoder, or a loaded one.
            voice: whose voice it is: a recording, or a folder with a speaker's prompt.
            sampling: top_p, top_k, min_p.

        Returns:
            A Reply; with num_generations a list of them; for a list of questions a list with one of either for each.

        Raises:
            ConfigError: options that contradict each other, or lists that do not match.
            PromptError: audio that cannot be read, is too long, or does not fit.
            CodesError: `speak` is the decoder of another model.
        """
        speaker = self.voice(speak, voice)
        rows = rows_of(question, audio, choices)
        config, greedy = decoding_of(greedy, temperature, num_generations, max_completion_length, sampling, seed)
        self.clips.forget()  # a file is heard as it is now
        asked = replace(self.answerer.prompt_config, written_question=True)  # whoever types one means it
        prompts = [self.prompt(row, messages(row, asked), config) for row in rows]
        replies = self.reply(prompts, config, greedy, seed)
        if speaker is not None:
            replies = [[replace(one, wave=speaker.say(one.codes).numpy()) for one in part] for part in replies]
        shaped = [part[0] if config.num_generations == 1 else part for part in replies]
        return shaped[0] if isinstance(question, str) else shaped

    def prompt(self, row: Example, chat: Sequence[Mapping[str, Any]], config: RolloutConfig) -> Prompt:
        """The prompt of a conversation about the clips of `row`.

        Raises:
            PromptError: a clip cannot be read or is longer than the model takes, or there are too many positions.
        """
        family = self.policy.family
        prompt = chat_prompt(row, chat, family, self.clips)
        limit = family.max_clip_seconds
        for clip, key in zip(row.clips, prompt.clip_keys, strict=True):
            waveform, rate = self.clips.waveform(key)
            if limit and len(waveform) / rate > limit:
                length = f"{len(waveform) / rate:.1f} s long, the model takes {limit:g} s"
                raise PromptError(visible(f"row {row.id}: {clip.name} is {length}"))
        positions = position_limit(family.model.config)
        if problems := length_problem(row.id, len(prompt.input_ids), config.max_completion_length, positions):
            raise PromptError(problems[0])
        return prompt

    def reply(self, prompts: Sequence[Prompt], config: RolloutConfig, greedy: bool, seed: int) -> list[list[Reply]]:
        """`config.num_generations` replies for each prompt."""
        import torch

        from covo_rl.engines import own

        texts = written_texts([prompt.example for prompt in prompts], self.answerer.prompt_config)
        for note in special_token_notes(texts, self.policy.family.tokenizer):
            say(note, err=True)
        with torch.no_grad():
            features = self.policy.features(prompts)
            groups = own.sample(self.policy, prompts, features, config, seed=seed, greedy=greedy)
        return [[self.reply_of(rollout) for rollout in group.rollouts] for group in groups]

    def reply_of(self, rollout: Rollout) -> Reply:
        """The rollout as a Reply."""
        tokens = tuple(self._decoder.tokenizer.decode([i]) for i in rollout.completion_ids)
        return Reply(
            rollout.text, rollout.think, rollout.answer, rollout.problems, rollout.stop_reason, tokens,
            rollout.completion_ids, rollout.logps, rollout.codes,
        )  # fmt: skip

    def chat(
        self, *, speak: Speech | None = None, voice: str | os.PathLike[str] | None = None, pattern: str | None = None,
        speaker: str | None = None, emotion: str | None = None, **options: Any,
    ) -> Chat:  # fmt: skip
        """A conversation, whose questions see what was asked and replied before; `options` are those of `generate`.

        With `speak` it is a SpokenChat: replies have a `wave`, questions may be sounds alone, and later turns see the
        codes of earlier ones. `pattern` holds replies to blocks of text and codes, such as "5:15".
        `speaker` (a name that the model was trained with) and `emotion` are named in the system message.
        """
        spoken = self.voice(speak, voice, pattern, speaker, emotion)
        if spoken is None:
            return Chat(self, options)
        from covo_rl.run.python.spoken import SpokenChat

        return SpokenChat(self, options, spoken, pattern, speaker, emotion)

    def voice(
        self, speak: Speech | None, voice: str | os.PathLike[str] | None = None, pattern: str | None = None,
        speaker: str | None = None, emotion: str | None = None,
    ) -> Voice | None:  # fmt: skip
        """The decoder `speak` on the model's device, with the voice of `voice`; None without one.

        Raises:
            ConfigError: the model cannot speak, or the other options come without `speak`.
            CodesError: the decoder is another model's, or the speaker does not fit it.
        """
        if speak is None:
            words = {"voice": voice, "pattern": pattern, "speaker": speaker, "emotion": emotion}
            if problems := [f"{word} needs speak" for word, value in words.items() if value is not None]:
                raise ConfigError(problems)
            return None
        from covo_rl.run.python.spoken import speech_problems
        from covo_rl.speech.voices import open_voice

        if problems := speech_problems(self.policy.family, pattern, speaker, emotion):
            raise ConfigError(problems)
        return open_voice(speak, voice, device=self.policy.device).fit(len(self.policy.family.code_ids))

    def evaluate(
        self,
        set_: str | None = None,
        data: Source | None = None,
        audio_dir: str | os.PathLike[str] | None = None,
        *,
        output: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> EvaluationReport:
        """Score on an eval set, as `covo-rl eval` does: officially and strictly, with intervals and breakdowns.

        Args:
            set_: a set's name or manifest; without one the rows of `data` are graded by MMAU's rule.
            data: a path, rows, or a `datasets.Dataset`; None is the set's own where it has one (builtin).
            audio_dir: folder that audio paths start from.
            output: folder of the report; an interrupted evaluation goes on there. None keeps nothing.
            options: those of `covo-rl eval`: limit, greedy, num_generations, temperature, listen, rewards ...

        Raises:
            ConfigError: unknown options, with the nearest.
            EvalInputError: everything that is wrong with options, rows and clips.
        """
        options = evaluation_options(options)
        if not isinstance(set_, str | os.PathLike | None):
            raise ConfigError([f"evaluate: a {type(set_).__name__} is no set's name; give rows as data=..."])
        if set_ is None and data is None:
            raise ConfigError(["evaluate: name a set (builtin, mmau-test-mini, mmar, mmsu ...), or give data"])
        rows = None if isinstance(data, str | os.PathLike) else data
        eval_set = IN_PROCESS if set_ is None else None
        with tempfile.TemporaryDirectory(prefix="covo_rl_eval_") as temporary:
            folder = Path(temporary if output is None else output)
            request = replace(
                self.request, **options, set_=os.fspath(set_ or IN_PROCESS.name), output=folder,
                data=Path(data) if isinstance(data, str | os.PathLike) else None,
                audio_dir=Path(audio_dir) if audio_dir is not None else None,
            )  # fmt: skip
            self.clips.forget()
            run_request(request, rows=rows, eval_set=eval_set, answerer=self.answerer, quiet=True)
            markdown = (folder / "report.md").read_text(encoding="utf-8")
            return EvaluationReport(read_record(folder / "report.json"), markdown, None if output is None else folder)
