"""What a stock `vllm serve` 0.31 says to a trainer, from a policy of its own: a thread, the standard library, no vLLM.

    with FakeServer(cases.policy()) as server:
        server.faults = ["500", "half"]      the next two answers; then sound ones
        server.always = "stale"              every answer
        server.die(); server.revive()        forgets its adapters, as a restarted process does

It keeps what makes vLLM dangerous: a name that is loaded is refused, an unknown one is a 404, a clip is known by its
uuid and not looked at again, the key guards /v1 and /inference alone.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import soundfile
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from covo_rl.config import RolloutConfig
from covo_rl.engines import servers
from covo_rl.engines.own import sample
from covo_rl.policy import Policy
from covo_rl.policy.published import published_state
from covo_rl.policy.saved_adapter import read_adapter
from covo_rl.serve.fetch import ADAPTER, fetched, is_address
from covo_rl.types import Clip, Example, Group, Prompt

BASE = "base"


def hurry(monkeypatch) -> None:
    """Pauses and looks of hundredths of a second in place of seconds."""
    monkeypatch.setattr(servers, "PAUSES", (0.0, 0.01, 0.02))
    monkeypatch.setattr(servers, "HEALTH_EVERY", 0.05)
    monkeypatch.setattr(servers, "HEALTH_SECONDS", 1.0)


class Refused(Exception):
    """An answer other than 200, as vLLM words it."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class FakeServer:
    """Faults of an answer: 500, drop, half, cut, hang, huge, wrong ids, wrong model, nan, no logprob, short,
    stale, miss.

    `no_op`: adapters load and change nothing. `sick`: /health says so. `kills`: seeds of groups that end the server.
    """

    def __init__(self, policy: Policy, *, key: str = "", max_model_len: int = 4096, delay: float = 0.0) -> None:
        self.policy, self.key, self.max_model_len, self.delay = policy, key, max_model_len, delay
        lora = self._tensors() if policy.has_adapter else {}
        self.weights = {BASE: {name: torch.zeros_like(t) for name, t in lora.items()}}
        self.first = {} if lora else {name: t.clone() for name, t in policy.family.model.state_dict().items()}
        self.updating = False
        self.keeps_features = False  # of an encoder that has changed since, whatever it is told
        self.takes: dict[str, int] = {}  # path -> how many more times it is answered before a 500
        self.faults: list[str] = []
        self.always = ""
        self.no_op = False
        self.sick = False  # /health says 503
        self.requests: list[tuple[str, dict]] = []
        self.answered: Counter[int] = Counter()  # seed of a group -> whole answers
        self.encoded = 0
        self.errors: list[str] = []
        self.clips: dict[str, str] = {}  # uuid -> content of the first sound that came with it
        self.version = "0.31.0"
        self.weight_version: str | None = None
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.port = 0
        self._begin()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.die()
        assert not self.errors, self.errors[0]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def adapters(self) -> list[str]:
        return [name for name in self.weights if name != BASE]

    def paths(self) -> Counter[str]:
        """How often each endpoint was asked."""
        return Counter(path for path, _ in self.requests)

    # -- life ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            do_GET = do_POST = lambda self: fake._handle(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, allow_reuse_address, block_on_close, request_queue_size = True, True, False, 128

            def handle_error(self, *_: object) -> None:
                error = sys.exception()
                if not isinstance(error, OSError):  # of a client that went away
                    fake.errors.append("".join(traceback.format_exception(error)))

        self.over.clear()
        self.connections: list[socket.socket] = []
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def die(self) -> None:
        """As a killed process: what is under way ends, nothing listens."""
        if self.over.is_set():
            return
        self.over.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def revive(self) -> None:
        """Started anew at the same address, with no adapter and no clip."""
        self.weights = {BASE: self.weights[BASE]}
        self.weight_version, self.updating = None, False
        self.policy.family.model.load_state_dict(self.first, strict=False)
        self.policy.store.clear()
        self.clips = {}
        self._begin()

    # -- HTTP ----------------------------------------------------------------------------------------------------

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        self.connections.append(handler.connection)
        path = urlsplit(handler.path).path
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        asked = json.loads(body) if body else {}
        self.requests.append((path, asked))
        fault = ""
        try:
            guarded = path.startswith(("/v1", "/inference"))
            if guarded and self.key and handler.headers.get("Authorization") != f"Bearer {self.key}":
                raise Refused(401, "Unauthorized")
            if path == "/inference/v1/generate":
                fault = self._fault()
                answer = self._generate(asked, fault)
            else:
                answer = self._other(path, asked)
            code, content = 200, answer if isinstance(answer, str) else json.dumps(answer)
        except Refused as refused:
            error = {"message": refused.message, "type": "x", "param": None, "code": refused.code}
            code, content = refused.code, json.dumps({"error": error})
        if not self.over.is_set():
            self._send(handler, code, content.encode(), fault)

    def _send(self, handler: BaseHTTPRequestHandler, code: int, content: bytes, fault: str) -> None:
        if fault == "drop":
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        handler.send_response(code)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content) if fault != "huge" else 10**12))
        handler.end_headers()
        with suppress(OSError):
            if fault == "huge":
                while not self.over.is_set():
                    handler.wfile.write(b" " * 65536)
            handler.wfile.write(content[: len(content) // 2] if fault == "half" else content)
            if fault == "half":
                handler.wfile.flush()
                handler.connection.shutdown(socket.SHUT_RDWR)

    def _fault(self) -> str:
        with self.lock:
            return self.faults.pop(0) if self.faults else self.always

    def _other(self, path: str, asked: dict) -> object:
        if path == "/health":
            if self.sick:
                raise Refused(503, "")
            return ""
        if path == "/version":
            return {"version": self.version}
        if path == "/v1/models":
            rows = [{"id": BASE, "root": BASE, "parent": None, "max_model_len": self.max_model_len}]
            return {"object": "list", "data": rows + [{"id": name, "parent": BASE} for name in self.adapters]}
        if path == "/v1/load_lora_adapter":
            path = asked["lora_path"]  # an address goes through covo_rl's gate first
            folder = fetched(path, ADAPTER) if is_address(path) else Path(path)
            return self._load(asked["lora_name"], folder, bool(asked.get("load_inplace")))
        if path == "/v1/unload_lora_adapter":
            if self.weights.pop(asked["lora_name"], None) is None:
                raise Refused(404, f"The lora adapter '{asked['lora_name']}' cannot be found.")
            return f"Success: LoRA adapter '{asked['lora_name']}' removed successfully."
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path in ("/reset_mm_cache", "/reset_encoder_cache"):
            self.clips.clear()
            if not self.keeps_features:
                self.policy.store.clear()
            return ""
        if path == "/weight_info":
            return {"weight_version": self.weight_version}
        if path in ("/start_weight_update", "/update_weights", "/finish_weight_update"):
            return self._update(path, asked)
        raise Refused(404, "Not Found")

    def _update(self, path: str, asked: dict) -> object:
        left = self.takes.get(path)
        if left is not None:
            self.takes[path] = max(left - 1, 0)
        if left == 0 or self.updating == (path == "/start_weight_update"):
            self.updating = False
            raise Refused(500, f"{path} out of order or failed")
        self.updating = path != "/finish_weight_update"
        if path == "/update_weights":
            source = asked["update_info"]["source"]
            parent, _, name = source.rpartition("/")
            file = (fetched(parent, [name]) if is_address(source) else Path(parent)) / name
            names, state = published_state(self.policy.family.model), self.policy.family.model.state_dict()
            for key, value in load_file(file).items():
                state[names[key].name].copy_(value)
        elif path == "/finish_weight_update":
            self.weight_version = asked.get("weight_version")
        return {"message": "done"}

    def _load(self, name: str, folder: Path, in_place: bool) -> str:
        if name in self.weights and not in_place:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
                               "place, set 'load_inplace' to True.")  # fmt: skip
        if not (folder / "adapter_config.json").is_file():
            raise Refused(404, f"Loading lora {name} failed: No adapter found for {folder}")
        tensors = dict(read_adapter(folder).tensors)
        if unknown := tensors.keys() ^ self.weights[BASE].keys():
            raise Refused(500, f"unexpected modules {sorted(unknown)[:3]}")
        self.weights[name] = self.weights[BASE] if self.no_op else tensors
        return f"Success: LoRA adapter '{name}' added successfully."

    # -- sampling ------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(self.policy.model)

    def _generate(self, asked: dict, fault: str) -> object:
        if fault == "500":
            raise Refused(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.")
        if fault == "miss":
            raise Refused(500, "Encoder cache miss for 0123abcd.")
        if fault in ("hang", "huge"):
            if fault == "hang":
                self.over.wait(60)
            return ""
        time.sleep(self.delay)
        name, how = asked.get("model") or BASE, asked["sampling_params"]
        if name not in self.weights:
            raise Refused(404, f"The model `{name}` does not exist.")
        with self.lock:
            prompt = self._prompt(asked)
            if (total := len(prompt.input_ids) + how["max_tokens"]) > self.max_model_len:
                raise Refused(400, f"This model's maximum context length is {self.max_model_len} tokens, not {total}.")
            group = self._sample(prompt, how, self.adapters[0] if fault == "stale" else name)
        if fault == "short":
            group = replace(group, rollouts=group.rollouts[1:])
        answer = self._answer(group, fault, "policy-of-yesterday" if fault == "wrong model" else name)
        text = json.dumps(answer)
        self.answered[how["seed"]] += fault not in ("drop", "half", "cut")
        return text[: len(text) // 2] if fault == "cut" else text

    def _prompt(self, asked: dict) -> Prompt:
        """One audio id of each clip becomes as many as it has slots; a clip that is known by its uuid is not read."""
        family, store, keys = self.policy.family, self.policy.clips, []
        for part in asked.get("content_parts") or ():
            if part["uuid"] not in self.clips:
                data = base64.b64decode(part["url"].removeprefix("data:audio/wav;base64,"), validate=True)
                samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
                self.clips[part["uuid"]] = store.key(Clip(array=samples, sampling_rate=rate))
                self.encoded += 1
            keys.append(self.clips[part["uuid"]])
        slots = [family.clip_slots(*store.waveform(key)) for key in keys]
        waiting, ids = iter(slots), []
        for i in asked["token_ids"]:
            ids += [i] * (next(waiting) if i == family.audio_token_id else 1)
        if next(waiting, None) is not None:
            raise Refused(400, "more clips than audio tokens")
        return Prompt(Example("fake", (), ""), (), "", tuple(ids), tuple(keys), tuple(slots))

    def _sample(self, prompt: Prompt, how: dict, name: str) -> Group:
        ends = set(self.policy.family.eos_token_ids)
        if set(how["stop_token_ids"]) != ends or how["logprobs"] != 0 or how["detokenize"] is not False:
            raise Refused(400, f"a trainer asks for the end tokens {ends}, logprobs 0, and no text; got {how}")
        config = RolloutConfig(
            temperature=how["temperature"] or 1.0, top_p=how.get("top_p", 1.0), top_k=max(how.get("top_k", 0), 0),
            min_p=how.get("min_p", 0.0), max_completion_length=how["max_tokens"],
        )  # fmt: skip
        if self.policy.has_adapter:
            set_peft_model_state_dict(self.policy.model, self.weights[name])
        with torch.no_grad():
            return sample(
                self.policy, [prompt], self.policy.features([prompt]), config, seed=how["seed"] or 0,
                num_generations=how["n"], greedy=not how["temperature"],
            )[0]  # fmt: skip

    def _answer(self, group: Group, fault: str, name: str) -> dict:
        choices = []
        for g, rollout in enumerate(group.rollouts):
            content = [
                {"token": f"token_id:{i}", "logprob": max(logp, -9999.0), "bytes": None, "top_logprobs": []}
                for i, logp in zip(rollout.completion_ids, rollout.logps, strict=True)
            ]
            if fault == "nan":
                content[0]["logprob"] = float("nan")
            if fault == "no logprob":
                content[0]["logprob"] = -9999.0  # what vLLM writes where it has none
            choices.append({
                "index": g, "logprobs": {"content": content}, "finish_reason": rollout.stop_reason,
                "token_ids": list(rollout.completion_ids), "routed_experts": None, "sampling_mask": None,
            })  # fmt: skip
        prompt_ids = list(group.prompt.input_ids)
        if fault == "wrong ids":
            prompt_ids.insert(1, prompt_ids[1])
        return {
            "request_id": "r", "model": name, "created": 0, "choices": choices, "usage": None, "prompt_logprobs": None,
            "prompt_token_ids": prompt_ids, "mm_placeholders": None, "metrics": None,
        }  # fmt: skip
