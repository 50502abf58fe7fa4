"""Rewards of spoken replies: what is heard against the text, the blocks of text and codes, and how the voice sounds."""

import json
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from test_rewards_judge import Endpoint, judge, says, verdict
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification
from typer.testing import CliRunner

from covo_rl.config import RewardConfig
from covo_rl.models.covo_audio.pattern import SpeechPattern
from covo_rl.models.covo_audio.token2wav import Token2Wav, Token2WavConfig
from covo_rl.models.covo_audio.token2wav.configuration import FlowConfig, TransformerConfig
from covo_rl.rewards import RewardError, call, components, lint, load_reward, score
from covo_rl.rewards.cli import app
from covo_rl.rewards.columns import LazyClip, example_from_row, group_from_completions
from covo_rl.rewards.functions import FunctionReward
from covo_rl.rewards.replies import AnswerError
from covo_rl.rewards.spoken_lint import check_hearing
from covo_rl.rewards.worker import close
from covo_rl.speech import SHIPPED_TOKENIZER, replies
from covo_rl.speech.replies import AudioClassifier, ears_at, map_batches, speak_replies, voice_at
from covo_rl.synth.speech import utterance
from covo_rl.types import Clip

SPOKEN, PATTERN, EMOTION = map(load_reward, ("spoken", "pattern", "emotion"))
#: a reader of codes that anybody can check: ten codes a word, the code is the digit
DIGITS = ("zero", "one", "two", "three", "four")


class Reader:
    def transcribe(self, codes):
        if max(codes) >= len(DIGITS):
            raise ValueError(f"code {max(codes)}; there are 0 to {len(DIGITS) - 1}")
        return " ".join(DIGITS[code] for code in codes[::10])


