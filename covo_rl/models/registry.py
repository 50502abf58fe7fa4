"""Which family a model type has: ours, one of an installed package, or the user's own.

voxtral                     ours, or an entry point of the group `covo_rl.families`: model_type = "package.module:Class"
./mine.py:Mine              a file, by `--family`; before ours
my_package.families:Mine    an import, by `--family`

A family is named by a string, so that it goes into the run record and crosses processes.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from covo_rl.data.files import file_sha256
from covo_rl.data.module import FileImportError, import_file
from covo_rl.types import UserError, visible

if TYPE_CHECKING:
    from covo_rl.models.base import AudioFamily

GROUP = "covo_rl.families"
_OURS = "covo_rl.models."
#: model_type -> "module:class"
FAMILIES = {
    "covo_audio": _OURS + "covo_audio.family:CovoAudio",
    "qwen2_audio": _OURS + "qwen2_audio:Qwen2Audio",
    "audioflamingo3": _OURS + "audio_flamingo:AudioFlamingo3",
    "musicflamingo": _OURS + "audio_flamingo:MusicFlamingo",
    "glmasr": _OURS + "glm_asr:GlmAsr",
    "voxtral": _OURS + "voxtral:Voxtral",
    "qwen3_asr": _OURS + "qwen3_asr:Qwen3Asr",
    "qwen2_5_omni": _OURS + "qwen_omni:Qwen25Omni",
    "qwen2_5_omni_thinker": _OURS + "qwen_omni:Qwen25Omni",
    "qwen3_omni_moe": _OURS + "qwen_omni:Qwen3OmniMoe",
    "qwen3_omni_moe_thinker": _OURS + "qwen_omni:Qwen3OmniMoe",
    "granite_speech": _OURS + "granite_speech:GraniteSpeech",
    "granite_speech_plus": _OURS + "granite_speech:GraniteSpeechPlus",
    "gemma4": _OURS + "gemma:Gemma4",
    "gemma3n": _OURS + "gemma:Gemma3n",
    "phi4_multimodal": _OURS + "phi4_multimodal:Phi4Multimodal",
}
HOW = f"A family of your own is one class (docs/models.md): --family ./mine.py:Mine, or an entry point of {GROUP}"
#: model_type -> the class that `use_family` chose
_CHOSEN: dict[str, type[AudioFamily]] = {}


class ModelError(UserError, ValueError):
    """A model that cannot be used here; the message says what exists."""


def use_family(spec: str | None) -> None:
    """From now on a user's own family is the one of its `model_type`, in this process; None changes nothing.

    Raises:
        ModelError: `spec` is no `./file.py:Class` or `package.module:Class`, does not import, or is no family.
    """
    if spec is None:
        return
    family = _loaded(spec, f"--family {visible(spec)}")
    _CHOSEN[family.model_type] = family


def family_fingerprint(spec: str | None) -> dict[str, str]:
    """sha256 of the file that `--family` names; empty where it names none, or one that is not there."""
    place = (spec or "").rpartition(":")[0]
    file = Path(place).expanduser()
    return {place: file_sha256(file)} if place.endswith(".py") and file.is_file() else {}


def family_class(model_type: object) -> type[AudioFamily]:
    """The family of a `model_type`; raises ModelError that lists what exists, nearest first."""
    if isinstance(model_type, str):
        if model_type in _CHOSEN:
            return _CHOSEN[model_type]
        points = entry_points(group=GROUP, name=model_type)
        specs = {**({FAMILIES[model_type]: "covo_rl"} if model_type in FAMILIES else {}), **_packages(points)}
        if len(specs) > 1:
            claims = ", ".join(f"{spec} of {package}" for spec, package in specs.items())
            raise ModelError(f"model_type {model_type!r} has several families: {claims}; choose one: --family SPEC")
        for spec, package in specs.items():
            return _loaded(spec, f"the family {spec} of {package}")
    known = list(family_types())
    near = difflib.get_close_matches(str(model_type), known, n=3, cutoff=0.5)
    raise ModelError(
        f"model_type {model_type!r:.80} has no family; there are {', '.join(known)}. "
        + (f"Nearest: {', '.join(near)}. " if near else "")
        + HOW
    )


def family_types() -> dict[str, str]:
    """model_type -> where its family is: "module:class", of all that can be named here."""
    chosen = {kind: f"{family.__module__}:{family.__name__}" for kind, family in _CHOSEN.items()}
    return {**FAMILIES, **{point.name: point.value for point in entry_points(group=GROUP)}, **chosen}


def _packages(points: Iterable[EntryPoint]) -> dict[str, str]:
    return {point.value: point.dist.name if point.dist else "an installed package" for point in points}


def _loaded(spec: str, what: str) -> type[AudioFamily]:
    """The class that `spec` names, checked; `what` begins the message where that fails."""
    place, colon, name = spec.rpartition(":")
    if not (place and colon and name.isidentifier()):
        raise ModelError(f"{what}: write ./file.py:Class or package.module:Class")
    try:
        module = import_file(Path(place).expanduser(), noun="Class") if place.endswith(".py") else import_module(place)
        value = getattr(module, name, None)
    except FileImportError as error:
        raise ModelError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever a module does while it is imported
        if isinstance(error, UserError):
            raise
        hint = "; a file is named with its .py" if "/" in place else ""
        raise ModelError(f"{what}: cannot import {place!r}: {type(error).__name__}: {error}{hint}") from error
    if problem := _problem(value, name, module):
        raise ModelError(f"{what}: {problem}")
    return value  # type: ignore[return-value]


def _problem(value: object, name: str, module: object) -> str:
    from covo_rl.models.base import AudioFamily
    from covo_rl.models.transformers_family import TransformersFamily

    def is_family(entry: object) -> bool:
        return inspect.isclass(entry) and issubclass(entry, AudioFamily) and not inspect.isabstract(entry)

    there = [key for key, entry in vars(module).items() if is_family(entry)]
    if value is None:
        return f"there is no {name}; its families are {', '.join(there) or 'none'}"
    if not (inspect.isclass(value) and issubclass(value, AudioFamily)):
        return (
            f"{name} is no subclass of covo_rl.models.base.AudioFamily; its families are {', '.join(there) or 'none'}"
        )
    stated = ("model_type", "model_class", *(["audio_token"] if issubclass(value, TransformersFamily) else []))
    lacks = [*sorted(value.__abstractmethods__), *(entry for entry in stated if not hasattr(value, entry))]
    if not lacks and not isinstance(kind := value.model_type, str):
        return f"{name} has the model_type {kind!r:.80}; it is a text, what config.json says"
    return f"{name} does not say {', '.join(lacks)}" if lacks else ""
