"""`covo-rl speech`: speech to codes and back, their training, and whether it is speech.

covo-rl speech demo runs/speech                          # hear and measure it
covo-rl speech make data/digits --count 200              # recordings to try the rest with
covo-rl speech encode data/digits/rows.jsonl data/digits/codes.jsonl
covo-rl speech decode data/digits/codes.jsonl runs/spoken
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from covo_rl.data.read import DataError, Problem
from covo_rl.data.terminal import say
from covo_rl.records.lock import FolderLock
from covo_rl.resolve import ConfigError, run_recipe
from covo_rl.speech import SHIPPED_DECODER, SHIPPED_TOKENIZER
from covo_rl.synth.speech import SPEECH_SPLITS, write_speech

if TYPE_CHECKING:
    import torch

    from covo_rl.speech.rows import SpeechRow
    from covo_rl.speech.tokenizer import SpeechTokenizer

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Speech to codes and back: make recordings, encode, decode, align, train, demo.",
)  # fmt: skip
Rows = Annotated[Path, typer.Argument(metavar="ROWS", help="rows of speech: JSONL with id, audio, text ...")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="JSONL to write; its paths start where those of ROWS do")]
AudioDir = Annotated[Path | None, typer.Option(help="folder that paths of ROWS start from; default: that of ROWS")]
TokenizerName = Annotated[str, typer.Option("--tokenizer", help="tokenizer folder, or the shipped one")]
DecoderName = Annotated[str, typer.Option("--decoder", help="decoder folder, published or own, or the shipped one")]
VoiceName = Annotated[
    Path | None, typer.Option("--voice", help="a recording, or folder of a prompt (prompt_token.npy ...)")
]
Steps = Annotated[int, typer.Option(min=2, help="points of time of the solver: 10 are 18 evaluations")]
Alpha = Annotated[float, typer.Option(min=0, help="guidance towards the codes; 0: without, twice as fast")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Seed = Annotated[int, typer.Option(min=0, help="of all that is random")]
_RECIPE: Any = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_BATCH = 16
ROWS = "rows.jsonl"


@app.command("make")
def make_command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the recordings and of rows.jsonl")],
    count: Annotated[int, typer.Option(min=1, help="utterances")] = 500,
    split: Annotated[str, typer.Option(help=f"whose voices: {', '.join(SPEECH_SPLITS)}")] = "train",
    seed: Seed = 0,
) -> None:
    """Write digits spoken by a formant synthesiser: recordings and rows with the exact times of words."""
    if split not in SPEECH_SPLITS:
        raise ConfigError([f"--split {split!r}: there are {', '.join(SPEECH_SPLITS)}"])
    _check_folder(output, ROWS, "audio")
    say(f"{count} utterances written, their rows to {write_speech(output, split=split, count=count, seed=seed)}")


@app.command("encode")
def encode_command(
    rows: Rows,
    output: Out,
    audio_dir: AudioDir = None,
    tokenizer: TokenizerName = SHIPPED_TOKENIZER,
    device: Device = "cpu",
) -> None:
    """Add to every row the codes of its recording, and the digest of the tokenizer that made them.

    In rows of dialogues (`turns`) the recordings of the assistant are encoded.
    """
    from covo_rl.data.load import audio_root
    from covo_rl.data.sources import read_rows
    from covo_rl.speech.rows import read_speech_rows, write_speech_rows
    from covo_rl.speech.turns import replies_of, with_replies

    _check_output(output)
    given = read_rows(rows)
    dialogues = any("turns" in row for row in given)
    if dialogues:
        speech = read_speech_rows(replies_of(given), audio_root(rows, audio_dir), needs=("audio",))
    else:
        speech = read_speech_rows(rows, audio_dir, needs=("audio",))
    encoder = _tokenizer(tokenizer, device)
    digest = encoder.digest()
    new = [{"codes": codes, "tokenizer": digest} for codes in _encoded(speech, encoder, str(rows))]
    if dialogues:
        write_speech_rows(output, with_replies(given, {row.id: made for row, made in zip(speech, new, strict=True)}))
    else:
        _write(output, speech, new)
    count = sum(len(row["codes"]) for row in new)
    say(f"{len(speech)} rows, {count} codes written to {_place(output, rows, audio_dir)}")


@app.command("align")
def align_command(
    rows: Rows,
    output: Out,
    audio_dir: AudioDir = None,
    tokenizer: TokenizerName = SHIPPED_TOKENIZER,
    device: Device = "cpu",
) -> None:
    """Add the times of its words to every row without: its text's likeliest path through codes (Viterbi over CTC)."""
    from covo_rl.speech.align import AlignError, align_words
    from covo_rl.speech.grid import CodeError
    from covo_rl.speech.pieces import PiecesError
    from covo_rl.speech.rows import read_speech_rows

    _check_output(output)
    aligner = _tokenizer(tokenizer, device)
    size, digest = len(aligner.codebook), aligner.digest()
    speech = read_speech_rows(rows, audio_dir, needs=("text",), codebook=size, tokenizer=digest)
    bare = [row for row in speech if row.words is None]
    made = iter(_encoded([row for row in bare if row.codes is None], aligner, str(rows)))
    words, problems = {}, []
    for row in bare:
        try:
            words[row.id] = align_words(aligner, next(made) if row.codes is None else row.codes.tolist(), row.text)
        except (AlignError, CodeError, PiecesError) as error:
            problems.append(Problem(row.id, str(error)))
    if problems:
        raise DataError(str(rows), problems)
    _write(output, speech, [{"words": words[row.id]} if row.id in words else {} for row in speech])
    say(f"{len(bare)} rows aligned, {sum(map(len, words.values()))} words, {len(speech) - len(bare)} had theirs; "
        f"written to {_place(output, rows, audio_dir)}")  # fmt: skip


