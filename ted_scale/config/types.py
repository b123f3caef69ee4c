"""The building blocks of the run file's sections: numbers with bounds, and a section that refuses unknown keys."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ted_scale.base.parsing import COUNT_LIMIT

Count = Annotated[int, Field(ge=0, lt=COUNT_LIMIT)]
PositiveInt = Annotated[int, Field(gt=0, lt=COUNT_LIMIT)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=1e6)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
