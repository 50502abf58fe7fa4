"""The next step's clips, decoded and processed by the CPU while an accelerator samples this step's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from covo_rl.policy.features import FeatureStore

if TYPE_CHECKING:
    from covo_rl.audio import ClipStore
    from covo_rl.models.base import ClipFeatures
    from covo_rl.types import Example


class Prefetch:
    """Makes clips ready for the encoder in a thread, and gives them to the store in `turn`, in the caller's thread.

    They are never more than one step ahead, nor larger together than the store's budget. What fails is left out:
    who needs that clip does the same again, and meets the error when it is due. The numbers are those of the store.
    """

    def __init__(self, store: FeatureStore, *, active: bool = True) -> None:
        self.store, self.active = store, active
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._ready: dict[str, ClipFeatures] = {}

    def turn(self, next_rows: Sequence[Example]) -> None:
        """Hand over what the last turn began, as soon as all of it is ready, and begin with these rows."""
        clips = self.store.clips
        if not self.active or clips is None:
            return
        if self._thread is not None:
            self._thread.join()
        for key, clip in self._ready.items():
            if self.store.unprocessed(key):
                self.store.adopt(key, clip)
        self._ready = {}
        self._closing.clear()
        self._thread = threading.Thread(target=self._process, args=(clips, next_rows), name="prefetch")
        self._thread.start()

    def close(self) -> None:
        """End the thread after the clip that it is at, and forget what it made."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._ready = None, {}

    def _process(self, clips: ClipStore, rows: Sequence[Example]) -> None:
        room = self.store.budget
        for clip in (clip for row in rows for clip in row.clips):
            if self._closing.is_set() or room <= 0:
                return
            if not clips.named(clip):  # its step is the one to say what it holds
                continue
            try:
                key = clips.key(clip)
                if key not in self._ready and self.store.unprocessed(key):
                    self._ready[key] = self.store.process(key)
                    room -= self._ready[key].nbytes
            except Exception:  # met again, and said, by the step that needs this clip
                continue
