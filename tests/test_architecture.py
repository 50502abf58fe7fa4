"""The house: imports go up the list of rooms, nobody reads another room's private names, one name means one thing."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "covo_rl"
#: a room may import itself and those before it
ROOMS = (
    "types", "resolve", "config", "audio", "data", "synth", "prompt", "models", "policy", "engines", "rewards", "algo",
    "records", "train", "speech", "duplex", "evaluate", "export", "supervised", "serve", "interop", "run", "bench",
    "cli",
)  # fmt: skip
ROOT_MODULES = {"__init__", "types", "config", "prompt", "resolve", "cli"}
MODULES = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(path):
    """(module, name) of every import of ours, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "covo_rl":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "covo_rl")


def _room(module, name=""):
    parts = [*module.split("."), name]
    return parts[1] if parts[1] in ROOMS else None  # covo_rl itself: its version


@cache
def _edges():
    return [
        (parts[1], _room(module, name), ".".join(parts), f"{module}.{name}".rstrip("."))
        for path, parts in MODULES.items()
        if parts[1] in ROOMS
        for module, name in _imports(path)
        if _room(module, name) not in (None, parts[1])
    ]


def test_only_these_modules_stand_at_the_root():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} <= set(ROOMS)


def test_imports_go_up_the_list_of_rooms():
    wrong = [
        f"{here} imports {there}" for room, other, here, there in _edges() if ROOMS.index(other) > ROOMS.index(room)
    ]
    assert wrong == []


def test_rooms_form_no_circle():
    needs = defaultdict(set)
    for room, other, _, _ in _edges():
        needs[room].add(other)
    done, under_way = set(), []

    def visit(room):
        assert room not in under_way, f"circle: {' -> '.join([*under_way[under_way.index(room) :], room])}"
        if room not in done:
            under_way.append(room)
            for other in sorted(needs[room]):
                visit(other)
            done.add(under_way.pop())

    for room in ROOMS:
        visit(room)


def test_nobody_reads_private_names_of_another_room():
    wrong = [
        f"{here}: {there}"
        for room, _, here, there in _edges()
        if any(part.startswith("_") for part in there.split("."))
    ]
    assert wrong == []


def test_no_public_function_has_the_name_of_another():
    homes = defaultdict(list)
    for path, parts in MODULES.items():
        for node in _tree(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                homes[node.name].append(".".join(parts[1:]))
    # entry points of a script and a plug-in; the name that a checkpoint's `architectures` gives, in both libraries
    shared = {"main", "register", "CovoAudioForConditionalGeneration"}
    assert {name: modules for name, modules in homes.items() if len(modules) > 1 and name not in shared} == {}


def test_the_lines_that_the_documentation_names_are_there():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"`(covo_rl/[\w/]+\.py):(\d+)` `([^`]+)`", text)
    assert len(places) >= 10
    for path, number, words in places:
        line = (PACKAGE.parent / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert words in line, f"docs/architecture.md names {path}:{number} for {words!r}, which reads {line!r}"
