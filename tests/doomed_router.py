"""A router that prepares a receive, tells its address, and then does nothing more: to be killed.

python -m tests.doomed_router ENDPOINT PROMPT    (token ids, little-endian int32, in hex)
"""

from __future__ import annotations

import asyncio
import sys

import msgspec

from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.messages import Prepared, PrepRecv
from microserve.runtime.rpc import connect
from microserve.runtime.zmq_bus import ZmqBus


async def main(endpoint: str, prompt: bytes) -> None:
    client = await connect(ZmqBus(Peer("router", "doomed", new_epoch())), endpoint)
    prepared = await client.call(PrepRecv(request_id="r", sub_id="doomed", prompt=prompt))
    if not isinstance(prepared, Prepared):
        raise SystemExit(f"prep_recv answered {prepared}")
    print(msgspec.msgpack.encode(prepared.address).hex(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], bytes.fromhex(sys.argv[2])))
