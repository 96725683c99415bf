"""What a run is: its settings as dataclasses, written to and read from JSON strictly, and overrides by dotted names.

Recipes (`normfree.recipes`) fill a `Run`; the command line makes a flag of each field.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user can mend; the message is one line that says how."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """One line that any stream takes: a file's name may hold line breaks and bytes that are no text."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, on whatever device; torch has a class of its own for one of them only."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str  # of normfree.list_models()
    drop_rate: float | None = None  # dropout before the classifier; the variant's if None
    stochastic_depth: float | None = None  # rate of the last block; the variant's if None
    skip_init: float | None = None  # where SkipInit starts: 0 in the paper; 1 suits short runs; the variant's if None
    weights: str | None = None  # to start from: a file, an address, "hub" or "authors"; random if None
    options: tuple[str, ...] = ()  # other fields of normfree.models.NetworkConfig: squeeze=straddle stem=dct ...


@dataclass(frozen=True)
class DataConfig:
    """The images and what is done to them. Sizes are pixels."""

    root: str  # "digits"; a folder of images, tar shards, parquet files or a saved data set; "hf:NAME" of the Hub
    size: int  # side of a training image
    test_size: int  # side of a validation image
    train_crop: str  # "box": a random part, resized; "shift": the evaluation image, moved, zoomed and turned
    min_area: float  # smallest part of the image that a box covers
    shift: int  # largest move of "shift", in pixels
    zoom: float  # largest zoom of "shift": 0.1 is 10 % in or out
    rotate: float  # largest turn of "shift", in degrees
    flip: bool  # half of the training images are mirrored
    eval_crop: str  # "center": a centred square, resized; "squash": both sides resized; "pad": all of it, with borders
    margin: int  # pixels cut off around ("center", "squash": in all; "pad": the border on each side)
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of RGB in [0, 1], ImageNet's
    std: tuple[float, float, float] = IMAGENET_STD
    antialias: bool = True  # of what is made smaller; False resizes as the authors did, for evaluation in float32
    scaled_decode: bool = False  # large JPEGs are decoded at a half, a quarter or an eighth for training
    pixels: str = "uint8"  # of training images before mixing; "float16" is not rounded, as the authors' are not
    mixup: float = 0.0  # alpha of MixUp, 0.2 in the paper; 0 does without
    cutmix: bool = False  # on half of the images if there is MixUp, otherwise on all
    pairs: str = "disjoint"  # of both: "disjoint" reads two images for each, as the paper; "batch" takes neighbours
    randaugment: int = 0  # layers of RandAugment, 4 in the paper
    magnitude: float = 10.0  # of RandAugment
    autoaugment: bool = False  # the policy v0 of AutoAugment, in place of RandAugment
    validation: float = 0.2  # share of a folder without a val/ that is held out
    workers: int = 0  # loader processes; 0 loads in this one
    bad_images: float = 0.05  # the run stops when more than this share cannot be read
    timeout: float = 600.0  # seconds without a batch from the loader processes until the run stops; 0 waits for ever


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its schedule and the loss."""

    lr: float  # peak
    clipping: float  # lambda of AGC; of Eq. 2 for "norm"
    warmup: float  # epochs of linear warm-up
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 2e-5
    eps: float = 1e-3  # floor of a weight's norm in AGC
    label_smoothing: float = 0.1
    ema_decay: float = 0.99999  # 0 averages nothing
    kind: str = "agc"  # "agc" is the paper's; to compare: "sgd", "norm" (SGD and Eq. 2), "lars", "adamw" (and AGC)
    floor: float = 0.0  # learning rate at the end
    head_only: float = 0.0  # epochs at the start in which the classifier alone moves
    unclipped: tuple[str, ...] = ()  # parts without AGC, as in 4.1: stem stage0 .. head, or names such as blocks.0.*
    lambdas: tuple[str, ...] = ()  # of parts that have their own, as stage1=0.02 blocks.0.*=0.04
    clip_classifier: bool = False  # AGC on the classifier's weight too, against the paper's advice
    loss: str = "softmax"  # or "sigmoid"
    class_weights: str = "none"  # or "balanced": every class counts alike
    sam_rho: float = 0.0  # length of SAM's ascent step, 0.05 in the paper; 0 does without
    sam_every: int = 5  # the ascent sees every so many-th image; 1 is full SAM
    sam_shards: int = 1  # parts of the batch that ascend apart, as the devices of the paper did


@dataclass(frozen=True)
class TrainConfig:
    """The loop and the device."""

    epochs: float  # passes over the training images
    batch_size: int  # images of one optimizer step
    seed: int = 0
    device: str = "cpu"  # "cpu", "cuda", "cuda:1"
    precision: str = "fp32"  # of the maps in training: "fp32", "bf16" or "fp16"; weights and evaluation are fp32
    micro_batch: int | None = None  # images at once, whose gradients add up to the batch's; all that fit if None
    shards: int | None = (
        None  # equal parts whose gradients are added in one order: the same bits for all process counts
    )
    sharded: bool = False  # weights, gradients, momentum and average are dealt to the processes, for what does not fit
    compile: bool = False  # with torch.compile: on a CPU activations and standardisation, since the rest gains nothing
    remat: str = "none"  # compute maps again in backward instead of keeping them: of each "block" or "stage"
    eval_batch_size: int = 250
    log_every: int = 10  # steps between lines of metrics.jsonl
    save_minutes: float = 15.0  # a checkpoint after so long without one, between evaluations; 0 makes none there
    watchdog: float = 30.0  # minutes without a step, or a batch of an evaluation, until stacks are printed; 0 never


@dataclass(frozen=True)
class Run:
    """A whole run."""

    recipe: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig


PAIRS = ("disjoint", "batch")
EVAL_CROPS = ("center", "squash", "pad")
TRAIN_CROPS = ("box", "shift")

# name, what it must be, and the test
_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("model.drop_rate", "in [0, 1)", lambda v: v is None or 0 <= v < 1),
    ("model.stochastic_depth", "in [0, 1)", lambda v: v is None or 0 <= v < 1),
    ("data.train_crop", " or ".join(TRAIN_CROPS), lambda v: v in TRAIN_CROPS),
    ("data.eval_crop", " or ".join(EVAL_CROPS), lambda v: v in EVAL_CROPS),
    ("data.size", "positive", lambda v: v > 0),
    ("data.test_size", "positive", lambda v: v > 0),
    ("data.pixels", "uint8 or float16", lambda v: v in ("uint8", "float16")),
    ("data.mixup", "not negative", lambda v: v >= 0),
    ("data.pairs", " or ".join(PAIRS), lambda v: v in PAIRS),
    ("data.randaugment", "not negative", lambda v: v >= 0),
    ("data.magnitude", "in [0, 100]", lambda v: 0 <= v <= 100),
    ("data.timeout", "not negative", lambda v: v >= 0),
    ("data.min_area", "in (0, 1]", lambda v: 0 < v <= 1),
    ("data.shift", "not negative", lambda v: v >= 0),
    ("data.zoom", "in [0, 1)", lambda v: 0 <= v < 1),
    ("data.rotate", "in [0, 180]", lambda v: 0 <= v <= 180),
    ("data.margin", "not negative", lambda v: v >= 0),
    ("data.std", "positive", lambda v: min(v) > 0),
    ("data.validation", "in (0, 1)", lambda v: 0 < v < 1),
    ("data.workers", "not negative", lambda v: v >= 0),
    ("data.bad_images", "in [0, 1]", lambda v: 0 <= v <= 1),
    ("optim.lr", "positive", lambda v: v > 0),
    ("optim.clipping", "positive", lambda v: v > 0),
    ("optim.warmup", "not negative", lambda v: v >= 0),
    ("optim.momentum", "in [0, 1)", lambda v: 0 <= v < 1),
    ("optim.weight_decay", "not negative", lambda v: v >= 0),
    ("optim.eps", "positive", lambda v: v > 0),
    ("optim.label_smoothing", "in [0, 1)", lambda v: 0 <= v < 1),
    ("optim.ema_decay", "in [0, 1]", lambda v: 0 <= v <= 1),
    ("train.epochs", "in (0, 1000000]", lambda v: 0 < v <= 1e6),
    ("train.batch_size", "positive", lambda v: v > 0),
    ("train.seed", "in [0, 2^32)", lambda v: 0 <= v < 2**32),
    ("optim.kind", "agc, sgd, norm, lars or adamw", lambda v: v in ("agc", "sgd", "norm", "lars", "adamw")),
    ("optim.floor", "not negative", lambda v: v >= 0),
    ("optim.head_only", "not negative", lambda v: v >= 0),
    ("optim.loss", "softmax or sigmoid", lambda v: v in ("softmax", "sigmoid")),
    ("optim.class_weights", "none or balanced", lambda v: v in ("none", "balanced")),
    ("optim.sam_rho", "not negative", lambda v: v >= 0),
    ("optim.sam_every", "positive", lambda v: v > 0),
    ("optim.sam_shards", "positive", lambda v: v > 0),
    ("train.precision", "fp32 or bf16 or fp16", lambda v: v in ("fp32", "bf16", "fp16")),
    ("train.micro_batch", "positive", lambda v: v is None or v > 0),
    ("train.shards", "a power of two", lambda v: v is None or (v > 0 and v & (v - 1) == 0)),
    ("train.remat", "none, block or stage", lambda v: v in ("none", "block", "stage")),
    ("train.eval_batch_size", "positive", lambda v: v > 0),
    ("train.log_every", "positive", lambda v: v > 0),
    ("train.save_minutes", "not negative", lambda v: v >= 0),
    ("train.watchdog", "not negative", lambda v: v >= 0),
)


def check_ranges(values: dict[str, Any]) -> None:
    """Values by dotted name are in range; names that are not there are passed over.

    Raises:
        UserError: names the first that is not, and its range.
    """
    for name, value in values.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not all(math.isfinite(v) for v in numbers if isinstance(v, float)):
            raise UserError(f"{name} must be finite, not {value}")
        if any(isinstance(v, int) and abs(v) > 2**32 for v in numbers):
            raise UserError(f"{name} is too large")
    for name, words, fits in _RANGES:
        if name in values and not fits(values[name]):
            raise UserError(f"{name} must be {words}, not {values[name]}")


@dataclass
class Given:
    """Settings that the user gave, by dotted name ("optim.lr"), and the reasons for those chosen for them."""

    values: dict[str, Any] = field(default_factory=dict)
    chosen: list[tuple[str, Any, str]] = field(default_factory=list)

    def choose(self, name: str, value: Callable[[], T] | T, reason: str = "") -> T:
        """The user's value, or ours with its reason; a function is called only if its value is needed."""
        if name in self.values:
            picked, reason = self.values[name], "as given"
        else:
            picked = value() if callable(value) else value
        if reason:
            self.chosen.append((name, picked, reason))
        return typing.cast(T, picked)

    def find(self, name: str, search: Callable[[], tuple[T, str]]) -> T:
        """As `choose`, of a value that is searched for with its reason; not if the user's is there."""
        return self.choose(name, self.values[name]) if name in self.values else self.choose(name, *search())

    def apply(self, run: Run) -> Run:
        """The run with every given value in its place."""
        sections: dict[str, dict[str, Any]] = {}
        for name, value in self.values.items():
            section, _, leaf = name.partition(".")
            sections.setdefault(section, {})[leaf] = value
        return dataclasses.replace(
            run, **{s: dataclasses.replace(getattr(run, s), **changes) for s, changes in sections.items()}
        )