def say(*digits):
    return [digit for digit in digits for _ in range(10)]


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.setattr(replies, "tokenizer_at", lambda folder: Reader())


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A random decoder: whatever it says, it says the same of the same codes."""
    torch.manual_seed(0)
    body = TransformerConfig(num_layers=1, hidden_size=32, ffn_hidden_size=32, num_heads=2)
    flow = FlowConfig(token_vocab_size=16, token_input_dim=16, spkr_embed_dim=8, transformer=body)
    model = Token2Wav(Token2WavConfig(flow, latent="mel", vocoder="griffin_lim"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("decoder")
    model.save_pretrained(folder)
    return str(folder)


def reasons(reward, *args, **columns):
    """(scores, why each is missing)."""
    missing = {}
    return reward(*args, log_missing=missing.__setitem__, **columns), missing


# -- spoken ------------------------------------------------------------------------------------------------------------


def test_a_reply_is_worth_the_share_of_its_words_that_are_heard(reader):
    texts = ["three two", "Three, two!", "three two", "three two", "one", "three two"]
    codes = [say(3, 2), say(3, 2), say(3), say(4, 1), say(1, 1, 1), []]
    assert SPOKEN(texts, completion_codes=codes) == [1.0, 1.0, 0.5, 0.0, 0.0, 0.0]


def test_three_codes_are_the_fewest_that_can_be_speech(reader):
    assert SPOKEN(["three"] * 4, completion_codes=[[], [3], [3, 3], [3, 3, 3]]) == [0.0, 0.0, 0.0, 1.0]


def test_none_where_no_text_says_what_to_hear_and_where_no_speech_was_asked_for(reader):
    rows = {"completion_codes": [say(3), say(3), [], say(3)], "speak": [True, None, True, False]}
    scores, missing = reasons(SPOKEN, ["", "<think> </think>", "", "three"], **rows)
    assert scores == [None, None, 0.0, None]
    assert missing == dict.fromkeys((0, 1), "the reply has no text that could be said") | {
        3: "the row asks for no speech (`speak` is false)"
    }


def test_a_recogniser_that_fails_is_none_and_costs_no_other_batch(reader, monkeypatch):
    monkeypatch.setattr(replies, "BATCH", 1)
    extras = {}
    scores, missing = reasons(
        SPOKEN, ["three", "four", "two"], completion_codes=[say(3), [9] * 10, say(2)], log_extra=extras.__setitem__
    )
    assert scores == [1.0, None, 1.0] and extras == {"spoken_reason": ["heard 'three'", "", "heard 'two'"]}
    assert missing == {1: "failed: recogniser codes: ValueError: code 9; there are 0 to 4"}


def test_tags_are_not_said_and_a_silent_thought_can_be_left_out(reader):
    text = "<think>It is four.</think><answer>three</answer>"
    column = {"completion_codes": [say(3)]}
    assert SPOKEN([text], **column) == [0.25]
    assert SPOKEN([text], **column, part="answer") == [1.0]
    with pytest.raises(ValueError, match="part 'all': there are text and answer"):
        SPOKEN([text], **column, part="all")


def test_a_function_hears_the_decoders_sound_of_each_reply(decoder):
    heard = []

    def ears(waves, rate):
        heard.extend((len(wave) / rate, wave.dtype) for wave in waves)
        return [f"{len(wave) // 960} codes" for wave in waves]

    texts = ["nine codes", "4 codes", "7 codes"]
    columns = {"completion_codes": [[1] * 9, [2, 3, 2, 3], [4] * 7], "recogniser": ears, "decoder_folder": decoder}
    assert SPOKEN(texts, **columns) == [0.5, 1.0, 1.0]
    assert heard == [(0.16, np.float32), (0.28, np.float32), (0.36, np.float32)], "shortest first"
    for answer, why in ((None, "the recogniser gave None, not text"), (7, "the recogniser gave 7, not text")):
        scores, missing = reasons(SPOKEN, texts, **columns | {"recogniser": lambda waves, rate, a=answer: [a] * 3})
        assert scores == [None] * 3 and set(missing.values()) == {f"failed: {why}"}
    scores, missing = reasons(SPOKEN, texts, **columns | {"recogniser": lambda waves, rate: ["one"]})
    assert scores == [None] * 3 and "1 results for 3 replies" in missing[0]


def test_a_wave_is_the_same_in_any_batch(decoder):
    rows = [[5] * 4, [6, 7, 8, 9, 10], [11] * 9]
    voice = voice_at(decoder)
    for codes, wave in zip(rows, speak_replies(rows, voice), strict=True):
        (alone,) = speak_replies([codes], voice)
        assert wave.shape == (960 * len(codes),) and np.abs(wave - alone).max() < 1e-4
        assert np.abs(alone).max() > 1e-3


def test_replies_go_in_batches_of_like_lengths_and_come_back_in_order():
    sizes = []

    def lengths(batch):
        sizes.append([len(codes) for codes in batch])
        return sizes[-1]

    rows = [[0] * n for n in (9, 3, 20, 5, 4, 30, 7, 8, 6, 10, 3)]
    assert map_batches(lengths, rows, "lengths") == [len(row) for row in rows]
    assert sizes == [[3, 3, 4, 5, 6, 7, 8, 9], [10, 20, 30]]


def test_what_a_step_has_no_time_for_is_an_error_not_a_zero(monkeypatch):
    monkeypatch.setattr(replies, "BATCH", 1)
    monkeypatch.setattr(call, "_limits", threading.local())
    call._limits.until = time.monotonic() + 0.15

    def slow(batch):
        time.sleep(0.1)
        return ["heard"]

    first, second = map_batches(slow, [[0]] * 2, "slow")
    assert first == "heard" and isinstance(second, AnswerError) and str(second) == "slow: no time left in this step"


# -- pattern -----------------------------------------------------------------------------------------------------------


def ids_of(*blocks, end=True):
    """(ids, codes) of blocks (text ids, codes): text from 1 on, code 0 is id 100."""
    ids, codes = [], []
    for text, count in blocks:
        new = [(len(codes) + i) % 50 for i in range(count)]
        ids += [1 + i for i in range(text)] + [100 + code for code in new]
        codes += new
    return ids + [0] * end, codes


@pytest.mark.parametrize(
    ("blocks", "worth"),
    [
        ([(5, 15), (5, 15), (2, 25)], 1.0), ([(5, 15), (4, 15), (2, 25)], 2 / 3), ([(5, 15)], 1.0), ([(5, 40)], 1.0),
        ([(3, 9)], 1.0), ([(5, 14), (5, 16)], 0.5), ([(6, 15)], 0.0), ([(0, 20)], 0.0), ([(0, 15), (5, 15)], 0.5),
        ([(5, 15), (3, 0)], 0.5), ([(9, 0)], 0.0), ([(5, 2)], 0.0),
    ],
)  # fmt: skip
def test_a_block_is_five_and_fifteen_and_the_last_what_remains(blocks, worth):
    ids, codes = ids_of(*blocks)
    assert PATTERN(["x"], completion_ids=[ids], completion_codes=[codes], stop_reason=["stop"]) == [worth]


def test_the_length_limit_may_cut_anywhere():
    for blocks, worth in (([(5, 15), (3, 0)], 1.0), ([(5, 15), (5, 7)], 1.0), ([(5, 15), (6, 0)], 0.5)):
        ids, codes = ids_of(*blocks, end=False)
        assert PATTERN(["x"], completion_ids=[ids], completion_codes=[codes], stop_reason=["length"]) == [worth]


def test_whatever_the_logits_processor_allows_keeps_the_pattern():
    processor, generator = SpeechPattern("3:4", 10, 8, [0]), torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = [1]
        while ids[-1]:
            scores = torch.randn(1, 18, generator=generator)
            scores[0, 0] += 1
            ids.append(int(processor(torch.tensor([ids]), scores)[0].argmax()))
        codes = [i - 10 for i in ids if i >= 10]
        row = {"completion_ids": [ids], "completion_codes": [codes], "stop_reason": ["stop"]}
        assert PATTERN(["x"], **row, block="3:4") == [1.0 if len(codes) > 2 else 0.0]


def test_blocks_of_other_sizes_and_codes_that_are_not_the_ids_own():
    ids, codes = ids_of((2, 3), (1, 4))
    row = {"completion_ids": [ids], "completion_codes": [codes]}
    assert PATTERN(["x"], **row, block="2:3") == [1.0] and PATTERN(["x"], **row) == [0.5]
    with pytest.raises(ValueError, match="write TEXT:CODES"):
        PATTERN(["x"], **row, block="5")
    array = {"completion_ids": [np.array(ids)], "completion_codes": [np.array(codes)]}
    assert PATTERN(["x"], **array, block="2:3") == [1.0]
    for other in (codes[::-1], [*codes, 0]):
        with pytest.raises(ValueError, match=f"these 11 do not hold the reply's {len(other)} codes"):
            PATTERN(["x"], completion_ids=[ids], completion_codes=[other])
    with pytest.raises(ValueError, match="these 0 do not hold"):  # of `covo-rl rewards try`, which has no ids
        PATTERN(["x"], completion_ids=[[]], completion_codes=[codes])


# -- emotion -----------------------------------------------------------------------------------------------------------


def calm(waves, rate):
    """Longer is calmer."""
    assert rate == 24_000
    return [{"Calm": (p := min(len(wave) / 9600, 1.0)), "sad": 1 - p} for wave in waves]


def test_the_score_is_the_probability_of_the_rows_emotion(decoder):
    columns = {"completion_codes": [[1] * 5, [1] * 8, [], [2] * 10], "emotion": ["calm", "blue", "calm", "calm"],
               "scorer_model": calm, "decoder_folder": decoder, "scorer_labels": {"blue": "sad"}}  # fmt: skip
    extras = {}
    assert EMOTION([""] * 4, **columns, log_extra=extras.__setitem__) == pytest.approx([0.5, 0.2, 0.0, 1.0])
    assert extras == {"emotion_reason": ["Calm 0.50", "Calm 0.80", "", "Calm 1.00"]}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"emotion": ["happy"]},
            "failed: the scorer has no label 'happy', but Calm, sad; say which by emotion(scorer_",
        ),
        ({"emotion": [None]}, "the row names no `emotion`"),
        ({"speak": [False]}, "the row asks for no speech"),
        ({"scorer_model": None}, "nobody hears it: there is no scorer_model, and no judge with judge_audio"),
        ({"scorer_model": lambda waves, rate: 1 / 0}, "failed: scorer: ZeroDivisionError"),
        ({"scorer_model": lambda waves, rate: ["calm"]}, "failed: the scorer gave calm, not {label: probability}"),
        ({"scorer_model": lambda waves, rate: [{"calm": 1.5}]}, "failed: the scorer gave {'calm': 1.5}, not"),
        ({"scorer_model": lambda waves, rate: [{"calm": float("nan")}]}, "failed: the scorer gave {'calm': nan}, not"),
    ],
)
def test_what_cannot_be_heard_is_none_with_the_reason(decoder, change, why):
    columns = {"completion_codes": [[1] * 5], "emotion": ["calm"], "scorer_model": calm, "decoder_folder": decoder}
    scores, missing = reasons(EMOTION, ["x"], **columns | change)
    assert scores == [None] and missing[0].startswith(why)


@pytest.fixture(scope="module", params=[True, False], ids=["mask", "no mask"])
def classifier(request, tmp_path_factory):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[16, 16],
        conv_kernel=[10, 8], conv_stride=[8, 8], num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer" if request.param else "group",
        classifier_proj_size=8, id2label={0: "neutral", 1: "sad"}, label2id={"neutral": 0, "sad": 1},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("classifier")
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=request.param, do_normalize=True).save_pretrained(folder)
    return folder


def test_a_checkpoint_classifies_a_wave_as_it_would_alone(classifier):
    ears = ears_at(str(classifier))
    waves = [np.random.default_rng(i).normal(size=n).astype(np.float32) for i, n in enumerate((4800, 9600, 2400))]
    together = ears(waves, 24_000)
    for wave, result in zip(waves, together, strict=True):
        assert set(result) == {"neutral", "sad"} and sum(result.values()) == pytest.approx(1)
        assert result == pytest.approx(ears([wave], 24_000)[0], abs=1e-5)
    assert ears_at(str(classifier)) is ears, "loaded once"


def test_a_checkpoint_is_who_hears_the_voice(classifier, decoder):
    columns = {"completion_codes": [[1] * 25, [2, 3] * 10, []], "emotion": ["sad", "Neutral", "sad"],
               "scorer_model": str(classifier), "decoder_folder": decoder}  # fmt: skip
    scores, missing = reasons(EMOTION, [""] * 3, **columns)
    heard = [ears_at(str(classifier))(speak_replies([codes], voice_at(decoder)), 24_000)[0]
             for codes in columns["completion_codes"][:2]]  # fmt: skip
    assert not missing and scores == pytest.approx([heard[0]["sad"], heard[1]["neutral"], 0.0], abs=1e-4)
    scores, missing = reasons(EMOTION, [""] * 3, **columns | {"emotion": ["happy"] * 3})
    assert scores == [None, None, 0.0] and "the scorer has no label 'happy', but neutral, sad" in missing[0]


def test_a_checkpoint_whose_labels_have_no_names_is_refused(classifier, tmp_path):
    for file in classifier.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((classifier / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}))
    with pytest.raises(RewardError, match="its labels are LABEL_0, LABEL_1"):
        AudioClassifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"problem_type": "regression"}))
    with pytest.raises(RewardError, match="a model for regression gives no distribution"):
        AudioClassifier(tmp_path)
    with pytest.raises(RewardError, match=r"'nowhere' hears nothing: it is no folder .* and no module:function"):
        ears_at("nowhere")


@pytest.fixture
def endpoint():
    server = Endpoint(lambda content: says(verdict(content if isinstance(content, str) else content[-1]["text"])))
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_a_judge_hears_what_was_asked_and_then_the_reply(endpoint, decoder, tmp_path):
    question = Clip(array=np.full(16_000, 0.1, np.float32), sampling_rate=16_000)
    columns = {"completion_codes": [[1] * 10, [1] * 10, []], "question": ["How are you?"] * 3,
               "emotion": ["calm", None, "calm"], "clips": [[LazyClip(question)], [], []],
               "decoder_folder": decoder}  # fmt: skip
    extras = {}
    the_judge = pickle.loads(pickle.dumps(judge(endpoint.url, hears=True)))  # as it gets into the worker
    texts = ["I am so sorry."] * 3
    assert EMOTION(texts, **columns, judge=the_judge, log_extra=extras.__setitem__) == [1.0, 1.0, 0.0]
    assert extras["emotion_reason"] == ["because", "because", ""]
    asked = sorted((body["messages"][0]["content"] for _, body in endpoint.requests), key=len)
    assert [[part["type"] for part in content] for content in asked] == [
        ["input_audio", "text"], ["input_audio", "input_audio", "text"]
    ]  # fmt: skip
    assert "whatever fits" in asked[0][-1]["text"].partition("WANTED\n")[2]
    assert "calm" in asked[1][-1]["text"].partition("WANTED\n")[2] and "I am so sorry." in asked[1][-1]["text"]
    *_, reply = (len(part["input_audio"]["data"]) for part in asked[1][:-1])
    assert reply == pytest.approx(10 * 640 * 2 * 4 / 3, abs=100), "0.4 s at 16 kHz, two bytes a sample, in base64"
    assert "whatever fits" not in asked[1][-1]["text"].partition("WANTED\n")[2]
    deaf = judge(endpoint.url)
    assert EMOTION(texts, **columns, judge=deaf) == [None, None, 0.0]


# -- in a run ----------------------------------------------------------------------------------------------------------

EARS = """
import os

