"""Keys on ZMQ sockets: CURVE, and who may come in (ZAP)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import zmq
import zmq.utils.z85

from microserve.runtime.errors import ConfigError
from microserve.runtime.zmq_bus.sockets import NOBLOCK, Port

if TYPE_CHECKING:
    from microserve.runtime.keys import BusSecurity, KeyPair

_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
"""Where libzmq asks whether a key may come in (ZeroMQ RFC 27)."""


class Doorman:
    """Answers libzmq's question whether a connection may come in, for every socket of a context that binds."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], security: BusSecurity) -> None:
        self._security = security
        socket = context.socket(zmq.REP)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(_ZAP_ENDPOINT)
        self._port = Port(socket, self._take)

    def _take(self) -> None:
        version, request, _domain, _address, _identity, mechanism, *credentials = self._port.socket.recv_multipart(
            NOBLOCK
        )
        public = zmq.utils.z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
        known = self._security.ring.find(public) is not None
        status, text = (b"200", b"OK") if known else (b"400", b"not authorized")
        self._port.socket.send_multipart([version, request, status, text, public.encode(), b""], NOBLOCK)
        self._port.recheck()

    def close(self) -> None:
        self._port.close()


def new_key_pair() -> KeyPair:
    """A fresh CURVE key pair: public, secret; Z85 text."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def curve_available() -> bool:
    """Whether this libzmq can use keys."""
    return bool(zmq.has("curve"))


def secure(socket: zmq.Socket[bytes], security: BusSecurity, *, binds: bool) -> None:
    identity = security.identity
    if binds:
        if identity.fleet_secret is None:
            socket.close(0)
            raise ConfigError(f"the key of {identity.name!r} is for the role {identity.role}: it cannot listen")
        socket.curve_secretkey = identity.fleet_secret.encode()
        socket.curve_server = True
        socket.setsockopt(zmq.ZAP_DOMAIN, b"microserve")
    else:
        socket.curve_publickey = identity.public.encode()
        socket.curve_secretkey = identity.secret.encode()
        socket.curve_serverkey = identity.fleet_public.encode()
