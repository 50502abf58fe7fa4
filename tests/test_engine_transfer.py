"""Adapters over HTTP: rank 0 serves its folder to those who know the key, a gate before vLLM fetches, and guards."""

import asyncio
import json
import urllib.error
import urllib.request

import pytest

from covo_rl.engines.base import EngineError
from covo_rl.engines.served_files import ServedFiles
from covo_rl.serve import fetch
from covo_rl.serve.gate import MAX_BODY, Gate

KEY = "k-123"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SERVER = "http://127.0.0.1:8000"


@pytest.fixture
def shelf(tmp_path):
    """(files, folder of an adapter, its address)."""
    folder = tmp_path / "run" / "policy-1"
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text('{"r": 4}')
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 4096)
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "run" / "lock").write_text("")
    (folder / "out.json").symlink_to(tmp_path / "secret.json")
    files = ServedFiles(tmp_path / "run", KEY, [SERVER])
    yield files, folder, f"{files.roots[SERVER]}/policy-1"
    files.close()


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """Where the server's side keeps what it fetched."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setattr(fetch, "MEMORY", str(tmp_path / "memory"))
    (tmp_path / "memory").mkdir()
    return tmp_path / "memory"


def get(url, key=KEY):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    return urllib.request.urlopen(request, timeout=10).read()


def test_files_are_served_to_who_knows_the_key(shelf):
    _, folder, url = shelf
    assert url.startswith("http://127.0.0.1:") and KEY not in url
    assert get(f"{url}/{WEIGHTS}") == (folder / WEIGHTS).read_bytes()
    for key in ("", "other", KEY[:-1], KEY + "x", "ключ".encode().decode("latin-1")):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{url}/{WEIGHTS}", key)


@pytest.mark.parametrize(
    "path",
    ["../../secret.json", "..%2f..%2fsecret.json", "out.json", "", "none.json", "../lock", "%00.json", "a" * 5000],
)
def test_nothing_else_is_served(path, shelf):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(f"{shelf[2]}/{path}")


def test_without_a_key_nothing_is_served_at_all(tmp_path):
    with pytest.raises(EngineError, match="needs VLLM_API_KEY, here and at the servers"):
        ServedFiles(tmp_path, "", [SERVER])


class Behind:
    """What lies behind the gate: notes every request, and answers with `status`."""

    def __init__(self, status=200):
        self.status, self.requests = status, []

    async def __call__(self, scope, receive, send):
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        content = json.loads(body) if body else None
        assert int(dict(scope["headers"])[b"content-length"]) == len(body)
        path = content.get("lora_path") if isinstance(content, dict) else None
        files = {p.name: p.read_bytes() for p in fetch.Path(path or "none").glob("*")}
        self.requests.append((scope["path"], content, files))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def ask(gate, path, content=None, key=KEY, method="POST"):
    """(status, JSON) of a request through the gate, whose body comes in two pieces."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    pieces = iter([(body[:5], True), (body[5:], False)])
    headers = [(b"content-length", b"%d" % len(body)), (b"authorization", f"Bearer {key}".encode())]
    said = []

    async def receive():
        piece, more = next(pieces)
        return {"type": "http.request", "body": piece, "more_body": more}

    async def send(message):
        said.append(message)

    asyncio.run(gate({"type": "http", "path": path, "method": method, "headers": headers}, receive, send))
    return said[0]["status"], json.loads(said[1]["body"])


def test_an_adapter_is_fetched_handed_on_as_a_folder_and_forgotten_when_unloaded(shelf, memory):
    gate = Gate(behind := Behind())
    asked = {"lora_name": "policy-1", "lora_path": shelf[2]}
    assert ask(gate, "/v1/load_lora_adapter", asked)[0] == 200
    ((_, content, files),) = behind.requests
    assert content["lora_name"] == "policy-1" and content["lora_path"].startswith(str(memory))
    assert files == {name: (shelf[1] / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    assert len(list(memory.iterdir())) == 1, "kept: vLLM reads it again after an eviction"
    ask(gate, "/v1/unload_lora_adapter", {"lora_name": "policy-1"})
    assert not list(memory.iterdir())


def test_a_path_of_the_server_is_handed_on_untouched(shelf, memory):
    gate = Gate(behind := Behind())
    asked = {"lora_name": "policy-1", "lora_path": str(shelf[1]), "load_inplace": False}
    assert ask(gate, "/v1/load_lora_adapter", asked)[0] == 200 and behind.requests[0][1] == asked
    assert not list(memory.iterdir())


def test_what_vllm_refuses_is_not_kept(shelf, memory):
    gate = Gate(Behind(400))
    assert ask(gate, "/v1/load_lora_adapter", {"lora_name": "policy-1", "lora_path": shelf[2]})[0] == 400
    assert not list(memory.iterdir()) and gate.folders == {}


def test_nothing_is_left_of_an_adapter_whose_client_has_gone(shelf, memory):
    async def gone(*_):
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        ask(Gate(gone), "/v1/load_lora_adapter", {"lora_name": "policy-1", "lora_path": shelf[2]})
    assert not list(memory.iterdir())


def test_what_cannot_be_fetched_never_reaches_vllm(shelf, memory, monkeypatch):
    gate = Gate(behind := Behind())
    (shelf[1] / WEIGHTS).unlink()
    status, answer = ask(gate, "/v1/load_lora_adapter", {"lora_name": "policy-1", "lora_path": shelf[2]})
    assert status == 502 and f"{WEIGHTS} from 127.0.0.1:" in answer["error"]["message"]
    monkeypatch.setenv("VLLM_API_KEY", "")
    status, answer = ask(Gate(behind), "/v1/load_lora_adapter", {"lora_name": "policy-1", "lora_path": shelf[2]})
    assert status == 502 and "VLLM_API_KEY is not set for this server" in answer["error"]["message"]
    assert behind.requests == [] and not list(memory.iterdir())


def test_a_longer_file_than_allowed_is_not_read_to_its_end(shelf, memory, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_FILE", 1000)
    status, answer = ask(Gate(Behind()), "/v1/load_lora_adapter", {"lora_name": "policy-1", "lora_path": shelf[2]})
    assert status == 502 and "longer than 1000 bytes" in answer["error"]["message"] and not list(memory.iterdir())


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/collective_rpc", "/update_weights", "/sleep", "/v1/models"]
)
def test_the_key_is_wanted_everywhere_also_where_vllm_asks_for_none(path, shelf, memory):
    gate = Gate(behind := Behind())
    for key in ("", "other"):
        assert ask(gate, path, {"lora_name": "policy-1", "lora_path": shelf[2]}, key)[0] == 401
    assert behind.requests == [] and not list(memory.iterdir())
    assert ask(gate, path, {"lora_name": "policy-1", "lora_path": shelf[2]})[0] == 200 and len(behind.requests) == 1


def test_health_needs_no_key(memory):
    assert ask(Gate(Behind()), "/health", key="", method="GET")[0] == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'"' + b"x" * MAX_BODY + b'"'])
def test_bodies_that_are_no_request_are_refused(body, memory):
    gate = Gate(behind := Behind())
    status, answer = ask(gate, "/v1/load_lora_adapter", body)
    assert status == 400 and "expected a JSON object" in answer["error"]["message"] and behind.requests == []
