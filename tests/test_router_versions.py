"""Which program serves which request: shares, history, the way back, and what survives a restart."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from microserve.router.strategies.catalog import Catalog, Sources
from microserve.router.strategies.data_parallel import data_parallel
from microserve.router.versions import Versions
from microserve.runtime.errors import InvalidRequest, ModelNotFound, NotFound

if TYPE_CHECKING:
    from pathlib import Path

    from microserve.runtime.messages import ActiveStrategy, Strategies

PROGRAM = """
from microserve.router.strategy import strategy

@strategy
async def mine(request, fleet, *, ratio: float = 0.5, label: str = "x"):
    '''Mine.'''
    async for chunk in fleet.pick(label).start_generate():
        yield chunk
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "strategies"
    made.mkdir()
    (made / "mine.py").write_text(PROGRAM)
    return made


def versions(folder: Path, **options: Any) -> Versions:
    clock = iter(range(1, 1000))
    return Versions(
        data_parallel.configure(),
        Sources(folder, entry_points=()),
        now=lambda: float(next(clock)),
        **options,
    )


def put(found: Versions, name: str, settings: dict[str, object], **options: Any) -> list[ActiveStrategy]:
    return asyncio.run(found.set(name, settings, **options))


def shown(found: Versions) -> Strategies:
    return asyncio.run(found.show())


def serving(found: Versions, model: str = "m", count: int = 2000) -> dict[str, float]:
    """The share of requests that each strategy gets."""
    names = [found.choose(model, f"req-{number}").strategy.name for number in range(count)]
    return {name: names.count(name) / count for name in dict.fromkeys(names)}


def test_the_configured_strategy_serves_first(folder: Path) -> None:
    found = versions(folder)
    assert serving(found) == {"data_parallel": 1.0}
    assert found.default.strategy.name == "data_parallel"
    assert [(each.model, each.name, each.share) for each in shown(found).active] == [("", "data_parallel", 1.0)]


def test_models_have_names_and_are_not_too_many(folder: Path) -> None:
    found = versions(folder)
    for name in ("*", "two\nlines"):
        with pytest.raises(InvalidRequest, match="is no name of a model"):
            put(found, "data_parallel", {}, model=name)
    for number in range(255):
        put(found, "data_parallel", {}, model=f"m{number}")
    with pytest.raises(InvalidRequest, match="256 models have strategies of their own"):
        put(found, "data_parallel", {}, model="one more")
    put(found, "prefill_decode", {}, model="m254")
    put(found, "prefill_decode", {})


def test_what_serves_is_shown_though_its_file_is_broken_now(folder: Path) -> None:
    found = versions(folder)
    put(found, "mine", {"ratio": 0.3})
    (folder / "mine.py").write_text("x = = 1")
    sources = {each.name: each.source for each in shown(found).strategies}
    assert sources["mine"] == "as it was read; its source is gone or broken"
    assert sources["data_parallel"] == "built in"


def test_a_model_that_no_engine_serves_is_a_slip_of_the_pen(folder: Path) -> None:
    found = versions(folder)
    put(found, "data_parallel", {}, model="early")
    found.models = lambda: {"b", "a"}
    with pytest.raises(ModelNotFound, match="no engine serves model 'aa'; there is: a, b"):
        put(found, "data_parallel", {}, model="aa")
    assert [each.model for each in put(found, "data_parallel", {}, model="a")] == ["a"]
    assert [each.model for each in put(found, "prefill_decode", {}, model="early")] == ["early"], "set before they came"
    put(found, "prefill_decode", {})


def test_a_change_serves_every_model_without_its_own(folder: Path) -> None:
    found = versions(folder)
    put(found, "mine", {"ratio": 0.25})
    assert serving(found, "a") == serving(found, "b") == {"mine": 1.0}
    put(found, "data_parallel", {}, model="a")
    assert serving(found, "a") == {"data_parallel": 1.0}
    assert serving(found, "b") == {"mine": 1.0}


