"""Spoken conversations from Python and at the terminal: wave files of replies, questions that are sounds, refusals."""

import wave as wav

import numpy as np
import pytest
import soundfile
import torch
from speaking_cases import small_decoder, speaking_model

from covo_rl import load
from covo_rl.cli import main
from covo_rl.config import ConfigError
from covo_rl.models.covo_audio.conversation import Conversation
from covo_rl.models.covo_audio.persona import SPOKEN_SYSTEM
from covo_rl.models.covo_audio.token2wav import CodesError
from covo_rl.models.covo_audio.voice import Voice
from covo_rl.prompt import PromptError
from covo_rl.speech.pitch import track_f0
from covo_rl.speech.voices import open_voice
from covo_rl.synth.speech import speakers

LENGTH = {"max_completion_length": 30}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, a decoder and two sounds as files."""
    home = tmp_path_factory.mktemp("speaking")
    for part in speaking_model():
        part.save_pretrained(home / "model")
    for part in speaking_model(0):
        part.save_pretrained(home / "mute")
    small_decoder().save_pretrained(home / "decoder")
    rng = np.random.default_rng(3)
    for name in ("one", "two"):
        soundfile.write(home / f"{name}.wav", rng.normal(0, 0.1, 12_000), 24_000)
    return home


@pytest.fixture(scope="module")
def model(home):
    return load(home / "model")


def test_a_spoken_chat_is_one_conversation_over_codes_and_text(home, model):
    chat = model.chat(speak=home / "decoder", pattern="5:15", **LENGTH)
    first, second = chat.ask(audio=home / "one.wav"), chat.ask("Louder, please.")
    assert first.codes and first.wave.dtype == np.float32 and len(first.wave) == 960 * len(first.codes)

    family = model.policy.family
    options = {"max_new_tokens": 30, "do_sample": False, "pattern": "5:15", "eos_token_id": list(family.eos_token_ids)}
    talk = Conversation(family.model, family.processor, **options)
    heard = talk.turn(
        [{"type": "audio", "path": home / "one.wav"}, {"type": "text", "text": ""}], speak=small_decoder()
    )
    then = talk.turn([{"type": "text", "text": "Louder, please."}])
    assert (first.token_ids, second.token_ids) == (heard.ids, then.ids)
    assert np.array_equal(first.wave, heard.wave.numpy())
    chat.reset()
    assert chat.ask(audio=home / "one.wav") == first


def test_the_first_turn_asks_what_the_model_was_taught_with(home):
    """The ids of the conversation are those of the prompt that training and generate make."""
    model = load(home / "model", instruction="Answer briefly.")
    chat = model.chat(speak=home / "decoder", **LENGTH)
    reply = chat.ask("What is this?", audio=home / "one.wav", choices=["rain", "wind"])
    plain = model.generate("What is this?", audio=home / "one.wav", choices=["rain", "wind"], **LENGTH)
    assert reply.token_ids == plain.token_ids and (plain.codes, plain.wave) == (reply.codes, None)
    spoken = model.generate("What is this?", audio=home / "one.wav", speak=home / "decoder", **LENGTH)
    expected = small_decoder().synthesise([list(spoken.codes)])[0, 0] if spoken.codes else torch.zeros(0)
    assert np.array_equal(spoken.wave, expected.numpy())


def test_a_stream_of_a_chat_is_its_reply(home, model):
    chat, other = (model.chat(speak=home / "decoder", pattern="5:15", **LENGTH) for _ in range(2))
    stream, parts = chat.stream(audio=home / "one.wav"), []
    while True:
        try:
            parts.append(next(stream))
        except StopIteration as end:
            reply = end.value
            break
    expected = other.ask(audio=home / "one.wav")
    assert reply == expected
    assert np.array_equal(np.concatenate([part for part in parts if isinstance(part, np.ndarray)]), reply.wave)
    assert len(reply.wave) == len(expected.wave)
    begun = chat.stream("And now?")
    next(begun)
    begun.close()
    assert chat.ask("Louder, please.").token_ids


def test_draws_are_those_of_the_seed(home, model):
    def drawn(seed):
        chat = model.chat(speak=home / "decoder", temperature=1.0, top_p=0.9, seed=seed, **LENGTH)
        return [chat.ask("What is this?").token_ids for _ in range(2)]

    state = torch.random.get_rng_state()
    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_cannot_be_spoken_is_refused_before_anything_is_generated(home, model):
    for options, message in (
        ({"pattern": "5:15"}, "pattern needs speak"),
        ({"voice": "somebody.wav"}, "voice needs speak"),
        ({"speak": home / "decoder", "pattern": "15"}, "pattern='15' does not exist; write TEXT:CODES"),
        ({"speak": home / "decoder", "pattern": "a2t"}, "pattern a2t forbids speech: leave speak out"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.chat(**options)
    with pytest.raises(ConfigError, match=r"this model \(Covo-Audio\) has no audio codes; Covo-Audio with audio codes"):
        load(home / "mute").chat(speak=home / "decoder")
    with pytest.raises(ConfigError, match=r"this model \(Qwen2-Audio\) writes text alone; Covo-Audio with audio codes"):
        load("builtin:tiny_qwen2_audio").generate("What?", speak=home / "decoder")
    with pytest.raises(CodesError, match="the model has 50 audio codes, the decoder speaks 40"):
        small = home / "fifty"
        for part in speaking_model(50):
            part.save_pretrained(small)
        load(small).chat(speak=small_decoder())


def test_a_turn_that_cannot_be_asked_leaves_the_conversation(home, model):
    chat = model.chat(speak=home / "decoder", **LENGTH)
    chat.ask(audio=home / "one.wav")
    history = list(chat.conversation.history)
    with pytest.raises(ConfigError, match="question 1 is ''"):
        chat.ask("")
    with pytest.raises(PromptError, match="nowhere"):
        chat.ask(audio=home / "nowhere.wav")
    with pytest.raises(PromptError, match=r"max_position_embeddings\): shorten"):
        chat.ask("or " * 4000)
    assert chat.conversation.history == history


def spoken(home, *words, lines="", monkeypatch):
    typed = iter(lines.splitlines())

    def line(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", line)
    folders = ["--model", home / "model", "--decoder", home / "decoder"]
    with pytest.raises(SystemExit) as end:
        main(["chat", "--max-completion-length", "30", *map(str, [*folders, *words])])
    return end.value.code


def test_a_conversation_of_several_turns_at_the_terminal(home, model, tmp_path, monkeypatch, capsys):
    lines = f"/audio {home / 'two.wav'}\n\nLouder, please.\n/audio {home / 'one.wav'}"
    words = ("--audio", home / "one.wav", "--speak", tmp_path / "reply.wav", "--pattern", "5:15")
    assert spoken(home, *words, lines="\n" + lines, monkeypatch=monkeypatch) == 0
    chat = model.chat(speak=home / "decoder", pattern="5:15", **LENGTH)
    asked = ({"audio": home / "one.wav"}, {"audio": home / "two.wav"}, {"question": "Louder, please."},
             {"audio": home / "one.wav"})  # fmt: skip
    err = capsys.readouterr().err
    for number, words in enumerate(asked, 1):
        reply = chat.ask(**words)
        path = tmp_path / (f"reply-{number}.wav" if number > 1 else "reply.wav")
        with wav.open(str(path)) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        assert np.abs(samples / 32768 - np.clip(reply.wave, -1, 1)).max() < 1e-4
        assert f"{path}: {len(reply.codes) * 0.04:.2f} s of speech" in err
    assert not (tmp_path / "reply-5.wav").exists()


def test_who_replies_is_named_in_the_system_message_of_a_spoken_chat(home, model):
    chat = model.chat(speak=home / "decoder", speaker="anna", emotion="joy", max_completion_length=2)
    chat.ask(audio=home / "one.wav")
    text = model.policy.family.tokenizer.decode(chat.conversation.history)
    assert text.startswith(f"<|im_start|>system\n{SPOKEN_SYSTEM}\nEmotion: joy.\nSpeaker: anna.<|im_end|>")


def test_a_sound_alone_is_asked_at_the_end_of_what_is_piped_in(home, tmp_path, monkeypatch, capsys):
    assert not spoken(home, "--audio", home / "one.wav", "--speak", tmp_path / "a.wav", monkeypatch=monkeypatch)
    assert (tmp_path / "a.wav").exists() != ("the reply has no speech in it" in capsys.readouterr().err)


def test_a_sound_that_cannot_be_read_spoils_one_question_alone(home, tmp_path, monkeypatch, capsys):
    (tmp_path / "noise.wav").write_bytes(b"no sound")
    lines = f"/audio {tmp_path / 'noise.wav'}\n\nLouder, please.\n/audio"
    assert not spoken(home, "--speak", tmp_path / "a.wav", lines=lines, monkeypatch=monkeypatch)
    printed = capsys.readouterr()
    assert printed.err.count("; its sounds are forgotten") == 1 and "/audio: no such file" in printed.err
    assert (tmp_path / "a.wav").exists() != ("the reply has no speech in it" in printed.err)


def test_options_of_speech_are_checked_before_a_model_is_loaded(home, tmp_path, monkeypatch, capsys):
    (tmp_path / "there.wav").touch()
    for words, messages in (
        (["--pattern", "5:15"], ["--decoder needs --speak FILE", "--pattern needs --speak FILE"]),
        (["--speaker", "anna", "--emotion", "joy"], ["--speaker needs --speak FILE", "--emotion needs --speak FILE"]),
        (["--speak", tmp_path / "a.wav", "--speaker", " ", "--emotion", "glad"],
         ["--speaker ' ': a name", "--emotion 'glad': there are joy, anger, sadness, fear, disgust, depression, sur"]),
        (["--speak", tmp_path / "there.wav"], [f"{tmp_path / 'there.wav'} exists: remove it, or name another file"]),
        (["--speak", tmp_path / "a.mp3", "--voice", tmp_path / "b.wav", "--pattern", "x"],
         ["replies are wav files", "--voice", "no such file or folder", "--pattern='x' does not exist"]),
        (["--speak", tmp_path / "a.wav", "--decoder", tmp_path / "b"], [f"--decoder {tmp_path / 'b'}: no such folder"]),
        (["--speak", tmp_path / "no" / "a.wav"], [f"there is no folder {tmp_path / 'no'}"]),
    ):  # fmt: skip
        monkeypatch.setattr("covo_rl.run.python.model.load", None)
        assert spoken(home, *words, monkeypatch=monkeypatch) == 2
        err = capsys.readouterr().err
        assert all(message in err for message in messages), err


def test_the_prompt_beside_a_decoder_is_its_voice(home, tmp_path):
    small_decoder().save_pretrained(tmp_path)
    np.save(tmp_path / "speaker_embed.npy", np.ones((1, 4), np.float32))
    voice = open_voice(tmp_path, steps=4)
    expected = small_decoder().synthesise([[1, 2, 3]], speaker=torch.ones(1, 4), steps=4)[0, 0]
    assert torch.equal(voice.say([1, 2, 3]), expected)
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "speaker_embed.npy", np.zeros((1, 4), np.float32))
    other = open_voice(tmp_path, tmp_path / "other", steps=4)  # what is named goes before it
    assert torch.equal(other.say([1, 2, 3]), open_voice(home / "decoder", steps=4).say([1, 2, 3]))
    assert open_voice(other) is other


def test_the_shipped_decoder_has_a_voice_of_its_own():
    """It speaks as high as the one that it is said to be, and not as high as the mean of all."""
    voice, codes = open_voice(), [117, 255, 12, 124, 55, 22, 73, 134, 159, 145, 163, 74, 42]  # nine eight
    pitches = []
    for speaker in (voice, Voice(voice.decoder)):
        f0_Z = track_f0(speaker.say(codes).numpy(), 24_000)
        pitches.append(float(np.median(f0_Z[f0_Z > 0])))
    assert 12 * abs(np.log2(pitches[0] / speakers(1)[0].f0_hz)) < 3 < 12 * np.log2(pitches[0] / pitches[1])
