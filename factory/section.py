"""What every table of settings is: no unknown name, no change after it was read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of settings: no unknown name, no change after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
