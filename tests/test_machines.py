"""Training on several machines: the scripts of recipes/, and what machines must share.

Slurm's and ssh's commands are small scripts here; what they were held to is what Slurm 22.05 did.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from covo_rl.config import ConfigError
from covo_rl.records.folder import Run
from covo_rl.run.start import not_shared
from covo_rl.train import launch
from covo_rl.train.ranks import Ranks

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("recipes/*/*.sh"), *ROOT.glob("recipes/slurm/*.sbatch")])
#: answers in the place of Slurm: two nodes, a step of one task on each
SLURM = {
    "scontrol": '[ "$1" = show ] && printf "127.0.0.1\\n127.0.0.2\\n" || echo "scontrol $*" >> "$LOG"',
    "scancel": 'echo "scancel $*" >> "$LOG"; pkill -TERM -P "$(cat "$STEP")"',
    "srun": 'echo $$ > "$STEP"; shift; for id in 0 1; do SLURM_NODEID=$id SLURMD_NODENAME=127.0.0.$((id + 1)) "$@" & '
            'pids+=($!); done; for pid in "${pids[@]}"; do wait $pid || wait $pid || code=$?; done; exit ${code:-0}',
}  # fmt: skip
#: drops the options and the host, and runs the command with what comes in, a line at a time as a slow line would bring
SSH = {
    "ssh": 'echo "$*" >> "$LOG"; while [ "$1" = -o ]; do shift 2; done; shift; exec 4<&0; '
           'exec "$@" < <(while IFS= read -r line; do printf "%s\\n" "$line"; sleep 0.05; done <&4)',
}  # fmt: skip


def commands(folder: Path, bodies: dict[str, str]) -> dict[str, str]:
    """An environment in whose PATH these bash scripts come first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "node[7-8]"}
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(folder / "log"), "STEP": str(folder / "step")}
    return {**os.environ, **slurm, **own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def recorder(folder: Path, *, stays: bool = False) -> str:
    """An environment (VENV) whose python notes its arguments by machine; `stays` until SIGTERM."""
    trap, wait = "trap 'echo saved >> $0.$MACHINE_RANK; exit 1' TERM", "while true; do sleep 0.05; done"
    note = 'printf "%s\\n" "$@" > "$0.$MACHINE_RANK"'
    commands(folder / "bin", {"python": "; ".join([trap, note, wait] if stays else [note])})
    return str(folder)


def noted(folder: Path) -> list[list[str]]:
    return [path.read_text().splitlines() for path in sorted((folder / "bin").glob("python.[0-9]"))]


def launched(words: list[str]):
    """What accelerate reads in them."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    assert words[:3] == ["-m", "accelerate.commands.accelerate_cli", "launch"], words
    return _validate_launch_command(launch_command_parser().parse_args(words[3:]))[0]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_shell_and_says_what_it_does(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    head = path.read_text().splitlines()
    assert head[0] == "#!/usr/bin/env bash" and head[1].startswith("# ") and "set -euo pipefail" in head
    assert max(map(len, head)) <= 120 and len(head) < 60


@pytest.mark.parametrize("kind", ["ddp", "hsdp", "zero3"])
def test_slurm_starts_one_launcher_a_machine_with_its_place_and_the_servers(kind, tmp_path):
    env = commands(tmp_path / "bin", SLURM) | {"VENV": recorder(tmp_path / "venv"), "GPUS": "4"}
    (tmp_path / "urls").write_text("http://10.0.0.1:8000\nhttp://10.0.0.2:8000\n")
    env |= {"SERVERS": str(tmp_path / "urls"), "SERVERS_JOB": "30"}
    script = ["bash", "recipes/slurm/trainers.sbatch", kind, "--instruction", "two words"]
    subprocess.run(script, cwd=ROOT, env=env, check=True, timeout=30)
    machines = noted(tmp_path / "venv")
    assert len(machines) == 2
    for rank, words in enumerate(machines):
        args = launched(words)
        assert (args.num_machines, args.machine_rank, args.num_processes) == (2, rank, 8)
        assert (args.main_process_ip, args.main_process_port) == ("127.0.0.1", 20031)
        assert args.use_deepspeed == (kind == "zero3") and args.use_fsdp == (kind == "hsdp")
        if kind == "hsdp":
            sizes = args.parallelism_config_dp_replicate_size, args.parallelism_config_dp_shard_size
            assert args.use_parallelism_config and sizes == (2, 4)
        if kind == "zero3":
            assert args.deepspeed_multinode_launcher == "standard"
        assert args.training_script == str(ROOT / "recipes" / "grpo_mmau.py")
        options = args.training_script_args
        assert options[:2] == ["--resume", "auto"] and options[-2:] == ["--instruction", "two words"]
        assert options[options.index("--vllm_server_base_url") + 1] == "http://10.0.0.1:8000,http://10.0.0.2:8000"
    assert (tmp_path / "bin" / "log").read_text() == "scancel 30\n", "the servers' job ends with the training"


def test_before_the_time_limit_slurm_lets_the_ranks_save_and_queues_the_job_again(tmp_path):
    """The signal goes to the step: SIGTERM to srun itself would kill the step at once (Slurm 22.05 did)."""
    env = commands(tmp_path / "bin", SLURM) | {"VENV": recorder(tmp_path / "venv", stays=True)}
    process = subprocess.Popen(["bash", "recipes/slurm/trainers.sbatch", "ddp"], cwd=ROOT, env=env)
    wait_until(lambda: len(noted(tmp_path / "venv")) == 2 and all(noted(tmp_path / "venv")))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert all(words[-1] == "saved" for words in noted(tmp_path / "venv"))
    log = (tmp_path / "bin" / "log").read_text().splitlines()
    assert log == ["scancel --signal=TERM 31.0", "scontrol requeue 31"]


@pytest.mark.parametrize("how", ["signal", "a machine fails"])
def test_ssh_starts_every_machine_stops_all_of_them_and_shows_no_key(how, tmp_path):
    env = commands(tmp_path / "bin", SSH) | {"VENV": recorder(tmp_path / "venv", stays=True), "VLLM_API_KEY": "s3cret"}
    (tmp_path / "hosts").write_text("127.0.0.1\n# one that is down\nlocalhost\n")
    words = ["recipes/ssh/launch.sh", "trainers", str(tmp_path / "hosts"), "ddp", "--output", "a folder"]
    process = subprocess.Popen(words, cwd=ROOT, env=env)
    wait_until(lambda: len(noted(tmp_path / "venv")) == 2 and all(noted(tmp_path / "venv")))
    if how == "signal":
        process.send_signal(signal.SIGTERM)
    else:  # a launcher there ends by itself
        (pid,) = pids_with(str(tmp_path), "--machine_rank\x001\x00")
        os.kill(pid, signal.SIGTERM)
    assert process.wait(60) != 0
    for rank, lines in enumerate(noted(tmp_path / "venv")):
        args = launched(lines[:-1])
        assert (args.machine_rank, args.main_process_ip, lines[-1]) == (rank, "127.0.0.1", "saved")
        assert args.training_script_args[-2:] == ["--output", "a folder"]
    log = (tmp_path / "bin" / "log").read_text()
    assert log.count("BatchMode=yes") == 2 and "s3cret" not in log


def pids_with(*parts: str) -> list[int]:
    """Processes of this machine whose command line has all of `parts`."""

    def line(path: Path) -> str:
        try:
            return (path / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            return ""  # it ended

    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if all(part in line(p) for part in parts)]


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row."""
    for first in range(20_000 + os.getpid() % 9_000, 60_000, 7):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.parametrize("way", ["slurm", "ssh"])
def test_servers_are_named_once_all_answer_started_anew_when_they_die_and_end_with_the_job(way, tmp_path):
    (tmp_path / "health").touch()
    printed = f"{sys.executable} -m http.server --directory {tmp_path} --bind"
    find = 'for word; do [ "$last" = --host ] && host=$word; last=$word; done'
    commands(
        tmp_path / "venv" / "bin", {"covo-rl": f'echo "$*" >> {tmp_path}/asked; {find}; echo {printed} $host $word'}
    )
    port = free_ports(2)
    env = commands(tmp_path / "bin", SLURM | SSH) | {
        "VENV": str(tmp_path / "venv"), "GPUS": "4", "TP": "2", "PORT": str(port), "VLLM_API_KEY": "s3cret",
        "SERVERS": str(tmp_path / "urls"), "PAUSE": "0.1",
    }  # fmt: skip
    (tmp_path / "hosts").write_text("127.0.0.1\n127.0.0.2\n")
    script = {"slurm": ["bash", "recipes/slurm/servers.sbatch"],
              "ssh": ["recipes/ssh/launch.sh", "servers", str(tmp_path / "hosts")]}[way]  # fmt: skip
    process = subprocess.Popen([*script, "--config", "mine.yaml"], cwd=ROOT, env=env)
    urls = [f"http://127.0.0.{machine}:{port + i}" for machine in (1, 2) for i in (0, 1)]
    wait_until((tmp_path / "urls").exists)
    assert (tmp_path / "urls").read_text().splitlines() == urls and all(map(answers, urls))
    asked = sorted((tmp_path / "asked").read_text().splitlines())
    assert asked[0] == f"rollout-server --config mine.yaml --vllm_tensor_parallel_size 2 --host 127.0.0.1 --port {port}"
    server = (str(tmp_path), f"127.0.0.2\x00{port}\x00")
    (first,) = pids_with(*server)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: pids_with(*server) not in ([], [first]) and answers(urls[2]))
    if way == "slurm":
        subprocess.run(["scancel", "30"], env=env, check=True)
    else:
        process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert not any(map(answers, urls)) and not pids_with(str(tmp_path), "http.server")


