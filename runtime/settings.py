"""What can be configured: the frozen structs that `microserve.runtime.config` fills.

Every field's annotation carries its documentation and its limits, from which validation, the flags' help and the
error messages are made.
"""

from __future__ import annotations

import os
import re
import socket
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from microserve.runtime.errors import ConfigError

_ENDPOINT = {"expected": "an endpoint such as tcp://127.0.0.1:7700 or ipc:///run/microserve/router.sock"}
_ENDPOINT_PATTERN = r"^(tcp|ipc|memory)://.+"
_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
_NAME = {"expected": "a name of at most 63 letters, digits, '.', '_' and '-'"}
DEFAULT_KV_MEMORY = "2GiB"
_SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*([KMGT]i?)?B?\s*$"
_SIZE = {"expected": "a size such as 512MiB, 2GiB or 4GB"}
_PATTERN_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*")

Endpoint = Annotated[str, Meta(pattern=_ENDPOINT_PATTERN, extra=_ENDPOINT)]
LogLevel = Literal["debug", "info", "warning", "error"]


class FakeConfig(Struct, frozen=True, kw_only=True):
    """The latency model and shape of the `fake` executor. Times are microseconds of one step."""

    prefill_us_per_token: Annotated[float, Meta(ge=0, description="time a prompt token adds to a step, µs")] = 20.0
    decode_base_us: Annotated[float, Meta(ge=0, description="time of a step whatever it holds, µs")] = 2000.0
    decode_us_per_sequence: Annotated[float, Meta(ge=0, description="time a decoding sequence adds, µs")] = 50.0
    vocab_size: Annotated[int, Meta(ge=2, description="vocabulary size")] = 32000
    max_context: Annotated[int, Meta(ge=2, description="longest prompt and output together, tokens")] = 32768
    total_pages: Annotated[int, Meta(ge=1, description="pages of the pretended pool")] = 8192
    eos_after: Annotated[
        int | None,
        Meta(description="end every sequence after so many output tokens (not set: only max_tokens ends it)"),
    ] = None


