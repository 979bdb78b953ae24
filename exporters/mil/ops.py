"""The operators of the evaluator, all together: one function each, from a :class:`~exporters.mil.call.Call`.

Arrays carry the images in front (length 1 where the value is the same for all), so axis a of the program is
axis a + 1 here. The set is what timm's Vision Transformers, convolutional networks and networks over sorted patches
become in Core ML, for iOS 16 to 18, with weights that coremltools compressed or did not; meanings follow Apple's
description of MIL. Results may be wider than the declared type: the evaluator rounds them.
"""

from __future__ import annotations

# Each module enters its operators in the table when it is imported.
from exporters.mil import arithmetic, compressed, matrices, norms, places, shapes
from exporters.mil.table import OPERATORS

GROUPS = {
    "element by element": arithmetic,
    "matrices and windows": matrices,
    "norms and reductions": norms,
    "shapes, and the classifier": shapes,
    "places": places,
    "compressed weights": compressed,
}

__all__ = ["GROUPS", "OPERATORS"]
