"""Settings in config.json that are unknown, of a wrong type, out of range or no JSON at all."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from example_run import RUN
from hostile import Case
from normfree.config import Run, UserError, to_dict
from normfree.models import model_config
from normfree.train.record import RunFolder, validation_source

Change = Callable[[dict[str, Any]], object]


def read_config(path: Path) -> Run:
    """As commands open a run folder, up to its network."""
    _, run = RunFolder.open(path)
    model_config(run.model.name)
    return run


def cases() -> Iterator[Case]:
    for words, table in _CHANGED.items():
        for name, change in table.items():
            yield Case("config", name, _changed(change), read_config, UserError, words)
    for words, texts in _TEXTS.items():
        for name, content in texts.items():
            yield Case("config", name, _text(content), read_config, UserError, words)
    for name, put in _PLACES.items():
        yield Case("config", name, put, read_config, UserError, "config.json")
    for name, make in _FINE.items():
        yield Case("config", name, _text(make()), read_config, None, right=lambda run: isinstance(run, Run))
    for part in (1, 50, 300, 900):
        content = json.dumps(plain()).encode()[:part]
        yield Case(
            "config", f"cut after {part} bytes", _text(content), read_config, UserError, "not JSON", damaged=True
        )
    for name, value in _HELD_OUT.items():
        yield Case("validation.json", name, _held_out(value), _validation, UserError)


@lru_cache
def _plain() -> str:
    return json.dumps(to_dict(RUN))


def plain() -> dict[str, Any]:
    """A config that is fine."""
    value: dict[str, Any] = json.loads(_plain())
    return value


def _text(content: bytes | str) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return put


def _changed(change: Change) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        value = copy.deepcopy(plain())
        change(value)
        return _text(json.dumps(value))(folder)

    return put


def _set(name: str, value: Any) -> Change:
    section, _, leaf = name.partition(".")

    def change(config: dict[str, Any]) -> None:
        if leaf:
            config[section][leaf] = value
        else:
            config[section] = value

    return change


def _without(name: str) -> Change:
    section, _, leaf = name.partition(".")
    return lambda config: config[section].pop(leaf) if leaf else config.pop(section)


def _raw(name: str, text: str) -> str:
    """A config with a value written as no Python writes it."""
    value = plain()
    _set(name, "@")(value)
    return json.dumps(value).replace('"@"', text)


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _folder(folder: Path) -> Path:
    (folder / "config.json").mkdir()
    return folder


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "config.json")
    return folder


def _link(to: str) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        (folder / "config.json").symlink_to(to)
        return folder

    return put


_IMPORTS = ("os.system", "builtins:eval", "__import__('os')", "!!python/object/apply:os.system", "../../evil", "x\0y")
_NO_OBJECTS: tuple[Any, ...] = (None, [], "digits", 3, True)
_NO_NUMBERS: tuple[Any, ...] = ("64", 64.0, True, None, [64], {})
_NO_RATES: tuple[Any, ...] = ("0.1", True, None, [0.1], {"a": 1})
_NO_TEXTS: tuple[Any, ...] = (1, None, ["a"], {}, False)
_NO_SWITCHES: tuple[Any, ...] = (0, 1, "true", None)
_NO_LISTS: tuple[Any, ...] = (0.5, "0.5", [0.5], [0.5] * 4, ["a"] * 3, None)
_CHANGED: dict[str, dict[str, Change]] = {
    "did you mean": {
        "a setting misspelt": lambda c: c["optim"].__setitem__("weight_decy", 1),
        "a section misspelt": lambda c: c.__setitem__("optimm", {}),
        "a model misspelt": _set("model.name", "nfnet_f00"),
    },
    "unknown setting": {
        "a setting of dunders": lambda c: c["model"].__setitem__("__class__", "os.system"),
        "a setting to instantiate": lambda c: c["model"].__setitem__("_target_", "os.system"),
        "a setting of line breaks": lambda c: c["data"].__setitem__("a\nb\x1b[2J", 1),
        "a setting of 1 MB": lambda c: c["data"].__setitem__("x" * (1 << 20), 1),
        "10,000 settings": lambda c: c["data"].update({f"x{i}": i for i in range(10_000)}),
        "a setting without a name": lambda c: c["data"].__setitem__("", 1),
        "a setting in another section": lambda c: c["model"].__setitem__("lr", 1),
    },
    "is missing": {
        "no model": _without("model"),
        "no name of a model": _without("model.name"),
        "no learning rate": _without("optim.lr"),
        "no root": _without("data.root"),
        "an empty object": lambda c: c.clear(),
    },
    "must be": {
        **{f"a section that is {v!r}": _set("data", v) for v in _NO_OBJECTS},
        **{f"a number that is {v!r}": _set("train.batch_size", v) for v in _NO_NUMBERS},
        **{f"a rate that is {v!r}": _set("optim.lr", v) for v in _NO_RATES},
        **{f"a text that is {v!r}": _set("data.root", v) for v in _NO_TEXTS},
        **{f"a switch that is {v!r}": _set("data.flip", v) for v in _NO_SWITCHES},
        **{f"a list that is {v!r}": _set("data.mean", v) for v in _NO_LISTS},
        "a text of 10 MB for a number": _set("train.epochs", "9" * 10_000_000),
        "a list 200 deep": _set("data.root", _deep(200)),
        "a list of a million": _set("data.root", [0] * 1_000_000),
        "a rate of 0": _set("optim.lr", 0),
        "a rate below 0": _set("optim.lr", -1.0),
        "a batch of 0": _set("train.batch_size", 0),
        "a batch below 0": _set("train.batch_size", -(2**31)),
        "a seed below 0": _set("train.seed", -1),
        "a seed of 2^32": _set("train.seed", 2**32),
        "a share of 2": _set("data.bad_images", 2),
        "a deviation of 0": _set("data.std", [0.2, 0.0, 0.2]),
        "an unknown crop": _set("data.eval_crop", "exec"),
        "an unknown precision": _set("train.precision", "fp8"),
        "an unknown loss": _set("optim.loss", "os.system"),
        "an unknown optimizer": _set("optim.kind", "torch.optim.SGD"),
        "workers below 0": _set("data.workers", -1),
        "epochs beyond a million": _set("train.epochs", 1e300),
    },
    "too large": {
        "a batch of 2^80": _set("train.batch_size", 2**80),
        "a size of 4,000 digits": _set("data.size", 10**4000),
        "workers of 2^40": _set("data.workers", 2**40),
        "a rate of 4,000 digits": _set("optim.lr", 10**4000),
    },
    "unknown model": {f"a model called {name!r}": _set("model.name", name) for name in _IMPORTS},
}
_TEXTS: dict[str, dict[str, bytes | str]] = {
    "not JSON": {
        "nothing": b"",
        "a text": b"nfnet_f0",
        "YAML": b"model:\n  name: !!python/object/apply:os.system ['touch marker']\n",
        "Python": b"__import__('os').system('touch marker')",
        "TOML": b"[model]\nname = 'nfnet_f0'\n",
        "a pickle": b"\x80\x04cos\nsystem\n(S'touch marker'\ntR.",
        "zeros": bytes(999),
        "no text": b"\xff\xfe\xfd{}",
        "a lone byte of UTF-8": json.dumps("x").encode() + b"\xc3",
        "a comment": "// config\n{}",
        "a comma too many": '{"recipe": "digits",}',
        "single quotes": "{'recipe': 'digits'}",
        "two objects": "{}{}",
        "lists nested without end": "[" * 200_000,
        "objects nested without end": '{"model":' * 200_000,
        "closed nesting without end": "[" * 100_000 + "]" * 100_000,
        "a page of HTML": "<!DOCTYPE html>",
        "a pointer of Git LFS": "version https://git-lfs.github.com/spec/v1\n",
        "a setting twice": _raw("optim.lr", '0.1, "lr": 100.0'),
        "a section twice": _raw("recipe", '"digits", "model": {"name": "nfnet_f7"}, "model": {"name": "nfnet_f0"}'),
        "a rate that is NaN": _raw("optim.lr", "NaN"),
        "a rate that is Infinity": _raw("optim.lr", "Infinity"),
        "a rate in hexadecimal": _raw("optim.lr", "0x10"),
        "a number of 5,000 digits": _raw("train.batch_size", "9" * 5000),
        "a number with an underscore": _raw("train.batch_size", "1_000"),
        "a name with a line break": _raw("model.name", '"a\nb"'),
        "UTF-16 that is cut": json.dumps({"a": 1}).encode("utf-16")[:-1],
    },
    "must be": {
        "a list": "[]",
        "null": "null",
        "a number": "3",
        "a JSON text": '"nfnet_f0"',
        "epochs of 1e200": _raw("train.epochs", "1e200"),
    },
    "must be finite": {
        "a rate of 1e999": _raw("optim.lr", "1e999"),
        "a mean of -1e999": _raw("data.mean", "[0.5, -1e999, 0.5]"),
    },
}
_PLACES: dict[str, Callable[[Path], Path]] = {
    "no file": lambda folder: folder,
    "a folder": _folder,
    "a pipe": _pipe,
    "a link to itself": _link("config.json"),
    "a link to nothing": _link("gone.json"),
    "a link to a device": _link("/dev/zero"),
}
_FINE: dict[str, Callable[[], bytes | str]] = {
    "as it is written": lambda: json.dumps(plain()),
    "in UTF-16": lambda: json.dumps(plain()).encode("utf-16"),
    "behind a byte order mark": lambda: b"\xef\xbb\xbf" + json.dumps(plain()).encode(),
    "with blanks everywhere": lambda: json.dumps(plain(), indent=9).replace(":", " :\t\r\n"),
    "in another order": lambda: json.dumps(dict(reversed(plain().items()))),
    "with escapes for letters": lambda: _raw("model.name", '"\\u006efnet_tiny"'),
    "with a whole number for a rate": lambda: _raw("optim.lr", "1"),
}


# which images were held out


def _held_out(value: Any) -> Callable[[Path], Path]:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()

    def put(folder: Path) -> Path:
        for name in ("images/ant/0.jpg", "images/bee/0.jpg", "secret.jpg"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"-")
        (folder / "validation.json").write_bytes(content)
        return folder

    return put


def _validation(path: Path) -> list[str]:
    run = replace(RUN, data=replace(RUN.data, root=str(path / "images")))
    source = validation_source(RunFolder(path), run, ("ant", "bee"))
    return [source.name(i) for i in range(len(source))]


_HELD_OUT: dict[str, Any] = {
    "a file above the folder": ["ant/../../secret.jpg"],
    "a file above, at once": ["../secret.jpg"],
    "a file of the system": ["/etc/passwd"],
    "a class that is not there": ["cat/0.jpg"],
    "a class alone": ["ant"],
    "a class by a detour": ["ant/../bee/0.jpg"],
    "an empty name": [""],
    "a number": [1],
    "a list": [["ant/0.jpg"]],
    "an object": {"ant/0.jpg": 1},
    "null": None,
    "no JSON": b"['ant/0.jpg']",
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch marker'\ntR.",
    "nested without end": b"[" * 200_000,
    "no text": b"\xff\xfe\xfd",
}
