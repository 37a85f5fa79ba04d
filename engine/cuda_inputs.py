"""A step's slices as the flat int32 arrays that a GPU reads: one buffer, one copy. Pure numpy.

Slices of one token come first (they attend as decodes), then the others (they attend as prefills), whatever their
order in the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from microserve.engine.plan import Slice

IntArray = npt.NDArray[np.int32]


@dataclass(slots=True)
class StepArrays:
    """The arrays of one step. All int32.

    `source` [tokens]: a token id, or -1 - slot where the token is the one that the previous step sampled into that
    slot. `positions` [tokens]: where each token stands. `decode_pages[decode_indptr[i] : decode_indptr[i + 1]]`: the
    pages of decode i, with the one that its token goes to. `pages` [tokens - decodes]: the page that each token of a
    prompt goes to. `prefill_tokens` [prefills + 1]: the prefix sum of their lengths; `prefill_indptr`, `prefill_pages`,
    `prefill_last`: their pages, and the tokens in the last of them, as FlashInfer takes them. `sampled_rows` [samples]:
    the token rows whose logits are sampled, and `sampled_slots` where their tokens go, in the order of the plan's
    slices.
    """

    source: IntArray
    positions: IntArray
    pages: IntArray
    decodes: int
    decode_indptr: IntArray
    decode_pages: IntArray
    prefill_tokens: IntArray
    prefill_indptr: IntArray
    prefill_last: IntArray
    prefill_pages: IntArray
    fresh: bool
    """Whether every prompt's slice begins at its first token."""
    sampled_rows: IntArray
    sampled_slots: IntArray
    samples: list[tuple[int, int]]
    """(sequence, output index) of each sample."""


def step_arrays(slices: Sequence[Slice], slots: Mapping[int, int], page_size: int) -> StepArrays:
    """The arrays of `slices`; `slots` gives the slot of each sequence."""
    decodes = [part for part in slices if part.tokens is None or len(part.tokens) == 1]
    prefills = [part for part in slices if part.tokens is not None and len(part.tokens) > 1]
    count = len(decodes)
    starts = np.fromiter((part.start for part in decodes), dtype=np.int32, count=count)
    source = np.fromiter(
        (-1 - slots[part.sequence] if part.tokens is None else part.tokens[0] for part in decodes),
        dtype=np.int32,
        count=count,
    )
    used = starts // page_size + 1
    tables = [part.pages[:length] for part, length in zip(decodes, used.tolist(), strict=True)]
    decode_pages = np.concatenate(tables) if tables else np.empty(0, dtype=np.int32)
    ends = np.cumsum(used, dtype=np.int32)
    rows = dict(zip((id(part) for part in decodes), range(count), strict=True))

    empty = np.empty(0, dtype=np.int32)
    sources, positions, pages = [source], [starts], [empty]
    lengths, prefill_used, prefill_tables, prefill_last = [], [], [], []
    row = count
    for part in prefills:
        tokens = part.tokens
        if tokens is None:
            continue
        length, end = len(tokens), part.start + len(tokens)
        here = np.arange(part.start, end, dtype=np.int32)
        sources.append(tokens)
        positions.append(here)
        pages.append(part.pages[here // page_size])
        table = part.pages[: -(-end // page_size)]
        prefill_tables.append(table)
        prefill_used.append(len(table))
        prefill_last.append((end - 1) % page_size + 1)
        lengths.append(length)
        row += length
        rows[id(part)] = row - 1
    sampled = [part for part in slices if part.sample]
    return StepArrays(
        source=np.concatenate(sources).astype(np.int32, copy=False),
        positions=np.concatenate(positions).astype(np.int32, copy=False),
        pages=np.concatenate(pages).astype(np.int32, copy=False),
        decodes=count,
        decode_indptr=np.concatenate(([0], ends)).astype(np.int32),
        decode_pages=decode_pages,
        prefill_tokens=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
        prefill_indptr=np.concatenate(([0], np.cumsum(prefill_used))).astype(np.int32),
        prefill_last=np.array(prefill_last, dtype=np.int32),
        prefill_pages=np.concatenate([empty, *prefill_tables]),
        fresh=all(part.start == 0 for part in prefills),
        sampled_rows=np.array([rows[id(part)] for part in sampled], dtype=np.int32),
        sampled_slots=np.array([slots[part.sequence] for part in sampled], dtype=np.int32),
        samples=[(part.sequence, part.output_index) for part in sampled],
    )


def lay(memory: npt.NDArray[Any], arrays: Sequence[npt.NDArray[Any]]) -> tuple[list[slice], int]:
    """Writes `arrays` one behind another into `memory`, each to a multiple of four places: where each is, and the end.

    All are flat. Raises `ValueError` where `memory` is too small.
    """
    at, places = 0, []
    for array in arrays:
        place = slice(at, at + len(array))
        if place.stop > len(memory):
            raise ValueError(f"{place.stop} places are needed, and there are {len(memory)}")
        memory[place] = array
        places.append(place)
        at += -(-len(array) // 4) * 4
    return places, at


_MOST_TABLE = 1 << 26


def table_room(max_running: int, max_context: int, page_size: int) -> int:
    """Entries that the page tables of so many sequences take at most: a page that they share stands in each of them,
    so the pool does not bound them. Never more than 64 Mi (256 MB), which no batch of today comes near."""
    return min(max_running * -(-max_context // page_size), _MOST_TABLE)


def ladder(most: int) -> list[int]:
    """Batch sizes for which a decode step is captured: fine where padding would cost, coarse where it does not."""
    sizes = [1, 2, 4, 8]
    sizes += range(16, 65, 8)
    sizes += range(80, 257, 16)
    sizes += range(288, 1025, 32)
    kept = [size for size in sizes if size < most]
    return [*kept, most]
