"""Finds rewards, recipes, eval sets and checkpoints by name: the user's folder, the checkout, the bundled copy.

`covo_rl` is the only importable name that is installed. rewards/, recipes/ and eval_sets/ are plain folders: beside
the package in a checkout, under covo_rl/_bundled in a wheel. A folder of the same name in the working directory
comes first, so that a user adds or replaces one file without touching ours. And reads what YAML and JSON files say.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import runpy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from covo_rl.types import UserError, visible

KINDS = ("rewards", "recipes", "eval_sets", "checkpoints")
#: `builtin:tiny` names the checkpoint in checkpoints/tiny
BUILTIN = "builtin:"
_PACKAGE = Path(__file__).resolve().parent
#: values of a YAML file with its aliases written out; configurations have a few hundred
MOST_VALUES = 100_000
#: what torch can hold: int64, float32
LARGEST = {int: 2**63 - 1, float: 3e38}


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


def run_recipe(name: str, words: Sequence[str]) -> None:
    """Run recipes/NAME, wherever it is found, as `python recipes/NAME WORDS` would."""
    recipe = str(find("recipes", name))
    sys.argv = [recipe, *words]
    runpy.run_path(recipe, run_name="__main__")


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
    """Where rendered clips, tiny models and judge replies are kept: COVO_RL_CACHE, or ~/.cache/covo_rl."""
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
            _check_nodes(yaml.compose(text, Loader=yaml.SafeLoader), {})
            content = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8"]) from None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        mark: Any = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = visible(getattr(error, "problem", None) or str(error))
        hint = "; only plain values are read, no tags" if "constructor" in what else ""
        raise ConfigError([f"{path}{place}: {what}{hint}"]) from None
    except (KeyError, AttributeError) as error:  # of yaml's constructors
        raise ConfigError([f"{path}: a value does not fit its tag ({visible(error)}); leave tags out"]) from None
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


def _check_nodes(node: Any, sizes: dict[int, int], above: tuple[int, ...] = ()) -> int:
    """Values of a node, aliases written out.

    Raises yaml's error for a mapping that has a key twice, of which YAML would take the last; a node that holds itself;
    more than MOST_VALUES; a number that YAML 1.1 reads in another base.
    """
    import yaml

    def check(fine: bool, problem: str, place: Any = node) -> None:
        if not fine:
            raise yaml.MarkedYAMLError(None, None, problem, place.start_mark)

    check(id(node) not in above, "an alias stands inside what it names")
    if not isinstance(node, yaml.CollectionNode):
        is_number = isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float"))
        text = node.value.lstrip("+-") if is_number else ""
        base = 60 if ":" in text else 8 if text[:1] == "0" and text[1:].isdecimal() else 10
        check(base == 10, f"YAML reads {text} in base {base}: write the number in base 10, a text in quotes")
        return 1
    if id(node) in sizes:
        return sizes[id(node)]
    keys, size = set(), 1
    for item in node.value:
        pair: tuple[Any, ...] = item if isinstance(node, yaml.MappingNode) else (item,)
        size += sum(_check_nodes(part, sizes, (*above, id(node))) for part in pair)
        check(size <= MOST_VALUES, f"its aliases make more than {MOST_VALUES} values", pair[0])
        if len(pair) == 2 and isinstance(pair[0], yaml.ScalarNode):
            check(pair[0].value not in keys, f"the key {pair[0].value!r} is there twice", pair[0])
            keys.add(pair[0].value)
    sizes[id(node)] = size
    return size


# -- values of a file --------------------------------------------------------------------------------------------------

#: options that YAML may also give as a mapping: name: number, or field: column
COLUMNS = ("columns", "eval_columns")
MAPPINGS = {"rewards", "part_learning_rates", "vllm_options", *COLUMNS}
#: what a column of a question set can be read as
FIELDS = ("id", "audio", "question", "choices", "answer", "answer_letter", "answer_index", "system_prompt")


def number_map(value: str | Mapping[str, float] | None, *, what: str, default: float | None = None) -> dict[str, float]:
    """`a=1,b=0.5`, a mapping, or with a default also `a,b` -> {name: number}, in the given order."""
    if not value:
        return {}
    result: dict[str, float] = {}
    pairs = value.items() if isinstance(value, Mapping) else _pairs(value, default)
    for name, number in pairs:
        if str(name) in result:
            raise ConfigError([f"{what}: {name!r} occurs twice; give each name one number"])
        try:
            result[str(name)] = value_as(float, number)
        except ValueError as error:
            part = f"{name}={number}"[:80]
            raise ConfigError([f"{what}: cannot read {part!r} ({error}); write name=number,name=number"]) from None
    return result


def option_map(value: str | Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """`name=value,name=value` or a mapping -> {name: value}; a value that JSON reads is a number, true, false or null.

    Raises:
        ConfigError: what is no pair, no name, or occurs twice.
    """
    if isinstance(value, Mapping):
        pairs: list[tuple[Any, Any]] = list(value.items())
    else:
        parts = [part.partition("=") for part in (value or "").split(",") if part.strip()]
        pairs = [(name.strip(), _plain_value(text.strip()) if equals else None) for name, equals, text in parts]
        if odd := [name for name, equals, _ in parts if not equals]:
            raise ConfigError([f"{what}: cannot read {odd[0]!r:.80}; write name=value,name=value, lists in YAML"])
    names = [name for name, _ in pairs]
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError([f"{what}: {name!r:.80} is no name of an argument; write it with underscores"])
        if names.count(name) > 1:
            raise ConfigError([f"{what}: {name} occurs twice; give it one value"])
    return dict(pairs)


def _plain_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def column_map(value: str | Mapping[str, str] | None, what: str = "columns") -> dict[str, str]:
    """`question=prompt,answer=label` or a mapping -> {field: column}; of None and of `auto` an empty one.

    Raises:
        ConfigError: what is no pair, no field or no name, a field that occurs twice, two ways to say the answer.
    """
    if value is None or value == "auto":
        return {}
    pairs: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, Mapping) else [(value, None)]
    if isinstance(value, str):
        parts = [part.partition("=") for part in value.split(",")]
        pairs = [(name.strip(), column.strip()) for name, _, column in parts]
    example = f"write {what} question=prompt,answer=label"
    odd = [f"{name}={column}" for name, column in pairs if not (name and column and type(name) is type(column) is str)]
    problems = [f"{what}: cannot read {pair[:80]!r}; {example}, in YAML also a mapping" for pair in odd]
    names = [str(field) for field, _ in pairs]
    for name in dict.fromkeys(names):
        near = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FIELDS)}"
        if name not in FIELDS and not problems:
            problems.append(f"{what}: a row has no field {name!r:.80}; {hint} ({example})")
        if names.count(name) > 1:
            problems.append(f"{what}: {name} occurs twice; a field is read from one column")
    if len(answers := [name for name in names if name.startswith("answer")]) > 1 and not problems:
        problems.append(f"{what}: {' and '.join(answers)} are ways to say one thing; name one")
    if problems:
        raise ConfigError(problems)
    return dict(pairs)


def _pairs(text: str, default: float | None) -> Iterator[tuple[str, Any]]:
    """`a=1,f(x=2,y=3)=0.5`: commas and equal signs inside brackets belong to arguments."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    for part in filter(None, map(str.strip, parts)):
        name, equals, number = part.rpartition("=")
        yield (name.strip(), number) if equals and ")" not in number else (part, "" if default is None else default)