def test_a_share_of_the_traffic_goes_to_the_newcomer_and_the_same_request_always_the_same_way(folder: Path) -> None:
    found, other = versions(folder), versions(folder)
    for each in (found, other):
        put(each, "mine", {}, share=0.2)
    shares = serving(found)
    assert shares["mine"] == pytest.approx(0.2, abs=0.03)
    assert shares["data_parallel"] == pytest.approx(0.8, abs=0.03)
    for number in range(200):
        name = f"req-{number}"
        assert found.choose("m", name).version == other.choose("m", name).version
    put(found, "mine", {"ratio": 0.1}, share=0.5)  # the newcomer is replaced; the base stays
    assert set(serving(found)) == {"mine", "data_parallel"}
    put(found, "mine", {})
    assert serving(found) == {"mine": 1.0}


def test_a_share_is_taken_from_what_serves_that_model(folder: Path) -> None:
    found = versions(folder)
    put(found, "mine", {}, model="a")
    put(found, "prefill_decode", {}, model="a", share=0.25)
    put(found, "balanced", {}, model="b", share=0.5)
    assert [(each.model, each.name, each.share) for each in found.serving()] == [
        ("", "data_parallel", 1.0),
        ("a", "mine", 0.75),
        ("a", "prefill_decode", 0.25),
        ("b", "data_parallel", 0.5),
        ("b", "balanced", 0.5),
    ]


def test_a_dry_run_validates_and_changes_nothing(folder: Path) -> None:
    found = versions(folder)
    (would,) = put(found, "mine", {"ratio": "0.75"}, dry_run=True)
    assert (would.name, would.settings, would.share) == ("mine", {"ratio": 0.75, "label": "x"}, 1.0)
    assert serving(found) == {"data_parallel": 1.0}
    assert len(shown(found).history) == 1


@pytest.mark.parametrize(
    ("name", "settings", "share", "why"),
    [
        ("mime", {}, 1.0, "did you mean 'mine'"),
        ("mine", {"ratio": "much"}, 1.0, "'ratio' must be a float"),
        ("mine", {"ration": 1.0}, 1.0, "did you mean 'ratio'"),
        ("mine", {}, 0.0, "share lies between 1e-06 [(]one in a million[)] and 1, not"),
        ("mine", {}, 1e-320, "share lies between 1e-06 [(]one in a million[)] and 1, not 1e-320"),
        ("mine", {}, 9e-7, "share lies between 1e-06 [(]one in a million[)] and 1, not 9e-07"),
        ("mine", {}, 1.5, "share lies between 1e-06 [(]one in a million[)] and 1, not"),
        ("data_parallel", {}, 0.5, "serves most of the traffic already"),
    ],
)
def test_what_is_wrong_changes_nothing(
    folder: Path, name: str, settings: dict[str, object], share: float, why: str
) -> None:
    found = versions(folder)
    with pytest.raises(InvalidRequest, match=why):
        put(found, name, settings, share=share)
    assert serving(found) == {"data_parallel": 1.0}
    assert len(shown(found).history) == 1


def test_roll_back_goes_back_change_by_change(folder: Path) -> None:
    found = versions(folder)
    put(found, "mine", {"ratio": 0.1})
    put(found, "mine", {"ratio": 0.2}, share=0.5)
    put(found, "mine", {"ratio": 0.3})
    assert [each.settings.get("ratio") for each in found.roll_back()] == [0.1, 0.2]
    assert [each.settings.get("ratio") for each in found.roll_back()] == [0.1]
    assert [each.name for each in found.roll_back()] == ["data_parallel"]
    with pytest.raises(NotFound, match="no earlier state"):
        found.roll_back()
    reasons = [change.reason for change in shown(found).history]
    assert reasons[:3] == ["rolled back change 2", "rolled back change 3", "rolled back change 4"]


def test_roll_back_to_before_a_change(folder: Path) -> None:
    found = versions(folder)
    put(found, "mine", {"ratio": 0.1})
    put(found, "mine", {"ratio": 0.2})
    put(found, "mine", {"ratio": 0.3}, model="other")
    with pytest.raises(NotFound):
        found.roll_back(number=4)  # another model's
    assert [each.name for each in found.roll_back(number=2)] == ["data_parallel"]
    assert [each.name for each in found.roll_back(model="other")] == ["data_parallel"]
    assert shown(found).active[0].model == ""
    assert len(shown(found).active) == 1


