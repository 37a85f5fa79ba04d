"""`microserve config`: what it says of files and where values come from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from microserve.tools.config import main

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_valid_files_are_told_with_their_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    router = write(tmp_path, "a.toml", "http_port = 9000\n")
    engine = write(tmp_path, "b.toml", 'model = "demo"\n[fake]\nvocab_size = 10\n')
    both = write(tmp_path, "c.toml", "[router]\nhttp_port = 1\n[engine]\npage_size = 8\n")
    empty = write(tmp_path, "engine-7.toml", "")
    assert main(["check", router, engine, both, empty]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{router}: valid (router)",
        f"{engine}: valid (engine)",
        f"{both}: valid (router+engine)",
        f"{empty}: valid (engine)",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http_port = 'x'", "http_port: 'x' is not a whole number"),
        ("http_prot = 1\nhttp_host='a'", "did you mean http_port?"),
        ("http_port = ", "is not valid TOML"),
        ("", "say --kind"),
    ],
)
def test_what_is_wrong_is_told_and_the_exit_code_says_so(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", write(tmp_path, "x.toml", text)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said", "kept"),
    [
        ("[router]\nbind = 'tcp://*:1'", "bind = 'tcp://*:1' can be reached", "key_file = 'k'"),
        ("[engine]\nevents_bind = 'tcp://*:1'", "events_bind = 'tcp://*:1' can be reached", "key_file = 'k'"),
        ("[engine]\nmetrics_port = 1\nmetrics_host = '::'", "metrics_host = '::' can be reached", "insecure = true"),
        ("[router]\nhttp_host = '::'\ntls_cert = 'c'", "http_host = '::' can be reached", "api_keys_file = 'a'"),
        ("[router]\nhttp_host = '::'\napi_keys_file = 'a'", "http_host = '::' can be reached", "tls_cert = 'c'"),
        ("[router]\nhttp_host = '::'", "needs api_keys_file, tls_cert and tls_key", "insecure = true"),
    ],
)
def test_what_a_daemon_would_not_open_to_other_machines_is_told(
    text: str, said: str, kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", write(tmp_path, "x.toml", text)]) == 2
    assert said in capsys.readouterr().err
    assert main(["check", write(tmp_path, "x.toml", f"{text}\n{kept}")]) == 0


def test_a_file_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "none.toml"), "--json"]) == 2
    (result,) = json.loads(capsys.readouterr().out)
    assert result["error"].startswith("cannot read configuration")


def test_show_says_where_each_value_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROSERVE_ENGINE_MAX_RUNNING", "7")
    file = write(tmp_path, "engine.toml", "max_running = 3\npage_size = 8\n[fake]\nvocab_size = 10\n")
    assert main(["show", "engine", file, "--changed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"key": "page_size", "value": 8, "origin": file},
        {"key": "max_running", "value": 7, "origin": "MICROSERVE_ENGINE_MAX_RUNNING"},
        {"key": "fake.vocab_size", "value": 10, "origin": file},
    ]


def test_show_for_people_has_a_line_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "router"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["http_port"] == ["8000", "default"]
    assert lines["router_id"] == ["-", "default"]


def test_show_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "router", write(tmp_path, "r.toml", "nonsense = 1")]) == 2
    assert "unknown setting" in capsys.readouterr().err
