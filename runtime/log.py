"""Logging: one line an event, its facts as key=value (or one JSON object a line), with a limit for floods.

log = get_logger(__name__)
log.info("engine joined", engine="a", epoch=1)
log.warning("malformed frame", every=5.0, peer=peer)  # at most one line in five seconds
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any

from microserve.runtime.clock import monotonic

if TYPE_CHECKING:
    from microserve.runtime.clock import Clock

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Logger:
    """A named source of events. Cheap to make; floods are counted per logger and event."""

    def __init__(self, logger: logging.Logger, *, clock: Clock = monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._limited: dict[str, tuple[float, int]] = {}

    def debug(self, event: str, /, *, every: float | None = None, **fields: object) -> None:
        self._log(logging.DEBUG, event, every, fields)

    def info(self, event: str, /, *, every: float | None = None, **fields: object) -> None:
        self._log(logging.INFO, event, every, fields)

    def warning(self, event: str, /, *, every: float | None = None, **fields: object) -> None:
        self._log(logging.WARNING, event, every, fields)

    def error(self, event: str, /, *, every: float | None = None, **fields: object) -> None:
        self._log(logging.ERROR, event, every, fields)

    def exception(self, event: str, /, *, every: float | None = None, **fields: object) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, event, every, fields, trace=True)

    def _log(self, level: int, event: str, every: float | None, fields: dict[str, object], trace: bool = False) -> None:
        if not self._logger.isEnabledFor(level):
            return
        if every is not None:
            last, held = self._limited.get(event, (-every, 0))
            now = self._clock()
            if event in self._limited and now - last < every:
                self._limited[event] = (last, held + 1)
                return
            self._limited[event] = (now, 0)
            if held:
                fields = {**fields, "suppressed": held}
        self._logger.log(level, event, extra={"fields": fields}, exc_info=trace)


def get_logger(name: str, *, clock: Clock = monotonic) -> Logger:
    """The logger of a module; give it `__name__`."""
    return Logger(logging.getLogger(name), clock=clock)


def setup_logging(level: str, json: bool, process: str, *, stream: IO[str] | None = None) -> None:
    """Send every event of this process to `stream` (default: standard error). `process` names it in each line."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter(process) if json else LineFormatter(process))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(_LEVELS[level])


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z info  engine:a  engine joined  engine=a epoch=1`"""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        facts = " ".join(f"{key}={_plain(value)}" for key, value in fields.items())
        message = record.getMessage().replace("\n", "\\n")
        line = f"{_stamp(record)} {record.levelname.lower():7} {self._process} {message}"
        line = f"{line}  {facts}" if facts else line
        # A traceback is the one thing that takes more lines: its own are indented under the event.
        return f"{line}\n{_indented(self.formatException(record.exc_info))}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, process, logger, event, and the event's facts."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        entry: dict[str, Any] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "event": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


def _stamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03d}Z"


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(mark in text for mark in ' "=\n\t') else text


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
