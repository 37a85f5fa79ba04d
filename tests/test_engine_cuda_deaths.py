"""GPU engines as processes: what they push arrives, and the GPU's memory that a killed one had comes back."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from perf.shapes import write_shape
from tests.cluster import Cluster
from tests.engine_calls import open_engines

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engine_calls import Answer

pytestmark = pytest.mark.gpu

POOL_PAGES, PAGE_BYTES = 16384, 128 << 10
SMALL = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
PROMPT: list[int] = np.random.default_rng(1).integers(3, 30_000, 1600).tolist()
SPARE = 64 << 20
"""What the driver may keep, or another process may take meanwhile."""


def taken(device: int) -> int:
    """Bytes of a GPU that are in use, whoever uses them."""
    torch = pytest.importorskip("torch")
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


async def one_answer(cluster: Cluster) -> Answer:
    """The receiver's, to a prompt that the sender has computed and pushed to it."""
    endpoints = await asyncio.to_thread(cluster.endpoints)
    async with open_engines({name: endpoints[name] for name in ("sender", "receiver")}) as engines:
        await engines["sender"].evict()
        kv = await engines["receiver"].prep_recv(PROMPT)
        await engines["sender"].sending(PROMPT, kv)
        answer = await engines["receiver"].generate(PROMPT, 8, kv=kv)
        for engine in engines.values():
            await engine.until_whole()
        return answer


def test_memory_of_a_killed_receiver_comes_back(tmp_path: Path) -> None:
    """Its pool was mapped by the engine that pushes: as long as that is so, the driver keeps it, dead or not."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    last = torch.cuda.device_count() - 1
    model = write_shape(tmp_path / "small", "llama-3.1-8b", num_key_value_heads=4, head_dim=128, **SMALL)
    flags = ("--model", str(model), "--dummy-weights", "--executor", "cuda", "--kv-pages", str(POOL_PAGES))
    receiver = ("--device", f"cuda:{last}")
    with Cluster(0, engine_args=(*flags, "--max-context", "4096", "--max-running", "8")) as cluster:
        sender = cluster.add_engine("sender", "--device", "cuda:0")
        before, answers = taken(last), []
        for _ in range(2):
            daemon = cluster.add_engine("receiver", *receiver)
            answers.append(asyncio.run(one_answer(cluster)))
            assert taken(last) - before > POOL_PAGES * PAGE_BYTES
            daemon.kill()
            until = time.monotonic() + 20
            while (kept := taken(last) - before) > SPARE:
                assert time.monotonic() < until, f"{kept >> 20} MiB are still taken"
        assert sender.text().count("pushes go straight into the peer's pool") == 2
        assert [answer.done.received_tokens for answer in answers] == [len(PROMPT)] * 2
        assert answers[0].tokens == answers[1].tokens
