"""Weight files: every honest kind gives its network, every other file is refused, unread and unexecuted.

What a file claims is checked in a forked child with little memory and little time: one that crashes the interpreter,
asks for terabytes or never ends fails its own test and no other.
"""

from __future__ import annotations

import codecs
import copyreg
import faulthandler
import io
import json
import marshal
import operator
import os
import pickle
import pickletools
import random
import resource
import shutil
import struct
import subprocess
import sys
import timeit
import traceback
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from authors import FIXTURES, images, load
from normfree.config import UserError
from normfree.models import Network, NetworkConfig, load_weights
from normfree.models.exchange import haiku_name, timm_name, to_haiku, to_timm
from normfree.models.families import MODELS
from normfree.models.fold import fold
from normfree.models.weights import describe, export_weights, load_model, read_tensors, save_weights
from test_families import timm

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded"  # Python 3.12 warns of fork; the children here only read files
)

State = dict[str, Tensor]
HEADROOM = 256 << 20  # bytes that a child may take beyond what the test process has
TINY = MODELS["nfnet_tiny"]
AUTHORS_FILE = FIXTURES / "authors_haiku.npz"


# ---- networks and their honest files ----


def fresh(config: NetworkConfig, seed: int = 0) -> Network:
    """In evaluation mode, with every parameter and every statistic random, SkipInit too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Network(config).eval()
        for name, tensor in model.state_dict().items():
            if name.endswith(("gain", "bias", "running_var")) or "norm" in name:
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model


def file_config() -> NetworkConfig:
    """Of the network whose parameters the authors' code wrote into authors_haiku.npz."""
    v = load("authors_nfnet_options")[1]["config"]["variants"]["file"]
    return replace(
        MODELS["nfnet_f0"],
        widths=tuple(v["width"]),
        depths=tuple(v["depth"]),
        stem_widths=(16, 32, 64, v["width"][0] // 2),
        group_width=tuple(v["group_width"]),
        final_width=2 * v["width"][-1],
        num_classes=10,
    )


def logits(model: Network, x: Tensor | None = None) -> Tensor:
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32) if x is None else x
    with torch.no_grad():
        out: Tensor = model.eval()(x)
    return out


def bits(tensors: State) -> dict[str, bytes]:
    return {n: t.detach().contiguous().numpy().tobytes() for n, t in tensors.items()}


def plain_tree() -> dict[str, dict[str, Any]]:
    """What is in the authors' file, read by pickle itself: it is our own fixture."""
    found: dict[str, dict[str, Any]] = pickle.loads(AUTHORS_FILE.read_bytes())
    return found


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.double() - theirs.double()).norm() <= 1e-5 * theirs.double().norm()


