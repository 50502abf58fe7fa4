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

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

PARTS = ("encoder", "audio_adapter", "llm", "lm_head")


class PatternError(ValueError):
    """A pattern or part name that does not do what it says, with what exists and what to write."""


def prefixes(family: AudioFamily) -> dict[str, str]:
    """Part -> module path in `family.model`, without a closing dot."""
    return {part: prefix.rstrip(".") for part, prefix in family.parts.items()}


def part_of(name: str, family: AudioFamily) -> str:
    """Part of a parameter or module name of `family.model`: the longest matching prefix, or `other`."""
    fitting = [
        (len(prefix), part)
        for part, prefix in prefixes(family).items()
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    return max(fitting)[1] if fitting else "other"


def check_parts(names: Iterable[str], family: AudioFamily, option: str) -> list[str]:
    """The part names as given.

    Raises:
        PatternError: for a name that is no part of this family.
    """
    names = list(names)
    for name in names:
        if name not in family.parts:
            near = difflib.get_close_matches(name, family.parts, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else "no part has a similar name."
            raise PatternError(
                f"{option}: {name!r} is not a part of {family.model_type}; {hint} Parts: {', '.join(family.parts)}"
            )
    return names


def linear_names(family: AudioFamily, part: str) -> list[str]:
    """Full names of the Linear modules of one part, sub-parts with a name of their own left out."""
    return [
        name
        for name, module in family.model.named_modules()
        if isinstance(module, nn.Linear) and part_of(name, family) == part
    ]


def decoder_pattern(family: AudioFamily) -> str:
    """Regex over full module names that matches every Linear of the decoder, and nothing elsewhere.

    Raises:
        PatternError: when the decoder's prefix holds no Linear module.
    """
    prefix = prefixes(family)["llm"]
    names = linear_names(family, "llm")
    if not names:
        raise PatternError(
            f"no Linear module lies under the decoder prefix {prefix!r} of {family.model_type}; "
            f"top modules are {', '.join(name for name, _ in family.model.named_children())}"
        )
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    return rf"{re.escape(prefix)}\.(?:.+\.)?(?:{'|'.join(map(re.escape, leaves))})"


def matched_modules(pattern: str, family: AudioFamily) -> list[str]:
    """Linear modules whose full name the regex matches in full, as PEFT matches it.

    Raises:
        PatternError: not a regex; matches nothing; matches modules that are not Linear only; or reaches the
            encoder although the pattern does not name it.
    """
    if pattern == "all-linear":
        raise PatternError(
            "lora_target_modules 'all-linear' reaches the audio encoder and the head; leave it unset for all Linear "
            f"modules of the decoder, which is {decoder_pattern(family)!r}"
        )
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise PatternError(f"lora_target_modules {pattern!r} is not a regular expression: {error}") from None
    hits = [
        name
        for name, module in family.model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)) and regex.fullmatch(name)
    ]
    if not hits:
        raise PatternError(_no_match(pattern, family))
    unasked = [name for name in hits if part_of(name, family) == "encoder"]
    if unasked and not names_encoder(pattern, family):
        raise PatternError(
            f"lora_target_modules {pattern!r} reaches {len(unasked)} modules of the audio encoder, for example "
            f"{unasked[0]!r}. Anchor it at the decoder, {decoder_pattern(family)!r}, or name the encoder in the "
            f"pattern ({re.escape(prefixes(family)['encoder'])}) to adapt it on purpose"
        )
    return hits


def names_encoder(pattern: str, family: AudioFamily) -> bool:
    """True where the pattern spells out the encoder's module name, which is how it is asked for."""
    return prefixes(family)["encoder"].rsplit(".", 1)[-1] in pattern


def saved_modules(names: Sequence[str], family: AudioFamily) -> list[str]:
    """`modules_to_save` for PEFT: part names become module paths, other names must match a module's ending.

    Raises:
        PatternError: a name without a module; the whole decoder; or modules of the encoder that were not asked for.
    """
    paths = []
    modules = [name for name, _ in family.model.named_modules() if name]
    for name in names:
        if name == "llm":
            raise PatternError("modules_to_save 'llm' trains the whole decoder: use --full with train_parts llm")
        path = prefixes(family).get(name, name)
        hits = [module for module in modules if module.endswith(path)]  # PEFT's rule
        if not hits:
            known = [*family.parts, *modules, *(m.rsplit(".", 1)[-1] for m in modules)]
            near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.4)
            raise PatternError(
                f"modules_to_save: no module of {family.model_type} ends in {name!r}; near matches: "
                f"{', '.join(near) or 'none'}. Parts: {', '.join(family.parts)}"
            )
        inside = [module for module in hits if part_of(module, family) == "encoder"]
        if inside and name != "encoder" and not names_encoder(name, family):
            raise PatternError(
                f"modules_to_save {name!r} also reaches {inside[0]!r} in the audio encoder; write a longer ending, "
                f"such as {next((m for m in hits if m not in inside), inside[0])!r}"
            )
        paths.append(path)
    return paths


def _no_match(pattern: str, family: AudioFamily) -> str:
    names = linear_names(family, "llm")
    known = {word for name, _ in family.model.named_modules() for word in name.split(".")}
    words = [word for word in re.findall(r"[A-Za-z]\w+", pattern) if word not in known]
    near = [f"{word}: {', '.join(found)}" for word in words if (found := difflib.get_close_matches(word, known, n=3))]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    wanted = [leaf for leaf in leaves if leaf in pattern] or leaves[:2]
    example = rf"{re.escape(prefixes(family)['llm'])}\..*\.({'|'.join(wanted)})"
    return (
        f"lora_target_modules {pattern!r} matches no module of {family.model_type}. It is a regular expression over "
        f"full module names such as {names[0] if names else 'none'!r}. "
        f"Near matches: {'; '.join(near) or ', '.join(leaves)}. For the decoder write for example {example!r}"
    )
