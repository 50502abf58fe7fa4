"""What the page may rely on: the form of `report_payload(...)`, checked value by value.

`problems(payload)` is empty for a payload that keeps the contract. Its makers and its readers both test against it.
"""

import json
import math
import re

NUMBER = (int, float)
#: a trailing "?" allows null; a list of one item: any number of them; "*" stands for any key
ROLLOUT = {
    "completion": str,
    "think": "str?",
    "answer": "str?",
    "stop": {"stop", "length"},
    "problems": [str],
    "rewards": {"*": "number?"},
    "total": "number?",
    "advantage": "number?",
    "reasons": {"*": str},  # component -> a judge's or a rule's words, where they were logged
    "length": "int?",  # tokens; null in runs of older versions
    "logp": "number?",  # mean over tokens, nats
    "tokens": "tokens?",  # [[piece..], [centinats..]]: the pieces together are the completion
    "flags": [{"wrong_high_thinking", "right_broken_reasoning", "consistency_missing", "longest", "truncated", "copy",
               "early_answer", "no_answer"}],
}  # fmt: skip
TIMED = {**ROLLOUT, "time": "number?", "speech": "span?"}  # of a group with a timing: when it stops, and when it sounds
SPOKEN = {**ROLLOUT, "codes": [int], "reply": "str?"}  # of a reply that holds audio codes; its key of clips
GROUP = {
    "run": int,  # index in runs
    "step": int,
    "group": int,  # index in the step
    "id": str,  # of the row
    "question": str,
    "choices": [str],
    "answer": "str?",
    "clips": [str],  # keys of clips
    "columns": {"*": str},  # short facts of the row
    "flags": [{"biggest_change", "no_variance"}],
    "rollouts": [ROLLOUT],
}
TIMING = {  # of a group whose rollouts say when, not what; times in seconds
    "kind": str,
    "seconds": "number",
    "first_chunk": int,  # of the first hazard; chunks have 0.16 s
    "hazards": ["number?"],
    "turn_end": "number?",
    "onset": "number?",
    "pauses": ["span"],
    "turns": [{"channel": {"user", "model"}, "start": "number", "end": "number", "text": str}],
}
TIMED_GROUP = {**GROUP, "timing": TIMING, "rollouts": [TIMED]}
SHARE = {"n": int, "accuracy": "number?", "ci95": "interval?"}
EVALUATION = {
    **SHARE,
    "name": str,  # "before, greedy"
    "when": {"before", "after"},
    "audio": {"real", "silent", "swapped"},
    "mode": {"greedy", "sampled"},
    "breakdown": [{**SHARE, "column": str, "value": str}],
    "rewards": {"*": "number?"},
}
RUN = {
    "name": str,
    "path": str,
    "config": dict,
    "environment": dict,
    "result": dict,  # result.json without its details, which are the evaluations
    "notes": [str],
    "metrics": [dict],  # the lines of metrics.jsonl, NaN as null
    "advice": [{"step": int, "rule": str, "text": str, "link": str, "help": "str?"}],  # help: its section of docs
    "evaluations": [EVALUATION],
}
CLIP = {
    "name": str,
    "seconds": "number?",
    "src": "str?",  # data:audio/..
    "href": "str?",  # a URL, relative to the page where that is possible
    "peaks": "peaks?",  # loudest sample of each slice, -127..127, minimum and maximum in turn
    "mel": {"frames": int, "bins": int, "png": str},  # or null
    "note": "str?",  # why there is nothing to play
}
COUNTS = dict.fromkeys(
    ("rollouts", "groups", "steps", "steps_left_out", "sounds_embedded", "sounds_linked", "sounds_missing",
     "tokens_left_out", "bytes"),
    int,
)  # fmt: skip
COMPARISON = {  # of several runs, or null
    "config": [{"option": str, "values": list}],  # options that differ; one value per run, null where it has none
    "evaluations": [{"name": str, "n": ["int?"], "accuracy": ["number?"], "ci95": ["interval?"]}],  # one entry per run
}
PAYLOAD = {
    "version": {1},
    "made": str,
    "notes": [str],
    "runs": [RUN],
    "groups": [GROUP],
    "clips": {"*": CLIP},
    "comparison": COMPARISON,
    "counts": COUNTS,
}
NULLABLE = {id(COMPARISON), id(CLIP["mel"])}


def problems(payload):
    """One line for everything that the page could not rely on."""
    return [*_shape(payload, PAYLOAD, "payload"), *(_sense(payload) if not _shape(payload, PAYLOAD, "") else ())]


