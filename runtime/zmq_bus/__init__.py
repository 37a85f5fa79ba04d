"""The bus over ZeroMQ: ROUTER and DEALER for sessions, PUB and SUB for events; tcp, ipc and inproc.

Only this package knows zmq: `sockets` drives one on the event loop, `sessions` and `events` are what the bus is made
of, `curve` is about keys, `bus` joins them.

A ZMQ socket has one edge-triggered descriptor: it becomes readable when the socket's state *may* have changed, and any
call on the socket may consume that. So after the descriptor fires the socket is read until it is empty, and after every
send the state is looked at again. This costs less than half of what `zmq.asyncio` does.

libzmq reconnects and buffers by itself, and loses messages silently when it must. Here a session has exactly one
connection: monitors report a lost one within milliseconds and the session ends; what does not fit into libzmq's
(short) queues waits in ours, which is bounded in bytes and fails loudly.
"""

from __future__ import annotations

from microserve.runtime.zmq_bus.bus import ZmqBus
from microserve.runtime.zmq_bus.curve import curve_available, new_key_pair

__all__ = ["ZmqBus", "curve_available", "new_key_pair"]
