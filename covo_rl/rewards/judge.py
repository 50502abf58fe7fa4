"""A judge: text in, text out, with a disk cache, bounded concurrency, a timeout and retries.

    judge: openai:MODEL@https://host/v1      any endpoint with the chat completions interface; with judge_audio: true
                                             it is sent the clips as well
    judge: transformers:PATH                 a local model
    judge: command:PROGRAM                   a program of yours: {"id", "prompt"} -> {"id", "text"}, a line each

The key of an endpoint is read from COVO_RL_JUDGE_KEY or OPENAI_API_KEY and is never stored. COVO_RL_JUDGE_URL is the
address where the spec has none; COVO_RL_JUDGE_CONCURRENCY and COVO_RL_JUDGE_TIMEOUT (seconds) bound the requests.
Replies are cached under COVO_RL_CACHE by model, prompt and content of the clips, at temperature 0.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from covo_rl.audio import AudioError
from covo_rl.data.transport import OriginError, hidden, message_in
from covo_rl.data.transport import exchange as post
from covo_rl.prompt import CONTROL, CUT
from covo_rl.resolve import cache_folder
from covo_rl.rewards.call import seconds_left
from covo_rl.rewards.program import Program, clip_paths, reply_text
from covo_rl.rewards.replies import Asked, CachedJudge, Judge, JudgeError, whole_text
from covo_rl.rewards.specs import RewardError
from covo_rl.rewards.transport import HINTS, audio_parts, check_address, env_limit, judge_key
from covo_rl.types import shown

RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
MARGIN_SECONDS = 2.0  # of a component's time, at most a fifth of it, for what is left to do with the replies
_local_turn = threading.Lock()  # one local model is loaded, and one batch is generated at a time


def _deadline() -> float:
    """When replies must be there, on time.monotonic(): some time before the component that asks is stopped."""
    left = seconds_left()
    return time.monotonic() + left - min(MARGIN_SECONDS, left / 5)


class EndpointJudge(CachedJudge):
    """An OpenAI-compatible endpoint, which is sent control tokens of chat templates as `< |im_end|>`.

    `timeout` and `backoff` in seconds; `retries` after the first try; `hears`: its model takes `input_audio`.
    """

    def __init__(
        self, model: str, url: str, *, concurrency: int = 16, timeout: float = 30.0, retries: int = 4,
        backoff: float = 0.5, cache: Path | None = None, hears: bool = False,
    ) -> None:  # fmt: skip
        check_address(url)
        judge_key()
        self.model, self.url = model, url.rstrip("/").removesuffix("/chat/completions")
        self.concurrency, self.timeout, self.retries, self.backoff = concurrency, timeout, retries, backoff
        self.hears = hears
        super().__init__(f"openai:{model}@{self.url}", cache)

    def answers(self, asked: list[Asked]) -> list[str | JudgeError]:
        """At most `concurrency` requests at a time. What is not there in the component's time is an error, no more."""
        replies: dict[str, str | JudgeError] = {}
        key, begun, deadline, waiting = judge_key(), time.monotonic(), _deadline(), asked[::-1]

        def work() -> None:
            with suppress(IndexError):  # nothing waits any more
                while time.monotonic() < deadline:
                    one = waiting.pop()
                    replies[one.key] = self._answer(one, key, deadline)

        threads = [threading.Thread(target=work, daemon=True) for _ in asked[: max(1, self.concurrency)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(min(max(deadline - time.monotonic(), 0), threading.TIMEOUT_MAX))
        late = JudgeError(f"judge {self.name}: no answer in the {deadline - begun:.3g} s that this step has")
        return [replies.get(one.key, late) for one in asked]

    def _answer(self, asked: Asked, key: str, deadline: float) -> str | JudgeError:
        problem, tries, more = "no time left", 0, ""
        try:
            sounds = audio_parts(asked.clips)
        except AudioError as error:
            return JudgeError(f"judge {self.name}: {error}")
        for attempt in range(self.retries + 1):
            seconds = min(self.timeout, deadline - time.monotonic())
            if seconds <= 0:
                break
            wait, tries, more = self.backoff * 2**attempt * (1 + random.random() / 4), attempt + 1, ""
            try:
                reply = self._post(asked.prompt, key, seconds, sounds)
            except urllib.error.HTTPError as error:
                problem, more = f"HTTP {error.code}", f": {shown(error.msg)}{HINTS.get(error.code, '')}"
                if error.code not in RETRIED:
                    break
                with suppress(ValueError):
                    wait = max(wait, float(error.headers.get("Retry-After") or 0))
            except OriginError as error:
                problem = str(error)
                break
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                problem = shown(str(getattr(error, "reason", None) or error) or type(error).__name__)
            except Exception as error:  # whatever a stranger sends: this reply is lost, and said, not the others
                problem = f"an unreadable response ({type(error).__name__}: {shown(error)})"
            else:
                self.kept.put(asked.key, reply)
                return reply
            if attempt == self.retries or time.monotonic() + wait >= deadline:
                break
            time.sleep(min(wait, self.timeout))
        what = f"{problem}, after {tries} tries{more}".replace(key or "\n", "***")  # a server may repeat the key
        return JudgeError(f"judge {self.name}: {what}")

    def _post(self, prompt: str, key: str, seconds: float, sounds: Sequence[dict[str, Any]] = ()) -> str:
        text = CONTROL.sub(lambda match: " ".join(filter(None, match.groups())), prompt)
        content = [*sounds, {"type": "text", "text": text}] if sounds else text
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, **self.sampling}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        response = post(f"{self.url}/chat/completions", json.dumps(body).encode(), headers, seconds)
        try:
            reply = json.loads(response)["choices"][0]["message"]["content"]
        except (LookupError, TypeError):
            raise ValueError(message_in(response) or "it has no choices[0].message.content") from None
        if not isinstance(reply, str):
            raise TypeError("the message has no text")
        return whole_text(reply)


class LocalJudge(CachedJudge):
    """A transformers model on this machine, in batches. `generate` replaces the model in tests."""

    def __init__(
        self, path: str, *, batch_size: int = 16, cache: Path | None = None,
        generate: Callable[[list[str]], list[str]] | None = None,
    ) -> None:  # fmt: skip
        self.path, self.batch_size, self.generate = path, batch_size, generate
        super().__init__(f"transformers:{path}", cache)

    def answers(self, asked: list[Asked]) -> list[str | JudgeError]:
        replies: list[str | JudgeError] = []
        deadline = _deadline()
        for start in range(0, len(asked), self.batch_size):
            replies += self._batch(asked[start : start + self.batch_size], deadline)
        return replies

    def _batch(self, asked: list[Asked], deadline: float) -> Sequence[str | JudgeError]:
        left = min(max(deadline - time.monotonic(), 0), threading.TIMEOUT_MAX)
        if not left or not _local_turn.acquire(timeout=left):
            return [JudgeError(f"judge {self.name}: no time left in this step")] * len(asked)
        try:
            replies = [whole_text(reply) for reply in (self.generate or self._generate)([one.prompt for one in asked])]
            for one, reply in zip(asked, replies, strict=True):
                self.kept.put(one.key, reply)
        except Exception as error:  # out of memory, say: these are lost, and said, not the batches before
            return [JudgeError(f"judge {self.name}: {type(error).__name__}: {shown(error)}")] * len(asked)
        finally:
            _local_turn.release()
        return replies

    def _generate(self, prompts: list[str]) -> list[str]:
        import torch

        from covo_rl.models.text import shielded, token_ids

        tokenizer, model = _local_model(self.path)
        prompts = [shielded([prompt], tokenizer)[0] for prompt in prompts]
        if tokenizer.chat_template is not None:
            chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        rows = [token_ids(tokenizer, prompt.split(CUT)) for prompt in prompts]
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding=True).to(model.device)
        how = {"do_sample": False}
        if self.sampling["temperature"]:
            how = {name: self.sampling[name] for name in ("temperature", "top_p") if name in self.sampling}
            how["do_sample"] = True
        with torch.inference_mode(), torch.random.fork_rng():  # a draw is the vote's, not of the run around it
            torch.manual_seed(self.number)
            ids = model.generate(**batch, max_new_tokens=self.sampling["max_tokens"], **how)
        return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@lru_cache(maxsize=1)
