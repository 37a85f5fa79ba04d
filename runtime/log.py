"""Logging: one line an event, its facts as key=value (or one JSON object a line), with a limit for floods.

log = get_logger(__name__)
log.info("engine joined", engine="a", epoch=1)
log.warning("malformed frame", every=5.0, peer=peer)  # at most one line in five seconds
log.info("request failed", every=10.0, burst=20, request=name)  # at most twenty in ten

What others sent (names, messages of errors) may stand in facts: it can neither begin a line nor move a cursor, and is
cut where it is long.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any

from microserve.runtime.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microserve.runtime.clock import Clock

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_LONGEST_FACT = 1000
"""Characters of one fact; what is longer is cut."""
_LONGEST_TRACE = 16_000
_FOREIGN_EVERY, _FOREIGN_BURST = 10.0, 5
"""Seconds, and lines in them, that a library gets for one level."""
_MOST_EVENTS = 1000
"""Events whose limits are remembered."""


class _Limits:
    """Who spoke how often: for each key at most `burst` lines in `every` seconds, and how many were held back."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._windows: dict[object, tuple[float, int, int]] = {}

    def admit(self, key: object, every: float, burst: int) -> int | None:
        """How many were held back before this one, or None when this one is held back too."""
        now = self._clock()
        window = self._windows.get(key)
        if window is None and len(self._windows) >= _MOST_EVENTS:
            del self._windows[next(iter(self._windows))]
        began, told, held = window if window is not None else (now, 0, 0)
        if now - began >= every:
            self._windows[key] = (now, 1, 0)
            return held
        if told >= burst:
            self._windows[key] = (began, told, held + 1)
            return None
        self._windows[key] = (began, told + 1, held)
        return 0


class Logger:
    """A named source of events. Cheap to make; floods are counted per logger and event.

    With `every`, an event is told at most `burst` times in so many seconds, and how many were held back is told later.
    """

    def __init__(self, logger: logging.Logger, *, clock: Clock = monotonic) -> None:
        self._logger = logger
        self._limits = _Limits(clock)

    @property
    def wants_debug(self) -> bool:
        """Whether `debug` says anything: for facts that cost something to gather."""
        return self._logger.isEnabledFor(logging.DEBUG)

    def debug(self, event: str, /, *, every: float | None = None, burst: int = 1, **fields: object) -> None:
        self._log(logging.DEBUG, event, every, burst, fields)

    def info(self, event: str, /, *, every: float | None = None, burst: int = 1, **fields: object) -> None:
        self._log(logging.INFO, event, every, burst, fields)

    def warning(self, event: str, /, *, every: float | None = None, burst: int = 1, **fields: object) -> None:
        self._log(logging.WARNING, event, every, burst, fields)

    def error(self, event: str, /, *, every: float | None = None, burst: int = 1, **fields: object) -> None:
        self._log(logging.ERROR, event, every, burst, fields)

    def exception(self, event: str, /, *, every: float | None = None, burst: int = 1, **fields: object) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, event, every, burst, fields, trace=True)

    def _log(
        self,
        level: int,
        event: str,
        every: float | None,
        burst: int,
        fields: dict[str, object],
        trace: bool = False,
    ) -> None:
        if not self._logger.isEnabledFor(level):
            return
        if every is not None:
            held = self._limits.admit((level, event), every, burst)
            if held is None:
                return
            if held:
                fields = {**fields, "suppressed": held}
        self._logger.log(level, event, extra={"fields": fields}, exc_info=trace)


def get_logger(name: str, *, clock: Clock = monotonic) -> Logger:
    """The logger of a module; give it `__name__`."""
    return Logger(logging.getLogger(name), clock=clock)


