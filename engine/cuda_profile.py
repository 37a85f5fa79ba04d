"""How much memory the worst step takes: measured on a throw-away pool, so that no step finds the limit by failing."""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from microserve.engine.cuda_adjust import Adjustments
from microserve.engine.cuda_attention import PagedAttention, StepAttention
from microserve.engine.cuda_sampler import MOST_LOGPROBS, ROWS_AT_ONCE, Draws, greedy, log_probabilities
from microserve.engine.model.cuda_draw import draw
from microserve.engine.plan import SequenceStart
from microserve.kv.pool import PagePool, PageShape
from microserve.runtime.messages import SamplingParams

if TYPE_CHECKING:
    from microserve.engine.model.decoder import Decoder

_DRAWN = SamplingParams(temperature=1.0, top_k=100, top_p=0.9, min_p=0.01)
_ADJUSTED = SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1, logit_bias={0: 1.0}, min_tokens=1)


def worst_step_bytes(
    decoder: Decoder, shape: PageShape, device: torch.device, step_tokens: int, max_running: int
) -> int:
    """Bytes that a step of `step_tokens` tokens of prompts needs above the weights, with logits for `max_running`
    rows."""
    longest, size = decoder.cos.shape[0], shape.page_size
    lengths = [min(longest, step_tokens - begin) for begin in range(0, step_tokens, longest)]
    used = [-(-length // size) for length in lengths]
    pages, tokens = sum(used), step_tokens
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        pool = PagePool(pages + 1, shape, device=device)
        attention = PagedAttention(decoder, pool, most_decodes=2 * max_running)
        table = torch.arange(pages, dtype=torch.int32, device=device)
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        ends = torch.tensor([0, *used]).cumsum(0).int()
        last = torch.tensor([(length - 1) % size + 1 for length in lengths], dtype=torch.int32)
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        firsts = np.repeat(ends[:-1].numpy(), lengths)
        places = torch.from_numpy(positions).to(device)
        targets = torch.from_numpy(firsts + positions // size).to(device)
        for plan in (
            partial(attention.plan_fresh, 0, starts),
            partial(attention.plan_paged, 0, starts, ends, table, last),
        ):
            step = StepAttention(attention, places, 0, table, table, targets, plan)
            hidden = decoder.forward(torch.zeros(tokens, dtype=torch.long, device=device), step)
            logits = decoder.logits(hidden[: min(tokens, max_running)])
            _sample(logits)
        torch.cuda.synchronize(device)
    # The pool and the workspaces are among it: the real ones take their place.
    peak = torch.cuda.max_memory_allocated(device) - before - pool.nbytes
    del pool, attention, plan, step, hidden, logits, table, places, targets
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def _sample(logits: torch.Tensor) -> None:
    """What may be asked of rows, so that every kernel is there when the first token is drawn: draws of logits as they
    are, and of as many as are adjusted at once, one part after the other."""
    _draw(logits)
    rows = logits[:ROWS_AT_ONCE]
    adjustments = Adjustments(len(rows), rows.shape[1], rows.device)
    history = np.zeros(2, dtype=np.int32)
    for sequence in range(len(rows)):
        adjustments.start(SequenceStart(sequence, history, 1, _ADJUSTED, 0, (0,)))
    columns = torch.from_numpy(adjustments.columns(range(len(rows)))).to(rows.device)
    places = torch.arange(len(rows), device=rows.device)
    for _ in range(2):
        adjusted = adjustments.adjusted(rows.index_select(0, places), columns, [(row, 0) for row in range(len(rows))])
        best, ids = greedy(adjusted)
        tokens = torch.where(torch.isfinite(best), ids, -1).int()
        _draw(adjusted)
        adjustments.count(columns, tokens)
        log_probabilities(rows, tokens, places, min(MOST_LOGPROBS, rows.shape[1]))


def _draw(logits: torch.Tensor) -> None:
    """It takes no memory to speak of."""
    draws = Draws(1)
    draws.start(0, _DRAWN, 0)
    columns = torch.from_numpy(draws.columns(np.zeros(1, dtype=np.int32), [0])).to(logits.device)
    tokens = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
    draw(logits, columns, tokens, tokens.long())
