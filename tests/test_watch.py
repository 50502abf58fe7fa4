"""`covo-rl watch`: a run not yet begun, growing, cut by a resume, killed, finished; as picture, lines and page."""

import http.client
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urljoin

import pytest
import typer
from browser import chromium, missing, until
from rich.cells import cell_len
from rich.console import Console

from covo_rl.records import console
from covo_rl.records.folder import Run
from covo_rl.records.follow import GrowingLines, RunFollower, latest_timeline
from covo_rl.records.lock import FolderLock
from covo_rl.run.watch import command as watch
from covo_rl.run.watch.page import HOST, LiveReport, PageServer, PortTaken, address_of, linked_files

EVIL = "\x1b[31mred\u202e[bold]"


def metrics(step, **others):
    return {"step": step, "reward_total": step / 10, "reward_accuracy": 0.5, "reward_./mine.py:brevity": None,
            "completion_length": 20.0, "zero_variance_groups": 0.25, "truncated": 0.0,
            "seconds": {"step": 2.0, "sample": 1.5, "update": 0.5, "reward_accuracy": 0.1}, **others}  # fmt: skip


def rollouts(step):
    return [{"id": f"r{i}", "question": f"what? {EVIL}", "choices": ["a", "b"], "answer": "a", "stop_reason": "stop",
             "completion": f"<think>{'word ' * 40}{EVIL}</think><answer>a</answer>", "reward_total": float(i),
             "rewards": {"accuracy": float(i)}} for i in range(4)]  # fmt: skip


def make_run(folder, steps, total=10):
    run = Run(folder)
    run.write_config({"model": "builtin:tiny", "max_steps": total})
    for step in range(1, steps + 1):
        run.log_metrics(metrics(step))
        run.log_rollouts(step, rollouts(step))
    return run


def steps_of(lines):
    return [row["step"] for row in lines.rows]


def test_half_a_line_waits_for_its_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = GrowingLines(path)
    assert not lines.read() and lines.rows == []
    path.write_bytes(b'{"step": 1}\n{"st')
    assert lines.read() and steps_of(lines) == [1]
    assert not lines.read(), "nothing is new"
    with open(path, "ab") as file:
        file.write(b'ep": 2}\nnot json\n[3]\n{"step": 3}\n')
    assert lines.read() and steps_of(lines) == [1, 2, 3] and lines.damaged == 2


def test_a_file_that_was_cut_and_grew_again_is_read_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = GrowingLines(path)
    path.write_text("".join(json.dumps({"step": i, "first": True}) + "\n" for i in range(1, 9)))
    lines.read()
    whole = path.read_bytes()
    with open(path, "r+b") as file:  # back to step 4, then further than before, between two looks
        file.truncate(len(b"".join(whole.splitlines(keepends=True)[:4])))
        file.seek(0, os.SEEK_END)
        file.write("".join(json.dumps({"step": i, "first": False}) + "\n" for i in range(5, 13)).encode())
    assert lines.read() and [(r["step"], r["first"]) for r in lines.rows] == [(i, i < 5) for i in range(1, 13)]
    path.unlink()
    assert lines.read() and lines.rows == []
    path.write_text('{"step": 1}\n')
    assert lines.read() and steps_of(lines) == [1]


def test_where_a_step_comes_again_the_later_timeline_holds():
    rows = [{"step": i} for i in (1, 2, 3, 4)] + [{"step": 3, "new": 1}, {"step": 4, "new": 1}, {"no": "step"}]
    assert latest_timeline(rows) == [{"step": 1}, {"step": 2}, {"step": 3, "new": 1}, {"step": 4, "new": 1}]


