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

from covo_rl.export.errors import ExportError

#: First-token log-probs repeat to about this between two requests to one server (batching, 16-bit kernels).
REPEAT_FLOOR = 1e-3
QUESTIONS = (
    ("a rising tone", "Which sound do you hear? Describe it in one sentence."),
    ("noise that fades", "Does the sound get louder or softer? Explain why."),
    ("three clicks", "How many events are there?"),
)
RATE = 16000


def sounds() -> list[np.ndarray]:
    """Three fixed clips of 2 s at 16 kHz, float32: a rising tone, noise that fades, three clicks."""
    t = np.arange(2 * RATE) / RATE
    rising = 0.3 * np.sin(2 * np.pi * (200 + 400 * t) * t)
    fading = 0.2 * np.random.default_rng(0).standard_normal(t.size) * np.linspace(1, 0, t.size)
    clicks = np.zeros_like(t)
    for second in (0.3, 0.9, 1.5):
        clicks[int(second * RATE) : int(second * RATE) + 80] = 0.5
    return [clip.astype(np.float32) for clip in (rising, fading, clicks)]


def wav_base64(waveform: np.ndarray) -> str:
    """16-bit WAV of a mono float waveform, as the `input_audio` part of a chat request wants it."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, RATE, format="WAV", subtype="PCM_16")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _post(url: str, body: Mapping[str, Any], api_key: str | None, timeout: float) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise ExportError(f"{url}: an endpoint starts with http:// or https://")
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ExportError(f"{url} answered {error.code}: {error.read()[:500].decode(errors='replace')}") from error
    except (urllib.error.URLError, TimeoutError, json.JSONDecodeError) as error:
        raise ExportError(f"{url}: {error}") from error


def ask(url: str, model: str, clip: np.ndarray, question: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Greedy text and first-token log-probs (token -> log-prob) of one question about one sound."""
    content = [
        {"type": "input_audio", "input_audio": {"data": wav_base64(clip), "format": "wav"}},
        {"type": "text", "text": question},
    ]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0.0, "max_tokens": 32,
            "logprobs": True, "top_logprobs": 5}  # fmt: skip
    answer = _post(f"{url.rstrip('/')}/chat/completions", body, api_key, timeout)
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
        tokens = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        return {"text": text, "logprobs": {t["token"]: float(t["logprob"]) for t in tokens}}
    except (KeyError, IndexError, TypeError) as error:
        raise ExportError(f"{url}: not a chat completion: {json.dumps(answer)[:300]}") from error


def _gap(left: Mapping[str, float], right: Mapping[str, float]) -> float:
    """Largest difference over shared tokens; infinite where the five likeliest share none."""
    if not left and not right:
        return 0.0
    shared = left.keys() & right.keys()
    return max((abs(left[t] - right[t]) for t in shared), default=float("inf"))


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
    for clip, (_, question) in zip(sounds(), QUESTIONS, strict=True):
        served, first, again = (ask(url, name, clip, question, api_key, timeout) for name in (model, base, base))
        noise = _gap(first["logprobs"], again["logprobs"])
        rows.append(
            {
                "question": question,
                "text": served["text"],
                "base_text": first["text"],
                "texts_differ": served["text"] != first["text"],
                "base_repeats": first["text"] == again["text"],
                "logprob_gap": _gap(served["logprobs"], first["logprobs"]),
                "logprob_noise": noise,
                "differs": _gap(served["logprobs"], first["logprobs"]) > max(10 * noise, REPEAT_FLOOR)
                or (served["text"] != first["text"] and first["text"] == again["text"]),
            }
        )
    return {
        "url": url,
        "model": model,
        "base": base,
        "takes_effect": any(row["differs"] for row in rows),
        "answers": rows,
    }


def check_local(folder: str | Path) -> dict[str, Any]:
    """Load an exported adapter or merged folder in a fresh transformers process and compare it with its base.

    Raises:
        ExportError: the folder is no export, or does not load.
    """
    from covo_rl.audio import ClipStore
    from covo_rl.export.judge import Expected, Target, largest
    from covo_rl.export.source import base_of, kind_of
    from covo_rl.export.verify import inputs_of, run_fresh, synthetic_prompts
    from covo_rl.models import load_family

    folder = Path(folder)
    kind = kind_of(folder) if folder.is_dir() else None
    if kind is None:
        raise ExportError(f"{folder}: neither adapter_config.json nor model*.safetensors with a config.json")
    base = base_of(folder)
    family = load_family(base)
    clips = ClipStore()
    prompts = synthetic_prompts(family, clips)
    inputs = [inputs_of(prompt, family, clips) for prompt in prompts]
    ids = [prompt.example.id for prompt in prompts]
    dtype = str(family.embed_tokens.weight.dtype).removeprefix("torch.")
    target = Target("export", "adapter" if kind == "adapter" else "merged", folder, dtype)
    messages = [[dict(message) for message in prompt.messages] for prompt in prompts]
    logits, notes = run_fresh(family, base, [target], Expected(inputs, [], None, ids, messages, []))
    gap = largest(logits["export"], logits[f"base.{dtype}"])
    top = max(t.abs().max().item() for t in logits["export"])
    return {"folder": str(folder), "base": base, "takes_effect": gap > 1e-6 * max(top, 1.0),
            "max_abs_logit_diff_base": gap, "notes": notes}  # fmt: skip
