"""The executor of NVIDIA GPUs: paged attention, CUDA graphs for decodes, two steps in flight.

`launch` enqueues a step and returns; `collect` waits for the oldest. A token that is sampled stays on the GPU, in its
sequence's slot, where the next step finds it. A step of decodes alone replays a graph of the next larger captured batch
size; rows that only pad it stand on a page that no sequence owns. A step with prompts and few tokens replays the graphs
of `SegmentGraphs`.

What the CPU writes in every step (pinned) exists twice and is used in turn: with two steps in flight, the one
before the last has been collected.
"""

from __future__ import annotations

import gc
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from microserve.engine.cuda_adjust import Adjustments
from microserve.engine.cuda_attention import PagedAttention, StepAttention
from microserve.engine.cuda_inputs import StepArrays, ladder, lay, step_arrays, table_room
from microserve.engine.cuda_sampler import MOST_LOGPROBS, ROWS_AT_ONCE, Draws, greedy, log_probabilities, plain
from microserve.engine.cuda_segments import SegmentGraphs
from microserve.engine.executor import DeviceLost
from microserve.engine.model.cuda_draw import draw
from microserve.engine.plan import Sampled, StepPlan, StepResult
from microserve.runtime.errors import InternalError
from microserve.runtime.log import get_logger
from microserve.runtime.messages import Layout, ModelInfo, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from microserve.engine.cuda_attention import Prefill
    from microserve.engine.model.decoder import Decoder
    from microserve.engine.plan import SequenceStart
    from microserve.kv.pool import PagePool
    from microserve.kv.transfer.base import KvMemory

_NOT_FINITE = "the model's logits are not finite numbers"

_log = get_logger(__name__)