class EngineConfig(Struct, frozen=True, kw_only=True):
    """An engine's configuration."""

    engine_id: Annotated[
        Annotated[str, Meta(pattern=_NAME_PATTERN, extra=_NAME)] | None,
        Meta(description="the engine's name, kept across restarts (not set: made of host name and process id)"),
    ] = None
    model: Annotated[str, Meta(min_length=1, description="checkpoint folder, or the name of a bundled model")] = "demo"
    model_name: Annotated[
        str | None, Meta(description="name that requests use for the model (not set: the folder's name)")
    ] = None
    executor: Annotated[
        Literal["auto", "cuda", "torch", "fake"],
        Meta(description="what computes; auto: the fastest that this machine has; fake: made-up tokens, for tests"),
    ] = "auto"
    device: Annotated[str, Meta(description="where it computes: auto, cpu, cuda:0 …")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Meta(
            description="number format of weights and KV; auto: float32 for the torch executor, the checkpoint's for "
            "cuda (bfloat16 for float32)"
        ),
    ] = "auto"
    bind: Annotated[Endpoint, Meta(description="where routers reach this engine's verbs; port * takes a free one")] = (
        "tcp://127.0.0.1:*"
    )
    advertise: Annotated[
        Endpoint | None, Meta(description="how others reach `bind`, where that differs (containers, NAT)")
    ] = None
    events_bind: Annotated[Endpoint, Meta(description="where events and load are published")] = "tcp://127.0.0.1:*"
    events_advertise: Annotated[Endpoint | None, Meta(description="how others reach `events_bind`")] = None
    routers: Annotated[tuple[Endpoint, ...], Meta(description="routers that this engine announces itself to")] = (
        "tcp://127.0.0.1:7700",
    )
    page_size: Annotated[int, Meta(ge=1, le=1024, description="tokens in a KV page")] = 16
    kv_memory: Annotated[
        str,
        Meta(
            pattern=_SIZE_PATTERN,
            extra=_SIZE,
            description="memory of the KV pool; to the cuda executor the default means all, and the torch executor "
            "takes no more than max_running requests may need",
        ),
    ] = DEFAULT_KV_MEMORY
    gpu_memory: Annotated[
        float, Meta(gt=0, le=1, description="share of the GPU's memory that the engine may take in all")
    ] = 0.92
    dummy_weights: Annotated[
        bool, Meta(description="make up the weights, for measuring: the model's folder needs only config.json")
    ] = False
    kv_pages: Annotated[
        Annotated[int, Meta(ge=2)] | None, Meta(description="pages in the KV pool (overrides kv_memory)")
    ] = None
    max_context: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="longest prompt and output together, tokens (not set: the model's own limit)"),
    ] = None
    max_running: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="requests computed at once (not set: 64; to the cuda executor 256 where it may take 20 GiB of "
            "the GPU, 512 from 56 GiB on; and no more than half of step_tokens)"
        ),
    ] = None
    max_waiting: Annotated[int, Meta(ge=0, description="requests that may wait; one more is refused as busy")] = 1024
    step_tokens: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(
            description="token budget of a step: decodes, then prompt chunks (not set: 512; to the cuda executor 2048 "
            "where it may take 20 GiB of the GPU, 8192 from 56 GiB on; and at least twice max_running)"
        ),
    ] = None
    step_timeout: Annotated[
        float,
        Meta(gt=0, description="seconds after which a step counts as hung, and the watchdog restarts the process"),
    ] = 120.0
    transport: Annotated[
        Literal["auto", "nixl", "loopback"],
        Meta(
            description="what carries KV pages to other engines; auto: nixl if installed; loopback: within one process"
        ),
    ] = "auto"
    require_link: Annotated[
        str | None,
        Meta(description="refuse peers not reached by this: cuda_ipc, rdma, shm, tcp (not set: any will do)"),
    ] = None
    ucx_devices: Annotated[
        str,
        Meta(description="network devices that KV may use (UCX_NET_DEVICES), such as mlx5_0:1; lo: this host alone"),
    ] = "lo"
    kv_wait: Annotated[float, Meta(ge=0, description="seconds to wait for KV before it is computed here")] = 10.0
    lease_term: Annotated[float, Meta(gt=0, description="seconds that an unused lease lives")] = 30.0
    lease_life: Annotated[float, Meta(gt=0, description="seconds that a lease lives at most")] = 300.0
    lease_share: Annotated[float, Meta(gt=0, le=1, description="largest share of the pool that leases may hold")] = 0.5
    threads: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="CPU threads of the executor (not set: one per core)")
    ] = None
    labels: Annotated[dict[str, str], Meta(description="labels that strategies select by, such as pool=prefill")] = {}
    key_file: Annotated[
        str | None,
        Meta(
            description="who this process is, where keys are used; authorized.toml stands beside it (not set: no keys)"
        ),
    ] = None
    insecure: Annotated[
        bool, Meta(description="listen off loopback without keys: everybody who reaches a port may use it")
    ] = False
    metrics_host: Annotated[str, Meta(min_length=1, description="address of /metrics, /health and /ready")] = (
        "127.0.0.1"
    )
    metrics_port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)] | None,
        Meta(description="port of /metrics, /health and /ready; 0 takes a free one (not set: not served)"),
    ] = None
    drain_timeout: Annotated[
        float, Meta(ge=0, description="seconds that running requests get to finish after SIGTERM")
    ] = 30.0
    log_level: Annotated[LogLevel, Meta(description="least severe events that are logged")] = "info"
    log_json: Annotated[bool, Meta(description="log one JSON object a line")] = False
    fake: Annotated[FakeConfig, Meta(description="the fake executor")] = FakeConfig()


