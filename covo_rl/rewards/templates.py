"""Judge prompts: text files with a version, filled without letting the text being graded out of its markers."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from covo_rl.resolve import find

_FIELD = re.compile(r"\{\{ (\w+) \}\}")
MAX_FIELD = 8000  # characters of a completion that a judge is shown


class VerdictError(ValueError):
    """The judge's reply is not a verdict."""


@dataclass(frozen=True)
class Template:
    """`consistency.v1.txt`: its text, and the hash that goes into the run record."""

    name: str
    path: Path
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, **fields: str) -> tuple[str, str]:
        """(prompt, nonce). Markers carry a nonce made from the content, so that the content cannot close them.

        The nonce is the same for the same content, so that replies can be cached; a completion that contained its own
        hash is not something a policy can produce.
        """
        material = json.dumps([self.text, fields], sort_keys=True)
        nonce = hashlib.sha256(material.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        values = {name: _shortened(value) for name, value in fields.items()}
        values |= {"begin": f"<<<{nonce}", "end": f"{nonce}>>>", "nonce": nonce}
        return _FIELD.sub(lambda match: values[match.group(1)], self.text), nonce


def _shortened(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()
    if len(text) <= MAX_FIELD:
        return text
    return f"{text[: MAX_FIELD // 2]}\n[{len(text) - MAX_FIELD} characters left out]\n{text[-MAX_FIELD // 2 :]}"


@lru_cache(maxsize=32)
def load_template(name: str) -> Template:
    """`consistency.v1` -> rewards/judge/consistency.v1.txt of the user's folder, the checkout or the bundled copy."""
    path = find("rewards", f"judge/{name}.txt")
    return Template(name, path, path.read_text(encoding="utf-8"))


def read_verdict(reply: str, nonce: str, keys: tuple[str, ...]) -> tuple[dict[str, bool], str]:
    """(key -> yes or no, rationale) from a reply that must be exactly one JSON object with these keys and the nonce.

    Raises:
        VerdictError: anything else; a guess would be a reward for nothing.
    """
    text = reply.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(\{.*\})\s*```", text, re.DOTALL)
    try:
        found = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError) as error:
        raise VerdictError(f"the reply is not one JSON object: {reply[:120]!r}") from error
    if not isinstance(found, dict) or set(found) != {"nonce", "rationale", *keys}:
        raise VerdictError(f"expected the keys nonce, rationale, {', '.join(keys)}: {reply[:120]!r}")
    if found["nonce"] != nonce:
        raise VerdictError("the reply is about something else: its nonce is wrong")
    verdict = {}
    for name in keys:
        word = found[name].strip().lower() if isinstance(found[name], str) else found[name]
        if not isinstance(word, (str, bool)) or word not in ("yes", "no", True, False):
            raise VerdictError(f"{name} is {found[name]!r}, expected yes or no")
        verdict[name] = word in ("yes", True)
    return verdict, str(found["rationale"])