def flat(run: Run) -> dict[str, Any]:
    """Every setting by its dotted name."""
    found = {}
    for section in ("model", "data", "optim", "train"):
        for f in dataclasses.fields(getattr(run, section)):
            found[f"{section}.{f.name}"] = getattr(getattr(run, section), f.name)
    return found


# settings of "optim" that a kind of optimizer does not look at, and those whose defaults are another's
_IGNORED = {
    "sgd": ("clipping", "eps", "unclipped", "lambdas", "clip_classifier"),
    "norm": ("eps", "unclipped", "lambdas", "clip_classifier"),
    "lars": ("clipping", "eps", "unclipped", "lambdas", "clip_classifier", "nesterov"),
    "adamw": ("momentum", "nesterov"),
}
_OWN = {
    "norm": {"clipping": "the largest norm of the whole gradient, 1.0 say"},
    "lars": {"lr": "its steps are a thousandth of the rate times a tensor's length"},
    "adamw": {"lr": "1e-3 say", "weight_decay": "it is not L2, 0.05 say"},
}


def check_given(run: Run, given: Iterable[str]) -> None:
    """What the user gave is looked at by the run that came of it, and what its optimizer needs of its own is given.

    Raises:
        UserError: names the first setting that would do nothing, or that is missing.
    """
    given, kind = set(given), run.optim.kind
    for name in _IGNORED.get(kind, ()):
        if f"optim.{name}" in given:
            raise UserError(f"optim.{name} does nothing with --optim.kind {kind}; leave it out")
    for name, why in _OWN.get(kind, {}).items():
        if f"optim.{name}" not in given:
            raise UserError(f"--optim.kind {kind} needs its own --optim.{name}: {why}")
    d = run.data
    if not (d.mixup or d.cutmix) and "data.pairs" in given:
        raise UserError("data.pairs does nothing without mixing; switch it on with --data.mixup 0.2 --data.cutmix true")
    if d.autoaugment and d.randaugment:
        raise UserError("data.autoaugment takes the place of RandAugment: leave it out, or set --data.randaugment 0")
    if not d.randaugment and "data.magnitude" in given:
        raise UserError("data.magnitude does nothing without RandAugment; switch it on with --data.randaugment 4")
    if run.optim.sam_rho == 0 and (idle := sorted({"optim.sam_every", "optim.sam_shards"} & given)):
        raise UserError(f"{idle[0]} does nothing without SAM; switch it on with --optim.sam-rho 0.05")


