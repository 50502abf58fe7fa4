"""Options of learning when to speak, beside those of GRPO: one flat file holds both (recipes/configs/tiny_duplex.yaml).

options = duplex_options({"tiny_duplex.yaml": {...}, "command line": {"seed": 3}})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from covo_rl.config import ConfigError, Options, option, option_names, options_from, rooms, value_problems
from covo_rl.duplex.grid import CHUNK_SECONDS
from covo_rl.resolve import read_yaml, typed_values, unknown_names

if TYPE_CHECKING:
    from covo_rl.duplex.timing import TimingOptions
    from covo_rl.rewards.scoring import Component

#: in place of a model's name: one of random weights
NEW = "new"
CONTROLS = ("none", "shuffled", "gold", "no_cue")
#: those of timing.py, which imports torch
TIMING_ESTIMATORS = ("sampled", "exact", "trunk", "mix")
#: GRPO's options that have a meaning here too; each of the others has to keep its default
SHARED = tuple(
    """
    model dtype attn_implementation family trust_remote_code lora adapter lora_r lora_alpha lora_dropout
    lora_target_modules use_rslora use_dora modules_to_save train_parts part_learning_rates load_in_4bit
    num_generations rewards reward_timeout check_rewards beta scale_rewards seed output overwrite max_steps
    prompts_per_step micro_batch_prompts learning_rate lr_scheduler_type warmup_steps weight_decay adam_beta1
    adam_beta2 max_grad_norm gradient_checkpointing recompute checkpoint_every checkpoint_minutes export_checkpoints
    keep_last resume allow_changed_config allow_overlap dry_run log_rollouts eval_every report_to project run_name
    trackio_space_id reward_failure_limit judge
    """.split()  # noqa: SIM905 - a list of 54 quoted words is harder to read
)
#: their features are made once, before training
FROZEN_PARTS = ("encoder", "audio_adapter")
LIMITS = {
    "[1, inf)": "duplex_width duplex_layers perception_steps sft_steps sft_batch",
    "[10, inf)": "perception_streams sft_streams rl_streams test_streams",
    "(0, inf)": "sft_learning_rate",
    "[0.16, 60]": "reply_seconds",
    "[0, 2]": "sft_until",
    "[0, 1]": "hindsight",
    "[0, inf)": "noise trunk_weight decision_weight text_weight code_weight sft_warmup",
}


@dataclass
class DuplexConfig:
    """The streams, the supervised stage before RL, and how RL estimates its gradient."""

    features: str = option("simulated", "what the decoder hears: simulated, or wav (streaming encoder)",
                           ["simulated", "wav"])  # fmt: skip
    noise: float = option(0.4, "of simulated features, a deviation of each percept")
    perception_streams: int = option(400, "streams from whose sound a new model's encoder learns to hear, with wav")
    perception_steps: int = option(400, "updates of that")
    sft_data: str | None = option(None, "in place of drawn streams: a folder of streams, for the supervised stage")
    rl_data: str | None = option(None, "the same for RL, which asks of each stream its last question")
    test_data: str | None = option(None, "the same for the test")
    sft_streams: int = option(8000, "streams of the supervised stage")
    rl_streams: int = option(3000, "streams of RL")
    test_streams: int = option(640, "streams of the test, by kind as 240 long pauses, 150 single turns, 250 others")
    duplex_width: int = option(64, "of a new model's decoder, where --model is new")
    duplex_layers: int = option(2, "of it")
    sft_steps: int = option(1200, "updates of the supervised stage at most")
    sft_until: float = option(0.97, "it ends where this share of held-out single turns is answered in time "
                              "and barge-ins are heard")  # fmt: skip
    sft_batch: int = option(16, "streams of one")
    sft_learning_rate: float = option(4e-3, "peak; the schedule is a cosine")
    sft_warmup: int = option(30, "updates")
    decision_weight: float = option(2.0, "of THINK, SHIFT and BREAK in the supervised loss")
    text_weight: float = option(1.0, "of text there")
    code_weight: float = option(0.3, "of audio codes there")
    timing_estimator: str = option("mix", "of the policy gradient", [*TIMING_ESTIMATORS])
    trunk_weight: float = option(0.1, "of the trunk's loss in mix")
    hindsight: float = option(
        0.5, "part of the worth of waiting, in the trunk's loss, that is the best still to be had"
    )
    reply_seconds: float = option(8.0, "of a reply that is decoded for content, at 6.25 ids of text a second")
    control: str = option("none", "what RL is compared with: rewards dealt at random, supervised updates on the same "
                          "streams, or streams whose cue at the turn's end is gone", [*CONTROLS])  # fmt: skip


@dataclass
class DuplexOptions(Options):
    """GRPO's rooms and one more."""

    duplex: DuplexConfig = field(default_factory=DuplexConfig)

    @property
    def timing(self) -> TimingOptions:
        """How RL estimates its gradient."""
        from covo_rl.duplex.timing import TimingOptions  # torch

        return TimingOptions(
            timing_estimator=self.duplex.timing_estimator, generations=self.rollout.num_generations,
            trunk_weight=self.duplex.trunk_weight, beta=self.loss.beta, scale=self.loss.scale_rewards != "none",
            hindsight=self.duplex.hindsight,
        )  # fmt: skip

    def reply_chunks(self, terms: Sequence[Component]) -> int:
        """Chunks of a reply that are decoded at a stop; 0 where none of these rewards reads replies."""
        from covo_rl.rewards.duplex_lint import reads_reply  # its linter takes a while to import

        return int(self.duplex.reply_seconds / CHUNK_SECONDS + 1e-9) if any(map(reads_reply, terms)) else 0

    def recorded(self, *names: str) -> dict[str, str]:
        """Of these options those that name a folder of streams."""
        return {name: folder for name in names if (folder := getattr(self.duplex, name))}


