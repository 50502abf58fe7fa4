"""An export on a hub: what `covo-rl export --push-to-hub OWNER/NAME` does after the check."""

from __future__ import annotations

import re
from pathlib import Path

from covo_rl.export import ExportError
from covo_rl.records.folder import export_files

_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
_LOCAL = re.compile(r"(?<![\w:/.])/(?:[^\s/\"'`<>|]+/)+[^\s/\"'`<>|]+")


def check_hub(name: str) -> str:
    """The full name of the repository that `name` means to the owner of the token; writes nothing.

    Raises:
        ExportError: no repository name, no token, or the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if not _NAME.fullmatch(name):
        raise ExportError(f"--push-to-hub {name!r}: a repository is named OWNER/NAME")
    try:
        user = HfApi().whoami()["name"]
    except LocalTokenNotFoundError as error:
        raise ExportError("--push-to-hub needs a token: `hf auth login`, or HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise ExportError("--push-to-hub: HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
    except (HfHubHTTPError, OSError) as error:
        raise ExportError(f"--push-to-hub: the hub does not take the token or does not answer: {error}") from error
    return name if "/" in name else f"{user}/{name}"


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload what the export consists of, in one commit; returns its address.

    Raises:
        ExportError: a record names a path of this machine, or the hub refuses; the export itself stays where it is.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    files = export_files(folder)
    if paths := [f"{path.name}: {local}" for path in files for local in local_paths(path)]:
        raise ExportError(f"{folder} would publish paths of this machine: {'; '.join(paths[:5])}")
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files],
            commit_message="Upload an export of covo_rl, verified by its logits",
        )
    except (HfHubHTTPError, OSError) as error:
        raise ExportError(f"{repository} could not be pushed, {folder} is as it was: {error}") from error
    return commit.commit_url


def local_paths(path: Path) -> list[str]:
    """Absolute paths of this machine that a record or card names; those of other kinds of files are not looked at."""
    if path.suffix not in (".json", ".yaml", ".md") or path.name.startswith(("tokenizer", "vocab")):
        return []
    return [name for name in _LOCAL.findall(path.read_text(encoding="utf-8")) if Path(name).exists()]
