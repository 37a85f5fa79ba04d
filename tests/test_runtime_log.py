"""Log lines: one an event, readable and parseable, and bounded in a flood."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import TYPE_CHECKING

import pytest

from microserve.runtime.clock import ManualClock
from microserve.runtime.log import get_logger, setup_logging

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_has_time_level_process_event_and_facts(stream: io.StringIO) -> None:
    setup_logging("info", False, "engine:a", stream=stream)
    get_logger("x").info("engine joined", engine="a b", epoch=1, share=0.25, empty="", quote='say "hi"\n')
    line = stream.getvalue()
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info    engine:a engine joined  ", line)
    assert line.endswith('engine="a b" epoch=1 share=0.25 empty="" quote="say \\"hi\\"\\n"\n')
    assert line.count("\n") == 1


def test_json_lines(stream: io.StringIO) -> None:
    setup_logging("info", True, "router:r", stream=stream)
    get_logger("x.y").warning("odd", count=2, what=ValueError("no"))
    entry = json.loads(stream.getvalue())
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "warning",
        "process": "router:r",
        "logger": "x.y",
        "event": "odd",
        "count": 2,
        "what": "no",
    }


def test_levels(stream: io.StringIO) -> None:
    setup_logging("warning", False, "p", stream=stream)
    log = get_logger("x")
    log.debug("a")
    log.info("b")
    log.warning("c")
    log.error("d")
    assert [line.split()[3] for line in stream.getvalue().splitlines()] == ["c", "d"]


def test_a_flood_is_one_line_that_says_how_many_it_stands_for(stream: io.StringIO) -> None:
    setup_logging("info", False, "p", stream=stream)
    clock = ManualClock()
    log = get_logger("x", clock=clock)
    for _ in range(100):
        log.warning("bad frame", every=5.0, peer="a")
    log.warning("other", every=5.0)
    clock.advance(5.0)
    log.warning("bad frame", every=5.0, peer="b")
    told = [line.split(" p ", 1)[1] for line in stream.getvalue().splitlines()]
    assert told == ["bad frame  peer=a", "other", "bad frame  peer=b suppressed=99"]


@pytest.mark.parametrize("as_json", [False, True])
def test_an_exception_shows_its_traceback(stream: io.StringIO, as_json: bool) -> None:
    setup_logging("info", as_json, "p", stream=stream)
    try:
        raise ValueError("broken thing")
    except ValueError:
        get_logger("x").exception("step failed", step=3)
    text = stream.getvalue()
    assert "step failed" in text
    assert "broken thing" in text
    assert "Traceback" in text


def test_setting_up_twice_does_not_double_lines(stream: io.StringIO) -> None:
    setup_logging("info", False, "p", stream=stream)
    setup_logging("info", False, "p", stream=stream)
    get_logger("x").info("once")
    assert stream.getvalue().count("once") == 1
