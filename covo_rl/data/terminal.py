"""What reaches a terminal: the one way out for text that a file, a model or another program wrote. No torch.

Strings are text, never markup or emoji codes; what does not print is escaped, and what the terminal's encoding lacks.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from covo_rl.types import visible

#: line breaks and tabs of a message stay; in names and ids `visible` escapes them
LAYOUT = "\n\t"


class Output:
    """Standard output or error, whatever it is when written to, escaping what its encoding cannot hold."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(sys, self.name), name)

    def write(self, text: str) -> int:
        stream = getattr(sys, self.name)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        return stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


class Terminal(Console):
    """rich's console, in which a style is a `Text` or an argument and never a part of a string."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        file: Any = Output("stderr" if stderr else "stdout")
        super().__init__(file=file, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, LAYOUT), **{**options, "markup": False, "emoji": False})


def say(text: object, *, err: bool = False) -> None:
    """Print one message, to standard error with `err`."""
    output = Output("stderr" if err else "stdout")
    output.write(visible(text, LAYOUT) + "\n")
    output.flush()
