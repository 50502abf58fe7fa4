"""A judge: text in, text out, with a disk cache, bounded concurrency, a timeout and retries.

    judge: openai:MODEL@https://host/v1      any endpoint with the chat completions interface
    judge: transformers:PATH                 a local model

The key of an endpoint is read from COVO_RL_JUDGE_KEY or OPENAI_API_KEY and is never stored. COVO_RL_JUDGE_URL is the
address where the spec has none; COVO_RL_JUDGE_CONCURRENCY and COVO_RL_JUDGE_TIMEOUT (seconds) bound the requests.
Replies are cached under COVO_RL_CACHE by model and prompt, at temperature 0.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from covo_rl.prompt import CONTROL, CUT
from covo_rl.resolve import cache_folder
from covo_rl.rewards.specs import RewardError
from covo_rl.types import UserError

RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
KEY_VARIABLES = ("COVO_RL_JUDGE_KEY", "OPENAI_API_KEY")
MAX_TOKENS = 400  # of a reply


class JudgeError(UserError, RuntimeError):
    """The judge gave no reply; the message says after what."""


class Judge(Protocol):
    """Whatever answers prompts: one reply or error per prompt, in order; never raises for a single prompt."""

    name: str

    def ask(self, prompts: Sequence[str]) -> list[str | JudgeError]: ...


class CachedJudge:
    """Asks equal prompts once and keeps every reply in a file of its own, so that ranks and runs can share a folder."""

    def __init__(self, name: str, cache: Path | None) -> None:
        self.name, self.cache = name, cache

    def ask(self, prompts: Sequence[str]) -> list[str | JudgeError]:
        replies: dict[str, Any] = {}
        for prompt in dict.fromkeys(prompts):
            path = self._file(prompt)
            replies[prompt] = path.read_text(encoding="utf-8") if path and path.is_file() else None
        new = [prompt for prompt, reply in replies.items() if reply is None]
        replies.update(zip(new, self.answers(new), strict=True))
        return [replies[prompt] for prompt in prompts]

    def answers(self, prompts: list[str]) -> list[str | JudgeError]:
        """Replies to different prompts that are in no cache; calls `remember` for each as soon as it is there."""
        raise NotImplementedError

    def remember(self, prompt: str, reply: str) -> None:
        """Write the reply under a name of its own, then rename: another rank may write the same."""
        if path := self._file(prompt):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                file.write(reply)
            os.replace(file.name, path)

    def forget(self, prompt: str) -> None:
        """Drop a reply that was no verdict, so that the next run asks again."""
        if path := self._file(prompt):
            path.unlink(missing_ok=True)

    def _file(self, prompt: str) -> Path | None:
        digest = hashlib.sha256(f"{self.name}\x00{prompt}".encode("utf-8", "replace")).hexdigest()
        return self.cache and self.cache / digest[:2] / f"{digest}.txt"


class EndpointJudge(CachedJudge):
    """An OpenAI-compatible endpoint, which is sent control tokens of chat templates as `< |im_end|>`.

    `timeout` and `backoff` in seconds; `retries` after the first try.
    """

    def __init__(
        self, model: str, url: str, *, concurrency: int = 16, timeout: float = 30.0, retries: int = 4,
        backoff: float = 0.5, cache: Path | None = None,
    ) -> None:  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise RewardError(f"judge address {url!r}: must start with http:// or https://")
        self.model, self.url = model, url.rstrip("/")
        self.concurrency, self.timeout, self.retries, self.backoff = concurrency, timeout, retries, backoff
        super().__init__(f"openai:{model}@{self.url}", cache)

    def answers(self, prompts: list[str]) -> list[str | JudgeError]:
        """At most `concurrency` requests at a time."""
        with ThreadPoolExecutor(max_workers=max(1, min(self.concurrency, len(prompts)))) as pool:
            return list(pool.map(self._answer, prompts))

    def _answer(self, prompt: str) -> str | JudgeError:
        problem = ""
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt * (1 + random.random() / 4)
            try:
                reply = self._post(prompt)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                if error.code not in RETRIED:
                    break
                with suppress(ValueError):
                    wait = max(wait, float(error.headers.get("Retry-After") or 0))
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                problem = str(getattr(error, "reason", None) or error) or type(error).__name__
            except (ValueError, LookupError, TypeError) as error:
                problem = f"an unreadable response ({error})"
            else:
                self.remember(prompt, reply)
                return reply
            if attempt < self.retries:
                time.sleep(min(wait, self.timeout))
        return JudgeError(f"judge {self.name}: {problem}, after {attempt + 1} tries")

    def _post(self, prompt: str) -> str:
        content = CONTROL.sub(lambda match: " ".join(filter(None, match.groups())), prompt)
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        headers = {"Content-Type": "application/json"}
        if key := next(filter(None, map(os.environ.get, KEY_VARIABLES)), None):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            content = json.loads(response.read(1_000_000))["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError("the message has no text")
        return content


class LocalJudge(CachedJudge):
    """A transformers model on this machine, greedy, in batches. `generate` replaces the model in tests."""

    def __init__(
        self, path: str, *, batch_size: int = 16, cache: Path | None = None,
        generate: Callable[[list[str]], list[str]] | None = None,
    ) -> None:  # fmt: skip
        self.path, self.batch_size, self.generate = path, batch_size, generate
        super().__init__(f"transformers:{path}", cache)

    def answers(self, prompts: list[str]) -> list[str | JudgeError]:
        replies: list[str | JudgeError] = []
        for start in range(0, len(prompts), self.batch_size):
            self.generate = self.generate or self._model()
            batch = prompts[start : start + self.batch_size]
            for prompt, reply in zip(batch, self.generate(batch), strict=True):
                self.remember(prompt, reply)
                replies.append(reply)
        return replies

    def _model(self) -> Callable[[list[str]], list[str]]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from covo_rl.models.text import shielded, token_ids

        tokenizer: Any = AutoTokenizer.from_pretrained(self.path, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype="auto")
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

        def generate(prompts: list[str]) -> list[str]:
            prompts = [shielded([prompt], tokenizer)[0] for prompt in prompts]
            if tokenizer.chat_template is not None:
                chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
                prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
            rows = [token_ids(tokenizer, prompt.split(CUT)) for prompt in prompts]
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding=True).to(model.device)
            with torch.inference_mode():
                ids = model.generate(**batch, max_new_tokens=MAX_TOKENS, do_sample=False)
            return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

        return generate


@lru_cache(maxsize=8)
def judge_from_spec(spec: str) -> Judge:
    """`openai:MODEL@URL`, `openai:MODEL` with COVO_RL_JUDGE_URL set, or `transformers:PATH`.

    Raises:
        RewardError: anything else, or no address.
    """
    kind, _, rest = spec.partition(":")
    cache = cache_folder() / "judge"
    if kind == "transformers" and rest:
        return LocalJudge(rest, cache=cache)
    if kind != "openai" or not rest:
        raise RewardError(f"judge {spec!r}: write openai:MODEL@URL or transformers:PATH")
    model, _, url = rest.partition("@")
    url = url or os.environ.get("COVO_RL_JUDGE_URL", "")
    if not model or not url:
        raise RewardError(f"judge {spec!r} has no address: write openai:MODEL@URL or set COVO_RL_JUDGE_URL")
    concurrency, timeout = _variable("COVO_RL_JUDGE_CONCURRENCY", 16), _variable("COVO_RL_JUDGE_TIMEOUT", 30)
    return EndpointJudge(model, url, cache=cache, concurrency=int(concurrency), timeout=timeout)


def _variable(name: str, default: float) -> float:
    text = os.environ.get(name, str(default))
    try:
        if 0.1 <= (value := float(text)) <= 1e6:
            return value
    except ValueError:
        pass
    raise RewardError(f"{name}={text!r}: expected a number from 0.1 to 1e6")
