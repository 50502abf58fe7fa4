"""serve-check tells a served adapter that works from one that the server ignores."""

from __future__ import annotations

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import soundfile
from typer.testing import CliRunner

from covo_rl.export import ExportError
from covo_rl.export.cli import app
from covo_rl.export.serve_check import check_endpoint


@contextmanager
def server(answers):
    """An OpenAI-compatible endpoint on a free port; `answers(model, count)` -> (text, log-prob of the first token)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, body, self.headers.get("Authorization")))
            given = answers(body["model"], len(requests))
            if given is None:
                self.send_error(404, "no such model")
                return
            text, logprob = given
            top = [{"token": "A", "logprob": logprob}, {"token": "B", "logprob": -5.0}]
            choice = {"message": {"content": text}, "logprobs": {"content": [{"top_logprobs": top}]}}
            payload = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format, *args):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", requests
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def test_an_adapter_that_changes_log_probs_takes_effect_though_the_text_is_the_same():
    with server(lambda model, _: ("A", -0.5 if model == "tuned" else -0.6)) as (url, requests):
        report = check_endpoint(url, model="tuned", base="base", api_key="key")
    assert report["takes_effect"]
    assert report["answers"][0]["logprob_gap"] == pytest.approx(0.1)
    assert not report["answers"][0]["texts_differ"]
    # three sounds, each asked as the adapter and twice as the base
    assert [body["model"] for _, body, _ in requests] == ["tuned", "base", "base"] * 3
    path, body, authorization = requests[0]
    assert path == "/v1/chat/completions" and authorization == "Bearer key" and body["temperature"] == 0
    audio = body["messages"][0]["content"][0]["input_audio"]["data"]
    waveform, rate = soundfile.read(io.BytesIO(base64.b64decode(audio)))
    assert rate == 16000 and waveform.shape == (32000,) and abs(waveform).max() > 0.2


def test_a_silent_no_op_does_not_take_effect():
    with server(lambda model, _: ("A", -0.5)) as (url, _):
        report = check_endpoint(url, model="tuned", base="base")
        done = CliRunner().invoke(app, ["serve-check", "x", "--url", url, "--model", "tuned", "--base", "base"])
    assert not report["takes_effect"]
    assert done.exit_code == 1 and "answers as the base model does" in done.output


def test_a_server_that_does_not_repeat_itself_is_no_proof():
    """Every answer is off by 0.01 x its number: the base against itself moves as much as the adapter does."""
    with server(lambda model, count: ("A", -0.5 - 0.01 * count)) as (url, _):
        assert not check_endpoint(url, model="tuned", base="base")["takes_effect"]


def test_what_the_endpoint_says_is_in_the_error():
    with server(lambda model, _: None) as (url, _), pytest.raises(ExportError, match="answered 404"):
        check_endpoint(url, model="tuned", base="base")
    with pytest.raises(ExportError, match="starts with http"):
        check_endpoint("ftp://x", model="tuned", base="base")


def test_a_folder_that_is_no_export_is_an_error(tmp_path):
    done = CliRunner().invoke(app, ["serve-check", str(tmp_path)])
    assert done.exit_code == 1 and "neither adapter_config.json nor" in done.output