def unknown_names(names: Sequence[Any], known: Sequence[str], where: str) -> list[str]:
    """One line for every name, with the nearest one that is known."""
    problems = []
    for name in names:
        similar = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f"did you mean {similar[0]}?" if similar else "see --help for all options"
        hint = hint if similar or len(known) > 30 else f"there are {', '.join(known)}"
        problems.append(f"{where}: unknown option {name!r:.80}; {hint}")
    return problems


def typed_values(
    hints: Mapping[str, Any], content: Mapping[Any, Any], problems: list[str], where: str
) -> dict[str, Any]:
    """The values of a file, each as its name's type in `hints`; unknown names and other types go to `problems`."""
    problems += unknown_names([name for name in content if name not in hints], list(hints), where)
    result = {}
    for name, value in content.items():
        try:
            if name in hints:
                is_map = name in MAPPINGS and isinstance(value, Mapping | list)
                result[name] = value if is_map else value_as(hints[name], value)
        except ValueError as error:
            problems.append(f"{where}: {name} {value!r:.80}: {error}")
    return result


def value_as(hint: Any, value: Any) -> Any:
    """A value of a file as a field's type, text for a number too (YAML's 1e-5); ValueError says what was expected."""
    kinds = get_args(hint) if NoneType in get_args(hint) else (hint,)
    if value is None:
        if NoneType in kinds:
            return None
        raise ValueError("it has no value; leave the line out for the default")
    kind, origin = kinds[0], get_origin(kinds[0])
    if kind in (int, float):
        if kind is int and type(value) is int and abs(value) <= LARGEST[int]:
            return value
        number = math.nan
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            with suppress(ValueError, OverflowError):
                number = float(value)
        if abs(number) <= LARGEST[kind] and (kind is float or number == int(number)):
            return kind(number)
    elif kind is bool:
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif (kind is Any or isinstance(value, origin or kind)) and (
        origin is not list or all(isinstance(item, get_args(kind)[0]) for item in value)
    ):
        return value
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text; put it in quotes"}
    lists = {list: "a list such as [a, b]", dict: "a mapping"}
    raise ValueError(f"expected {words.get(kind) or lists.get(origin, kind)}")
