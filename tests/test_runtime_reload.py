"""A configuration that is read again: what changes, what does not, and what is told of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from microserve.runtime.errors import ConfigError
from microserve.runtime.reload import Reload
from microserve.runtime.settings import EngineConfig, FakeConfig, RouterConfig

if TYPE_CHECKING:
    from collections.abc import Callable

BEFORE = RouterConfig(max_active=1, http_port=1, strategy_settings={"ratio": 0.1})


class Daemon:
    """Reads what the test says, and keeps what is done."""

    def __init__(self, refuse: bool = False) -> None:
        self.wanted: RouterConfig | ConfigError = BEFORE
        self.done: list[tuple[str, int]] = []
        live: dict[str, Callable[[RouterConfig], object]] = {
            name: lambda config, name=name: self.done.append((name, config.max_active))  # type: ignore[misc]
            for name in ("max_active", "max_queued")
        }
        self.reload = Reload(
            BEFORE,
            self.read,
            live,
            check=self.refuse if refuse else lambda config: None,
            hints={"strategy_settings": "ask the strategy"},
            changed=lambda config: self.done.append(("changed", config.max_active)),
        )

    def read(self) -> RouterConfig:
        if isinstance(self.wanted, ConfigError):
            raise self.wanted
        return self.wanted

    def refuse(self, config: RouterConfig) -> None:
        raise ConfigError("a folder is missing")


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, object, object]]:
    return [
        (record.getMessage(), record.__dict__["fields"].get("setting"), record.__dict__["fields"].get("hint"))
        for record in caplog.records
    ]


def test_what_can_change_does_and_the_rest_is_told_each_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    daemon = Daemon()
    daemon.wanted = RouterConfig(max_active=2, http_port=2, strategy_settings={"ratio": 0.2})
    daemon.reload()
    assert daemon.done == [("max_active", 2), ("changed", 2)]
    assert daemon.reload.config == RouterConfig(max_active=2, http_port=1, strategy_settings={"ratio": 0.1})
    assert told(caplog) == [
        ("setting changed: not applied", "http_port", "it needs a restart"),
        ("setting changed: applied", "max_active", None),
        ("setting changed: not applied", "strategy_settings", "ask the strategy"),
        ("configuration reloaded", None, None),
    ]
    caplog.clear()
    daemon.reload()
    assert [setting for _, setting, _ in told(caplog)] == ["http_port", "strategy_settings", None]


@pytest.mark.parametrize("refuse", [False, True])
def test_what_is_wrong_changes_nothing(refuse: bool, caplog: pytest.LogCaptureFixture) -> None:
    daemon = Daemon(refuse=refuse)
    daemon.wanted = RouterConfig(max_active=2) if refuse else ConfigError("max_active: 0")
    with pytest.raises(ConfigError):
        daemon.reload()
    assert daemon.reload.config is BEFORE
    assert daemon.done == []
    assert caplog.records == []


def test_of_a_table_the_keys_that_changed_are_told(caplog: pytest.LogCaptureFixture) -> None:
    wanted = EngineConfig(fake=FakeConfig(vocab_size=7, eos_after=2))
    Reload(EngineConfig(), lambda: wanted, {})()
    assert [record.__dict__["fields"] for record in caplog.records if record.levelname == "WARNING"] == [
        {"setting": key, "was": was, "now": now, "hint": "it needs a restart"}
        for key, was, now in (("fake.vocab_size", "32000", "7"), ("fake.eos_after", "-", "2"))
    ]
