"""Does a stock vLLM server run the policy, and does a run stop where it does not? Run where covo_rl trains:

    python tests/serving/server_check.py covo_audio --vllm vllm-env/bin/python      # or qwen2_audio; exit code 0: yes

Starts the server as `covo-rl rollout-server` prints it, trains 20 steps by the recipe, then puts in, one at a time,
what goes wrong without a message elsewhere; kills the server under way; and sends all weights in place of an adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import vllm_check
import yaml
from vllm_trainer import move, vllm_trainer

from covo_rl.config import parse_options
from covo_rl.engines import vllm_server
from covo_rl.engines.base import EngineError
from covo_rl.train.loop import Trainer

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4  # float32 log-probs
START_SECONDS = 900
#: what both families share; a random Qwen2-Audio writes noise, some of which has a tag
CONFIG = {
    "dtype": "float32", "instruction": "", "choice_style": "inline", "num_generations": 8, "max_completion_length": 32,
    "prompts_per_step": 16, "micro_batch_prompts": 16, "max_steps": 20, "evaluate": False, "use_vllm": True,
    "vllm_mode": "server",
}  # fmt: skip
FAMILIES = {
    "covo_audio": {"model": "builtin:tiny", "learning_rate": 1e-3},
    "qwen2_audio": {"learning_rate": 1e-2, "rewards": {"format(pattern='tags')": 1.0}, "check_rewards": False,
                    "limit": 128},
}  # fmt: skip


class Served:
    """The server of a run's configuration, as a user starts it."""

    def __init__(self, config: Path, vllm: Path, folder: Path) -> None:
        port = yaml.safe_load(config.read_text())["vllm_server_base_url"].rpartition(":")[2]
        words = [Path(sys.executable).parent / "covo-rl", "rollout-server", "--config", config, "--cpu", "--port", port]
        self.command = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        self.command += " --enable-logging-iteration-details"
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "server.log"
        self.environment = {**os.environ, "PATH": f"{vllm.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
                            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        with open(self.log, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", f"exec env {self.command}"], env=self.environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while not self.is_well():
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{self.command}\n{self.log.read_text()[-3000:]}")
            time.sleep(1)

    def is_well(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """It and what it has started, without a word."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def encoder_runs(self) -> int:
        """Clips encoded so far, by its log."""
        return sum(map(int, re.findall(r"encoder inputs: (\d+)", self.log.read_text())))


def write_config(family: str, folder: Path, **more: Any) -> Path:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    config = {**CONFIG, **FAMILIES[family], "vllm_server_base_url": url, "output": str(folder / "run"), **more}
    if "model" not in config:
        config["model"] = str(folder / "base")
        if not (folder / "base").exists():
            vllm_check.write_base(family, folder / "base")
    path = folder / f"{more.get('lora', True)}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def report(what: str, fine: bool, figures: str) -> bool:
    print(f"{what}: {figures}: {'ok' if fine else 'FAILED'}", flush=True)
    return fine


def trains(family: str, config: Path, server: Served) -> bool:
    """20 steps by the recipe: what they raise, and what is the same for engine and policy at every sync."""
    before = server.encoder_runs()
    words = [sys.executable, str(ROOT / "recipes" / "grpo_mmau.py"), "--config", str(config)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (config.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    totals = [row["reward_total"] for row in rows]
    first, last = sum(totals[:3]) / 3, sum(totals[-3:]) / 3
    apart = max(max(row["engine/max_abs"], row["engine/probe_abs"]) for row in rows)
    hits, runs = min(row["engine/prefix_hit_rate"] for row in rows), server.encoder_runs() - before
    clips = len(rows) * CONFIG["prompts_per_step"]
    gain = 0.5 if family == "covo_audio" else 0.1  # of noise
    # a clip of the check before training, too; a set that is smaller than all steps knows its clips
    fine = len(rows) == 20 and last - first >= gain and apart <= TOLERANCE and hits >= 0.6 and runs <= clips + 2
    return report(f"{family}, 20 steps over HTTP", fine,
                  f"R_total {first:.2f} -> {last:.2f}, |engine - policy| {apart:.2g} at most, clips encoded {runs} of "
                  f"{clips} with {8 * clips} rollouts, prefix hits {hits:.0%} or more, "
                  f"tokens/s {sum(row['engine/tokens_per_s'] for row in rows) / len(rows):.0f}")  # fmt: skip


def trainer(config: Path) -> Trainer:
    return vllm_trainer(parse_options(["--config", str(config)]))


def stops(made: Trainer, what: str, fault: Callable[[], AbstractContextManager]) -> bool:
    """With the fault a step ends the run; without it the servers run the policy again."""
    move(made)
    message = ""
    with fault():
        try:
            made.train_step()
        except EngineError as error:
            message = str(error)
    fine = report(what, "does not run the policy" in message, message[:160] or "the run went on")
    move(made)
    made.engine.sync(made.learner.applied)
    return fine


def survives(made: Trainer, server: Served) -> bool:
    """Killed while it samples, and started again: the same groups, none lost, none twice."""
    prompts = [made.prompt_of(row.id) for row in made.sampler.examples[:16]]
    ask = {"config": made.options.rollout, "seed": 5, "generations": 8}
    expected = made.engine.collect(made.engine.submit(prompts, **ask))
    pending = made.engine.submit(prompts, **ask)
    time.sleep(0.5)
    server.kill()
    returned = threading.Thread(target=server.start)
    returned.start()
    groups = made.engine.collect(pending)
    returned.join()
    same = [a.rollouts == b.rollouts for a, b in zip(expected, groups, strict=True)]
    retries = made.engine.metrics()["retries"]
    fine = not made.engine.failed and len(groups) == 16 and [g.prompt for g in groups] == prompts
    return report("a server killed under way and started again", fine,
                  f"{len(groups)} of 16 groups, {sum(same)} with the same tokens, {retries:g} retries")  # fmt: skip


def whole_weights(family: str, folder: Path, vllm: Path) -> bool:
    """All weights, audio adapter among them: three steps, and an encoder cache of older ones."""
    config = write_config(family, folder, lora=False, train_parts=["audio_adapter", "llm", "lm_head"])
    server = Served(config, vllm, folder)
    try:
        server.start()
        made = trainer(config)
        rows = []
        for _ in range(3):
            move(made)
            rows.append(made.train_step()[0])
        apart = max(max(row["engine/max_abs"], row["engine/probe_abs"]) for row in rows)
        results = [report(f"{family}, all weights over HTTP", apart <= TOLERANCE, f"|engine - policy| {apart:.2g}")]
        call = made.engine.servers.call

        def keeps_encoder(server: Any, path: str, *rest: Any, **options: Any) -> bytes:
            return b"" if path in ("/reset_encoder_cache", "/reset_mm_cache") else call(server, path, *rest, **options)

        @contextmanager
        def stale() -> Iterator[None]:
            """Clips known by content alone, and nobody resets the encoder's cache: as vLLM 0.31 leaves it."""
            by_content = patch.object(vllm_server, "clip_uuid", lambda key, version=None: key)
            with by_content, patch.object(made.engine.servers, "call", keeps_encoder):
                yield

        with stale():
            move(made)
            made.engine.sync(made.learner.applied)  # the probe's clip is in the cache now
        results.append(stops(made, "an encoder cache of older weights", stale))
        made.engine.close()
    finally:
        server.kill()
    return all(results)


def check(family: str, folder: Path, vllm: Path) -> bool:
    config = write_config(family, folder)
    server = Served(config, vllm, folder)
    try:
        server.start()
        results = [trains(family, config, server)]
        made = trainer(config)
        engine: Any = made.engine

        def same_name() -> AbstractContextManager:
            """What vLLM has under a name it does not read again."""
            fixed = engine.sender.name(made.learner.applied - 1)
            return patch.object(engine.sender, "name", lambda version: fixed)

        results += [
            stops(made, "an adapter that is not applied", lambda: patch.object(engine, "model", lambda _: engine.base)),
            stops(made, "an adapter name that is used again", same_name),
            survives(made, server),
        ]
        made.engine.close()
    finally:
        server.kill()
    return all([*results, whole_weights(family, folder, vllm)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--vllm", type=Path, required=True, help="Python of an environment with vLLM")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_API_KEY", secrets.token_hex(8))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server goes too
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(0 if check(given.family, Path(folder), given.vllm) else 1)


if __name__ == "__main__":
    main()
