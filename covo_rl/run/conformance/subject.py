"""The model under test: its prompts, rollouts and policy, and the two passes that several points compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch

from covo_rl.audio import ClipStore
from covo_rl.config import AdapterConfig, PromptConfig
from covo_rl.export.questions import stock_inputs
from covo_rl.models.base import AudioFamily
from covo_rl.policy import Policy
from covo_rl.policy.recompute import keep_activations, recompute_activations
from covo_rl.policy.trainable import Trainable, make_trainable
from covo_rl.prompt import build_prompt
from covo_rl.types import Clip, Example, Group, Prompt, Rollout

RATE = 16_000
#: seconds of the clips of each prompt: two lengths, two clips of one length (a stock batch pads others), none
CLIPS = ((1.1,), (0.4,), (0.7, 0.7), ())
#: ids in each of their completions
LENGTHS = ((9, 1, 17, 5), (3, 7), (6, 2), (4, 11))
#: bytes of weights up to which a second copy and all activations are nothing to ask about
LIGHT = 2 * 2**30
#: layers up to which float32 is held to 1e-5; deeper ones round more
SHALLOW = 8
#: largest difference of a log-prob that rounding makes, by dtype
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.15}

Gradients = dict[str, torch.Tensor]


class Subject:
    """A loaded family whose points are to be checked.

    `folder` is where it was loaded from, None: made in memory. `exports` None exports what is light, True whatever
    there is room for, False nothing.
    """

    def __init__(
        self, family: AudioFamily, folder: str | None, *, exports: bool | None = None, seed: int = 0
    ) -> None:  # fmt: skip
        self.family, self.folder, self.exports, self.seed = family, folder, exports, seed
        self.clips = ClipStore()
        family.model.eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.family.embed_tokens.weight.dtype

    @property
    def exact(self) -> float:
        """Largest difference of a log-prob, in nats, between two ways to compute the same."""
        shallow = self.family.model.config.get_text_config().num_hidden_layers <= SHALLOW
        return 1e-5 if self.dtype == torch.float32 and shallow else ROUNDING.get(self.dtype, 0.15)

    @property
    def exact_gradient(self) -> float:
        """Largest difference of a gradient, relative to the largest."""
        return 1e-4 if self.dtype == torch.float32 else 0.15

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.family.model.parameters())

    # -- what it is asked ----------------------------------------------------------------------------------------

    def wave(self, seed: int, seconds: float) -> np.ndarray:
        """Noise under a tone at RATE, float32, the same for a seed."""
        rng, times = np.random.default_rng(seed), np.arange(round(RATE * seconds)) / RATE
        wave = 0.2 * np.sin(2 * np.pi * (200 + 90 * seed) * times) + rng.normal(size=len(times)) * 0.05
        return wave.astype(np.float32)

    def clip(self, seed: int, seconds: float) -> Clip:
        """The same as a clip of a row."""
        return Clip(array=self.wave(seed, seconds), sampling_rate=RATE)

    def prompt(self, name: str, seconds: Sequence[float], question: str = "What do you hear?") -> Prompt:
        clips = tuple(self.clip(len(name) + place, length) for place, length in enumerate(seconds))
        row = Example(name, clips, question, ("bell", "dog"), "bell")
        return build_prompt(row, self.family, self.clips, PromptConfig(instruction=""))

    @cached_property
    def prompts(self) -> list[Prompt]:
        """One clip, a shorter one, two clips, no clip; questions of different length."""
        more = [" The dog barks." * place for place in range(len(CLIPS))]
        return [self.prompt(f"check{'-' * place}", seconds, f"What do you hear?{more[place]}")
                for place, seconds in enumerate(CLIPS)]  # fmt: skip

    @property
    def special_ids(self) -> set[int]:
        """Ids that a model may treat otherwise than ordinary text."""
        family = self.family
        values = family.model.config.to_dict()
        stated = {value for name, value in values.items() if name.endswith(("token_id", "token_index"))
                  and isinstance(value, int)}  # fmt: skip
        return {*family.tokenizer.all_special_ids, *family.unsampled_ids, family.audio_token_id, *stated}

    @cached_property
    def plain_ids(self) -> np.ndarray:
        """Ids of ordinary text."""
        size, special = min(len(self.family.tokenizer), self.family.embedded_ids, 5000), self.special_ids
        return np.array([i for i in range(size) if i not in special])

    def group(self, prompt: Prompt, lengths: Sequence[int], seed: int = 0) -> Group:
        """Rollouts of random ids: for scoring it does not matter who wrote them."""
        rng = np.random.default_rng([self.seed, seed])
        ids = [tuple(map(int, rng.choice(self.plain_ids, size=length))) for length in lengths]
        return Group(prompt, tuple(Rollout(row, (0.0,) * len(row), "", "stop") for row in ids))

    @cached_property
    def groups(self) -> list[Group]:
        pairs = zip(self.prompts, LENGTHS, strict=True)
        return [self.group(prompt, lengths, seed) for seed, (prompt, lengths) in enumerate(pairs)]

    # -- what trains ---------------------------------------------------------------------------------------------

    @cached_property
    def trainable(self) -> Trainable:
        """LoRA whose second matrix is not zero, so that it matters."""
        modes = make_trainable(self.family, AdapterConfig(lora_r=4, lora_alpha=8.0))
        generator = torch.Generator().manual_seed(self.seed + 1)
        with torch.no_grad():
            for name, parameter in self.family.model.named_parameters():
                if parameter.requires_grad and "lora_B" in name:
                    scale = 0.3 / parameter.shape[0] ** 0.5
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        return modes

    @cached_property
    def policy(self) -> Policy:
        return Policy(self.family, self.trainable.peft_model, clips=self.clips, decode_weights_mb=512)

    @property
    def adapter(self) -> dict[str, torch.nn.Parameter]:
        """What trains, by name."""
        return {name: p for name, p in self.family.model.named_parameters() if p.requires_grad}

    # -- the two passes ------------------------------------------------------------------------------------------

    def stock_logits(self, prompt: Prompt, ids: Sequence[int] = ()) -> torch.Tensor:
        """The model's own forward of one row: logits (C, V) float32 that predict `ids`, or the next one."""
        inputs = stock_inputs(prompt, self.family, self.clips)
        row = torch.tensor([[*prompt.input_ids, *ids]])
        inputs |= {"input_ids": row, "attention_mask": torch.ones_like(row)}
        model: Any = self.family.model
        logits = model(**self.placed(inputs), use_cache=False).logits[0].float()
        return logits[len(prompt.input_ids) - 1 :][: max(1, len(ids))]

    def placed(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On the model's device, floating-point ones in the encoder's dtype."""
        device = self.family.embed_tokens.weight.device
        return {name: value.to(device, self.dtype) if value.is_floating_point() else value.to(device)
                for name, value in inputs.items()}  # fmt: skip

    def drawable(self, logits_CV: torch.Tensor) -> torch.Tensor:
        """Logits without the ids that the family never draws."""
        hidden = list(self.family.unsampled_ids)
        return logits_CV.index_fill(-1, torch.tensor(hidden, device=logits_CV.device), -torch.inf) if hidden else (
            logits_CV)  # fmt: skip

    def stock_logps(self, prompt: Prompt, ids: Sequence[int]) -> torch.Tensor:
        """(C,) of the model's own forward."""
        table_CV = self.drawable(self.stock_logits(prompt, ids)).log_softmax(-1)
        return table_CV.gather(1, torch.tensor(ids, device=table_CV.device)[:, None])[:, 0]

    def packed_logps(self, groups: Sequence[Group], **options: Any) -> list[torch.Tensor]:
        """(C,) of each rollout from the policy's scoring pass."""
        features = self.policy.features([group.prompt for group in groups])
        scored = self.policy("logps", groups, features, **options)
        return [row[mask] for row, mask in zip(scored.logps_NC, scored.mask_NC, strict=True)]

    def gradients(self, logps: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> Gradients:
        """Of the weighted log-probs, by name of what trains."""
        loss = torch.stack([(w.to(row.device) * row).sum() for w, row in zip(weights, logps, strict=True)]).sum()
        return dict(zip(self.adapter, torch.autograd.grad(loss, list(self.adapter.values())), strict=True))

    def weights(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        """A random weight for every id of every rollout, so that their sum tests every path of the gradient."""
        generator = torch.Generator().manual_seed(self.seed + 3)
        return [torch.randn(len(r.completion_ids), generator=generator) for group in groups for r in group.rollouts]

    def compare(self, groups: Sequence[Group]) -> tuple[float, float]:
        """(largest difference of a log-prob, of a gradient relative to the largest): packed pass against stock rows."""
        weights, rows = self.weights(groups), [(group.prompt, r) for group in groups for r in group.rollouts]
        with self.thrift():
            packed = self.packed_logps(groups)
            ours, packed = self.gradients(packed, weights), [row.detach() for row in packed]
            theirs = {name: torch.zeros_like(value) for name, value in ours.items()}
            plain = []
            for (prompt, rollout), weight in zip(rows, weights, strict=True):  # one row's graph at a time
                logps = self.stock_logps(prompt, rollout.completion_ids)
                for name, gradient in self.gradients([logps], [weight]).items():
                    theirs[name] += gradient
                plain.append(logps.detach())
        return largest_difference(packed, plain), relative_difference(ours, theirs)

    @contextmanager
    def thrift(self) -> Iterator[None]:
        """Of a large model the layers are recomputed: their activations would be gigabytes."""
        if self.nbytes <= LIGHT:
            yield
            return
        with self.recomputing():
            yield

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """In training mode, whole layers made again in the backward pass."""
        policy = self.policy  # PEFT, put into a model that recomputes, would make a graph of the encoder
        recompute_activations(self.family.decoder, "layer")
        policy.train()
        try:
            yield
        finally:
            policy.eval()
            keep_activations(self.family.decoder)

    @contextmanager
    def short_windows(self, window: int) -> Iterator[int]:
        """Every sliding window of the decoder shortened to `window` positions; yields how many layers have one."""
        decoder: Any = self.family.decoder
        places = [(m, m.sliding_window) for m in decoder.modules() if isinstance(_window(m), int)]
        config = decoder.config
        stated = _window(config)
        try:
            for module, _ in places:
                module.sliding_window = window
            if places:
                config.sliding_window = window
            yield len(places)
        finally:
            for module, value in places:
                module.sliding_window = value
            if places:
                config.sliding_window = stated


def _window(holder: Any) -> Any:
    return getattr(holder, "sliding_window", None)


def largest_difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """In absolute terms, over pairs of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def relative_difference(ours: Gradients, theirs: Gradients) -> float:
    """Largest norm of a difference over the largest norm of a gradient."""
    top = max(float(gradient.norm()) for gradient in theirs.values())
    return max(float((ours[name] - theirs[name]).norm()) for name in theirs) / top