@app.command("decode")
def decode_command(
    rows: Annotated[Path, typer.Argument(metavar="ROWS", help="rows with codes")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="folder of the recordings and of rows.jsonl")],
    audio_dir: AudioDir = None,
    decoder: DecoderName = SHIPPED_DECODER,
    voice: VoiceName = None,
    tokenizer: TokenizerName = SHIPPED_TOKENIZER,
    steps: Steps = 10,
    alpha: Alpha = 1.0,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Speak the codes of every row: a wav file each, and rows that name them."""
    import soundfile

    from covo_rl.records.console import ProgressDisplay
    from covo_rl.speech.grid import RATE
    from covo_rl.speech.rows import read_speech_rows, write_speech_rows
    from covo_rl.speech.voices import open_voice

    _check_folder(output, ROWS, "audio")
    options = {"steps": steps, "alpha": alpha or None, "seed": seed}
    speaker = open_voice(decoder, voice, tokenizer=tokenizer, device=_device(device), **options)
    config = speaker.decoder.config
    size, digest = config.flow.token_vocab_size, config.tokenizer or None
    speech = read_speech_rows(rows, audio_dir, needs=("codes",), codebook=size, tokenizer=digest)
    (output / "audio").mkdir(parents=True, exist_ok=True)
    new = []
    with ProgressDisplay("decode", len(speech), stderr=True) as display:
        for number, row in enumerate(speech):
            assert row.codes is not None
            name = f"audio/{number:05d}.wav"  # an id may be no name of a file
            soundfile.write(output / name, speaker.say(row.codes.tolist()).numpy(), RATE, subtype="PCM_16")
            new.append({**row.source, "audio": name, "codes": row.codes.tolist()})
            display.update(number + 1, "")
    write_speech_rows(output / ROWS, new)
    say(f"{len(new)} rows spoken; {output / ROWS} names the recordings")


@app.command("train-tokenizer", context_settings=_RECIPE)
def train_tokenizer_command(context: typer.Context) -> None:
    """Train a tokenizer: recipes/train_tokenizer.py, with its options (--help)."""
    run_recipe("train_tokenizer.py", context.args)


@app.command("train-decoder", context_settings=_RECIPE)
def train_decoder_command(context: typer.Context) -> None:
    """Train a decoder: recipes/train_decoder.py, with its options (--help)."""
    run_recipe("train_decoder.py", context.args)


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="folder of recordings and figures.json")],
    tokenizer: TokenizerName = SHIPPED_TOKENIZER,
    decoder: DecoderName = SHIPPED_DECODER,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="which unseen voices; several: one option each")] = None,
    count: Annotated[int, typer.Option(min=5, help="utterances of a seed")] = 40,
    train: Annotated[bool, typer.Option("--train", help="train both of each seed from nothing")] = False,
) -> None:
    """Speak the codes of digits that unseen voices say, and measure what is left of words, tones and pitch."""
    _check_folder(output, "figures.json")
    if train and (tokenizer, decoder) != (SHIPPED_TOKENIZER, SHIPPED_DECODER):
        raise ConfigError(["--train makes its own tokenizer and decoder: leave out --tokenizer and --decoder"])
    from covo_rl.speech.demo import run_demo

    run_demo(output, None if train else (tokenizer, decoder), seed or [0, 1, 2], count)


def _check_output(path: Path) -> None:
    """Raise ConfigError where a file would be replaced, or has no folder to be in."""
    if path.exists():
        raise ConfigError([f"{path} exists: give another OUT, or delete it"])
    if not path.parent.is_dir():
        raise ConfigError([f"{path.parent}: there is no such folder for OUT"])


def _check_folder(output: Path, *names: str) -> None:
    """Raise ConfigError where a folder cannot be written, or has one of `names` already."""
    problem = FolderLock(output).refusal()
    if there := [name for name in names if (output / name).exists()]:
        problem = f"{output} holds {there[0]}: give another OUT"
    if problem:
        raise ConfigError([problem])


def _tokenizer(name: str, device: str) -> SpeechTokenizer:
    from covo_rl.speech.tokenizer import SpeechTokenizer

    return SpeechTokenizer.from_pretrained(name, _device(device))


def _device(name: str) -> torch.device:
    from covo_rl.train.launch import device_of

    return device_of(name)


def _place(output: Path, rows: Path, audio_dir: Path | None) -> str:
    """The file that was written, and what its reader must add where its paths start elsewhere."""
    start = audio_dir or rows.parent
    return str(output) if output.parent.resolve() == start.resolve() else f"{output}; read it with --audio-dir {start}"


def _encoded(rows: Sequence[SpeechRow], tokenizer: SpeechTokenizer, source: str) -> Iterator[list[int]]:
    """Codes of the recordings, a few in memory at a time.

    Raises:
        DataError: every recording that cannot be used, once all were read.
    """
    from covo_rl.records.console import ProgressDisplay
    from covo_rl.speech.rows import load_waves

    problems: list[Problem] = []
    with ProgressDisplay("encode", len(rows), stderr=True) as display:
        for start in range(0, len(rows), _BATCH):
            try:
                waves = load_waves(rows[start : start + _BATCH])
                if not problems:
                    yield from (codes.tolist() for codes in tokenizer.encode(list(waves.values())))
            except DataError as error:
                problems += error.problems
            display.update(min(start + _BATCH, len(rows)), "")
    if problems:
        raise DataError(source, problems)


def _write(output: Path, rows: Sequence[SpeechRow], new: Sequence[Mapping[str, Any]]) -> None:
    from covo_rl.speech.rows import write_speech_rows

    write_speech_rows(output, ({**row.source, **columns} for row, columns in zip(rows, new, strict=True)))
