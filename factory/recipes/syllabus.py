"""The volumization paper's curriculum: a batch is learnt in parts, simple images first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from factory.recipes.part import CurriculumPart

if TYPE_CHECKING:
    from factory.curriculum import Curriculum


class SyllabusPart(CurriculumPart):
    """Each batch is ordered by a metric and learnt in ``sub_batches`` steps (Eqs. 11 to 13)."""

    kind: Literal["syllabus"] = "syllabus"
    metric: Literal["entropy", "mutual-information", "kl", "psnr", "max-norm", "joint-entropy", "mse", "raster"] = (
        "mutual-information"
    )
    sub_batches: int = Field(default=4, ge=1)
    bins: int = Field(default=16, ge=2, le=256, description="of the metric's histograms: a power of two")

    def build(self) -> Curriculum:
        """The syllabus; ``raster`` cuts batches as they come, the control."""
        from factory.volumization.syllabus import Syllabus

        return Syllabus(self.metric, self.sub_batches, self.bins)