def test_a_file_is_read_again_when_it_is_set_and_not_before(folder: Path) -> None:
    found = versions(folder)
    put(found, "mine", {})
    before = found.default
    (folder / "mine.py").write_text(PROGRAM.replace("Mine.", "Mine, better."))
    assert found.choose("m", "r").version == before.version
    put(found, "mine", {})
    assert found.default.version != before.version
    assert found.default.strategy.summary == "Mine, better."


def test_a_broken_file_is_told_with_its_line_and_takes_nothing_down(folder: Path) -> None:
    found = versions(folder)
    put(found, "mine", {})
    (folder / "mine.py").write_text("x = 1\nthis is no python\n")
    with pytest.raises(InvalidRequest, match=r"mine\.py:2: SyntaxError"):
        put(found, "mine", {})
    assert serving(found) == {"mine": 1.0}
    (problem,) = shown(found).problems
    assert problem.startswith(f"{folder / 'mine.py'}:2: SyntaxError")


def test_versions_are_equal_on_two_routers(folder: Path) -> None:
    found, other = versions(folder), versions(folder)
    assert put(found, "mine", {"ratio": 0.3})[0].version == put(other, "mine", {"ratio": "0.3"})[0].version
    assert put(found, "mine", {"ratio": 0.4})[0].version != other.default.version


