"""How long and how fast a model is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from factory.section import Section


class TrainingSettings(Section):
    """One training run: AdamW with linear warm-up and cosine decay."""

    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps with a rising learning rate")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    flip: bool = Field(default=True, description="random horizontal flips")
    shift: int = Field(default=1, ge=0, description="random shifts, in pixels")
    erase: float = Field(default=0.0, ge=0, lt=1, description="probability of erasing a random rectangle")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="auto is bf16 where the hardware has it"
    )
