"""What is measured about a model: accuracy, attacks, transfer, statistics, the release rule, the report.

Rules of this room: an attack proposes and the harness judges; a figure carries its n and its interval;
"not measured" is a value and never a pass. This file imports nothing heavy: a device loads
``device_tests.validate`` with NumPy, onnxruntime and cryptography alone.
"""

# First of all, because modules here import onnxruntime: this turns its telemetry off.
import exporters as exporters
