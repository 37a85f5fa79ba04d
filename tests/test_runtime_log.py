"""Log lines: one an event, readable and parseable, and bounded in a flood."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from typing import TYPE_CHECKING

import pytest

from microserve.runtime.clock import ManualClock
from microserve.runtime.log import get_logger, setup_logging

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


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


def test_every_line_names_the_incarnation_and_epochs_are_written_alike(stream: io.StringIO) -> None:
    setup_logging("info", False, "engine:a", epoch=0x64C1, stream=stream)
    get_logger("x").info("peer lost", engine="b", engine_epoch=0x64C2)
    setup_logging("info", True, "engine:a", epoch=0x64C1, stream=stream)
    get_logger("x").info("peer lost", engine="b", engine_epoch=0x64C2, level="odd")
    line, entry = stream.getvalue().splitlines()
    assert line.endswith(" engine:a@64c1 peer lost  engine=b engine_epoch=64c2")
    told = json.loads(entry)
    assert (told["process"], told["epoch"], told["engine_epoch"]) == ("engine:a", "64c1", "64c2")
    assert (told["level"], told["fact_level"]) == ("info", "odd")


def test_a_burst_is_told_before_a_flood_is_held_back(stream: io.StringIO) -> None:
    setup_logging("info", False, "p", stream=stream)
    clock = ManualClock()
    log = get_logger("x", clock=clock)
    for index in range(5):
        log.info("failed", every=10.0, burst=2, request=index)
    clock.advance(10.0)
    for index in range(5, 8):
        log.info("failed", every=10.0, burst=2, request=index)
    told = [line.split(" p ", 1)[1] for line in stream.getvalue().splitlines()]
    assert told == ["failed  request=0", "failed  request=1", "failed  request=5 suppressed=3", "failed  request=6"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_library_that_floods_is_held_back(stream: io.StringIO, as_json: bool) -> None:
    setup_logging("info", as_json, "p", stream=stream)
    for index in range(1000):
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request %d", index)
    assert len(stream.getvalue().splitlines()) == 5


EVIL = "a\nb\r\x1b[2J\x07\x7f\x9b2J\u202egpj\u2028end\udc80"


@pytest.mark.parametrize("as_json", [False, True])
def test_what_others_sent_can_neither_begin_a_line_nor_move_a_cursor(stream: io.StringIO, as_json: bool) -> None:
    setup_logging("info", as_json, "p", stream=stream)
    get_logger("x").info("odd", model=EVIL)
    logging.getLogger("library").warning("%s", EVIL)
    text = stream.getvalue()
    assert text.count("\n") == 2
    assert text.replace("\n", "").isprintable()
    if as_json:
        assert json.loads(text.splitlines()[0])["model"] == EVIL


def test_a_traceback_shows_no_control_characters_either(stream: io.StringIO) -> None:
    setup_logging("info", False, "p", stream=stream)
    try:
        raise ValueError(EVIL)
    except ValueError:
        get_logger("x").exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith(" p failed")
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_long_fact_is_cut(stream: io.StringIO, as_json: bool) -> None:
    setup_logging("info", as_json, "p", stream=stream)
    get_logger("x").info("odd", model="m" * 1_000_000, why=ValueError("n" * 1_000_000))
    assert len(stream.getvalue()) < 3000
    assert "… (1000000 characters)" in stream.getvalue()


@pytest.mark.parametrize("as_json", [False, True])
def test_in_the_journal_a_line_begins_with_its_priority(as_json: bool, tmp_path: Path) -> None:
    log = get_logger("x")
    with (tmp_path / "journal").open("w+") as journal:
        status = os.fstat(journal.fileno())
        named = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        setup_logging("debug", as_json, "p", stream=journal, environ=named)
        log.debug("a")
        log.info("b")
        log.warning("c")
        try:
            raise ValueError("d")
        except ValueError:
            log.exception("failed")
        setup_logging("debug", as_json, "p", stream=journal, environ={"JOURNAL_STREAM": "1:1"})
        log.info("not the journal")
        journal.seek(0)
        *lines, last = journal.read().splitlines()
    assert [line[:3] for line in lines[:4]] == ["<7>", "<6>", "<4>", "<3>"]
    assert all(line.startswith("<3>") for line in lines[4:])
    assert not last.startswith("<")
    if as_json:
        assert [json.loads(line[3:])["event"] for line in lines] == ["a", "b", "c", "failed"]
    else:
        assert lines[1] == "<6>p b"
