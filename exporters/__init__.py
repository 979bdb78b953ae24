"""A plain ``nn.Module`` in, a package out: ONNX, Core ML, parity, manifest, verification of packages.

Rules of this room: nothing here knows what a key is; a module maps float32 images N×C×H×W in [0, 1] to
logits N×K, and whatever is keyed is already inside. This file imports nothing heavy: a device loads
``exporters.package`` and ``exporters.run_onnx`` with NumPy, onnxruntime and cryptography alone.
"""
