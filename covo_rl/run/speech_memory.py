"""Memory and time of the training of a speech tokenizer or decoder, before it begins: `covo-rl doctor --speech KIND`.

One update is computed on tensors without storage (the "meta" device): autograd keeps what it would keep, and operations
are counted as they come. Exact but for what the allocator adds and for CTC, k-means and the optimiser's own work.
Seconds are a lower bound: on an H200 a flow takes 1.1 times as long, a tokenizer 3.3, BigVGAN with discriminators 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from covo_rl.run.doctor import BYTES, Plan
from covo_rl.run.speed import Speed, measure_speed
from covo_rl.speech.decoder_training import DecoderTraining, read_decoder_training
from covo_rl.speech.training import TokenizerTraining, read_training

if TYPE_CHECKING:
    from torch import Tensor, nn


def speech_plan(kind: str, path: Path, seconds: float, device: str) -> Plan:
    """Of the YAML of a training of a "tokenizer" or a "decoder", at the speed of `device`; raises ConfigError."""
    speed_in = partial(measure_speed, device)
    if kind == "tokenizer":
        return tokenizer_plan(read_training(path), seconds, speed_in)
    return decoder_plan(read_decoder_training(path), speed_in)


#: dtype -> how fast products in it are, and copies
SpeedIn = Callable[[str], Speed]


class _Update(NamedTuple):
    """What trains, its loss, how often, in how many passes, and in which dtype its products are."""

    module: nn.Module
    loss: Callable[[], Tensor]
    count: int
    passes: int
    dtype: str


def tokenizer_plan(config: TokenizerTraining, seconds: float, speed_in: SpeedIn | None = None) -> Plan:
    """Of a training on clips of `seconds`, on one rank; WavLM-large or the tiny one, whatever `wavlm` names."""
    import torch

    from covo_rl.speech.configuration import SpeechTokenizerConfig
    from covo_rl.speech.front_end import prepare_wave
    from covo_rl.speech.grid import CODE_SAMPLES, RATE
    from covo_rl.speech.heads import Heads
    from covo_rl.speech.tokenizer import SpeechTokenizer

    published = config.shape == "published"
    shape = SpeechTokenizerConfig.published() if published else SpeechTokenizerConfig.tiny()
    with torch.device("meta"):
        model = SpeechTokenizer(shape).train()
        heads = model.heads = Heads(shape.merge_width, shape.head_width, config.pieces or shape.pieces)
    if shape.front_end == "conv":
        model.wavlm.feature_extractor.requires_grad_(False)
    model.to(getattr(torch, config.dtype))
    codes = max(1, round(seconds * RATE / CODE_SAMPLES))
    samples = len(prepare_wave(torch.zeros(codes * CODE_SAMPLES), shape.front_end))

    def update() -> Tensor:
        waves = model.merge.weight.new_empty(config.batch_size, samples)
        vectors_BLC, mask_BL = model.features(list(waves))
        embeds_BLW = model.from_code(vectors_BLC.to(model.merge.weight))
        logits = heads.asr(embeds_BLW, mask_BL).float().log_softmax(-1)
        mel = heads.draw_mel(embeds_BLW, embeds_BLW.new_empty(config.batch_size, 64), mask_BL)
        return logits.sum() + mel.float().sum() + heads.pitch(embeds_BLW, mask_BL).float().sum()

    passes = config.gradient_accumulation_steps
    updates = {"tokenizer": _Update(model, update, config.steps, passes, config.dtype)}
    return _plan(updates, [model], speed_in, {"codes": config.batch_size * codes * passes})


def decoder_plan(config: DecoderTraining, speed_in: SpeedIn | None = None) -> Plan:
    """Of a training of flow and vocoder, on one rank; the vocoder trains in float32, whatever `dtype` says."""
    import torch

    from covo_rl.models.covo_audio.token2wav import Token2Wav
    from covo_rl.speech.decoder_losses import FlowDraw, flow_loss, spectral_loss, vocoder_loss
    from covo_rl.speech.discriminators import Discriminators
    from covo_rl.speech.train_decoder import decoder_shape

    with torch.device("meta"):
        model = Token2Wav(decoder_shape(config)).train()
        judge = Discriminators() if config.discriminators else None
    field, vocoder, latent = model.token2latent, model.wavegan, model.config.flow.z_dim
    rows, frames = max(1, config.flow_frames // config.sequence_frames), config.sequence_frames
    field.to(getattr(torch, config.dtype))

    def flow_update() -> Tensor:
        like = torch.empty(rows, frames, latent, device="meta", dtype=field.cond_proj.weight.dtype)
        codes = torch.empty(rows, frames // 4, device="meta", dtype=torch.long)
        mask = torch.empty(rows, frames, device="meta", dtype=torch.bool)
        draw = FlowDraw(like[:, 0, 0], like, mask[:, 0], mask)
        return flow_loss(field, like, codes, like.new_empty(rows, model.config.flow.spkr_embed_dim), mask, draw)

    def vocoder_update() -> Tensor:
        true = torch.empty(config.vocoder_batch, config.vocoder_frames * 240, device="meta")
        heard = vocoder(torch.empty(config.vocoder_batch, latent, config.vocoder_frames, device="meta"))[:, 0]
        if judge is None:
            return spectral_loss(heard, true)
        maps = judge(true)  # once more for the discriminators' own update, which is as large
        again = torch.stack([verdicts[-1].sum() for verdicts in judge(heard)])
        return torch.stack([*vocoder_loss(maps, judge(heard), true, heard).values(), *again]).sum()

    updates = {}
    if config.vocoder_steps:
        updates["vocoder"] = _Update(vocoder, vocoder_update, config.vocoder_steps, 1, "float32")
    if config.flow_steps:
        updates["flow"] = _Update(field, flow_update, config.flow_steps, 1, config.dtype)
    parts = [model] if judge is None else [model, judge]
    positions = {"flow frames": rows * frames, "vocoder frames": config.vocoder_batch * config.vocoder_frames}
    return _plan(updates, parts, speed_in, positions)


def _plan(
    updates: dict[str, _Update], parts: Sequence[nn.Module], speed_in: SpeedIn | None,
    positions: dict[str, int],
) -> Plan:  # fmt: skip
    everything = sum(p.numel() for part in parts for p in part.parameters())
    trainable = sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)
    passes = {name: counted_pass(update.module, update.loss) for name, update in updates.items()}
    narrow = [(BYTES[update.dtype], update.module) for update in updates.values() if update.dtype != "float32"]
    memory = {
        "weights": 4.0 * everything + sum(size * p.numel() for size, part in narrow for p in part.parameters()),
        "gradients": 4.0 * trainable, "optimiser (AdamW)": 8.0 * trainable,
    }  # fmt: skip
    notes = []
    speeds = {dtype: speed_in(dtype) for dtype in {update.dtype for update in updates.values()}} if speed_in else {}
    for name, (_, _, count, repeats, dtype) in updates.items() if speeds else ():
        speed, work = speeds[dtype], passes[name][1]
        seconds = repeats * sum(max(flops / speed.flops, size / speed.bandwidth) for flops, size in work)
        notes.append(f"{count:,} updates of the {name} take {seconds:,.3g} s each, {count * seconds / 3600:,.3g} hours "
                     f"in all, or more: at the {speed.flops / 1e12:,.3g} TFLOP/s of products in {dtype} and "
                     f"{speed.bandwidth / 1e9:,.3g} GB/s of copies measured here")  # fmt: skip
    largest = max(kept for kept, _ in passes.values())
    return Plan(memory, {}, {"activations": largest}, {}, positions, trainable, tuple(notes))


def counted_pass(module: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, list[tuple[int, int]]]:
    """Bytes that autograd keeps of a forward pass, weights of `module` aside; and of each operation of forward and
    backward pass the multiplications and additions of its products, and the bytes that it reads and writes.

    All tensors of `loss` are on the meta device.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    work: list[tuple[int, int]] = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if not any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns):  # no view
                count = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)
                tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
                flops = int(count(*args, **(kwargs or {}), out_val=result))
                work.append((flops, sum(tensor.nbytes for tensor in tensors)))
            return result

    own = {value.untyped_storage()._cdata for value in (*module.parameters(), *module.buffers())}
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), Counter():
        loss().backward()
    storages = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in kept}
    module.zero_grad(set_to_none=True)
    return float(sum(size for key, size in storages.items() if key not in own)), work
