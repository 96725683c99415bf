"""Whether a file of torch may be given to torch: what its container holds, and how large the values of its pickle get.

torch.load with weights_only executes nothing. But a few hundred bytes of pickle can say a tuple of 2^60 parts, each
level of which has the one before twice, and hashing or printing it takes for ever; and a zip of a megabyte can say a
storage of gigabytes. Both are told here by counting, before anything is made.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from typing import Any, BinaryIO

_MOST_ARGUMENTS = 1000  # parts of the arguments of a call: a tensor has some twenty
_PER_BYTE = 64  # parts of a value that a byte of pickle may come to: what is named twice is counted twice
_PICKLES = 5  # of the format before zip files

_PLAIN = frozenset(
    (
        *("NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"),
        *("LONG1", "GLOBAL", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
    )
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class BadTorchFile(ValueError):
    """What is wrong with the file."""


def check_torch_file(f: BinaryIO) -> None:
    """Raises BadTorchFile, or another error of a file that is broken; the file is read from its start."""
    if f.read(2) == b"PK":
        for content in _zipped_pickles(f):
            _check_pickle(io.BytesIO(content), len(content))
    else:
        size = f.seek(0, io.SEEK_END)
        f.seek(0)
        for _ in range(_PICKLES):
            _check_pickle(f, size)
    f.seek(0)


def _zipped_pickles(f: BinaryIO) -> list[bytes]:
    size = f.seek(0, io.SEEK_END)
    with zipfile.ZipFile(f) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise BadTorchFile("it unpacks to more than it is")
        if len({m.filename for m in members}) < len(members):
            raise BadTorchFile("a member comes twice")
        return [archive.read(m) for m in members if m.filename.endswith("data.pkl")]


class _Value:
    """How many parts a value has, and whether it is a dict, whose names were looked at as they came."""

    __slots__ = ("is_dict", "parts")

    def __init__(self, parts: int = 1, is_dict: bool = False) -> None:
        self.parts, self.is_dict = parts, is_dict


def _check_pickle(f: BinaryIO, size: int) -> None:
    """Count the parts of every value of a pickle, by the operations that torch takes and no others."""
    counter = _Counter(_PER_BYTE * size + _MOST_ARGUMENTS)
    for operation, argument, _ in pickletools.genops(f):
        counter.do(operation.name, argument)


class _Counter:
    def __init__(self, most: int) -> None:
        self.most = most
        self.stack: list[_Value] = []
        self.below: list[list[_Value]] = []  # stacks under a mark
        self.memo: dict[int, _Value] = {}

    def do(self, name: str, argument: Any) -> None:
        """One operation. Raises IndexError or KeyError where the pickle is broken."""
        stack = self.stack
        if name in _PLAIN:
            stack.append(_Value(is_dict=name == "EMPTY_DICT"))
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "TUPLE" or name in _TUPLES:
            items = self._marked() if name == "TUPLE" else [stack.pop() for _ in range(_TUPLES[name])]
            self.stack.append(self._grown(_Value(), items))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._marked()
            self._grown(self.stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._marked()
            if any(key.parts > 1 for key in items[::2]):
                raise BadTorchFile("a name is no text")
            self._grown(self.stack[-1], items)
        else:
            self._call(name)

    def _call(self, name: str) -> None:
        if name in ("REDUCE", "NEWOBJ", "BINPERSID", "BUILD"):
            given = self.stack.pop()
            if given.parts > _MOST_ARGUMENTS and not (name == "BUILD" and given.is_dict):
                raise BadTorchFile(f"a call has {given.parts} arguments")
            if name == "BUILD":  # changes what is there
                self._grown(self.stack[-1], [given])
            elif name == "BINPERSID":
                self.stack.append(_Value())
            else:
                self.stack[-1] = _Value(1 + given.parts)
        elif name not in ("PROTO", "STOP"):
            raise BadTorchFile("it has operations that tensors do not need")

    def _marked(self) -> list[_Value]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def _grown(self, value: _Value, items: list[_Value]) -> _Value:
        value.parts += sum(item.parts for item in items)
        if value.parts > self.most:
            raise BadTorchFile("a value has more parts than its pickle has room for")
        return value
