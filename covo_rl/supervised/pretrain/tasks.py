"""Every task by its name: what one draw takes, what its rows need, what it makes of them."""

from __future__ import annotations

from covo_rl.supervised.pretrain import builder, dialogues
from covo_rl.supervised.pretrain.document import BuildOptions, Task

__all__ = ["TASKS", "BuildOptions", "Task"]

#: name -> task, as configurations name them
TASKS: dict[str, Task] = {
    "asr": Task("row", builder.build_asr, ("audio", "text")),
    "tts": Task("row", builder.build_tts, ("text", "codes")),
    "audio_only": Task("document", builder.build_audio_only, ("audio", "text", "codes")),
    "continuation": Task("document", builder.build_continuation, ("audio", "text")),
    "interleave_1": Task("document", builder.build_interleave_1, ("audio", "text", "codes")),
    "interleave_2": Task("document", builder.build_interleave_2, ("audio", "text", "codes")),
    "text": Task("text", builder.build_text, ("text",)),
    "pseudo_dialogue": Task("row", dialogues.build_pseudo_dialogue, ("text", "codes")),
    "general": Task("dialogue", dialogues.build_general),
    "dialogue": Task("dialogue", dialogues.build_dialogue),
    "speech_understanding": Task("dialogue", dialogues.build_understanding),
    "speech_generation": Task("row", dialogues.build_pseudo_dialogue, ("text", "codes")),
    "audio_understanding": Task("dialogue", dialogues.build_understanding),
}