def duplex_options(layers: Mapping[str, Mapping[str, Any]]) -> DuplexOptions:
    """Options from values by name: where they were written -> {name: value}; a later layer wins.

    Raises:
        ConfigError: unknown names, unreadable values, contradictions, of all layers and both kinds at once.
    """
    hints = get_type_hints(DuplexConfig)
    known = [*hints, *option_names(), "env"]
    problems: list[str] = []
    own: dict[str, Any] = {}
    rest: dict[str, dict[str, Any]] = {}
    for where, layer in layers.items():
        problems += unknown_names([name for name in layer if name not in known], known, where)
        own |= typed_values(hints, {name: layer[name] for name in layer if name in hints}, problems, where)
        rest[where] = {name: layer[name] for name in layer if name in known and name not in hints}
    duplex, shared = DuplexConfig(**own), Options()
    problems += value_problems(duplex, LIMITS)
    try:
        shared = options_from(rest)
        problems += _shared_problems(shared)
    except ConfigError as error:
        problems += error.problems
    problems += _contradictions(duplex, new=shared.model.model == NEW)
    if problems:
        raise ConfigError(problems)
    return DuplexOptions(**vars(shared), duplex=duplex)


def _shared_problems(options: Options) -> list[str]:
    """What GRPO's options say that cannot be here."""
    values, defaults, adapter, seed = options.flat(), Options().flat(), options.adapter, options.train.seed
    others = [name for name, value in values.items() if name not in SHARED and value != defaults[name]]
    problems = [f"{name} {values[name]!r:.80}: it has no meaning where a rollout is the moment to speak; leave it out"
                for name in others]  # fmt: skip
    if options.loss.scale_rewards == "batch":
        problems.append("scale_rewards batch: advantages are those of one stream; choose group or none")
    if seed < 0:
        problems.append(f"seed {seed}: streams are drawn from it; choose 0 or more")
    name, parts = ("modules_to_save", adapter.modules_to_save) if adapter.lora else ("train_parts", adapter.train_parts)
    if frozen := [part for part in parts if part in FROZEN_PARTS]:
        problems.append(f"{name} {', '.join(frozen)}: what is heard of a stream is made once, before training; choose "
                        "among llm and lm_head")  # fmt: skip
    return problems


def _contradictions(duplex: DuplexConfig, *, new: bool) -> list[str]:
    """Of options that name folders of streams with others."""
    problems = []
    if bool(duplex.rl_data) != bool(duplex.test_data):
        problems.append("rl_data and test_data go together: what is learnt from sound is tested on sound")
    if duplex.rl_data and duplex.control in ("gold", "no_cue"):
        problems.append(f"control {duplex.control}: only streams that are drawn prescribe a stop, or have a cue that "
                        "can be taken away; with rl_data there are none and shuffled")  # fmt: skip
    if new and (duplex.sft_data or duplex.rl_data) and duplex.features != "wav":
        problems.append("a new model hears no sound unless its encoder learns to: set features to wav, or name a model")
    if new and duplex.rl_data and not duplex.sft_data:
        problems.append("rl_data with a new model: name sft_data too, from which it first learns to speak")
    return problems


def read_layers(words: Sequence[str], default: Path) -> dict[str, dict[str, Any]]:
    """The layers that a command line asks for: `--config FILE`, or the default one, and under it what is written:
    `--name value` or `--name=value`, `--name` for one that is true or false, `--full`; - and _ alike.

    Raises:
        ConfigError: a word that is none of these; a file that cannot be read.
    """
    hints = {name: hint for room in (*rooms().values(), DuplexConfig) for name, hint in get_type_hints(room).items()}
    given: dict[str, list[str]] = {}
    taking: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            taking = given[name.replace("-", "_")] = [value] if equals else []
        elif taking is None:
            raise ConfigError([f"command line: {word!r}: options are --NAME VALUE"])
        else:
            taking.append(word)
    values: dict[str, Any] = {}
    for name, said in given.items():
        if not said and (name == "full" or hints.get(name.removeprefix("no_")) is bool):
            own = "lora" if name == "full" else name.removeprefix("no_")
            values[own] = name == own
        elif hints.get(name) == list[str]:
            values[name] = said
        elif len(said) != 1:
            raise ConfigError([f"command line: {' '.join([f'--{name}', *said])}: options are --NAME VALUE"])
        else:
            values[name] = said[0]
    path = str(values.pop("config", default))
    return {path: read_yaml(path), "command line": values}
