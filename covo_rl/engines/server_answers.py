"""What goes to the token endpoint of vLLM 0.31 and what comes back from it: sounds, ids, log-probs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import soundfile

from covo_rl.engines.base import EngineError
from covo_rl.engines.vllm_requests import Completion
from covo_rl.types import Group, shown

GENERATE = "/inference/v1/generate"
MISSING = -9999.0  # what the endpoint writes where it has no log-prob, or none above it


def data_uri(samples_T: np.ndarray, rate: int) -> str:
    """Mono float32 as a wav file in a URI, bit for bit."""
    with io.BytesIO() as file:
        soundfile.write(file, samples_T, rate, format="WAV", subtype="FLOAT")
        return "data:audio/wav;base64," + base64.b64encode(file.getvalue()).decode()


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


def answers_apart(one: Group, other: Group) -> float:
    """Largest difference of log-probs of two greedy completions, up to the first id in which they differ."""
    (a,), (b,) = one.rollouts, other.rollouts
    pairs = zip(a.completion_ids, b.completion_ids, strict=False)
    same = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.logps), len(b.logps)))
    gaps = [abs(x - y) for x, y in zip(a.logps[: same + 1], b.logps[: same + 1], strict=False)]
    return math.inf if any(map(math.isnan, gaps)) else max(gaps)