def scorer(waves, rate):
    with open(__file__ + ".pids", "a") as pids:
        pids.write(f"{os.getpid()} {len(waves)}\\n")
    return [{"calm": 0.75, "sad": 0.25} for _ in waves]

def pays_for_silence(completions, completion_codes, **columns):
    return [1.0 - 0.5 * bool(codes) for codes in completion_codes]
"""


@pytest.fixture(scope="module")
def ears(tmp_path_factory):
    file = tmp_path_factory.mktemp("ears") / "ears.py"
    file.write_text(EARS)
    yield file
    close()


def test_what_hears_runs_in_a_worker_process_and_is_asked_before_a_run(ears, decoder):
    spec = f"emotion(decoder_folder={decoder!r})"
    config = RewardConfig(rewards=spec, scorer_model=f"{ears}:scorer")
    row = {"question": "?", "emotion": "calm"}
    assert lint(config, [example_from_row(row)]) == []
    assert [str(finding) for finding in lint(config, [example_from_row({"id": "r", "question": "?"})])] == [
        f"reward {spec}: gold: row r is not gradeable: the row names no `emotion`"
    ]
    (finding,) = lint(config, [example_from_row({**row, "emotion": "happy"})])
    assert finding.check == "hearing" and "the scorer has no label 'happy', but calm, sad" in finding.what
    groups = [group_from_completions(example_from_row(row), ["x"], completion_codes=codes) for codes in ([1] * 5, [])]
    table = score(groups, config)
    assert table.rewards_PGR[:, 0, 0].tolist() == [0.75, 0.0] and table.extras["emotion_reason"] == ["calm 0.75", ""]
    pids = {line.split()[0] for line in (ears.parent / "ears.py.pids").read_text().splitlines()}
    assert len(pids) == 1 and str(os.getpid()) not in pids
    live = FunctionReward(SPOKEN.function)
    assert live.in_thread and PATTERN.in_thread and not SPOKEN.in_thread and not EMOTION.in_thread


def test_a_reward_that_pays_for_silence_is_found(ears):
    (finding,) = lint([f"{ears}:pays_for_silence"])
    assert finding.check == "junk" and finding.what == "nothing at all scores 1, expected 0"
    assert lint("pattern", full=True) == []


def test_a_model_that_writes_text_alone_is_not_heard():
    terms = components("accuracy,pattern")
    check_hearing(terms, 16)
    check_hearing(terms[:1], 0)
    with pytest.raises(RewardError, match="pattern: hears the audio codes of a reply, and replies of this model hold"):
        check_hearing(terms, 0)


def test_a_model_of_more_codes_than_the_tokenizer_reads_is_refused():
    """In this process: a reward's worker would only load the same tokenizer."""
    terms, row = components({SPOKEN.function: 1.0}), [example_from_row({"question": "?"})]
    check_hearing(terms, 256, row)
    with pytest.raises(
        RewardError, match=r"does not hear all 257 audio codes .* code 256 at position 0; there are 0 to"
    ):
        check_hearing(terms, 257, row)


