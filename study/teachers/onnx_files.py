"""The files of an ONNX model: its graph, and the weights that it keeps in files beside it.

Exporters store large weights beside the graph, which then holds their file's name alone. The names
are read from the graph itself, message by message, without the library ``onnx`` and without
loading the weights.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

_PARTS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""The messages of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto that may hold a tensor
within another message, by field number."""
_KEY, _VALUE = 1, 2
"""Fields of an entry of a tensor's ``external_data``."""
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
"""Kinds of fields of Protocol Buffers."""


def onnx_files(path: Path) -> list[Path]:
    """List an ONNX file and all files of weights that it names, whether they exist or not.

    A file that is no ONNX model is listed alone.
    """
    names: set[str] = set()
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        names.update(_locations(memoryview(data), "model"))
    except (OSError, ValueError, IndexError, RecursionError):
        return [path]
    return [path, *(path.parent / name for name in sorted(names))]


def _locations(data: memoryview, kind: str) -> Iterator[str]:
    """Yield the file name of each tensor in a message of this kind that has one."""
    parts = _PARTS[kind]
    for number, value in _fields(data):
        if number not in parts:
            continue
        if parts[number] != "entry":
            yield from _locations(value, parts[number])
            continue
        entry = {key: bytes(text).decode() for key, text in _fields(value)}
        if entry.get(_KEY) == "location":
            yield entry[_VALUE]


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of each field that has a length."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == _VARINT:
            _, place = _varint(data, place)
        elif kind == _LENGTH:
            length, place = _varint(data, place)
            if place + length > len(data):
                raise ValueError("a field must end within its message")
            yield tag >> 3, data[place : place + length]
            place += length
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            place += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field must be of a known kind, got {kind}")


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return the number that starts here, and the place after it."""
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7
