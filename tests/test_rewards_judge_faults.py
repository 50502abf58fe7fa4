"""A judge that drips, never ends, redirects or sends rubbish; a cache that is damaged; a key that must stay secret."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import types
from contextlib import suppress

import numpy as np
import pytest
from test_rewards_judge import GOOD, ROW, verdict

from covo_rl.config import RewardConfig
from covo_rl.data.transport import hidden, local, origin
from covo_rl.rewards import RewardError, score
from covo_rl.rewards import judge as judge_room
from covo_rl.rewards.columns import example_from_row, group_from_completions
from covo_rl.rewards.judge import EndpointJudge, JudgeError, LocalJudge, judge_from_spec, local_device

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def answer(text):
    """A whole response that says `text`."""
    body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
    return HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def raw(body):
    return HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def status(code, *headers):
    return "\r\n".join((f"HTTP/1.1 {code} x", "Content-Length: 0", *headers, "\r\n")).encode()


def drip(head):
    """`head`, then a byte now and then, for ever."""

    def send(connection, request):
        connection.sendall(head)
        while True:
            connection.sendall(b"a")
            time.sleep(0.05)

    return send


def flood(connection, request):
    """A body in chunks, which never ends."""
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")


class Server:
    """A socket that listens: every request goes to `act`, which returns bytes to send, or sends by itself."""

    def __init__(self, act):
        self.act, self.requests = act, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with suppress(OSError):
            while True:
                threading.Thread(target=self.answer, args=(self.socket.accept()[0],), daemon=True).start()

    def answer(self, connection):
        with connection, suppress(OSError):
            head, _, body = self.read(connection)
            self.requests.append(head)
            act = self.act(json.loads(body)["messages"][0]["content"]) if callable(self.act) else self.act
            connection.sendall(act) if isinstance(act, bytes) else act(connection, body)

    @staticmethod
    def read(connection):
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l"))
        while len(body) < length:
            body += connection.recv(65536)
        return head, length, body


@pytest.fixture
def server():
    made = []

    def start(act):
        made.append(Server(act))
        return made[-1]

    yield start
    for one in made:
        one.socket.close()


def judge(server, **options):
    return EndpointJudge("m", server.url, **{"timeout": 5.0, "backoff": 0.01, "retries": 1, **options})


def variants(*words):
    """A group of good completions that differ in a word."""
    return group_from_completions(example_from_row(ROW), [GOOD.replace("on,", f"{word},") for word in words])


def steady(prompt):
    return answer(verdict(prompt))


TROUBLE = {
    "body drips": drip(HEAD + b"Content-Length: 100000\r\n\r\n"), "headers drip": drip(HEAD + b"X: "),
    "status drips": drip(b"HTTP"), "body never ends": flood, "body drips, no length": drip(HEAD + b"\r\n{"),
    "nothing comes": lambda connection, request: time.sleep(60),
}  # fmt: skip


@pytest.mark.parametrize("name", TROUBLE)
def test_a_request_ends_after_its_time_in_total(server, name):
    """finding 14: with a byte now and then the process never ended."""
    threads, start = threading.active_count(), time.perf_counter()
    reply = judge(server(lambda prompt: TROUBLE[name]), timeout=0.4, retries=0).ask(["p"])[0]
    took = time.perf_counter() - start
    assert isinstance(reply, JudgeError) and ("timed out" in str(reply) or "longer than" in str(reply)) and took < 2
    time.sleep(0.3)
    assert threading.active_count() < threads + 15  # nobody reads on


def test_a_dripping_judge_does_not_keep_the_process(server):
    """finding 14"""
    url = server(lambda prompt: TROUBLE["headers drip"]).url
    code = f"from covo_rl.rewards.judge import EndpointJudge\nprint(EndpointJudge('m', {url!r}, timeout=0.5, "
    done = subprocess.run(
        [sys.executable, "-c", code + "retries=0).ask(['p'] * 3)[0])"], capture_output=True, text=True, timeout=60
    )
    assert "timed out after 0.5 s" in done.stdout and done.returncode == 0


def test_answers_that_came_are_kept_when_the_time_of_the_step_is_over(server, tmp_path):
    """finding 14: the limit covers all requests of a step; one that hung lost the others."""
    one = server(lambda prompt: TROUBLE["body drips"] if "stubborn" in prompt else steady(prompt))
    completions = [GOOD, GOOD.replace("rings", "rang"), GOOD.replace("on,", "stubborn,")]
    group = group_from_completions(example_from_row(ROW), completions)
    config = RewardConfig(rewards="consistency,thinking,format", reward_timeout=4.0)
    start = time.perf_counter()
    table = score([group], config, judge=judge(one, timeout=60.0, cache=tmp_path))
    assert time.perf_counter() - start < 6
    np.testing.assert_equal(table.rewards_PGR[0], [[1, 1, 1], [1, 1, 1], [np.nan, np.nan, 1]])
    why = table.missing[0, 2, "consistency"]
    assert why.startswith("failed: judge: ") and ("timed out" in why or "no answer in the 3.2 s" in why)
    np.testing.assert_equal(table.rewards_PG[0], [3, 3, np.nan])  # it leaves the group


def test_more_requests_than_the_step_has_time_for(server):
    """finding 14"""
    one = server(lambda prompt: (time.sleep(0.3), steady(prompt))[1])
    group = group_from_completions(example_from_row(ROW), [GOOD.replace("on,", f"{i},") for i in range(40)])
    table = score([group], RewardConfig(rewards="consistency", reward_timeout=1.5), judge=judge(one, concurrency=4))
    graded = int(np.isfinite(table.rewards_PGR).sum())
    assert (
        1 <= graded < 40
        and sum("no answer" in why or "timed out" in why for why in table.missing.values()) == 40 - graded
    )


RUBBISH = {
    "lone surrogate": raw(b'{"choices": [{"message": {"content": "\\ud800"}}]}'), "deep JSON": raw(b"[" * 200_000),
    "no JSON": raw(b"<html>"), "bad UTF-8": raw(b'{"choices": "\xff\xfe"}'), "a number": raw(b"17"),
    "null": raw(b"null"),
    "no text": raw(b'{"choices": [{"message": {"content": null}}]}'), "huge": raw(b" " * 2_000_000 + b"{}"),
    "short body": HEAD + b"Content-Length: 500\r\n\r\n{}", "no HTTP": b"hello\r\n\r\n", "nothing": b"",
    "long header": HEAD + b"X: " + b"a" * 100_000 + b"\r\n\r\n", "many headers": HEAD + b"X: a\r\n" * 500 + b"\r\n",
    "a huge number": raw(b'{"choices": ' + b"9" * 10_000 + b"}"), "deep reply": answer("[" * 100_000),
    "deep rationale": answer('{"rationale": ' + "[" * 900 + "]" * 900 + "}"),
    "bad chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", RUBBISH)
def test_one_unreadable_reply_costs_one_score(server, tmp_path, name):
    """finding 14: one lone surrogate, or deep JSON, and the whole batch was lost."""
    one = server(lambda prompt: RUBBISH[name] if "odd" in prompt else steady(prompt))
    group = group_from_completions(
        example_from_row(ROW), [GOOD, GOOD.replace("on,", "odd,"), GOOD.replace("on,", "up,")]
    )
    table = score([group], RewardConfig(rewards="consistency"), judge=judge(one, cache=tmp_path))
    np.testing.assert_equal(table.rewards_PGR[0, :, 0], [1, np.nan, 1])
    assert table.missing[0, 1, "consistency"].startswith("failed: judge: ")
    assert len(table.missing[0, 1, "consistency"]) < 700


@pytest.mark.parametrize("spoil", ["bytes", "cut", "empty", "folder", "unreadable", "earlier"])
def test_a_damaged_cache_costs_requests_and_is_said_once(server, tmp_path, caplog, spoil):
    """finding 14: one damaged file and the batch was lost."""
    one = server(steady)
    group = group_from_completions(example_from_row(ROW), [GOOD, GOOD.replace("on,", "up,")])
    config = RewardConfig(rewards="consistency")
    assert score([group], config, judge=judge(one, cache=tmp_path)).rewards_PG.tolist() == [[1, 1]]
    files = list(tmp_path.rglob("*.txt"))
    assert len(files) == 2
    for path in files:
        content = path.read_bytes()
        if spoil in ("folder", "unreadable"):
            path.unlink()
            path.mkdir() if spoil == "folder" else path.symlink_to(path)  # a loop: OSError
        else:
            changed = {"bytes": b"\xff\xfe" + content, "cut": content[:80], "empty": b"", "earlier": content[65:]}
            path.write_bytes(changed[spoil])
    spoiled = judge(one, cache=tmp_path)
    table = score([group], config, judge=spoiled)
    assert table.rewards_PG.tolist() == [[1, 1]] and len(one.requests) == 4 and spoiled.cache_faults >= 2
    assert table.metrics["consistency_judge_cache_faults"] == spoiled.cache_faults
    assert sum("judge cache" in record.message for record in caplog.records) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".txt"]
    if spoil in ("bytes", "cut", "empty", "earlier"):  # mended by the way
        assert score([group], config, judge=judge(one, cache=tmp_path)).rewards_PG.tolist() == [[1, 1]]
        assert len(one.requests) == 4


def test_a_cache_that_cannot_be_written_costs_nothing(server, tmp_path):
    """finding 14"""
    (tmp_path / "file").write_text("in the way")
    unwritable = judge(server(steady), cache=tmp_path / "file" / "judge")
    group = group_from_completions(example_from_row(ROW), [GOOD])
    assert score([group], RewardConfig(rewards="consistency"), judge=unwritable).rewards_PG.tolist() == [[1]]
    assert unwritable.cache_faults == 2  # read and written


def test_prompts_with_lone_surrogates_are_asked(server, tmp_path):
    """finding 14"""
    the_judge = judge(server(answer), cache=tmp_path)
    assert the_judge.ask(["a\ud800b", "c"]) == the_judge.ask(["a?b", "c"]) == ["a?b", "c"]
    the_judge.forget("a\ud800b")
    assert len(list(tmp_path.rglob("*.txt"))) == 1


def test_a_custom_judge_that_returns_no_text_costs_single_scores():
    """finding 14"""

    class Odd:
        name = "odd"

        def ask(self, prompts):
            return [None, 7, verdict(prompts[2])]

    group = group_from_completions(
        example_from_row(ROW), [GOOD, GOOD.replace("on,", "up,"), GOOD.replace("on,", "so,")]
    )
    table = score([group], RewardConfig(rewards="consistency"), judge=Odd())
    np.testing.assert_equal(table.rewards_PGR[0, :, 0], [np.nan, np.nan, 1])
    assert "the reply is NoneType, not text" in table.missing[0, 0, "consistency"]


@pytest.mark.parametrize("retry_after", ["3600", "inf", "nan", "-5", "Wed, 21 Oct 2099 07:28:00 GMT"])
def test_retry_after_stays_within_the_time_of_the_step(server, retry_after):
    """finding 14"""
    one = server(status(429, f"Retry-After: {retry_after}"))
    group = group_from_completions(example_from_row(ROW), [GOOD])
    start = time.perf_counter()
    table = score([group], RewardConfig(rewards="consistency", reward_timeout=1.0), judge=judge(one, retries=3))
    assert time.perf_counter() - start < 2 and "HTTP 429, after" in table.missing[0, 0, "consistency"]


# -- the key -------------------------------------------------------------------------------------------------------


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("COVO_RL_JUDGE_KEY", "sesame-open")
    return "sesame-open"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_is_not_followed(server, key, code):
    """finding 15: the bearer key went along."""
    other = server(steady)
    for target in (other.url, f"https://127.0.0.1:{other.port}/v1", f"//127.0.0.1:{other.port}/x", "http://[::1]:1/",
                   f"http://user:pw@127.0.0.1:{other.port}/"):  # fmt: skip
        one = server(status(code, f"Location: {target}"))
        reply = judge(one).ask(["p"])[0]
        assert isinstance(reply, JudgeError) and str(code) in str(reply) and len(one.requests) == 1
        assert key not in str(reply) and "pw" not in str(reply) and not other.requests
        if code != 303:
            assert "to another origin" in str(reply)


def test_a_redirect_within_the_origin_is_followed_with_the_request(server, key):
    """finding 15: same scheme, host and port."""
    one = server(lambda prompt: answer(prompt) if len(one.requests) == 2 else status(307, "Location: /other/path"))
    assert judge(one).ask(["p"]) == ["p"]
    assert one.requests[1].startswith(b"POST /other/path ") and f"Bearer {key}".encode() in one.requests[1]
    endless = server(lambda prompt: status(308, f"Location: /{len(endless.requests)}"))
    assert "redirects" in str(judge(endless).ask(["p"])[0]) and len(endless.requests) == 6


def test_the_origin_is_scheme_host_and_port():
    """finding 15"""
    assert origin("https://Host/v1") == origin("https://host:443/x?y") == ("https", "host", 443)
    assert len({origin(u) for u in ("http://h", "https://h", "http://h:443", "http://h.x", "http://h:8")}) == 5


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\n\n\t"])
def test_white_space_around_a_key_is_no_part_of_it(server, monkeypatch, end):
    """finding 15: a key with a newline was printed in the error."""
    monkeypatch.setenv("COVO_RL_JUDGE_KEY", f"{end}sesame{end}")
    one = server(steady)
    prompt = 'grade "nonce": "n" "consistent"'
    assert isinstance(judge(one).ask([prompt])[0], str) and b"Bearer sesame\r\n" in one.requests[0] + b"\r\n"


@pytest.mark.parametrize("key", ["se\nsame", "se\r\nX: y", "sés\u0101me", "se\x00same", "se same", "\udcffx"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(server, monkeypatch, key):
    """finding 15"""
    one = server(steady)
    made = judge(one)
    if "\x00" not in key:
        monkeypatch.setenv("COVO_RL_JUDGE_KEY", key)
    else:
        monkeypatch.setattr(os, "environ", {**os.environ, "COVO_RL_JUDGE_KEY": key})
    with pytest.raises(RewardError, match="COVO_RL_JUDGE_KEY: holds") as refused:
        judge(one)
    group = group_from_completions(example_from_row(ROW), [GOOD])
    why = score([group], RewardConfig(rewards="consistency"), judge=made).missing[0, 0, "consistency"]
    assert not any(part in str(refused.value) + why for part in ("same", "sés", "X: y")) and not one.requests


SECRETS = ("https://user:hunter2@host/v1", "https://hunter2@host/v1", "http://host/v1?api_key=hunter2",
           "https://host/v1#hunter2", "https://us/er:hunter2@host/v1", "https://user:hunter2@[host/v1",
           "https://user:hunter2@host:99999/v1", "ftp://user:hunter2@host/", "//user:hunter2@host/")  # fmt: skip


@pytest.mark.parametrize("url", SECRETS)
def test_an_address_with_a_secret_is_refused_without_showing_it(monkeypatch, url):
    """finding 15: it would stand in config.yaml, environment.json, the cache's key and every error."""
    for spec in (f"openai:m@{url}", f"openai:@{url}", f"opena:m@{url}", url):
        with pytest.raises(RewardError, match="judge") as refused:
            judge_from_spec(spec)
        assert "hunter2" not in str(refused.value)
    monkeypatch.setenv("COVO_RL_JUDGE_URL", url)
    with pytest.raises(RewardError, match="judge") as refused:
        judge_from_spec(f"openai:m{len(url)}")
    assert "hunter2" not in str(refused.value) + hidden(url)


