"""The policy: one module with one forward, so that DDP and FSDP2 wrap it once and all their hooks fire.

policy = Policy(family, peft_model=modes.peft_model, clips=clips)
features = policy.features(prompts)                              each clip once
scores   = policy("logps", groups, features, temperature=1.0)    each prompt once for all its rollouts
draws    = policy(sample_draws, prompts, features, ...)          any function of the policy, under the same hooks
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from covo_rl.policy.attention import KeyValues, PackedLayout
from covo_rl.policy.features import Embedder, Features, FeatureStore
from covo_rl.policy.head import head_of, token_logps
from covo_rl.policy.packable import prepare_attention
from covo_rl.policy.packing import Packed, Span, check_sampled, identity, pack
from covo_rl.policy.recompute import recompute_activations
from covo_rl.policy.rows import PlainRows, evaluation_mode, packed_hidden
from covo_rl.policy.sharding import is_sharded, layer_classes

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.models.base import AudioFamily
    from covo_rl.types import Group, Prompt


class LogProbs(NamedTuple):
    """Group-major over the given groups, right-padded with 0: float32, bool, float32 in nats or None."""

    logps_NC: torch.Tensor
    mask_NC: torch.Tensor
    entropy_NC: torch.Tensor | None = None


@dataclass
class Counters:
    """Work done so far, for tests and benchmarks."""

    passes: int = 0
    prompt_positions: int = 0
    completion_positions: int = 0
    decode_positions: int = 0


@dataclass
class PromptCache:
    """Prompt keys of the last sampling call, with the weights' version they were made with."""

    keys: KeyValues
    places: dict[Any, int]
    spans: list[Span]
    last_PD: torch.Tensor
    version: int


