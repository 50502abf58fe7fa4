"""Finds rewards, recipes, eval sets and checkpoints by name: the user's folder, the checkout, the bundled copy.

`covo_rl` is the only importable name that is installed. rewards/, recipes/ and eval_sets/ are plain folders: beside
the package in a checkout, under covo_rl/_bundled in a wheel. A folder of the same name in the working directory
comes first, so that a user adds or replaces one file without touching ours. And reads what YAML and JSON files say.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from covo_rl.types import UserError, visible

KINDS = ("rewards", "recipes", "eval_sets", "checkpoints")
#: `builtin:tiny` names the checkpoint in checkpoints/tiny
BUILTIN = "builtin:"
_PACKAGE = Path(__file__).resolve().parent


class OutsideFolderError(UserError, ValueError):
    """A name that leaves the folder of its kind."""


def folders(kind: str) -> list[tuple[str, Path]]:
    """Where things of a kind are looked for, in order: (what the place is called, folder). Existing ones only."""
    checkout = _PACKAGE.parent / kind if (_PACKAGE.parent / "pyproject.toml").is_file() else None
    here = Path.cwd() / kind
    candidates = [("working directory", here), ("checkout", checkout), ("bundled", _PACKAGE / "_bundled" / kind)]
    if checkout is not None and here.resolve() == checkout.resolve():
        candidates = candidates[1:]
    return [(place, folder) for place, folder in candidates if folder is not None and folder.is_dir()]


def names(kind: str, suffix: str = ".py") -> dict[str, tuple[Path, str]]:
    """Everything of a kind that can be named: file stem -> (path, place). The first place wins."""
    paths: dict[str, tuple[Path, str]] = {}
    for place, folder in folders(kind):
        for path in sorted(folder.glob(f"*{suffix}")):
            if not path.name.startswith("_"):
                paths.setdefault(path.stem, (path, place))
    return paths


def find(kind: str, name: str) -> Path:
    """The file or folder `name` of a kind, for example find("recipes", "grpo_mmau.py").

    Raises:
        OutsideFolderError: `name` leaves the folder of its kind.
        FileNotFoundError: it is nowhere; the message says where it was looked for and what exists.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise OutsideFolderError(
            f"{kind}: {name!r} must be a name inside the {kind} folder; give a path to use another place"
        )
    searched = [folder for _, folder in folders(kind)]
    for folder in searched:
        if (folder / name).exists():
            return folder / name
    suffix = Path(name).suffix
    existing = sorted({path.name for folder in searched for path in folder.glob(f"*{suffix}" if suffix else "*")})
    similar = difflib.get_close_matches(name, existing, n=1, cutoff=0.6)
    raise FileNotFoundError(
        f"there is no {name!r} in {kind}; "
        + (f"did you mean {similar[0]!r}? " if similar else "")
        + f"looked in {', '.join(map(str, searched)) or 'no folder: none exists'}; "
        + f"there is {', '.join(existing) or 'nothing'}"
    )


def resolve_model(name: str) -> str:
    """`builtin:NAME` -> folder of the shipped checkpoint; any other name is returned as it is.

    Raises:
        FileNotFoundError: no shipped checkpoint has this name; the message lists those that exist.
    """
    if not name.startswith(BUILTIN):
        return name
    return str(find("checkpoints", name.removeprefix(BUILTIN)))


def reward_files(names: Iterable[str]) -> dict[str, Path]:
    """Reward name -> its file, for those that live in one; their hashes go into the run record."""
    files = {}
    for name in names:
        path = Path(name.rpartition(":")[0]) if name.endswith(".py") or ".py:" in name else None
        if path is None and ":" not in name:
            try:
                path = find("rewards", f"{name}.py")
            except FileNotFoundError:
                continue  # an entry point: its distribution is in the versions
        if path is not None and path.is_file():
            files[name] = path
    return files


def cache_folder() -> Path:
    """Where rendered clips and judge replies are kept: COVO_RL_CACHE, or ~/.cache/covo_rl."""
    return Path(os.environ.get("COVO_RL_CACHE") or Path.home() / ".cache" / "covo_rl")


class ConfigError(UserError, ValueError):
    """Every problem of a configuration, at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("the configuration has problems:\n" + "\n".join(f"  - {p}" for p in self.problems))


def meant(path: str | Path) -> str:
    """`; did you mean PATH?` where a name beside a missing path is like it, or nothing."""
    path = Path(path)
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near and near[0] != path.name else ""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or (by its suffix) JSON file.

    Raises:
        ConfigError: there is no such file; it is not UTF-8, broken, or no mapping; it has tags, or a key twice. The
            message names the place.
    """
    import yaml

    path = Path(path)
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise ConfigError([f"{path}: a folder, where a file of options is needed{hint}"])
    if not path.is_file():
        raise ConfigError([f"{path}: no such file (looked in {Path.cwd()}){meant(path)}"])
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=_unique)
        else:
            _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), set())
            content = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8"]) from None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        mark: Any = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = visible(getattr(error, "problem", None) or str(error))
        hint = "; only plain values are read, no tags" if "constructor" in what else ""
        raise ConfigError([f"{path}{place}: {what}{hint}"]) from None
    if not isinstance(content, dict):
        kind = "nothing" if content is None else type(content).__name__
        raise ConfigError([f"{path}: expected a mapping of option: value, found {kind}"])
    return content


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


def _check_keys(node: Any, seen: set[int], above: tuple[int, ...] = ()) -> None:
    """Raises yaml's error where a mapping below has a key twice, of which YAML would take the last, or holds itself."""
    import yaml

    if id(node) in above:
        raise yaml.MarkedYAMLError(None, None, "an alias stands inside what it names", node.start_mark)
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    keys = set()
    for item in node.value:
        pair: tuple[Any, ...] = item if isinstance(node, yaml.MappingNode) else (None, item)
        for part in pair:
            _check_keys(part, seen, (*above, id(node)))
        if isinstance(pair[0], yaml.ScalarNode):
            if pair[0].value in keys:
                raise yaml.MarkedYAMLError(None, None, f"the key {pair[0].value!r} is there twice", pair[0].start_mark)
            keys.add(pair[0].value)
