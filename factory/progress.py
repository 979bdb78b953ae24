"""Progress of long work: one line per stage with rate and time left, and a log that can be read afterwards."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from keys.files import storage_errors

logger = logging.getLogger("keyfoundry")
_SECONDS_BETWEEN_LINES = 15.0


class Stage(Protocol):
    """One running stage."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Report ``count`` finished units; ``note`` replaces the text at the end of the line."""
        ...


class Progress:
    """Shows stages on a terminal as bars and elsewhere as a line every few seconds; logs each stage's end."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self.seconds: dict[str, float] = {}  # stage → how long it took in this run

    @contextlib.contextmanager
    def stage(self, name: str, *, total: int, unit: str, done: int = 0) -> Iterator[Stage]:
        """Show one stage of ``total`` units, of which ``done`` were finished by an earlier run.

        At its end its duration and rate go to the log.
        """
        started = time.monotonic()
        stage: _Bar | _Lines
        if self.console.is_terminal and not self.quiet:
            with RichProgress(
                TextColumn("{task.description}"), BarColumn(), _Rate(unit), TimeElapsedColumn(), TextColumn("left"),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self.console,
            ) as bar:  # fmt: skip
                stage = _Bar(bar, name, total, done)
                yield stage
        else:
            stage = _Lines(self, name, total, unit, done)
            yield stage
        seconds = time.monotonic() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        logger.info("%s: %d %s in %.1f s (%.1f/s) %s", name, stage.done, unit, seconds,
                    (stage.done - done) / max(seconds, 1e-9), stage.note)  # fmt: skip

    def say(self, text: str) -> None:
        """Print one line beside the bars (not when quiet), and log it."""
        logger.info("%s", text)
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True)


class _Bar:
    def __init__(self, bar: RichProgress, name: str, total: int, done: int) -> None:
        self._bar, self.done, self.note = bar, done, ""
        self._task = bar.add_task(name, total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        self._bar.update(self._task, advance=count, note=self.note)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        rate = f"{speed:.0f} {self._unit}/s" if speed else f"– {self._unit}/s"
        return Text(f"{int(task.completed)}/{int(task.total or 0)} {rate}")


class _Lines:
    def __init__(self, owner: Progress, name: str, total: int, unit: str, done: int) -> None:
        self._owner, self._name, self._total, self._unit = owner, name, total, unit
        self._first, self.done, self.note = done, done, ""
        self._started = time.monotonic()
        self._spoke = self._started

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        now = time.monotonic()
        if self._owner.quiet or (now - self._spoke < _SECONDS_BETWEEN_LINES and self.done < self._total):
            return
        self._spoke = now
        rate = (self.done - self._first) / max(now - self._started, 1e-9)
        left = (self._total - self.done) / max(rate, 1e-9)
        self._owner.console.print(
            f"{self._name}: {self.done}/{self._total} {self._unit}, {rate:.0f}/s, {left:.0f} s left {self.note}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


class _QuietHandler(logging.FileHandler):
    """A log that cannot be written (a full disk) must not stop the work, nor print tracebacks over its error."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 – the name is the base class's
        """Drop the line."""


def log_to(path: Path) -> None:
    """Send the program's log to ``path`` (appended), with times; nothing secret is ever logged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for before in [known for known in logger.handlers if isinstance(known, logging.FileHandler)]:
        logger.removeHandler(before)  # one log at a time: a second fleet in one process has its own
        before.close()
    with storage_errors(path):
        handler = _QuietHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
