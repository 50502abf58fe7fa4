"""What vLLM takes of a GPU that it shares with training, or of its own: weights, keys and values of completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from covo_rl.config import Options
    from covo_rl.run.sizes import Shape

GB = 1e9


def vllm_memory(
    shape: Shape, options: Options, *, prompt_positions: int, size: int, gpu_bytes: float | None
) -> tuple[dict[str, float], list[str]]:
    """(what it holds -> bytes of this rank's GPU while it samples, notes). Of a server, elsewhere: nothing, and notes.

    `size` bytes per value; a prompt's keys are kept once for its group. A colocated engine takes its share of the GPU
    whatever it needs, so where `gpu_bytes` are known they are counted; else what all completions at once would need.
    """
    engine, rollout, prompts = options.engine, options.rollout, options.train.prompts_per_step
    rows, length = prompts * rollout.num_generations, rollout.max_completion_length
    weights = (shape.total / engine.vllm_tensor_parallel_size + shape.trainable * options.adapter.lora) * size
    position = 2 * shape.layers * shape.kv_width * size
    keys = (prompts * prompt_positions + rows * length) * position
    need = f"{weights / GB:,.1f} GB of weights, {keys / GB:,.1f} GB of keys for all {rows} completions at once"
    if engine.vllm_mode == "server":
        together = "; one step ahead, so that a step takes the longer of sampling and the rest"
        return {}, [f"the servers hold {need}{together if engine.rollout_ahead else ''}"]
    notes, share = [], engine.vllm_gpu_memory_utilization
    if engine.vllm_enable_sleep_mode:
        notes.append(f"during the update vLLM sleeps: its weights wait in the host's memory ({weights / GB:,.1f} GB)")
    if gpu_bytes is None:
        lowest = "the GPU's memory is not known here (--gpu-gb): vllm_gpu_memory_utilization must give vLLM its weights"
        return {"vLLM: weights": weights, "vLLM: keys": keys}, [lowest, *notes]
    group = prompt_positions + rollout.num_generations * length
    groups = int((share * gpu_bytes - weights) / position / group)
    if groups < 1:
        least = (weights + group * position) / gpu_bytes
        notes.append(f"vllm_gpu_memory_utilization {share:g} is too little: weights and one group take {least:.2f}")
    elif groups < prompts:
        notes.append(f"vLLM writes {groups} of {prompts} groups at once in its share; it needs {need}")
    return {f"vLLM: {share:g} of the GPU": share * gpu_bytes}, notes
