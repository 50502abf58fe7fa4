"""Dialogues of several rounds with `--model`: each round sees what was asked and replied before it."""

import json
import sys

import numpy as np
import pytest
from speaking_cases import speaking_model
from speech_layouts import write_layout, write_lines

from covo_rl.audio import ClipStore
from covo_rl.config import PromptConfig
from covo_rl.data.files import read_record
from covo_rl.evaluate.evaluation import run_request
from covo_rl.evaluate.runner import Request
from covo_rl.models.covo_audio.conversation import Conversation
from covo_rl.models.covo_audio.family import CovoAudio
from covo_rl.prompt import SAID, PromptError, build_prompt, messages
from covo_rl.types import Clip, Example

TRANSCRIBER = (
    'import json, sys\nfor row in map(json.loads, sys.stdin): print(json.dumps({"id": row["id"], "text": "?"}))'
)
#: says how many replies it has been told of, and notes what it was asked
LLM = """
import json, sys
for row in map(json.loads, sys.stdin):
    print(json.dumps({"id": row["id"], "text": f"reply {row['prompt'].count('Assistant: ')}"}))
    print(json.dumps(row["prompt"]), file=open(sys.argv[1], "a"))
"""
PLAIN = PromptConfig(instruction="", written_question=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COVO_RL_CACHE", str(tmp_path / "cache"))


def test_a_cascade_is_told_what_was_said_in_the_rounds_before(tmp_path):
    data = write_layout("uro-bench", tmp_path / "data")
    for name, program in (("hear", TRANSCRIBER), ("llm", LLM)):
        (tmp_path / f"{name}.py").write_text(program)
    (tmp_path / "cascade.yaml").write_text(
        f"transcriber: 'command:{sys.executable} {tmp_path}/hear.py'\n"
        f"llm: 'command:{sys.executable} {tmp_path}/llm.py {tmp_path}/asked.jsonl'\nsystem: Be brief.\n"
    )
    votes = [{"id": f"MtBenchEval-en/d1{part}", "text": ["4", "4", "4"]} for part in ("", "#2")]
    judge = f"file:{write_lines(tmp_path / 'votes.jsonl', [*votes, {'id': 'AlpacaEval/a1', 'text': ['5', '5', '5']}])}"
    request = Request(set_="uro-bench", data=data, model=f"cascade:{tmp_path / 'cascade.yaml'}", judge=judge,
                      subset=["MtBenchEval-en", "AlpacaEval"], output=tmp_path / "out")  # fmt: skip
    run_request(request, quiet=True)
    report = read_record(tmp_path / "out/report.json")
    assert {name: block["score"] for name, block in report["subsets"].items()} == {
        "AlpacaEval": 100,
        "MtBenchEval-en": 80,
    }
    assert not any("not asked" in problem for problem in report["problems"])
    scores = {row["id"]: row for row in map(json.loads, (tmp_path / "out/scores.jsonl").read_text().splitlines())}
    assert scores["MtBenchEval-en/d1"]["said"] == ["reply 0", "reply 1"]
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert sorted(set(asked)) == [  # the first of both are equal
        "Be brief.\n\n?", "Be brief.\n\nUser: ?\n\nAssistant: reply 0\n\nUser: ?\n\nAssistant:",
    ]  # fmt: skip


def test_a_spoken_reply_stands_in_the_next_prompt_as_it_was_sampled():
    model, processor = speaking_model()
    family, clips = CovoAudio(model.eval(), processor), ClipStore()
    wave = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    chat = Conversation(model, processor, max_new_tokens=12, do_sample=False)
    sound = {"type": "audio", "audio": wave, "sampling_rate": 16_000}
    reply = chat.turn([sound, {"type": "text", "text": "What is this?"}])
    assert reply.codes, "or the test shows nothing"
    after = chat.turn([sound, {"type": "text", "text": "Louder?"}])
    clip = Clip(array=wave, sampling_rate=16_000)
    first = Example("d", (clip,), "What is this?")
    said = {"role": "assistant", "content": [{"type": "text", "text": reply.text}], "ids": reply.ids}
    second = Example("d#2", (clip, clip), "Louder?", history=(*messages(first, PLAIN), said))
    prompt = build_prompt(second, family, clips, PLAIN)
    assert list(prompt.input_ids) == chat.history[: -len(after.ids)]
    assert "ids" not in prompt.messages[1] and prompt.text.count("<|im_start|>") == 4
    with pytest.raises(PromptError, match="row d#2: the chat template writes 2 of 1 earlier replies"):
        build_prompt(Example("d#2", (clip, clip), SAID, history=second.history), family, clips, PLAIN)


def test_a_written_history_is_what_the_chat_template_makes_of_it():
    model, processor = speaking_model()
    family = CovoAudio(model.eval(), processor)
    said = {"role": "assistant", "content": [{"type": "text", "text": "No audio."}]}
    row = Example("d", (), "Louder?", history=(*messages(Example("d", (), "What is this?"), PLAIN), said))
    assert build_prompt(row, family, ClipStore(), PLAIN).text == (
        "<|im_start|>user\nWhat is this?<|im_end|>\n<|im_start|>assistant\nNo audio.<|im_end|>\n"
        "<|im_start|>user\nLouder?<|im_end|>\n<|im_start|>assistant\n"
    )