def test_a_run_with_a_secret_in_its_judge_s_address_writes_nothing(tmp_path):
    """finding 15"""
    from covo_rl.config import Options
    from covo_rl.run.session import Session

    options = Options()
    options.train.output, options.reward.judge = str(tmp_path / "run"), "openai:m@https://user:hunter2@host/v1"
    with pytest.raises(RewardError, match="put the key into COVO_RL_JUDGE_KEY"):
        Session(options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("CONCURRENCY", "many"), ("TIMEOUT", "nan"), ("TIMEOUT", "-1"), ("TIMEOUT", "0")]
)
def test_limits_that_are_no_numbers_are_named(monkeypatch, name, value):
    """finding 14"""
    monkeypatch.setenv(f"COVO_RL_JUDGE_{name}", value)
    with pytest.raises(RewardError, match=f"COVO_RL_JUDGE_{name} is '{value}'"):
        judge_from_spec(f"openai:limits-{name}-{value}@http://host")


# -- a local judge ------------------------------------------------------------------------------------------------


def test_two_components_load_a_local_judge_once(monkeypatch):
    """finding 14: two threads loaded it twice."""
    loads, at_once, most = [], [], []

    def load(*_, **__):
        loads.append(1)
        time.sleep(0.2)
        return types.SimpleNamespace(to=lambda device: types.SimpleNamespace(eval=lambda: None))

    def generate(self, prompts):
        at_once.append(1)
        most.append(len(at_once))
        judge_room._local_model("once")
        time.sleep(0.02)
        at_once.pop()
        return [verdict(prompt) for prompt in prompts]

    tokenizer = types.SimpleNamespace(pad_token="x")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.setattr(LocalJudge, "_generate", generate)
    group = group_from_completions(example_from_row(ROW), [GOOD.replace("on,", f"{i},") for i in range(8)])
    table = score([group], RewardConfig(rewards="consistency,thinking"), judge=LocalJudge("x", batch_size=2))
    assert table.rewards_PG.tolist() == [[2.0] * 8] and len(loads) == 1 and max(most) == 1