def test_what_state_a_run_is_in(tmp_path):
    run = RunFollower(tmp_path / "run")
    run.read()
    assert run.status == "not begun yet" and run.step == 0 and run.total is None and run.rollouts() == []
    make_run(tmp_path / "run", 4)
    run.read()
    assert run.status.startswith("stopped") and (run.step, run.total, run.seconds_left) == (4, 10, None)
    assert run.rollouts()[3]["id"] == "r3"
    code = (
        f"from covo_rl.records.lock import FolderLock; FolderLock({str(tmp_path / 'run')!r}).hold(); print(1); input()"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdin and owner.stdout and owner.stdout.readline()
    assert run.read() and run.status == f"running, {FolderLock(tmp_path / 'run').holder()}"
    assert str(owner.pid) in run.status and run.seconds_left == 12.0, "six steps of two seconds"
    owner.kill()
    owner.wait()
    assert run.read() and run.status.startswith("stopped"), "the lock file of a killed process holds nothing"
    Run(tmp_path / "run").write_json("result.json", {})
    assert run.read() and run.status == "finished" and not run.read()


def test_damaged_records_are_named_and_the_rest_is_shown(tmp_path):
    make_run(tmp_path, 3)
    (tmp_path / "config.yaml").write_text("a: [1")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("garbage\n")
    run = RunFollower(tmp_path)
    run.read()
    assert run.step == 3 and len(run.notes) == 2
    text = "\n".join(part.plain for part in watch.frame(run, 80))
    assert "step 3/?" in text and "1 damaged lines" in text and "config.yaml cannot be read" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_picture_fits_the_screen(tmp_path, width):
    make_run(tmp_path, 9)
    run = RunFollower(tmp_path)
    run.read()
    parts = watch.frame(run, width)
    lines = [line for part in parts for line in part.plain.split("\n")]
    curves = [line for line in lines if set(line) & set(watch.BLOCKS)]
    assert [line.split()[0] for line in curves] == ["R", "accuracy", "length", "same"] and "0.10 " in curves[0]
    assert max(map(cell_len, [lines[1], *curves])) <= width
    assert not set("\x1b\u202e") & set("".join(lines))
    assert "a step 2 s  sample 75%  update 25%" in "\n".join(lines)
    assert [line.split()[0] for line in lines if "  R " in line] == ["best", "median", "worst"]
    low = watch.frame(run, 80, 20)
    assert "2 more on a higher screen" in low[-2].plain and low[-1].plain.startswith("best")


def test_sparklines():
    assert watch.sparkline(list(range(8)), 8) == "▁▂▃▄▅▆▇█" and watch.sparkline([1.0, 1.0], 9) == "▄▄"
    assert watch.sparkline([0, 0, 7, 7], 2) == "▁█" and len(watch.sparkline([0.1] * 1000, 50)) == 50


def test_once_prints_one_picture_and_ends(tmp_path, capsys):
    make_run(tmp_path, 2)
    watch.watch_command(tmp_path, once=True)
    out = capsys.readouterr().out
    assert "step 2/10" in out and "rollouts of step 2" in out and "\x1b" not in out
    with pytest.raises(typer.BadParameter, match="no such folder"):
        watch.watch_command(tmp_path / "nowhere", once=True)
    with pytest.raises(typer.BadParameter, match="choose one"):
        watch.watch_command(tmp_path, once=True, page=True)
    with pytest.raises(typer.BadParameter, match="is a file"):
        watch.watch_command(tmp_path / "config.yaml")


def test_without_a_terminal_every_step_is_a_line_until_the_end(tmp_path, monkeypatch):
    """From before the run begins, over a resume, to its result."""
    folder, out = tmp_path / "run", io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=out, width=80))

    def wait_for(text):
        end = time.monotonic() + 60
        while text not in out.getvalue() and time.monotonic() < end:
            time.sleep(0.01)

    def train():
        wait_for("not begun yet")
        run = make_run(folder, 3, total=4)
        wait_for("step 3/4")
        with open(folder / "metrics.jsonl", "r+") as file:
            file.truncate(len(file.readline()))
        run.log_metrics(metrics(2, reward_total=9.0))
        wait_for("R 9.00")
        run.log_metrics(metrics(3))
        run.write_json("result.json", {})

    thread = threading.Thread(target=train)
    thread.start()
    watch._watch(RunFollower(folder), once=False, every=0.02)
    thread.join()
    steps = [line.split()[1] for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert steps == ["1/4", "2/4", "3/4", "2/4", "3/4"] and out.getvalue().rstrip().endswith("finished")


def test_on_a_terminal_the_picture_is_live_and_q_ends_it(tmp_path):
    run = make_run(tmp_path, 2)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="80", LINES="40")
        code = f"from covo_rl.cli import main; main(['watch', {str(tmp_path)!r}])"
        os.execv(sys.executable, [sys.executable, "-c", code])
    shown = b""

    def wait_for(text, seconds=30):
        nonlocal shown
        end = time.monotonic() + seconds
        while text not in re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown) and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 65536)
        assert text in re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown)

    wait_for(b"step 2/10")
    run.log_metrics(metrics(3))
    wait_for(b"step 3/10")
    os.write(terminal, b"q")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    make_run(tmp_path / "run", 2)
    clip = tmp_path / "clips" / "a b.wav"
    clip.parent.mkdir()
    clip.write_bytes(b"0123456789")
    (tmp_path / "secret.txt").write_text("secret")
    made = []

    def build(folders):
        made.append(1)
        payload = {"clips": {"k": {"href": "../clips/a%20b.wav"}, "embedded": {"href": None}}}
        return f"<p>report {len(made)}</p>", linked_files(payload, Path(folders[0]) / "report.html")

    with PageServer(LiveReport([tmp_path / "run"], build)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def get(server, path, host=None, method="GET", **headers):
    """(status, body, headers) of a request whose path no client tidies up."""
    connection = http.client.HTTPConnection(HOST, server.server_address[1], timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"{HOST}:{server.server_address[1]}")
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, dict(answer.getheaders())


def clip_of(server):
    """The address of the sound that the page links, as a browser makes it of the link."""
    return urljoin(server.url + server.live.address[1:], "../clips/a%20b.wav").removeprefix(server.url[:-1])


def test_the_page_is_made_anew_only_where_the_run_went_on(server, tmp_path):
    status, _, headers = get(server, "/report")
    assert (status, headers["Location"]) == (302, server.live.address)
    page = server.live.address
    assert get(server, page)[1] == get(server, page)[1] == b"<p>report 1</p>"
    before = json.loads(get(server, "/version")[1])
    assert "step 2/10" in before["line"] and b"iframe" in get(server, "/")[1]
    Run(tmp_path / "run").log_metrics(metrics(3))
    server.live._rest = 0.0
    end = time.monotonic() + 30
    while (after := json.loads(get(server, "/version")[1]))["version"] == before["version"]:
        assert "step 3/10" in after["line"] and time.monotonic() < end
    assert get(server, page)[1] == b"<p>report 2</p>"


def test_a_report_that_takes_long_is_not_made_all_the_time_and_nobody_waits_for_the_next(tmp_path):
    make_run(tmp_path, 1)
    go, made = threading.Event(), []

    def build(folders):
        made.append(1)
        time.sleep(0.05)
        assert len(made) == 1 or go.wait(30)
        return f"report {len(made)}", {}

    live = LiveReport([tmp_path], build)
    assert live.version() == "" and live.report()[0] == "report 1"
    first = live.version()
    Run(tmp_path).log_metrics(metrics(2))
    assert live.version() == first and len(made) == 1, "for ten times as long"
    live._rest = 0.0
    assert live.version() == live.version() == first and live.report()[0] == "report 1", "while the next is made"
    go.set()
    end = time.monotonic() + 30
    while live.version() == first and time.monotonic() < end:
        time.sleep(0.01)
    assert live.report()[0] == "report 2" and len(made) == 2


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1.evil.example", ""])
def test_other_names_get_nothing(server, host):
    """A page of another site that its name server points at this machine."""
    for path in ("/", "/version", "/report", server.live.address, clip_of(server)):
        status, body, _ = get(server, path, host or "-")
        assert status == 403 and b"report" not in body and b"0123" not in body


@pytest.mark.parametrize(
    "path",
    ["/secret.txt", "/../secret.txt", "/clips/../secret.txt", "/config.yaml", "/run/config.yaml", "/etc/passwd",
     "//etc/passwd", "/%2e%2e/secret.txt", "/clips/", "/clips/a%20b.wav", "/report/config.yaml", "/at/etc/passwd"],
)  # fmt: skip
def test_no_other_file_is_reachable(server, path):
    assert get(server, path)[0] == 404


def test_linked_sounds_are_served_whole_and_in_ranges(server):
    status, body, headers = get(server, clip_of(server))
    assert (status, body) == (200, b"0123456789") and headers["Content-Type"].startswith("audio/")
    status, body, headers = get(server, clip_of(server), Range="bytes=2-4")
    assert (status, body, headers["Content-Range"]) == (206, b"234", "bytes 2-4/10")
    assert get(server, clip_of(server), Range="bytes=8-")[1] == b"89"
    for odd in ("bytes=20-", "bytes=x-", "bytes=-3", "lines=1-2", "bytes=5-2"):
        assert get(server, clip_of(server), Range=odd)[:2] == (200, b"0123456789")
    assert get(server, clip_of(server), method="POST")[0] == 501
    assert server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_is_one_message(server, tmp_path):
    with pytest.raises(PortTaken, match=f"port {server.server_address[1]} cannot be had"):
        PageServer(LiveReport([tmp_path]), server.server_address[1])


def test_the_report_of_a_run_is_served(tmp_path):
    make_run(tmp_path / "run", 2)
    page, files = LiveReport([tmp_path / "run"]).report()
    assert "<html" in page and files == {}
    empty, _ = LiveReport([tmp_path / "later"]).report()
    assert "<html" in empty, "a run that has not begun"


def test_links_to_sounds_of_the_same_name_in_two_folders_are_two(tmp_path):
    page = tmp_path / "run" / "report.html"
    payload = {
        "clips": {"a": {"href": "../clips/x.wav"}, "b": {"href": "clips/x.wav"}, "c": {"href": "../" * 40 + "x"}}
    }
    files = linked_files(payload, page)
    assert len(files) == 3 and {path.resolve() for path in files.values()} == {
        tmp_path / "clips" / "x.wav", tmp_path / "run" / "clips" / "x.wav", Path("/x")
    }  # fmt: skip


@pytest.mark.browser
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_in_a_browser_the_page_follows_the_run_and_stays_where_the_reader_is(tmp_path):
    """Reloaded when the run went on: at the same view, scrolled as before; a sound is played from its file."""
    import numpy as np
    import soundfile

    clip = tmp_path / "a clip.wav"
    soundfile.write(clip, 0.1 * np.sin(np.arange(16000) / 10), 16000)
    rows = [{**row, "clips": [str(clip)], "advantage": 0.0, "mean_logp": -1.0, "problems": []} for row in rollouts(1)]
    run = make_run(tmp_path / "run", 2)
    run.log_rollouts(2, rows)
    live = LiveReport([tmp_path / "run"])
    with PageServer(live) as server, chromium() as driver:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        driver.set_window_size(900, 420)
        driver.get(server.url)
        view = "const w = document.querySelector('iframe').contentWindow; "
        loaded = "w.location.pathname.startsWith('/at/') && w.document.readyState === 'complete'"
        drawn = f"{loaded} && !w.document.getElementById('status')"
        until(driver, f"{view} return {drawn}")
        driver.execute_script(f"{view} w.location.hash = '#view=groups&at=0.2.0'; w.marked = true")
        until(driver, f"{view} return !!w.document.querySelector('audio')")
        place = driver.execute_script(f"{view} w.scrollTo(0, 60); return w.scrollY")
        source = driver.execute_script(f"{view} return w.document.querySelector('audio').src")
        assert place == 60 and source == server.url[:-1] + address_of(clip)
        playing = f"{view} const a = w.document.querySelector('audio'); "
        driver.execute_script(f"{playing} a.loop = true; a.play()")
        until(driver, f"{playing} return a.currentTime > 0.1")
        run.log_metrics(metrics(3))
        live._rest = 0.0
        until(driver, "return document.getElementById('status').textContent.includes('step 3/10')")
        assert driver.execute_script(f"{view} return w.marked"), "not while a sound plays"
        driver.execute_script(f"{playing} a.pause()")
        until(driver, f"{view} return !w.marked && {drawn}", 60.0)
        assert driver.execute_script(f"{view} return w.location.hash").startswith("#view=groups")
        until(driver, f"{view} return w.scrollY === 60")
        assert driver.get_log("browser") == []
        server.shutdown()
