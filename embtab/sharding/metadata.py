"""What the `.metadata` of a checkpoint folder says: which part of which tensor lies where.

torch.distributed.checkpoint writes it as a pickle, and to load a pickle is to run what it names. Here its instructions
are read as data: a class stays a name, an object stays what was written of it, and nothing is imported or called. What
comes out is then checked field by field, and against the files that are there.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from embtab.errors import UserError

_FILE = re.compile(r"__\d+_\d+\.distcp")
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PLAIN = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


@dataclass(eq=False)
class Said:
    """An object as it was written, or its class or function by name where nothing was made of it."""

    name: str
    args: Any = None
    state: Any = None


class _WrongError(Exception):
    """What was written cannot be."""


class Reader(FileSystemReader):
    """Reads the tensors of a folder; `tensors` says which there are.

    Raises:
        UserError: when `.metadata` is missing, damaged, or claims what is not there.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            fields = _fields(_parsed((folder / ".metadata").read_bytes()), "Metadata")
            self.tensors = {_text(name): _tensor(entry) for name, entry in fields["state_dict_metadata"].items()}
            places = dict(_place(index, info, folder) for index, info in fields["storage_data"].items())
            _check_lengths(self.tensors, places)
            self.metadata = Metadata({**self.tensors}, None, places, StorageMeta(), _text(fields["version"]))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, _WrongError):
            raise UserError(f"{folder}: damaged, or not a checkpoint made by a sharded run") from None

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        """What was read at the start; torch's own method would load the pickle."""
        return self.metadata


def _parsed(data: bytes) -> Any:
    """What a pickle says, of the instructions that describe tensors; others are refused."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for code, value, _ in pickletools.genops(data):
        match code.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[code.name])
            case name if name in _LITERALS:
                stack.append(value)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_taken(stack, len(stack) - int(code.name[-1]))))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(_taken(stack, marks.pop())))
            case "APPEND":
                _last(stack, 2, list).append(stack.pop())
            case "APPENDS":
                items = _taken(stack, marks.pop())
                _last(stack, 1, list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = _taken(stack, marks.pop() if code.name == "SETITEMS" else len(stack) - 2)
                _last(stack, 1, dict).update(zip(items[::2], items[1::2], strict=True))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "STACK_GLOBAL":
                stack.append(Said(".".join(_taken(stack, len(stack) - 2))))
            case "REDUCE" | "NEWOBJ":
                of, args = _taken(stack, len(stack) - 2)
                stack.append(Said(of.name, args))
            case "BUILD":
                of, state = _taken(stack, len(stack) - 2)
                stack.append(of)
                _last(stack, 1, Said).state = state
            case _:
                raise _WrongError(code.name)
    return stack.pop()


def _taken(stack: list[Any], start: int) -> list[Any]:
    """What lies on the stack from `start` on, which leaves it."""
    if not 0 <= start <= len(stack):
        raise _WrongError("stack")
    items = stack[start:]
    del stack[start:]
    return items


def _last(stack: list[Any], at: int, kind: type) -> Any:
    _need(isinstance(stack[-at], kind))
    return stack[-at]


def _check_lengths(tensors: Mapping[str, TensorStorageMetadata], places: Mapping[MetadataIndex, _StorageInfo]) -> None:
    """Every part has a place, which is as long as its numbers at least."""
    for name, tensor in tensors.items():
        for i, chunk in enumerate(tensor.chunks):
            info = places[MetadataIndex(name, chunk.offsets, i)]
            _need(math.prod(chunk.sizes) * tensor.properties.dtype.itemsize <= info.length)


def _tensor(said: Said) -> TensorStorageMetadata:
    """A tensor whose parts fill it: as many numbers as it has, each inside."""
    fields = _fields(said, "TensorStorageMetadata")
    size, dtype = _size(fields["size"]), _PLAIN[_as(fields["properties"], "TensorProperties").state[0].name]
    chunks = []
    for each in fields["chunks"]:
        part = _fields(each, "ChunkStorageMetadata")
        offsets, sizes = _size(part["offsets"]), _size(part["sizes"])
        _need(len(offsets) == len(sizes) == len(size))
        _need(all(at + n <= end for at, n, end in zip(offsets, sizes, size, strict=True)))
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    _need(sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(size))
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _place(index: Said, info: Said, folder: Path) -> tuple[MetadataIndex, _StorageInfo]:
    """Where a part lies: inside a file of the folder."""
    key = _fields(index, "MetadataIndex")
    where = _fields(info, "_StorageInfo", "torch.distributed.checkpoint.filesystem")
    file, offset, length = where["relative_path"], where["offset"], where["length"]
    _need(_FILE.fullmatch(file) and not (folder / file).is_symlink())
    _need(_is_size(offset) and _is_size(length) and offset + length <= (folder / file).stat().st_size)
    _need(not where.get("transform_descriptors"))
    return MetadataIndex(_text(key["fqn"]), _size(key["offset"]), key.get("index")), _StorageInfo(file, offset, length)


def _fields(said: Any, kind: str, module: str = "torch.distributed.checkpoint.metadata") -> Mapping[str, Any]:
    state = _as(said, kind, module).state
    _need(isinstance(state, dict))
    found: Mapping[str, Any] = state
    return found


def _as(said: Any, kind: str, module: str = "torch.distributed.checkpoint.metadata") -> Said:
    _need(isinstance(said, Said) and said.name == f"{module}.{kind}")
    found: Said = said
    return found


def _size(said: Any) -> torch.Size:
    sizes: Sequence[int] = _as(said, "Size", "torch").args[0]
    _need(isinstance(sizes, tuple) and len(sizes) <= 8 and all(map(_is_size, sizes)))
    return torch.Size(sizes)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _text(value: Any) -> str:
    _need(isinstance(value, str))
    return str(value)


def _need(condition: Any) -> None:
    if not condition:
        raise _WrongError