class RouterConfig(Struct, frozen=True, kw_only=True):
    """A router's configuration."""

    router_id: Annotated[
        Annotated[str, Meta(pattern=_NAME_PATTERN, extra=_NAME)] | None,
        Meta(description="the router's name (not set: made of host name and process id)"),
    ] = None
    bind: Annotated[Endpoint, Meta(description="where engines announce themselves and clients call")] = (
        "tcp://127.0.0.1:7700"
    )
    advertise: Annotated[Endpoint | None, Meta(description="how others reach `bind`, where that differs")] = None
    http_host: Annotated[str, Meta(min_length=1, description="address of the OpenAI-compatible HTTP server")] = (
        "127.0.0.1"
    )
    http_port: Annotated[int, Meta(ge=0, le=65535, description="port of the HTTP server; 0 takes a free one")] = 8000
    api_keys_file: Annotated[
        str | None,
        Meta(description="HTTP asks for API keys of this file ('microserve keys api'; not set: it asks nobody)"),
    ] = None
    tls_cert: Annotated[
        str | None, Meta(description="certificate chain of the HTTP server, PEM (not set: plain HTTP)")
    ] = None
    tls_key: Annotated[str | None, Meta(description="private key of the certificate, PEM")] = None
    metrics_open: Annotated[bool, Meta(description="/metrics asks for no API key")] = False
    max_active: Annotated[int, Meta(ge=1, description="requests at engines at once")] = 1024
    max_queued: Annotated[int, Meta(ge=0, description="requests that may wait for a place; one more gets 429")] = 256
    queue_timeout: Annotated[float, Meta(ge=0, description="seconds that a request may wait for a place")] = 30.0
    request_timeout: Annotated[float, Meta(gt=0, description="seconds that a request may take in all")] = 600.0
    max_body_bytes: Annotated[int, Meta(ge=1024, description="largest HTTP body that is read, bytes")] = 16 << 20
    strategy: Annotated[str, Meta(min_length=1, description="name of the strategy that serves requests")] = (
        "data_parallel"
    )
    strategy_settings: Annotated[
        dict[str, int | float | bool | str], Meta(description="settings of the strategy, such as ratio=0.2")
    ] = {}
    strategy_folder: Annotated[
        str | None, Meta(description="folder of Python files that define further strategies (not set: none)")
    ] = None
    state_folder: Annotated[
        str | None, Meta(description="folder where strategy versions are kept across restarts (not set: not kept)")
    ] = None
    engine_silence: Annotated[
        float, Meta(gt=0, description="seconds without a heartbeat after which an engine gets no new work")
    ] = 3.0
    keep_alive: Annotated[float, Meta(ge=0, description="seconds that an idle HTTP connection stays open")] = 75.0
    key_file: Annotated[
        str | None,
        Meta(
            description="who this process is, where keys are used; authorized.toml stands beside it (not set: no keys)"
        ),
    ] = None
    insecure: Annotated[
        bool, Meta(description="listen off loopback without keys: everybody who reaches a port may use it")
    ] = False
    drain_timeout: Annotated[
        float, Meta(ge=0, description="seconds that running requests get to finish after SIGTERM")
    ] = 30.0
    log_level: Annotated[LogLevel, Meta(description="least severe events that are logged")] = "info"
    log_json: Annotated[bool, Meta(description="log one JSON object a line")] = False


def parse_size(text: str) -> int:
    """Bytes of a size such as "512MiB", "2G" (binary too) or "4GB" (decimal). Raises `ConfigError`."""
    match = _PATTERN_BYTES.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not {_SIZE['expected']}")
    number, unit, binary = match.groups()
    base = 1000 if not binary and text.rstrip().endswith("B") else 1024
    return int(float(number) * base ** (" KMGT".index(unit) if unit else 0))


def default_process_id(environ_host: str | None = None) -> str:
    """A name for this process, unique on its host and for as long as it runs: host name and process id."""
    host = environ_host if environ_host is not None else socket.gethostname()
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", host.split(".")[0]).strip("-._") or "host"
    return f"{cleaned[:48]}-{os.getpid()}"


def section_of(cls: type[Struct]) -> str:
    """ "engine" or "router": the table in a file, and the word in environment names."""
    return cls.__name__.removesuffix("Config").lower()


def describe_default(value: Any) -> str:
    """A default as help shows it; empty for what is not set."""
    if value is None or value == {}:
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
