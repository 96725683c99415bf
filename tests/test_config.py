"""Settings survive JSON exactly, and whatever is wrong with them is one line that says where and what would do."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from example_run import RUN as FOLDER_RUN
from normfree.config import (
    DataConfig,
    Given,
    ModelConfig,
    OptimConfig,
    Run,
    TrainConfig,
    UserError,
    check_given,
    check_ranges,
    flat,
    from_dict,
    is_out_of_memory,
    suggestion,
    to_dict,
)
from normfree.data.crop import Preprocessing
from normfree.data.loader import Batch
from normfree.train.build import build_learner
from normfree.train.length import Length

CALM = settings(deadline=None, max_examples=60)  # a busy machine is no failure
RUN = replace(FOLDER_RUN, recipe="digits", data=replace(FOLDER_RUN.data, root="digits"))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TRIPLES = st.tuples(NUMBERS, NUMBERS, NUMBERS)
RUNS = st.builds(
    Run,
    model=st.builds(ModelConfig, drop_rate=st.none() | NUMBERS, stochastic_depth=st.none() | NUMBERS),
    data=st.builds(DataConfig, zoom=NUMBERS, min_area=NUMBERS, rotate=NUMBERS, mean=TRIPLES, std=TRIPLES),
    optim=st.builds(OptimConfig, lr=NUMBERS, clipping=NUMBERS, warmup=NUMBERS),
    train=st.builds(TrainConfig, epochs=NUMBERS),
)
INTEGERS = [n for n, v in flat(RUN).items() if type(v) is int]
FLOATS = [n for n, v in flat(RUN).items() if type(v) is float]


def through_json(run: Run) -> Any:
    return json.loads(json.dumps(to_dict(run), allow_nan=False))


def changed(name: str, value: Any) -> dict[str, Any]:
    """The settings as JSON has them, one of them replaced."""
    content = through_json(RUN)
    section, leaf = name.split(".")
    content[section][leaf] = value
    return dict(content)


def refusal(call: Callable[[], object]) -> str:
    """The message of the UserError; one line."""
    with pytest.raises(UserError) as refused:
        call()
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


# to_dict and from_dict


@CALM
@given(RUNS)
def test_a_run_survives_json(run: Run) -> None:
    """Every setting of any run comes back equal and of its type, tuples as tuples."""
    back = from_dict(Run, through_json(run))
    assert back == run
    assert {n: type(v) for n, v in flat(back).items()} == {n: type(v) for n, v in flat(run).items()}


def test_flat_has_every_setting() -> None:
    """`flat` names each field of each section once, by its dotted name."""
    content = to_dict(RUN)
    expected = {f"{s}.{n}": v for s in ("model", "data", "optim", "train") for n, v in content[s].items()}
    assert flat(RUN) == expected
    assert {f.name for f in dataclasses.fields(Run)} == {"recipe", "model", "data", "optim", "train"}


@pytest.mark.parametrize(
    ("name", "near"), [("data.sise", "size"), ("optim.clippin", "clipping"), ("train.batchsize", "batch_size")]
)
def test_an_unknown_setting_is_named_with_the_nearest(name: str, near: str) -> None:
    """A misspelt key is never silently ignored."""
    section, leaf = name.split(".")
    message = refusal(lambda: from_dict(Run, changed(name, 1)))
    assert message == f"config.{section}: unknown setting {leaf!r}; did you mean {near!r}?"


def test_an_unknown_setting_unlike_any_is_named() -> None:
    """Without a near name there is no suggestion."""
    message = refusal(lambda: from_dict(Run, through_json(RUN) | {"zzzzzz": 1}, "run/config.json"))
    assert message == "run/config.json: unknown setting 'zzzzzz'"


def test_a_missing_setting_is_named() -> None:
    """A setting without a default must be there; one with a default need not."""
    content = through_json(RUN)
    del content["data"]["size"]
    assert refusal(lambda: from_dict(Run, content)) == "config.data: 'size' is missing"
    content = through_json(RUN)
    del content["optim"]["momentum"], content["model"]["drop_rate"]
    assert from_dict(Run, content) == RUN


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        *((n, True, "must be int, not True") for n in INTEGERS),
        *((n, 1.0, "must be int, not 1.0") for n in INTEGERS),
        *((n, True, "must be float, not True") for n in FLOATS),
        *((n, "0.1", "must be float, not '0.1'") for n in FLOATS),
        ("data.size", None, "must be int, not None"),
        ("data.flip", 1, "must be bool, not 1"),
        ("data.root", 7, "must be str, not 7"),
        ("model.name", None, "must be str, not None"),
        ("model.drop_rate", "much", "must be float, not 'much'"),
        ("model.drop_rate", False, "must be float, not False"),
        ("data.mean", 0.5, "must be a list, not 0.5"),
        ("data.mean", "0.5", "must be a list, not '0.5'"),
        ("data.mean", [0.5, 0.5], "must be a list of 3, not [0.5, 0.5]"),
        ("data.std", [1.0, 1.0, 1.0, 1.0], "must be a list of 3, not [1.0, 1.0, 1.0, 1.0]"),
        ("data.std", [1.0, None, 1.0], "must be float, not None"),
    ],
)
def test_a_wrong_type_is_named(name: str, value: Any, cause: str) -> None:
    """Where the setting is, what it must be and what it is."""
    assert refusal(lambda: from_dict(Run, changed(name, value))) == f"config.{name} {cause}"


@pytest.mark.parametrize("value", [[], "digits", None, 3])
def test_a_section_must_be_an_object(value: Any) -> None:
    """So must the whole."""
    assert refusal(lambda: from_dict(Run, value, "config.json")) == f"config.json must be an object, not {value!r}"
    content = through_json(RUN) | {"data": value}
    assert refusal(lambda: from_dict(Run, content)) == f"config.data must be an object, not {value!r}"


@pytest.mark.parametrize("name", FLOATS)
def test_whole_numbers_will_do_for_float(name: str) -> None:
    """JSON of other programs writes 1 for 1.0: it becomes a float."""
    value = flat(from_dict(Run, changed(name, 1)))[name]
    assert (value, type(value)) == (1.0, float)


def test_numbers_beyond_float_are_refused() -> None:
    """A whole number too large for a float is a wrong setting like any other."""
    assert "config.optim.lr" in refusal(lambda: from_dict(Run, changed("optim.lr", 10**400)))


def test_optional_settings() -> None:
    """None, a float and a whole number are all fine where None is."""
    for value, expected in ((None, None), (0.25, 0.25), (1, 1.0)):
        assert from_dict(Run, changed("model.drop_rate", value)).model.drop_rate == expected


@dataclass(frozen=True)
class _Sizes:
    sizes: tuple[int, ...] = ()


def test_lists_of_any_length() -> None:
    """A tuple of any length takes lists of any length, each item of its type."""
    assert from_dict(_Sizes, {"sizes": [1, 2, 3, 4]}) == _Sizes((1, 2, 3, 4))
    assert from_dict(_Sizes, {"sizes": []}) == from_dict(_Sizes, {}) == _Sizes()
    assert refusal(lambda: from_dict(_Sizes, {"sizes": [1, "2"]}, "x")) == "x.sizes must be int, not '2'"


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "\u2028", "\x1b[31m", "\x00", os.fsdecode(b"\xff.jpg")])
def test_errors_are_one_line_that_can_be_printed(text: str) -> None:
    """Whatever a path in it holds, the message of a UserError is one line of text, without control characters."""
    message = str(UserError(f"{text} is missing"))
    assert message.isprintable()
    assert message.encode().decode() == message
    assert message.endswith(" is missing")
    assert str(UserError("größe 猫")) == "größe 猫"


# check_ranges


def test_a_run_within_its_ranges_passes() -> None:
    """The settings of a run, and a part of them, are let through."""
    check_ranges(flat(RUN))
    check_ranges({})
    check_ranges({"optim.lr": 0.5})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((n, -1) for n in INTEGERS),
        *((n, v) for n in FLOATS for v in (-0.5, float("nan"))),
        *((n, 0) for n in ("data.size", "data.test_size", "train.batch_size", "train.eval_batch_size")),
        ("train.log_every", 0),
        ("train.seed", 2**32),
        ("train.precision", "fp8"),
        ("train.epochs", 0.0),
        ("train.epochs", float("inf")),
        ("optim.lr", 0.0),
        ("optim.lr", float("inf")),
        ("optim.momentum", 1.0),
        ("optim.label_smoothing", 1.0),
        ("data.zoom", 1.0),
        ("data.min_area", 0.0),
        ("data.min_area", 1.1),
        ("data.validation", 1.0),
        ("data.bad_images", 1.1),
        ("data.std", (0.2, 0.0, 0.2)),
    ],
)
def test_a_number_out_of_range_is_refused(name: str, wrong: Any) -> None:
    """Every number has a range: below it, above it and not a number are refused by name, with the range."""
    message = refusal(lambda: check_ranges({name: wrong}))
    assert message.startswith(f"{name} must be ")
    assert message.endswith(f", not {wrong}")


# check_given


KINDS = ("agc", "sgd", "norm", "lars", "adamw")
# settings of an optimizer, each with another value, and the kinds that look at it
LOOKED_AT: dict[str, tuple[Any, set[str]]] = {
    "optim.clipping": (1e-3, {"agc", "norm", "adamw"}),
    "optim.eps": (10.0, {"agc", "adamw"}),
    "optim.unclipped": (("stage0", "stem"), {"agc", "adamw"}),
    "optim.lambdas": (("stage0=1e-4",), {"agc", "adamw"}),
    "optim.clip_classifier": (True, {"agc", "adamw"}),
    "optim.momentum": (0.5, {"agc", "sgd", "norm", "lars"}),
    "optim.nesterov": (False, {"agc", "sgd", "norm"}),
    "optim.weight_decay": (0.1, set(KINDS)),
    "optim.lr": (0.05, set(KINDS)),
}
OWN = {"norm": ["optim.clipping"], "lars": ["optim.lr"], "adamw": ["optim.lr", "optim.weight_decay"]}


def of_kind(kind: str, **more: Any) -> Run:
    return replace(RUN, optim=replace(RUN.optim, kind=kind, **more))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_setting_that_does_nothing_is_refused(kind: str, name: str) -> None:
    """By name, with the kind of optimizer; any other is let through, if the kind has what it needs of its own."""
    value, kinds = LOOKED_AT[name]
    values: dict[str, Any] = dict.fromkeys(OWN.get(kind, []), 0.3)
    values |= {name: value, "optim.kind": kind}
    run = Given(values).apply(RUN)
    if kind in kinds:
        check_given(run, values)
    else:
        assert (
            refusal(lambda: check_given(run, values)) == f"{name} does nothing with --optim.kind {kind}; leave it out"
        )


def _two_steps(run: Run) -> list[torch.Tensor]:
    """The weights behind two steps of a narrow network on noise."""
    learner = build_learner(run, 3, Length(4.0, 1.0), Preprocessing(32, "pad", 0, (0.5,) * 3, (0.2,) * 3))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 32, 32, 3), generator=generator, dtype=torch.uint8)
    for step in (1, 2):
        learner.step(
            Batch(images.permute(0, 3, 1, 2), torch.arange(6) % 3, torch.ones(6, dtype=torch.bool), []), 0, step
        )
    return [p.detach() for p in learner.model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_does_nothing_and_the_rest_something(kind: str) -> None:
    """The table above is what training does: two steps with and without each setting."""
    options = ("widths=8,16", "depths=1,1", "strides=1,2", "stem_widths=4", "stem_strides=2", "group_width=4")
    run = of_kind(kind, clipping=0.02, lr=0.02, weight_decay=0.01)
    run = replace(run, model=ModelConfig("nfnet_tiny", skip_init=1.0, options=(*options, "final_width=8")))
    plain = _two_steps(run)
    for name, (value, kinds) in LOOKED_AT.items():
        other = _two_steps(Given({name: value}).apply(run))
        same = all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
        assert same == (kind not in kinds), name


@pytest.mark.parametrize("kind", OWN)
def test_what_a_kind_needs_of_its_own_must_be_given(kind: str) -> None:
    """Since our defaults are those of AGC: a largest norm for Eq. 2, a rate for LARS and AdamW."""
    for name in OWN[kind]:
        others = {"optim.kind", *OWN[kind]} - {name}
        message = refusal(partial(check_given, of_kind(kind), others))
        assert message.startswith(f"--optim.kind {kind} needs its own --{name}: ")
    check_given(of_kind(kind), {"optim.kind", *OWN[kind]})


def test_settings_of_sam_need_sam() -> None:
    """Refused without it, by the first name; let through with it, and where they were not given."""
    given_names = {"optim.sam_every", "optim.sam_shards"}
    for names in ({"optim.sam_every"}, {"optim.sam_shards"}, given_names):
        message = refusal(lambda names=names: check_given(RUN, names))  # type: ignore[misc]
        assert message == f"{min(names)} does nothing without SAM; switch it on with --optim.sam-rho 0.05"
    check_given(of_kind("agc", sam_rho=0.05), given_names)
    check_given(of_kind("agc", sam_every=2, sam_shards=4), [])


# is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (UserError("the folder out of memory is missing"), False),
        (OSError("can't allocate memory"), False),
    ],
)
def test_whether_memory_ran_out(error: Exception, expected: bool) -> None:
    """By type or by torch's words, on any device; a user's file may be called so."""
    assert is_out_of_memory(error) is expected


def test_torch_says_so_in_these_words() -> None:
    """More than any machine has, on the CPU."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