# settings that a resumed run may change: what is trained is the same
MOVABLE = (
    "train.device",
    "train.eval_batch_size",
    "train.log_every",
    "train.save_minutes",
    "train.watchdog",
    "data.workers",
    "data.timeout",
)


def settings_hash(run: Run) -> str:
    """Of every setting that may not change during a run."""
    fixed = {name: value for name, value in flat(run).items() if name not in MOVABLE}
    return hashlib.blake2b(repr(sorted(fixed.items())).encode(), digest_size=16).hexdigest()


def to_dict(run: Run) -> dict[str, Any]:
    """Plain containers, as JSON has them."""
    return dataclasses.asdict(run)


def from_dict(kind: type[T], value: Any, where: str = "config") -> T:
    """A dataclass from plain containers: every name must be known, every type right, nothing missing.

    Raises:
        UserError: says which setting is wrong, and the nearest name for one that is unknown.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object, not {_shown(value)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in value:
        if name not in fields:
            raise UserError(f"{where}: unknown setting {_shown(name)}{suggestion(name, fields)}")
    for name, f in fields.items():
        if name not in value and f.default is dataclasses.MISSING:
            raise UserError(f"{where}: {name!r} is missing")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _checked(hints[name], v, f"{where}.{name}") for name, v in value.items()})


def _checked(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in typing.get_args(hint):
            return None
        return _checked(next(a for a in typing.get_args(hint) if a is not type(None)), value, where)
    if origin is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list, not {_shown(value)}")
        if items[-1] is Ellipsis:
            items = (items[0],) * len(value)
        if len(value) != len(items):
            raise UserError(f"{where} must be a list of {len(items)}, not {_shown(value)}")
        return tuple(_checked(i, v, where) for i, v in zip(items, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where} is too large") from None
    if type(value) is not hint:
        raise UserError(f"{where} must be {hint.__name__}, not {_shown(value)}")
    return value


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 100


def _shown(value: Any) -> str:
    """A value as a message has it: of what is long or deep, the beginning."""
    return _brief.repr(value)


def suggestion(name: str, known: Iterable[str]) -> str:
    """'; did you mean x?' for the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