def setup_logging(
    level: str,
    json: bool,
    process: str,
    *,
    epoch: int | None = None,
    stream: IO[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Send every event of this process to `stream` (default: standard error); again, with other settings, at any time.

    `process` and `epoch` (one incarnation of it) stand in each line. Where the stream is the journal, which knows the
    time, a line begins with its priority instead (`sd-daemon(3)`).
    """
    target = stream if stream is not None else sys.stderr
    handler = logging.StreamHandler(target)
    journal = _is_journal(target, environ)
    handler.setFormatter((JsonFormatter if json else LineFormatter)(process, epoch=epoch, journal=journal))
    handler.addFilter(_Foreign())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(_LEVELS[level])


def last_words(name: str, message: str, *, bug: bool = False, environ: Mapping[str, str] = os.environ) -> None:
    """Why this process ends, on standard error: as logging was set up, or plainly; in the journal it is an error, as
    what was logged is. With `bug` comes the traceback of the exception that is being handled."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        logging.getLogger(__name__).error("this process ends", exc_info=bug, extra={"fields": {"error": message}})
        return
    text = f"{traceback.format_exc() if bug else ''}{name}: error: {message}"
    if _is_journal(sys.stderr, environ):
        text = "\n".join(f"<3>{line}" for line in text.splitlines())
    print(text, file=sys.stderr, flush=True)


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z info  engine:a@64c1  engine joined  engine=a epoch=1`

    In the journal: `<6>engine:a@64c1  engine joined  engine=a epoch=1`
    """

    def __init__(self, process: str, *, epoch: int | None = None, journal: bool = False) -> None:
        super().__init__()
        self._process = process if epoch is None else f"{process}@{epoch:x}"
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        facts = " ".join(f"{key}={_plain(key, value)}" for key, value in fields.items())
        line = f"{self._process} {_safe(_short(record.getMessage()))}"
        line = f"{line}  {facts}" if facts else line
        if not self._journal:
            line = f"{_stamp(record)} {record.levelname.lower():7} {line}"
        if record.exc_info:
            # A traceback is the one thing that takes more lines: its own are indented under the event.
            line = f"{line}\n{_indented(self.formatException(record.exc_info))}"
        return _with_priority(record, line) if self._journal else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, process, epoch, logger, event, and the event's facts."""

    def __init__(self, process: str, *, epoch: int | None = None, journal: bool = False) -> None:
        super().__init__()
        self._process = {"process": process} if epoch is None else {"process": process, "epoch": f"{epoch:x}"}
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = getattr(record, "fields", {})
        entry: dict[str, Any] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            **self._process,
            "logger": record.name,
            "event": _short(record.getMessage()),
        }
        for key, value in fields.items():
            entry[f"fact_{key}" if key in entry else key] = _json(key, value)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)[-_LONGEST_TRACE:]
        line = _safe(json.dumps(entry, default=lambda value: _short(str(value)), ensure_ascii=False))
        return _with_priority(record, line) if self._journal else line


class _Foreign(logging.Filter):
    """Holds back floods of libraries, whose events come without a limit of their own."""

    def __init__(self) -> None:
        super().__init__()
        self._limits = _Limits(monotonic)

    def filter(self, record: logging.LogRecord) -> bool:
        if hasattr(record, "fields"):
            return True
        # Not by event: what a library says may differ each time.
        held = self._limits.admit((record.name, record.levelno), _FOREIGN_EVERY, _FOREIGN_BURST)
        if held:
            record.__dict__["fields"] = {"suppressed": held}
        return held is not None


def _is_journal(stream: IO[str], environ: Mapping[str, str]) -> bool:
    """Whether `stream` is what `JOURNAL_STREAM` names: the service manager's own pipe to the journal."""
    named = environ.get("JOURNAL_STREAM", "")
    if not named:
        return False
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return named == f"{status.st_dev}:{status.st_ino}"


def _with_priority(record: logging.LogRecord, line: str) -> str:
    """Every line of it with the priority that `sd-daemon(3)` describes: the journal takes each for an entry."""
    priority = 7 if record.levelno < logging.INFO else 6
    for level, higher in ((logging.WARNING, 4), (logging.ERROR, 3), (logging.CRITICAL, 2)):
        if record.levelno >= level:
            priority = higher
    return "\n".join(f"<{priority}>{each}" for each in line.split("\n"))


def _stamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03d}Z"


def _plain(key: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(_json(key, value))
    if not text or not text.isprintable() or any(mark in text for mark in ' "='):
        return _safe(json.dumps(_short(text), ensure_ascii=False))
    return _short(text)


def _json(key: str, value: object) -> object:
    if key.endswith("epoch") and isinstance(value, int):
        # As the processes' own lines have it, so that one search finds both.
        return f"{value:x}"
    return _short(value) if isinstance(value, str) else value


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_FACT else f"{text[:_LONGEST_FACT]}… ({len(text)} characters)"


def _safe(text: str) -> str:
    """Without what a terminal or a reader of lines would obey."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def _indented(text: str) -> str:
    cut = text if len(text) <= _LONGEST_TRACE else "…" + text[-_LONGEST_TRACE:]
    return "\n".join("    " + _safe(line) for line in cut.splitlines())
