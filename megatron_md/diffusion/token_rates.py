"""Mask rates of single tokens: at rate t of its row, position i is masked with a probability r_i(t) of its own.

`objective.token_rate` names one, with its options: `{name: position, strength: 1}`. The built-in ones are powers,

    r_i(t) = t^a_i,  a_i > 1: masked less than others, so that it is seen earlier in generation

`position` (a_i falls from e^strength at the row's first position to e^-strength at its last) and `frequency` (a_i grows
with the count of the token in a corpus). A masked position's cross-entropy has the weight 1 / r_i(t) instead of 1 / t,
so that in expectation every token counts once, whatever its rate: under U[0, 1] the loss is the mean over t and i of
E[CE_i | context at t], which bounds nothing. Validation knows no token rates: its NELBO stays exact. Third parties add
theirs with `@register_token_rate("name")` in a module that the config lists under `imports`. numpy only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_md.batch import Int64Array
from megatron_md.diffusion._schedule_base import FloatArray, number, quote
from megatron_md.diffusion.registry import Registry
from megatron_md.errors import UserError
from megatron_md.json_file import parse_json, read_regular

MOST_STRENGTH = 3.0


class TokenRate(Protocol):
    """Rates of the tokens of rows; a pure function, of each row by itself."""

    def __call__(self, tokens_BL: Int64Array, rate_B: FloatArray) -> FloatArray:
        """The probability [B, L], within [0, 1], that each token is masked where its row has the rate t [B]."""


_registry: Registry[Callable[..., TokenRate]] = Registry("token rate")
register_token_rate = _registry.register


def parse_token_rate(spec: Mapping[str, Any] | None) -> TokenRate | None:
    """The token rate that a config's `objective.token_rate` describes; None for None.

    Raises:
        UserError: one line that says what is wrong with it.
    """
    if spec is None:
        return None
    name, options = spec.get("name"), {key: value for key, value in spec.items() if key != "name"}
    if not isinstance(name, str):
        raise UserError(f"objective.token_rate needs a `name`, got {quote(spec)}")
    try:
        factory = _registry.get(name)
        inspect.signature(factory).bind(**options)
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"objective.token_rate {quote(spec)}: {error}") from None


def rates_of_tokens(rate: TokenRate, tokens_BL: Int64Array, rate_B: FloatArray, floor: float) -> FloatArray:
    """The rates [B, L] of these rows' tokens, at least the floor.

    Raises:
        UserError: a (third-party) token rate left [0, 1], or has another shape.
    """
    found_BL = np.asarray(rate(tokens_BL, rate_B), dtype=np.float64)
    if found_BL.shape != tokens_BL.shape or not np.all((found_BL >= 0.0) & (found_BL <= 1.0)):
        raise UserError(
            f"objective.token_rate: {type(rate).__name__} gave rates of shape {found_BL.shape} from {found_BL.min():g} "
            f"to {found_BL.max():g} for tokens of shape {tokens_BL.shape}; they must lie in [0, 1]"
        )
    return np.maximum(found_BL, floor)


def _strength(value: object) -> float:
    strength = number(value, "strength")
    if not 0.0 < abs(strength) <= MOST_STRENGTH:
        raise UserError(f"strength must not be 0 and at most {MOST_STRENGTH:g} either way, got {strength:g}")
    return strength


@register_token_rate("position")
class Position:
    """a_i = exp(strength (1 - 2 i / (L - 1))): with a positive strength the beginning of a row is masked least."""

    def __init__(self, strength: float) -> None:
        self.strength = _strength(strength)

    def __call__(self, tokens_BL: Int64Array, rate_B: FloatArray) -> FloatArray:
        """See `TokenRate`."""
        place_L = np.linspace(1.0, -1.0, tokens_BL.shape[1])
        return np.asarray(rate_B[:, None] ** np.exp(self.strength * place_L))


@register_token_rate("frequency")
class Frequency:
    """a_v = exp(strength z_v), z_v the standardised log count of token v: rare ones are masked most where strength > 0.

    Mean and deviation are those over the corpus' tokens; a count of 0 counts as 1.
    """

    def __init__(self, strength: float, counts: str) -> None:
        """Read the counts.

        Args:
            strength: as above.
            counts: JSON list of the count of each token, as `megatron-md data show CORPUS --counts FILE` writes it.

        Raises:
            UserError: it is none.
        """
        way_out = f"write it with megatron-md data show CORPUS --counts {counts}"
        found = parse_json(read_regular(Path(counts), way_out), counts, way_out)
        if (
            not isinstance(found, list)
            or not all(type(count) is int and count >= 0 for count in found)
            or not any(found)
        ):
            raise UserError(f"{counts}: must be a list of the count of each token; {way_out}")
        self.file, counts_V = counts, np.maximum(np.array(found, dtype=np.float64), 1.0)
        log_V = np.log(counts_V)
        mean = np.average(log_V, weights=counts_V)
        deviation = math.sqrt(np.average((log_V - mean) ** 2, weights=counts_V))
        self._power_V = np.exp(_strength(strength) * (log_V - mean) / max(deviation, 1e-9)).clip(1e-3, 1e3)

    def __call__(self, tokens_BL: Int64Array, rate_B: FloatArray) -> FloatArray:
        """See `TokenRate`.

        Raises:
            UserError: the counts are those of a smaller vocabulary.
        """
        if tokens_BL.max() >= len(self._power_V):
            raise UserError(
                f"{self.file}: has counts of {len(self._power_V)} tokens, and a row has token {tokens_BL.max()}"
            )
        return np.asarray(rate_B[:, None] ** self._power_V[tokens_BL])
