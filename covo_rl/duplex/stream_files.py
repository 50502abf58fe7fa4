"""The two files of a stream, stereo.wav and events.json, in a folder of its own, read strictly. No torch."""

from __future__ import annotations

import wave
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from covo_rl.data.files import write_json
from covo_rl.data.read import DataError, Problem, broken, checked_lines, printable, read_text
from covo_rl.duplex.data import SLACK, DuplexStream, parse_stream, stream_content
from covo_rl.speech.grid import RATE

#: names of the two files
STEREO, EVENTS = "stereo.wav", "events.json"


def write_stream(folder: Path, stream: DuplexStream, wave_T2: np.ndarray) -> None:
    """Write both files of a stream into `folder`, which is made. wave_T2: (T, 2) float within [-1, 1] at 24 kHz.

    Raises:
        DataError: the stream is not as `parse_stream` wants it, or not as long as its wave; nothing is written.
    """
    content = stream_content(stream)
    parse_stream(content, str(folder / EVENTS))
    if wave_T2.ndim != 2 or wave_T2.shape[1] != 2:
        raise broken(folder / STEREO, f"a wave of shape {wave_T2.shape}: expected (samples, 2)")
    if what := _length_problem(stream, len(wave_T2)) or ("" if np.abs(wave_T2).max(initial=0) <= 1 else "it clips"):
        raise broken(folder / STEREO, what)
    folder.mkdir(parents=True, exist_ok=True)
    with wave.open(str(folder / STEREO), "wb") as file:
        file.setparams((2, 2, RATE, len(wave_T2), "NONE", ""))
        file.writeframes(np.round(wave_T2 * 32_767).astype("<i2").tobytes())
    write_json(folder / EVENTS, content, indent=1)


def read_stream(folder: str | Path) -> tuple[DuplexStream, np.ndarray]:
    """The stream of a folder and its wave, (T, 2) float32.

    Raises:
        DataError: everything that is wrong with either file.
    """
    stream, wave_T2 = read_events(Path(folder) / EVENTS), read_stereo(Path(folder) / STEREO)
    if what := _length_problem(stream, len(wave_T2)):
        raise broken(folder, what)
    return stream, wave_T2


def read_streams(folder: str | Path) -> dict[Path, DuplexStream]:
    """Folder of a stream -> the stream, for all that lie in `folder`, in order of their names; waves are not read.

    Raises:
        DataError: everything that is wrong with any of them, one that lacks a file, two of the same id, or none.
    """
    found = sorted({path.parent for name in (EVENTS, STEREO) for path in Path(folder).glob(f"*/{name}")})
    if not found:
        raise broken(folder, f"no stream: expected folders that hold {STEREO} and {EVENTS}")
    problems: list[Problem] = []
    streams = dict(checked_streams({path.name: path for path in found}, problems))
    if problems:
        raise DataError(str(folder), problems)
    return streams


def checked_streams(folders: Mapping[str, Path], problems: list[Problem]) -> Iterator[tuple[Path, DuplexStream]]:
    """Each folder with the stream that lies in it, of those whose events can be read; waves are not read.

    `folders` by the name under which what is wrong with one comes to `problems`, two of the same id too.
    """
    ids: dict[str, str] = {}
    for name, folder in folders.items():
        missing = [file for file in (EVENTS, STEREO) if not (folder / file).exists()]
        problems += [Problem(name, f"it has no {file}") for file in missing]
        if EVENTS in missing:
            continue
        try:
            stream = read_events(folder / EVENTS)
        except DataError as error:
            problems += [Problem(name, problem.what) for problem in error.problems]
            continue
        if (other := ids.setdefault(stream.id, name)) != name:
            problems.append(Problem(name, f"its id {printable(stream.id)} is also that of {other}"))
        yield folder, stream


def read_events(path: str | Path) -> DuplexStream:
    """The stream of an events.json.

    Raises:
        DataError: everything that is wrong with it.
    """
    lines = [*checked_lines([read_text(Path(path), "events of a stream are JSON")])]
    if faults := lines[0][2] if lines else ["it is empty"]:
        raise DataError(str(path), [Problem("file", what) for what in faults])
    return parse_stream(lines[0][1], str(path))


def read_stereo(path: str | Path) -> np.ndarray:
    """(T, 2) float32 of a wav of two channels, 24 kHz, 16 bit.

    Raises:
        DataError: there is no such file, it is cut, or of another kind.
    """
    wanted = f"a stream has 2 channels, 16 bit, {RATE} Hz: `ffmpeg -i IN -ac 2 -ar {RATE} -sample_fmt s16 OUT.wav`"
    try:
        with wave.open(str(path), "rb") as file:
            kind = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            expected, data = file.getnframes(), file.readframes(file.getnframes())
    except (OSError, EOFError) as error:
        raise broken(path, f"not a wav that can be read: {str(error) or 'it ends within its header'}") from error
    except wave.Error as error:  # floats, or a header of more than two channels' kind
        raise broken(path, f"not a wav that can be read: {error}; {wanted}") from error
    if kind != (2, 16, RATE):
        raise broken(path, f"{kind[0]} channels, {kind[1]} bit, {kind[2]} Hz; {wanted}")
    if not expected:
        raise broken(path, "it holds no sound")
    if len(data) != 4 * expected:
        raise broken(path, f"truncated, {len(data) // 4} of {expected} samples can be read; copy the file again")
    return np.frombuffer(data, "<i2").reshape(-1, 2).astype(np.float32) / 32_768


def _length_problem(stream: DuplexStream, samples: int) -> str:
    given, seconds = stream.seconds, samples / RATE
    return f"{seconds:.4f} s of sound, its events say {given:.4f} s" if abs(seconds - given) > SLACK else ""