def torch_bytes(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


@lru_cache
def timm_file() -> tuple[NetworkConfig, State, Tensor, Tensor]:
    """(our configuration, state dict, input, logits) of one of timm's own networks."""
    model, state, tensors = timm("timm_nfnet_l0")
    return model.config, state, tensors["input/even"], tensors["logits/even"]


def authors_file() -> bytes:
    return AUTHORS_FILE.read_bytes()


def wrapped(state: State) -> State:
    return {f"module.{n}": t for n, t in state.items()}


TIMM_FORMS: dict[str, Callable[[State], bytes]] = {
    "safetensors": save,
    "zip": torch_bytes,
    "legacy": lambda s: torch_bytes(s, _use_new_zipfile_serialization=False),
    "ordered": lambda s: torch_bytes(OrderedDict(s)),
    "state_dict": lambda s: torch_bytes({"epoch": 3, "arch": "nfnet_l0", "state_dict": s}),
    "state_dict_ema": lambda s: torch_bytes({"state_dict": {"old": torch.zeros(1)}, "state_dict_ema": s}),
    "model": lambda s: torch_bytes({"model": wrapped(s)}),
    "module": lambda s: torch_bytes(wrapped(s)),
    "parameters": lambda s: torch_bytes({n: nn.Parameter(t) for n, t in s.items()}),
}
SUFFIXES = (".npz", ".pth", ".safetensors", ".jpg", "")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_authors_file_gives_their_logits(tmp_path: Path, suffix: str) -> None:
    """Written by their code, read whatever its name."""
    tensors = load("authors_nfnet_options")[0]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(authors_file())
    model = fresh(file_config())
    found = load_weights(model, path)
    assert (found.kind, found.left_out) == ("authors", ())
    close(logits(model, images(tensors["file/input"])), tensors["file/logits"])


def gives_timms_logits(path: Path, content: bytes) -> None:
    config, _, x, theirs = timm_file()
    path.write_bytes(content)
    model = fresh(config)
    found = load_weights(model, str(path))
    assert (found.kind, found.left_out) == ("timm", ())
    close(logits(model, x), theirs)


@pytest.mark.parametrize("form", TIMM_FORMS)
def test_timms_file_gives_its_logits(tmp_path: Path, form: str) -> None:
    """In every form in which such weights go round."""
    gives_timms_logits(tmp_path / "weights", TIMM_FORMS[form](timm_file()[1]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_safetensors_are_read_under_any_name(tmp_path: Path, suffix: str) -> None:
    """Timm's."""
    gives_timms_logits(tmp_path / f"weights{suffix}", save(timm_file()[1]))


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_torch_files_are_read_under_any_name(tmp_path: Path, form: str, suffix: str) -> None:
    """Timm's."""
    gives_timms_logits(tmp_path / f"weights{suffix}", TIMM_FORMS[form](timm_file()[1]))


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_our_names_load_from_every_container(tmp_path: Path, form: str) -> None:
    """Equal to the bit."""
    source, path, model = fresh(TINY), tmp_path / "weights", fresh(TINY, seed=1)
    if form == "safetensors":
        save_weights(source, path, describe(source))
    else:
        path.write_bytes(torch_bytes(source.state_dict(), _use_new_zipfile_serialization=form == "zip"))
    assert load_weights(model, path).kind == "normfree"
    assert bits(model.state_dict()) == bits(source.state_dict())


def test_a_header_of_any_length_is_told_apart(tmp_path: Path) -> None:
    """The first byte of safetensors is that of a length, and may be any: also the 0x80 that begins a pickle."""
    source, path, starts = fresh(TINY), tmp_path / "weights.safetensors", set()
    for extra in range(0, 256, 8):
        save_weights(source, path, {"pad": "x" * extra})
        starts.add(path.read_bytes()[0])
        assert load_weights(fresh(TINY, seed=1), path).kind == "normfree"
    assert 0x80 in starts


@pytest.mark.parametrize("kind", ["authors", "timm"])
def test_exported_weights_load_again(narrow: str, tmp_path: Path, kind: str) -> None:
    """Logits equal to the bit."""
    config = MODELS[narrow]
    source, model, path = fresh(config), fresh(config, seed=1), tmp_path / "weights"
    export_weights(source, path, kind)
    assert load_weights(model, path).kind == kind
    assert torch.equal(logits(model), logits(source))


def test_exported_weights_of_timms_own_network_load_again(tmp_path: Path) -> None:
    """Its constants move, to and fro: logits equal to 1e-5."""
    config = timm_file()[0]
    source, model, path = fresh(config), fresh(config, seed=1), tmp_path / "weights"
    for name, tensor in source.state_dict().items():
        if name.endswith("skip_gain"):
            tensor.fill_(1)
    export_weights(source, path, "timm")
    assert load_weights(model, path).kind == "timm"
    close(logits(model), logits(source))


def test_the_authors_code_can_read_what_is_written(tmp_path: Path) -> None:
    """A plain pickle of plain dicts of numpy arrays, equal to the bit to the file that it was loaded from."""
    model, path = fresh(file_config()), tmp_path / "F0_haiku.npz"
    load_weights(model, AUTHORS_FILE)
    export_weights(model, path, "authors")
    found, theirs = pickle.loads(path.read_bytes()), plain_tree()
    assert type(found) is dict
    assert {m: set(p) for m, p in found.items()} == {m: set(p) for m, p in theirs.items()}
    for module, parameters in found.items():
        assert type(parameters) is dict
        for name, array in parameters.items():
            assert type(array) is np.ndarray
            assert (array.dtype, array.shape) == (np.float32, theirs[module][name].shape)
            assert array.tobytes() == theirs[module][name].tobytes()


def folded_tiny() -> Network:
    return fold(fresh(TINY))


FOREIGN: dict[str, Callable[[], Network]] = {  # networks that neither the authors nor timm have
    "folded": folded_tiny,
    "straddle": lambda: fresh(replace(TINY, squeeze="straddle")),
    "dct stem": lambda: fresh(replace(TINY, stem="dct")),
    "fc head": lambda: fresh(replace(TINY, final="fc")),
    "grouped 1x1": lambda: fresh(replace(TINY, pointwise_groups=2)),
    "beta first": lambda: fresh(replace(TINY, beta_first=True)),
}


@pytest.mark.parametrize("case", [f"{n} {k}" for n in FOREIGN for k in ("authors", "timm")])
def test_networks_that_others_do_not_have_are_not_exported(tmp_path: Path, case: str) -> None:
    """A file that looks like theirs, but that their code cannot use or computes something else from."""
    name, _, kind = case.rpartition(" ")
    with pytest.raises(UserError):
        export_weights(FOREIGN[name](), tmp_path / "weights", kind)
    assert not list(tmp_path.iterdir())


def test_batch_norm_is_exported_whole_or_not_at_all(tmp_path: Path) -> None:
    """The authors keep statistics in another tree: without them the file is not the network's."""
    config = replace(TINY, norm="batch")
    source, model = fresh(config), fresh(config, seed=1)
    try:
        export_weights(source, tmp_path / "weights", "authors")
    except UserError:
        return
    load_weights(model, tmp_path / "weights")
    assert torch.equal(logits(model), logits(source))


def test_an_unknown_kind_is_refused_with_the_choices(tmp_path: Path) -> None:
    """Nothing is written."""
    with pytest.raises(UserError, match="'tf'; choose authors or timm"):
        export_weights(fresh(TINY), tmp_path / "weights", "tf")
    assert not list(tmp_path.iterdir())


def exotic_arrays(tree: dict[str, dict[str, Any]], form: str) -> dict[str, dict[str, Any]]:
    changes: dict[str, Callable[[Any], Any]] = {
        "plain": lambda a: a,
        "fortran": np.asfortranarray,
        "float64": lambda a: a.astype(np.float64),
        "float16": lambda a: a.astype(np.float16),
        "big-endian": lambda a: a.astype(">f4"),
        "strided": lambda a: np.repeat(a, 2, -1)[..., ::2] if a.ndim else a,
        "numpy scalars": lambda a: np.float32(a) if a.ndim == 0 else a,
        "read-only": lambda a: (a.setflags(write=False), a)[1],
    }
    change = changes[form]
    return {m: {n: change(a) for n, a in p.items()} for m, p in tree.items()}


ARRAY_FORMS = ("plain", "fortran", "float64", "float16", "big-endian", "strided", "numpy scalars", "read-only")


PythonPickler: Any = pickle._Pickler


class Speller(PythonPickler):  # type: ignore[misc]
    """Names numpy's package as numpy 1 or 2 does, whichever is installed."""

    def __init__(self, file: io.BytesIO, protocol: int, root: str) -> None:
        super().__init__(file, protocol)
        self.root = root

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = obj.__module__.replace("numpy._core.", f"{self.root}.").replace("numpy.core.", f"{self.root}.")
        name = name or obj.__qualname__
        if self.proto >= 4:
            self.save(module)
            self.save(name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(f"c{module}\n{name}\n".encode())
        self.memoize(obj)

    dispatch = {**PythonPickler.dispatch, types.FunctionType: save_global}  # noqa: RUF012 (a table of the base class)


@pytest.mark.parametrize("root", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("case", [f"{f}, {p}" for f in ARRAY_FORMS for p in (2, 3, 4, 5)])
def test_arrays_are_read_in_every_form_that_numpy_writes(tmp_path: Path, case: str, root: str) -> None:
    """Every protocol, layout, byte order and float type; as numpy 1 and as numpy 2 spell their modules."""
    form, protocol = case[:-3], int(case[-1])
    tree, content = exotic_arrays(plain_tree(), form), io.BytesIO()
    Speller(content, protocol, root).dump(tree)
    path, model = tmp_path / "weights", fresh(file_config(), seed=1)
    path.write_bytes(content.getvalue())
    assert load_weights(model, path).kind == "authors"
    for module, parameters in to_haiku(model).items():
        for name, array in parameters.items():
            assert (array == np.asarray(tree[module][name], np.float32)).all()


# ---- files of another network ----


@lru_cache
def flat_kinds() -> dict[str, tuple[NetworkConfig, State]]:
    """Kind -> (configuration, what a file of it holds by the file's own names)."""
    tree = {f"{m}/{n}": torch.from_numpy(a) for m, p in plain_tree().items() for n, a in p.items()}
    config, state = timm_file()[:2]
    same = fresh(file_config())
    ours = {n: t.clone() for n, t in same.state_dict().items()}
    return {
        "authors": (file_config(), tree),
        "timm": (config, dict(state)),
        "dm_nfnet": (file_config(), to_timm(same)),
        "normfree": (file_config(), ours),
    }


KINDS = ("authors", "timm", "dm_nfnet", "normfree")


def saved(tensors: State) -> bytes:
    """safetensors whose first byte is not that of a pickle, of which there is a test of its own."""
    content = save(tensors)
    return content if content[0] != 0x80 else save(tensors, {"more": "12345678"})


def write_flat(path: Path, kind: str, tensors: State) -> Path:
    if kind != "authors":
        path.write_bytes(saved({n: t.contiguous().clone() for n, t in tensors.items()}))
        return path
    tree: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        module, _, name = key.rpartition("/")
        tree.setdefault(module, {})[name] = tensor.numpy()
    path.write_bytes(pickle.dumps(tree, 4))
    return path


def is_refused(model: Network, path: Path, *words: str) -> str:
    """Whether loading raises UserError with these words in its message, and changes nothing; the message."""
    before = bits(model.state_dict())
    with pytest.raises(UserError) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert type(caught.value) is UserError
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == 1
    assert bits(model.state_dict()) == before
    return message


CLASSIFIER = ("NFNet/~/linear/w", "NFNet/~/linear/b", "head.fc.weight", "head.fc.bias", "fc.weight", "fc.bias")


def samples(tensors: State) -> list[str]:
    """One name for each last part and rank, but not of the classifier."""
    chosen = {(n.replace("/", ".").rpartition(".")[2], t.ndim): n for n, t in tensors.items() if n not in CLASSIFIER}
    return list(chosen.values())


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda t: t.clone().reshape(-1).index_fill(0, torch.tensor([t.numel() - 1]), torch.nan).view(t.shape),
    "inf": lambda t: t.clone().reshape(-1).index_fill(0, torch.tensor([0]), -torch.inf).view(t.shape),
    "longer": lambda t: torch.cat([t.reshape(1) if t.ndim == 0 else t] * 2, -1),
    "another rank": lambda t: torch.zeros(*[2] * (t.ndim + 1)),
    "empty": lambda t: torch.zeros(0),
    "scalar": lambda t: torch.zeros(()) if t.numel() > 1 else torch.zeros(3),
}


@pytest.mark.parametrize("case", [f"{kind} {damage}" for kind in KINDS for damage in DAMAGES])
def test_a_damaged_tensor_is_named(tmp_path: Path, case: str) -> None:
    """One tensor of each sort misshapen or not finite: the file is refused, the model stays as it is."""
    kind, _, damage = case.partition(" ")
    config, whole = flat_kinds()[kind]
    for name in samples(whole):
        broken = {**whole, name: DAMAGES[damage](whole[name])}
        is_refused(fresh(config), write_flat(tmp_path / "weights", kind, broken), name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_or_unknown_tensor_is_named(tmp_path: Path, kind: str) -> None:
    """The classifier's too; a misspelt one is missing, and its message has the right name."""
    config, whole = flat_kinds()[kind]
    for name in samples(whole):
        less = {n: t for n, t in whole.items() if n != name}
        is_refused(fresh(config), write_flat(tmp_path / "weights", kind, less), f"{name} is missing")
        misspelt = {**less, f"{name}s": whole[name]}
        path = write_flat(tmp_path / "weights", kind, misspelt)
        is_refused(fresh(config), path, f"{name}s is unexpected; did you mean '{name}'?")
        more = {**whole, f"{name}s": whole[name]}
        is_refused(fresh(config), write_flat(tmp_path / "weights", kind, more), f"{name}s is unexpected")


def names_of(whole: State, config: NetworkConfig) -> set[str]:
    """Of the file, and as each kind calls those of the model."""
    model = fresh(config)
    kinds: tuple[Callable[[str, NetworkConfig], str], ...] = (haiku_name, timm_name, lambda n, _: n)
    return {*whole, *(name(n, config) for name in kinds for n in model.state_dict() if "tracked" not in n)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_variant_or_family_is_refused(tmp_path: Path, kind: str) -> None:
    """Deeper, wider, of another family, and the same the other way round; the message names a tensor."""
    config, whole = flat_kinds()[kind]
    path = write_flat(tmp_path / "weights", kind, whole)
    depths = (config.depths[0] + 1, *config.depths[1:])
    others = [
        replace(config, depths=depths),
        replace(config, widths=tuple(2 * w for w in config.widths)),
        replace(config, second_conv=False),
        replace(config, norm="batch"),
        replace(config, stem_pool=True, stem_widths=(8,), stem_strides=(2,), final="none", squeeze="inner"),
    ]
    for other in others:
        message = is_refused(fresh(other), path)
        assert any(words in message for words in ("does not fit the model", "no such network", "of another network"))
        if "does not fit" in message:
            assert any(name in message for name in names_of(whole, other))


def test_a_file_of_a_wrong_family_is_refused_at_once(tmp_path: Path) -> None:
    """Hundreds of names that are not there and hundreds that nobody knows: no search for the nearest takes minutes."""
    state = {f"stem.{i // 64}.weight{i}": torch.zeros(1) for i in range(4000)}
    path = tmp_path / "weights"
    path.write_bytes(save(state))
    assert forked(lambda: load_weights(fresh(TINY), path)).kind == "UserError"


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_classes_leaves_the_classifier(tmp_path: Path, kind: str) -> None:
    """The body is loaded, the classifier keeps its bits, and a warning names both counts."""
    config, whole = flat_kinds()[kind]
    path = write_flat(tmp_path / "weights", kind, whole)
    model, full = fresh(replace(config, num_classes=7), seed=1), fresh(config)
    before = bits(model.state_dict())
    load_weights(full, path)
    with pytest.warns(UserWarning, match="classifier for 10 classes, the model for 7: it keeps its own"):
        found = load_weights(model, path)
    assert found.left_out == ("fc.bias", "fc.weight")
    assert found.kind == ("timm" if kind == "dm_nfnet" else kind)
    after, body = bits(model.state_dict()), bits(full.state_dict())
    for name, value in after.items():
        assert value == (before if name.startswith("fc.") else body)[name]


CLASSIFIERS = {
    "only the bias has 7": {"fc.bias": torch.zeros(7)},
    "only the weight has 7": {"fc.weight": torch.zeros(7, 64)},
    "they disagree": {"fc.weight": torch.zeros(7, 64), "fc.bias": torch.zeros(5)},
    "the bias is a scalar": {"fc.bias": torch.zeros(())},
    "exchanged": {"fc.weight": torch.zeros(7), "fc.bias": torch.zeros(7, 64)},
    "another width": {"fc.weight": torch.zeros(7, 65), "fc.bias": torch.zeros(7)},
    "no classes": {"fc.weight": torch.zeros(0, 64), "fc.bias": torch.zeros(0)},
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_that_is_not_one_is_refused(tmp_path: Path, name: str) -> None:
    """For another number of classes it must still be a classifier: weight and bias of one count."""
    config, whole = flat_kinds()["normfree"]
    path = write_flat(tmp_path / "weights", "normfree", {**whole, **CLASSIFIERS[name]})
    is_refused(fresh(config), path, "fc.")


def test_a_classifier_without_bias_may_have_another_count(tmp_path: Path) -> None:
    """Of any module whose last layer is `fc`."""

    class Plain(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.fc = nn.Linear(4, classes, bias=False)

    path, model = tmp_path / "weights", Plain(3)
    save_weights(Plain(5), path, {})
    with pytest.warns(UserWarning, match="classifier for 5 classes, the model for 3"):
        assert load_weights(model, path).left_out == ("fc.weight",)


TYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "too large for float32": lambda t: torch.full_like(t, 1e300, dtype=torch.float64),
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.to(torch.int32),
    "booleans": lambda t: t > 0,
    "float8_e4m3fn nan": lambda t: torch.full_like(t, torch.nan).to(torch.float8_e4m3fn),
    "float8_e5m2 inf": lambda t: torch.full_like(t, torch.inf).to(torch.float8_e5m2),
    "float8_e8m0fnu nan": lambda t: torch.full_like(t, torch.nan).to(torch.float8_e8m0fnu),
    "uint16": lambda t: t.to(torch.uint16),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")  # of torch, as the file is made
@pytest.mark.parametrize("name", TYPES)
def test_tensors_that_hold_no_plain_floats_are_refused(tmp_path: Path, name: str) -> None:
    """Weights are floats: what else torch has, and what float32 cannot hold, leaves the model as it is."""
    config, whole = flat_kinds()["normfree"]
    broken = {**whole, "fc.weight": TYPES[name](whole["fc.weight"])}
    path = tmp_path / "weights"
    path.write_bytes(torch_bytes(broken))
    is_refused(fresh(config), path, "fc.weight")
    if name not in ("sparse", "sparse rows", "meta"):  # which safetensors do not have
        path.write_bytes(saved(broken))
        is_refused(fresh(config), path, "fc.weight")


# ---- hostile files ----


class Outcome:
    """What became of a call in a child: the class of its exception and its message, "loaded", or a signal."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind, self.text = kind, text

    def __repr__(self) -> str:
        return f"{self.kind}: {self.text}"


def forked(call: Callable[[], Any], seconds: int = 10) -> Outcome:
    """The outcome of a call in a forked child that may take little memory and seconds of its own processor time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        warnings.simplefilter("ignore")  # torch's, of old files
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM, size + HEADROOM))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            result = ("loaded", str(call())[:4000])
        except UserError as error:
            result = (type(error).__name__, str(error)[:4000])
        except BaseException as error:
            result = (type(error).__name__, traceback.format_exc(limit=-4)[-4000:])
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Outcome(f"signal {os.WTERMSIG(status)}", "")
    return Outcome(*json.loads(content))


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    """torch imports hundreds of modules when the first network is made on the meta device: not in every child."""
    with torch.device("meta"):
        Network(TINY)


@lru_cache
def target() -> Network:
    return fresh(file_config(), seed=1)


def loading(path: Path) -> Callable[[], str]:
    """Loads into the target and says what came; raises AssertionError if a refused file has changed it."""

    def call() -> str:
        model = target()
        before = bits(model.state_dict())
        try:
            found = load_weights(model, path)
        except BaseException:
            assert bits(model.state_dict()) == before, "a refused file has changed the model"
            raise
        assert all(torch.isfinite(t).all() for t in model.state_dict().values()), "a number is not finite"
        return str(found)

    return call


def refusal(path: Path, *calls: Callable[[], Any]) -> str:
    """The messages of the UserErrors with which calls, or loading into the target, end; any other end is raised."""
    messages = []
    for call in calls or (loading(path),):
        try:
            call()
        except UserError as error:
            messages.append(str(error)[:400])
        else:
            raise RuntimeError(f"{path} is accepted")
    return " | ".join(messages)


def refuses(path: Path, *words: str) -> None:
    """Whether the file is refused in words, in little time and memory, without changing the model."""
    found = forked(loading(path))
    assert found.kind == "UserError", found
    assert all(w in found.text for w in words), found
    assert len(found.text) < 2000, "a message for a person is short"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def dumped(value: Any, protocol: int = 3) -> bytes:
    """The operations that push a value, without the first and the last of a pickle."""
    return pickle.dumps(value, protocol)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def infected(payload: bytes, key: bytes = text("w"), protocol: int = 3) -> bytes:
    """The authors' file with one array replaced by what the payload pushes: nothing else is wrong with it."""
    tree = plain_tree()
    bias = tree["NFNet/~/linear"].pop("b")
    head = b"\x80" + bytes([protocol]) + dumped(tree)
    return head + text("NFNet/~/linear") + b"}" + text("b") + dumped(bias) + b"s" + key + payload + b"ss."


def as_zip(pickled: bytes, records: dict[str, bytes] | None = None) -> bytes:
    """As torch.save writes it, around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as f:
        for name, content in {
            "data.pkl": pickled,
            "byteorder": b"little",
            "version": b"3\n",
            **(records or {}),
        }.items():
            f.writestr(f"archive/{name}", content)
    return out.getvalue()


def as_legacy(pickled: bytes) -> bytes:
    """As torch.save wrote before its zip files, around any pickle."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, system))
    return head + pickled + pickle.dumps([], 2)


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "authors": lambda p: p,
    "zip": as_zip,
    "legacy": as_legacy,
    "nested zip": lambda p: as_zip(as_zip(p), {"archive/data.pkl": p}),
}


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def mark(path: str) -> None:
    Path(path).touch()


def evil_npy(marker: Path) -> str:
    path = marker.with_name("evil.npy")
    np.save(path, np.array([Call(os.system, f"touch {marker}")], dtype=object), allow_pickle=True)
    return str(path)


def get(*path: str) -> bytes:
    """The attribute of a module by calls of getattr."""
    found = called(named("builtins", "__import__"), text(path[0]))
    for name in path[1:]:
        found = called(named("builtins", "getattr"), found, text(name))
    return found


def code_object(marker: Path) -> bytes:
    """A function from its marshalled code, as dill and cloudpickle write them."""
    code = dumped(marshal.dumps(compile(f"open({str(marker)!r}, 'w')", "x", "eval")))
    function = called(named("types", "FunctionType"), called(named("marshal", "loads"), code), b"}")
    return called(function)


def extension(marker: Path) -> bytes:
    if ("os", "system") not in copyreg._extension_registry:  # type: ignore[attr-defined]
        copyreg.add_extension("os", "system", 241)
    return b"\x82\xf1(" + text(f"touch {marker}") + b"tR"


MEMMAP = named("numpy", "memmap")


def memmap_arguments(m: Path) -> bytes:
    return dumped((str(m), "uint8", "w+", 0, (1,)))


LIVE: dict[str, Callable[[Path], bytes]] = {  # each makes the marker when pickle itself loads it
    "os.system": lambda m: dumped(Call(os.system, f"touch {m}")),
    "subprocess": lambda m: dumped(Call(subprocess.check_call, ["touch", str(m)])),
    "eval": lambda m: dumped(Call(eval, f"open({str(m)!r}, 'w')")),
    "exec": lambda m: dumped(Call(exec, f"open({str(m)!r}, 'w')")),
    "open": lambda m: dumped(Call(open, str(m), "w")),
    "io.FileIO": lambda m: dumped(Call(io.FileIO, str(m), "w")),
    "pathlib": lambda m: called(get("pathlib", "Path", "touch"), called(named("pathlib", "Path"), text(str(m)))),
    "shutil": lambda m: dumped(Call(shutil.copyfile, "/dev/null", str(m))),
    "timeit": lambda m: dumped(Call(timeit.timeit, f"open({str(m)!r}, 'w')", "pass", timeit.default_timer, 1)),
    "getattr chain": lambda m: called(get("os", "system"), text(f"touch {m}")),
    "numpy by getattr": lambda m: called(get("numpy", "savetxt"), text(str(m)), b"]"),
    "attrgetter": lambda m: called(
        called(dumped(Call(operator.attrgetter, "system")), called(named("builtins", "__import__"), text("os"))),
        text(f"touch {m}"),
    ),
    "nested reduces": lambda m: called(
        called(named("functools", "partial"), named("os", "system")), text(f"touch {m}")
    ),
    "pickle in a pickle": lambda m: dumped(Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {m}")))),
    "numpy.load": lambda m: dumped(Call(np.load, evil_npy(m), None, True)),
    "numpy.savetxt": lambda m: dumped(Call(np.savetxt, str(m), [])),
    "numpy.memmap": lambda m: called(MEMMAP, text(str(m)), text("uint8"), text("w+"), b"K\0", b"K\x01\x85"),
    "numpy.lib": lambda m: called(
        named("numpy.lib.format", "open_memmap"), text(str(m)), text("w+"), text("u1"), b"K\x01\x85"
    ),
    "runstring": lambda m: called(
        named("numpy.testing._private.utils", "runstring"), text(f"open({str(m)!r}, 'w')"), b"}"
    ),
    "torch.load": lambda m: dumped(Call(torch.storage._load_from_bytes, torch_bytes(Call(os.system, f"touch {m}")))),
    "codecs.open": lambda m: dumped(Call(codecs.open, str(m), "w")) if sys.version_info < (3, 14) else dumped(0),
    "import of a file": lambda m: called(get("runpy", "run_path"), text(script(m))),
    "function of a test": lambda m: called(named("test_weights", "mark"), text(str(m))),
    "code object": code_object,
    "protocol 4": lambda m: text("os") + text("system") + b"\x93" + b"(" + text(f"touch {m}") + b"tR",
    "computed name": lambda m: (
        called(get("builtins", "str", "lower"), text("OS"))
        + called(get("builtins", "str", "lower"), text("SYSTEM"))
        + b"\x93("
        + text(f"touch {m}")
        + b"tR"
    ),
    "INST": lambda m: b"(" + text(f"touch {m}") + b"ios\nsystem\n",
    "OBJ": lambda m: b"(" + named("os", "system") + text(f"touch {m}") + b"o",
    "NEWOBJ": lambda m: MEMMAP + memmap_arguments(m) + b"\x81",
    "NEWOBJ_EX": lambda m: MEMMAP + dumped((str(m),)) + dumped({"mode": "w+", "shape": (1,)}) + b"\x92",
    "EXT": extension,
    "array of objects": lambda m: dumped(np.array([Call(os.system, f"touch {m}")], dtype=object)),
    "record of objects": lambda m: dumped(np.array([(Call(os.system, f"touch {m}"),)], dtype=[("a", "O")])),
    "list of calls": lambda m: b"(" + dumped(Call(os.system, f"touch {m}")) + b"l",
    "dict key": lambda m: b"}" + dumped(Call(os.system, f"touch {m}")) + b"K\x01s",
    "unused": lambda m: dumped(Call(os.system, f"touch {m}")) + b"0" + dumped(np.zeros(3)),
    "state of an array": lambda m: (
        called(named("numpy", "ndarray"), b"K\0\x85") + dumped(Call(os.system, f"touch {m}")) + b"b"
    ),
    "argument of a dtype": lambda m: called(named("numpy", "dtype"), dumped(Call(os.system, f"touch {m}"))),
}


def script(marker: Path) -> str:
    path = marker.with_name("script.py")
    path.write_text(f"open({str(marker)!r}, 'w')")
    return str(path)


@pytest.mark.parametrize("name", LIVE)
def test_what_a_pickle_calls_is_not_executed(tmp_path: Path, name: str) -> None:
    """In each container the marker is not made and the file is refused; pickle itself makes it: the attack is real."""
    marker = tmp_path / "marker"
    pickled = infected(LIVE[name](marker), protocol=2)  # the one that torch takes
    paths = {container: tmp_path / container for container in CONTAINERS}
    for container, path in paths.items():
        path.write_bytes(CONTAINERS[container](pickled))
    found = forked(lambda: [refusal(path) for path in paths.values()])
    assert not marker.exists()
    assert (found.kind, "does not fit" in found.text) == ("loaded", False), found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy's old modules
        forked(lambda: pickle.loads(pickled))
    assert marker.exists(), "a payload that does nothing shows nothing"


def built(state: bytes) -> bytes:
    return called(named("numpy._core.multiarray", "_reconstruct"), named("numpy", "ndarray"), b"K\0\x85", b"C\x01b") + (
        state + b"b"
    )


def dtype(code: bytes, order: str = "<") -> bytes:
    return called(named("numpy", "dtype"), code, b"\x89\x88") + dumped((3, order, None, None, None, -1, -1, 0)) + b"b"


def array(
    shape: Any = (3,), code: Any = "f4", content: Any = bytes(12), order: str = "<", fortran: Any = False
) -> bytes:
    parts = (dumped(1), dumped(shape), dtype(dumped(code), order), dumped(fortran), dumped(content))
    return built(b"(" + b"".join(parts) + b"t")


ARRAYS: dict[str, bytes] = {
    "too short": array((4,)),
    "too long": array((2,)),
    "half a number": array((3,), content=bytes(13)),
    "huge": array((2**39,)),
    "huger": array((2**62,)),
    "no machine integer": array((10**30,)),
    "huge product": array((2**39, 2**39, 2**39)),
    "huge and empty": array((0, 2**39, 2**39), content=b""),
    "negative": array((-3,)),
    "negative twice": array((-1, -3)),
    "of booleans": array((True, 3)),
    "of floats": array((3.0,)),
    "of text": array(("3",)),
    "a list": array([3]),
    "a number": array(3),
    "nothing": array(None),
    "nested": array(((3,),)),
    "33 dimensions": array((1,) * 32 + (3,)),
    "content None": array(content=None),
    "content a number": array(content=12),
    "content no latin1": array(content="\u0100" * 12),
    "content a tuple": array(content=(0.0, 0.0, 0.0)),
    "content a list": array(content=[0.0, 0.0, 0.0]),
    "dtype object": array(code="O", content=bytes(24)),
    "dtype O8": array(code="O8", content=bytes(24)),
    "dtype void": array(code="V4"),
    "dtype text": array(code="U1"),
    "dtype bytes": array(code="S4"),
    "dtype date": array(code="M8[s]", content=bytes(24)),
    "dtype complex": array(code="c8", content=bytes(24)),
    "dtype long double": array(code="f16", content=bytes(48)),
    "dtype pair": array(code="f2,f2"),
    "dtype of a shape": array(code="3f4", shape=()),
    "dtype list": array(code=[("a", "f4")]),
    "dtype None": array(code=None),
    "dtype number": array(code=4),
    "dtype empty": array(code=""),
    "no dtype": built(dumped((1, (3,), None, False, bytes(12)))),
    "dtype a text": built(dumped((1, (3,), "f4", False, bytes(12)))),
    "state too short": built(dumped((1, (3,)))),
    "state empty": built(b")"),
    "state a dict": built(b"}" + text("array") + b"Ns"),
    "state a pair": built(b"}}\x86"),
    "no state": called(
        named("numpy._core.multiarray", "_reconstruct"), named("numpy", "ndarray"), b"K\0\x85", b"C\x01b"
    ),
    "constructed": called(named("numpy", "ndarray"), dumped((3,))),
    "scalar of no dtype": called(named("numpy._core.multiarray", "scalar"), text("f4"), dumped(bytes(4))),
    "scalar of objects": called(named("numpy._core.multiarray", "scalar"), dtype(text("O")), dumped(bytes(8))),
    "scalar too long": called(named("numpy._core.multiarray", "scalar"), dtype(text("f4")), dumped(bytes(8))),
    "the class": named("numpy", "ndarray"),
    "the function": named("_codecs", "encode"),
    "a dtype": dtype(text("f4")),
    "a text": text("w"),
    "bytes": dumped(bytes(12)),
    "a list of numbers": dumped([0.0, 1.0]),
    "a dict": dumped({"w": 1.0}),
    "a float": dumped(1.0),
    "a set": dumped({1, 2}, 4)[9:],
    "attribute of a class": named("numpy", "ndarray.tofile"),
    "attribute of a dict": named("collections", "OrderedDict.fromkeys"),
    "numpy.loads": named("numpy", "loads"),
    "build of a class": named("numpy", "ndarray") + dumped({"a": 1}) + b"b",
    "build of a function": named("_codecs", "encode") + dumped({"a": 1}) + b"b",
    "build of a dict": b"}" + dumped({"a": 1}) + b"b",
    "build of slots": named("numpy", "dtype") + dumped((None, {"__init__": 1})) + b"b",
    "persistent id": b"Pstorage\n",
    "binary persistent id": text("storage") + b"Q",
    "extension nobody knows": b"\x82\x07",
    "buffer from outside": b"\x97",
    "memo that is not there": b"h\xee",
    "unknown operation": b"\xff",
    "protocol 200": b"\x80\xc8N",
    "pop of nothing": b"0" * 500,
    "mark of nothing": b"ttttt",
    "bytes of 2**62": b"\x8e" + struct.pack("<Q", 2**62),
    "bytes of 2**64 - 1": b"\x8e" + struct.pack("<Q", 2**64 - 1),
    "bytes of 4 GiB": b"B" + struct.pack("<I", 2**32 - 1),
    "text of 2**62": b"\x8d" + struct.pack("<Q", 2**62),
    "text of 4 GiB": b"X" + struct.pack("<I", 2**32 - 1),
    "buffer of 2**62": b"\x96" + struct.pack("<Q", 2**62),
    "buffer of 1 TiB": b"\x96" + struct.pack("<Q", 2**40),
    "buffer of 1 GiB": b"\x96" + struct.pack("<Q", 2**30),
    "buffer of 2**64 - 1": b"\x96" + struct.pack("<Q", 2**64 - 1),
    "integer of 2 GiB": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "frame of 2**60": b"\x95" + struct.pack("<Q", 2**60) + b"N",
    "frame of 2**64 - 1": b"\x95" + struct.pack("<Q", 2**64 - 1) + b"N",
    "memo of 2**31 - 1": b"Nr" + struct.pack("<I", 2**31 - 1),
    "memo of 2**32 - 1": b"Nr" + struct.pack("<I", 2**32 - 1),
    "decimal of a million digits": b"L" + b"9" * 10**6 + b"L\n",
    "other codec": array(content=bytes(12)).replace(
        dumped(bytes(12)), called(named("_codecs", "encode"), text("\0" * 12), text("rot13"))
    ),
    "codec of numbers": array(content=bytes(12)).replace(
        dumped(bytes(12)), called(named("_codecs", "encode"), text("\0" * 12), b"K\x07")
    ),
    "tuple in itself": b"]\x94h\x00a",
}


@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_no_array_of_numbers_is_refused(tmp_path: Path, name: str) -> None:
    """In the place of one array of the authors' file: refused for what it is, with little memory and time."""
    path = tmp_path / "weights"
    path.write_bytes(infected(ARRAYS[name], protocol=4))
    found = forked(lambda: refusal(path, lambda: read_tensors(path), loading(path)))
    assert found.kind == "loaded", found
    assert found.text.count("not a plain pickle") + found.text.count("is not an array") == 2, found


def doubling(wrap: bytes, times: int) -> bytes:
    """A value of 2**times parts in a few bytes: each level holds the one before twice."""
    return b")" + b"".join(b"2" + wrap for _ in range(times))


KEYS: dict[str, bytes] = {
    "a number": b"K\x07",
    "bytes": b"C\x01w",
    "None": b"N",
    "a number of 10000 digits": dumped(10**10000),
    "a long text": text("w" * 10**6),
    "a lone surrogate": b"X\x03\0\0\0\xed\xa0\x80",
    "a tuple of 2**60 parts": doubling(b"\x86", 60),
    "a tuple a million deep": b")" + b"\x85" * 10**6,
    "a frozen set of 2**60 parts": b"(N\x91" + b"".join(b"q\x07(h\x07N\x86h\x07\x91" for _ in range(60)),
}


@pytest.mark.parametrize("name", KEYS)
def test_names_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    """In the place of the name of one array; the message is for a person, whatever the name."""
    path = tmp_path / "weights"
    path.write_bytes(infected(dumped(np.zeros((64, 10), np.float32)), key=KEYS[name], protocol=4))
    refuses(path)


CODES: dict[str, bytes] = {
    "2**60 parts": doubling(b"\x86", 60),
    "a million deep": b")" + b"\x85" * 10**6,
    "list in itself": b"]q\x07h\x07a",
    "a number of 10000 digits": dumped(10**10000),
}


@pytest.mark.parametrize("name", CODES)
def test_a_message_does_not_write_out_a_bomb(tmp_path: Path, name: str) -> None:
    """The code of a dtype that would be terabytes of text."""
    path = tmp_path / "weights"
    path.write_bytes(infected(called(named("numpy", "dtype"), CODES[name]), protocol=4))
    refuses(path)


def test_one_array_under_many_names_takes_the_memory_of_one(tmp_path: Path) -> None:
    """A file of 2 MB that would be 4 GB of tensors."""
    shared = np.zeros(1 << 19, np.float32)
    tree = {"NFNet/~/linear": {f"w{i}": shared for i in range(2000)}}
    path = tmp_path / "weights"
    path.write_bytes(pickle.dumps(tree, 4))
    refuses(path)


def test_a_codec_is_not_taken_for_another(tmp_path: Path) -> None:
    """Only latin1 gives back the bytes of an array; what another would give is not what is read."""
    raw = np.full(10, 1.5, np.float32)
    content = raw.tobytes().decode("latin-1")
    for codec in ("latin1", "latin-1", "iso-8859-1", "utf-16-be", "utf-8", "raw_unicode_escape"):
        encoded = called(named("_codecs", "encode"), text(content), text(codec))
        pickled = infected(array((10,), content=b"@").replace(dumped(b"@"), encoded), key=text("b"))
        path = tmp_path / "weights"
        path.write_bytes(pickled)
        try:
            found = read_tensors(path)["NFNet/~/linear/b"]
        except UserError:
            continue
        assert found.numpy().tobytes() == codecs.encode(content, codec) == raw.tobytes()


def kinds_of_bytes() -> dict[str, bytes]:
    """Honest files of the target, of every kind."""
    model = target()
    state = to_timm(model)
    return {
        "authors": authors_file(),
        "safetensors": save(state),
        "zip": torch_bytes(state),
        "legacy": torch_bytes(state, _use_new_zipfile_serialization=False),
    }


CONTAINER_KINDS = ("authors", "safetensors", "zip", "legacy")


def each(path: Path, contents: Iterator[bytes]) -> Callable[[], int]:
    """Loads file after file; each is refused or finite. The first that is neither is raised, with its number."""

    def call() -> int:
        count, call = 0, loading(path)
        initial = {n: t.clone() for n, t in target().state_dict().items()}
        for content in contents:
            path.write_bytes(content)
            try:
                call()
                target().load_state_dict(initial)
            except UserError:
                pass
            except Exception as error:
                raise RuntimeError(f"file {count}: {traceback.format_exc(limit=-6)}") from error
            count += 1
        return count

    return call


@pytest.mark.parametrize("kind", CONTAINER_KINDS)
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str) -> None:
    """At every one of the first and the last thirty bytes, and at a hundred places between."""
    whole, path = kinds_of_bytes()[kind], tmp_path / "weights"
    last = len(whole) - 1
    places = {*range(30), *range(0, last, last // 100), *range(last - 30, last + 1)}

    def call() -> str:
        accepted = []
        for n in sorted(places):
            path.write_bytes(whole[:n])
            try:
                loading(path)()
                accepted.append(n)
            except UserError:
                pass
        return f"accepted {accepted}"

    found = forked(call, seconds=30)
    assert (found.kind, found.text) == ("loaded", "accepted []"), found


def flipped(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Copies with one to four bytes changed: half of them near an end, where the structure is, half anywhere."""
    rng = random.Random(seed)
    for i in range(count):
        copy = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            near = rng.randrange(min(6000, len(whole)))
            at = rng.choice([near, -1 - near]) if i % 2 else rng.randrange(len(whole))
            copy[at] = rng.choice([copy[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255])
        yield bytes(copy)


@pytest.mark.parametrize("kind", CONTAINER_KINDS)
def test_a_changed_byte_is_refused_or_a_finite_number(tmp_path: Path, kind: str) -> None:
    """Some hundred random changes of an honest file; none ends in another exception, a crash or a long wait."""
    whole = kinds_of_bytes()[kind]
    found = forked(each(tmp_path / "weights", flipped(whole, 120, seed=1)), seconds=30)
    assert (found.kind, found.text) == ("loaded", "120"), found


def operations_changed(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Copies of a pickle with one operation replaced by another, left out or written twice."""
    rng = random.Random(seed)
    starts = [p for _, _, p in pickletools.genops(whole) if p is not None]
    codes = [op.code.encode("latin-1") for op in pickletools.opcodes]
    for _ in range(count):
        i = rng.randrange(1, len(starts) - 1)
        begin, end = starts[i], starts[i + 1]
        operation = whole[begin:end]
        changed = rng.choice([b"", operation * 2, rng.choice(codes) + operation[1:], rng.choice(codes) + operation])
        yield whole[:begin] + changed + whole[end:]


def test_changed_operations_are_refused_or_harmless(tmp_path: Path) -> None:
    """A pickle is a program: 200 programs that differ from an honest one in one operation."""
    found = forked(each(tmp_path / "weights", operations_changed(authors_file(), 200, seed=2)), seconds=30)
    assert (found.kind, found.text) == ("loaded", "200"), found


# ---- torch's files ----


def zip_without(content: bytes, change: Callable[[str, bytes], bytes | None]) -> bytes:
    """A zip file with its members changed, or left out where `change` returns None."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            member = change(name, old.read(name))
            if member is not None:
                new.writestr(name, member)
    return out.getvalue()


def scripted() -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), out)
    return out.getvalue()


def deflated_bomb() -> bytes:
    """512 MB of zeros in a member of half a MB, where a storage of four numbers should be."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_bytes({"w": torch.zeros(4)}))) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = bytes(1 << 29) if name.endswith("data/0") else old.read(name)
            new.writestr(name, data, zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED, 1)
    return out.getvalue()


TORCH_FILES: dict[str, Callable[[State], bytes]] = {
    "whole module": lambda s: torch_bytes(nn.Linear(2, 2)),
    "whole network": lambda s: torch_bytes(fresh(TINY)),
    "storages missing": lambda s: zip_without(torch_bytes(s), lambda n, b: None if "/data/" in n else b),
    "one storage missing": lambda s: zip_without(torch_bytes(s), lambda n, b: None if n.endswith("/data/7") else b),
    "storages truncated": lambda s: zip_without(torch_bytes(s), lambda n, b: b[:2] if "/data/" in n else b),
    "storages empty": lambda s: zip_without(torch_bytes(s), lambda n, b: b"" if "/data/" in n else b),
    "storages too long": lambda s: zip_without(torch_bytes(s), lambda n, b: b + b"0123" if "/data/" in n else b),
    "no pickle": lambda s: zip_without(torch_bytes(s), lambda n, b: None if n.endswith("data.pkl") else b),
    "empty pickle": lambda s: zip_without(torch_bytes(s), lambda n, b: b"" if n.endswith("data.pkl") else b),
    "version 999": lambda s: zip_without(torch_bytes(s), lambda n, b: b"999\n" if n.endswith("version") else b),
    "version a word": lambda s: zip_without(torch_bytes(s), lambda n, b: b"new\n" if n.endswith("version") else b),
    "byteorder a word": lambda s: zip_without(torch_bytes(s), lambda n, b: b"odd" if n.endswith("byteorder") else b),
    "empty zip": lambda s: as_zip(b"", {})[:30] + b"PK\5\6" + bytes(18),
    "any zip": lambda s: zip_without(as_zip(b"N."), lambda n, b: None if "data" in n else b),
    "numpy's npz": lambda s: npz(),
    "TorchScript": lambda s: scripted(),
    "a tensor": lambda s: torch_bytes(torch.zeros(3)),
    "a list": lambda s: torch_bytes([torch.zeros(3)]),
    "None": lambda s: torch_bytes(None),
    "numbers": lambda s: torch_bytes({**s, "epoch": 3}),
    "nested twice": lambda s: torch_bytes({"state_dict": {"model": s}}),
    "empty": lambda s: torch_bytes({}),
    "empty state_dict": lambda s: torch_bytes({"state_dict": {}}),
    "names that are numbers": lambda s: torch_bytes(dict(enumerate(s.values()))),
    "a name twice": lambda s: torch_bytes({**s, **{f"module.{n}": torch.zeros_like(t) for n, t in s.items()}}),
    "stride 0": lambda s: torch_bytes({**s, "final_conv.gain": torch.zeros(1).expand(1 << 20, 1 << 20)}),
    "stride 0 in a gate": lambda s: torch_bytes(
        {**s, "stages.0.0.attn_last.fc1.weight": torch.zeros(1).expand(1 << 10, 1 << 20, 1 << 10)}
    ),
    "bomb": lambda s: deflated_bomb(),
    "arrays": lambda s: torch_bytes({n: t.numpy() for n, t in s.items()}),
    "legacy storages missing": lambda s: as_legacy(dumped_state()),
}


def dumped_state() -> bytes:
    """A tensor whose storage of 1 TiB is nowhere."""
    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu")
    storage += dumped(1 << 38) + b"NtQ"
    tensor = called(
        named("torch._utils", "_rebuild_tensor_v2"), storage, dumped(0), dumped((4,)), dumped((1,)), b"\x89}"
    )
    return b"\x80\x02}" + text("w") + tensor + b"s."


def npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, w=np.zeros(3))
    return out.getvalue()


@pytest.mark.parametrize("name", TORCH_FILES)
def test_torch_files_that_hold_no_weights_are_refused(tmp_path: Path, name: str) -> None:
    """Each in little time and memory."""
    path = tmp_path / "weights"
    path.write_bytes(TORCH_FILES[name](to_timm(target())))
    refuses(path)


# ---- safetensors ----


def container(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """safetensors by hand."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def tensor_entry(shape: Any = (2,), kind: Any = "F32", offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": offsets}


BROKEN_SAFETENSORS: dict[str, bytes] = {
    "header of 1 TiB": container({}, length=2**40),
    "header of 2**63": container({}, length=2**63),
    "header of 2**64 - 1": container({}, length=2**64 - 1),
    "header of nothing": container(b"{", length=0),
    "header longer than the file": container({}, length=100),
    "header cut": container(b'{"w": {"dtype"'),
    "header not JSON": container(b"{w: 1}"),
    "header of other bytes": container(b"{\xff\xfe}"),
    "header deep": container(b'{"w":' * 100000 + b"1" + b"}" * 100000),
    "header twice": container(b'{"w":' + json.dumps(tensor_entry()).encode() + b"," * 2 + b"}", bytes(8)),
    "overlap": container({"a": tensor_entry(), "b": tensor_entry()}, bytes(8)),
    "gap": container({"a": tensor_entry(), "b": tensor_entry(offsets=(16, 24))}, bytes(24)),
    "outside": container({"a": tensor_entry(offsets=(0, 2**40), shape=(2**38,))}, bytes(8)),
    "backwards": container({"a": tensor_entry(offsets=(8, 0))}, bytes(8)),
    "negative": container({"a": tensor_entry(offsets=(-8, 0))}, bytes(8)),
    "one offset": container({"a": tensor_entry(offsets=(8,))}, bytes(8)),
    "shape too small": container({"a": tensor_entry((1,))}, bytes(8)),
    "shape overflows": container({"a": tensor_entry((2**32, 2**32))}, bytes(8)),
    "shape negative": container({"a": tensor_entry((-2,))}, bytes(8)),
    "shape of text": container({"a": tensor_entry(("2",))}, bytes(8)),
    "unknown type": container({"a": tensor_entry(kind="F33")}, bytes(8)),
    "type of objects": container({"a": tensor_entry(kind="O")}, bytes(8)),
    "type a number": container({"a": tensor_entry(kind=4)}, bytes(8)),
    "metadata a list": container({"__metadata__": []}),
    "metadata of numbers": container({"__metadata__": {"normfree": 3}}),
    "a rest": container({"a": tensor_entry()}, bytes(9)),
    "our header no JSON": container({"__metadata__": {"normfree": "{"}}),
    "our header deep": container({"__metadata__": {"normfree": "[" * 100000 + "]" * 100000}}),
    "our header a number of 10000 digits": container({"__metadata__": {"normfree": "9" * 10000}}),
    "our header a list": container({"__metadata__": {"normfree": "[]"}}),
    "our header a text": container({"__metadata__": {"normfree": '"config"'}}),
    "our header null": container({"__metadata__": {"normfree": "null"}}),
    "our header empty": container({"__metadata__": {"normfree": "{}"}}),
    "our header elsewhere": container({"__metadata__": {"format": "pt"}}),
    "empty file": b"",
    "eight bytes": bytes(8),
    "a text": b"These are no weights, but a text of some length.\n",
    "a brace": b"12345678{",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("name", BROKEN_SAFETENSORS)
def test_broken_safetensors_are_refused(tmp_path: Path, name: str) -> None:
    """By both readers, in little time and memory."""
    path = tmp_path / "weights"
    path.write_bytes(BROKEN_SAFETENSORS[name])
    found = forked(lambda: refusal(path, loading(path), lambda: load_model(path)))
    assert found.kind == "loaded", found


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A missing file, a directory, and one that may not be opened as a folder is in its path."""
    (tmp_path / "file").write_bytes(b"")
    for path, words in ((tmp_path / "none", "missing|No such"), (tmp_path, "."), (tmp_path / "file" / "x", ".")):
        with pytest.raises(UserError, match=words):
            load_weights(target(), path)
        with pytest.raises(UserError, match=words) as caught:
            load_model(path)
        assert str(path) in str(caught.value)


def test_nested_values_in_our_header_are_refused_at_every_depth(tmp_path: Path) -> None:
    """JSON that is read may still be too deep to be written into a message."""
    path, model = tmp_path / "weights", fresh(TINY)
    config = json.dumps(asdict(TINY))
    for depth in (10, *range(850, 1000, 3), 5000):
        deep = config[:-1] + ', "widths": ' + "[" * depth + "]" * depth + "}"
        path.write_bytes(save(dict(model.state_dict()), {"normfree": '{"config": ' + deep + "}"}))
        with pytest.raises(UserError):
            load_model(path)


RATIOS = ("expansion", "se_ratio", "first_expansion")
OUTER = ("num_classes", "in_chans", "final_width")
HUGE, INF, NAN = 10**30, float("inf"), float("nan")
HOSTILE_CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"{name} {value}": {name: [value] * (3 if name.startswith("stem") else 4)}
        for name in ("widths", "depths", "strides", "stem_widths", "stem_strides")
        for value in (10**9, 10**18, HUGE, 0, -1, 1.5, True, "64")
        if (name, value) not in (("strides", 10**9), ("stem_strides", 10**9))  # no weight depends on them
    },
    **{
        f"{name} {value}": {name: value}
        for name in ("stem_kernel", *OUTER, "pointwise_groups")
        for value in (10**9, 10**18, HUGE, 0, -1, 1.5)
    },
    **{f"group_width {v}": {"group_width": [v]} for v in (10**9, HUGE, -1, None)},
    **{f"{n} {v}": {n: [v] if n == "expansion" else v} for n in RATIOS for v in (1e9, 1e300, -1.0, INF, NAN, "a")},
    **{
        f"{name} {value}": {name: value}
        for name in ("alpha", "skip_init", "classifier_std", "ws_eps", "drop_rate", "stochastic_depth")
        for value in (INF, NAN, "0.1", None)
    },
    "alpha 1e200": {"alpha": 1e200},
    "drop_rate 2": {"drop_rate": 2.0},
    "stochastic_depth -1": {"stochastic_depth": -1.0},
    "ws_eps -1": {"ws_eps": -1.0},
    "classifier_std -1": {"classifier_std": -1.0},
    "no widths": {"widths": [], "depths": [], "strides": [], "group_width": [], "expansion": [], "expand_from": []},
    "no stem": {"stem_widths": [], "stem_strides": []},
    "unlike lists": {"depths": [1, 2]},
    "unlike stem": {"stem_strides": [1]},
    "groups that do not divide": {"pointwise_groups": 3},
    "activation unknown": {"activation": "__import__"},
    "activation a list": {"activation": ["gelu"]},
    "norm unknown": {"norm": "layer"},
    "stem unknown": {"stem": "os.system"},
    "padding None": {"padding": None},
    "output_stride 7": {"output_stride": 7},
    "unknown setting": {"module": "os"},
    "other widths": {"widths": [64, 64, 128, 128]},
    "deeper": {"depths": [1, 1, 2, 2]},
    "all the blocks there may be": {"depths": [500, 500, 500, 500]},
    "glu": {"activation": "glu", "widths": [1, 1, 1, 1], "stem_widths": [1, 1, 1]},
}


@pytest.mark.parametrize("name", HOSTILE_CONFIGS)
def test_a_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    """The configuration of another network, or of none, beside honest tensors; nothing is built for it."""
    path, model = tmp_path / "weights", fresh(TINY)
    save_weights(model, path, {"config": {**asdict(TINY), **HOSTILE_CONFIGS[name]}})
    found = forked(lambda: load_model(path))
    assert found.kind == "UserError", found
    assert len(found.text) < 1000, found


@pytest.mark.parametrize("config", [None, [], "nfnet_tiny", 3, {}, {"widths": [1]}, [["widths", [1]]]])
def test_a_header_without_a_configuration_is_refused(tmp_path: Path, config: Any) -> None:
    """Whatever JSON stands in its place."""
    path = tmp_path / "weights"
    save_weights(fresh(TINY), path, {"config": config})
    with pytest.raises(UserError, match="config"):
        load_model(path)


def test_a_header_does_not_say_folded_of_what_is_not(tmp_path: Path) -> None:
    """Nor whole of what is folded; the tensors decide."""
    path, model = tmp_path / "weights", fresh(TINY)
    for source, folded in ((model, True), (fold(model), False)):
        save_weights(source, path, {**describe(source), "folded": folded})
        with pytest.raises(UserError, match="does not fit the model"):
            load_model(path)


# ---- there and back ----

ROUND_TRIPS: dict[str, Callable[[], Network]] = {
    "tiny": lambda: fresh(TINY),
    "batch norm": lambda: fresh(replace(TINY, norm="batch", squeeze="none")),
    "folded": folded_tiny,
    "appendix E": lambda: fresh(
        replace(TINY, squeeze="straddle", pointwise_groups=2, group_width=(8, 8, 16, 16), stem="dct", final="fc")
    ),
    "folded dct": lambda: fold(fresh(replace(TINY, stem="dct", expansion=(0.25, 0.5, 0.5, 0.5), beta_first=True))),
    "pool stem": lambda: fresh(
        replace(TINY, stem_pool=True, stem_widths=(8,), stem_strides=(2,), final="none", shortcut="stride")
    ),
    "dense": lambda: fresh(replace(TINY, output_stride=8, activation="silu", in_chans=3, num_classes=5)),
    "timm": lambda: fresh(timm_file()[0]),
    "stages": lambda: fresh(replace(TINY, expand_from=("in", "in", "out", "out"), first_expansion=1.0)),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_saved_model_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    """Configuration, buffers and logits; in evaluation mode, ready to train, with what was said about it."""
    source, path = ROUND_TRIPS[name](), tmp_path / "weights.safetensors"
    about = {**describe(source), "classes": ["a", "é", "\u2028"], "score": 0.5}
    save_weights(source, path, about)
    model, found = load_model(path)
    assert found == json.loads(json.dumps(about))
    assert model.config == source.config
    assert not model.training
    assert bits(model.state_dict()) == bits(source.state_dict())
    assert torch.equal(logits(model), logits(source))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.train()(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_saving_replaces_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    """What is said about the weights cannot be written: the old file stays, and nothing beside it."""
    path = tmp_path / "weights"
    save_weights(fresh(TINY), path, {"n": 1})
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        save_weights(fresh(TINY, seed=1), path, {"n": object()})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_training_goes_on_from_half_a_precision(tmp_path: Path) -> None:
    """Weights in bfloat16 and float16 are read into float32 exactly, from both containers."""
    for kind in (torch.bfloat16, torch.float16):
        source = fresh(TINY).to(kind)
        for content in (save(dict(source.state_dict())), torch_bytes(source.state_dict())):
            path, model = tmp_path / "weights", fresh(TINY, seed=1)
            path.write_bytes(content)
            load_weights(model, path)
            for name, tensor in model.state_dict().items():
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, source.state_dict()[name].float())
