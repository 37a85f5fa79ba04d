"""Configuration: precedence of file, environment and flags, and errors that say what, where and what instead."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

import msgspec
import pytest

from microserve.runtime.config import (
    EngineConfig,
    RouterConfig,
    add_flags,
    config_from_args,
    default_process_id,
    load_config,
    parse_size,
)
from microserve.runtime.errors import ConfigError
from microserve.runtime.ids import valid_name

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "engine.toml"
    path.write_text(
        'page_size = 8\nmax_running = 5\nrouters = ["tcp://10.0.0.1:7700"]\n'
        '[labels]\npool = "a"\n[fake]\nvocab_size = 99\n'
    )
    return path


def test_defaults() -> None:
    assert load_config(EngineConfig) == EngineConfig()
    assert load_config(RouterConfig) == RouterConfig()


def test_file_environment_and_flags_override_each_other_in_that_order(file: Path) -> None:
    environ = {
        "MICROSERVE_ENGINE_MAX_RUNNING": "6",
        "MICROSERVE_ENGINE_STEP_TOKENS": "100",
        "MICROSERVE_ENGINE_FAKE_EOS_AFTER": "7",
        "MICROSERVE_ROUTER_HTTP_PORT": "1",
        "HOME": "/",
    }
    config = load_config(EngineConfig, file=file, environ=environ, flags={"step_tokens": "200", "labels": ["x=1,y=2"]})
    assert (config.page_size, config.max_running, config.step_tokens) == (8, 6, 200)
    assert config.routers == ("tcp://10.0.0.1:7700",)
    assert config.labels == {"x": "1", "y": "2"}
    assert (config.fake.vocab_size, config.fake.eos_after) == (99, 7)


def test_one_file_may_serve_both_processes(tmp_path: Path) -> None:
    path = tmp_path / "microserve.toml"
    path.write_text("[engine]\npage_size = 4\n[router]\nhttp_port = 9\n[router.strategy_settings]\nratio = 0.5\n")
    assert load_config(EngineConfig, file=path).page_size == 4
    assert load_config(RouterConfig, file=path).http_port == 9
    assert load_config(RouterConfig, file=path).strategy_settings == {"ratio": 0.5}


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        EngineConfig().page_size = 3  # type: ignore[misc]


def test_environment_texts_become_typed_values() -> None:
    environ = {
        "MICROSERVE_ROUTER_STRATEGY_SETTINGS": "ratio=0.2, deep=true, n=3, name=abc",
        "MICROSERVE_ROUTER_LOG_JSON": "true",
        "MICROSERVE_ROUTER_KEEP_ALIVE": "3",
        "MICROSERVE_ROUTER_ADVERTISE": "",
    }
    config = load_config(RouterConfig, environ=environ)
    assert config.strategy_settings == {"ratio": 0.2, "deep": True, "n": 3, "name": "abc"}
    assert (config.log_json, config.keep_alive, config.advertise) == (True, 3.0, None)


def test_what_a_cluster_tells_of_a_service_of_our_name_is_no_setting() -> None:
    told = {
        "MICROSERVE_ROUTER_SERVICE_HOST": "10.0.0.1",
        "MICROSERVE_ROUTER_SERVICE_PORT": "8000",
        "MICROSERVE_ROUTER_SERVICE_PORT_HTTP": "8000",
        "MICROSERVE_ROUTER_PORT": "tcp://10.0.0.1:8000",
        "MICROSERVE_ROUTER_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "MICROSERVE_ROUTER_PORT_8000_TCP_ADDR": "10.0.0.1",
        "MICROSERVE_ROUTER_HTTP_PORT": "81",
    }
    assert load_config(RouterConfig, environ=told) == RouterConfig(http_port=81)
    with pytest.raises(ConfigError, match="unknown setting MICROSERVE_ROUTER_PORTS"):
        load_config(RouterConfig, environ={"MICROSERVE_ROUTER_PORTS": "3"})


def test_a_variable_of_a_daemon_that_is_nearly_ours_is_not_passed_over() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(EngineConfig, environ={"MICROSERVE_ENGNE_PAGE_SIZE": "3"})
    assert caught.value.message == (
        "unknown setting MICROSERVE_ENGNE_PAGE_SIZE; did you mean MICROSERVE_ENGINE_PAGE_SIZE?"
    )
    # Others', or a service's that a cluster puts there.
    others = (
        "MICROSERVE_ROUTR_HTTP_PORT",
        "MICROSERVE_KEY_FILE",
        "MICROSERVE_ROUTER",
        "MICROSERVE_ENGINES_PORT",
        "ENGNE",
    )
    assert load_config(EngineConfig, environ=dict.fromkeys(others, "3")) == EngineConfig()
    with pytest.raises(ConfigError, match="did you mean MICROSERVE_ROUTER_HTTP_PORT"):
        load_config(RouterConfig, environ={"MICROSERVE_ROUTR_HTTP_PORT": "3"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("PAGE_SIZ", "3", "unknown setting MICROSERVE_ENGINE_PAGE_SIZ; did you mean MICROSERVE_ENGINE_PAGE_SIZE?"),
        ("PAGE_SIZE", "x", "page_size: 'x' is not a whole number, at least 1 and at most 1024 (from {name})"),
        ("PAGE_SIZE", "0", "page_size: 0 is not a whole number, at least 1 and at most 1024 (from {name})"),
        ("PAGE_SIZE", "1.5", "page_size: '1.5' is not a whole number, at least 1 and at most 1024 (from {name})"),
        ("KV_PAGES", "1", "kv_pages: 1 is not a whole number, at least 2 (from {name})"),
        ("KV_MEMORY", "2XB", "kv_memory: '2XB' is not a size such as 512MiB, 2GiB or 4GB (from {name})"),
        ("EXECUTOR", "gpu", "executor: 'gpu' is not one of auto, cuda, torch, fake (from {name})"),
        ("MODEL", "", "model: '' is not text that is not empty (from {name})"),
        ("LABELS", "ab", "'ab' is not KEY=VALUE (from {name})"),
        ("LOG_JSON", "maybe", "log_json: 'maybe' is not true or false (from {name})"),
        ("DRAIN_TIMEOUT", "-1", "drain_timeout: -1.0 is not a number, at least 0 (from {name})"),
        ("FAKE_VOCAB_SIZE", "1", "fake.vocab_size: 1 is not a whole number, at least 2 (from {name})"),
        (
            "ENGINE_ID",
            "a b",
            "engine_id: 'a b' is not a name of at most 63 letters, digits, '.', '_' and '-' (from {name})",
        ),
    ],
)
def test_a_wrong_variable_is_told_with_key_value_expectation_and_origin(name: str, text: str, message: str) -> None:
    variable = f"MICROSERVE_ENGINE_{name}"
    with pytest.raises(ConfigError) as caught:
        load_config(EngineConfig, environ={variable: text})
    assert caught.value.message == message.format(name=variable)


def test_a_wrong_endpoint_is_told() -> None:
    with pytest.raises(
        ConfigError, match=re.escape("bind: 'localhost' is not an endpoint such as tcp://127.0.0.1:7700")
    ):
        load_config(RouterConfig, flags={"bind": "localhost"})
    with pytest.raises(ConfigError, match=r"each is an endpoint .* \(from --routers\)"):
        load_config(EngineConfig, flags={"routers": ["tcp://a:1,foo"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("page_siz = 3", "{file}: unknown setting page_siz; did you mean page_size?"),
        ("[fake]\nvocab = 3", "{file}: unknown setting fake.vocab; did you mean fake.vocab_size?"),
        ("page_size = '16'", "page_size: '16' is not a whole number, at least 1 and at most 1024 (from {file})"),
        ("page_size = true", "page_size: True is not a whole number, at least 1 and at most 1024 (from {file})"),
        ("fake = 3", "fake: 3 is not a table (from {file})"),
        ("[labels]\na = 3", "labels: {{'a': 3}} is not a table of names and values (from {file})"),
    ],
)
def test_a_wrong_file_is_told_with_its_name_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "e.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(EngineConfig, file=path)
    assert caught.value.message == message.format(file=path)


def test_a_key_beside_the_tables_of_a_shared_file_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text("page_size = 3\n[engine]\n")
    with pytest.raises(ConfigError, match="page_size"):
        load_config(EngineConfig, file=path)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read configuration .*missing\.toml: No such file"):
        load_config(EngineConfig, file=tmp_path / "missing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        load_config(EngineConfig, file=broken)


def test_an_unknown_flag_name_is_told() -> None:
    with pytest.raises(ConfigError, match="unknown setting --page-siz; did you mean --page-size"):
        load_config(EngineConfig, flags={"page_siz": 3})


def test_a_command_line(file: Path) -> None:
    argv = [
        "--config",
        str(file),
        "--page-size",
        "32",
        "--routers",
        "tcp://a:1",
        "--routers",
        "tcp://b:2",
        "--log-json",
    ]
    config = config_from_args(EngineConfig, argv, prog="engine", description="", environ={})
    assert (config.page_size, config.max_running, config.log_json) == (32, 5, True)
    assert config.routers == ("tcp://a:1", "tcp://b:2")


def test_the_environment_may_name_the_file(file: Path) -> None:
    environ = {"MICROSERVE_ENGINE_CONFIG": str(file)}
    assert config_from_args(EngineConfig, [], prog="engine", description="", environ=environ).page_size == 8


@pytest.mark.parametrize("cls", [EngineConfig, RouterConfig])
def test_every_field_has_a_flag_with_help_and_its_default(cls: type[msgspec.Struct]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, cls)
    by_dest = {action.dest: action for action in parser._actions if action.dest != "help"}
    for field in msgspec.structs.fields(cls):
        if field.name == "fake":
            assert by_dest["fake_vocab_size"].help == "vocabulary size (default: 32000)"
            continue
        help_text = by_dest[field.name].help
        assert help_text is not None
        assert len(help_text) > 10
        if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
            assert f"(default: {field.default})" in help_text
    assert parser.parse_args([]) == argparse.Namespace(**dict.fromkeys(by_dest))
    assert parser.format_help()


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("512MB", 512_000_000), ("1G", 1 << 30), ("1.5KiB", 1536), ("7", 7), (" 3 TiB ", 3 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_wrong_size_is_told() -> None:
    with pytest.raises(ConfigError, match="'lots' is not a size"):
        parse_size("lots")


@pytest.mark.parametrize("host", ["node-1.example.org", "-", "ünï", "a" * 200])
def test_process_ids_are_valid_names(host: str) -> None:
    assert valid_name(default_process_id(host))
