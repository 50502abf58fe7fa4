"""Which modules a pattern reaches, checked before anything is frozen or adapted.

In PEFT a pattern that matches nothing in one part is silent, and `q_proj` or `all-linear` reach the audio encoder
too. Here both are errors that name what exists.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from covo_rl.types import UserError

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily


class PatternError(UserError, ValueError):
    """A pattern or part name that does not do what it says, with what exists and what to write."""


def prefixes(family: AudioFamily) -> dict[str, str]:
    """Part -> module path in `family.model`, without a closing dot."""
    return {part: prefix.rstrip(".") for part, prefix in family.parts.items()}


def part_of(name: str, family: AudioFamily) -> str:
    """Part of a parameter or module name of `family.model`: the longest matching prefix, or `other`."""
    fitting = {path: part for part, path in prefixes(family).items() if f"{name}.".startswith(f"{path}.")}
    return fitting[max(fitting, key=len)] if fitting else "other"


def check_parts(names: Iterable[str], family: AudioFamily | type[AudioFamily], option: str) -> None:
    """Raises PatternError for a name that is no part of this family."""
    for name in names:
        if name not in family.parts:
            near = difflib.get_close_matches(name, family.parts, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else "no part has a similar name."
            raise PatternError(
                f"{option}: {name!r} is not a part of {family.model_type}; {hint} Parts: {', '.join(family.parts)}"
            )


def decoder_linears(family: AudioFamily) -> list[str]:
    """Full names of what LoRA adapts by default: Linears inside the decoder's layers, all or those of `lora_leaves`.

    Raises PatternError where there are none.
    """
    regex = re.compile(decoder_pattern(family))
    names = [name for name in _linears_in_layers(family) if regex.fullmatch(name)]
    if not names:
        raise PatternError(
            f"no Linear module in the layers of {family.model_type} is called {' or '.join(family.lora_leaves or ())}; "
            f"there are {', '.join(_leaves(family))}: correct lora_leaves of {type(family).__name__}"
        )
    return names


def decoder_pattern(family: AudioFamily) -> str:
    """Regex over full module names that matches `decoder_linears` and nothing else; PatternError if there are none."""
    leaves = "|".join(map(re.escape, family.lora_leaves or _leaves(family)))
    return rf"{re.escape(prefixes(family)['llm'])}\.(?:.+\.)?\d+\.(?:.+\.)?(?:{leaves})"


def _linears_in_layers(family: AudioFamily) -> list[str]:
    """Linears of the decoder that lie inside an entry of a list of modules; PatternError where there are none."""
    path, modules = prefixes(family)["llm"], family.model.named_modules()
    inside = re.compile(rf"{re.escape(path)}\.(?:.+\.)?\d+\..+")
    linears = (name for name, module in modules if isinstance(module, nn.Linear) and inside.fullmatch(name))
    names = [name for name in linears if part_of(name, family) == "llm"]
    if not names:
        raise PatternError(
            f"no Linear module lies in a layer under the decoder prefix {path!r} of {family.model_type}; "
            f"top modules are {', '.join(name for name, _ in family.model.named_children())}"
        )
    return names


def _leaves(family: AudioFamily) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in _linears_in_layers(family)})


def module_regex(pattern: str) -> re.Pattern[str]:
    """`pattern` compiled; raises PatternError where it is not a regex."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PatternError(f"lora_target_modules {pattern!r} is not a regular expression: {error}") from None


def matched_modules(pattern: str, family: AudioFamily) -> list[str]:
    """Modules that LoRA can adapt whose full name the regex matches in full, as PEFT matches it.

    Raises PatternError: not a regex; matches nothing; or reaches the encoder although the pattern does not name it.
    """
    if pattern == "all-linear":
        raise PatternError(
            "lora_target_modules 'all-linear' reaches the audio encoder and the head; leave it unset for all Linear "
            f"modules of the decoder, which is {decoder_pattern(family)!r}"
        )
    regex = module_regex(pattern)
    kinds, modules = (nn.Linear, nn.Embedding, nn.Conv1d), family.model.named_modules()
    hits = [name for name, module in modules if isinstance(module, kinds) and regex.fullmatch(name)]
    if not hits:
        raise PatternError(_no_match(pattern, family))
    if inside := _unasked_encoder(hits, pattern, family):
        raise PatternError(
            f"lora_target_modules {pattern!r} reaches {len(inside)} modules of the audio encoder, for example "
            f"{inside[0]!r}. Anchor it at the decoder, {decoder_pattern(family)!r}, or name the encoder in the "
            f"pattern ({re.escape(prefixes(family)['encoder'])}) to adapt it on purpose"
        )
    return hits


def _unasked_encoder(modules: Sequence[str], text: str, family: AudioFamily) -> list[str]:
    """Modules of the encoder, unless `text` asks for them by the encoder's module name."""
    if prefixes(family)["encoder"].rsplit(".", 1)[-1] in text:
        return []
    return [module for module in modules if part_of(module, family) == "encoder"]


def _no_match(pattern: str, family: AudioFamily) -> str:
    names, leaves = _linears_in_layers(family), _leaves(family)
    words = {word for name, _ in family.model.named_modules() for word in name.split(".")}
    unknown = [word for word in re.findall(r"[A-Za-z]\w+", pattern) if word not in words]
    near = [f"{word}: {', '.join(m)}" for word in unknown if (m := difflib.get_close_matches(word, words, n=3))]
    targets = [leaf for leaf in leaves if leaf in pattern] or leaves[:2]
    example = rf"{re.escape(prefixes(family)['llm'])}\..*\.({'|'.join(targets)})"
    return (
        f"lora_target_modules {pattern!r} matches no module of {family.model_type}. It is a regular expression over "
        f"full module names such as {names[0]!r}. Near matches: {'; '.join(near) or ', '.join(leaves)}. "
        f"For the decoder write for example {example!r}"
    )


def saved_modules(names: Sequence[str], family: AudioFamily) -> list[str]:
    """`modules_to_save` for PEFT: part names become module paths, other names must match a module's ending.

    Raises PatternError: a name without a module; the whole decoder; or modules of the encoder that were not asked for.
    """
    paths = []
    modules = [name for name, _ in family.model.named_modules() if name]
    for name in names:
        if name == "llm":
            raise PatternError("modules_to_save 'llm' trains the whole decoder: use --full with train_parts llm")
        paths.append(prefixes(family).get(name, name))
        hits = [module for module in modules if module.endswith(paths[-1])]  # PEFT's rule
        if not hits:
            words = dict.fromkeys([*family.parts, *modules, *(m.rsplit(".", 1)[-1] for m in modules)])
            near = difflib.get_close_matches(name, list(words), n=3, cutoff=0.4)
            raise PatternError(
                f"modules_to_save: no module of {family.model_type} ends in {name!r}; near matches: "
                f"{', '.join(near) or 'none'}. Parts: {', '.join(family.parts)}"
            )
        if inside := [] if name == "encoder" else _unasked_encoder(hits, name, family):
            raise PatternError(
                f"modules_to_save {name!r} also reaches {inside[0]!r} in the audio encoder; write a longer ending, "
                f"such as {next((m for m in hits if m not in inside), inside[0])!r}"
            )
    return paths
