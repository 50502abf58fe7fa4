"""Models named `builtin:NAME`: shipped checkpoints, and tiny random ones of every family, made on first use.

Importing this imports no torch.
"""

from __future__ import annotations

import difflib
import hashlib
from importlib.metadata import version
from pathlib import Path

from covo_rl import __version__
from covo_rl.data.files import fill_folder
from covo_rl.resolve import BUILTIN, cache_folder, find, folders

#: NAME of `builtin:tiny_NAME` -> its module in covo_rl/models/tiny
TINY_MODELS = {
    "covo_audio": "covo_audio",
    "qwen2_audio": "qwen2_audio",
    "audioflamingo3": "audio_flamingo",
    "musicflamingo": "audio_flamingo",
    "glmasr": "glm_asr",
    "voxtral": "voxtral",
    "qwen3_asr": "qwen3_asr",
    "qwen2_5_omni": "qwen_omni",
    "qwen3_omni_moe": "qwen_omni",
    "granite_speech": "granite_speech",
    "gemma4": "gemma",
    "gemma3n": "gemma",
    "phi4_multimodal": "phi4_multimodal",
}
_TINY = "tiny_"
#: shipped checkpoints that are not for the built-in questions: what speaks
_OTHERS = ("speech_tokenizer", "speech_decoder", "tiny_spoken")


def resolve_model(name: str) -> str:
    """`builtin:NAME` -> folder of the shipped or tiny checkpoint; any other name is returned as it is.

    Raises:
        FileNotFoundError: there is none of this name; the message lists those that exist.
        OutsideFolderError: the name leaves the folder of checkpoints.
    """
    if not name.startswith(BUILTIN):
        return name
    random, name = is_random(name), name.removeprefix(BUILTIN)
    if random:
        return str(_tiny_folder(name))
    try:
        return str(find("checkpoints", name))
    except FileNotFoundError:
        names = [*builtin_names(), *sorted(_shipped().intersection(_OTHERS))]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise FileNotFoundError(f"there is no builtin model {name!r}; {hint}there are {', '.join(names)}") from None


def is_random(model: str | None) -> bool:
    """Whether it names a tiny model with random weights."""
    return model in {f"{BUILTIN}{_TINY}{name}" for name in TINY_MODELS}


def builtin_names() -> list[str]:
    """Every NAME of a model `builtin:NAME` for the built-in questions, shipped ones first."""
    return [*sorted(_shipped().difference(_OTHERS)), *(f"{_TINY}{name}" for name in TINY_MODELS)]


def _shipped() -> set[str]:
    return {path.parent.name for _, folder in folders("checkpoints") for path in folder.glob("*/config.json")}


def _tiny_folder(name: str) -> Path:
    """Its folder in the cache, which is of these versions and these sources: another one makes its own."""

    def write(folder: Path) -> None:
        from covo_rl.models.tiny import write_tiny

        write_tiny(name.removeprefix(_TINY), folder)

    sources = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    for package in ("torch", "tokenizers"):
        digest.update(version(package).encode())
    made_by = f"covo_rl-{__version__}-transformers-{version('transformers')}-{digest.hexdigest()[:8]}"
    return fill_folder(cache_folder() / "models" / made_by / name, write)
