"""Tar shards are read by random access and say what a folder says; nothing in them runs, leads out or fills memory."""

from __future__ import annotations

import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from image_sets import Entry, samples, webdataset, write_folder, write_tar
from normfree.config import UserError
from normfree.data.decode import BadImage, decode
from normfree.data.sources import (
    Source,
    cache,
    describe,
    fingerprint,
    open_data,
    open_folder,
    open_held_out,
    open_validation,
    shard_index,
    shards,
)
from normfree.data.sources.arrays import ArraySource
from normfree.data.sources.shards import ShardSource, open_shards
from normfree.data.sources.tar import BLOCK, BrokenTar, members
from normfree.data.sources.write_shards import write_shards

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
IMAGES = samples()


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def contents(source: Source) -> list[bytes]:
    return [bytes(source.content(i)) for i in range(len(source))]


def opened(root: Path, *entries: Entry | tarfile.TarInfo, kind: int = tarfile.USTAR_FORMAT) -> ShardSource:
    """The source of one shard with these entries and two good samples."""
    good: list[Entry | tarfile.TarInfo] = [("x.jpg", b"x"), ("x.cls", b"0"), ("y.jpg", b"y"), ("y.cls", b"1")]
    return open_shards(root, [write_tar(root / "a.tar", [*good, *entries], kind)])


def refusal(root: Path, *entries: Entry | tarfile.TarInfo) -> str:
    """Why such a shard is refused."""
    with pytest.raises(UserError) as refused:
        opened(root, *entries)
    return str(refused.value)


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **more: Any) -> bytes:
    """One header block, of any size that it may claim."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for field, value in more.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)[-BLOCK:] if len(name) < 100 else info.tobuf(tarfile.GNU_FORMAT)


def raw(path: Path, *blocks: bytes) -> Path:
    """A tar file of blocks as they are, with an end mark."""
    path.write_bytes(b"".join(blocks) + bytes(2 * BLOCK))
    return path


def block(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def pax(*records: bytes) -> bytes:
    content = b"".join(records)
    return header("pax", b"x", len(content)) + block(content)


# what is read


@pytest.mark.parametrize("kind", FORMATS)
def test_shards_say_what_the_folder_says(tmp_path: Path, kind: int) -> None:
    """The same images in the order of the folder: equal labels, classes, names, order, bytes and fingerprint."""
    folder = open_folder(write_folder(tmp_path / "folder", IMAGES))
    paths = [write_tar(tmp_path / f"s/a-{i}.tar", webdataset(IMAGES[7 * i : 7 * i + 7]), kind) for i in range(3)]
    (tmp_path / "s" / "classes.txt").write_text("ant\nbee\ncat\n")
    source = open_shards(tmp_path / "s", paths[::-1])
    assert source.classes == folder.classes
    assert source.labels.tolist() == folder.labels.tolist()
    assert source.labels.dtype == np.int64
    assert names(source) == names(folder)
    assert contents(source) == contents(folder) == [content for _, content, _ in IMAGES]
    assert fingerprint(source) == fingerprint(folder)
    assert np.array_equal(source.read(3), decode(IMAGES[3][1]))


def test_written_shards_come_back(tmp_path: Path) -> None:
    """`write_shards` keeps order, bytes, labels, classes and names; pixels become PNG and stay what they are."""
    folder = open_folder(write_folder(tmp_path / "folder", IMAGES))
    paths = write_shards(folder, tmp_path / "s", images_per_shard=4)
    assert [p.name for p in paths] == [f"train-{i:06d}.tar" for i in range(5)]
    source = open_shards(tmp_path / "s", paths)
    assert (contents(source), fingerprint(source)) == (contents(folder), fingerprint(folder))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    arrays = ArraySource(pixels, np.array([1, 0, 1]), ("a", "b"), ["x", "y", "z"])
    source = open_shards(tmp_path / "t", write_shards(arrays, tmp_path / "t"))
    assert all(np.array_equal(source.read(i), pixels[i]) for i in range(3))
    assert (source.labels.tolist(), names(source)) == ([1, 0, 1], ["x.png", "y.png", "z.png"])


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """Names that would be one key, labels that shards have no form for, and shards that are there already."""
    pixels, labels = np.zeros((2, 1, 1, 3), np.uint8), np.array([0, 1])
    with pytest.raises(UserError, match=r"'a_b.png' and another image would have the same key"):
        write_shards(ArraySource(pixels, labels, ("a", "b"), ["a.b.png", "a_b.png"]), tmp_path / "a")
    assert not list((tmp_path / "a").glob("*.tar"))
    with pytest.raises(UserError, match="several"):
        write_shards(ArraySource(pixels, np.eye(2, dtype=bool), ("a", "b"), ["a", "b"]), tmp_path)
    source = ArraySource(pixels, labels, ("a", "b"), ["a", "b"])
    write_shards(source, tmp_path)
    with pytest.raises(FileExistsError):
        write_shards(source, tmp_path)


PARTS = st.binary(min_size=1, max_size=9).filter(lambda b: not set(b) & {0, ord("/")} and b not in (b".", b".."))
LONG = st.tuples(st.lists(PARTS, min_size=1, max_size=4), st.sampled_from([1, 40])).map(
    lambda t: os.fsdecode(b"/".join(part * t[1] for part in t[0]))
)


@settings(deadline=None, max_examples=120)
@given(st.lists(st.tuples(LONG, st.binary(max_size=1200)), max_size=6), st.sampled_from(FORMATS))
def test_members_are_those_of_pythons_reader(tmp_path_factory: Any, entries: list[Entry], kind: int) -> None:
    """Names of any bytes and length, places and sizes are as the standard library reads them."""
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    try:
        write_tar(path, list(entries), kind)
    except ValueError:  # the name is too long for ustar
        return
    with path.open("rb") as f, tarfile.open(path, errors="surrogateescape") as reference:
        found = list(members(f.fileno()))
        expected = [(os.fsencode(m.name), m.offset_data, m.size) for m in reference]
        assert [(m.name.rstrip(b"/"), m.offset, m.size) for m in found] == [
            (n.rstrip(b"/"), o, s) for n, o, s in expected
        ]
        for member, (_, content) in zip(found, entries, strict=True):
            assert member.start.startswith(content[:BLOCK])


@pytest.mark.parametrize("kind", FORMATS)
def test_long_names(tmp_path: Path, kind: int) -> None:
    """Names over a header's 100 bytes, in the way of each format."""
    name = f"{'d' * 120}/{'e' * 90}.jpg"
    assert names(opened(tmp_path, (name, b"z"), (name[:-3] + "cls", b"1"), kind=kind))[2] == name


