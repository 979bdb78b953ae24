"""The server side: from one shared base and one secret key per device to one package per device.

Start reading at ``factory/pipeline.py``.
"""
