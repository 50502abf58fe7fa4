"""Options of learning when to speak, beside those of GRPO: one flat file holds both (recipes/configs/tiny_duplex.yaml).

options = duplex_options({"tiny_duplex.yaml": {...}, "command line": {"seed": 3}})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from covo_rl.config import ConfigError, Options, option, option_names, options_from, value_problems
from covo_rl.duplex.timing import ESTIMATORS, TimingOptions
from covo_rl.resolve import read_yaml, typed_values, unknown_names

#: in place of a model's name: one of random weights
NEW = "new"
CONTROLS = ("none", "shuffled", "gold", "no_cue")
LIMITS = {
    "[1, inf)": "duplex_width duplex_layers perception_steps sft_steps sft_batch",
    "[10, inf)": "perception_streams sft_streams rl_streams test_streams",
    "(0, inf)": "sft_learning_rate",
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
    duplex_width: int = option(64, "of a new model's decoder, where --model is none")
    duplex_layers: int = option(2, "of it")
    sft_steps: int = option(1200, "updates of the supervised stage at most")
    sft_until: float = option(0.98, "it ends where this share of held-out single turns is answered in time "
                              "and barge-ins are heard")  # fmt: skip
    sft_batch: int = option(16, "streams of one")
    sft_learning_rate: float = option(4e-3, "peak; the schedule is a cosine")
    sft_warmup: int = option(30, "updates")
    decision_weight: float = option(2.0, "of THINK, SHIFT and BREAK in the supervised loss")
    text_weight: float = option(1.0, "of text there")
    code_weight: float = option(0.3, "of audio codes there")
    timing_estimator: str = option("mix", "of the policy gradient", [*ESTIMATORS])
    trunk_weight: float = option(0.1, "of the trunk's loss in mix")
    hindsight: float = option(
        0.5, "part of the worth of waiting, in the trunk's loss, that is the best still to be had"
    )
    control: str = option("none", "what RL is compared with: rewards dealt at random, supervised updates on the same "
                          "streams, or streams whose cue at the turn's end is gone", [*CONTROLS])  # fmt: skip


@dataclass
class DuplexOptions(Options):
    """GRPO's rooms and one more."""

    duplex: DuplexConfig = field(default_factory=DuplexConfig)

    @property
    def timing(self) -> TimingOptions:
        """How RL estimates its gradient."""
        return TimingOptions(
            timing_estimator=self.duplex.timing_estimator, generations=self.rollout.num_generations,
            trunk_weight=self.duplex.trunk_weight, beta=self.loss.beta, scale=self.loss.scale_rewards != "none",
            hindsight=self.duplex.hindsight,
        )  # fmt: skip

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
    duplex, rooms = DuplexConfig(**own), Options()
    problems += value_problems(duplex, LIMITS)
    try:
        rooms = options_from(rest)
    except ConfigError as error:
        problems += error.problems
    problems += _contradictions(duplex, new=rooms.model.model == NEW)
    if problems:
        raise ConfigError(problems)
    return DuplexOptions(**vars(rooms), duplex=duplex)


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


def words_of(words: Sequence[str], default: Path) -> dict[str, dict[str, Any]]:
    """The layers that a command line asks for: `--config FILE`, or the default one, and under it what is written:
    `--name value` or `--name=value`, - and _ alike.

    Raises:
        ConfigError: a word that is neither; a file that cannot be read.
    """
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    values: dict[str, Any] = {}
    for name, value in zip(parts[::2], [*parts[1::2], None], strict=False):
        if not name.startswith("--") or value is None or value.startswith("--"):
            raise ConfigError([f"command line: {name!r}: options are --NAME VALUE"])
        values[name[2:].replace("-", "_")] = value
    path = str(values.pop("config", default))
    return {path: read_yaml(path), "command line": values}