@pytest.mark.parametrize("order", ["image first", "label first", "all images first", "all labels first"])
def test_labels_stand_anywhere_in_the_shard(tmp_path: Path, order: str) -> None:
    """Right before or after their image, or all before or after all images."""
    images: list[Entry] = [(f"{i}.jpg", bytes([i])) for i in range(6)]
    labels: list[Entry] = [(f"{i}.cls", str(5 - i).encode()) for i in range(6)]
    pairs = list(zip(images, labels, strict=True))
    entries = {
        "image first": [e for pair in pairs for e in pair],
        "label first": [e for pair in pairs for e in pair[::-1]],
        "all images first": images + labels,
        "all labels first": labels + images,
    }[order]
    source = open_shards(tmp_path, [write_tar(tmp_path / "a.tar", list(entries))])
    assert source.labels.tolist() == [5, 4, 3, 2, 1, 0]
    assert contents(source) == [bytes([i]) for i in range(6)]


@pytest.mark.parametrize(
    ("texts", "classes", "labels"),
    [
        ((b"2", b"0\n", b" 1 "), ("0", "1", "2"), [2, 0, 1]),
        ((b"dog", b"cat", b"dog"), ("cat", "dog"), [1, 0, 1]),
        ((b'{"label": 1, "url": "pipe:x"}', b'{"cls": 0}', b'{"label": "1"}'), ("0", "1"), [1, 0, 1]),
        ((b'{"label": "b\xc3\xa4r"}', b'{"label": "ant"}', b'{"label": "ant"}'), ("ant", "bär"), [1, 0, 0]),
    ],
)
def test_forms_of_labels(tmp_path: Path, texts: tuple[bytes, ...], classes: tuple[str, ...], labels: list[int]) -> None:
    """Numbers are their own classes, names are sorted; JSON has the label under "label" or "cls"."""
    ending = "json" if texts[0].startswith(b"{") else "cls"
    entries: list[Entry | tarfile.TarInfo] = []
    for i, text in enumerate(texts):
        entries += [(f"{i}.jpg", b""), (f"{i}.{ending}", text)]
    source = open_shards(tmp_path, [write_tar(tmp_path / "a.tar", entries)])
    assert source.classes == classes
    assert source.labels.tolist() == labels


