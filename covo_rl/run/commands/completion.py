"""Completion scripts for bash, zsh and fish, from the words and options of all commands.

A script is static, so that a Tab starts no Python; `covo-rl completion bash` writes a new one after an update.
"""

from __future__ import annotations

import os
import re
import runpy
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from covo_rl.config import rooms
from covo_rl.data.files import write_atomically
from covo_rl.resolve import find
from covo_rl.run.commands.options_page import default_of
from covo_rl.types import UserError

SHELLS = ("bash", "zsh", "fish")
#: option -> the values it takes: () where those are the user's, a file for example; None where it takes none
Options = dict[str, tuple[str, ...] | None]


class UnknownShell(UserError, ValueError):
    """No script is made for this shell."""


@dataclass(frozen=True)
class Words:
    """What may follow a command: sub-commands with their own words, and options."""

    help: str = ""
    commands: dict[str, Words] = field(default_factory=dict)
    options: Options = field(default_factory=dict)

    def walk(self, path: str = "") -> dict[str, Words]:
        """Path ("", "data", "data check") -> its words, of this command and all below it."""
        pages: dict[str, Words] = {path: self}
        for name, words in self.commands.items():
            pages |= words.walk(f"{path} {name}".strip())
        return pages


def words_of(command: Any) -> Words:
    """The words of a command of typer's."""
    options: Options = {"--help": None}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            choices = getattr(getattr(parameter, "type", None), "choices", None) or ()
            if isinstance(parameter.default, Enum):
                choices = [member.value for member in type(parameter.default)]
            values = None if parameter.is_flag else tuple(map(str, choices))
            options |= dict.fromkeys([*parameter.opts, *parameter.secondary_opts], values)
    below = {name: words_of(sub) for name, sub in getattr(command, "commands", {}).items()}
    return Words((command.help or "").strip().split("\n")[0], below, options)


def recipe_words(name: str, recipe: str) -> Words:
    """The words of a command that is the recipe of this file, which parses its own."""
    if name == "train":
        options: Options = {"--help": ("short", *rooms()), "--config": (), "--full": None}
        for item in (item for room in rooms().values() for item in fields(room)):
            values = ("true", "false") if isinstance(default_of(item), bool) else item.metadata.get("choices", ())
            options[f"--{item.name.replace('_', '-')}"] = tuple(values)
        return Words(options=options)
    parser = runpy.run_path(str(find("recipes", recipe)))["parser"]()
    return Words(options={flag: None if action.nargs == 0 else tuple(map(str, action.choices or ()))
                          for flag, action in parser._option_string_actions.items()})  # fmt: skip


def named_shell(shell: str | None) -> str:
    """`shell`, or the one of $SHELL.

    Raises:
        UnknownShell: it is none of SHELLS.
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        what = f"shell {name!r}" if name else "$SHELL is empty"
        raise UnknownShell(f"{what}: name one of {', '.join(SHELLS)}")
    return name


def completion_script(shell: str, words: Words) -> str:
    """The text that completes `covo-rl` in one of SHELLS."""
    texts = [text for page in words.walk().values() for text in (*page.commands, *page.options)]
    texts += [value for page in words.walk().values() for values in page.options.values() for value in values or ()]
    if odd := [text for text in texts if not re.fullmatch(r"[\w-]+", text)]:
        raise ValueError(f"{odd} cannot stand in a script")
    return _fish(words) if shell == "fish" else _cases(words) + {"bash": BASH, "zsh": ZSH}[shell]


def install_completion(words: Words, shell: str) -> tuple[Path, str]:
    """Write the script where `shell` looks for such; its path, and what is left to do."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    path, then = {
        "bash": (data / "bash-completion/completions/covo-rl",
                 "a new bash completes, with the package bash-completion; without it: source that file in ~/.bashrc"),
        "zsh": (data / "zsh/site-functions/_covo-rl",
                f"in ~/.zshrc, above compinit: fpath=({data / 'zsh/site-functions'} $fpath)"),
        "fish": (config / "fish/completions/covo-rl.fish", "a new fish completes"),
    }[shell]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    text = completion_script(shell, words)
    write_atomically(path, lambda file: file.write(text))
    return path, then


def _cases(words: Words) -> str:
    """Two functions of any POSIX shell: what may follow a command, and the values of an option (FILE: any)."""
    pages = words.walk()
    follow = [f'    "{path}") echo "{" ".join([*page.commands, *page.options])}" ;;' for path, page in pages.items()]
    taken = {f"{path} {option}": choices for path, page in pages.items() for option, choices in page.options.items()}
    values = [f'    "{name}") echo "{" ".join(choices) or "FILE"}" ;;'
              for name, choices in taken.items() if choices is not None]  # fmt: skip
    return "\n".join([
        "#compdef covo-rl", HEAD,
        "_covo_rl_follow() {", '  case "$1" in', *follow, "  esac", "}",
        "_covo_rl_values() {", '  case "$1" in', *values, "  esac", "}", "",
    ])  # fmt: skip


HEAD = "# Written by `covo-rl completion`: do not edit, write it anew."
BASH = """\
_covo_rl() {
  local cur="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" at="" next values i
  COMPREPLY=()
  for ((i = 1; i < COMP_CWORD; i++)); do
    next="${at:+$at }${COMP_WORDS[i]}"
    [[ -n "$(_covo_rl_follow "$next")" ]] || break
    at="$next"
  done
  values="$(_covo_rl_values "$at $before")"
  if [[ "$values" == FILE ]]; then return; fi
  if [[ -z "$values" ]]; then
    values="$(_covo_rl_follow "$at")"
    if [[ "$cur" != -* ]]; then values="$(printf '%s\\n' $values | grep -v '^-')"; fi
  fi
  COMPREPLY=($(compgen -W "$values" -- "$cur"))
}
complete -o bashdefault -o default -F _covo_rl covo-rl
"""

ZSH = """\
_covo_rl() {
  local cur="${words[CURRENT]}" before="${words[CURRENT-1]}" at="" next values i
  for ((i = 2; i < CURRENT; i++)); do
    next="${at:+$at }${words[i]}"
    [[ -n "$(_covo_rl_follow "$next")" ]] || break
    at="$next"
  done
  values="$(_covo_rl_values "$at $before")"
  if [[ "$values" == FILE ]]; then _files; return; fi
  if [[ -z "$values" ]]; then
    values="$(_covo_rl_follow "$at")"
    if [[ "$cur" != -* ]]; then values="$(printf '%s\\n' ${=values} | grep -v '^-')"; fi
  fi
  if [[ -z "$values" ]]; then _files; else compadd -- ${=values}; fi
}
if [[ "${funcstack[1]}" == _covo-rl ]]; then _covo_rl "$@"; else compdef _covo_rl covo-rl; fi
"""


def _fish(words: Words) -> str:
    lines = [HEAD]
    for path, page in words.walk().items():
        names = path.split()
        here = " ; and ".join(f"__fish_seen_subcommand_from {name}" for name in names) or "__fish_use_subcommand"
        below = f" ; and not __fish_seen_subcommand_from {' '.join(page.commands)}" if names and page.commands else ""
        for name, command in page.commands.items():
            lines.append(f"complete -c covo-rl -f -n '{here}{below}' -a {name} -d '{_quoted(command.help)}'")
        for option, choices in page.options.items():
            takes = "" if choices is None else f" -x -a '{' '.join(choices)}'" if choices else " -r"
            flag = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            lines.append(f"complete -c covo-rl -n '{here}{below}' {flag}{takes}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
