"""Every task by its name: what one draw takes, what its rows need, what it makes of them."""

from __future__ import annotations

from covo_rl.supervised.pretrain import builder, dialogues, full_duplex
from covo_rl.supervised.pretrain.document import BuildOptions, DocumentTask

__all__ = ["TASKS", "BuildOptions", "DocumentTask"]

#: name -> task, as configurations name them
TASKS: dict[str, DocumentTask] = {
    "asr": DocumentTask("row", builder.build_asr, ("audio", "text")),
    "tts": DocumentTask("row", builder.build_tts, ("text", "codes")),
    "audio_only": DocumentTask("document", builder.build_audio_only, ("audio", "text", "codes")),
    "continuation": DocumentTask("document", builder.build_continuation, ("audio", "text")),
    "interleave_1": DocumentTask("document", builder.build_interleave_1, ("audio", "text", "codes")),
    "interleave_2": DocumentTask("document", builder.build_interleave_2, ("audio", "text", "codes")),
    "text": DocumentTask("text", builder.build_text, ("text",)),
    "pseudo_dialogue": DocumentTask("row", dialogues.build_pseudo_dialogue, ("text", "codes", "voice")),
    "general": DocumentTask("dialogue", dialogues.build_general, ("voice",)),
    "dialogue": DocumentTask("dialogue", dialogues.build_dialogue, ("voice",)),
    "speech_understanding": DocumentTask("dialogue", dialogues.build_understanding),
    "speech_generation": DocumentTask("row", dialogues.build_pseudo_dialogue, ("text", "codes", "voice")),
    "audio_understanding": DocumentTask("dialogue", dialogues.build_understanding),
    "full_duplex": DocumentTask("stream", full_duplex.build_full_duplex),
}