def test_a_cls_goes_before_json(tmp_path: Path) -> None:
    """Where there are both; other objects, captions and folders beside an image are not counted as left out."""
    folder = tarfile.TarInfo("deep")
    folder.type = tarfile.DIRTYPE
    more: list[Entry] = [("z.json", b'{"label": 0}'), ("z.jpg", b"z"), ("z.cls", b"1"), ("z.txt", b"caption")]
    source = opened(tmp_path, folder, *more, ("x.json", b'{"width": 3}'))
    assert source.labels.tolist() == [0, 1, 1]
    assert source.ignored == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "tench\nshark\n"),
        ("classes.json", '["tench", "shark"]'),
        ("classes.json", '{"1": "shark", "0": "tench"}'),
    ],
)
@pytest.mark.parametrize("up", [False, True])
def test_names_of_classes(tmp_path: Path, file: str, text: str, up: bool) -> None:
    """From a file beside the shards, or one folder up."""
    (tmp_path / "s").mkdir()
    (tmp_path / file if up else tmp_path / "s" / file).write_text(text)
    assert opened(tmp_path / "s").classes == ("tench", "shark")


@pytest.mark.parametrize("text", ['{"0": "a"', '{"1": "a", "2": "b"}', "[1, 2]", '["a", "a"]', '"ab"', '["a", ""]'])
def test_broken_names_of_classes(tmp_path: Path, text: str) -> None:
    """The file is named."""
    (tmp_path / "classes.json").write_text(text)
    assert "classes.json" in refusal(tmp_path)


def test_class_folders_in_a_tar(tmp_path: Path) -> None:
    """A tar of an image folder, as `tar -c .` makes it: the first folder is the class, names may have further dots."""
    entries: list[Entry | tarfile.TarInfo] = [
        ("./ant/a.b.jpg", b"1"),
        ("./ant/x.jpg", b"2"),
        ("./bee/deep/c.png", b"3"),
    ]
    source = open_shards(tmp_path, [write_tar(tmp_path / "a.tar", entries)])
    assert (source.classes, source.labels.tolist()) == (("ant", "bee"), [0, 0, 1])
    assert names(source) == ["ant/a.b.jpg", "ant/x.jpg", "bee/deep/c.png"]


def test_keys_that_start_anew_in_each_shard(tmp_path: Path) -> None:
    """Names that come twice have their shard's before them, so that each is one sample's."""
    paths = [write_tar(tmp_path / f"a-{i}.tar", [("0.jpg", bytes([i])), ("0.cls", str(i).encode())]) for i in range(2)]
    source = open_shards(tmp_path, paths)
    assert names(source) == ["a-0.tar/0.jpg", "a-1.tar/0.jpg"]
    assert contents(source) == [b"\0", b"\1"]


def test_subsets(tmp_path: Path) -> None:
    """The asked-for samples in the asked-for order."""
    part = opened(tmp_path).subset(np.array([1, 0, 1]))
    assert (names(part), contents(part), part.labels.tolist()) == (
        ["y.jpg", "x.jpg", "y.jpg"],
        [b"y", b"x", b"y"],
        [1, 0, 1],
    )


# what is found at a path


def put_halves(root: Path, train: str, val: str) -> Path:
    write_tar(root / f"{train}.tar", webdataset(IMAGES))
    write_tar(root / f"{val}.tar", webdataset(IMAGES[:4]))
    return root


