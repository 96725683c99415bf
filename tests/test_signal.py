"""Gains and variance bookkeeping."""

from __future__ import annotations

import math

import pytest
import torch

from authors import load
from normfree.nn.signal import ACTIVATIONS, GAMMA, Activation, activation, block_input_std, gain

_ELEMENTWISE = [name for name in GAMMA if name not in ("glu", "log_softmax")]


@pytest.mark.parametrize("name", _ELEMENTWISE)
def test_the_table_is_the_exact_integral_up_to_the_authors_sampling(name: str) -> None:
    """Each sampled gamma is within 0.5 % of 1/std by quadrature."""
    assert gain(ACTIVATIONS[name]) == pytest.approx(GAMMA[name], rel=5e-3)


def test_quadrature_equals_the_closed_form_of_relu() -> None:
    """gamma = sqrt(2 / (1 - 1/pi)) (Section 3)."""
    assert gain(torch.relu) == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=1e-7)


def test_facts_of_the_exact_integrals() -> None:
    """gelu 1.70093 and silu 1.78719, to the printed digit."""
    assert gain(torch.nn.functional.gelu) == pytest.approx(1.70093, abs=5e-6)
    assert gain(ACTIVATIONS["silu"]) == pytest.approx(1.78719, abs=5e-6)


@pytest.mark.parametrize("name", sorted(GAMMA))
def test_activations_equal_the_authors(name: str) -> None:
    """gamma * f(x) equals the authors' function on a grid, for all 16."""
    tensors, _ = load("authors_layers")
    x = tensors["nonlinearity/glu_input" if name == "glu" else "nonlinearity/input"]
    function, gamma = activation(name)
    if name == "log_softmax":  # ours acts on dimension 1
        x = x[None]
    torch.testing.assert_close(
        (function(x) * gamma).reshape(-1), tensors[f"nonlinearity/{name}/out"].reshape(-1), rtol=2e-6, atol=2e-6
    )


def test_a_function_of_ones_own_gets_its_gain() -> None:
    """Any elementwise function serves: gamma of z^3 is 1/sqrt(15)."""
    function, gamma = activation(lambda z: z**3)
    assert gamma == pytest.approx(1 / math.sqrt(15), rel=1e-6)
    assert function(torch.tensor(2.0)) == 8


@pytest.mark.parametrize("bad", [torch.zeros_like, lambda z: z.sum(), lambda z: z / 0])
def test_functions_without_a_gain_are_refused(bad: Activation) -> None:
    """Constant, not elementwise, not finite."""
    with pytest.raises(ValueError, match="gain"):
        gain(bad)


def test_unknown_names_list_the_choices() -> None:
    """The message has the table."""
    with pytest.raises(ValueError, match="gelu"):
        activation("geluu")


def test_beta_grows_by_alpha_squared_and_starts_again_behind_each_transition() -> None:
    """The authors' bookkeeping, worked by hand for depths 1-2-3 and alpha 0.2."""
    expected = [1.0, 1.04, 1.04, 1.08, 1.04, 1.08]
    assert [b**2 for b in block_input_std([1, 2, 3], 0.2)] == pytest.approx(expected)
