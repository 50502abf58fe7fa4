"""What people and models put around an answer: `frames` takes it off, layer by layer, and never touches a negation.

Entities and end tokens, code fences, JSON with one value, LaTeX, markdown, quotes and brackets, "the answer is",
"is the correct answer", bullets and check marks.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from covo_rl.rewards.rules.text import clean_lines, clean_text

MAX_LAYERS = 12
MAX_FRAMED = 2000  # characters; a longer answer is taken as it stands
_ENTITY = re.compile(r"&(?:#\d{1,6}|#x[0-9a-fA-F]{1,5}|nbsp|amp|lt|gt|quot|apos);")
_END_TOKENS = re.compile(r"(?:\s*(?:<\|[^<>|\s]{1,30}\|>|</s>|<eos>|<br ?/?>))+\s*$")
_FENCE = re.compile(r"\s*```[ \t]*[A-Za-z]{0,12}[ \t]*(?:\n|(?=[^`\n]*```\s*$))")
_JSON_KEYS = frozenset("answer final_answer finalanswer choice option label letter result prediction".split())
_SET_TEXT = re.compile(r"\\(?:text|math)(?:bf|it|rm|sf|tt|up)?\{((?![A-Z]\})[^{}\\]*)\}")  # LaTeX, not a label
_SPACING = re.compile(r"\\[,;:! ]|~(?=[A-Za-z])|\\(?=[%#&$_])")
_RULE = re.compile(r"\n\s*(?:-{3,}|\*{3,}|_{3,})\s*$")
_MARKDOWN = re.compile(
    r"(?<![\w*])(?P<star>\*{1,3})(?P<bold>[^*\s][^*\n]*)(?P=star)(?![\w*])"
    r"|(?<!\w)(?P<line>_{1,3})(?P<italic>[^_\s][^_\n]*)(?P=line)(?!\w)|^#{1,6} |^> ",
    re.MULTILINE,
)
_BULLET = re.compile(r"(?:[-*+\u2192\u279c\u25b6]|\u2192)\s+(?![\d.])")
_TAGGED = re.compile(r"<(\w{1,20})>([^<>]*)</\1>")
_PAIRS = [
    *((f"\\{name}{{", "}") for name in "boxed fbox text textbf textit textrm mathrm mathbf mathit mathsf".split()),
    ("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$"), ("*", "*"), ("_", "_"),
    ('"', '"'), ("'", "'"), ("<<", ">>"), ("<", ">"), ("(", ")"), ("[", "]"), ("{", "}"),
]  # fmt: skip
_BRACKETS = frozenset("([{")  # a list inside them is one with them
_ANSWER = r"(?:answer|option|choice|letter|response)"
_RIGHT = r"(?:(?:most likely|most probable|final|correct|right|best|true|only) )*"
_LEAD_INS = [
    r"(?:so|therefore|thus|hence|then|ok|okay|well|finally|clearly|overall|in conclusion|definitely|surely|certainly)",
    r"(?:i|i'd|i'll)(?: would| will)? (?:think|believe|guess|say|choose|pick|select|chose|go with)(?: that)?"
    r"|(?:choose|select|pick|selected|chosen|correct|final|ans)|the (?:correct|right|best) one is"
    r"|(?:based on|according to|after (?:listening|hearing)) ?[^,.;:]{0,60}(?=,)",
    r"(?:probably|most likely|likely|(?:there is )?no doubt(?: that)?|without (?:a )?doubt|my guess is)",
    rf"(?:the |my |your |a )?{_RIGHT}{_ANSWER}(?:(?: here)? (?:is|would be|must be|should be))?",
    r"(?:it|this|that) (?:must|has to|would|should) be|(?:it|this|that|he|she|there) is|(?:it|that|he|she|there)'s",
    "(?:\u6b63\u786e|\u6700\u7ec8|\u6211\u7684)?\u7b54\u6848(?:\u662f|\u4e3a|\u5e94\u4e3a)?|\u6b63\u786e\u9009\u9879(?:\u662f|\u4e3a)?",
    "\u9009\u9879|\u6211\u9009|\u5e94\u9009|\u9009\u62e9?|(?:\u6b63\u3057\u3044)?\u7b54\u3048(?:\u306f)?|\u6b63\u89e3(?:\u306f)?"
    "|(?:\uc815)?\ub2f5(?:\uc740)?",
    r"(?:la |die |a |il |el )?(?:respuesta(?: correcta)?(?: es)?|r\u00e9ponse(?: correcte)?(?: est)?"
    r"|(?:richtige )?antwort(?: (?:ist|lautet))?|resposta(?: correta)?(?: \u00e9)?|risposta(?: corretta)?(?: \u00e8)?"
    r"|\u043e\u0442\u0432\u0435\u0442"
    r"|\u0627\u0644\u0625\u062c\u0627\u0628\u0629(?: \u0627\u0644\u0635\u062d\u064a\u062d\u0629)?(?: \u0647\u064a)?"
    r"|(?:\u0938\u0939\u0940 )?\u0909\u0924\u094d\u0924\u0930)",
]  # fmt: skip
_AFTER_LEAD_IN = (
    r"(?:(?:\s*[:;,.=])+\s*|\s+-\s+(?![\d.])|\s+|(?<=[\u3040-\u9fff\uac00-\ud7af])|(?=[(\[{<\"'*$\\]))(?=\S)"
)
_LEAD_IN = re.compile(rf"(?:{'|'.join(_LEAD_INS)}){_AFTER_LEAD_IN}", re.IGNORECASE)
_TAIL = re.compile(
    rf",? i (?:think|believe|guess|would say)\W*$|,? (?:definitely|certainly|probably|clearly|obviously)\W*$"
    rf"| (?:is|would be|must be|seems) (?:(?:the |my )?{_RIGHT}(?:{_ANSWER}|one)|(?:correct|right))\W*$"
    "|(?:\u3067\u3059|\u3060|\uc785\ub2c8\ub2e4)[.\\s]*$|(?<=[\u3040-\u9fff])~+$",
    re.IGNORECASE,
)
_PRICE = re.compile(r"\$(?=\d)")
_SAYS_LABEL = re.compile(r"option|choice|letter|\u9009", re.IGNORECASE)


def frames(answer: str) -> Iterator[tuple[str, str]]:
    """(what is left, what stood before it) after each layer: "", a "lead", a word for a "label", a "bullet".

    >>> [text for text, _ in frames("**Answer:** $\\\\boxed{B}$")]
    ['Answer: $\\\\boxed{B}$', '$\\\\boxed{B}$', '\\\\boxed{B}', 'B']
    """
    if len(answer) > MAX_FRAMED:
        yield clean_text(answer), ""
        return
    text = _END_TOKENS.sub("", _ENTITY.sub(lambda match: html.unescape(match[0]), answer))
    text = _RULE.sub("", _content(text))
    if "\\" in text:
        text = _SET_TEXT.sub(r" \1 ", _SPACING.sub(lambda match: " " * (match[0] != "\\"), text))
    text, how = _one_line(text), ""
    yield text, how
    for _ in range(MAX_LAYERS):
        inner, said = _peeled(text)
        if inner == text or not inner:
            return
        text, how = inner, how if said in ("", "lead") and how else said
        yield text, how


def _content(text: str) -> str:
    """What stands in a code fence and in JSON of one value, else the text."""
    text = text.strip()
    fence = _FENCE.match(text) if text.startswith("```") and text.endswith("```") and len(text) > 6 else None
    if fence and "```" not in text[fence.end() : -3]:
        text = text[fence.end() : -3].strip()
    if text[:1] in ("{", "[") and len(text) < 2000:
        try:
            value: Any = json.loads(text, object_pairs_hook=list)
        except (ValueError, RecursionError):
            return text
        if text[0] == "{" and len(value) == 1 and value[0][0].lower() in _JSON_KEYS:
            value = value[0][1:]
        if len(value) == 1 and isinstance(value[0], str | int | float) and not isinstance(value[0], bool):
            return str(value[0])
    return text


def _one_line(text: str) -> str:
    """Cleaned; a line break between words separates as a semicolon does."""
    lines = (" ".join(line.split()) for line in clean_lines(text).split("\n"))
    joined = " ; ".join(_MARKDOWN.sub(_unmarked, line) for line in lines if line)
    return _unpictured(joined) if not joined.isascii() else joined


def _unmarked(match: re.Match[str]) -> str:
    """Bold text; a letter that stands out from the text beside it is a label."""
    inner = match["bold"] or match["italic"] or ""
    return f"({inner})" if 0 < len(inner) <= 2 and match[0] != match.string else inner


def _unpictured(text: str) -> str:
    """Without pictures of what the text says: `cat` and the face of a cat, but not that of a dog."""
    words = {word.upper() for word in re.findall(r"[A-Za-z]{3,}", text)}
    pictures = {char for char in text if unicodedata.category(char) == "So"}
    for char in pictures:
        if not words.isdisjoint(unicodedata.name(char, "").split()):
            text = text.replace(char, " ")
    return text.strip() or text


def _peeled(text: str) -> tuple[str, str]:
    """(without its outermost layer, what that layer says), or the text as it is."""
    if lead_in := _LEAD_IN.match(text):
        said = "label" if _SAYS_LABEL.search(lead_in[0]) else "lead"
        return text[lead_in.end() :], said
    if bullet := _BULLET.match(text):
        return text[bullet.end() :], "bullet"
    if tagged := _TAGGED.fullmatch(text):
        return tagged[2].strip(), ""
    if tail := _TAIL.search(text):
        return text[: tail.start()].strip(), ""
    core = text.rstrip(" .,;:!")
    for opening, closing in _PAIRS:
        inner = core[len(opening) : -len(closing)]
        around = len(core) > len(opening + closing) and core.startswith(opening) and core.endswith(closing)
        if around and _is_whole(inner, opening[-1], closing) and not (opening in _BRACKETS and "," in inner):
            return inner.strip(), ""
    return text, ""


def _is_whole(inner: str, opening: str, closing: str) -> bool:
    """The bracket that opens before `inner` is the one that closes behind it."""
    if opening == closing[:1] or len(closing) > 1:
        return closing not in _PRICE.sub("", inner, count=1)  # $$5$ is a price set as mathematics
    depth = 0
    for char in inner:
        depth += (char == opening) - (char == closing)
        if depth < 0:
            return False
    return depth == 0


def bare(answer: str) -> str:
    """An answer without anything around it."""
    return [text for text, _ in frames(answer)][-1]