@pytest.mark.parametrize(
    ("train", "val"),
    [("train/a-000", "val/a-000"), ("imagenet-train-000000", "imagenet-val-000000"), ("train-0", "validation-0")],
)
def test_halves(tmp_path: Path, train: str, val: str) -> None:
    """In folders of their own, or told by the names of the shards."""
    root = put_halves(tmp_path, train, val)
    (root / "classes.txt").write_text("ant\nbee\ncat")
    found = open_data(str(root), 0.5)
    assert [len(half) for half in found] == [len(IMAGES), 4]
    assert len(open_validation(str(root), ("cat", "bee", "ant"))) == 4
    assert not found[1].held_out
    assert describe(found[0]) == f"18 images in 3 classes: 1 tar shard in {(root / train).parent}"


def test_shards_without_validation_are_split(tmp_path: Path) -> None:
    """By the hashes of the names: as the same images in a folder, and found again by their names."""
    write_tar(tmp_path / "s" / "a-0.tar", webdataset(IMAGES))
    write_tar(tmp_path / "s" / "test-0.tar", webdataset(IMAGES[:2]))
    (tmp_path / "s" / "classes.txt").write_text("ant\nbee\ncat")
    write_folder(tmp_path / "folder", IMAGES)
    train, val = open_data(str(tmp_path / "s"), 0.3)
    folder_train, folder_val = open_data(str(tmp_path / "folder"), 0.3)
    assert (fingerprint(train), fingerprint(val)) == (fingerprint(folder_train), fingerprint(folder_val))
    assert val.held_out
    assert not train.held_out
    again = open_held_out(str(tmp_path / "s"), names(val), val.classes)
    assert fingerprint(again) == fingerprint(val)
    with pytest.raises(UserError, match=r"has no 'gone.jpg', which was held out"):
        open_held_out(str(tmp_path / "s"), ["gone.jpg"], val.classes)


def test_one_shard_is_a_path(tmp_path: Path) -> None:
    """A .tar itself."""
    train, val = open_data(str(write_tar(tmp_path / "a.tar", webdataset(IMAGES))), 0.2)
    assert len(train) + len(val) == len(IMAGES)


def test_compressed_shards_are_named(tmp_path: Path) -> None:
    """They cannot be read at random."""
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"a.tar.gz is compressed"):
        open_data(str(tmp_path), 0.2)


