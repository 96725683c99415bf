"""Reading the pickle that the authors published their weights in, without executing anything of it.

Their files hold a dict of module names to dicts of numpy arrays. A pickle is a program: it names functions and calls
them. Here every name that such a file needs stands for a stub of ours, every other is refused, and no code of numpy
sees the file before its numbers have been checked. Nothing is allocated on the file's say-so: arrays are views of its
bytes.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfree.config import UserError

Tree = dict[str, dict[str, NDArray[Any]]]  # module name -> parameter name -> array

_DTYPES = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


class _DType:
    """Stands for numpy.dtype: its code, such as "f4", and its byte order."""

    def __init__(self, code: Any, *_flags: Any) -> None:
        if not isinstance(code, str) or code.lstrip("<>=|") not in _DTYPES:
            raise pickle.UnpicklingError("it has arrays of something else than numbers")
        self.code, self.order = code.lstrip("<>=|"), "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]

    def real(self) -> np.dtype[Any]:
        return np.dtype(self.order.replace("=", "<") + self.code)


class _Array:
    """Stands for numpy.ndarray: filled by the state that follows its construction."""

    def __init__(self, *_arguments: Any) -> None:
        self.array: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _DType)):
            raise pickle.UnpicklingError("an array has an unknown form")
        _version, shape, dtype, fortran, content = state
        if isinstance(content, str):  # protocol 2 writes bytes as text
            content = content.encode("latin-1")
        self.array = _view(content, dtype, shape, bool(fortran))


def _view(content: Any, dtype: _DType, shape: Any, fortran: bool) -> NDArray[Any]:
    if not isinstance(content, bytes) or not isinstance(shape, tuple) or len(shape) > 8:
        raise pickle.UnpicklingError("an array has an unknown form")
    if not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise pickle.UnpicklingError("an array has an impossible shape")
    flat = np.frombuffer(content, dtype.real())
    if flat.size != int(np.prod(shape, dtype=object)):
        raise pickle.UnpicklingError(f"an array of shape {shape} has {flat.size} numbers")
    return flat.reshape(shape, order="F" if fortran else "C")


def _scalar(dtype: Any, content: Any = b"") -> _Array:
    """Stands for numpy's constructor of scalars."""
    out = _Array()
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("a number has an unknown form")
    out.array = _view(content, dtype, (), False)
    return out


def _encode(text: Any, encoding: Any = None) -> bytes:
    """Stands for _codecs.encode, by which protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes have an unknown form")
    return text.encode("latin-1")


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """Stands for what protocol 5 makes arrays with."""
    out = _Array()
    if not isinstance(dtype, _DType) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array has an unknown form")
    out.array = _view(content, dtype, shape, order == "F")
    return out


def _empty(*arguments: Any) -> dict[str, Any]:
    """Stands for collections.OrderedDict, which is made empty and filled later."""
    if arguments:
        raise pickle.UnpicklingError("a dict has an unknown form")
    return {}


_STUBS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _empty,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or len(name) > 500:
        raise pickle.UnpicklingError("a name is no text, or too long")


# operations that make or find objects in other ways than by the names above
_REFUSED = (
    *("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER"),
    *("READONLY_BUFFER", "DICT", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
)
_Base: Any = pickle._Unpickler  # in Python: the one in C allocates by lengths it reads


class _Unpickler(_Base):  # type: ignore[misc]
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STUBS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STUBS[module, name]

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], (_Array, _DType)):
            raise pickle.UnpicklingError("it changes an object")
        super().load_build()

    # A dict hashes its keys, and a tuple in a tuple in a tuple, each twice, takes exponential time for that.
    def load_setitem(self) -> None:
        _check_name(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _check_name(key)
        super().load_setitems()

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))  # as bytes: no more than there are

    def load_refused(self) -> None:
        raise pickle.UnpicklingError("it has operations that arrays do not need")

    dispatch = {  # noqa: RUF012 (a table of the base class, made smaller)
        **_Base.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        **dict.fromkeys((getattr(pickle, name)[0] for name in _REFUSED), load_refused),
    }


def read_haiku(path: Path) -> Tree:
    """The tree of parameters in a pickle such as the authors' F0_haiku.npz; nothing in it is executed.

    Raises:
        UserError: no such file, or anything else than a dict of dicts of arrays of numbers.
    """
    try:
        content = path.read_bytes()
        tree = _Unpickler(io.BytesIO(content)).load()
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except MemoryError:
        raise
    except Exception as e:  # a broken program may fail in any way
        raise UserError(f"{path} is not a plain pickle of arrays: {str(e)[:200] or type(e).__name__}") from e
    found = _checked(tree, path)
    if sum(a.nbytes for parameters in found.values() for a in parameters.values()) > len(content):
        raise UserError(f"{path} has arrays under several names")
    return found


def _checked(tree: Any, path: Path) -> Tree:
    if not isinstance(tree, dict) or not all(isinstance(parameters, dict) for parameters in tree.values()):
        raise UserError(f"{path} does not hold a dict of modules")
    found: Tree = {}
    for module, parameters in tree.items():
        for name, value in parameters.items():
            if not isinstance(value, _Array) or value.array is None:
                raise UserError(f"{path}: {module}/{name} is not an array")
            found.setdefault(module, {})[name] = value.array
    return found


def write_haiku(tree: Tree) -> bytes:
    """The bytes of a file that the authors' code reads: one pickle of a dict of dicts of arrays."""
    return pickle.dumps({m: {n: np.asarray(a) for n, a in p.items()} for m, p in tree.items()}, protocol=4)
