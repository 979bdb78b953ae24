"""Secrets: derivation, permutations, vault and signatures.

Rules of this room: no torch, no onnx, no coremltools; no torch or NumPy generator ever touches a secret;
nothing here logs, and no secret appears in a ``repr`` or an error message.
"""