# Given


def test_choose_prefers_what_was_given() -> None:
    """A given value wins, and its reason says so; ours comes with our reason, and in order."""
    chosen = Given({"optim.lr": 0.5})
    assert chosen.choose("optim.lr", 0.1, "by rule") == 0.5
    assert chosen.choose("data.size", 64, "small images") == 64
    assert chosen.choose("train.seed", 7) == 7
    assert chosen.chosen == [("optim.lr", 0.5, "as given"), ("data.size", 64, "small images")]


def test_choose_takes_falsy_values() -> None:
    """0, False and None are values like any other when they are given."""
    for value in (0, False, None, ""):
        assert Given({"x.y": value}).choose("x.y", lambda: pytest.fail("not needed")) == value


def test_choose_calls_functions_only_if_needed() -> None:
    """A function stands for a value that takes time: it is called once if nothing was given, else never."""
    calls: list[int] = []

    def expensive() -> Any:
        calls.append(1)
        return 64

    assert Given({"data.size": 32}).choose("data.size", expensive, "measured") == 32
    assert calls == []
    assert Given().choose("data.size", expensive, "measured") == 64
    assert calls == [1]


def test_apply_puts_every_value_in_its_place() -> None:
    """Given values replace those of a run; everything else, and the run itself, stays as it was."""
    before = to_dict(RUN)
    found = Given({"optim.lr": 0.5, "optim.momentum": 0.0, "model.name": "x", "data.mean": (0.1, 0.2, 0.3)}).apply(RUN)
    assert found == replace(
        RUN,
        optim=replace(RUN.optim, lr=0.5, momentum=0.0),
        model=replace(RUN.model, name="x"),
        data=replace(RUN.data, mean=(0.1, 0.2, 0.3)),
    )
    assert to_dict(RUN) == before
    assert Given().apply(RUN) == RUN


@CALM
@given(st.sets(st.sampled_from(sorted(flat(RUN)))), RUNS)
def test_apply_agrees_with_flat(names: set[str], other: Run) -> None:
    """Any settings of another run, applied by name, are afterwards those of that run, and no others are."""
    values = {n: flat(other)[n] for n in names}
    assert flat(Given(values).apply(RUN)) == flat(RUN) | values


# suggestion


def test_suggestion() -> None:
    """The nearest name, or nothing where none is near."""
    assert suggestion("trian", ["train", "list"]) == "; did you mean 'train'?"
    assert suggestion("zzz", ["train", "list"]) == ""
    assert suggestion("x", []) == ""
