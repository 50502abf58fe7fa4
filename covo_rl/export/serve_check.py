"""Does an export take effect where it is served?

A server can load an adapter and change nothing: names that match no module, a stale adapter under a reused id, audio
ids that were expanded twice. So the served model is asked the same questions about the same sounds as the base, and
the answers are compared: first-token log-probs, which show small changes, and the greedy text.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from covo_rl.export import ExportError

RATE = 16000
#: First-token log-probs repeat to about this between two requests to one server (batching, 16-bit kernels).
REPEAT_FLOOR = 1e-3
#: one for each of the fixed sounds
QUESTIONS = (
    "Which sound do you hear? Describe it in one sentence.",
    "Does the sound get louder or softer? Explain why.",
    "How many events are there?",
)


def fixed_sounds() -> list[np.ndarray]:
    """Three fixed clips of 2 s at 16 kHz, float32: a rising tone, noise that fades, three clicks."""
    t = np.arange(2 * RATE) / RATE
    rising = 0.3 * np.sin(2 * np.pi * (200 + 400 * t) * t)
    fading = 0.2 * np.random.default_rng(0).standard_normal(t.size) * np.linspace(1, 0, t.size)
    clicks = np.zeros_like(t)
    for second in (0.3, 0.9, 1.5):
        clicks[int(second * RATE) : int(second * RATE) + 80] = 0.5
    return [clip.astype(np.float32) for clip in (rising, fading, clicks)]


def ask(url: str, model: str, clip: np.ndarray, question: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Greedy text and first-token log-probs (token -> log-prob) of one question about one sound."""
    wav = io.BytesIO()
    soundfile.write(wav, clip, RATE, format="WAV", subtype="PCM_16")
    audio = {"data": base64.b64encode(wav.getvalue()).decode("ascii"), "format": "wav"}
    content = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": question}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0.0, "max_tokens": 32,
            "logprobs": True, "top_logprobs": 5}  # fmt: skip
    address = f"{url.rstrip('/')}/chat/completions"
    if not address.startswith(("http://", "https://")):
        raise ExportError(f"{address}: an endpoint starts with http:// or https://")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise ExportError(f"{address} answered {error.code}: {error.read()[:500].decode(errors='replace')}") from error
    except (urllib.error.URLError, TimeoutError, json.JSONDecodeError) as error:
        raise ExportError(f"{address}: {error}") from error
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
        tokens = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        return {"text": text, "logprobs": {t["token"]: float(t["logprob"]) for t in tokens}}
    except (KeyError, IndexError, TypeError) as error:
        raise ExportError(f"{url}: not a chat completion: {json.dumps(answer)[:300]}") from error


def _gap(left: Mapping[str, Any], right: Mapping[str, Any]) -> float:
    """Largest difference of log-probs over shared tokens; infinite where the five likeliest share none."""
    a, b = left["logprobs"], right["logprobs"]
    return max((abs(a[t] - b[t]) for t in a.keys() & b.keys()), default=float("inf") if a or b else 0.0)


def check_endpoint(
    url: str, *, model: str, base: str, api_key: str | None = None, timeout: float = 120.0
) -> dict[str, Any]:
    """Ask an OpenAI-compatible endpoint everything as `model`, as `base`, and as `base` again.

    The second time shows how well the server repeats itself; the export takes effect where its answers differ from
    the base's by more than that.

    Raises:
        ExportError: the endpoint cannot be reached or answers with an error.
    """
    rows = []
    for clip, question in zip(fixed_sounds(), QUESTIONS, strict=True):
        served, first, again = (ask(url, name, clip, question, api_key, timeout) for name in (model, base, base))
        gap, noise = _gap(served, first), _gap(first, again)
        differ, repeats = served["text"] != first["text"], first["text"] == again["text"]
        rows.append({
            "question": question, "text": served["text"], "base_text": first["text"], "texts_differ": differ,
            "base_repeats": repeats, "logprob_gap": gap, "logprob_noise": noise,
            "differs": gap > max(10 * noise, REPEAT_FLOOR) or (differ and repeats),
        })  # fmt: skip
    takes_effect = any(row["differs"] for row in rows)
    return {"url": url, "model": model, "base": base, "takes_effect": takes_effect, "answers": rows}


def check_local(folder: Path) -> dict[str, Any]:
    """Load an exported adapter or merged folder in a fresh transformers process and compare it with its base.

    Raises:
        ExportError: the folder is no export, or does not load.
    """
    from covo_rl.audio import ClipStore  # asking an endpoint needs no torch
    from covo_rl.export import verify
    from covo_rl.export.adapter import base_of, policy_kind
    from covo_rl.models import load_family

    kind = policy_kind(folder)
    if kind is None:
        raise ExportError(f"{folder}: neither adapter_config.json nor model*.safetensors with a config.json")
    base, clips = base_of(folder), ClipStore()
    family = load_family(base)
    dtype = str(family.embed_tokens.weight.dtype).removeprefix("torch.")
    target = verify.Target("export", "adapter" if kind == "adapter" else "merged", folder, dtype)
    logits, notes = verify.run_fresh(family, base, [target], verify.synthetic_prompts(family, clips), clips)
    gap = verify.largest_gap(logits["export"], logits[f"base.{dtype}"])
    return {"folder": str(folder), "base": base, "takes_effect": verify.is_change(gap, logits["export"]),
            "max_abs_logit_diff_base": gap, "notes": notes}  # fmt: skip