# what is left out or refused


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "entry",
    [
        ("../up.jpg", b"-"),
        ("a/../../up.jpg", b"-"),
        ("/root.jpg", b"-"),
        ("..\\up.jpg", b"-"),
        link("link.jpg", tarfile.SYMTYPE),
        link("hard.jpg", tarfile.LNKTYPE, "x.jpg"),
        link("pipe.jpg", tarfile.FIFOTYPE),
        link("device.jpg", tarfile.CHRTYPE),
        link("disk.jpg", tarfile.BLKTYPE),
        link("holes.jpg", tarfile.GNUTYPE_SPARSE),
        ("x.pyd", b"cos\nsystem\n(S'touch marker'\ntR."),
        ("x.pkl", b"cos\nsystem\n(S'touch marker'\ntR."),
        ("x.pth", b"cos\nsystem\n(S'touch marker'\ntR."),
        ("pipe:touch marker|.jpg.sh", b"touch marker"),
        ("x.seg.png", b"-"),
        ("lonely.cls", b"7"),
        ("lonely.txt", b"7"),
        ("nameless", b"7"),
        ("unlabelled.jpg", b"-"),
    ],
)
def test_what_is_no_sample_is_left_out_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: Entry | tarfile.TarInfo
) -> None:
    """Names that lead out, links, devices, pickles, commands: not used, not followed, not run, but named."""
    monkeypatch.chdir(tmp_path)
    source = opened(tmp_path, entry)
    name = entry.name if isinstance(entry, tarfile.TarInfo) else entry[0]
    assert names(source) == ["x.jpg", "y.jpg"]
    assert [ignored.removeprefix("a.tar/") for ignored in source.ignored] == [name]
    assert describe(source).endswith("; 1 file left out")
    assert contents(source) == [b"x", b"y"]
    assert os.listdir(tmp_path) == ["a.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_links_are_no_samples_even_with_a_label(tmp_path: Path, kind: bytes) -> None:
    """Nor devices: both the link and its label are left out."""
    source = opened(tmp_path, link("z.jpg", kind), ("z.cls", b"1"))
    assert names(source) == ["x.jpg", "y.jpg"]
    assert source.ignored == ["a.tar/z.jpg", "a.tar/z.cls"]


def test_pax_holes_are_left_out(tmp_path: Path) -> None:
    """A file with holes in pax form has content that is no image's."""
    holes = (pax(b"22 GNU.sparse.major=1\n"), header("h.jpg"), header("h.cls", size=1), block(b"0"))
    path = raw(tmp_path / "a.tar", *holes, header("x.jpg"), header("x.cls", size=1), block(b"0"))
    source = open_shards(tmp_path, [path])
    assert names(source) == ["x.jpg"]
    assert source.ignored == ["a.tar/h.jpg", "a.tar/h.cls"]


def test_links_with_a_size_have_no_content(tmp_path: Path) -> None:
    """Some writers give a link the size of what it leads to; what follows is the next header."""
    linked = header("h.jpg", tarfile.LNKTYPE, 700, linkname="x.jpg")
    path = raw(tmp_path / "a.tar", linked, header("x.jpg"), header("x.cls", size=1), block(b"0"))
    with tarfile.open(path) as reference:
        assert reference.getnames() == ["h.jpg", "x.jpg", "x.cls"]
    assert names(open_shards(tmp_path, [path])) == ["x.jpg"]


def test_gnu_headers_have_no_prefix(tmp_path: Path) -> None:
    """There they have times, which are no part of the name."""
    times = patched(257, b"ustar  \0" + bytes(80) + b"15016443527\0" * 2)
    path = raw(tmp_path / "a.tar", times, header("a.cls", size=1), block(b"0"))
    assert names(open_shards(tmp_path, [path])) == ["a.jpg"]


@pytest.mark.parametrize("hidden", ["._x.jpg", "a/.hidden.jpg", ".x.cls"])
def test_hidden_members_are_passed_over(tmp_path: Path, hidden: str) -> None:
    """As in a folder."""
    source = opened(tmp_path, (hidden, b"-"))
    assert (names(source), source.ignored) == (["x.jpg", "y.jpg"], [])


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([("x.png", b"-")], "'x.png' and another image have the same key"),
        ([("x.jpg", b"-")], "'x.jpg' and another image have the same key"),
        ([("z.jpg", b"-"), ("z.cls", b"cat")], "the label of 'z.jpg' is 'cat', others are numbers"),
        ([("z.jpg", b"-"), ("z.cls", b"-1")], "the label of 'z.jpg' is '-1'"),
        ([("z.jpg", b"-"), ("z.cls", b"1152921504606846976")], "the label of 'z.jpg' is '1152921504606846976'"),
        ([("z.jpg", b"-"), ("z.cls", b"9" * 300)], "the label of '/z' is no label"),
        ([("z.jpg", b"-"), ("z.cls", b"pipe:touch marker")], "is 'pipe:touch marker', others are numbers"),
        ([("z.jpg", b"-"), ("z.json", b'{"label": [1]}')], "neither a whole number nor a name"),
        ([("z.jpg", b"-"), ("z.json", b'{"label": true}')], "neither a whole number nor a name"),
        ([("z.jpg", b"-"), ("z.json", b'{"label": 1.5}')], "neither a whole number nor a name"),
        ([("z.jpg", b"-"), ("z.json", b"\xff")], "'z.json' is not JSON"),
        ([("z.jpg", b"-"), ("z.json", b"[" * 100_000)], "'z.json' is not JSON"),
        ([("z.jpg", b"-"), ("z.cls", bytes(2 << 20))], "the label 'z.cls' is 2097152 bytes long"),
    ],
)
def test_wrong_keys_and_labels(tmp_path: Path, entries: list[Entry], reason: str) -> None:
    """Are one line that names the member; no label makes millions of classes."""
    assert reason in refusal(tmp_path, *entries)


def test_a_label_beyond_the_classes(tmp_path: Path) -> None:
    """The number of classes and their file are named."""
    (tmp_path / "classes.txt").write_text("only\n")
    assert refusal(tmp_path) == (f"{tmp_path}: the label of 'y.jpg' is '1'; {tmp_path / 'classes.txt'} has 1 classes")


