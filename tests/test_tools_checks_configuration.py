"""What `microserve doctor` finds of configuration files and keys: what a daemon would refuse, and what it would not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.machine_support import machine, only, told

from microserve.runtime.keys import new_identity, revoke
from microserve.runtime.zmq_bus import new_key_pair
from microserve.tools.checks.configuration import check_agreement, read_configuration
from microserve.tools.checks.keys import KeyFile, check_keys, key_files

if TYPE_CHECKING:
    from pathlib import Path

    from microserve.tools.checks.finding import Finding


def written(folder: Path, **texts: str) -> list[Path]:
    files = []
    for name, text in texts.items():
        file = folder / f"{name}.toml"
        file.write_text(text)
        files.append(file)
    return files


def found(folder: Path, *, gpu: bool = True, **texts: str) -> list[Finding]:
    """What is found beyond that files are valid by themselves."""
    configured = read_configuration(machine(folder / "root"), written(folder, **texts))
    return [*(each for each in configured.findings if each.status != "ok"), *check_agreement(configured, gpu=gpu)]


# --- configuration -------------------------------------------------------------------------------------------------


def test_files_that_are_valid_and_the_routers_that_they_name(tmp_path: Path) -> None:
    files = written(
        tmp_path,
        router='bind = "tcp://*:7700"\n',
        engine='routers = ["tcp://127.0.0.1:7700", "tcp://10.0.0.7:7700"]\n',
    )
    configured = read_configuration(machine(tmp_path), files)
    assert told(configured.findings) == [
        ("ok", f"{tmp_path}/router.toml is valid (router)"),
        ("ok", f"{tmp_path}/engine.toml is valid (engine)"),
    ]
    assert configured.endpoints == ["tcp://127.0.0.1:7700", "tcp://10.0.0.7:7700"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http_port = ", "is not valid TOML"),
        ("http_port = 'x'", "http_port: 'x' is not a whole number"),
        ("http_prot = 1\nhttp_host = 'a'", "did you mean http_port?"),
    ],
)
def test_files_that_a_daemon_would_refuse(text: str, message: str, tmp_path: Path) -> None:
    wrong = only(found(tmp_path, router=text))
    assert (wrong.check, wrong.status) == ("configuration", "problem")
    assert message in wrong.message
    assert wrong.advice == f"correct it, then `microserve config check {tmp_path}/router.toml`"


def test_a_file_that_is_not_there_and_a_variable_that_is_wrong(tmp_path: Path) -> None:
    missing = read_configuration(machine(tmp_path), [tmp_path / "none.toml"]).findings
    assert only(missing).message.startswith("cannot read configuration")
    asked = machine(tmp_path)
    variable = read_configuration(asked, None, {"MICROSERVE_ENGINE_PAGE_SIZE": "many"}).findings
    assert [each.status for each in variable] == ["ok", "problem"]
    assert variable[1].message.startswith("the environment: page_size: 'many' is not a whole number")


def test_the_files_that_are_looked_at_unasked(tmp_path: Path) -> None:
    files = {
        "etc/microserve/router.toml": "http_port = 1",
        "etc/microserve/api_keys.toml": "[[keys]]",
        "etc/microserve/notes.toml": "a = 1",
        "home/.config/microserve/engine-0.toml": "",
    }
    assert told(read_configuration(machine(tmp_path, files=files), None).findings) == [
        ("note", f"{tmp_path}/etc/microserve/notes.toml is neither a router's configuration nor an engine's"),
        ("ok", f"{tmp_path}/etc/microserve/router.toml is valid (router)"),
        ("ok", f"{tmp_path}/home/.config/microserve/engine-0.toml is valid (engine)"),
    ]


def test_ones_own_files_are_where_systemd_has_its(tmp_path: Path) -> None:
    asked = machine(tmp_path, files={"settings/microserve/engine-0.toml": ""})
    named = replace(asked, environ={"XDG_CONFIG_HOME": f"{tmp_path}/settings"})
    assert told(read_configuration(named, None, {}).findings) == [
        ("ok", f"{tmp_path}/settings/microserve/engine-0.toml is valid (engine)")
    ]


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_folder: Path) -> list[str]:
        raise PermissionError

    monkeypatch.setattr("os.listdir", refuse)
    findings = read_configuration(machine(tmp_path), None).findings
    assert {(each.status, each.advice) for each in findings} == {("note", "run this as root to have it checked")}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"engine0": 'engine_id = "e"', "engine1": 'engine_id = "e"'}, "have the same engine_id, e"),
        ({"engine0": 'device = "cuda:0"', "engine1": 'device = "cuda:0"'}, "have the same device, cuda:0"),
        ({"engine0": 'bind = "tcp://127.0.0.1:9"', "router": 'bind = "tcp://127.0.0.1:9"'}, "the same bind"),
        ({"router0": "http_port = 80", "router1": 'http_port = 80\nbind = "tcp://[::1]:1"'}, "the same http_port, 80"),
        ({"engine": 'bind = "tcp://0.0.0.0:7"'}, "can be reached from other machines"),
        ({"router": 'http_host = "0.0.0.0"'}, "HTTP can be reached from other machines, and asks nobody for a key"),
        ({"router": 'http_host = "::"\napi_keys_file = "k"'}, "takes keys in clear text"),
    ],
)
def test_what_will_not_work_together(texts: dict[str, str], message: str, tmp_path: Path) -> None:
    wrong = only(found(tmp_path, gpu=True, **texts))
    assert (wrong.status, message in wrong.message, bool(wrong.advice)) == ("problem", True, True)


def test_what_is_meant_is_a_note(tmp_path: Path) -> None:
    meant = found(tmp_path, router='bind = "tcp://0.0.0.0:7700"\ninsecure = true\nstate_folder = "/nowhere/at/all"')
    assert [(each.status, each.advice.split(",")[0]) for each in meant] == [
        ("note", "`microserve keys new`"),
        ("note", "mkdir -p /nowhere/at/all"),
    ]


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    text = 'executor = "cuda"'
    assert found(tmp_path, engine=text) == []
    assert only(found(tmp_path, engine=text, gpu=False)).message.endswith("asks for a GPU, and there is none here")


# --- keys ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "keys"
    for name, role in (("r", "router"), ("e0", "engine"), ("ann", "admin")):
        new_identity(made, name, role, new_key_pair)
    return made


def test_keys_that_are_well(folder: Path, tmp_path: Path) -> None:
    files = written(tmp_path, router=f'key_file = "{folder}/r.key"', engine=f'key_file = "{folder}/e0.key"')
    configured = read_configuration(machine(tmp_path), files)
    listed = key_files(configured, str(folder / "ann.key"), folder, None)
    assert told(check_keys(listed)) == [
        ("ok", f"{folder}/e0.key is the key of e0 (engine)"),
        ("ok", f"{folder}/r.key is the key of r (router)"),
        ("ok", f"{folder}/ann.key is the key of ann (admin)"),
        ("ok", f"{folder}/fleet.key can be used"),
        ("ok", f"{folder}/authorized.toml lets in 3 keys"),
    ]
    assert only(check_keys([])).status == "ok"


def test_a_secret_that_others_may_read_and_a_list_that_others_may_write(folder: Path) -> None:
    (folder / "r.key").chmod(0o644)
    (folder / "authorized.toml").chmod(0o666)
    readable, writable = check_keys([KeyFile(folder / "r.key", "key_file", "router")])
    assert (readable.status, readable.message) == (
        "problem",
        f"{folder}/r.key holds a secret, and others may read it (mode 0644)",
    )
    assert readable.advice == f"chmod 600 {folder}/r.key; who could read it may have: consider a new key"
    assert (writable.status, writable.advice.split(";")[0]) == ("problem", f"chmod 644 {folder}/authorized.toml")


def test_other_secrets(tmp_path: Path) -> None:
    pem, api = tmp_path / "key.pem", tmp_path / "api_keys.toml"
    pem.write_text("-")
    api.write_text("")
    files = written(tmp_path, router=f'tls_key = "{pem}"\ntls_cert = "c"\napi_keys_file = "{api}"')
    listed = key_files(read_configuration(machine(tmp_path), files), None, tmp_path / "none", None)
    pem.chmod(0o640)
    api.chmod(0o664)
    assert [each.status for each in check_keys(listed)] == ["problem", "problem"]
    pem.chmod(0o600)
    api.chmod(0o644)
    assert [each.status for each in check_keys(listed)] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("role", "name", "message", "advice"),
    [
        (
            "router",
            None,
            "is the key of e0 (engine), and a router is to use it",
            "microserve keys new NAME --role router",
        ),
        ("engine", "e7", "and an engine called e7 is to use it", "call it e0"),
    ],
)
def test_a_key_of_another(role: str, name: str | None, message: str, advice: str, folder: Path) -> None:
    wrong = check_keys([KeyFile(folder / "e0.key", "key_file", role, name)])[0]
    assert (wrong.status, message in wrong.message) == ("problem", True)
    assert advice in wrong.advice


def test_a_key_that_is_let_in_no_longer(folder: Path) -> None:
    revoke(folder, "e0")
    revoke(folder, "ann")
    daemon = check_keys([KeyFile(folder / "e0.key", "key_file", "engine", "e0")])[0]
    assert (daemon.status, "does not let in (any more)" in daemon.message) == ("problem", True)
    assert check_keys([KeyFile(folder / "ann.key", "key_file")])[0].status == "note"


def test_keys_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    missing = only(check_keys([KeyFile(tmp_path / "none.key", "key_file", "engine")]))
    assert (missing.status, missing.message.startswith("cannot read key file")) == ("problem", True)
    (folder / "e0.key").write_text("secret = 'hush")
    broken = check_keys([KeyFile(folder / "e0.key", "key_file", "engine")])[0]
    assert (broken.status, broken.message) == ("problem", f"{folder}/e0.key is not valid TOML")
    (folder / "authorized.toml").unlink()
    alone = only(check_keys([KeyFile(folder / "r.key", "key_file", "router")]))
    assert (alone.status, alone.message) == (
        "problem",
        f"{folder}/authorized.toml is missing: the router would not start",
    )


def test_a_key_that_the_service_cannot_read(folder: Path) -> None:
    # Nobody has a name for that one.
    wrong = check_keys([KeyFile(folder / "e0.key", "key_file", "engine", "e0", user=1_987_654_321)])[0]
    assert (wrong.status, wrong.advice) == ("problem", f"chown 1987654321 {folder}/e0.key")
