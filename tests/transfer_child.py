"""A process with a NIXL transport, told what to do by JSON lines on its standard input: one end of a real link.

python -m tests.transfer_child NAME DEVICE CONNECT_LIMIT PAGES PAGE_BYTES SEED MAPS
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from microserve.engine.transfers import TransferThread
from microserve.kv.transfer.base import KvMemory, PostState
from microserve.kv.transfer.cuda_ipc import near_memory
from microserve.kv.transfer.nixl import NixlTransport
from microserve.runtime.clock import monotonic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from microserve.kv.transfer.base import Connecting, Post

LIMIT = 30.0
"""Seconds that an answer may take."""
_LOOK = 0.0002


class _Child:
    def __init__(self, name: str, device: str, limit: float, pages: int, page_bytes: int, seed: int, maps: int) -> None:
        self.pool: Any
        if device == "cpu":
            self.pool = np.random.default_rng(seed).integers(0, 256, (pages, page_bytes), dtype=np.uint8)
            address = self.pool.ctypes.data
        else:
            import torch  # takes longer than all the rest

            torch.manual_seed(seed)
            self.pool = torch.randint(0, 256, (pages, page_bytes), dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
            address = self.pool.data_ptr()
        memory = KvMemory(address, page_bytes, pages, device=device, owner=self.pool)
        near = near_memory(memory) if maps else None
        self.transport = NixlTransport(memory, name, near=near, connect_limit=limit)
        self.connecting: dict[str, Connecting] = {}
        self.posts: list[Post] = []
        self.still = False
        """It looks at nothing."""
        self.say({"metadata": self.transport.metadata().hex()})

    def say(self, fact: Mapping[str, Any]) -> None:
        print(json.dumps(fact), flush=True)

    def run(self) -> None:
        rest = b""
        while True:
            if select.select([sys.stdin], [], [], _LOOK)[0]:
                if not (chunk := os.read(sys.stdin.fileno(), 1 << 20)):
                    break
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self.obey(json.loads(line))
            if not self.still:
                self.look()
        self.transport.close()

    def obey(self, order: dict[str, Any]) -> None:
        verb = order["verb"]
        if verb == "connect":
            metadata = bytes.fromhex(order["metadata"])
            self.connecting[order["peer"]] = self.transport.connect(order["peer"], metadata)
        elif verb == "push":
            source, target = (np.array(order[side], dtype=np.int32) for side in ("source", "target"))
            post = self.transport.post(order["peer"], source, target, order["note"].encode())
            if isinstance(post, str):
                self.say({"pushed": "refused", "error": post})
            else:
                self.posts.append(post)
                self.say({"posted": post.nbytes})
        elif verb == "disconnect":
            self.transport.disconnect(order["peer"])
        elif verb == "still":
            self.still = True
            self.say({"still": True})
        elif verb == "outlive":
            self.say(self.outlive())
        elif verb == "digest":
            self.say({"digest": digest(self.pages(order["pages"]))})

    def outlive(self) -> dict[str, int]:
        """A peer is dead. How many pages are written until an engine would be told so, and how many after that."""
        taken: list[int] = []

        def told() -> None:
            taken.append(self.written())
            self.pool[:] = 7

        transfers = TransferThread(self.transport, arrived=lambda arrivals: None, post=lambda function, *args: None)
        self.pool[:] = 7
        transfers.outlive("gone:1", told)
        while not taken:
            transfers.turn()
        for _ in range(200):
            self.transport.arrivals()
        return {"taken": taken[0], "overwritten": self.written()}

    def written(self) -> int:
        """Pages that hold anything but sevens."""
        return int((self.pool != 7).any(1).sum())

    def pages(self, numbers: list[int]) -> np.ndarray[Any, Any]:
        chosen = self.pool[numbers]
        return np.asarray(chosen if isinstance(chosen, np.ndarray) else chosen.cpu())

    def look(self) -> None:
        for peer, note in self.transport.arrivals():
            if note:
                self.say({"arrived": note.decode(), "peer": peer})
        for peer, connecting in tuple(self.connecting.items()):
            if (report := connecting.poll()) is not None:
                del self.connecting[peer]
                fact = {"transport": report.transport, "rate": report.gigabytes_per_second, "error": report.error}
                self.say(fact | {"mapped": peer in self.transport.mapped})
        for post in tuple(self.posts):
            status = self.transport.poll(post)
            if status.state is not PostState.ACTIVE:
                self.posts.remove(post)
                self.transport.release(post)
                self.say({"pushed": status.state.value, "error": status.error})


def digest(pages: np.ndarray[Any, Any]) -> str:
    """A digest of pages, in order."""
    return hashlib.sha256(np.ascontiguousarray(pages).tobytes()).hexdigest()


class Child:
    """A running child, seen from the test."""

    def __init__(
        self,
        name: str,
        *,
        seed: int,
        pages: int,
        page_bytes: int,
        env: Mapping[str, str],
        device: str = "cpu",
        limit: float = LIMIT,
        maps: bool = True,
    ) -> None:
        """`maps`: whether it maps pools of peers, and lets its own be mapped; else UCX carries every page."""
        self.name = name
        numbers = [str(limit), str(pages), str(page_bytes), str(seed), str(int(maps))]
        command = [sys.executable, "-m", "tests.transfer_child", name, device, *numbers]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent, env=dict(env)
        )
        self._lines: list[dict[str, Any]] = []
        self._rest = b""
        self.metadata = self.hear("metadata")["metadata"]

    def tell(self, verb: str, **fields: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"verb": verb, **fields}).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, key: str, within: float = LIMIT) -> dict[str, Any]:
        """The next fact that has `key`; others wait for their turn. Raises `TimeoutError`."""
        until = monotonic() + within
        while True:
            for index, fact in enumerate(self._lines):
                if key in fact:
                    return self._lines.pop(index)
            self._read(key, until)

    def _read(self, key: str, until: float) -> None:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, until - monotonic()))[0]:
            raise TimeoutError(f"{self.name} said no {key}")
        chunk = self.process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
        if not chunk:
            raise EOFError(f"{self.name} has ended with {self.process.wait(LIMIT)}")
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self._lines += [json.loads(line) for line in lines]

    def connect(self, other: Child) -> dict[str, Any]:
        self.tell("connect", peer=other.name, metadata=other.metadata)
        return self.hear("transport")

    def digest(self, pages: list[int]) -> str:
        self.tell("digest", pages=pages)
        return str(self.hear("digest")["digest"])

    def end(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(LIMIT)
        finally:
            self.process.kill()
            self.process.wait()


if __name__ == "__main__":
    _Child(sys.argv[1], sys.argv[2], float(sys.argv[3]), *map(int, sys.argv[4:8])).run()