def test_shards_without_images_or_labels(tmp_path: Path) -> None:
    """Say so."""
    with pytest.raises(UserError, match="the tar shards have no images"):
        open_shards(tmp_path, [write_tar(tmp_path / "a.tar", [("a.tar", b"-")])])
    with pytest.raises(UserError, match=r"have no labels; 'a.jpg' needs a .cls"):
        open_shards(tmp_path, [write_tar(tmp_path / "a.tar", [("a.jpg", b"-")])])


# damage


def whole(path: Path) -> list[bytes] | None:
    """What a shard gives; None where it is refused in a line that names it."""
    try:
        source = open_shards(path.parent, [path])
    except UserError as e:
        assert str(path.parent) in str(e)  # noqa: PT017 (either outcome will do)
        return None
    found = []
    for i in range(len(source)):
        try:
            found.append(source.content(i))
        except BadImage:
            found.append(b"")
    return found


def test_a_shard_that_is_cut_off_is_noticed(tmp_path: Path) -> None:
    """Wherever: it is refused, or nothing is missing."""
    path = write_tar(tmp_path / "a.tar", webdataset(IMAGES[:3]))
    content, all_of_it = path.read_bytes(), [content for _, content, _ in IMAGES[:3]]
    last = len(content.rstrip(b"\0")) + BLOCK
    for length in [*range(0, last, 211), *range(0, len(content), BLOCK)]:
        path.write_bytes(content[:length])
        found = whole(path)
        assert found is None if length < last - BLOCK else found in (None, all_of_it)


@pytest.mark.parametrize("garbage", [b"", b"-", b"\0" * 100, b"PK\3\4" * 300, b"\xff" * 2000])
def test_what_is_no_tar(tmp_path: Path, garbage: bytes) -> None:
    """Is refused."""
    (tmp_path / "a.tar").write_bytes(garbage)
    assert whole(tmp_path / "a.tar") is None


def test_joined_tars_are_refused(tmp_path: Path) -> None:
    """`cat a.tar b.tar` would lose the second without a word."""
    path = write_tar(tmp_path / "a.tar", webdataset(IMAGES[:2]))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match=r"goes on behind its end mark"):
        open_shards(tmp_path, [path])


LIES: dict[str, Callable[[], bytes]] = {
    "a file of 2^60": lambda: header("a.jpg", size=2**60),
    "a file of 2^80": lambda: patched(124, bytes([0x80]) + (2**80).to_bytes(11, "big")),
    "a negative size": lambda: patched(124, b"\xff" * 12),
    "a size with a sign": lambda: patched(124, b"-0000000777\0"),
    "a size with an underscore": lambda: patched(124, b"0000_000777\0"),
    "a size past the end": lambda: header("a.jpg", size=5000),
    "a pax header of 2^60": lambda: header("a", b"x", 2**60),
    "a global header of 2^60": lambda: header("a", b"g", 2**60),
    "a long name of 2^60": lambda: header("a", b"L", 2**60),
    "a long name of 2 MB": lambda: header("a", b"L", 2 << 20) + bytes(2 << 20) + header("a.jpg"),
    "a pax size of 2^60": lambda: pax(b"28 size=1152921504606846976\n") + header("a.jpg"),
    "a pax size that is no number": lambda: pax(b"11 size=-1\n") + header("a.jpg"),
    "a pax record longer than it": lambda: pax(b"999 path=a\n") + header("a.jpg"),
    "a pax record of no length": lambda: pax(b"0 path=a\n") + header("a.jpg"),
    "a pax record of a negative length": lambda: pax(b"-9 path=a\n") + header("a.jpg"),
    "a pax record without a length": lambda: pax(b"path=a\n") + header("a.jpg"),
    "a wrong sum": lambda: header("a.jpg")[:-1] + b"x",
}


