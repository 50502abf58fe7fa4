"""What may follow in a spoken answer: against a state machine that reads ids one by one, and inside `generate`."""

import pytest
import torch

from covo_rl.models.covo_audio.pattern import SpeechPattern
from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer

FIRST, CODES, END = 20, 10, 3  # ids 20..29 are codes
CLIP = "<|begofcAUDIO|><|cAUDIO|><|endofcAUDIO|>"


def allowed_ids(answer, text=5, codes=15):
    """One id after the other: how many of the block were read, is the text over, was the last one a code."""
    texts = spoken = 0
    over = last_is_code = False
    for i in answer:
        last_is_code = i >= FIRST
        if over:
            continue
        if last_is_code and texts < text:
            over = True
        elif last_is_code:
            spoken += 1
            if spoken == codes:
                texts = spoken = 0
        else:
            texts += 1
    ids = set(range(FIRST, FIRST + CODES))
    if not over and texts < text:
        ids |= set(range(FIRST))
    return ids | {END} if last_is_code else ids - {END}


def left_open(processor, ids):
    scores = processor(torch.tensor(ids), torch.zeros(len(ids), FIRST + CODES))
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in scores]


def answers(count, length, seed=0, text=5, codes=15):
    """Answers that the state machine allows, drawn evenly from text, codes and end."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        row = []
        while len(row) < length:
            kinds = allowed_ids(row, text, codes) - {END}
            pick = [i for i in kinds if i < FIRST] or sorted(kinds)
            if len(pick) < len(kinds) and torch.rand((), generator=generator) < 0.05:
                pick = sorted(kinds - set(pick))
            row.append(pick[int(torch.randint(len(pick), (), generator=generator))])
        rows.append(row)
    return rows


@pytest.mark.parametrize(("pattern", "text", "codes"), [("5:15", 5, 15), ("1:4", 1, 4)])
def test_the_pattern_is_the_state_machine_at_every_place(pattern, text, codes):
    rows = answers(12, 48, text=text, codes=codes)
    processor = SpeechPattern(pattern, FIRST, CODES, [END])
    over = 0
    for length in range(48):
        part = [row[:length] for row in rows]
        expected = [allowed_ids(row, text, codes) for row in part]
        assert left_open(processor, part) == expected
        over += sum(not ids & set(range(END)) for ids in expected)
        assert left_open(processor, part[3:4]) == expected[3:4]  # a row does not depend on the others
    assert 0 < over < 12 * 48


def test_an_answer_word_by_word():
    processor = SpeechPattern("2:3", FIRST, CODES, [END], prompt_length=4)
    codes, text = set(range(FIRST, FIRST + CODES)), set(range(FIRST)) - {END}
    for answer, expected in (
        ([], text | codes),  # neither an end before anything is said
        ([1], text | codes),  # nor text that is not spoken
        ([1, 2], codes),
        ([1, 2, 20], codes | {END}),
        ([1, 2, 20, 21, 22], text | codes | {END}),
        ([1, 2, 20, 21, 22, 4], text | codes),
        ([1, 2, 20, 21, 22, 4, 23], codes | {END}),  # the text was over before its second id
        ([1, 2, 20, 21, 22, 4, 23, 24, 25, 26, 27], codes | {END}),
        ([20, 21], codes | {END}),
    ):
        assert left_open(processor, [[20, 20, 1, 20, *answer]]) == [expected], answer


def test_text_alone_forbids_codes_and_keeps_scores():
    scores = torch.randn(2, FIRST + CODES)
    out = SpeechPattern("a2t", FIRST, CODES, [END])(torch.tensor([[1], [20]]), scores)
    assert torch.equal(out[:, :FIRST], scores[:, :FIRST]) and (out[:, FIRST:] == -torch.inf).all()


@pytest.fixture(scope="module")
def tiny():
    tokenizer = tiny_tokenizer(["What is this? or No audio."] * 3, 320)
    sizes = {"encoder_width": 32, "decoder_width": 48, "decoder_layers": 2, "adapter_hidden": 32}
    return tiny_covo_audio(tokenizer, **sizes, audio_codes=40, initializer_range=0.2)


def generated(tiny, texts, **options):
    model, processor = tiny
    inputs = processor(text=texts)
    torch.manual_seed(0)
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def test_generated_answers_keep_the_pattern(tiny):
    """Rows of a padded batch; sampled and by beams, whose rows change places."""
    first = tiny[0].config.audio_token_index
    for options in ({"do_sample": True}, {"do_sample": False, "num_beams": 3}):
        ids = generated(tiny, ["No audio.", "or"], pattern="5:15", max_new_tokens=45, eos_token_id=[-1], **options)
        codes = (ids >= first).tolist()
        for row in codes:
            begin = next(i for i in range(46) if i == 45 or row[i] != (i % 20 >= 5))
            assert all(row[begin:])
    free = generated(tiny, ["No audio.", "or"], do_sample=True, max_new_tokens=45, eos_token_id=[-1])
    assert any((row[:5] >= first).any() and (row[5:] < first).any() for row in free)


def test_an_answer_ends_after_speech_alone(tiny):
    """With the end tokens made likely, an answer still has to say something first."""
    model, _ = tiny
    ends = model.config.turn_end_token_id, model.config.text_end_token_id

    def likely(ids, scores):
        scores[:, list(ends)] += 50
        return scores

    options = {"logits_processor": [likely], "do_sample": False, "max_new_tokens": 30, "repetition_penalty": 1.05}
    (ids,) = generated(tiny, ["or"], pattern="5:15", **options)
    assert ids[-1] == ends[0] and ids[-2] >= model.config.audio_token_index
    (silent,) = generated(tiny, ["or"], pattern="a2t", **options)
    assert len(silent) == 1 and silent[0] in ends


def test_speech_off_wins_over_a_pattern(tiny):
    first = tiny[0].config.audio_token_index
    for options in ({"pattern": "a2t"}, {"pattern": "5:15", "stop_mode": "a2t"}):
        ids = generated(tiny, ["or"], do_sample=True, max_new_tokens=40, eos_token_id=[-1], **options)
        assert (ids < first).all()


@pytest.mark.parametrize("pattern", ["5", "5:0", "0:15", "5:15:2", "a2ta", "5:-1", ""])
def test_patterns_that_do_not_exist_are_refused(tiny, pattern):
    with pytest.raises(ValueError, match="write TEXT:CODES, the ids of each in a block, such as 5:15, or a2t"):
        generated(tiny, ["or"], pattern=pattern, max_new_tokens=2)
    with pytest.raises(ValueError, match="write TEXT:CODES"):
        generated(tiny, ["or"], pattern=pattern, stop_mode="a2t", max_new_tokens=2)


def test_a_model_without_codes_has_no_pattern():
    with pytest.raises(ValueError, match="this model has no audio codes; write a2t or leave it out"):
        SpeechPattern("5:15", FIRST, 0, [END])
