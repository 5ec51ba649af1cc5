"""Folders that vouch for themselves: config.json lists every file with its sha256, and carries a digest of its own.

NumPy-free and torch-free. Nothing that a folder claims is believed before it was compared with what lies there: it may
come from anywhere. Every check says in one line what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embtab import files
from embtab.errors import UserError

CONFIG = "config.json"
MAX_JSON = 100_000_000  # bytes; safetensors' own limit for its header

_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

Config = Mapping[str, Any]


class BundleError(UserError):
    """A bundle is damaged, incomplete or not a bundle; the message names folder, file and what is wrong."""


def write_signed(folder: Path, about: Config) -> None:
    """Writes config.json: `about`, the length and sha256 of every file that lies in the folder, and its own digest."""
    mode: int | None = None
    for path in sorted(folder.iterdir()):
        mode = mode or _plain_mode(folder)
        path.chmod(mode)  # safetensors makes its files private
        files.sync(path)
    listed = {path.name: path for path in sorted(folder.iterdir())}
    described = {name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for name, path in listed.items()}
    zeros = "0" * 64
    whole = {**about, "files": described, "sha256": zeros}
    text = json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    digest = config_digest(text.encode(), zeros)
    files.write_text(folder / CONFIG, text.replace(f'"sha256": "{zeros}"', f'"sha256": "{digest}"'))


def _plain_mode(folder: Path) -> int:
    """The mode that new files get here."""
    probe = folder / ".mode"
    probe.touch()
    try:
        return probe.stat().st_mode
    finally:
        probe.unlink()


def read_signed(folder: Path, form: str, version: int, what: str) -> dict[str, Any]:
    """config.json, its own digest and its list of files checked.

    Args:
        folder: where it lies.
        form: the "format" it must have.
        version: the "version" it must have.
        what: what the folder should be, such as "a bundle", for the message.

    Raises:
        BundleError: when it is absent, altered, of another format or version, or lists files that cannot be.
    """
    path = folder / CONFIG
    if not path.is_file() or path.is_symlink():
        raise BundleError(f"{folder}: not {what} (no {CONFIG})")
    if path.stat().st_size > MAX_JSON:
        raise BundleError(f"{path}: larger than {MAX_JSON} bytes")
    text = path.read_bytes()
    config = parse_json(text, path)
    if config.get("format") != form:
        raise BundleError(f"{path}: not the description of {what} ({form})")
    if config.get("version") != version or isinstance(config["version"], bool):
        raise BundleError(f"{path}: version {config.get('version')!r}; this embtab reads version {version}")
    if config.get("sha256") != config_digest(text, config.get("sha256")):
        raise BundleError(f"{path}: altered since it was written (its sha256 does not match)")
    with refused(path):
        for name, entry in config["files"].items():
            need(_FILE_NAME.fullmatch(name) and name != CONFIG, f"file name {name!r} is not allowed")
            need(is_int(entry["bytes"], 0, 2**63), f"file {name!r}: bytes {entry['bytes']!r}")
            need(isinstance(entry["sha256"], str) and _DIGEST.fullmatch(entry["sha256"]), f"file {name!r}: no sha256")
    return config


def config_digest(text: bytes, written: Any) -> str:
    """The sha256 of config.json's bytes, its own 64 hexadecimal digits replaced by zeros."""
    if not isinstance(written, str) or not _DIGEST.fullmatch(written) or text.count(written.encode()) != 1:
        return "none"
    return hashlib.sha256(text.replace(written.encode(), b"0" * 64)).hexdigest()


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """The object in `text`; no key twice, no NaN.

    Raises:
        BundleError: when it is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: damaged JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise BundleError(f"{path}: damaged JSON: not an object")
    return parsed


class _WrongError(Exception):
    """An entry of config.json that cannot be."""


class refused:  # noqa: N801 (reads as a statement: with refused(path): ...)
    """Turns what a check of config.json's entries finds wrong into one line about the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, _WrongError | KeyError | TypeError | AttributeError | OverflowError):
            what = f"no entry {error}" if isinstance(error, KeyError) else str(error)
            what = what if len(what) <= 300 else f"{what[:297]}..."
            raise BundleError(f"{self.path}: {what}") from None


def need(condition: Any, what: str) -> None:
    """A check, inside `refused`, that an entry is what it must be."""
    if not condition:
        raise _WrongError(what)


def is_int(value: Any, low: int, high: int) -> bool:
    """Whether a JSON value is a whole number in [low, high)."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def check_files(folder: Path, config: Config, verify: bool) -> None:
    """The folder holds the listed files and no other, each of its size and, where `verify`, of its sha256.

    Raises:
        BundleError: when it does not.
    """
    listed = config["files"]
    for entry in sorted(folder.iterdir()):
        if entry.name != CONFIG and entry.name not in listed:
            raise BundleError(f"{entry}: not part of the bundle; remove it")
    for name, about in listed.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise BundleError(f"{path}: missing; copy the whole bundle again")
        size = path.stat().st_size
        if size != about["bytes"]:
            raise BundleError(f"{path}: {size} bytes where {about['bytes']} were written; copy the whole bundle again")
        if verify and file_digest(path) != about["sha256"]:
            raise BundleError(f"{path}: damaged (its sha256 does not match); copy the whole bundle again")


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
