"""A plain ``nn.Module`` in, a package out: ONNX, Core ML, parity, manifest, verification of packages.

Rules of this room: nothing here knows what a key is; a module maps float32 images N×C×H×W in [0, 1] to
logits N×K, and whatever is keyed is already inside. This file imports nothing heavy: a device loads
``exporters.package`` and ``exporters.run_onnx`` with NumPy, onnxruntime and cryptography alone.
"""

import os

# Official builds of onnxruntime report sessions, with names and hashes of models, to their maker, and keep an
# identifier of the system on its disk. It looks at this when it is first imported; whoever wants it sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