def _local_model(path: str) -> tuple[Any, Any]:
    """(tokenizer, model) of a folder or hub name, loaded once for all votes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    model.to(local_device()).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model


class CommandJudge(CachedJudge):
    """A program that is sent {"id", "prompt", "temperature" ...} and, of a judge that hears, the "paths" of the clips,
    a line each, and writes {"id", "text"}."""

    def __init__(self, command: str, *, cache: Path | None = None, hears: bool = False, **limits: Any) -> None:
        self.program, self.hears = Program(command, **limits), hears
        super().__init__(f"command:{command} {self.program.version[:12]}", cache)

    def answers(self, asked: list[Asked]) -> list[str | JudgeError]:
        replies: dict[str, Any] = {}
        keys, lines = {}, []

        def keep(name: str, text: str | None) -> None:
            self.kept.drop(keys[name]) if text is None else self.kept.put(keys[name], text)

        with clip_paths() as path:
            for number, one in enumerate(asked):
                try:
                    sounds = {"paths": [path(clip) for clip in one.clips]} if one.clips else {}
                except AudioError as error:
                    replies[one.key] = error
                    continue
                keys[str(number)] = one.key
                lines.append({"id": str(number), "prompt": one.prompt, **sounds, **self.sampling, "vote": self.number})
            found = self.program.ask(lines, reply_text, keep)
        replies |= zip(keys.values(), found, strict=True)
        return [reply if isinstance(reply, str) else JudgeError(f"judge {self.name}: {reply}")
                for reply in (replies[one.key] for one in asked)]  # fmt: skip


def local_device() -> str:
    """The GPU of this rank, else the CPU. A thread starts with GPU 0 as its current one, so "cuda" would be that."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


