"""The converter's passes, so that the shape of a program never depends on the values of its weights.

Packages of one architecture must differ in their weights' bytes alone: then one conversion serves a whole fleet, and
nobody can tell from a program's structure what is in its weights. coremltools looks at values in three places:

* ``const_deduplication`` keeps one of several tensors that happen to be equal;
* ``remove_redundant_ops`` keeps one of several operators that happen to have equal small constants;
* ``noop_elimination`` drops the addition of a tensor that happens to be zero and the product with one that is one.

The first two are left out. The third is kept for what a shape alone shows, and for numbers (a scale of 1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from exporters.quiet import import_coremltools

_PASSES = "coremltools.converters.mil.mil.passes"
_LEFT_OUT = ("common::const_deduplication", "common::remove_redundant_ops")
_NOOPS = "common::noop_elimination"
_ARITHMETIC = frozenset({"add", "mul", "sub", "real_div", "floor_div", "pow"})


@contextlib.contextmanager
def independent_of_values() -> Iterator[None]:
    """Inside the block, coremltools converts and compresses without looking at the values of weights.

    The converter's table of passes is changed for the whole process until the block ends, because coremltools runs
    a second, fixed list of passes that no argument of its reaches.
    """
    passes = import_coremltools(f"{_PASSES}.pass_registry").PASS_REGISTRY.passes
    names = (*_LEFT_OUT, _NOOPS)
    before = {name: passes[name] for name in names}
    nothing, noops = _replacements()
    passes.update(dict.fromkeys(_LEFT_OUT, nothing))
    passes[_NOOPS] = noops
    try:
        yield
    finally:
        passes.update(before)


def _replacements() -> tuple[type, type]:
    """The passes that stand in: one that does nothing, and the elimination of no-ops by shape."""
    base: Any = import_coremltools(f"{_PASSES}.graph_pass").AbstractGraphPass
    eliminate = import_coremltools(f"{_PASSES}.defs.cleanup.noop_elimination").noop_elimination

    class Nothing(base):
        """A pass that changes nothing."""

        def apply(self, prog: Any) -> None:
            """Leave the program as it is."""

    class NoopsByShape(base):
        """coremltools' own elimination, but never of an operator for the values in a tensor."""

        def apply(self, prog: Any) -> None:
            """Eliminate until nothing more is found."""
            for function in prog.functions.values():
                while sum(_eliminate(op, eliminate) for op in list(function.operations)):
                    pass

    return Nothing, NoopsByShape


def _eliminate(op: Any, eliminate: Any) -> bool:
    """Remove ``op`` if it does nothing whatever the weights are; whether it was removed."""
    if op.enclosing_block is None or (op.op_type in _ARITHMETIC and _has_constant_tensor(op)):
        return False
    remove = eliminate._match_pattern(op)
    return remove is not None and bool(remove(op))


def _has_constant_tensor(op: Any) -> bool:
    constants = [var for var in (op.x, op.y) if var.val is not None]
    return any(len(var.shape) > 0 for var in constants)
