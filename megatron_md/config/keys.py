"""What the keys of a config are made of: explanations and bounded numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def Doc(text: str) -> Any:
    """Attach the explanation of a key."""
    return Field(description=text)


# Beyond any run, and within what products of a few of them can be computed with.
MOST = 10**15
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# What a list is made for every one of.
Listed = Annotated[int, Field(gt=0, le=10_000)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
