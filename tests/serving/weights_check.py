"""Does vLLM run what it is sent over HTTP, and is an update that leaves caches alone noticed? docs/rollouts.md.

    python tests/serving/weights_check.py --family covo_audio          in an environment with vLLM; exit code 0 if so

A tiny random policy; what trains gets random weights, and two updates more, each followed by the probe. Three engines,
one after the other: whole weights in this process, where without resets the old encoder outputs and prompt blocks must
show; whole weights and LoRA on the server that `covo-rl rollout-server` prints, which fetches them through its gate.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
               "VLLM_API_KEY": "a-key-of-this-check"}  # fmt: skip
sys.path.insert(0, str(Path(__file__).parent))

import torch
import vllm_check

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, Options, PromptConfig
from covo_rl.engines.probe import Probe, weight_noise
from covo_rl.engines.vllm_requests import clip_waveform, group_of, prompt_ids, sampling_fields
from covo_rl.models import load_family
from covo_rl.policy import Policy
from covo_rl.policy.trainable import make_trainable
from covo_rl.prompt import build_prompt
from covo_rl.types import Clip, Example

TOLERANCE = 1e-4  # nats, float32
STALE = 1e-2
LENGTH = 512


def policy_on(base: Path, *, whole: bool) -> tuple:
    """(policy, what trains, a prompt with a clip)."""
    family, clips = load_family(str(base)), ClipStore()
    config = AdapterConfig(lora=False, train_parts=list(family.parts)) if whole else AdapterConfig(lora_r=8)
    trainable = make_trainable(family, config)
    sound = Clip(array=vllm_check.clip(2.35, 16000), sampling_rate=16000)
    row = Example("row", (sound,), vllm_check.QUESTION, ("a tone", "a dog"))
    prompt = build_prompt(row, family, clips, PromptConfig())
    return Policy(family, trainable.peft_model, clips=clips), trainable, prompt


def change(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


# -- in this process -----------------------------------------------------------------------------------------------


def in_process(name: str, base: Path) -> dict[str, float]:
    """Largest difference of log-probs: of the base, of older weights, and after an update with and without resets."""
    from vllm import LLM, SamplingParams

    from covo_rl.engines.base import TextDecoder
    from covo_rl.engines.policy_files import WeightFiles
    from covo_rl.engines.vllm_requests import Completion

    policy, trainable, prompt = policy_on(base, whole=True)
    family = policy.family
    llm = LLM(
        str(base), dtype="float32", enforce_eager=True, max_model_len=LENGTH, max_num_seqs=4, block_size=32,
        limit_mm_per_prompt={"audio": 1}, logprobs_mode="processed_logprobs", hf_overrides=vllm_check.OVERRIDES[name],
        weight_transfer_config={"backend": "covo_rl_files"},
    )  # fmt: skip
    probe = Probe(policy, prompt)
    request = {"prompt_token_ids": prompt_ids(prompt, family),
               "multi_modal_data": {"audio": clip_waveform(prompt.clip_keys[0], policy.clips, family)},
               "multi_modal_uuids": {"audio": list(prompt.clip_keys)}}  # fmt: skip
    params = SamplingParams(**sampling_fields(probe.config, family, generations=1, seed=0, greedy=True))

    def difference() -> float:
        (answer,) = llm.generate([request], params, use_tqdm=False)
        (output,) = answer.outputs
        logps = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
        completion = Completion(tuple(output.token_ids), tuple(logps), output.finish_reason)
        group = group_of(prompt, answer.prompt_token_ids, [completion], decoder=TextDecoder(family),
                         limit=probe.config.max_completion_length, version=0)  # fmt: skip
        with torch.no_grad():
            ours = policy("logps", [group], policy.features([prompt])).logps_NC[0].tolist()
        return max(abs(a - b) for a, b in zip(ours, logps, strict=False))

    figures, files = {"base": difference()}, WeightFiles(trainable, shard_bytes=1 << 18)
    with weight_noise(family.model) as draw:
        draw(0.3)
        figures["older weights"] = difference()
        llm.start_weight_update()
        for path in files.shards():
            llm.update_weights({"update_info": {"source": str(path)}})
        llm.finish_weight_update("1")
        figures["no reset"] = difference()
        llm.reset_prefix_cache()
        figures["encoder outputs kept"] = difference()
        llm.llm_engine.reset_encoder_cache()
        llm.reset_prefix_cache()
        figures["both reset"] = difference()
    files.close()
    return figures


# -- on a server ---------------------------------------------------------------------------------------------------


@contextmanager
def served(options: Options, port: int) -> Iterator[str]:
    """The command that covo-rl prints, run until the end of the block."""
    from covo_rl.run.rollout_server import serve_command

    command = serve_command(options, "127.0.0.1", port, cpu=True)
    log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 (until the process has ended)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", "-c", f"exec env {command}"], stdout=log, stderr=log, env=environment,
                               start_new_session=True)  # fmt: skip
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 600
    try:
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command}\n{Path(log.name).read_text()[-4000:]}")
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


def refuses(url: str, path: str) -> bool:
    """Without the key, 401."""
    try:
        urllib.request.urlopen(urllib.request.Request(url + path, b"{}", method="POST"), timeout=10)
    except urllib.error.HTTPError as error:
        return error.code == 401
    return False


def on_server(name: str, base: Path, port: int, *, whole: bool) -> dict[str, float]:
    """Largest difference at the start and after each of two updates, sent over HTTP; seconds of the last sync."""
    from covo_rl.engines.vllm_server import VLLMServer

    options = Options()
    options.model.model, options.model.dtype = str(base), "float32"
    options.adapter.lora, options.adapter.lora_r = not whole, 8
    options.engine.use_vllm, options.engine.vllm_mode = True, "server"
    options.engine.vllm_max_model_length, options.engine.vllm_adapter_transport = LENGTH, "http"
    figures = {}
    with served(options, port) as url:
        options.engine.vllm_server_base_url = url
        for path in ("/collective_rpc", "/update_weights", "/reset_prefix_cache", "/v1/load_lora_adapter"):
            if not refuses(url, path):
                raise RuntimeError(f"{url}{path} wants no key")
        policy, trainable, prompt = policy_on(base, whole=whole)
        engine = VLLMServer(policy, trainable, options, max_model_len=LENGTH, probe_prompt=prompt)
        try:
            for version in (1, 2):
                change(policy, version)
                report = engine.sync(version)
                figures[f"version {version}"] = report.probe_abs
            figures |= {f"{phase} s": seconds for phase, seconds in report.seconds.items()}
        finally:
            engine.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=vllm_check.OVERRIDES, default="covo_audio")
    parser.add_argument("--port", type=int, default=8766, help="of the server, on this machine alone")
    parser.add_argument("--only", choices=["process", "whole", "lora"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        torch.manual_seed(0)
        vllm_check.write_base(args.family, base)
        results = {}
        for kind in ("whole", "lora"):
            if args.only in (None, kind):
                results[f"server, {kind}"] = on_server(args.family, base, args.port, whole=kind == "whole")
        if args.only in (None, "process"):
            results["process"] = in_process(args.family, base)
    print(json.dumps(results, indent=2), flush=True)
    good = [value <= TOLERANCE for key, figures in results.items() for name, value in figures.items()
            if name in ("base", "both reset") or name.startswith("version")]  # fmt: skip
    stale = [value >= STALE for name, value in results.get("process", {}).items()
             if name in ("older weights", "no reset", "encoder outputs kept")]  # fmt: skip
    sys.exit(0 if all(good + stale) else 1)


if __name__ == "__main__":
    main()