@lru_cache(maxsize=8)
def judge_from_spec(spec: str, hears: bool = False) -> Judge:
    """`openai:MODEL@URL`, `openai:MODEL` with COVO_RL_JUDGE_URL set, `transformers:PATH` or `command:PROGRAM`; `hears`:
    is sent clips.

    Raises:
        RewardError: anything else, no address, or a local judge, which reads text only, is to hear.
    """
    kind, _, rest = spec.partition(":")
    cache = cache_folder() / "judge"
    if kind == "command" and rest:
        return CommandJudge(rest, cache=cache, hears=hears)
    if hears and kind != "openai":
        raise RewardError(
            f"judge_audio: judge {hidden(spec)!r} reads text only; write openai:MODEL@URL, or leave it out"
        )
    if kind == "transformers" and rest:
        return LocalJudge(rest, cache=cache)
    if kind != "openai" or not rest:
        raise RewardError(f"judge {hidden(spec)!r}: write openai:MODEL@URL, transformers:PATH or command:PROGRAM")
    model, _, url = rest.partition("@")
    url = url or os.environ.get("COVO_RL_JUDGE_URL", "")
    if not model or not url:
        raise RewardError(f"judge {hidden(spec)!r} has no address: write openai:MODEL@URL or set COVO_RL_JUDGE_URL")
    concurrency = env_limit("COVO_RL_JUDGE_CONCURRENCY", 16)
    timeout = env_limit("COVO_RL_JUDGE_TIMEOUT", 30)
    return EndpointJudge(model, url, cache=cache, concurrency=int(concurrency), timeout=timeout, hears=hears)
