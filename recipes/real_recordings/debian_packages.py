"""Debian packages by pinned version and hash: apt fetches, dpkg-deb unpacks into a folder, nothing is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from covo_rl.data.files import file_sha256, write_atomically
from covo_rl.data.terminal import say
from covo_rl.types import UserError

PINS = Path(__file__).parent / "packages.yaml"


class PackageError(UserError, RuntimeError):
    """A package cannot be fetched, or is another than the pinned one; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """`version` as apt writes it, epoch included."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


def pinned(path: Path = PINS) -> list[Package]:
    """The packages of packages.yaml."""
    return [Package(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def fetch(package: Package, folder: Path) -> Path:
    """The package's .deb in `folder`, fetched by apt where it is not there yet, with the pinned hash.

    Raises:
        PackageError: no apt, another version on offer, or another hash.
    """
    path = folder / package.file
    if not path.is_file():
        by_hand = (
            f"get {package.file} from https://snapshot.debian.org/binary/{package.name}/ and put it into {folder}; "
            "its hash is checked here"
        )
        if shutil.which("apt-get") is None:
            raise PackageError(f"{package.name}: no apt-get on this system (Debian and Ubuntu have it): {by_hand}")
        say(f"fetching {package.name} {package.version}")
        folder.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "download", f"{package.name}={package.version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode or not path.is_file():
            said = (done.stderr.strip() or "no message").splitlines()[-1]
            raise PackageError(
                f"{package.name}={package.version}: apt-get download failed: {said}. Run `apt-get update` first; "
                f"where your release has another version, {by_hand}"
            )
    if (digest := file_sha256(path)) != package.sha256:
        raise PackageError(
            f"{path}: its SHA-256 is {digest}, packages.yaml says {package.sha256}. Delete the file and start again; "
            "if it differs again, it is not the package that the figures belong to: do not unpack it"
        )
    return path


def unpack(package: Package, deb: Path, folder: Path) -> Path:
    """The package's files, in `folder/NAME`; made once per hash.

    Raises:
        PackageError: no dpkg-deb, or it refuses the file.
    """
    target = folder / package.name
    mark = folder / f"{package.name}.sha256"
    if target.is_dir() and mark.is_file() and mark.read_text() == package.sha256:
        return target
    if shutil.which("dpkg-deb") is None:
        raise PackageError(f"{deb}: there is no dpkg-deb on this system; install the package `dpkg`")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    done = subprocess.run(["dpkg-deb", "-x", str(deb), str(target)], capture_output=True, text=True)
    if done.returncode:
        raise PackageError(f"{deb}: dpkg-deb: {done.stderr.strip()}")
    write_atomically(mark, lambda file: file.write(package.sha256))
    return target


def licences(package: Package, folder: Path) -> list[str]:
    """What the package's copyright file names as licences, in its order; what has no such field is quoted."""
    path = folder / "usr" / "share" / "doc" / package.name / "copyright"
    text = path.read_text(encoding="utf-8", errors="replace")
    if fields := re.findall(r"^ ?License: *(\S+(?: with .*)?)$", text, re.MULTILINE):
        return list(dict.fromkeys(field.strip() for field in fields))
    sentences = re.findall(r"terms of[^;.]*|Redistribution and use[^;.:]*", text)  # before the format had fields
    return [" ".join(sentence.split()) for sentence in sentences[:1]] or ["see the copyright file"]


def write_sources(packages: Sequence[Package], root: Path, path: Path) -> None:
    """SOURCES.md: version, hash and licences of each package, and its whole copyright file."""
    lines = ["# Where the sounds come from", "", "| package | version | licences | SHA-256 |", "|---|---|---|---|"]
    lines += [f"| {p.name} | {p.version} | {'; '.join(licences(p, root / p.name))} | `{p.sha256}` |" for p in packages]
    lines += ["", "The licences are of the recordings; whoever passes clips on passes these terms on. In full:", ""]
    for p in packages:
        text = (root / p.name / "usr" / "share" / "doc" / p.name / "copyright").read_text(
            encoding="utf-8", errors="replace"
        )
        lines += [f"## {p.name}", "", *(f"    {line}".rstrip() for line in text.splitlines()), ""]
    write_atomically(path, lambda file: file.write("\n".join(lines)))
