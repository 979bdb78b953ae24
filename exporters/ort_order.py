"""The one part of onnxruntime's ``.ort`` files whose order is left to chance, put in order.

A file is a flat buffer: a root that names the model and a small table of the types that each kind of operator takes
(for builds without the operators' definitions). onnxruntime writes that table in the order of a hash table whose seed
is drawn anew each time, so no two files of one model are equal. Flat buffers are built from their end, and the table
comes last: everything of the model stands behind it and is kept byte for byte.
"""

from __future__ import annotations

from typing import Any

import flatbuffers
from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import (
    ArgTypeAndIndex,
    InferenceSession,
    KernelTypeStrArgsEntry,
    KernelTypeStrResolver,
    OpIdKernelTypeStrArgsEntry,
)

_IDENTIFIER = b"ORTM"
# More than any value in a file is aligned to, so that the model's values stay aligned wherever the front ends.
_ALIGNMENT = 64


def in_order(content: bytes) -> bytes:
    """The ``.ort`` file ``content`` with its table of operator types sorted; the same model gives the same bytes."""
    root = InferenceSession.InferenceSession.GetRootAs(content)
    model: Any = root.Model()
    resolver: Any = root.KernelTypeStrResolver()
    place: int = model._tab.Pos
    vtable = place - int.from_bytes(content[place : place + 4], "little", signed=True)
    kept = content[min(place, vtable) :]

    builder: Any = flatbuffers.Builder(len(kept) + 65_536)
    builder.Bytes[len(builder.Bytes) - len(kept) :] = kept
    builder.head -= len(kept)
    builder.minalign = _ALIGNMENT
    version = _from_end(content, root, 4)
    table = _resolver(builder, resolver)
    InferenceSession.Start(builder)
    InferenceSession.AddOrtVersion(builder, version)
    InferenceSession.AddModel(builder, len(content) - place)
    InferenceSession.AddKernelTypeStrResolver(builder, table)
    builder.Finish(InferenceSession.End(builder), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def _from_end(content: bytes, table: Any, field: int) -> int:
    """Where what a field of ``table`` refers to starts, counted from the end of the file as the builder counts."""
    place = table._tab.Pos + table._tab.Offset(field)
    return len(content) - (place + int.from_bytes(content[place : place + 4], "little"))


def _resolver(builder: Any, resolver: Any) -> int:
    operators = [resolver.OpKernelTypeStrArgs(index) for index in range(resolver.OpKernelTypeStrArgsLength())]
    entries = []
    for operator in sorted(operators, key=lambda entry: entry.OpId()):
        types = [operator.KernelTypeStrArgs(index) for index in range(operator.KernelTypeStrArgsLength())]
        ordered = sorted(types, key=lambda entry: entry.KernelTypeStr())
        arguments = _vector(builder, [_type(builder, entry) for entry in ordered])
        name = builder.CreateString(operator.OpId())
        OpIdKernelTypeStrArgsEntry.Start(builder)
        OpIdKernelTypeStrArgsEntry.AddOpId(builder, name)
        OpIdKernelTypeStrArgsEntry.AddKernelTypeStrArgs(builder, arguments)
        entries.append(OpIdKernelTypeStrArgsEntry.End(builder))
    vector = _vector(builder, entries)
    KernelTypeStrResolver.Start(builder)
    KernelTypeStrResolver.AddOpKernelTypeStrArgs(builder, vector)
    return KernelTypeStrResolver.End(builder)


def _type(builder: Any, entry: Any) -> int:
    arguments = []
    for argument in (entry.Args(index) for index in range(entry.ArgsLength())):
        ArgTypeAndIndex.Start(builder)
        ArgTypeAndIndex.AddArgType(builder, argument.ArgType())
        ArgTypeAndIndex.AddIndex(builder, argument.Index())
        arguments.append(ArgTypeAndIndex.End(builder))
    vector = _vector(builder, arguments)
    name = builder.CreateString(entry.KernelTypeStr())
    KernelTypeStrArgsEntry.Start(builder)
    KernelTypeStrArgsEntry.AddKernelTypeStr(builder, name)
    KernelTypeStrArgsEntry.AddArgs(builder, vector)
    return KernelTypeStrArgsEntry.End(builder)


def _vector(builder: Any, places: list[int]) -> int:
    builder.StartVector(4, len(places), 4)
    for place in reversed(places):
        builder.PrependUOffsetTRelative(place)
    return builder.EndVector()
