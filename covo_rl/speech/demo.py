"""`covo-rl speech demo`: digits by voices that nobody trained on -> codes -> wave -> what is left of words and pitch.

Every figure is of test voices. Those of waves are by judges that never saw a tokenizer or decoder: a linear probe of
mel spectra trained on recordings, and a pitch tracker beside the synthesiser's true fundamental.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import soundfile
import torch
from rich.table import Table

from covo_rl.data.files import write_json
from covo_rl.models.builtin import resolve_model
from covo_rl.models.covo_audio.token2wav import Token2Wav
from covo_rl.models.covo_audio.token2wav.mel import griffin_lim, log_mel
from covo_rl.records.console import console, working
from covo_rl.resolve import find
from covo_rl.speech.clips import row_of
from covo_rl.speech.grid import CODE_SECONDS, RATE
from covo_rl.speech.latents import voice_of
from covo_rl.speech.measures import (
    LinearProbe,
    corpus_error_rate,
    measure_tokenizer,
    mel_features,
    package,
    pitch_errors,
    stoi,
    word_features,
)  # fmt: skip
from covo_rl.speech.pitch import track_f0
from covo_rl.speech.tokenizer import SpeechTokenizer
from covo_rl.synth.speech import DIGITS, TONES, Utterance, say_digits, utterance

#: figure -> what it is, its target: at most, at least, or none
FIGURES: dict[str, tuple[str, str, float | None]] = {
    "wer": ("words read from codes: error rate", "<=", 0.10),
    "code_use": ("codes of the codebook in use", ">=", 0.60),
    "code_digits": ("linear probe of codes: digits", ">=", 0.90),
    "code_tones": ("linear probe of codes: tones", ">=", 0.60),
    "code_sex": ("linear probe of codes: the voice's sex", "<=", None),
    "pitch_semitones": ("pitch head: median error, semitones", "<=", 1.0),
    "wave_digits": ("synthesised: independent probe names digits", ">=", 0.75),
    "shuffled_digits": ("the same with shuffled codes", "<=", 0.35),
    "wave_f0": ("synthesised: F0 median error, semitones", "<=", 1.0),
    "wave_contour": ("synthesised: the same, each clip's mean set right", "<=", None),
    "wave_f0_correlation": ("synthesised: F0 correlation in a clip", ">=", 0.5),
    "wave_voicing": ("synthesised: frames voiced as they should be", ">=", None),
    "wave_wer": ("synthesised, encoded again: word error rate", "<=", None),
    "wave_stoi": ("synthesised: intelligibility (STOI)", ">=", None),
    "griffin_lim_f0": ("Griffin-Lim of the true mel: F0 error", "<=", 0.3),
}
#: the mean of seeds must be better than each
WAVE_DIGITS_MEAN = 0.80
PROBE_CLIPS = 200
_SHOWN, _PARTS, _VOICE_CLIPS = 5, 4, 6


def run_demo(output: Path, folders: tuple[str, str] | None, seeds: Sequence[int], count: int) -> dict[str, Any]:
    """Measure `count` utterances of each seed, write recordings and figures.json, print the table.

    `folders`: tokenizer and decoder; None trains both for each seed from nothing.
    """
    for name, measure in (("jiwer", "word error rates"), ("pystoi", "STOI")):
        package(name, measure)  # minutes before they are used
    figures: dict[int, dict[str, float]] = {}
    for seed in dict.fromkeys(seeds):
        folder = output / f"seed{seed}"
        begun = time.process_time()
        names = folders or _train(folder, seed)
        seconds = time.process_time() - begun
        tokenizer = SpeechTokenizer.from_pretrained(names[0])
        decoder = Token2Wav.from_pretrained(resolve_model(names[1]))
        decoder.check_tokenizer(tokenizer.digest())
        with working(f"seed {seed}: {count} utterances are encoded, spoken, heard and measured (a minute or two)"):
            figures[seed] = measure_speech(tokenizer, decoder, seed, count, folder)
        if folders is None:
            figures[seed]["training_cpu_seconds"] = seconds
    missed = [name for name in FIGURES if misses(name, list(figures.values()))]
    targets = {name: _target(name) for name in FIGURES if _target(name)}
    content = {"figures": {str(seed): values for seed, values in figures.items()}, "targets": targets, "missed": missed}
    write_json(output / "figures.json", content)
    console.print(_table(figures))
    console.print(f"{output}/seed*/: recordings (as said, as synthesised, of shuffled codes); {output}/figures.json")
    return content


def measure_speech(
    tokenizer: SpeechTokenizer, decoder: Token2Wav, seed: int, count: int, folder: Path | None = None
) -> dict[str, float]:
    """All of FIGURES on `count` utterances of unseen voices; `folder` gets recordings of the first ones."""
    told = [utterance("train", i, seed + 1000) for i in range(PROBE_CLIPS)]
    said = [utterance("test", i, seed) for i in range(count)]
    codes = [tokenizer.encode([u.wave for u in spoken]) for spoken in (told, said)]
    figures = measure_tokenizer(tokenizer, [row_of(u, str(i)) for i, u in enumerate(said)])
    figures |= _probe_codes(tokenizer, told, said, codes)
    rng = np.random.default_rng(seed)
    shuffled = [row[torch.from_numpy(rng.permutation(len(row)))] for row in codes[1]]
    waves, noise = (_speak(tokenizer, decoder, said, rows, seed) for rows in (codes[1], shuffled))
    figures |= judge_waves(told, said, waves, noise)
    again = [tokenizer.transcribe(row) for row in tokenizer.encode(waves)]
    figures["wave_wer"] = corpus_error_rate([u.text for u in said], again)
    if folder is not None:
        _write_recordings(folder, said, waves, noise, [tokenizer.transcribe(row) for row in codes[1]], again)
    return figures


def _train(folder: Path, seed: int) -> tuple[str, str]:
    """Tokenizer and decoder from nothing, with the options of the shipped ones."""
    from covo_rl.speech.decoder_training import read_decoder_training
    from covo_rl.speech.train_decoder import train_decoder
    from covo_rl.speech.train_tokenizer import train_tokenizer
    from covo_rl.speech.training import read_training

    configs = find("recipes", "configs")
    options = {"output": str(folder / "tokenizer"), "seed": seed}
    tokenizer = str(train_tokenizer(read_training(configs / "tokenizer_tiny.yaml", options)))
    options = {"output": str(folder / "decoder"), "seed": seed, "tokenizer": tokenizer}
    return tokenizer, str(train_decoder(read_decoder_training(configs / "decoder_tiny.yaml", options)))


def _speak(
    tokenizer: SpeechTokenizer, decoder: Token2Wav, said: Sequence[Utterance], codes: Sequence[torch.Tensor], seed: int
) -> list[np.ndarray]:
    """The waves (T,) of codes in their speakers' voices, each known from ten seconds: six recordings, all tones.

    Codes tell pitch relative to a clip's mean, so what the prompt says of the speaker's own is all that is known of it.
    Its recordings are as short as those that are said, since a voice falls towards the end of each.
    """
    waves = []
    for i, (u, row) in enumerate(zip(said, codes, strict=True)):
        rng = np.random.default_rng([seed, i])
        prompt = [
            say_digits(rng.choice(DIGITS, len(TONES)).tolist(), u.speaker, rng, rng.permutation([*TONES]).tolist()).wave
            for _ in range(_VOICE_CLIPS)
        ]
        voice = voice_of(np.concatenate(prompt), tokenizer, decoder)
        waves.append(decoder.synthesise(row[None], **voice, seed=seed)[0, 0].numpy())
    return waves


def _probe_codes(tokenizer: SpeechTokenizer, told, said, codes) -> dict[str, float]:
    """What is read linearly from the codes of a word; the probe is trained on other voices."""
    codebook = tokenizer.codebook.cpu().numpy()
    inputs = [
        np.vstack([word_features(codebook[row], u.words, 1 / CODE_SECONDS, _PARTS)
                   for row, u in zip(rows, spoken, strict=True)])
        for rows, spoken in zip(codes, (told, said), strict=True)
    ]  # fmt: skip
    labels = {
        "code_digits": [_digits(spoken) for spoken in (told, said)],
        "code_tones": [[tone for u in spoken for tone in u.tones] for spoken in (told, said)],
        "code_sex": [[u.speaker.sex for u in spoken for _ in u.words] for spoken in (told, said)],
    }
    return {name: LinearProbe(inputs[0], known).accuracy(inputs[1], asked) for name, (known, asked) in labels.items()}


def judge_waves(
    told: Sequence[Utterance], said: Sequence[Utterance], waves: Sequence[np.ndarray], noise: Sequence[np.ndarray]
) -> dict[str, float]:
    """The figures of synthesised `waves`, and of those of shuffled codes; the probe is trained on `told`."""
    probe = LinearProbe(np.vstack([mel_features(u.wave, u.words) for u in told]), _digits(told))
    names, true = _digits(said), [u.f0_Z for u in said]
    heard = pitch_errors(true, [track_f0(wave, RATE) for wave in waves])
    mels = [log_mel(torch.from_numpy(u.wave)[None]) for u in said]
    rebuilt = pitch_errors(true, [track_f0(griffin_lim(mel)[0, 0].numpy(), RATE) for mel in mels])
    judged = [np.vstack([mel_features(wave, u.words) for wave, u in zip(rows, said, strict=True)])
              for rows in (waves, noise)]  # fmt: skip
    return {
        "wave_digits": probe.accuracy(judged[0], names),
        "shuffled_digits": probe.accuracy(judged[1], names),
        "wave_f0": heard.semitones,
        "wave_contour": heard.contour,
        "wave_f0_correlation": heard.correlation,
        "wave_voicing": heard.voicing,
        "griffin_lim_f0": rebuilt.semitones,
        "wave_stoi": mean(stoi(u.wave, wave) for u, wave in zip(said, waves, strict=True)),
    }


def _digits(spoken: Sequence[Utterance]) -> list[str]:
    return [word for u in spoken for word, _, _ in u.words]


def _write_recordings(folder: Path, said, waves, noise, read, again) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, u in enumerate(said[:_SHOWN]):
        for kind, wave in (("said", u.wave), ("synthesised", waves[i]), ("shuffled", noise[i])):
            soundfile.write(folder / f"{i}_{kind}.wav", wave, RATE, subtype="PCM_16")
        rows.append({"recording": i, "text": u.text, "codes_say": read[i], "synthesised_says": again[i]})
    write_json(folder / "recordings.json", rows)


def _target(name: str) -> str:
    _, sign, target = FIGURES[name]
    if name == "code_sex":
        return "< digits"
    mean_too = f", mean {WAVE_DIGITS_MEAN:g}" if name == "wave_digits" else ""
    return "" if target is None else f"{sign} {target:g}{mean_too}"


def misses(name: str, seeds: Sequence[Mapping[str, float]]) -> bool:
    """Whether a seed, or the mean where it counts, is off its target."""
    _, sign, target = FIGURES[name]
    values = [row[name] for row in seeds]
    if name == "code_sex":
        return any(row[name] >= row["code_digits"] for row in seeds)
    if target is None:
        return False
    if name == "wave_digits" and mean(values) < WAVE_DIGITS_MEAN:
        return True
    return any(not (value <= target if sign == "<=" else value >= target) for value in values)


def _table(figures: Mapping[int, Mapping[str, float]]) -> Table:
    table = Table("figure", *(f"seed {seed}" for seed in figures), "mean", "target", show_edge=False)
    for name, (what, _, _) in FIGURES.items():
        values = [row[name] for row in figures.values()]
        goal = f"{_target(name)}{' missed' if misses(name, list(figures.values())) else ''}"
        table.add_row(what, *(f"{value:.3f}" for value in values), f"{mean(values):.3f}", goal)
    if all("training_cpu_seconds" in row for row in figures.values()):
        seconds = [row["training_cpu_seconds"] for row in figures.values()]
        table.add_row("training of both, CPU seconds", *(f"{s:.0f}" for s in seconds), f"{mean(seconds):.0f}", "<= 900")
    return table
