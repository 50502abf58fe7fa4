"""Feature extractor, tokenizer and chat template of a checkpoint, without the image half of its processor.

Stock processors of models that also see import torchvision for pictures, which are refused here anyway.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

#: what a published folder says of its processor, beside the tokenizer's files; vLLM reads Voxtral's tekken.json
SETTINGS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tekken.json")


class AudioProcessor:
    """What a family needs to turn clips and text into inputs.

    `source`: the folder it was loaded from, whose files a saved copy takes over unchanged, so that the stock processor
    of the published checkpoint loads from it.
    """

    def __init__(
        self, feature_extractor: Any, tokenizer: Any, audio_token: str, *, chat_template: str | None = None,
        source: Path | None = None,
    ) -> None:  # fmt: skip
        self.feature_extractor, self.tokenizer, self.audio_token = feature_extractor, tokenizer, audio_token
        template = chat_template or tokenizer.chat_template
        self.chat_template = template.get("default") if isinstance(template, Mapping) else template  # named ones
        self.source = source

    @classmethod
    def from_pretrained(
        cls, path: str, audio_token: str, extractor_class: Any, tokenizer_class: Any, **options: Any
    ) -> Self:
        """From a folder or hub name. Raises OSError and ValueError of transformers for files that do not fit."""
        from transformers import ProcessorMixin

        extractor = extractor_class.from_pretrained(path, **options)
        tokenizer = tokenizer_class.from_pretrained(path, **options)
        stated, _ = ProcessorMixin.get_processor_dict(path)
        template = stated.get("chat_template")
        return cls(extractor, tokenizer, audio_token, chat_template=template, source=local_folder(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Everything that loads it again; the settings of `source` go over unchanged."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        settings = [self.source / name for name in SETTINGS] if self.source else []
        settings = [path for path in settings if path.is_file()]
        for path in settings:
            if path.resolve() != (folder / path.name).resolve():
                shutil.copy2(path, folder)
        if not settings:
            self.feature_extractor.save_pretrained(folder)
        if self.chat_template:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def local_folder(path: str) -> Path | None:
    """The folder of a checkpoint on this disk: itself, or its place in the cache of the Hugging Face hub."""
    from huggingface_hub import try_to_load_from_cache

    if Path(path).is_dir():
        return Path(path)
    cached = try_to_load_from_cache(path, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None