class Policy(nn.Module):
    """The trainable model, its audio features, its reference.

    `peft_model` None means full training; then `keep_reference` makes a frozen copy of what trains, now.
    `clips` resolves clip keys; without it only text-only prompts and given features work. `decode_weights_mb`
    bounds the memory for a second set of decoder weights while sampling: LoRA folded in, packed for few rows
    (float32 only; 0 is off). `fused_decode` False samples with the model's own modules, the reference;
    `decode_graphs` False starts the kernels of a step one by one (CUDA).
    """

    def __init__(
        self, family: AudioFamily, peft_model: nn.Module | None = None, *, clips: ClipStore | None = None,
        feature_memory_mb: float = 512, gradient_checkpointing: bool = False, recompute: str = "mlp",
        keep_reference: bool = False, decode_weights_mb: float = 2048, fused_decode: bool = True,
        decode_graphs: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.family, self.clips, self.decode_weights_mb = family, clips, decode_weights_mb
        self.fused_decode, self.decode_graphs = fused_decode, decode_graphs
        self.model: nn.Module = family.model if peft_model is None else peft_model
        self.has_adapter = peft_model is not None
        self.counters = Counters()
        self._no_split_modules = layer_classes(family.model)
        self.prompt_cache: PromptCache | None = None
        self.autocast_seen = False
        prepare_attention(family)
        if gradient_checkpointing:
            recompute_activations(family.decoder, recompute)
        keeps = keep_reference and not self.has_adapter
        self._reference_family = frozen_copy(family) if keeps else family
        self.reference_model: nn.Module | None = self._reference_family.model if keeps else None
        self.embedder = Embedder(self, family, self._reference_family, clips, feature_memory_mb)
        self.train(self.training)

    # -- one forward ---------------------------------------------------------------------------------------------

    def forward(self, call: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `logps`, `old_logps` or a function `call(policy, ...)` under the hooks of whatever wraps this module."""
        if callable(call):
            return call(self, *args, **kwargs)
        if call not in ("logps", "old_logps"):
            raise ValueError(f"the policy has no method {call!r}; it has logps and old_logps, and takes functions")
        return getattr(self, call)(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The model's configuration, where accelerate and DeepSpeed look for it."""
        return self.family.model.config

    @property
    def device(self) -> torch.device:
        return self.family.embed_tokens.weight.device

    @property
    def sharded(self) -> bool:
        """Parameters live in pieces on several ranks, so every rank must make the same module calls."""
        return is_sharded(self)

    @property
    def store(self) -> FeatureStore:
        """Audio embeddings by clip, with counters of what was encoded."""
        return self.embedder.store

    def features(self, prompts: Sequence[Prompt]) -> Features:
        """Embeddings of the prompts' unique clips: now where the audio parts are frozen, else inside each pass."""
        features = Features([key for prompt in prompts for key in prompt.clip_keys], self.embedder.embeddings)
        if self.embedder.frozen and not self.sharded:
            features.get()
        return features

    def train(self, mode: bool = True) -> Policy:
        """Frozen audio parts and the reference stay in evaluation mode."""
        super().train(mode)
        for part in self.embedder.frozen_parts:
            self.family.model.get_submodule(self.family.parts[part].rstrip(".")).eval()
        if self.reference_model is not None:
            self.reference_model.eval()
        return self

    # -- scoring -------------------------------------------------------------------------------------------------

    def logps(
        self, groups: Sequence[Group], features: Features, *, temperature: float = 1.0, reference: bool = False,
        entropy: bool = False,
    ) -> LogProbs:  # fmt: skip
        """Log-probs of every completion id under the policy at `temperature`; each unique prompt computed once.

        `reference` scores with the adapters off (LoRA) or with the frozen copy (full), without gradient. `entropy`
        adds the differentiable entropy of every position.
        """
        with (
            self.as_reference() if reference else nullcontext(self.family) as family,
            nullcontext() if torch.is_grad_enabled() else self.evaluating(),
        ):
            check_sampled(groups, family.unsampled_ids)
            packed = pack(groups, family.audio_token_id, self.device)
            embeds_LD = self.embedder.embed(packed, features, family, reference=reference)
            hidden_XD, packed = self._pass(family, packed, embeds_LD)
            return self._scores(family, packed, hidden_XD, temperature, entropy)

    def _pass(self, family: AudioFamily, packed: Packed, embeds_LD: torch.Tensor) -> tuple[torch.Tensor, Packed]:
        """Hidden states of the packed row, or of plain rows, and the row with the places of its predictors in them."""
        ids_L, repeats = packed.input_ids_L, 0
        if family.packable:
            hidden_XD = packed_hidden(family, ids_L, embeds_LD, packed.position_ids_L, PackedLayout(packed))
        else:
            rows = PlainRows.of(packed)
            hidden_XD = rows.hidden(family, ids_L, embeds_LD)
            repeats = int(rows.mask_NT.sum()) - len(ids_L)
            packed = replace(packed, predictors_M=rows.predictors_M)
        self.count(packed)
        self.counters.prompt_positions += repeats
        return hidden_XD, packed

    def old_logps(
        self, groups: Sequence[Group], features: Features, *, temperature: float = 1.0, reuse_prompts: bool = True
    ) -> LogProbs:
        """`logps` without gradient; takes the prompts' keys from the last sampling call if the weights are the same."""
        cache = self.prompt_cache
        with torch.no_grad(), self.evaluating():
            if (
                cache is None
                or not reuse_prompts
                or cache.version != self.weights_version()
                or any(identity(group.prompt) not in cache.places for group in groups)
            ):
                return self.logps(groups, features, temperature=temperature)
            packed = pack(groups, self.family.audio_token_id, self.device, cached_prompts=True)
            places = [cache.places[identity(prompt)] for prompt in packed.prompts]
            packed = replace(packed, prompt_spans=tuple(cache.spans[p] for p in places))
            hidden_LD = cache.last_PD[places]
            if packed.input_ids_L.numel():
                ids_L = packed.input_ids_L
                embeds_LD = self.family.embed_tokens(self.family.embeddable(ids_L))
                layout = PackedLayout(packed, prompt_keys=cache.keys)
                own_LD = packed_hidden(self.family, ids_L, embeds_LD, packed.position_ids_L, layout)
                hidden_LD = torch.cat((hidden_LD, own_LD))
            self.count(packed)
            return self._scores(self.family, packed, hidden_LD, temperature, False)

    @staticmethod
    def _scores(
        family: AudioFamily, packed: Packed, hidden_LD: torch.Tensor, temperature: float, entropy: bool
    ) -> LogProbs:
        hidden_MD = hidden_LD.index_select(0, packed.predictors_M)
        logps_M, entropy_M = token_logps(
            hidden_MD, packed.targets_M, head_of(family), temperature=temperature, entropy=entropy
        )
        mask_NC = packed.mask_NC

        def placed(values_M: torch.Tensor) -> torch.Tensor:
            return values_M.new_zeros(mask_NC.numel()).index_copy(0, packed.places_M, values_M).view(mask_NC.shape)

        return LogProbs(placed(logps_M), mask_NC, None if entropy_M is None else placed(entropy_M))

    def count(self, packed: Packed) -> None:
        """Note the positions of a pass."""
        self.counters.passes += 1
        self.counters.prompt_positions += packed.prompt_positions
        self.counters.completion_positions += packed.input_ids_L.numel() - packed.prompt_positions

    def release(self) -> None:
        """Forget the prompt keys kept by sampling."""
        self.prompt_cache = None

    # -- states --------------------------------------------------------------------------------------------------

    def evaluating(self) -> AbstractContextManager[None]:
        """No dropout, no checkpointing; the modes come back as they were."""
        return evaluation_mode(self)

    @contextmanager
    def as_reference(self) -> Iterator[AudioFamily]:
        """The policy before training, without gradient: the base under its adapters, or the frozen copy."""
        if self.reference_model is None and not self.has_adapter:
            raise RuntimeError("a full policy has no reference: build it with Policy(..., keep_reference=True)")
        with torch.no_grad(), adapters_disabled(self.model) if self.has_adapter else nullcontext():
            yield self._reference_family

    def weights_version(self) -> int:
        """Changes with every update of what trains."""
        return sum(p._version for p in self.model.parameters() if p.requires_grad)


def frozen_copy(family: AudioFamily) -> AudioFamily:
    """The family over a frozen copy of the model; modules without trainable parameters are shared."""
    memo: dict[int, Any] = {
        id(module): module
        for module in family.model.modules()
        if any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
    }
    twin = copy.copy(family)
    twin.model = copy.deepcopy(family.model, memo).requires_grad_(False).eval()
    return twin


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[int]:
    """The base model: LoRA layers and modules_to_save are switched off; yields how many.

    PEFT's own context also toggles `requires_grad`, which a sharded parameter would remember for good.
    Raises RuntimeError if there is nothing to switch off, because the pass would then silently be the policy's.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not layers:
        raise RuntimeError("there is no adapter to switch off; a full policy needs keep_reference=True")
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        if not all(layer.disable_adapters for layer in layers):
            raise RuntimeError("this version of PEFT did not switch its adapters off")
        yield len(layers)
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state
