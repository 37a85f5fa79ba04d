"""API keys and TLS on a real router: the official client, refusals, renewal without a restart, nothing in logs."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from tests.cluster import FAKE, Cluster, daemon_environ

from microserve.runtime.api_keys import new_api_key, revoke_api_key
from microserve.runtime.client import Client
from microserve.runtime.keys import new_identity
from microserve.runtime.zmq_bus import new_key_pair

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 20.0
MESSAGES: Any = [{"role": "user", "content": "hello"}]


def make_certificate(folder: Path, name: str = "localhost") -> tuple[Path, Path]:
    """A certificate that signs itself, for `name` and 127.0.0.1."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    key.chmod(0o600)
    return cert, key


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < deadline, f"waited {LIMIT:g} s for {what}"
        time.sleep(0.05)


def ended(*arguments: str) -> tuple[int, str]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "microserve.router",
        "--http-port",
        "0",
        "--bind",
        "tcp://127.0.0.1:*",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=daemon_environ(), check=False)
    return done.returncode, done.stderr


def test_the_official_client_with_a_key_over_tls_and_no_secret_in_any_log(tmp_path: Path) -> None:
    cert, private = make_certificate(tmp_path)
    file = tmp_path / "api_keys.toml"
    ann, root = new_api_key(file, "ann", "serve"), new_api_key(file, "root", "admin")
    bus = tmp_path / "keys"
    for name, role in (("r", "router"), ("e0", "engine"), ("me", "admin")):
        new_identity(bus, name, role, new_key_pair)
    demo = ("--model", "demo", "--threads", "1", "--log-level", "debug")
    router_args = (
        *("--api-keys-file", str(file), "--tls-cert", str(cert), "--tls-key", str(private)),
        *("--key-file", str(bus / "r.key"), "--log-level", "debug"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICROSERVE_KEY_FILE", str(bus / "me.key"))
        with Cluster(
            engines=1, engine_args=(*demo, "--key-file", str(bus / "e0.key")), router_args=router_args
        ) as cluster:
            url = cluster.http.replace("http://", "https://")
            trusted = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=str(cert)))
            with trusted, openai.OpenAI(base_url=f"{url}/v1", api_key=ann, http_client=trusted) as client:
                said = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=4)
                assert said.choices[0].message.content
                for wrong in ("nothing", ann[:-2]):
                    with pytest.raises(openai.AuthenticationError) as caught:
                        client.with_options(api_key=wrong).models.list()
                    assert caught.value.code == "invalid_api_key"

                def change(key: str) -> int:
                    body = {"name": "data_parallel", "model": "demo"}
                    return trusted.put(
                        f"{url}/admin/strategies", json=body, headers={"authorization": f"Bearer {key}"}
                    ).status_code

                assert (change(ann), change(root)) == (403, 200)
                # A new key works, and an old one ends, without a restart; a stream of it ends with it.
                bob = new_api_key(file, "bob", "serve")
                until(lambda: allowed(trusted, url, bob), "the new key to be let in")
                stream = client.chat.completions.create(
                    model="demo", messages=MESSAGES, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
                )
                next(iter(stream))
                revoke_api_key(file, "ann")
                with pytest.raises(openai.APIError, match="was revoked"):
                    for _ in stream:
                        pass
                assert not allowed(trusted, url, ann)
                with Client(cluster.router) as operator:
                    events = {each.detail for each in operator.events().events if each.kind == "refused"}
                assert {f"{why}, over HTTP" for why in ("wrong key", "not admin", "revoked")} <= events
                metrics = trusted.get(f"{url}/metrics", headers={"authorization": f"Bearer {bob}"}).text
                assert 'microserve_router_unauthorized_total{reason="revoked"} 1.0' in metrics
                assert 'microserve_router_unauthorized_total{reason="not admin"} 1.0' in metrics
                # A certificate that is renewed is presented to the next connection.
                cert.unlink()
                private.unlink()
                make_certificate(tmp_path, "renewed")
                until(lambda: presented(url) == "renewed", "the renewed certificate")
            secrets = [*(key.split("_", 2)[2] for key in (ann, root, bob)), ann[:-2].split("_", 2)[2]]
            secrets += [
                line.split("'")[1]
                for each in bus.glob("*.key")
                for line in each.read_text().splitlines()
                if "secret =" in line
            ]
            assert len(secrets) >= 8
            for daemon in cluster.daemons:
                assert not [secret for secret in secrets if secret in daemon.text()], daemon.name
                about = Path(f"/proc/{daemon.process.pid}")
                shown = (about / "cmdline").read_bytes() + (about / "environ").read_bytes()
                assert not [secret for secret in secrets if secret.encode() in shown]
            config = subprocess.run(
                [sys.executable, "-P", "-m", "microserve.tools", "config", "show", "router", "--json"],
                capture_output=True,
                text=True,
                env=daemon_environ()
                | {"MICROSERVE_ROUTER_KEY_FILE": str(bus / "r.key"), "MICROSERVE_ROUTER_API_KEYS_FILE": str(file)},
                check=False,
            )
            assert str(file) in config.stdout
            assert not [secret for secret in secrets if secret in config.stdout]


def allowed(client: Any, url: str, key: str) -> bool:
    return bool(client.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200)


def presented(url: str) -> str:
    """The name in the certificate that a new connection sees."""
    host, port = url.removeprefix("https://").split(":")
    pem = ssl.get_server_certificate((host, int(port)))
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-subject"], input=pem, capture_output=True, text=True, check=True
    ).stdout
    return text.strip().rpartition("=")[2].strip()


def test_who_has_no_key_is_told_so_in_plain_http_on_loopback(tmp_path: Path) -> None:
    file = tmp_path / "api_keys.toml"
    key = new_api_key(file, "ann", "serve")
    with Cluster(engines=1, engine_args=FAKE, router_args=("--api-keys-file", str(file))) as cluster:
        assert json.load(urllib.request.urlopen(f"{cluster.http}/ready"))["ready"]
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{cluster.http}/v1/models")
        with caught.value as refused:
            assert (refused.code, json.load(refused)["error"]["code"]) == (401, "invalid_api_key")
        request = urllib.request.Request(f"{cluster.http}/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert json.load(urllib.request.urlopen(request))["data"][0]["id"] == "tokens-only"


def test_a_router_that_would_be_open_does_not_start(tmp_path: Path) -> None:
    file = tmp_path / "api_keys.toml"
    new_api_key(file, "ann", "serve")
    cert, key = make_certificate(tmp_path)
    tls = ("--tls-cert", str(cert), "--tls-key", str(key))
    for arguments, said in (
        (("--http-host", "0.0.0.0"), "--insecure"),
        (("--http-host", "0.0.0.0", *tls), "api_keys_file"),
        (("--http-host", "0.0.0.0", "--api-keys-file", str(file)), "clear text"),
        (("--api-keys-file", str(tmp_path / "nowhere.toml")), "cannot read"),
        (("--tls-cert", str(cert)), "tls_key is not set"),
        (("--tls-cert", str(key), "--tls-key", str(key)), "tls_cert"),
    ):
        code, error = ended(*arguments)
        assert (code, said in error, len(error.splitlines())) == (2, True, 1), (arguments, error)
    key.chmod(0o640)
    code, error = ended(*tls)
    assert (code, "chmod 600" in error) == (2, True)
    key.chmod(0o600)
    file.write_text("[[keys]]\nname = 'ann'\nsecret = 'hunter2'\n")
    code, error = ended("--api-keys-file", str(file))
    assert (code, str(file) in error, "hunter2" in error) == (2, True, False)
