"""Which recording is what, whose, and in which split.

A `Recording` has a label (what is heard), a source (the speaker, kit, species or chord that it is split by) and a
path. All recordings of a source are in one split; `named voices` are the exception that the question asks for: there
the source is the sentence, the same sentence of all voices in the same split.
"""

from __future__ import annotations

import hashlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "validation", "test")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: package -> (speaker, folder of its sounds); these speak the numbers of the train split
ASTERISK = {
    "asterisk-core-sounds-en-wav": ("Allison", "en_US_f_Allison"),
    "asterisk-core-sounds-es-wav": ("Allison", "es_MX_f_Allison"),
    "asterisk-core-sounds-fr-wav": ("June", "fr_CA_f_June"),
    "asterisk-core-sounds-it-wav": ("Carlo", "it_IT_m_Carlo"),
    "asterisk-core-sounds-ru-wav": ("Ivrvoice", "ru_RU_f_IvrvoiceRU"),
    "asterisk-prompt-es-co": ("Avatar", "es"),
    "asterisk-prompt-fr-armelle": ("Armelle", "fr"),
    "asterisk-prompt-it-menardi-wav": ("Menardi", "it_IT_f_Menardi"),
}
VOICES = ("Allison", "June", "Carlo", "Ivrvoice")
#: other speakers of the same languages: suffix of tuxpaint's numbers -> split
TUXPAINT = {"_fr": "validation", "_it": "validation", "": "test", "_en_GB": "test", "_es": "test", "_ru": "test"}
#: klettres' voices, by folder, without those whose files are cut (ar, ml); German and Low German, Russian and
#: Ukrainian, both English may share a speaker and are together
SPOKEN = {
    "train": ("de", "nds", "en", "en_GB", "es", "fr", "hu", "it", "lt", "ru", "uk", "tn"),
    "validation": ("da", "he", "nl"),
    "test": ("cs", "nb", "pt_BR"),
}
#: kits by split; those of one author, who may have used a sample twice, are together
KITS = {
    "train": ("ForzeeStereo", "Millo-Drums_v.1", "Millo_MultiLayered2", "Millo_MultiLayered3", "ElectricEmpireKit",
              "rumpf_kit_z01_h2"),
    "validation": ("ColomboAcousticDrumkit", "VariBreaks", "HardElectro1"),
    "test": ("The Black Pearl 1.0", "Gimme A Hand 1.0", "BJA_Pacific"),
}  # fmt: skip
DRUMS = {
    "kick": r"kick|bass ?drum", "snare": r"snare", "hi-hat": r"hi.?hat|\bhh\b|\bhat\b|\bohh\b", "tom": r"\btom\b",
    "cymbal": r"crash|ride|china|splash|cymbal", "clap": r"clap",
}  # fmt: skip
ODD = re.compile(r"rim|roll|choke|swish|bell", re.IGNORECASE)
LANGUAGE_SUFFIX = re.compile(r"_desc|_[a-z]{2,3}(_[A-Za-z]+)?$")


@dataclass(frozen=True)
class Recording:
    """`group`: voices, numbers, speech, drums, animal or guitar."""

    group: str
    label: str
    source: str
    split: str
    path: Path


def split_of(name: str) -> str:
    """A fixed split for a source without one of its own: 70, 10 and 20 % by the hash of its name."""
    share = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.7 else "validation" if share < 0.8 else "test"


def find_recordings(root: Path) -> list[Recording]:
    """All recordings of the packages unpacked in `root/NAME`, in a fixed order."""
    parts = (_asterisk, _tuxpaint_numbers, _klettres, _drums, _animals, _guitar)
    return sorted(
        (r for part in parts for r in part(root)), key=lambda r: (r.group, r.split, r.label, r.source, r.path)
    )


def _asterisk(root: Path) -> Iterator[Recording]:
    for package, (speaker, folder) in ASTERISK.items():
        sounds = root / package / "usr" / "share" / "asterisk" / "sounds" / folder
        files = [path for end in ("wav", "gsm") for path in sounds.rglob(f"*.{end}")]
        for path in files:
            if path.parent.name == "digits" and path.stem in map(str, range(10)):
                yield Recording("numbers", NUMBERS[int(path.stem)], f"{speaker} {folder}", "train", path)
            elif speaker in VOICES and "core" in package and path.parent.name not in ("silence", "digits", "letters"):
                yield Recording("voices", speaker, path.stem, split_of(path.stem), path)


def _tuxpaint_numbers(root: Path) -> Iterator[Recording]:
    folder = root / "tuxpaint-stamps-default" / "usr" / "share" / "tuxpaint" / "stamps" / "symbols" / "math"
    for suffix, split in TUXPAINT.items():
        for i, number in enumerate(NUMBERS):
            if (path := folder / f"{i}{suffix}.ogg").is_file():
                yield Recording("numbers", number, f"tuxpaint{suffix or '_en'}", split, path)


def _klettres(root: Path) -> Iterator[Recording]:
    for split, voices in SPOKEN.items():
        for voice in voices:
            for path in (root / "klettres-data" / "usr" / "share" / "klettres" / voice).rglob("*.ogg"):
                yield Recording("speech", "voice", f"klettres {voice}", split, path)


def _drums(root: Path) -> Iterator[Recording]:
    kits = root / "hydrogen-drumkits" / "usr" / "share" / "hydrogen" / "data" / "drumkits"
    for split, names in KITS.items():
        for kit in names:
            for instrument, files in instruments(kits / kit / "drumkit.xml"):
                labels = [label for label, pattern in DRUMS.items() if re.search(pattern, instrument, re.IGNORECASE)]
                if len(labels) == 1 and not ODD.search(instrument):
                    yield from (Recording("drums", labels[0], kit, split, kits / kit / name) for name in files)


def instruments(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(Name, files) of the instruments of a Hydrogen kit; without those of no file or an empty one."""
    for element in ElementTree.parse(path).iter():
        if element.tag.split("}")[-1] == "instrument":
            names = [child.text or "" for child in element if child.tag.split("}")[-1] == "name"]
            files = [node.text for node in element.iter() if node.tag.split("}")[-1] == "filename" and node.text]
            files = [name for name in dict.fromkeys(files) if not name.startswith("emptySample")]
            if names and files:
                yield names[0], files


def _animals(root: Path) -> Iterator[Recording]:
    folder = root / "tuxpaint-stamps-default" / "usr" / "share" / "tuxpaint" / "stamps" / "animals"
    heard: set[bytes] = set()
    for path in sorted(folder.rglob("*.ogg")):
        if LANGUAGE_SUFFIX.search(path.stem):
            continue  # the name of the animal, spoken
        digest = hashlib.sha256(path.read_bytes()).digest()
        if digest not in heard:  # one sound may stand for two animals
            heard.add(digest)
            species = re.split(r"[_\d]", path.stem)[0]
            yield Recording("animal", "animal", species, split_of(f"animal {species}"), path)


def _guitar(root: Path) -> Iterator[Recording]:
    folder = root / "hydrogen-drumkits-effects" / "usr" / "share" / "hydrogen" / "data" / "drumkits"
    for path in (folder / "belofilms_GuitarStrums").glob("*.flac"):
        chord = path.stem.split("_")[0]
        yield Recording("guitar", "guitar", chord, split_of(f"guitar {chord}"), path)