def _shape(value, form, at):
    if form is ROLLOUT and isinstance(value, dict) and "codes" in value:
        form = SPOKEN
    if form is GROUP and isinstance(value, dict) and "timing" in value:
        form = TIMED_GROUP
    if isinstance(form, dict):
        if value is None and id(form) in NULLABLE:
            return
        if not isinstance(value, dict):
            yield f"{at}: {type(value).__name__}, expected an object"
        elif "*" in form:
            for key, item in value.items():
                yield from _shape(item, form["*"], f"{at}[{key!r:.40}]")
        else:
            if value.keys() != form.keys():
                yield f"{at}: lacks {sorted(form.keys() - value.keys())}, has {sorted(value.keys() - form.keys())} more"
            for key in value.keys() & form.keys():
                yield from _shape(value[key], form[key], f"{at}.{key}")
    elif isinstance(form, list):
        if not isinstance(value, list):
            yield f"{at}: {type(value).__name__}, expected a list"
        else:
            for index, item in enumerate(value):
                yield from _shape(item, form[0], f"{at}[{index}]")
    elif isinstance(form, set):
        if value not in form:
            yield f"{at}: {value!r:.60}, expected one of {sorted(form)}"
    elif isinstance(form, str) and value is None and form.endswith("?"):
        return
    elif not _is(value, form.removesuffix("?") if isinstance(form, str) else form.__name__):
        yield f"{at}: {value!r:.60}, expected {form}"


def _is(value, name):
    if name == "number":
        return isinstance(value, NUMBER) and not isinstance(value, bool) and math.isfinite(value)
    if name == "span":  # [start, end or null]
        return isinstance(value, list) and len(value) == 2 and all(_is(v, "number") for v in value if v is not None)
    if name == "interval":
        return isinstance(value, list) and len(value) == 2 and all(_is(v, "number") for v in value)
    if name == "peaks":
        return isinstance(value, list) and all(type(v) is int and -127 <= v <= 127 for v in value)
    if name == "tokens":
        return (
            isinstance(value, list) and len(value) == 2 and len(value[0]) == len(value[1])
            and all(isinstance(v, str) for v in value[0]) and all(type(v) is int for v in value[1])
        )  # fmt: skip
    return type(value).__name__ == name


def _sense(payload):
    """What types do not say: references that lead somewhere, pieces that make up the text, counts that are true."""
    try:
        json.dumps(payload, allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (ValueError, TypeError) as error:
        yield f"payload: no JSON in UTF-8: {error}"
    for number, group in enumerate(payload["groups"]):
        at = f"groups[{number}]"
        if not 0 <= group["run"] < len(payload["runs"]):
            yield f"{at}.run: {group['run']} of {len(payload['runs'])} runs"
        yield from (f"{at}.clips: {key!r:.60} is not in clips" for key in group["clips"] if key not in payload["clips"])
        for g, rollout in enumerate(group["rollouts"]):
            if rollout.get("reply") is not None and rollout["reply"] not in payload["clips"]:
                yield f"{at}.rollouts[{g}].reply: {rollout['reply']!r:.60} is not in clips"
            if rollout["tokens"] and "".join(rollout["tokens"][0]) != rollout["completion"]:
                yield f"{at}.rollouts[{g}].tokens: the pieces are not the completion"
    for key, clip in payload["clips"].items():
        if clip["src"] and not re.match(r"data:audio/[\w.+-]+;base64,[A-Za-z0-9+/]+=*$", clip["src"]):
            yield f"clips[{key!r:.40}].src: {clip['src']:.40}"
        if clip["mel"] and not clip["mel"]["png"].startswith("data:image/png;base64,"):
            yield f"clips[{key!r:.40}].mel.png: {clip['mel']['png']:.40}"
        if clip["href"] and not re.match(r"(file:///)?[\w.~!$&'()*+,;=@%/-]+$", clip["href"], re.ASCII):
            yield f"clips[{key!r:.40}].href: {clip['href']:.60} is no quoted path"  # no scheme but file:, no host
        if clip["src"] is None and clip["href"] is None and not clip["note"]:
            yield f"clips[{key!r:.40}]: nothing to play, and no note why"
    groups, clips, counts = payload["groups"], payload["clips"].values(), payload["counts"]
    expected = {
        "groups": len(groups),
        "rollouts": sum(len(group["rollouts"]) for group in groups),
        "steps": len({(group["run"], group["step"]) for group in groups}),
        "sounds_embedded": sum(clip["src"] is not None for clip in clips),
        "sounds_linked": sum(clip["src"] is None and clip["href"] is not None for clip in clips),
        "sounds_missing": sum(clip["src"] is None and clip["href"] is None for clip in clips),
    }
    yield from (f"counts.{name}: {counts[name]}, there are {n}" for name, n in expected.items() if counts[name] != n)
    if (payload["comparison"] is not None) != (len(payload["runs"]) > 1):
        yield "comparison: there is one where there are several runs"
    for row in payload["comparison"]["config"] if payload["comparison"] else ():
        if len(row["values"]) != len(payload["runs"]):
            yield f"comparison.config {row['option']}: {len(row['values'])} values of {len(payload['runs'])} runs"
