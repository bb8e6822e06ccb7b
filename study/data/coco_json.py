"""Read an annotation file in COCO's format record by record, with one record in memory.

COCO's file of training people is some 400 MB of text, most of it outlines that the study does not
use; parsed as one document it takes gigabytes. Here a record is dropped once its reader has
turned it into columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from study.errors import InputError

LISTS = ("images", "annotations")
"""Parts that are read record by record; other parts are small."""
WHERE = "change data.root or data.{train,val}.annotations"
COMPRESSED = (b"\x1f\x8b", b"PK\3\4", b"BZh", b"\xfd7zX")
"""First bytes of gzip, zip, bzip2 and xz files."""
CHUNK = 1 << 20
"""Characters read at once."""
LONGEST_WORD = 32
"""A JSON error this close to the end of the window may be a word or number that is cut off."""
UNTERMINATED = "Unterminated string"
"""Python's error for a string that is cut off; its position is the string's start."""
DECODER = json.JSONDecoder()


def read_records(annotations: Path) -> Iterator[tuple[str, Any]]:
    """Yield each record of the two lists and every other part, in the file's order.

    A pair is the part's key and the record or part: ("images", {...}), ("info", {...}).

    Raises:
        InputError: the file does not exist, is no JSON, or lacks one of the two lists.
    """
    if not annotations.parent.is_dir():
        raise InputError(f"the data folder must exist, got {annotations.parent}; {WHERE}")
    if not annotations.is_file():
        raise InputError(f"the annotation file must exist, got {annotations}; {WHERE}")
    try:
        with annotations.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(
            f"the annotation file must be one that can be read, got {error.strerror!r} for "
            f"{annotations}; {WHERE}"
        ) from error
    if start.startswith(COMPRESSED):
        raise InputError(
            f"the annotation file must be JSON text, got a compressed file, {annotations}; unpack "
            "it first"
        )
    encoding = json.detect_encoding(start)
    with annotations.open(encoding=encoding) as text:
        reader = _Reader(text)
        try:
            yield from _parts(reader, annotations)
        except json.JSONDecodeError as error:
            line, column = reader.position_of(error)
            raise InputError(
                f"the annotation file must be valid JSON, got {error.msg!r} at line {line}, "
                f"column {column} of {annotations}; fetch or write the file again"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(
                f"the annotation file must be JSON text, got other bytes in {annotations}; {WHERE}"
            ) from error
        except InputError:
            raise
        except (RecursionError, ValueError) as error:  # lists too deep, a number too long
            raise InputError(
                f"the annotation file must be one that can be read, got {str(error)!r} in "
                f"{annotations}; {WHERE}"
            ) from error


def load_document(annotations: Path) -> dict[str, Any]:
    """Parse the whole file without outlines: an object with ``images`` and ``annotations``."""
    document: dict[str, Any] = {key: [] for key in LISTS}
    for key, value in read_records(annotations):
        if key in LISTS:
            document[key].append(without_outline(value))
        else:
            document[key] = value
    return document


def without_outline(record: Any) -> Any:
    """Remove the record's ``segmentation``, which is most of COCO's file; return the record."""
    if isinstance(record, dict):
        record.pop("segmentation", None)
    return record


def _parts(reader: _Reader, annotations: Path) -> Iterator[tuple[str, Any]]:
    missing = list(LISTS)
    if reader.peek() != "{":
        reader.value()
    else:
        for _ in reader.items("{", "}"):
            key = reader.key()
            if key not in LISTS:
                yield key, reader.value()
            elif reader.peek() != "[":
                break
            else:
                for _ in reader.items("[", "]"):
                    yield key, reader.value()
                missing = [name for name in missing if name != key]
    if missing:
        raise InputError(
            "the annotation file must be in COCO's format, an object with the lists 'images' "
            f"and 'annotations', got no list {missing[0]!r} in {annotations}; {WHERE}"
        )
    if reader.peek():
        reader.refuse("Extra data")


class _Reader:
    """Position in a JSON text that is read through a window."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._place = 0
        self._line, self._column = 1, 1  # of the window's first character

    def peek(self) -> str:
        """Return the next character that is not blank; empty at the end of the file."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in " \t\n\r":
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read_on():
                return ""

    def items(self, opening: str, closing: str) -> Iterator[None]:
        """Yield at the start of each member of a list or object."""
        self._take(opening)
        if self.peek() == closing:
            self._place += 1
            return
        while True:
            yield
            if self.peek() == closing:
                self._place += 1
                return
            self._take(",")

    def key(self) -> str:
        """Read the key of an object's member and the colon after it."""
        if self.peek() != '"':
            self.refuse("Expecting property name enclosed in double quotes")
        key = str(self.value())
        self._take(":")
        return key

    def value(self) -> Any:
        """Read the next JSON value."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - LONGEST_WORD
                is_cut |= error.msg.startswith(UNTERMINATED)
                if not is_cut or not self._read_on():
                    raise
                continue
            # A number at the end of the window may continue.
            if end < len(self._text) or not self._read_on():
                self._place = end
                return value

    def refuse(self, reason: str) -> None:
        """Raise the error for text that is not JSON here."""
        raise json.JSONDecodeError(reason, self._text, self._place)

    def position_of(self, error: json.JSONDecodeError) -> tuple[int, int]:
        """Return line and column, from 1, of an error in the window."""
        if error.lineno > 1:
            return self._line + error.lineno - 1, error.colno
        return self._line, self._column + error.colno - 1

    def _take(self, wanted: str) -> None:
        if self.peek() != wanted:
            self.refuse(f"Expecting {wanted!r} delimiter" if self.peek() else "Expecting value")
        self._place += 1

    def _read_on(self) -> bool:
        """Move the window on: drop what was taken, read at least as much as remains."""
        rest = self._text[self._place :]
        more = self._file.read(max(CHUNK, len(rest)))
        if more:
            newlines = self._text.count("\n", 0, self._place)
            start = self._text.rfind("\n", 0, self._place)
            self._column = self._place - start if newlines else self._column + self._place
            self._line += newlines
            self._text, self._place = rest + more, 0
        return bool(more)