def test_the_command_line_takes_codes(tmp_path):
    np.save(tmp_path / "reply.npy", np.arange(2, dtype=np.int16))
    for codes in ("0,1", str(tmp_path / "reply.npy")):
        words = ["try", "pattern", "--completion", "three", "--codes", codes]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0 and "pattern: 0 " in result.output, result.output
    np.save(tmp_path / "odd.npy", np.zeros((2, 2)))
    for codes, why in (("1;2", "invalid literal"), (str(tmp_path / "odd.npy"), "holds float64 of shape (2, 2)"),
                       (str(tmp_path / "no.npy"), "No such file")):  # fmt: skip
        result = CliRunner().invoke(app, ["try", "pattern", "--completion", "three", "--codes", codes])
        assert result.exit_code == 2 and why in " ".join(result.output.split())


# -- with the shipped tokenizer ----------------------------------------------------------------------------------------


def test_gold_is_heard_and_another_replys_codes_are_not():
    tokenizer = replies.tokenizer_at(SHIPPED_TOKENIZER)
    said = [utterance("test", index) for index in range(12)]
    texts = [one.text for one in said]
    gold = [codes.tolist() for codes in tokenizer.encode([one.wave for one in said])]
    assert np.mean(SPOKEN(texts, completion_codes=gold)) >= 0.95
    assert np.mean(SPOKEN(texts, completion_codes=gold[1:] + gold[:1])) < 0.5
    shuffled = [np.random.default_rng(0).permutation(codes).tolist() for codes in gold]
    assert np.mean(SPOKEN(texts, completion_codes=shuffled)) < 0.35
    assert SPOKEN(texts, completion_codes=[[]] * 12) == [0.0] * 12
    scores, missing = reasons(SPOKEN, texts[:1], completion_codes=[[300] * 5])
    assert scores == [None] and missing[0].startswith("failed: recogniser codes: CodeError: row 0: code 300")