# -- what machines share ----------------------------------------------------------------------------------------------


class Threads(Ranks):
    """Ranks that are threads of this process."""

    meeting, values = threading.Barrier(2), {}

    def gathered(self, value):
        self.values[self.rank] = value
        self.meeting.wait(30)
        values = [self.values[0], self.values[1]]
        self.meeting.wait(30)
        return values


@pytest.mark.parametrize("shared", [True, False])
def test_a_run_folder_that_a_machine_does_not_see_is_refused_and_left_as_it_was(shared, tmp_path):
    """On the second machine a run of its own lies there, with a lock that looks alike."""
    folders = [tmp_path / "run", tmp_path / ("run" if shared else "other")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lock.json").write_text('{"pid": 1, "host": "here", "since": "2026-01-01 00:00:00"}\n')
    runs = [Run(folder, active=rank == 0) for rank, folder in enumerate(folders)]
    answers: list = [None, None]

    def ask(rank: int) -> None:
        answers[rank] = not_shared(runs[rank], Threads(rank, 2), patience=0.5)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    runs[0].lock.release()
    if shared:
        assert answers == [None, None]
    else:
        assert answers[0] == answers[1] and answers[0].startswith(
            f"rank 1 ({tmp_path}/other on {socket.gethostname()})"
        )
        assert "one --output that all of them reach by the same path" in answers[0]
    assert not (tmp_path / "run").exists()


def test_a_job_of_slurm_that_is_queued_again_has_the_folder_of_its_earlier_attempt(tmp_path, monkeypatch):
    """On another host, whose processes nobody here can ask for."""
    lock = tmp_path / "lock.json"
    lock.write_text('{"pid": 1, "host": "node9", "since": "2026-01-01 00:00:00", "job": "31", "attempt": "0"}\n')
    for job, attempt, free in [("31", "1", True), ("31", "0", False), ("32", "1", False)]:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
        assert (Run(tmp_path).lock.refusal() is None) == free, (job, attempt)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "is locked by process 1 on node9" in str(Run(tmp_path).lock.refusal())
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    again = Run(tmp_path)
    assert again.lock.hold() is None and json.loads(lock.read_text())["attempt"] == "1"
    again.lock.release()


@pytest.mark.parametrize(("sizes", "message"), [
    ((2, 2, 1), "2 copies over 2 shards each are 4 ranks, and 8 were started"),
    ((8, 1, 1), "8 copies over 1 shards each are 8 ranks, and 8 were started: set"),
    ((2, 4, 2), "tensor, context and sequence parallelism"),
    ((2, 4, 1), None),
])  # fmt: skip
def test_sizes_of_hsdp_that_do_not_fit_the_ranks_are_refused(sizes, message, monkeypatch):
    names = ("DP_REPLICATE_SIZE", "DP_SHARD_SIZE", "TP_SIZE")
    for name, value in {
        "WORLD_SIZE": 8,
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        **{f"PARALLELISM_CONFIG_{n}": size for n, size in zip(names, sizes, strict=True)},
    }.items():
        monkeypatch.setenv(name, str(value))  # fmt: skip
    if message:
        with pytest.raises(ConfigError, match=message):
            launch._mesh_sizes()
    else:
        mesh = launch._mesh_sizes()
        assert mesh and mesh.total_size == 8