def patched(offset: int, value: bytes) -> bytes:
    """A header with other bytes at a place, and the right sum."""
    content = bytearray(header("a.jpg"))
    content[offset : offset + len(value)] = value
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content)


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_sizes_cost_nothing(tmp_path: Path, lie: str) -> None:
    """Are refused, without the memory or the time that they claim."""
    path = raw(tmp_path / "a.tar", LIES[lie]())
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a.tar: "):
            open_shards(tmp_path, [path])
        with path.open("rb") as f, pytest.raises(BrokenTar):
            list(members(f.fileno()))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_more_members_than_any_shard_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are not listed for ever."""
    monkeypatch.setattr(shard_index, "_MOST_MEMBERS", 5)
    assert "more than 5 members" in refusal(tmp_path, ("a.jpg", b""), ("a.cls", b"0"))


def test_flipped_bytes(tmp_path: Path) -> None:
    """Of headers and contents: a shard is read or refused, every image is bytes or a BadImage, and nothing grows."""
    rng = np.random.default_rng(0)
    path = write_tar(tmp_path / "a.tar", webdataset(IMAGES[:3]), tarfile.PAX_FORMAT)
    content = path.read_bytes()
    used = len(content.rstrip(b"\0")) + BLOCK
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        for place in rng.integers(0, used, rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        found = whole(path)
        refused += found is None
        assert found is None or sum(map(len, found)) <= len(content)
    assert 50 < refused < 200


def test_flipped_bytes_behind_a_right_sum(tmp_path: Path) -> None:
    """As a hostile writer would: the sum is made right again, so that every field of the header is believed."""
    rng = np.random.default_rng(1)
    path = write_tar(tmp_path / "a.tar", webdataset(IMAGES[:3]), tarfile.PAX_FORMAT)
    content = path.read_bytes()
    with path.open("rb") as f:
        places = [m.offset - BLOCK for m in members(f.fileno())]
    for _ in range(200):
        damaged, at = bytearray(content), int(rng.choice(places))
        for place in rng.choice(np.r_[0:8, 124:136, 156:158, 257:265, 345:350], rng.integers(1, 4)):
            damaged[at + place] = rng.choice(np.frombuffer(b"\0\x80\xff01234567xgLKS./", np.uint8))
        damaged[at + 148 : at + 156] = b" " * 8
        damaged[at + 148 : at + 156] = b"%06o\0 " % sum(damaged[at : at + BLOCK])
        path.write_bytes(damaged)
        found = whole(path)
        assert found is None or sum(map(len, found)) <= len(content)


def test_a_broken_tar_is_named_once(tmp_path: Path) -> None:
    """Even among many shards that are read at once."""
    good = [write_tar(tmp_path / f"a-{i}.tar", webdataset(IMAGES)) for i in range(20)]
    good[13].write_bytes(good[13].read_bytes()[:3000])
    with pytest.raises(UserError, match=r"a-13.tar: cut off"):
        open_shards(tmp_path, good)


def test_a_missing_shard(tmp_path: Path) -> None:
    """Is named."""
    with pytest.raises(UserError, match=r"gone.tar cannot be read: No such file"):
        open_shards(tmp_path, [tmp_path / "gone.tar"])


# the index that is kept


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for lists, in which even small and new ones are kept."""
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_index, "CACHED_FROM", 0)
    monkeypatch.setattr(cache, "_SETTLED", -(10**12))
    return tmp_path / "cache"


def no_scan(_path: Path) -> Any:
    raise AssertionError("it was read again")


def test_the_index_is_kept(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start reads no header, and gives the same."""
    more: list[Entry] = [("odd.jpg", b"-"), ("odd.pkl", b"-"), ("o.d.jpg", b"-")]
    first = opened(tmp_path, *more)
    monkeypatch.setattr(shard_index, "index_shard", no_scan)
    second = open_shards(tmp_path, [tmp_path / "a.tar"])
    assert fingerprint(second) == fingerprint(first)
    assert (contents(second), second.ignored) == (contents(first), first.ignored)


@pytest.mark.parametrize("change", ["content", "rename", "grow", "one more"])
def test_a_shard_that_changed_is_read_again(tmp_path: Path, kept: Path, change: str) -> None:
    """Even where its size and its time of writing are what they were."""
    path = tmp_path / "a.tar"
    opened(tmp_path)
    time = path.stat().st_mtime_ns
    other: list[Entry | tarfile.TarInfo] = [("p.jpg", b"p"), ("p.cls", b"1"), ("q.jpg", b"q"), ("q.cls", b"0")]
    paths = [path]
    if change == "one more":
        paths.append(write_tar(tmp_path / "b.tar", other))
    elif change == "rename":
        write_tar(tmp_path / "new.tar", other).rename(path)
    elif change == "grow":
        write_tar(path, [*other, ("r.jpg", b"r"), ("r.cls", b"0")])
    else:
        write_tar(path, other)
    os.utime(path, ns=(time, time))
    assert "q.jpg" in names(open_shards(tmp_path, paths))


def test_a_broken_cache_is_made_anew(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any damage, even where it would still make sense."""
    first = opened(tmp_path)
    monkeypatch.setattr(shard_index, "CACHED_FROM", 1 << 60)  # so that the damage stays
    (file,) = (kept / "lists").iterdir()
    content = file.read_bytes()
    flipped = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(0, len(content), 3)]
    for damaged in [*flipped, *(content[:n] for n in range(0, len(content), 50))]:
        file.write_bytes(damaged)
        again = open_shards(tmp_path, [tmp_path / "a.tar"])
        assert (fingerprint(again), contents(again)) == (fingerprint(first), [b"x", b"y"])


