"""What a setting of a search is drawn from, as the run file has it: Ray Tune's domains under their own names. Pure.

``{uniform: [0, 1]}``, ``{quniform: [0, 1, 0.25]}``, ``{loguniform: [1e-4, 1e-1]}``, ``{randint: [2, 9]}`` (8 is the largest), ``{choice: [SGD, AdamW]}``.
"""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_serializer, model_validator


class Domain(BaseModel):
    """What a setting is drawn from: exactly one of Ray Tune's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uniform: tuple[float, float] | None = Field(None, description="[lower, upper]")
    quniform: tuple[float, float, PositiveFloat] | None = Field(None, description="[lower, upper, step]")
    loguniform: tuple[PositiveFloat, PositiveFloat] | None = Field(
        None, description="[lower, upper], the logarithm uniform"
    )
    randint: tuple[int, int] | None = Field(None, description="[lower, upper), whole numbers")
    choice: list[bool | int | float | str] | None = Field(None, min_length=1, description="one of these")

    @model_validator(mode="before")
    @classmethod
    def _is_one(cls, value: Any) -> Any:
        if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= cls.model_fields.keys():
            raise ValueError(
                f"write one of {', '.join(cls.model_fields)}, e.g. {{uniform: [0, 1]}} or {{choice: [8, 16]}}"
            )
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.kind != "choice" and not self.arguments[0] < self.arguments[1]:
            raise ValueError(f"{self.kind} wants its lower end first, and an upper one above it")
        if self.kind == "randint" and self.arguments[1] - self.arguments[0] < 2:
            raise ValueError("randint leaves the upper end out: that is one number only")
        return self

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        return {self.kind: self.arguments}

    @property
    def kind(self) -> str:
        """The name of the domain that is set."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def arguments(self) -> list[Any]:
        """What stands behind the name."""
        return list(getattr(self, self.kind))

    @property
    def edges(self) -> list[Any]:
        """The smallest and the largest value; all of them for ``choice``."""
        if self.kind == "choice":
            return self.arguments
        lower, upper = self.arguments[:2]
        return [lower, upper - 1 if self.kind == "randint" else upper]

    def draw(self, rng: np.random.Generator) -> Any:
        """One value, a plain one."""
        if self.kind == "choice":
            return self.arguments[int(rng.integers(len(self.arguments)))]
        lower, upper = self.arguments[:2]
        if self.kind == "randint":
            return int(rng.integers(lower, upper))
        if self.kind == "loguniform":
            return min(max(math.exp(rng.uniform(math.log(lower), math.log(upper))), lower), upper)
        if self.kind == "quniform":
            step = self.arguments[2]
            return lower + step * int(rng.integers(math.floor((upper - lower) / step + 1e-9) + 1))
        return float(rng.uniform(lower, upper))


def dotted(space: Any) -> Any:
    """A search space whose keys may be sections within sections (that is what an override makes), with dotted keys; the later of two wins."""
    if not isinstance(space, dict):
        return space
    flat: dict[str, Any] = {}
    for name, value in space.items():
        is_section = (
            isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values())
        )
        flat |= (
            {f"{name}.{key}": inner for key, inner in dotted(value).items()}
            if is_section
            else {str(name): value}
        )
    return flat
