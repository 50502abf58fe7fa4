"""Files and parts of them that were used last, held so that the next row of them is found at once."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

#: files held open at once; uncompressed bytes of row groups that are held
OPEN_FILES, HELD_BYTES = 16, 256 * 2**20


class HeldFiles:
    """Open files and row groups used last. A process that was forked opens its own: places in a file are shared."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.process = os.getpid()
        self.files: OrderedDict[Path, Any] = OrderedDict()
        self.groups: OrderedDict[tuple[Path, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()

    def file(self, path: Path, opened: Any) -> Any:
        """What `opened(path)` gave, now or before."""
        if self.process != os.getpid():
            self._forget()
        if path not in self.files:
            self.files[path] = opened(path)
        self.files.move_to_end(path)
        while len(self.files) > OPEN_FILES:
            self.files.popitem(last=False)[1].close()
        return self.files[path]

    def group(self, path: Path, number: int, read: Any) -> Any:
        """Row group `number` of a file, which `read()` gives where it is not held."""
        key = path, number
        if key not in self.groups:
            self.groups[key] = read()
        self.groups.move_to_end(key)
        while len(self.groups) > 1 and sum(table.nbytes for table in self.groups.values()) > HELD_BYTES:
            self.groups.popitem(last=False)
        return self.groups[key]
