"""The networks by name."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from normfree.config import UserError, from_dict
from normfree.models.convert import convert
from normfree.models.download import find_weights
from normfree.models.families import MODELS, PER_STAGE, NetworkConfig
from normfree.models.fold import fold
from normfree.models.inference import for_inference
from normfree.models.network import FeatureInfo, Network
from normfree.models.weights import export_weights, fill_from, load_weights, save_weights

__all__ = [
    "MODELS",
    "FeatureInfo",
    "Network",
    "NetworkConfig",
    "convert",
    "create_model",
    "export_weights",
    "fold",
    "for_inference",
    "list_models",
    "load_weights",
    "model_config",
    "save_weights",
]


def list_models(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern such as "nfnet_f*", in the order of the table."""
    return [name for name in MODELS if fnmatch(name, pattern)]


def model_config(name: str) -> NetworkConfig:
    """The configuration behind a name.

    Raises:
        UserError: no such name; the message has the nearest ones.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "`normfree list` shows them"
        raise UserError(f"unknown model {name!r}; {hint}")
    return MODELS[name]


def create_model(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float | None = None,
    stochastic_depth: float | None = None,
    skip_init: float | None = None,
    pretrained: bool | str | Path | None = False,
    **options: Any,
) -> Network:
    """A new network, with random weights from torch's generator or with published ones.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier.
        in_chans: channels of the input.
        drop_rate: of dropout before the classifier, in [0, 1); None takes the variant's.
        stochastic_depth: rate of the last block, in [0, 1), growing linearly from 0; None takes the variant's.
        skip_init: where the gain of each residual branch starts; None takes the variant's, 0 in the paper. From 0 a
            branch needs hundreds of steps to wake, so 1 suits short runs.
        pretrained: True fetches published weights from the Hub, "authors" the file that the authors published; or a
            path or URL of a file that `load_weights` reads. With another number of classes the classifier stays new.
        options: any other field of `NetworkConfig`, such as output_stride=16, activation="silu", or one of the
            options of Appendix E: squeeze="straddle", pointwise_groups=2, group_width=(8, 8, 16, 16), stem="dct".

    Returns:
        a module (N, in_chans, H, W) -> (N, num_classes), in training mode.

    Raises:
        UserError: unknown name or option, a value out of range, or weights that cannot be had or do not fit.
    """
    given = {"drop_rate": drop_rate, "stochastic_depth": stochastic_depth, "skip_init": skip_init}
    changes = {key: value for key, value in given.items() if value is not None}
    sizes = {"num_classes": num_classes, "in_chans": in_chans}
    model = Network(with_options(model_config(name), {**options, **changes, **sizes}))
    model.name = name
    if pretrained is not False and pretrained is not None:
        loaded = fill_from(model, find_weights(name, pretrained))
        if loaded.left_out:
            warnings.warn(str(loaded), stacklevel=2)
    return model


def with_options(config: NetworkConfig, options: dict[str, Any]) -> NetworkConfig:
    """The configuration with some fields changed; one number serves for all stages.

    Raises:
        UserError: an unknown name, a wrong type, or a value out of range.
    """
    fields = asdict(config)
    for name in PER_STAGE:  # one value for all stages serves for another number of stages too
        fields[name] = fields[name][:1] if len(set(fields[name])) == 1 else fields[name]
    for name, value in options.items():
        several = isinstance(fields.get(name), tuple) and not isinstance(value, (tuple, list))
        fields[name] = (value,) if several else value
    return from_dict(NetworkConfig, fields, "options")


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options as they are typed: ["squeeze=straddle", "group_width=8,8,16,16"].

    Raises:
        UserError: a text without "=", or a field that is set in another way.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UserError(f"{text!r} is not an option: write name=value, such as squeeze=straddle")
        if name in _SET_ELSEWHERE:
            raise UserError(f"{name} is no option of the network here: {_SET_ELSEWHERE[name]}")
        values = [_typed(v) for v in value.split(",")]
        options[name] = values if len(values) > 1 else values[0]
    return options


_SET_ELSEWHERE = {
    **{name: f"it has a flag of its own, --model.{name.replace('_', '-')}" for name in ("drop_rate", "skip_init")},
    "stochastic_depth": "it has a flag of its own, --model.stochastic-depth",
    **dict.fromkeys(("num_classes", "in_chans"), "it follows from the images"),
    **dict.fromkeys(("train_size", "test_size"), "the images have --data.size and --data.test-size"),
    "magnitude": "it is no part of the network",
}


def _typed(text: str) -> Any:
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