@dataclass(slots=True)
class _Graph:
    """A captured decode step, and where its logits come out."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


@dataclass(slots=True)
class _Flight:
    """A launched step."""

    step: int
    samples: list[tuple[int, int]]
    tokens: Tensor
    """Pinned int32 [samples]: the tokens, once `done`; -1 where the logits were no numbers."""
    done: Any
    told: list[tuple[int, int]] = field(default_factory=list)
    """Samples that are told with log probabilities, and of how many tokens beside the chosen one."""
    values: Tensor | None = None
    ids: Tensor | None = None
    """Pinned, of `told`: as `log_probabilities` gives them, once `done`."""


class CudaExecutor:
    """Implements `Executor` on one GPU."""

    depth = 2

    def __init__(
        self,
        decoder: Decoder,
        pool: PagePool,
        model: ModelInfo,
        *,
        max_running: int,
        step_tokens: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """The last page of `pool` is ours, for rows that pad a graph. `progress` is told of captured graphs."""
        device = pool.tensor.device
        self._decoder = decoder
        self._pool = pool
        self._model = model
        self._device = device
        # Sends take no place among those that run, and the last token of one attends as a decode.
        self._attention = PagedAttention(decoder, pool, most_decodes=2 * max_running)
        self._pad_page = pool.total_pages - 1
        self._slots: dict[int, int] = {}
        self._told: dict[int, int] = {}
        """Sequences that are told with log probabilities, and of how many tokens beside the chosen one."""
        # Those that run, those that ended in a step in flight, sends, and one for padding.
        self._slot_count = 4 * max_running + 64
        self._free_slots = list(range(self._slot_count - 1))
        self._last = torch.zeros(self._slot_count, dtype=torch.int64, device=device)
        self._draws = Draws(self._slot_count)
        """Of sequences whose logits are sampled as they are; and of the others."""
        self._adjusted_draws = Draws(self._slot_count)
        self._adjustments = Adjustments(adjusted_room(max_running), decoder.config.vocab_size, device)
        self._flights: deque[_Flight] = deque()
        self._parity = 0
        tables = table_room(max_running, model.max_context, pool.shape.page_size)
        # One copy brings everything of a step: tokens take five places each, pages one.
        self._capacity = 8 * (step_tokens + 2 * max_running) + 2 * tables + 64 * max_running + 16384
        self._staging = _pinned_pair(self._capacity)
        self._device_staging = torch.zeros(self._capacity, dtype=torch.int32, device=device)
        self._results = _pinned_pair(max_running + step_tokens)
        self._done: list[Any] = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call, unused-ignore]
        # Three arrays of those that prefill, sends included, and seven numbers of each that draws.
        self._planning = _pinned_pair(3 * (2 * max_running + 8))
        self._columns = _pinned_pair(7 * max_running, torch.float64)
        self._device_columns = torch.empty(7 * max_running, dtype=torch.float64, device=device)
        # Six numbers of each that is adjusted, and as above.
        self._adjusting = _pinned_pair(16 * max_running + 64, torch.float64)
        self._device_adjusting = torch.empty(16 * max_running + 64, dtype=torch.float64, device=device)
        self._values = _pinned_pair((1 + MOST_LOGPROBS) * max_running, torch.float32)
        self._top_ids = _pinned_pair(MOST_LOGPROBS * max_running)
        self._rows = _pinned_pair(max_running, torch.int64)
        self._make_graph_buffers(max_running, tables)
        self._segments = SegmentGraphs(decoder, self._device_staging, self._ids, step_tokens)
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call, unused-ignore]
        shape = pool.shape
        self._layout = Layout(
            model_revision=model.revision,
            dtype=str(shape.dtype).removeprefix("torch."),
            page_size=shape.page_size,
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
        self._graphs: dict[int, _Graph] = {}
        self._sizes = ladder(max_running)
        with torch.inference_mode():
            self._capture(progress)

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def total_pages(self) -> int:
        return self._pool.total_pages - 1

    @property
    def memory(self) -> KvMemory:
        return self._pool.memory

    # --- a step ------------------------------------------------------------------------------------------------------

    def launch(self, plan: StepPlan) -> None:
        """Enqueues a step, and waits for nothing."""
        try:
            self._launch(plan)
        except Exception as error:  # whatever it was, it goes on to the step loop
            self._settle(error)
            raise

    def _settle(self, error: Exception) -> None:
        """What a failed step has enqueued still reads what the next one writes, and writes into pages that are given
        back: it is waited for. Raises `DeviceLost` where that is impossible, as after an illegal access."""
        try:
            self._stream.synchronize()
        except Exception as lost:  # torch has several for a device that is gone
            raise DeviceLost(f"{lost} (after: {error})") from error

    def _launch(self, plan: StepPlan) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for sequence in plan.forgotten:
                self._forget(sequence)
            for start in plan.started:
                self._start(start)
            arrays = step_arrays(plan.slices, self._slots, self._pool.shape.page_size)
            # A token of a prompt may stand alone, and is not always sampled: a graph is for rows that all are.
            if not plan.slices:
                logits = tokens = self._graph_tokens[:0]
            elif len(arrays.source) == arrays.decodes == len(arrays.samples) <= self._sizes[-1]:
                logits, tokens = self._decode(arrays)
            else:
                logits, tokens = self._mixed(arrays)
            self._flights.append(self._sample(plan.step, arrays, logits, tokens))
            # Not before: after a launch that failed, the other half is still the older step's.
            self._parity ^= 1

    def ended(self) -> bool:
        """Whether the oldest launched step has ended."""
        try:
            return not self._flights or bool(self._flights[0].done.query())
        except Exception:  # a device that is gone: whoever collects is told
            return True

    def collect(self) -> StepResult:
        """Waits for the oldest launched step. Raises `InternalError` when there is none."""
        if not self._flights:
            raise InternalError("collect() without a launched step")
        flight = self._flights.popleft()
        try:
            return self._collect(flight)
        except Exception as error:  # as in `launch`
            self._settle(error)
            raise

    def _collect(self, flight: _Flight) -> StepResult:
        flight.done.synchronize()
        sampled = [
            Sampled(sequence, token) if token >= 0 else Sampled(sequence, 0, error=_NOT_FINITE)
            for (sequence, _), token in zip(flight.samples, flight.tokens.tolist(), strict=True)
        ]
        if flight.values is not None and flight.ids is not None:
            for (row, count), values, ids in zip(flight.told, flight.values.tolist(), flight.ids.tolist(), strict=True):
                given = sampled[row]
                if given.error is None:
                    logprobs = TokenLogprobs(values[0], ids[:count], values[1 : 1 + count])
                    sampled[row] = Sampled(given.sequence, given.token, logprobs)
        return StepResult(flight.step, tuple(sampled))

    def close(self) -> None:
        self._flights.clear()
        torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._segments.clear()

    def _start(self, start: SequenceStart) -> None:
        sequence = start.sequence
        if sequence not in self._slots:
            self._slots[sequence] = self._free_slots.pop()
        draws = self._draws
        if not plain(start.sampling):
            draws = self._adjusted_draws
            self._adjustments.start(start)
        if start.sampling.temperature > 0.0:
            draws.start(self._slots[sequence], start.sampling, start.seed)
        if start.sampling.logprobs is not None:
            self._told[sequence] = start.sampling.logprobs

    def _forget(self, sequence: int) -> None:
        slot = self._slots.pop(sequence, None)
        if slot is not None:
            self._free_slots.append(slot)
            self._draws.forget(slot)
            self._adjusted_draws.forget(slot)
        self._adjustments.forget(sequence)
        self._told.pop(sequence, None)

    # --- decodes alone -----------------------------------------------------------------------------------------------

    def _make_graph_buffers(self, most: int, tables: int) -> None:
        """Where graphs read from: fixed places of one buffer, filled by one copy. The pages come behind."""
        names = ("source", "positions", "slots", "indptr")
        self._places = {name: index * (most + 8) for index, name in enumerate(names)}
        self._pages_place = len(names) * (most + 8)
        length = self._pages_place + tables + most * 8
        self._graph_inputs = torch.zeros(length, dtype=torch.int32, device=self._device)
        self._graph_staging = [torch.zeros(length, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._graph_arrays = [each.numpy() for each in self._graph_staging]
        self._graph_tokens = torch.zeros(most, dtype=torch.int32, device=self._device)
        head = self._decoder.weights.head
        # Of all sizes: one step's are read before the next runs.
        self._graph_logits = torch.empty(most, head.shape[0], dtype=head.dtype, device=self._device)

    def _input(self, name: str, size: int) -> Tensor:
        place = self._places[name]
        return self._graph_inputs[place : place + size]

    def _fill(self, arrays: StepArrays, size: int) -> None:
        """Writes the inputs of a graph of `size` rows."""
        staging, places = self._graph_arrays[self._parity], self._places
        count, used = arrays.decodes, len(arrays.decode_pages)
        padding = size - count
        for name, values, pad in (
            ("source", arrays.source, 0),
            ("positions", arrays.positions, 0),
            ("slots", arrays.sampled_slots, self._slot_count - 1),
        ):
            place = places[name]
            staging[place : place + count] = values
            staging[place + count : place + size] = pad
        place = places["indptr"]
        staging[place : place + count + 1] = arrays.decode_indptr
        staging[place + count + 1 : place + size + 1] = used + np.arange(1, padding + 1, dtype=np.int32)
        behind = self._pages_place
        staging[behind : behind + used] = arrays.decode_pages
        staging[behind + used : behind + used + padding] = self._pad_page
        length = behind + used + padding
        self._graph_inputs[:length].copy_(self._graph_staging[self._parity][:length], non_blocking=True)

    def _decode(self, arrays: StepArrays) -> tuple[Tensor, Tensor]:
        size = next(size for size in self._sizes if size >= arrays.decodes)
        self._fill(arrays, size)
        graph = self._graphs[size]
        graph.graph.replay()
        return graph.logits, self._graph_tokens

    def _graph_step(self, size: int) -> Tensor:
        """What a graph of `size` rows does; its logits."""
        attention = StepAttention(
            parts=self._attention,
            positions=self._input("positions", size),
            decodes=size,
            indptr=self._input("indptr", size),
            table=self._graph_inputs[self._pages_place :],
            pages=self._graph_inputs[:0],
            plan=None,
        )
        hidden = self._decoder.forward(self._ids(self._input("source", size)), attention)
        logits = self._decoder.logits(hidden, self._graph_logits[:size])
        best, ids = greedy(logits)
        self._last.index_copy_(0, self._input("slots", size).long(), ids)
        self._graph_tokens[:size] = torch.where(torch.isfinite(best), ids, -1).int()
        return logits

    def _ids(self, source: Tensor) -> Tensor:
        """Token ids int64 of `source`: as they are, or from the slot where the step before put them."""
        known = source >= 0
        return torch.where(known, source.long(), self._last[torch.where(known, 0, -1 - source)])

    def _capture(self, progress: Callable[[int, int], None] | None) -> None:
        """Captures a decode step for every size of the ladder, the largest first: the others share its memory. Then
        what steps with prompts replay."""
        memory = None
        sizes = sorted(self._sizes, reverse=True)
        total = len(sizes) + len(self._segments.sizes)
        # Buffers are made, and filled with zeros, on the stream of whoever makes us.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), _uncollected():
            for done, size in enumerate(sizes):
                self._fill(_pads(size, self._pad_page, self._slot_count - 1), size)
                # Once without a graph: whatever must be compiled or loaded cannot be while capturing.
                self._graph_step(size)
                torch.cuda.synchronize(self._device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=memory, stream=self._stream):
                    logits = self._graph_step(size)
                memory = graph.pool()
                self._graphs[size] = _Graph(graph, logits)
                if progress is not None:
                    progress(done + 1, total)
            self._segments.capture(
                memory, lambda done: None if progress is None else progress(len(sizes) + done, total)
            )
        torch.cuda.synchronize(self._device)

    # --- steps with prompts ------------------------------------------------------------------------------------------

    def _mixed(self, arrays: StepArrays) -> tuple[Tensor, Tensor]:
        tokens = len(arrays.source)
        size = self._segments.size(tokens)
        source = np.zeros(size or tokens, dtype=np.int32)
        source[:tokens] = arrays.source
        staged = self._stage(
            # First: it is where the graphs of segments look for it.
            source,
            arrays.positions,
            arrays.pages,
            arrays.decode_indptr,
            arrays.decode_pages,
            arrays.sampled_rows,
            arrays.sampled_slots,
            arrays.prefill_pages,
        )
        ids, positions, pages, indptr, table, rows, slots, prefill_pages = staged
        plan = partial(self._plan, arrays, prefill_pages) if len(arrays.prefill_last) else None
        attention = StepAttention(self._attention, positions, arrays.decodes, indptr, table, pages, plan)
        if size is None:
            hidden = self._decoder.forward(self._ids(ids), attention, rows.long())
        else:
            hidden = self._segments.forward(tokens, size, attention, rows.long())
        if not len(arrays.sampled_rows):
            return hidden, self._graph_tokens[:0]
        logits = self._decoder.logits(hidden)
        best, ids = greedy(logits)
        self._last.index_copy_(0, slots.long(), ids)
        return logits, torch.where(torch.isfinite(best), ids, -1).int()

    def _plan(self, arrays: StepArrays, pages: Tensor) -> Prefill:
        memory = self._planning[self._parity]
        places, _ = lay(memory.numpy(), (arrays.prefill_tokens, arrays.prefill_indptr, arrays.prefill_last))
        ends, lengths, last = (memory[place] for place in places)
        if arrays.fresh:
            return self._attention.plan_fresh(self._parity, ends)
        return self._attention.plan_paged(self._parity, ends, lengths, pages, last)

    def _stage(self, *arrays: np.ndarray) -> list[Tensor]:
        """The arrays on the GPU, by one copy."""
        staging = self._staging[self._parity]
        places, end = lay(staging.numpy(), arrays)
        self._device_staging[:end].copy_(staging[:end], non_blocking=True)
        return [self._device_staging[place] for place in places]

    # --- sampling ----------------------------------------------------------------------------------------------------

    def _sample(self, step: int, arrays: StepArrays, logits: Tensor, tokens: Tensor) -> _Flight:
        """Replaces the greedy choice where other settings ask for it, and sends the tokens on their way."""
        count = len(arrays.samples)
        result = self._results[self._parity][:count]
        if self._draws:
            columns = self._draws.columns(arrays.sampled_slots, [index for _, index in arrays.samples])
            if columns.size:
                staging = self._columns[self._parity][: columns.size]
                staging.numpy()[:] = columns.reshape(-1)
                on_gpu = self._device_columns[: columns.size]
                on_gpu.copy_(staging, non_blocking=True)
                draw(logits, on_gpu.view(columns.shape), tokens, self._last)
        if self._adjustments:
            self._adjust(arrays, logits, tokens)
        result.copy_(tokens[:count], non_blocking=True)
        done = self._done[self._parity]
        flight = _Flight(step, arrays.samples, result, done)
        if self._told:
            self._tell(flight, logits, tokens)
        done.record(self._stream)
        return flight

    def _adjust(self, arrays: StepArrays, logits: Tensor, tokens: Tensor) -> None:
        """Replaces the choice of rows with penalties, biases or `min_tokens`, some after the other."""
        rows = [row for row, (sequence, _) in enumerate(arrays.samples) if sequence in self._adjustments]
        parts = [rows[begin : begin + ROWS_AT_ONCE] for begin in range(0, len(rows), ROWS_AT_ONCE)]
        columns = []
        for part in parts:
            slots, samples = arrays.sampled_slots[part], [arrays.samples[row] for row in part]
            asked = self._adjustments.columns([sequence for sequence, _ in samples])
            columns.append(np.concatenate((np.array([part, slots], dtype=np.float64), asked)))
            columns.append(self._adjusted_draws.columns(slots, [index for _, index in samples]))
        staging = self._adjusting[self._parity]
        places, end = lay(staging.numpy(), [each.reshape(-1) for each in columns])
        self._device_adjusting[:end].copy_(staging[:end], non_blocking=True)
        sent = [self._device_adjusting[at].view(each.shape) for at, each in zip(places, columns, strict=True)]
        for part, asked_for, drawn in zip(parts, sent[::2], sent[1::2], strict=True):
            here, slots_here = asked_for[:2].long()
            samples = [arrays.samples[row] for row in part]
            adjusted = self._adjustments.adjusted(logits.index_select(0, here), asked_for[2:], samples)
            best, ids = greedy(adjusted)
            chosen = torch.where(torch.isfinite(best), ids, -1).int()
            self._last.index_copy_(0, slots_here, ids)
            if drawn.numel():
                draw(adjusted, drawn, chosen, self._last)
            tokens.index_copy_(0, here, chosen)
            self._adjustments.count(asked_for[2:], chosen)

    def _tell(self, flight: _Flight, logits: Tensor, tokens: Tensor) -> None:
        """Sends log probabilities on their way, of the rows that are told with them."""
        told = self._told
        flight.told = [(row, told[sequence]) for row, (sequence, _) in enumerate(flight.samples) if sequence in told]
        if not flight.told:
            return
        count = len(flight.told)
        rows = self._rows[self._parity][:count]
        rows.numpy()[:] = [row for row, _ in flight.told]
        most = min(max(wanted for _, wanted in flight.told), logits.shape[1])
        values, ids = log_probabilities(logits, tokens, rows.to(self._device, non_blocking=True), most)
        flight.values = self._values[self._parity][: values.numel()].view(values.shape)
        flight.ids = self._top_ids[self._parity][: ids.numel()].view(ids.shape)
        flight.values.copy_(values, non_blocking=True)
        flight.ids.copy_(ids, non_blocking=True)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: what it frees while a capture is under way would become a part of that."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def adjusted_room(max_running: int) -> int:
    """Sequences with penalties that there is room for: those that run, and those that ended in a step in flight."""
    return 2 * max_running


def _pads(size: int, page: int, slot: int) -> StepArrays:
    """A step of rows that only pad."""
    empty, zeros = np.empty(0, dtype=np.int32), np.zeros(size, dtype=np.int32)
    return StepArrays(
        source=zeros,
        positions=zeros,
        pages=empty,
        decodes=size,
        decode_indptr=np.arange(size + 1, dtype=np.int32),
        decode_pages=np.full(size, page, dtype=np.int32),
        prefill_tokens=empty,
        prefill_indptr=empty,
        prefill_last=empty,
        prefill_pages=empty,
        fresh=True,
        sampled_rows=zeros,
        sampled_slots=np.full(size, slot, dtype=np.int32),
        samples=[],
    )


def _pinned_pair(size: int, dtype: torch.dtype = torch.int32) -> list[Tensor]:
    """What the CPU writes or reads, for the one step in flight and for the other."""
    return [torch.empty(size, dtype=dtype, pin_memory=True) for _ in range(2)]