def test_a_local_judge_keeps_what_it_has_when_a_batch_fails_or_time_is_over():
    """finding 14"""

    def generate(prompts):
        if any("odd" in prompt for prompt in prompts):
            raise RuntimeError("out of memory")
        time.sleep(0.3 if any("slow" in prompt for prompt in prompts) else 0)
        return [verdict(prompt) for prompt in prompts]

    def scores(words, seconds):
        group = group_from_completions(example_from_row(ROW), [GOOD.replace("on,", f"{word},") for word in words])
        local = LocalJudge("x", batch_size=1, generate=generate)
        return score([group], RewardConfig(rewards="consistency", reward_timeout=seconds), judge=local)

    table = scores(["a", "odd", "b"], 20.0)
    np.testing.assert_equal(table.rewards_PGR[0, :, 0], [1, np.nan, 1])
    assert "RuntimeError: out of memory" in table.missing[0, 1, "consistency"]
    table = scores([f"slow {i}" for i in range(20)], 1.6)
    assert 1 <= np.isfinite(table.rewards_PGR).sum() <= 5 and "no time left" in table.missing[0, 19, "consistency"]


@pytest.mark.parametrize(
    ("rank", "gpus", "device"), [("3", 4, "cuda:3"), ("3", 1, "cuda:0"), (None, 2, "cuda:0"), ("1", 0, "cpu")]
)
def test_a_local_judge_sits_on_the_gpu_of_its_rank(monkeypatch, rank, gpus, device):
    """finding 14: its "cuda" was GPU 0 on every rank."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert local_device() == device


# -- what a server says, and where requests go -------------------------------------------------------------------------


def refusal(code, content):
    body = json.dumps(content).encode()
    return f"HTTP/1.1 {code} x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("code", "content", "why"),
    [(401, {"error": {"message": "Incorrect key sesame-open"}}, r"Incorrect key \*\*\*; is the key in COVO_RL_JUDGE_K"),
     (404, {"detail": "Not Found"}, "Not Found; is the address right"),
     (404, {"object": "error", "message": "no model m"}, "no model m; .*the model's name"),
     (400, {"error": "max_tokens is not known"}, "HTTP 400, after 1 tries: max_tokens is not known"),
     (400, [["odd"]], "HTTP 400, after 1 tries: x$"),
     (200, {"error": {"message": "overloaded, sesame-open"}}, r"overloaded, \*\*\*"),
     (200, {"choices": []}, r"it has no choices\[0\]")],
)  # fmt: skip
def test_a_server_s_own_words_are_shown_without_the_key(server, key, code, content, why):
    """finding 15: servers repeat the key that they refuse; finding 14: "HTTP 401" does not say what to do."""
    one = server(refusal(code, content))
    reply = str(judge(one).ask(["p"])[0])
    assert re.search(why, reply) and key not in reply
    assert len(one.requests) == (1 if code in (400, 401, 404) else 2)  # what is wrong for good is not repeated


def test_this_machine_is_never_asked_through_a_proxy(server, key, monkeypatch):
    """finding 15: with http_proxy set, a judge on localhost and its key went to the proxy."""
    proxy, one = server(steady), server(lambda prompt: answer("direct"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    for host in ("127.0.0.1", "localhost"):
        made = EndpointJudge("m", f"http://{host}:{one.port}/v1", timeout=5.0, retries=0)
        assert made.ask(["p"]) == ["direct"] and not proxy.requests
    assert [local(host) for host in ("::1", "127.9.9.9", "a.localhost", "example.org", "10.0.0.1")] == [1, 1, 1, 0, 0]


def test_the_whole_address_of_an_endpoint_is_understood(server):
    one = server(lambda prompt: answer("yes"))
    for end in ("", "/", "//", "/chat/completions", "/chat/completions/"):
        assert EndpointJudge("m", one.url + end, timeout=5.0, retries=0).ask(["p"]) == ["yes"]
    assert {head.split(b" ")[1] for head in one.requests} == {b"/v1/chat/completions"}
    with pytest.raises(RewardError, match="holds spaces"):
        judge_from_spec("openai:m@http://my host/v1")
