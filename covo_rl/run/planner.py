"""Memory and time of a configuration, before any weight is loaded.

    plan(model_config, generations=8, ...) -> Plan        estimates only; opens no checkpoint

Parameters are counted exactly (the model is built without storage). Activations are estimated from what the decoder
layers save for the backward pass, per position:

    10 D + 4 I + 2 K       D width, I width of the MLP, K width of keys and values (norms, attention, gated MLP)

which a test compares with what a real pass saves. Every figure is for one rank without sharding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MIB = 2**20
#: room for allocator fragmentation, libraries and the CUDA context
OVERHEAD = 1.1
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """What the estimates need of a model: parameters by part, and the decoder's widths."""

    parameters: dict[str, int]
    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_width: int
    vocabulary: int
    encoder_flops_per_clip: float
    linear_parameters: int

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank by what holds them, and seconds of one step by phase.

    `memory` has the steady part (weights, gradients and optimiser, reference), `sampling` and `loss` what each phase
    adds at its peak; `peak` is steady plus the larger of them, with 10 % for fragmentation.
    """

    memory: dict[str, float]
    sampling: dict[str, float]
    loss: dict[str, float]
    seconds: dict[str, float]
    positions: dict[str, int]
    trainable: int
    notes: tuple[str, ...] = field(default=())

    @property
    def peak(self) -> float:
        """Bytes."""
        return OVERHEAD * (sum(self.memory.values()) + max(sum(self.sampling.values()), sum(self.loss.values())))

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Speed:
    """What the device does: products per second and bytes read per second, in use rather than on paper."""

    flops: float
    bandwidth: float


def shape_of(model_config: Any) -> Shape:
    """Count the parameters of a transformers configuration, without storage for them.

    Raises ValueError for a model type without a family.
    """
    import torch

    from covo_rl.models import family_class

    family = family_class(model_config.model_type)
    model = _empty_model(model_config)
    parts = dict.fromkeys(family.parts, 0)
    parts["other"] = 0
    for name, parameter in model.named_parameters():
        part = next((p for p, prefix in family.parts.items() if name.startswith(prefix)), "other")
        parts[part] += parameter.numel()
    decoder = model_config.get_text_config()
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    prefix = family.parts["llm"]
    linear = sum(
        m.weight.numel() for n, m in model.named_modules() if n.startswith(prefix) and isinstance(m, torch.nn.Linear)
    )
    audio = parts.get("encoder", 0) + parts.get("audio_adapter", 0)
    return Shape(
        parameters=parts,
        layers=decoder.num_hidden_layers,
        width=decoder.hidden_size,
        mlp_width=decoder.intermediate_size,
        heads=decoder.num_attention_heads,
        kv_width=decoder.num_key_value_heads * head_dim,
        vocabulary=decoder.vocab_size,
        encoder_flops_per_clip=2.0 * audio * 1500,
        linear_parameters=linear,
    )


def _empty_model(model_config: Any) -> Any:
    import torch
    import transformers

    import covo_rl.models.covo_audio  # noqa: F401  (registers its classes)

    error: Exception | None = None
    with torch.device("meta"):
        for name in ("AutoModelForMultimodalLM", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
            try:
                return getattr(transformers, name).from_config(model_config)
            except (ValueError, AttributeError) as problem:
                error = problem
    raise ValueError(f"no model class for {type(model_config).__name__}: {error}")


def audio_positions(model_config: Any, seconds: float) -> int:
    """Decoder positions that one clip fills."""
    if model_config.model_type == "covo_audio":
        return -(-round(seconds * 100) // model_config.slot_frames)
    return round(seconds * 25)  # Qwen2-Audio: 750 for 30 s


def plan(
    model_config: Any,
    *,
    prompts: int,
    generations: int,
    prompt_positions: int,
    completion: int,
    micro_batch_prompts: int,
    micro_batch_rollouts: int = 0,
    lora: bool = True,
    lora_r: int = 16,
    train_parts: tuple[str, ...] = ("llm", "lm_head"),
    dtype: str = "bfloat16",
    gradient_checkpointing: bool = False,
    reference: bool = False,
    updates: int = 1,
    decode_weights_mb: float = 2048,
    speed: Speed | None = None,
) -> Plan:
    """Estimate one step on one rank: `prompts` x `generations` completions of `completion` ids.

    `prompt_positions` includes the audio. `reference` says that a KL term needs a reference; `updates` is the number
    of optimiser passes over the batch (beyond one, old log-probs are needed in lower precision).
    """
    shape = shape_of(model_config)
    width, size = shape.width, BYTES[dtype]
    trainable = _lora_parameters(shape, lora_r) if lora else sum(shape.parameters.get(p, 0) for p in train_parts)
    train_size = 4 if lora else size
    rows = prompts * generations
    micro_rows = min(micro_batch_prompts, prompts) * min(micro_batch_rollouts or generations, generations)
    micro = min(micro_batch_prompts, prompts) * prompt_positions + micro_rows * completion
    memory = {
        "weights": shape.total * size + (trainable * 4 if lora else 0),
        "gradients": trainable * train_size,
        "optimiser (AdamW)": 2 * trainable * train_size,
        "reference copy": trainable * size if reference and not lora else 0.0,
    }
    key_values = 2 * shape.layers * shape.kv_width * size
    folds = dtype == "float32" and shape.linear_parameters * 4 <= decode_weights_mb * MIB
    sampling = {
        # packed as the prefill left them, and padded as the decoding reads them
        "prompt keys": 2 * prompts * prompt_positions * key_values,
        "completion keys": rows * completion * key_values,
        "logits and probabilities": 3 * rows * shape.vocabulary * 4,
        "decoding weights": shape.linear_parameters * 4 if folds else 0.0,
    }
    head_trains = not lora and "lm_head" in train_parts
    loss = {
        "activations": activation_bytes(shape, micro, size, gradient_checkpointing),
        "head": micro_rows * completion * width * size
        + (4 if head_trains else 1) * _chunk_bytes(shape, micro_rows * completion),
        "head gradient in use": shape.parameters.get("lm_head", 0) * size if head_trains else 0.0,
    }
    seconds = {}
    if speed is not None:
        seconds = _seconds(shape, prompts, generations, prompt_positions, completion, size, reference, updates, speed)
    notes = []
    if gradient_checkpointing and seconds:
        seconds["loss"] *= 4 / 3
    if not gradient_checkpointing and loss["activations"] > 2 * shape.total * size:
        notes.append("activations outweigh the weights: gradient_checkpointing or a smaller micro_batch_prompts helps")
    positions = {"prompts": prompts * prompt_positions, "completions": rows * completion, "micro-batch": micro}
    return Plan(memory, sampling, loss, seconds, positions, trainable, tuple(notes))


def activation_bytes(shape: Shape, positions: int, size: int, checkpointing: bool) -> float:
    """What the decoder saves for the backward pass over `positions` packed positions."""
    layer = positions * (10 * shape.width + 4 * shape.mlp_width + 2 * shape.kv_width) * size
    if not checkpointing:
        return float(shape.layers * layer)
    return float(shape.layers * positions * shape.width * size + layer)


def _lora_parameters(shape: Shape, rank: int) -> int:
    """LoRA on q, k, v, o and the three MLP layers of every decoder layer."""
    pairs = [
        (shape.width, shape.width), (shape.width, shape.kv_width), (shape.width, shape.kv_width),
        (shape.width, shape.width), (shape.width, shape.mlp_width), (shape.width, shape.mlp_width),
        (shape.mlp_width, shape.width),
    ]  # fmt: skip
    return shape.layers * rank * sum(a + b for a, b in pairs)


def _chunk_bytes(shape: Shape, positions: int) -> float:
    from covo_rl.policy.head import CHUNK_ELEMENTS

    return 4.0 * min(max(CHUNK_ELEMENTS, 16 * shape.vocabulary), positions * shape.vocabulary)


def _seconds(
    shape: Shape, prompts: int, generations: int, prompt: int, completion: int, size: int, reference: bool,
    updates: int, speed: Speed,
) -> dict[str, float]:  # fmt: skip
    """Products over the device's rate; a decode step takes at least the reading of weights and keys."""
    rows = prompts * generations
    head = 2.0 * shape.width * shape.vocabulary

    def forward(queries: float, pairs: float) -> float:
        return 2.0 * shape.linear_parameters * queries + 4.0 * shape.layers * shape.width * pairs

    completion_pairs = rows * (completion * prompt + completion**2 / 2)
    prefill = forward(prompts * prompt, prompts * prompt**2 / 2)
    one_pass = prefill + forward(rows * completion, completion_pairs) + rows * completion * head
    decode = forward(rows * completion, completion_pairs) + rows * completion * head
    read = (shape.linear_parameters + shape.width * shape.vocabulary) * size
    read += 2 * shape.layers * shape.kv_width * size * (prompts * prompt + rows * completion / 2)
    return {
        "encode": prompts * shape.encoder_flops_per_clip / speed.flops,
        "prefill": prefill / speed.flops,
        "decode": max(decode / speed.flops, completion * read / speed.bandwidth),
        "old": one_pass / speed.flops if updates > 1 and size < 4 else 0.0,
        "reference": one_pass / speed.flops if reference else 0.0,
        "loss": updates * 2.2 * one_pass / speed.flops,
    }


def measure_speed(device: str = "auto", dtype: str = "float32") -> Speed:
    """A quick measurement of this machine: one product, one copy."""
    import time

    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind = getattr(torch, dtype)
    n = 4096 if chosen == "cuda" else 768
    a = torch.randn(n, n, device=chosen).to(kind)
    big = torch.empty((256 if chosen == "cuda" else 64) * MIB // 4, device=chosen)

    def rate(work: float, function: Any) -> float:
        function()
        times = []
        for _ in range(3):
            if chosen == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if chosen == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return work / min(times)

    return Speed(rate(2.0 * n**3, lambda: a @ a), rate(4.0 * big.numel(), lambda: big.sum()))