def test_the_shipped_decoder_is_heard_to_say_its_codes():
    tokenizer = replies.tokenizer_at(SHIPPED_TOKENIZER)
    said = [utterance("test", index) for index in range(2)]
    codes = [codes.tolist() for codes in tokenizer.encode([one.wave for one in said])]
    scores = SPOKEN([one.text for one in said], completion_codes=codes, recogniser="wave")
    assert np.mean(scores) >= 0.7
    others = SPOKEN([one.text for one in said], completion_codes=codes[1:] + codes[:1], recogniser="wave")
    assert np.mean(others) < 0.5


def test_rows_of_speech_deserve_full_marks_for_their_own_codes():
    tokenizer = replies.tokenizer_at(SHIPPED_TOKENIZER)
    said = [utterance("test", index) for index in range(8)]
    codes = [codes.tolist() for codes in tokenizer.encode([one.wave for one in said])]
    scores = SPOKEN([one.text for one in said], completion_codes=codes)
    rows = [{"id": one.text, "text": one.text, "codes": row} for one, row in zip(said, codes, strict=True)]
    rows = [row for row, score in zip(rows, scores, strict=True) if score == 1][:2]
    assert lint({SPOKEN.function: 1.0}, list(map(example_from_row, rows)), full=True) == []
    rows[0]["text"] += " one"
    (finding,) = lint({SPOKEN.function: 1.0}, list(map(example_from_row, rows)), full=True)
    assert finding.check == "gold" and f"row {rows[0]['id']} with its own codes scores" in finding.what