def test_what_was_set_survives_a_restart(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "state" / "strategies.json"
    found = versions(folder, store=store)
    put(found, "mine", {"ratio": 0.1})
    put(found, "data_parallel", {}, model="a", share=0.25)
    again = versions(folder, store=store)
    assert shown(again).active == shown(found).active
    found.roll_back(model="a")
    assert [each.model for each in shown(versions(folder, store=store)).active] == [""]


def test_history_and_the_way_back_survive_restarts(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "strategies.json"
    found = versions(folder, store=store)
    put(found, "mine", {"ratio": 0.1})
    put(found, "mine", {"ratio": 0.2}, share=0.5)
    put(found, "mine", {"ratio": 0.3}, model="a")
    put(found, "mine", {"ratio": 0.4})
    told = shown(found)
    for _ in range(3):
        found = versions(folder, store=store)
        assert shown(found) == told, "a restart that changes nothing is none of its changes"
    assert [each.settings["ratio"] for each in found.roll_back()] == [0.1, 0.2]
    found = versions(folder, store=store)
    assert [each.name for each in found.roll_back(model="a")] == ["mine", "mine"]
    assert "a" not in {each.model for each in found.serving()}
    assert [each.name for each in versions(folder, store=store).roll_back(number=2)] == ["data_parallel"]
    found = versions(folder, store=store)
    assert serving(found) == {"data_parallel": 1.0}
    with pytest.raises(NotFound, match="no earlier state"):
        found.roll_back()
    assert [(change.number, change.reason) for change in shown(found).history] == [
        (8, "rolled back change 2"),
        (7, "rolled back change 4"),
        (6, "rolled back change 5"),
        *((change.number, change.reason) for change in told.history),
    ]


def test_a_change_that_cannot_be_rolled_back_any_more_is_told(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, file = tmp_path / "strategies.json", folder / "mine.py"
    found = versions(folder, store=store)
    put(found, "prefill_decode", {})
    (old,) = put(found, "mine", {})
    put(found, "balanced", {})
    for text, why in (
        (PROGRAM + "\n# Another.\n", f"{old.version} has changed since, and is mine@"),
        ("x = = 1", f"{old.version}: no strategy 'mine' ({file}:1: SyntaxError: invalid syntax)"),
    ):
        file.write_text(text)
        caplog.clear()
        found = versions(folder, store=store)
        (record,) = caplog.records
        fields = record.__dict__["fields"]
        assert (record.getMessage(), fields["change"]) == ("a change cannot be rolled back any more", 4)
        assert str(fields["why"]).startswith(why)
        with pytest.raises(NotFound, match=f"change 4 cannot be rolled back: {old.version} served before it") as caught:
            found.roll_back()
        assert caught.value.param == "number"
        assert serving(found) == {"balanced": 1.0}
    # Its file is what it was, and with it the way back; before that, an earlier one.
    assert [each.name for each in found.roll_back(number=3)] == ["prefill_decode"]
    put(found, "balanced", {})
    file.write_text(PROGRAM)
    assert [each.name for each in versions(folder, store=store).roll_back()] == ["prefill_decode"]


def test_a_way_back_that_was_lost_is_there_again_with_its_file(folder: Path, tmp_path: Path) -> None:
    store, file = tmp_path / "strategies.json", folder / "mine.py"
    found = versions(folder, store=store)
    put(found, "mine", {})
    put(found, "balanced", {})
    file.unlink()
    put(versions(folder, store=store), "prefill_decode", {}, model="a")  # what was lost is kept all the same
    file.write_text(PROGRAM)
    assert [each.name for each in versions(folder, store=store).roll_back()] == ["mine"]


def test_a_model_whose_own_version_was_lost_goes_back_to_the_default(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "strategies.json"
    put(versions(folder, store=store), "mine", {}, model="a")
    (folder / "mine.py").unlink()
    found = versions(folder, store=store)
    assert [(each.model, each.name) for each in found.roll_back(model="a")] == [("", "data_parallel")]
    assert serving(found) == {"data_parallel": 1.0}


def test_what_serves_and_changed_while_the_router_was_away_is_told_in_the_history(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "strategies.json"
    found = versions(folder, store=store)
    put(found, "mine", {})
    put(found, "mine", {"ratio": 0.1}, model="a")
    (folder / "mine.py").write_text(PROGRAM.replace("Mine.", "Mine, better."))
    reasons = [(change.number, change.model, change.reason) for change in shown(versions(folder, store=store)).history]
    assert reasons[:2] == [(5, "a", "restored"), (4, "", "restored")]
    (folder / "mine.py").unlink()
    found = versions(folder, store=store)
    reasons = [(change.number, change.model, change.reason) for change in shown(found).history]
    assert reasons[:2] == [(5, "a", "could not be restored"), (4, "", "could not be restored")]
    assert serving(found) == {"data_parallel": 1.0}


def test_steps_and_history_are_bounded_across_restarts(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "strategies.json"
    found = versions(folder, store=store)
    for number in range(120):
        put(found, "prefill_decode", {"min_remote": number})
    assert len(json.loads(store.read_text())["steps"]) == 100
    found = versions(folder, store=store)
    assert [change.number for change in shown(found).history] == list(range(121, 21, -1))
    for number in range(118, 18, -1):
        assert [each.settings["min_remote"] for each in found.roll_back()] == [number]
    with pytest.raises(NotFound, match="no earlier state"):
        found.roll_back()


def test_a_store_of_the_first_format_is_read(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "strategies.json"
    (version,) = put(versions(folder), "mine", {}, dry_run=True)
    entry = {"model": "", "version": version.version, "name": "mine", "settings": version.settings, "since": 7.0}
    store.write_text(json.dumps({"format": 1, "active": [entry]}))
    found = versions(folder, store=store)
    assert [(each.name, each.since) for each in found.serving()] == [("mine", 7.0)]
    assert [change.reason for change in shown(found).history] == ["restored", "configured"]
    put(found, "balanced", {})
    assert [each.name for each in versions(folder, store=store).roll_back()] == ["mine"]


@pytest.mark.parametrize("text", ["", "nonsense", '{"format": 7, "active": []}', '{"format": 1}', "[]"])
def test_a_store_that_makes_no_sense_is_left_aside(folder: Path, tmp_path: Path, text: str) -> None:
    store = tmp_path / "strategies.json"
    store.write_text(text)
    assert serving(versions(folder, store=store)) == {"data_parallel": 1.0}


def test_a_strategy_that_is_gone_is_left_aside(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "strategies.json"
    found = versions(folder, store=store)
    put(found, "mine", {})
    (folder / "mine.py").unlink()
    assert serving(versions(folder, store=store)) == {"data_parallel": 1.0}


def test_a_store_that_cannot_be_written_does_not_stop_the_change(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = versions(folder, store=tmp_path / "file" / "strategies.json")
    put(found, "mine", {})
    assert serving(found) == {"mine": 1.0}


def test_the_list_has_sources_settings_and_summaries() -> None:
    found = shown(Versions(data_parallel.configure(), Catalog.built_in()))
    entry = next(each for each in found.strategies if each.name == "data_parallel")
    assert entry.source == "built in"
    assert entry.summary
