"""The prefix tree at the size of a large pool: match and insert of a long prompt, and memory a page.

The tree holds a million pages, inserted in shuffled order: 512 long prompts that leave one trunk of 128k tokens at a
branch point each, and many shorter ones. The measured prompt follows the trunk past all 512 branch points.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import TYPE_CHECKING

import numpy as np
import psutil

from microserve.kv.cache import KvCache
from microserve.runtime.clock import monotonic
from perf.harness import Benchmark, Sample

if TYPE_CHECKING:
    import numpy.typing as npt

PAGE = 16
TRUNK_PAGES = 8192  # 131,072 tokens
BRANCHES = 512


def main() -> None:
    bench = Benchmark("prefix_tree", "match and insert of a 128k-token prompt in a tree of a million pages")
    parser = argparse.ArgumentParser()
    parser.add_argument("--pages", type=int, default=1_000_000, help="pages in the tree (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of tokens and order (default: %(default)s)")
    args = bench.arguments(parser, repeat=50, warmup=3)
    random = np.random.default_rng(args.seed)
    gc.disable()  # as an engine runs: frozen after start-up, collected by reference counts alone
    process = psutil.Process()
    before = process.memory_info().rss
    cache, trunk = build(args.pages, random)
    grown = process.memory_info().rss - before
    stats = cache.statistics()
    print(f"built: {stats.cached:,} pages in {stats.nodes:,} nodes")

    matches, inserts = [], []
    for index in range(args.warmup + args.repeat):
        started = time.perf_counter()
        match = cache.match(trunk)
        matched = time.perf_counter() - started
        if match.length != len(trunk):
            raise SystemExit(f"matched {match.length} of {len(trunk)} tokens")
        seconds = insert_again(cache, trunk, random)
        if index >= args.warmup:
            matches.append(matched)
            inserts.append(seconds)
    bench.row("match, 512 branch points", Sample(tuple(matches)), unit="ms", scale=1e3, limit="under 1")
    bench.row("acquire + insert + release", Sample(tuple(inserts)), unit="ms", scale=1e3, limit="under 3")
    token_bytes = PAGE * 4 + 4
    note = f"resident growth / pages; {token_bytes} of them are the ids themselves; {stats.nodes:,} nodes"
    bench.row("memory a page", Sample((grown / stats.cached,)), unit="bytes", note=note)
    cache.check_integrity()
    bench.finish(args)


def build(pages: int, random: np.random.Generator) -> tuple[KvCache, npt.NDArray[np.int32]]:
    """A cache of `pages` cached pages, and the trunk that crosses every branch point."""
    cache = KvCache(pages + 2 * TRUNK_PAGES, PAGE, clock=monotonic)
    trunk = random.integers(0, 128_000, TRUNK_PAGES * PAGE, dtype=np.int32)
    cuts = np.sort(random.choice(np.arange(1, TRUNK_PAGES), size=BRANCHES, replace=False))
    share = (pages - TRUNK_PAGES) // 2 // BRANCHES
    prompts: list[tuple[int, int]] = [(int(cut), share) for cut in cuts]
    left = pages - TRUNK_PAGES - share * BRANCHES
    while left:  # the other half: prompts of their own, a few pages to a few hundred
        size = min(left, int(random.lognormal(3.0, 1.2)) + 1)
        prompts.append((0, size))
        left -= size
    prompts.append((TRUNK_PAGES, 0))
    for index in random.permutation(len(prompts)):
        cut, own = prompts[int(index)]
        tail = random.integers(0, 128_000, own * PAGE, dtype=np.int32)
        _insert(cache, np.concatenate([trunk[: cut * PAGE], tail]))
    return cache, trunk


def insert_again(cache: KvCache, trunk: npt.NDArray[np.int32], random: np.random.Generator) -> float:
    """Seconds to bring in the trunk with one new page at its end, as a finished request does."""
    prompt = np.concatenate([trunk, random.integers(0, 128_000, PAGE, dtype=np.int32)])
    started = time.perf_counter()
    _insert(cache, prompt)
    return time.perf_counter() - started


def _insert(cache: KvCache, prompt: npt.NDArray[np.int32]) -> None:
    lock = cache.acquire(prompt)
    own = cache.allocate(len(prompt) // PAGE - len(lock.pages))
    if own is None:
        raise SystemExit("the pool is too small for the tree")
    cache.release(cache.insert(prompt, np.concatenate([lock.pages, own]), lock))


if __name__ == "__main__":
    main()
