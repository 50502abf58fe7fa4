"""What a vLLM engine is asked and what it answers, in this process or over HTTP: prompt, clips, sampling, groups.

Nothing here imports vLLM. Its rules: one audio id per clip, which it expands itself; clips named by content, so that
none is hashed, preprocessed or encoded twice; `n` completions in one request, so that they share the prompt's blocks.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import soundfile

from covo_rl.engines.base import EngineError, TextDecoder, rollout_of
from covo_rl.models.waveform import mono_float, sinc_resample
from covo_rl.types import Group, Prompt, shown, visible

if TYPE_CHECKING:
    import numpy as np

    from covo_rl.audio import ClipStore
    from covo_rl.config import RolloutConfig

#: temperatures that vLLM samples with: it raises lower ones to the first without an error, and refuses higher ones
TEMPERATURES = (0.01, 2.0)
#: tokens in, tokens out, on a server of vLLM 0.31; MISSING is what it writes where it has no log-prob
GENERATE, MISSING = "/inference/v1/generate", -9999.0


@dataclass(frozen=True)
class Completion:
    """One answer of an engine: ids, their log-probs in nats, and why it ended, in its words."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    finish_reason: str | None


def sampling_problems(config: RolloutConfig) -> list[str]:
    """Options that vLLM does not sample with."""
    low, high = TEMPERATURES
    if low <= config.temperature <= high:
        return []
    return [f"temperature {config.temperature:g}: vLLM samples with {low:g} to {high:g}"]


def clip_uuid(key: str, version: int | None = None) -> str:
    """The name of a clip in an engine's caches; with a `version`, where what encodes it trains, of these weights."""
    return key if version is None else f"{key}:{version}"


def clip_waveform(key: str, clips: ClipStore, family: Any) -> tuple[np.ndarray, int]:
    """A clip as the family hears it: float32 (samples,), and its rate in Hz, at which no engine resamples it again."""
    samples, rate = clips.waveform(key)
    return sinc_resample(mono_float(samples), rate, family.sampling_rate).numpy(), family.sampling_rate


def data_uri(samples_T: np.ndarray, rate: int) -> str:
    """Mono float32 as a wav file in a URI, bit for bit."""
    with io.BytesIO() as file:
        soundfile.write(file, samples_T, rate, format="WAV", subtype="FLOAT")
        return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()


def prompt_ids(prompt: Prompt, family: Any) -> list[int]:
    """The prompt's ids with ONE audio id per clip."""
    return family.unexpanded_ids(prompt.messages)


def sampling_fields(
    config: RolloutConfig, family: Any, *, generations: int, seed: int, greedy: bool = False
) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams; `seed` is one of `prompt_seeds`, and completion g of a prompt has seed + g.

    A greedy completion is asked for once, and its log-probs are those of temperature 1.
    """
    drawing = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k, "min_p": config.min_p}
    fields: dict[str, Any] = {
        "n": 1 if greedy else generations,
        **({"temperature": 0.0} if greedy else drawing),
        "max_tokens": config.max_completion_length,
        "seed": seed,
        "logprobs": 0,  # of the id that was drawn alone
        "stop_token_ids": sorted(family.eos_token_ids),
        "ignore_eos": True,  # the checkpoint's own list may be another
        "detokenize": False,
    }
    if unsampled := family.unsampled_ids:
        # One entry a code, as low as vLLM goes. Its bad_words would be looked for one by one at every token, and
        # allowed_token_ids would have to name all of the text and may hold no id that the tokenizer does not know.
        fields["logit_bias"] = dict.fromkeys(unsampled, -100.0)
    return fields


def read_answer(answer: Mapping[str, Any], where: str) -> tuple[list[int], list[Completion]]:
    """The prompt's ids as the server expanded them, and its completions.

    Raises:
        EngineError: not what vLLM answers; numbers are checked where they are numbers (`check_groups`).
    """
    try:
        used, choices = answer["prompt_token_ids"], sorted(answer["choices"], key=lambda choice: choice["index"])
        if not isinstance(used, list) or [choice["index"] for choice in choices] != [*range(len(choices))]:
            raise ValueError("prompt_token_ids must be a list, and every choice has an index of its own")
        completions = [Completion(tuple(c["token_ids"]), _logps(c), c["finish_reason"]) for c in choices]
        numbers = [*used, *(i for completion in completions for i in completion.ids)]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EngineError(f"{where}: not an answer of {GENERATE}: {type(error).__name__}: {shown(error)}") from None
    if not all(type(number) is int for number in numbers):
        raise EngineError(f"{where}: ids that are no whole numbers")
    return used, completions


def _logps(choice: Mapping[str, Any]) -> tuple[float, ...]:
    """Of each id, whose name stands beside it; NaN where there is none."""
    content = choice["logprobs"]["content"]
    if (names := [entry["token"] for entry in content]) != [f"token_id:{i}" for i in choice["token_ids"]]:
        raise ValueError(f"log-probs of {shown(names[:5])} beside ids {shown(choice['token_ids'][:5])}")
    return tuple(float(e["logprob"]) if e["logprob"] > MISSING else math.nan for e in content)


def group_of(
    prompt: Prompt, used_ids: Sequence[int], completions: Sequence[Completion], *, limit: int,
    decoder: TextDecoder, version: int, copies: int = 1,
) -> Group:  # fmt: skip
    """The group of a prompt, for `check_groups` to check. One greedy completion stands for `copies`.

    Raises:
        EngineError: the engine's own expansion `used_ids` of the prompt is not ours, or it ended a completion for
            another reason than an end token or `limit` ids.
    """
    row = f"row {visible(prompt.example.id)}"
    if tuple(used_ids) != prompt.input_ids:
        raise EngineError(f"{row}: the engine used another prompt: {_difference(used_ids, prompt.input_ids)}")
    rollouts = []
    for g, completion in enumerate(completions):
        count, stopped = len(completion.ids), completion.finish_reason == "stop"
        if not stopped and (completion.finish_reason != "length" or count != limit):
            raise EngineError(
                f"{row}, rollout {g}: the engine ended it after {count} of {limit} ids for the reason "
                f"{completion.finish_reason!r:.80}; its room (vllm_max_model_length) must hold prompt and "
                "completion"
            )
        reason = "stop" if stopped else "length"
        rollouts.append(rollout_of(completion.ids, completion.logps, reason, decoder, version))
    return Group(prompt, tuple(rollouts * copies))


def _difference(used: Sequence[int], ours: Sequence[int]) -> str:
    """Where two lists of ids part."""
    at = next((i for i, (a, b) in enumerate(zip(used, ours, strict=False)) if a != b), min(len(used), len(ours)))
    around = slice(max(0, at - 2), at + 3)
    return (f"{len(used)} ids, ours has {len(ours)}; from id {around.start} on {list(used[around])} for "
            f"{list(ours[around])}. Model, tokenizer and chat template of the engine must be the policy's")  # fmt: skip
