"""A user's Python file becomes a module: a reward, a model family."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from covo_rl.types import UserError


class FileImportError(UserError, ValueError):
    """A file cannot be imported; the message says why, or which files there are."""


def import_file(file: Path, *, alone: bool = False, noun: str = "function") -> ModuleType:
    """Import a file under a name of its own, once for each content; what lies beside it can be imported by it.

    `alone`: its own name if no other module has it, so that processes that it spawns find its functions. `noun`: what
    is looked for in it.

    Raises:
        FileImportError: there is no such file, or it raises while it is imported. A UserError that it raises comes out.
    """
    if not file.is_file():
        there = sorted(path.name for path in file.parent.glob("*.py"))[:20] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, there, n=1)
        hint = f"did you mean {file.parent / near[0]}?" if near else f"{file.parent} has {', '.join(there) or 'none'}"
        raise FileImportError(f"file {file} does not exist (looked in {Path.cwd()}); {hint}")
    file = file.resolve()
    name = f"covo_rl_file_{file.stem}_{hashlib.sha256(str(file).encode() + file.read_bytes()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if alone and file.stem.isidentifier() and file.stem not in sys.modules and not importlib.util.find_spec(file.stem):
        name = file.stem
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last: it hides nothing
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (KeyboardInterrupt, UserError)):
            raise
        hint = f"; a file of a package is named package.module:{noun}" if "relative import" in str(error) else ""
        raise FileImportError(
            f"file {file} raises {type(error).__name__} while it is imported: {error}{hint}"
        ) from error
    return module
