"""Conversations that speak: the wave of an answer, answers while they are generated, and what ends them early."""

import threading

import numpy as np
import pytest
import torch
from speaking_cases import FIRST_CODE, small_decoder, speaking_model

from covo_rl.models.covo_audio import streaming
from covo_rl.models.covo_audio.conversation import IDS_AHEAD, Conversation, Turn, UnfinishedTurn
from covo_rl.models.covo_audio.streaming import TextPieces, in_background
from covo_rl.models.covo_audio.token2wav import CodesError, Token2Wav
from covo_rl.models.covo_audio.voice import Voice
from covo_rl.models.tiny import tiny_tokenizer

SOUND = np.random.default_rng(1).normal(0, 0.1, 24_000).astype(np.float32)
HEARD = [{"type": "audio", "audio": SOUND, "sampling_rate": 24_000}]


def text_first(ids, scores):
    """Codes where they have to be alone, so that answers hold both."""
    scores[:, FIRST_CODE:] -= 50
    return scores


SPOKEN = {
    "do_sample": False, "max_new_tokens": 45, "eos_token_id": [-1], "pattern": "5:15", "logits_processor": [text_first],
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return speaking_model()


@pytest.fixture(scope="module")
def decoder():
    return small_decoder()


@pytest.fixture
def threads():
    """Nothing goes on in the background once an answer is over."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def pieces_of(stream):
    """What a stream yields, and the turn that it returns."""
    parts = []
    while True:
        try:
            parts.append(next(stream))
        except StopIteration as end:
            return parts, end.value


def test_an_answer_is_spoken_by_the_decoder(tiny, decoder):
    turn = Conversation(*tiny, **SPOKEN).turn(HEARD, speak=decoder)
    assert len(turn.codes) >= 25
    expected = decoder.synthesise(torch.tensor([turn.codes]))[0, 0]
    assert turn.wave.dtype == torch.float32 and turn.wave.shape == (960 * len(turn.codes),)
    assert torch.equal(turn.wave, expected) and turn.wave.std() > 0
    silent = Conversation(*tiny, **SPOKEN).turn(HEARD)
    assert silent.wave is None and (silent.ids, silent.codes) == (turn.ids, turn.codes)


def test_an_answer_of_text_alone_has_an_empty_wave(tiny, decoder, threads):
    options = {**SPOKEN, "pattern": "a2t"}
    turn = Conversation(*tiny, **options).turn("or", speak=decoder)
    assert turn.codes == () and turn.wave.shape == (0,)
    parts, streamed = pieces_of(Conversation(*tiny, **options).stream_turn("or", speak=decoder))
    assert "".join(parts) == turn.text and streamed.wave.shape == (0,)


def test_a_stream_is_the_same_answer_in_pieces(tiny, decoder, threads):
    whole, streamed = Conversation(*tiny, **SPOKEN), Conversation(*tiny, **SPOKEN)
    for content in (HEARD, "Louder, please."):
        turn = whole.turn(content, speak=decoder)
        parts, last = pieces_of(streamed.stream_turn(content, speak=decoder))
        blocks = [part for part in parts if isinstance(part, torch.Tensor)]
        assert "".join(part for part in parts if isinstance(part, str)) == turn.text == last.text
        assert (last.ids, last.codes) == (turn.ids, turn.codes)
        assert torch.equal(torch.cat(blocks), last.wave) and last.wave.shape == turn.wave.shape
        expected = torch.cat([block[0, 0] for block in decoder.stream(turn.codes)])
        assert len(blocks) > 1 and torch.equal(last.wave, expected)
        assert isinstance(parts[0], str)
        assert streamed.history == whole.history
    text, last = pieces_of(streamed.stream_turn("No audio."))
    assert all(isinstance(part, str) for part in text) and last.wave is None


def counting(steps):
    def count(ids, scores):
        steps.append(1)
        return scores

    return [count, text_first]


def test_the_first_block_comes_long_before_the_end(tiny, decoder, threads, monkeypatch):
    monkeypatch.setattr("covo_rl.models.covo_audio.conversation.IDS_AHEAD", 4)
    steps = []
    stream = Conversation(*tiny, **SPOKEN).stream_turn(HEARD, speak=decoder, logits_processor=counting(steps))
    assert steps == []
    first = next(part for part in stream if isinstance(part, torch.Tensor))
    # the first block needs 15 codes and 3 more, between them 10 text ids; then generation waits for room
    assert 0 < len(first) <= 15 * 960 and len(steps) <= 28 + 4 + 2 < SPOKEN["max_new_tokens"]
    list(stream)
    assert len(steps) == SPOKEN["max_new_tokens"]


def test_closing_a_stream_stops_generation_and_the_conversation_goes_on(tiny, decoder, threads, monkeypatch):
    monkeypatch.setattr("covo_rl.models.covo_audio.conversation.IDS_AHEAD", 4)
    model, processor = tiny
    chat, steps = Conversation(*tiny, **SPOKEN), []
    stream = chat.stream_turn(HEARD, speak=decoder, logits_processor=counting(steps))
    next(stream)
    voiced = []
    monkeypatch.setattr(Token2Wav, "solve", lambda *args, **options: voiced.append(args))
    stream.close()
    monkeypatch.undo()
    said = len(steps)
    assert 0 < said < 40 and not voiced  # what nobody hears is not spoken
    prompt = processor.apply_chat_template([{"role": "user", "content": HEARD}], add_generation_prompt=True)
    prompt = processor(text=prompt, audio=[SOUND], sampling_rate=24_000)
    assert len(chat.history) == prompt["input_ids"].shape[1] + said

    history, second = list(chat.history), chat.turn("or")
    ids = torch.tensor([[*history, model.config.turn_end_token_id]])
    rest = processor.tokenizer(
        "\n" + processor.apply_chat_template([{"role": "user", "content": "or"}], add_generation_prompt=True)
    )
    ids = torch.cat([ids, torch.tensor([rest["input_ids"]])], 1)
    fresh = model.generate(**{**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, **SPOKEN)
    assert fresh[0, ids.shape[1] :].tolist() == list(second.ids)


def test_a_second_question_waits_for_the_first_answer(tiny, decoder, threads):
    chat = Conversation(*tiny, **SPOKEN)
    stream = chat.stream_turn("or", speak=decoder)
    next(stream)
    with pytest.raises(UnfinishedTurn, match="still being streamed: read it to its end, or close it"):
        chat.turn("No audio.")
    stream.close()
    assert isinstance(chat.turn("No audio."), Turn)


def test_an_error_of_the_decoder_is_the_streams(tiny, decoder, threads):
    class Broken(Token2Wav):
        def stream(self, codes, **options):
            next(iter(codes))
            raise RuntimeError("no sound")
            yield

    chat = Conversation(*tiny, **SPOKEN)
    with pytest.raises(RuntimeError, match="no sound"):
        list(chat.stream_turn("or", speak=Broken(decoder.config)))
    assert chat.turn("No audio.").codes


def test_a_generation_that_fails_leaves_the_conversation_as_it_was(tiny, decoder, threads):
    def fail(ids, scores):
        if ids.shape[1] > 100:
            raise RuntimeError("out of memory")
        return scores

    chat, other = Conversation(*tiny, **SPOKEN), Conversation(*tiny, **SPOKEN)
    chat.turn(HEARD, max_new_tokens=20)
    other.turn(HEARD, max_new_tokens=20)
    history = list(chat.history)
    for ask in (chat.turn, lambda *args, **options: list(chat.stream_turn(*args, **options))):
        with pytest.raises(RuntimeError, match="out of memory"):
            ask("or " * 50, logits_processor=[fail, text_first], speak=decoder)
        assert chat.history == history and chat.cache.get_seq_length() == len(history) - 1
    assert chat.turn("or").ids == other.turn("or").ids


def test_decoders_of_other_models_are_refused(tiny, decoder):
    with pytest.raises(CodesError, match="the model has 50 audio codes, the decoder speaks 40"):
        Conversation(*speaking_model(50)).turn("or", speak=decoder)
    with pytest.raises(CodesError, match="no audio codes: it writes text alone"):
        next(Conversation(*speaking_model(0)).stream_turn("or", speak=decoder))


# -- voices ---------------------------------------------------------------------------------------------------


def speaker_folder(folder, **changes):
    rng = np.random.default_rng(2)
    arrays = {
        "prompt_token": rng.integers(0, 40, (1, 6)),
        "prompt_latent": rng.normal(size=(1, 24, 8)).astype(np.float32),
        "speaker_embed": rng.normal(size=(1, 4)).astype(np.float32),
    } | changes
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array, allow_pickle=True)
    return {name: torch.from_numpy(a) for name, a in arrays.items() if a is not None and a.dtype != object}


def test_a_voice_speaks_with_the_speaker_of_a_folder(tmp_path, tiny, decoder):
    prompt = speaker_folder(tmp_path)
    voice = Voice.from_folder(decoder, tmp_path, steps=4)
    turn = Conversation(*tiny, **SPOKEN).turn(HEARD, speak=voice)
    names = {"prompt_codes": "prompt_token", "prompt_latent": "prompt_latent", "speaker": "speaker_embed"}
    arguments = {name: prompt[file] for name, file in names.items()}
    codes = torch.tensor([turn.codes])
    assert torch.equal(turn.wave, decoder.synthesise(codes, **arguments, steps=4)[0, 0])
    assert not torch.equal(turn.wave, decoder.synthesise(codes, steps=4)[0, 0])
    parts, _ = pieces_of(Conversation(*tiny, **SPOKEN).stream_turn(HEARD, speak=voice))
    blocks = torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    assert torch.equal(blocks, torch.cat([b[0, 0] for b in decoder.stream(turn.codes, **arguments, steps=4)]))


def test_rows_without_a_batch_and_some_files_are_a_speaker_too(tmp_path, decoder):
    speaker_folder(tmp_path, prompt_token=None, prompt_latent=None, speaker_embed=np.ones(4, np.float32))
    voice = Voice.from_folder(decoder, tmp_path)
    assert torch.equal(voice.say([1, 2]), decoder.synthesise([[1, 2]], speaker=torch.ones(1, 4))[0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict.fromkeys(["prompt_token", "prompt_latent", "speaker_embed"]),
            "holds no speaker: none of prompt_token.npy",
        ),
        ({"prompt_token": np.array([[1, 40]])}, "position 1: code 40 is outside 0..39"),
        ({"prompt_token": None}, "prompt_latent without prompt_codes"),
        ({"speaker_embed": np.ones((1, 5), np.float32)}, r"speaker, row 0: \(5,\); expected \(4,\)"),
        ({"speaker_embed": np.full((1, 4), np.nan, np.float32)}, "speaker_embed.npy holds float32 .* expected finite"),
        ({"speaker_embed": np.array([{"a": 1}])}, "speaker_embed.npy cannot be read"),
    ],
)
def test_speakers_that_do_not_fit_are_refused(tmp_path, decoder, changes, message):
    speaker_folder(tmp_path, **changes)
    with pytest.raises(CodesError, match=message):
        Voice.from_folder(decoder, tmp_path)


def test_a_damaged_array_asks_for_no_memory(tmp_path, decoder):
    speaker_folder(tmp_path)
    path = tmp_path / "speaker_embed.npy"
    path.write_bytes(path.read_bytes().replace(b"(1, 4), }" + b" " * 12, b"(1, 4000000000000), }"))
    with pytest.raises(CodesError, match=r"speaker_embed.npy cannot be read"):
        Voice.from_folder(decoder, tmp_path)


# -- what streams are made of ---------------------------------------------------------------------------------


def test_text_comes_in_whole_characters():
    tokenizer = tiny_tokenizer(["ab"], 320)
    text = "a Größe 你好 🎵 b"
    ids = tokenizer(text)["input_ids"]
    pieces = TextPieces(tokenizer)
    parts = [pieces.push(i) for i in ids]
    assert "".join(parts) + pieces.rest() == text
    assert "" in parts and not any("\ufffd" in part for part in parts)
    cut = TextPieces(tokenizer)
    parts = [cut.push(i) for i in tokenizer("🎵")["input_ids"][:-1]]
    assert set(parts) == {""} and cut.rest() == tokenizer.decode(tokenizer("🎵")["input_ids"][:-1])


def test_work_in_the_background_waits_for_room_and_ends_when_nobody_listens(threads):
    done = []

    def work(outlet):
        for i in range(1000):
            if outlet.closed:
                return
            outlet.put(i)
            done.append(i)

    results = in_background(work, room=3)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(done) <= 5 + 3
    results.close()
    assert len(done) <= 5 + 4
    assert list(in_background(lambda outlet: [outlet.put(i) for i in range(50)], room=1)) == list(range(50))


def test_bounds_are_what_the_docs_say():
    assert IDS_AHEAD == 256 and streaming.LOOK_SECONDS <= 0.1
