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
import importlib
import importlib.util
import inspect
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from covo_rl.data.files import file_sha256
from covo_rl.data.module import FileImportError, import_file
from covo_rl.resolve import names
from covo_rl.types import UserError

GROUP = "covo_rl.rewards"
PACKAGES = ("trl", "covo_rl")  # whose functions may run in the trainer's process
LOAD_SECONDS = 180.0  # that importing a reward may take: torch from a network file system, on eight ranks at once


class RewardError(UserError, ValueError):
    """A reward cannot be found, loaded or run; the message says what was given and what exists."""


@dataclass(frozen=True)
class Source:
    """Where a reward comes from. `place`: working directory, checkout, bundled, entry point, file, import, object."""

    spec: str
    name: str
    place: str
    location: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

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
        self.target: Any = getattr(function, "func", function)  # inside a partial
        self.package = (getattr(self.target, "__module__", None) or type(self.target).__module__).split(".")[0]
        self.__name__ = source.name
        self.__doc__ = function.__doc__

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names it takes; `**` among them if it takes any."""
        return frozenset(_parameters(self.function))

    @property
    def conversational(self) -> bool:
        """Wants completions as lists of messages, as TRL's own rewards do."""
        return bool(getattr(self.target, "conversational", self.package == "trl"))

    @property
    def in_thread(self) -> bool:
        """Runs in a thread of this process: live objects, ours and TRL's but those that ask for a process, and others
        that ask for a thread."""
        ours = self.source.trusted or self.package in PACKAGES
        isolation = getattr(self.function, "isolation", "thread" if ours else "process")
        return isolation == "thread" or self.source.place == "object"

    def __call__(self, *args: Any, **columns: Any) -> Any:
        """Positional arguments come as TRL orders them, `(prompts, completions)`, or are the completions alone."""
        if len(args) > 2:
            raise TypeError(f"a reward takes prompts and completions by position, all else by name; got {len(args)}")
        by_position = zip(("prompts", "completions")[2 - len(args) :], args, strict=True)
        columns = {**self.source.arguments, **dict(by_position), **columns}
        takes_any = "**" in self.parameters
        return self.function(**{name: v for name, v in columns.items() if takes_any or name in self.parameters})

    @property
    def file(self) -> str | None:
        """The one that holds its code, if one does."""
        try:
            file = inspect.getsourcefile(self.target if hasattr(self.target, "__code__") else type(self.target))
        except (TypeError, OSError):  # built in
            return None
        return file if file and Path(file).is_file() else None

    @property
    def sha256(self) -> str | None:
        """Of `file`."""
        return file_sha256(self.file) if self.file else None

    def __reduce__(self) -> tuple[Any, ...]:
        return load_reward, (self.source.spec,)

    def __repr__(self) -> str:
        return f"Reward({self.source.spec!r} from {self.source.location})"


class AsyncReward(Reward):
    """A reward whose function is a coroutine; TRL and the runner await it."""

    async def __call__(self, *args: Any, **columns: Any) -> Any:
        return await super().__call__(*args, **columns)


def load_reward(spec: str, *, alone: bool = False) -> Reward:
    """The reward that a name stands for; `alone` says that this process is there for nothing else.

    Raises:
        RewardError: nothing, or nothing callable, has this name; the message lists what exists.
    """
    source = source_of(spec)
    arguments = source.arguments
    with _import_guard(spec):
        function = _imported(source, alone)
    if not callable(function):
        what = f"{source.name} in {source.location} is {type(function).__name__}"
        raise RewardError(f"reward {spec!r}: {what}, not a function")
    if arguments or inspect.isclass(function):  # a class is a factory: what it makes is called
        parameters = _parameters(function)
        _check_arguments(spec, parameters, arguments)
        if "completions" not in parameters:
            with _import_guard(spec):
                made: Any = function(**arguments)
            function, arguments = made, {}
    reward = Reward(replace(source, arguments=arguments), function)
    is_async = any(map(inspect.iscoroutinefunction, (reward.target, reward.target.__call__)))
    return AsyncReward(reward.source, function) if is_async else reward


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Names it takes; `**` among them if it takes any, as do built-in functions without a signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ["**"]
    return ["**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters]


def _check_arguments(spec: str, parameters: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Raises RewardError for an argument that the function does not take: it would be left out."""
    if "**" in parameters and "completions" not in parameters:
        return  # a factory that takes anything
    for name in arguments:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise RewardError(f"reward {spec!r} has no argument {name!r}; {hint}it takes {', '.join(parameters)}")


@contextmanager
def _import_guard(spec: str) -> Iterator[None]:
    """Code of the user's that is imported: whatever it raises names the reward; in the main thread its time is limited.

    Raises:
        RewardError: it raised, SystemExit too, or took more than LOAD_SECONDS.
    """

    def stop(*_: object) -> None:
        raise RewardError(f"reward {spec!r} did not load within {LOAD_SECONDS:g} s")

    before: Any = None
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGALRM"):
        before = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, LOAD_SECONDS)
    try:
        yield
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {spec!r} raises {type(error).__name__} while it is loaded: {error}") from error
    finally:
        if before:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before[0] or signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, *before[1])


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


def source_of(spec: str) -> Source:
    """Where the reward of this name comes from; nothing is imported.

    Raises:
        RewardError: nothing has this name; the message lists what exists.
    """
    base, arguments = split_arguments(spec)
    path, _, name = base.rpartition(":")
    if base.endswith(".py"):
        path, name = base, Path(base).stem
    if path:
        place, location = ("file", str(Path(path).expanduser())) if path.endswith(".py") else ("import", path)
    elif name in (files := names("rewards")):
        place, location = files[name][1], str(files[name][0])
    elif name in (points := entry_points(group=GROUP)).names:
        place, location = "entry point", points[name].value
    else:
        known = sorted({*files, *points.names})
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        guess = f"did you mean {near[0]!r}? " if near else ""
        there = f"there is {', '.join(known)}, ./file.py:function and package.module:function"
        raise RewardError(f"there is no reward {name!r}; {guess}{there}")
    return Source(spec, name, place, location, arguments)


def _imported(source: Source, alone: bool) -> Any:
    """The object of this name."""
    place, location, name = source.place, source.location, source.name
    try:
        if place == "entry point":
            return entry_points(group=GROUP)[name].load()
        module = importlib.import_module(location) if place == "import" else load_file(Path(location), alone=alone)
    except RewardError:
        raise
    except Exception as error:  # whatever the module does while it is imported
        hint = "; a file is named with its .py" if "/" in location else ""
        what = f"cannot import {location!r}: {type(error).__name__}: {error}{hint}"
        raise RewardError(f"reward {source.spec!r}: {what}") from error
    if not hasattr(module, name):
        public = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise RewardError(f"reward {source.spec!r}: {module.__name__} has no {name!r}; it has {', '.join(public)}")
    return getattr(module, name)


def load_file(file: Path, *, alone: bool = False) -> ModuleType:
    """`data.module.import_file` of a file of rewards. Raises RewardError for what cannot be imported."""
    try:
        return import_file(file, alone=alone)
    except FileImportError as error:
        raise RewardError(f"reward {error}") from error.__cause__


def available_rewards() -> list[Source]:
    """Every reward that has a name, with where it was found."""
    sources = {name: Source(name, name, place, str(path)) for name, (path, place) in names("rewards").items()}
    for point in entry_points(group=GROUP):
        sources.setdefault(point.name, Source(point.name, point.name, "entry point", point.value))
    return list(sources.values())