def test_a_cache_that_cannot_be_written(tmp_path: Path, kept: Path) -> None:
    """Costs time, and nothing else."""
    kept.write_bytes(b"")  # no folder
    assert names(opened(tmp_path)) == names(opened(tmp_path)) == ["x.jpg", "y.jpg"]


def test_new_shards_are_not_kept_yet(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock may be so coarse that a change in the same moment would not show."""
    monkeypatch.setattr(cache, "_SETTLED", 60 * 10**9)
    opened(tmp_path)
    assert not kept.exists()


# while a run goes on


def test_a_shard_that_is_replaced_or_removed_is_a_bad_image(tmp_path: Path) -> None:
    """Not another image under the old name."""
    source = opened(tmp_path)
    time = (tmp_path / "a.tar").stat().st_mtime_ns
    write_tar(tmp_path / "b.tar", [("p.jpg", b"p"), ("p.cls", b"0")]).rename(tmp_path / "a.tar")
    os.utime(tmp_path / "a.tar", ns=(time, time))  # and its size is the same
    with pytest.raises(BadImage, match=r"a.tar was replaced since it was listed"):
        source.content(0)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadImage, match=r"a.tar cannot be read: No such file"):
        source.read(0)


def test_a_shard_that_is_overwritten_is_a_bad_image(tmp_path: Path) -> None:
    """Also where it is open already."""
    source = opened(tmp_path)
    assert source.content(1) == b"y"
    content = (tmp_path / "a.tar").read_bytes()
    with (tmp_path / "a.tar").open("r+b") as f:
        f.write(bytes(len(content) - 100))
    with pytest.raises(BadImage, match=r"a.tar is not what it was"):
        source.content(1)
    os.truncate(tmp_path / "a.tar", 700)
    with pytest.raises(BadImage, match=r"a.tar is not what it was"):
        source.content(1)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_few_files_are_open(tmp_path: Path) -> None:
    """However many shards there are."""
    paths = [write_tar(tmp_path / f"a-{i:03d}.tar", [("0.jpg", b"-"), ("0.cls", b"0")]) for i in range(80)]
    source = open_shards(tmp_path, paths)
    before = len(os.listdir("/proc/self/fd")) - shards._open.cache_info().currsize
    for i in range(80):
        assert source.content(i) == b"-"
    assert len(os.listdir("/proc/self/fd")) - before <= 64


class Contents(Dataset[bytes]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> bytes:
        return bytes(self.source.content(index))


def test_workers_read_at_once(tmp_path: Path) -> None:
    """Processes that share a file that was open before they began read what is theirs."""
    paths = [write_tar(tmp_path / f"a-{i}.tar", webdataset(samples(per_class=8))) for i in range(2)]
    source = open_shards(tmp_path, paths)
    expected = contents(source)
    loader = DataLoader(Contents(source), None, num_workers=2, multiprocessing_context="fork")
    assert list(loader) == expected


def test_a_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    """Pickled and back, for workers that are started anew."""
    source = opened(tmp_path)
    assert contents(source) == contents(pickle.loads(pickle.dumps(source)))


def test_the_marker_of_the_end(tmp_path: Path) -> None:
    """A tar file without members is whole."""
    path = raw(tmp_path / "a.tar")
    with path.open("rb") as f:
        assert list(members(f.fileno())) == []
    path.write_bytes(bytes(100))
    with path.open("rb") as f, pytest.raises(BrokenTar):
        list(members(f.fileno()))
