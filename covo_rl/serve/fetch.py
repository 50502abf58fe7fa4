"""Files of the policy from the trainer's machine (covo_rl/engines/served_files.py) into a folder of this one."""

from __future__ import annotations

import os
import shutil
import tempfile
import urllib.error
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from covo_rl.data.transport import address_problem, exchange
from covo_rl.engines.memory_folder import MEMORY
from covo_rl.engines.server_calls import KEY_VARIABLE

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
SECONDS = 600.0
MAX_FILE = 8 << 30  # bytes


class FetchError(OSError):
    """The files could not be had; the message says from where and why."""


def is_address(source: object) -> bool:
    """Whether it is to be fetched, and not a path of this machine."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def fetched(source: str, names: Sequence[str]) -> Path:
    """A new folder, in memory where there is room, with the files `names` below the address `source`.

    The key of the servers goes along, and to no other origin.

    Raises:
        FetchError: no key is set here, or a file does not come.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    where = urlsplit(source).netloc
    if not key:
        raise FetchError(f"{KEY_VARIABLE} is not set for this server, so it fetches nothing from {where}")
    if problem := address_problem(source):
        raise FetchError(f"an address to fetch from {problem}")
    folder = Path(tempfile.mkdtemp(prefix="covo-rl-fetched-", dir=MEMORY if os.path.isdir(MEMORY) else None))
    try:
        for name in names:
            content = exchange(f"{source}/{name}", None, {"Authorization": f"Bearer {key}"}, SECONDS, MAX_FILE)
            (folder / name).write_bytes(content)
    except (OSError, ValueError, HTTPException, urllib.error.HTTPError) as error:
        shutil.rmtree(folder)
        raise FetchError(f"{name} from {where}: {error}") from error
    return folder
