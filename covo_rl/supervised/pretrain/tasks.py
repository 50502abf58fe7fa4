"""Every task by its name: what one draw takes, what its rows need, what it makes of them."""

from __future__ import annotations

from covo_rl.supervised.pretrain import dialogues
from covo_rl.supervised.pretrain.document import BuildOptions, Task

__all__ = ["TASKS", "BuildOptions", "Task"]

#: name -> task, as configurations name them
TASKS: dict[str, Task] = {
    "pseudo_dialogue": Task("row", dialogues.build_pseudo_dialogue, ("text", "codes")),
    "general": Task("dialogue", dialogues.build_general),
    "dialogue": Task("dialogue", dialogues.build_dialogue),
    "speech_understanding": Task("dialogue", dialogues.build_understanding),
    "speech_generation": Task("row", dialogues.build_pseudo_dialogue, ("text", "codes")),
    "audio_understanding": Task("dialogue", dialogues.build_understanding),
}
