"""Generation: batches, several sequences per prompt, beams, stop modes, penalties, several turns over one cache."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from covo_rl.models.covo_audio.conversation import Conversation
from covo_rl.models.tiny import tiny_covo_audio, tiny_tokenizer

CLIP = "<|begofcAUDIO|><|cAUDIO|><|endofcAUDIO|>"
RNG = np.random.default_rng(1)
SHORT, LONG = (RNG.normal(0, 0.1, n).astype(np.float32) for n in (9_600, 24_000 * 7))
ROWS = [(f"{CLIP}What is this?", [SHORT]), (f"{CLIP}or{CLIP}", [LONG, SHORT]), ("No audio.", [])]
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def tiny():
    tokenizer = tiny_tokenizer([text for text, _ in ROWS] * 3, 320)
    return tiny_covo_audio(
        tokenizer,
        encoder_width=32,
        decoder_width=48,
        decoder_layers=2,
        adapter_hidden=32,
        audio_codes=40,
        initializer_range=0.2,
    )


def inputs_of(processor, rows=ROWS):
    clips = [clip for _, own in rows for clip in own]
    return processor(text=[text for text, _ in rows], audio=clips or None, sampling_rate=24000)


def completions(model, inputs, **options):
    out = model.generate(**inputs, **options)
    return out[:, inputs["input_ids"].shape[1] :]


def slow_greedy(model, inputs, steps):
    """No cache, no generate: the whole sequence again at every step."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    audio = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    for _ in range(steps):
        with torch.no_grad():
            best = model(input_ids=ids, attention_mask=mask, **audio).logits[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
    return ids[:, inputs["input_ids"].shape[1] :]


def test_greedy_equals_recomputing_everything_at_every_step(tiny):
    model, processor = tiny
    inputs = inputs_of(processor)
    got = completions(model, inputs, **GREEDY, eos_token_id=[-1])
    assert torch.equal(got, slow_greedy(model, inputs, 8))
    without_cache = completions(model, inputs, **GREEDY, eos_token_id=[-1], use_cache=False)
    assert torch.equal(got, without_cache)


def test_batched_generation_equals_one_row_at_a_time(tiny):
    model, processor = tiny
    together = completions(model, inputs_of(processor), **GREEDY, eos_token_id=[-1])
    for row, got in zip(ROWS, together, strict=True):
        assert torch.equal(completions(model, inputs_of(processor, [row]), **GREEDY, eos_token_id=[-1])[0], got)


def test_num_return_sequences_equals_repeated_rows(tiny):
    """Row 1 has two clips and four segments: repeating segments by row would shift every clip after it."""
    model, processor = tiny
    options = {"do_sample": True, "max_new_tokens": 8, "top_k": 0, "eos_token_id": [-1]}
    torch.manual_seed(0)
    expanded = completions(model, inputs_of(processor), num_return_sequences=3, **options)
    torch.manual_seed(0)
    repeated = completions(model, inputs_of(processor, [row for row in ROWS for _ in range(3)]), **options)
    assert torch.equal(expanded, repeated)
    assert len({tuple(row.tolist()) for row in expanded}) > 3


def test_sequences_of_one_prompt_are_encoded_once(tiny):
    model, processor = tiny
    seen = []
    handle = model.encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    model.generate(**inputs_of(processor), num_return_sequences=4, do_sample=True, max_new_tokens=5)
    handle.remove()
    assert seen == [4]  # SHORT and the three segments of LONG


def test_beams_of_a_batch_equal_beams_of_each_row(tiny):
    model, processor = tiny
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 6, "eos_token_id": [-1]}
    together = completions(model, inputs_of(processor), **options).view(len(ROWS), 2, -1)
    for row, got in zip(ROWS, together, strict=True):
        assert torch.equal(completions(model, inputs_of(processor, [row]), **options), got)


def test_beam_scores_are_the_log_probs_of_their_sequences(tiny):
    model, processor = tiny
    inputs = inputs_of(processor, ROWS[1:2])
    out = model.generate(
        **inputs,
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=5,
        length_penalty=0.0,
        eos_token_id=[-1],
        output_scores=True,
        return_dict_in_generate=True,
        do_sample=False,
    )
    prompt = inputs["input_ids"].shape[1]
    for ids, score in zip(out.sequences, out.sequences_scores, strict=True):
        audio = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logps = model(input_ids=ids[None], **audio).logits.log_softmax(-1)
        want = logps[0, prompt - 1 : -1].gather(1, ids[prompt:, None]).sum()
        assert score.item() == pytest.approx(want.item(), abs=1e-4)


