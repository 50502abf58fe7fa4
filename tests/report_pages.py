"""Payloads of the report, made up by seed, in the form of tests/report_contract.py; and out of a page again."""

import base64
import gzip
import io
import json
import math
import random
import re
import struct
import wave
import zlib

RATE = 8000
COMPONENTS = ("accuracy", "format", "consistency", "thinking")
WORDS = [
    "the", "a", "violin", "plays", "softly", "rising", "then", "falling", "dog", "barks", "twice", "bell", "rings",
    "once", "far", "near", "钟", "声", "響く", "rain",
]  # fmt: skip
#: what a model may write to harm a reader: run, close a script, load, turn the text around, hide
EVIL = (
    '</script><script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1">'
    "<svg onload='window.hacked = 1'> {{ 7 * 7 }} &amp; "
    "javascript:window.hacked=1 \u2028 \u202e \x1b[31m \x00 \u200b end"
)


def tone(seconds=0.8, hertz=440.0):
    """A sine as a data URL of a WAV."""
    with wave.open(stream := io.BytesIO(), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        samples = (int(9000 * math.sin(2 * math.pi * hertz * i / RATE)) for i in range(int(seconds * RATE)))
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    return "data:audio/wav;base64," + base64.b64encode(stream.getvalue()).decode()


def picture(frames=60, bins=20):
    """A grey PNG as a mel of a payload."""
    lines = b"".join(b"\0" + bytes((x * y) % 256 for x in range(frames)) for y in range(bins))

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", frames, bins, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return {"frames": frames, "bins": bins, "png": "data:image/png;base64," + base64.b64encode(png).decode()}


def rollout(rng, skill, words):
    """One completion; `skill` is the chance that it is right."""
    right = rng.random() < skill
    think = " ".join(rng.choices(WORDS, k=words)) + "."
    answer = "yes" if right else "no"
    text = f"<think>{think}</think><answer>{answer}</answer>"
    pieces = [text[i : i + 5] for i in range(0, len(text), 5)]
    rewards = {"accuracy": float(right), "format": 1.0, "thinking": round(rng.random(), 2),
               "consistency": rng.choice([None, 0.0, 1.0, 1.0, 1.0])}  # fmt: skip
    long = rng.random() < 0.06
    flags = [
        name
        for name, holds in {
            "wrong_high_thinking": not right and rewards["thinking"] > 0.75,
            "right_broken_reasoning": right and rewards["consistency"] == 0.0,
            "consistency_missing": rewards["consistency"] is None,
            "truncated": long,
            "longest": rng.random() < 0.03,
            "copy": rng.random() < 0.05,
        }.items()
        if holds
    ]
    return {
        "completion": text, "think": think, "answer": answer, "stop": "length" if long else "stop",
        "problems": ["<answer> is not closed"] if long else [], "rewards": rewards,
        "total": round(sum(value or 0 for value in rewards.values()), 2), "advantage": round(rng.gauss(0, 1), 3),
        "reasons": {"thinking": f"The reasoning names {rng.choice(WORDS)} and weighs it."}, "length": len(pieces),
        "logp": -0.2, "tokens": [pieces, [-int(rng.expovariate(0.03)) for _ in pieces]], "flags": flags,
    }  # fmt: skip


def share(right, n):
    """A share with its Wilson interval."""
    p, z = right / n, 1.96
    centre, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return {"n": n, "accuracy": p, "ci95": [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]}


def evaluation(when, audio, mode, right):
    name = f"{when}, {mode}" + ("" if audio == "real" else f", {audio} audio")
    parts = [{**share(right // 4 + i, 100), "column": "task", "value": value}
             for i, value in enumerate(("sound", "music", "speech"))]  # fmt: skip
    return {**share(right, 400), "name": name, "when": when, "audio": audio, "mode": mode, "breakdown": parts,
            "rewards": {"total": 2 + right / 200, "accuracy": right / 400, "format": 1.0}}  # fmt: skip


def run(name, steps, rng, **config):
    metrics = [
        {"step": step, "reward_total": 2 + step / steps + rng.random() / 5, "reward_accuracy": 0.3 + step / steps / 2,
         "reward_format": 1.0, "reward_thinking": 0.5, "completion_length": 60.0 + step, "truncated": 0.05,
         "kl": 0.01 * step, "zero_variance_groups": 0.1, "loss": None, "grad_norm": 0.1,
         "seconds": {"step": 1.0, "sample": 0.6, "update": 0.4},
         "rewards/wrong_outranks_right": 0.05, "sampling/sampling_logp_difference/mean": 1e-7}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    evaluations = [
        evaluation("before", "real", "greedy", 200), evaluation("before", "real", "sampled", 150),
        evaluation("after", "real", "greedy", 320), evaluation("after", "real", "sampled", 300),
        evaluation("after", "silent", "sampled", 110), evaluation("after", "swapped", "sampled", 105),
    ]  # fmt: skip
    return {
        "name": name, "path": f"runs/{name}",
        "config": {"model": "builtin:tiny", "data": None, "max_steps": steps, **config},
        "environment": {"python": "3.12", "packages": {"torch": "2.12"}}, "result": {"steps": steps}, "notes": [],
        "metrics": metrics, "evaluations": evaluations,
        "advice": [{"step": 2, "rule": "no_variance", "text": "Half of the groups teach nothing.",
                    "link": "https://example.org/troubleshooting.md#no-variance", "help": None},
                   {"step": 4, "rule": "kl", "text": "KL runs away.", "link": "docs/troubleshooting.md#kl",
                    "help": None},
                   {"step": 99, "rule": "entropy", "text": "Entropy falls: `covo-rl sft`.",
                    "link": "docs/troubleshooting.md#entropy", "help": "It `tries`\nnothing.\n\n- One.\n- Two."}],
    }  # fmt: skip


def payload(*, runs=1, steps=10, groups=10, rollouts=8, prompts=30, words=24, seed=0):
    """A payload of `runs * steps * groups * rollouts` rollouts; row `evil` (if any) is put in by `harmful`."""
    rng = random.Random(seed)
    clips = {f"clip{i}": {"name": f"clip{i}.wav", "seconds": 0.8, "src": tone(hertz=220.0 * (i + 1)), "href": None,
                          "peaks": [v for s in range(80) for v in (-s, s)], "mel": picture(), "note": None}
             for i in range(4)}  # fmt: skip
    clips["away"] = {
        "name": "away.wav",
        "seconds": 2.0,
        "src": None,
        "href": "sounds/away.wav",
        "peaks": None,
        "mel": None,
        "note": None,
    }
    rows = [
        {"run": r, "step": step, "group": g, "id": f"row-{i:03d}",
         "question": f"Question {i}: what do you hear, {WORDS[i % len(WORDS)]}?",
         "choices": ["yes", "no"], "answer": "yes", "clips": ["away" if i % 7 == 3 else f"clip{i % 4}"],
         "columns": {"task": "sound"},
         "flags": [flag for flag in ("biggest_change", "no_variance") if rng.random() < 0.1],
         "rollouts": [rollout(rng, 0.2 + 0.7 * step / steps, words) for _ in range(rollouts)]}
        for r in range(runs)
        for step in range(1, steps + 1)
        for g in range(groups)
        for i in [rng.randrange(prompts)]
    ]  # fmt: skip
    names = [f"run-{chr(97 + r)}" for r in range(runs)]
    comparison = None
    if runs > 1:
        named = [share(200 + 20 * r, 400) for r in range(runs)]
        comparison = {"config": [{"option": "beta", "values": [0.1 * r for r in range(runs)]}],
                      "evaluations": [{"name": "before, greedy", "n": [400] * runs,
                                       "accuracy": [s["accuracy"] for s in named],
                                       "ci95": [s["ci95"] for s in named]}]}  # fmt: skip
    return {
        "version": 1, "made": "2026-01-02", "notes": ["metrics.jsonl, line 3 is left out"],
        "runs": [run(name, steps, rng, beta=0.1 * r) for r, name in enumerate(names)],
        "groups": rows, "clips": clips, "comparison": comparison,
        "counts": {"rollouts": len(rows) * rollouts, "groups": len(rows), "steps": runs * steps, "steps_left_out": 0,
                   "sounds_embedded": 4, "sounds_linked": 1, "sounds_missing": 0, "tokens_left_out": 0, "bytes": 0},
    }  # fmt: skip


def packed(text):
    """The payload in a page."""
    return json.loads(gzip.decompress(base64.b64decode(re.search(r'id="payload">([^<]*)<', text)[1])))


def harmful(content):
    """The payload with `EVIL` in everything that a run, a row or a model may write."""
    run, group = content["runs"][0], content["groups"][0]
    run["name"], run["config"]["evil" + EVIL], run["config"]["data"] = EVIL, EVIL, EVIL
    run["metrics"][0]["reward_" + EVIL], run["notes"], content["notes"] = 0.5, [EVIL], [EVIL]
    run["advice"] = [
        {"step": 1, "rule": EVIL, "text": EVIL, "link": "javascript:window.hacked=1", "help": None},
        {"step": 2, "rule": EVIL, "text": EVIL, "link": "", "help": f"{EVIL} `{EVIL}`"},
    ]
    run["evaluations"][0]["name"], run["evaluations"][0]["breakdown"][0]["value"] = EVIL, EVIL
    group.update(question=EVIL, id=EVIL, choices=[EVIL, "no"], answer=EVIL, columns={EVIL: EVIL})
    content["clips"]["clip0"]["name"] = EVIL
    group["clips"] = ["clip0"]
    group["rollouts"][0].update(
        completion=EVIL, think=EVIL, answer=EVIL, problems=[EVIL], reasons={"thinking": EVIL}, tokens=[[EVIL], [-50]],
        rewards={EVIL: 0.5, "accuracy": 1.0, "thinking": 0.1},
    )  # fmt: skip
    return content


def timed(content):
    """The payload, whose first group says when to speak: two of its four rollouts are early, one never speaks."""
    group = content["groups"][0]
    group["timing"] = {
        "kind": "pause", "seconds": 6.4, "first_chunk": 0, "hazards": [0.02 * k for k in range(40)], "turn_end": 4.0,
        "onset": None, "pauses": [[1.0, 3.0]],
        "turns": [{"channel": "user", "start": 0.5, "end": 1.0, "text": "two"},
                  {"channel": "user", "start": 3.0, "end": 4.0, "text": "five"}],
    }  # fmt: skip
    for rollout, time in zip(group["rollouts"], (1.6, 4.8, None, 1.6), strict=True):
        right = time == 4.8
        rollout.update(
            completion="no SHIFT" if time is None else f"SHIFT at {time:.2f} s", think=None, answer=None, tokens=None,
            rewards={"early_response": float(right), "turn_taking": float(right)}, total=2.0 * right, reasons={},
            time=time, speech=None if time is None else [time + 0.17, None], problems=[], stop="stop", length=10,
            flags=[] if right else ["no_answer"] if time is None else ["early_answer"],
        )  # fmt: skip
    return content
