"""Finding a reward by name. A name is a string, so that it goes into the run record and crosses processes.

accuracy                      rewards/accuracy.py of the working directory, the checkout or the bundled copy,
                              else an entry point of the group `covo_rl.rewards`
./my_reward.py:score          a file (without `:score`: the function called like the file)
my_package.rewards:score      an import
format(pattern='loose')       any of these with arguments: bound to a reward, or given to a factory of one
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from covo_rl.resolve import folders, names

GROUP = "covo_rl.rewards"


class RewardError(ValueError):
    """A reward cannot be found, loaded or run; the message says what was given and what exists."""


@dataclass(frozen=True)
class Source:
    """Where a reward comes from. `place`: working directory, checkout, bundled, entry point, file or import."""

    spec: str
    name: str
    place: str
    location: str
    function: str
    arguments: dict[str, Any]

    @property
    def trusted(self) -> bool:
        """One of ours: its run time is bounded by construction and tested, so it may run in a thread."""
        return self.place in ("checkout", "bundled")


class Reward:
    """A reward function under its name. Calling it calls the function; arguments that it does not take are left out.

    It pickles as its name and is found again wherever it is unpickled.
    """

    def __init__(self, source: Source, function: Callable[..., Any]) -> None:
        self.source = source
        self.function = function
        self.__name__ = source.name
        self.__doc__ = function.__doc__

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names it takes; `**` among them if it takes any."""
        found = inspect.signature(self.function).parameters.values()
        any_name = {"**"} if any(p.kind is p.VAR_KEYWORD for p in found) else set()
        return frozenset({p.name for p in found if p.kind is not p.VAR_KEYWORD} | any_name)

    @property
    def is_async(self) -> bool:
        target = getattr(self.function, "func", self.function)
        return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None))  # noqa: B004 - asks about the method

    @property
    def conversational(self) -> bool:
        """Wants completions as lists of messages, as TRL's own rewards do."""
        target = getattr(self.function, "func", self.function)
        module = getattr(target, "__module__", None) or type(target).__module__
        return bool(getattr(target, "conversational", module.split(".")[0] == "trl"))

    def select(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The columns that the function takes."""
        if "**" in self.parameters:
            return columns
        return {name: value for name, value in columns.items() if name in self.parameters}

    def __call__(self, *args: Any, **columns: Any) -> Any:
        return self.function(**self.select({**self.source.arguments, **_named(args), **columns}))

    def __reduce__(self) -> tuple[Any, ...]:
        return load_reward, (self.source.spec,)

    def __repr__(self) -> str:
        return f"Reward({self.source.spec!r} from {self.source.location})"


class AsyncReward(Reward):
    """A reward whose function is a coroutine; TRL and the runner await it."""

    async def __call__(self, *args: Any, **columns: Any) -> Any:
        return await self.function(**self.select({**self.source.arguments, **_named(args), **columns}))


def _named(args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments as TRL orders them, `(prompts, completions)`, or the completions alone."""
    if len(args) > 2:
        raise TypeError(f"a reward takes prompts and completions by position, all else by name; got {len(args)}")
    return dict(zip(("prompts", "completions")[-len(args) :], args, strict=True)) if args else {}


def load_reward(spec: str) -> Reward:
    """The reward that a name stands for.

    Raises:
        RewardError: nothing, or nothing callable, has this name; the message lists what exists.
    """
    base, arguments = split_arguments(spec)
    place, location, function_name, target = _find(base)
    if not callable(target):
        raise RewardError(f"reward {spec!r}: {function_name} in {location} is {type(target).__name__}, not a function")
    source = Source(spec, _short_name(base), place, location, function_name, {})
    if arguments and not _is_reward(target):
        made: Any = target(**arguments)  # a factory
        target, arguments = made, {}
    source = Source(spec, source.name, place, location, function_name, arguments)
    reward = Reward(source, target)
    return AsyncReward(source, target) if reward.is_async else reward


def _short_name(base: str) -> str:
    path, _, function = base.rpartition(":")
    return function if path else Path(base).stem


def _is_reward(target: Any) -> bool:
    try:
        found = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False
    return "completions" in found


def split_arguments(spec: str) -> tuple[str, dict[str, Any]]:
    """`format(pattern='loose')` -> ("format", {"pattern": "loose"}); arguments are literals by keyword."""
    spec = spec.strip()
    if not spec.endswith(")") or "(" not in spec:
        return spec, {}
    base, _, inside = spec[:-1].partition("(")
    try:
        call = ast.parse(f"f({inside})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(word.arg is None for word in call.keywords):
            raise ValueError("arguments need names")
        return base.strip(), {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise RewardError(f"reward {spec!r}: cannot read its arguments ({error}); write name(key='value')") from error


def _find(base: str) -> tuple[str, str, str, Any]:
    """(place, location, function name, object)."""
    path, _, function = base.rpartition(":")
    if base.endswith(".py") or path.endswith(".py"):
        file = Path(base if base.endswith(".py") else path).expanduser()
        name = file.stem if base.endswith(".py") else function
        return "file", str(file), name, _attribute(load_file(file), name, base)
    if path:
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            raise RewardError(f"reward {base!r}: cannot import {path!r}: {error}") from error
        return "import", path, function, _attribute(module, function, base)
    return _find_name(base)


def _find_name(name: str) -> tuple[str, str, str, Any]:
    if name.isidentifier():
        for place, folder in folders("rewards"):
            file = folder / f"{name}.py"
            if file.is_file():
                return place, str(file), name, _attribute(load_file(file), name, name)
    for point in entry_points(group=GROUP):
        if point.name == name:
            return "entry point", point.value, name, point.load()
    known = sorted({*names("rewards"), *(point.name for point in entry_points(group=GROUP))})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise RewardError(
        f"there is no reward {name!r}; "
        + (f"did you mean {near[0]!r}? " if near else "")
        + f"there is {', '.join(known)}, ./file.py:function and package.module:function"
    )


def _attribute(module: Any, name: str, spec: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        public = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise RewardError(f"reward {spec!r}: {module.__name__} has no {name!r}; it has {', '.join(public)}") from None


def load_file(file: Path) -> Any:
    """Import a file under a name of its own, once for each content.

    Raises:
        RewardError: there is no such file, or it raises while it is imported.
    """
    if not file.is_file():
        raise RewardError(f"reward file {file} does not exist (looked in {Path.cwd()})")
    file = file.resolve()
    digest = hashlib.sha256(str(file).encode() + file.read_bytes()).hexdigest()[:12]
    name = f"covo_rl_file_{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise RewardError(f"reward file {file} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardError(f"reward file {file} raises {type(error).__name__} while it is imported: {error}") from error
    return module


def available_rewards() -> list[Source]:
    """Every reward that has a name, with where it was found."""
    listed = [Source(n, n, place, str(path), n, {}) for n, (path, place) in names("rewards").items()]
    points = [Source(p.name, p.name, "entry point", p.value, p.name, {}) for p in entry_points(group=GROUP)]
    return listed + [point for point in points if point.name not in {item.name for item in listed}]
