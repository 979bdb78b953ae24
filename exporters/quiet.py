"""Converters without their chatter: imports and conversions that print nothing; errors are raised all the same."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType

from keys.errors import InputError

_LOGGERS = ("coremltools", "torch.onnx")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, log lines and progress bars of the libraries used inside the block off the terminal.

    Python's own standard output and error are set aside for the block, so it must not run next to another
    thread that prints.
    """
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        for name, level in levels.items():
            logging.getLogger(name).setLevel(logging.ERROR)
            stack.callback(logging.getLogger(name).setLevel, level)
        # onnxruntime's quantisation warns through the root logger, whose handlers are this program's.
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        yield


def import_coremltools(module: str = "coremltools") -> ModuleType:
    """``coremltools`` or a module of it, imported without its warnings about this system and torch's version.

    Raises :class:`InputError` if it is not installed (a device has it only with the extra ``coreml``).
    """
    try:
        with quiet():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "coremltools":
            raise
        raise InputError("Core ML needs coremltools, which is not installed; install keyfoundry[coreml].") from error