def test_both_stop_modes_and_an_explicit_end(tiny):
    model, processor = tiny
    inputs = inputs_of(processor, ROWS[:1])
    config = model.config
    first = completions(model, inputs, **GREEDY, eos_token_id=[-1])[0, 2].item()
    ends = {"turn_end_token_id": config.turn_end_token_id, "text_end_token_id": config.text_end_token_id}
    try:
        for mode, name in (("a2ta", "turn_end_token_id"), ("a2t", "text_end_token_id")):
            setattr(config, name, first)
            assert completions(model, inputs, **GREEDY, stop_mode=mode)[0].tolist()[-1] == first
            setattr(config, name, ends[name])
    finally:
        for name, value in ends.items():
            setattr(config, name, value)
    assert completions(model, inputs, **GREEDY, eos_token_id=first)[0].tolist()[-1] == first
    with pytest.raises(ValueError, match="stop_mode='speech' does not exist; write one of a2ta, a2t"):
        model.generate(**inputs, stop_mode="speech")


def test_window_penalty_acts_inside_sampling(tiny):
    model, processor = tiny
    inputs = inputs_of(processor, ROWS[:1])
    plain = completions(model, inputs, do_sample=False, max_new_tokens=30, eos_token_id=[-1])[0]
    far = completions(
        model, inputs, do_sample=False, max_new_tokens=30, eos_token_id=[-1], window_penalty=1e6, window_size=8
    )[0]
    assert len(set(plain.tolist())) < 30
    for i in range(8, 30):
        assert far[i] not in far[i - 8 : i]


def test_second_turn_over_the_cache_equals_one_forward_over_everything(tiny):
    """With the end token kept, turn 2 is conditioned on exactly the ids of the whole dialogue."""
    model, processor = tiny
    chat = Conversation(model, processor, system="Listen.", **GREEDY)
    first = chat.turn([{"type": "audio", "audio": LONG, "sampling_rate": 24000}])
    before = len(chat.history)
    assert chat.cache.get_seq_length() == before - 1
    second = chat.turn([{"type": "audio", "audio": SHORT}, {"type": "text", "text": "or"}], sampling_rate=24000)

    end = model.config.turn_end_token_id
    assert first.ids[-1] != end  # cut by length here, so the turn is closed before the next begins
    first_turn = processor.apply_chat_template(
        [
            {"role": "system", "content": "Listen."},
            {"role": "user", "content": [{"type": "audio"}]},
        ],
        add_generation_prompt=True,
    )
    second_turn = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "or"}]}], add_generation_prompt=True
    )
    one = processor(text=first_turn, audio=[LONG], sampling_rate=24000)
    two = processor(text="\n" + second_turn, audio=[SHORT], sampling_rate=24000)
    both = processor(text=first_turn + second_turn, audio=[LONG, SHORT], sampling_rate=24000)
    ids = torch.cat([one["input_ids"], torch.tensor([[*first.ids, end]]), two["input_ids"]], 1)
    inputs = {**both, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert chat.history == [*ids[0].tolist(), *second.ids]
    assert slow_greedy(model, inputs, 8)[0].tolist() == list(second.ids)


def test_published_turns_drop_the_last_id(tiny):
    model, processor = tiny
    chat = Conversation(model, processor, keep_end_token=False, **GREEDY)
    first = chat.turn("No audio.")
    second = chat.turn("No audio.")
    one, two = (
        processor.tokenizer(text)["input_ids"]
        for text in (
            "<|im_start|>user\nNo audio.<|im_end|>\n<|im_start|>assistant\n",
            "\n<|im_start|>user\nNo audio.<|im_end|>\n<|im_start|>assistant\n",
        )
    )
    ids = torch.tensor([[*one, *first.ids[:-1], *two]])
    assert chat.history == [*ids[0].tolist(), *second.ids]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert slow_greedy(model, inputs, 8)[0].tolist() == list(second.ids)


def test_an_answer_is_split_into_text_and_codes(tiny):
    model, processor = tiny
    answer = Conversation(model, processor, do_sample=True, max_new_tokens=40, eos_token_id=[-1])
    torch.manual_seed(0)
    turn = answer.turn("No audio.")
    first = model.config.audio_token_index
    assert list(turn.codes) == [i - first for i in turn.ids if i >= first]
    assert 0 < len(turn.codes) < 40 and max(turn.codes) < 40
    text = [i for i in turn.ids if i < first]
    assert turn.text == processor.tokenizer.decode(text, skip_special_tokens=True)


def test_a_cache_under_gradient_checkpointing_is_refused(tiny):
    model, _ = tiny
    cache = DynamicCache(config=model.config.llm_config)
    model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache)
    model.train()
    model.llm.model.gradient_checkpointing = True
    try:
        with pytest.raises(ValueError, match="gradient checkpointing is on in training mode"):
            model(input_ids=torch.tensor([[4]]), past_key_values=cache)
    finally:
        model.llm.model.gradient_checkpointing = False
        model.eval()
