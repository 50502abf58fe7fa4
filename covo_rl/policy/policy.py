"""The policy: one module with one forward, so that DDP and FSDP2 wrap it once and all their hooks fire.

policy = Policy(family, peft_model=modes.peft_model, clips=clips)
features = policy.features(prompts)                              each clip once
draws    = policy("sample", prompts, features, config, seed=1)   each prompt once, then G rollouts
scores   = policy("logps", groups, features, temperature=1.0)    each prompt once for all its rollouts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from covo_rl.policy.decoding import Draws, sample_draws
from covo_rl.policy.embedding import Embedder
from covo_rl.policy.features import Features, FeatureStore
from covo_rl.policy.grouped import Layout, PackedLayout, use_grouped_attention
from covo_rl.policy.head import token_logps
from covo_rl.policy.lora import adapters_disabled
from covo_rl.policy.packing import Packed, identity, pack
from covo_rl.policy.ranks import is_sharded
from covo_rl.policy.records import Counters, LogProbs, PromptCache
from covo_rl.policy.reference import frozen_copy

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.config import RolloutConfig
    from covo_rl.models.base import AudioFamily
    from covo_rl.policy.checks import SelfCheck
    from covo_rl.types import Group, Prompt


class Policy(nn.Module):
    """The trainable model, its audio features, its reference.

    `peft_model` None means full training; then `keep_reference` makes a frozen copy of what trains, now.
    `clips` resolves clip keys; without it only text-only prompts and given features work. `decode_weights_mb`
    bounds the memory for a second set of decoder weights while sampling: LoRA folded in, packed for few rows
    (float32 only; 0 is off).
    """

    def __init__(
        self,
        family: AudioFamily,
        peft_model: nn.Module | None = None,
        *,
        clips: ClipStore | None = None,
        feature_memory_mb: float = 512,
        gradient_checkpointing: bool = False,
        keep_reference: bool = False,
        decode_weights_mb: float = 2048,
    ) -> None:
        super().__init__()
        self.family = family
        self.clips = clips
        self.model: nn.Module = family.model if peft_model is None else peft_model
        self.has_adapter = peft_model is not None
        self.decode_weights_mb = decode_weights_mb
        self.counters = Counters()
        self._no_split_modules = getattr(family.model, "_no_split_modules", None)
        self._prompt_cache: PromptCache | None = None
        self._autocast_seen = False
        self._methods: dict[str, Callable[..., Any]] = {
            "logps": self.logps,
            "old_logps": self.old_logps,
            "sample": self.sample,
        }
        use_grouped_attention(family.decoder)
        if gradient_checkpointing:
            self._checkpoint_decoder()
        self.reference_model: nn.Module | None = None
        self._reference_family = family
        if keep_reference and not self.has_adapter:
            self._reference_family, self.reference_model = frozen_copy(family)
        self._embedder = Embedder(self, family, self._reference_family, clips, feature_memory_mb)
        self.train(self.training)

    # -- one forward ---------------------------------------------------------------------------------------------

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call `logps`, `old_logps` or `sample` under the hooks of whatever wraps this module."""
        if method not in self._methods:
            raise ValueError(f"the policy has no method {method!r}; it has {', '.join(self._methods)}")
        return self._methods[method](*args, **kwargs)

    @property
    def config(self) -> Any:
        """The model's configuration, where accelerate and DeepSpeed look for it."""
        return self.family.model.config

    @property
    def device(self) -> torch.device:
        return self.family.embed_tokens.weight.device

    @property
    def sampling_is_exact(self) -> bool:
        """Sampling log-probs equal the scoring pass (1e-5): float32 weights and no autocast seen while sampling."""
        floats = {p.dtype for p in self.family.decoder.parameters()}
        return floats == {torch.float32} and not self._autocast_seen

    @property
    def sharded(self) -> bool:
        """Parameters live in pieces on several ranks, so every rank must make the same module calls."""
        return is_sharded(self)

    @property
    def store(self) -> FeatureStore:
        """Audio embeddings by clip, with counters of what was encoded."""
        return self._embedder.store

    @property
    def audio_frozen(self) -> bool:
        """No audio part trains: every clip is encoded once and for all."""
        return self._embedder.frozen

    def features(self, prompts: Sequence[Prompt]) -> Features:
        """Embeddings of the prompts' unique clips: now where the audio parts are frozen, else inside each pass."""
        return self._embedder.features(prompts)

    def train(self, mode: bool = True) -> Policy:
        """Frozen audio parts and the reference stay in evaluation mode."""
        super().train(mode)
        for part in self._embedder.frozen_parts:
            prefix = self.family.parts[part].rstrip(".")
            self.family.model.get_submodule(prefix).eval()
        if self.reference_model is not None:
            self.reference_model.eval()
        return self

    # -- scoring -------------------------------------------------------------------------------------------------

    def logps(
        self,
        groups: Sequence[Group],
        features: Features,
        *,
        temperature: float = 1.0,
        reference: bool = False,
        entropy: bool = False,
    ) -> LogProbs:
        """Log-probs of every completion id under the policy at `temperature`; each unique prompt computed once.

        `reference` scores with the adapters off (LoRA) or with the frozen copy (full), without gradient. `entropy`
        adds the differentiable entropy of every position.
        """
        with ExitStack() as stack:
            family = self.family
            if reference:
                stack.enter_context(torch.no_grad())
                family = self._enter_reference(stack)
            if not torch.is_grad_enabled():
                stack.enter_context(self._evaluating())
            packed = pack(groups, family.audio_token_id, self.device)
            embeds_LD = self._embedder.embed(packed, features, family, reference=reference)
            hidden_LD = self._decode(family, embeds_LD, packed.position_ids_L, PackedLayout(packed))
            self._count(packed)
            return self._scores(family, packed, hidden_LD, temperature, entropy)

    def old_logps(
        self, groups: Sequence[Group], features: Features, *, temperature: float = 1.0, reuse_prompts: bool = True
    ) -> LogProbs:
        """`logps` without gradient; takes the prompts' keys from the last sampling call if the weights are the same."""
        cache = self._prompt_cache
        places = [] if cache is None else [cache.places.get(identity(group.prompt)) for group in groups]
        usable = reuse_prompts and cache is not None and None not in places and cache.version == self._version()
        with torch.no_grad(), self._evaluating():
            if not usable:
                return self.logps(groups, features, temperature=temperature)
            assert cache is not None
            packed = pack(groups, self.family.audio_token_id, self.device, cached_prompts=True)
            chosen = [cache.places[identity(prompt)] for prompt in packed.prompts]
            packed = replace(packed, prompt_spans=tuple(cache.spans[p] for p in chosen))
            hidden_LD = cache.last_PD[chosen]
            if packed.input_ids_L.numel():
                embeds_LD = self.family.embed_tokens(packed.input_ids_L)
                layout = PackedLayout(packed, prompt_keys=cache.keys)
                own_LD = self._decode(self.family, embeds_LD, packed.position_ids_L, layout)
                hidden_LD = torch.cat((hidden_LD, own_LD))
            self._count(packed)
            return self._scores(self.family, packed, hidden_LD, temperature, False)

    def _decode(
        self, family: AudioFamily, embeds_LD: torch.Tensor, position_ids_L: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """Packed embeddings through the decoder -> hidden states (L, D)."""
        out = family.decoder(
            inputs_embeds=embeds_LD[None],
            position_ids=position_ids_L[None],
            # a ready 4D mask is passed through untouched; the layout says who attends to whom
            attention_mask=embeds_LD.new_zeros(1, 1, 1, 1),
            use_cache=False,
            covo_layout=layout,
        )
        return out.last_hidden_state[0]

    @staticmethod
    def _scores(
        family: AudioFamily, packed: Packed, hidden_LD: torch.Tensor, temperature: float, entropy: bool
    ) -> LogProbs:
        hidden_MD = hidden_LD.index_select(0, packed.predictors_M)
        logps_M, entropy_M = token_logps(
            hidden_MD, packed.targets_M, family.lm_head, temperature=temperature, entropy=entropy
        )
        empty_NC = logps_M.new_zeros(packed.mask_NC.shape)
        logps_NC = empty_NC.masked_scatter(packed.mask_NC, logps_M)
        entropy_NC = None if entropy_M is None else empty_NC.masked_scatter(packed.mask_NC, entropy_M)
        return LogProbs(logps_NC, packed.mask_NC, entropy_NC)

    def _count(self, packed: Packed) -> None:
        self.counters.passes += 1
        self.counters.prompt_positions += packed.prompt_positions
        self.counters.completion_positions += packed.input_ids_L.numel() - packed.prompt_positions

    # -- sampling ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        features: Features,
        config: RolloutConfig,
        *,
        seed: int,
        greedy: bool = False,
        num_generations: int | None = None,
        keep_prompts: bool = False,
    ) -> Draws:
        """G completions per prompt, prompt-major; see `covo_rl.rollout.sample` for text and parsing.

        `keep_prompts` keeps the prompts' keys for `old_logps` until the next call.
        """
        self._prompt_cache = None
        self._autocast_seen |= torch.is_autocast_enabled(self.device.type)
        generations = num_generations or config.num_generations
        with self._evaluating():
            draws, cache = sample_draws(self, prompts, features, config, seed, generations, greedy)
        if keep_prompts and cache is not None and not self.sharded:
            self._prompt_cache = PromptCache(*cache, version=self._version())
        return draws

    def release(self) -> None:
        """Forget the prompt keys kept by `sample`."""
        self._prompt_cache = None

    def self_check(self, prompts: Sequence[Prompt], config: RolloutConfig | None = None, *, seed: int = 0) -> SelfCheck:
        """Sampling equals scoring, and the audio matters: see `covo_rl.policy.checks`."""
        from covo_rl.policy.checks import self_check

        return self_check(self, prompts, config, seed=seed)

    # -- states --------------------------------------------------------------------------------------------------

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No dropout, no checkpointing; the modes come back as they were."""
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _enter_reference(self, stack: ExitStack) -> AudioFamily:
        if self.has_adapter:
            stack.enter_context(adapters_disabled(self.model))
            return self.family
        if self.reference_model is None:
            raise RuntimeError("a full policy has no reference: build it with Policy(..., keep_reference=True)")
        return self._reference_family

    def _checkpoint_decoder(self) -> None:
        if not self.family.supports_gradient_checkpointing:
            raise ValueError(f"{self.family.model_type} does not support gradient checkpointing; turn it off")
        # on the decoder alone: a frozen encoder must stay out of autograd
        decoder: Any = self.family.decoder
        # the name changes in transformers 6
        name = "activation_checkpointing_enable"
        enable = getattr(decoder, name, None) or decoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def _version(self) -> int:
        return sum(p._version for p in self.model.parameters() if p.requires_grad)
