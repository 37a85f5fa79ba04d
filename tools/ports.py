"""Whether ports are free, told in terms of the options that choose them."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from microserve.runtime.errors import ConfigError
from microserve.tools.checks.ports import who_listens


def check_http_port(host: str, port: int) -> None:
    """Raises `ConfigError` when the HTTP port is taken. Port 0 (any free one) passes."""
    if port:
        _check(host, port, f"HTTP port {port}", "choose another with --http-port")


def check_tcp_endpoint(endpoint: str) -> None:
    """Raises `ConfigError` when the port of a tcp endpoint is taken; other transports pass."""
    scheme, _, address = endpoint.partition("://")
    host, colon, port = address.rpartition(":")
    if scheme == "tcp" and colon and port.isdigit() and port != "0":
        _check(host.strip("[]").replace("*", "0.0.0.0"), int(port), f"bus port {port}", "choose another with --bind")


def _check(host: str, port: int, what: str, advice: str) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"{host!r} is not an address of this machine: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as probe:
        # As servers do: connections of an earlier run that the kernel still remembers do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"{what} of {host} is taken by {who_listens(host, port, Path('/'))}; {advice}"
                ) from error
            raise ConfigError(f"{what} of {host} cannot be used: {error.strerror}; {advice}") from error
