"""The executor in plain torch: runs on any machine, and is the reference for every other executor.

A step's slices are computed in one pass of the decoder; only attention looks at them one by one. Decodes attend as one
padded batch, prefill chunks one at a time. Keys and values are written and gathered by row number, with the pool seen
as rows of head_dim (one token, one head, one layer) or of page_size * head_dim (one page of those).
"""

from __future__ import annotations

import gc
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from microserve.engine.limits import sizes
from microserve.engine.model.checkpoint import dummy_weights, load_weights, revision
from microserve.engine.model.config import DecoderConfig, read_config
from microserve.engine.model.decoder import Decoder
from microserve.engine.model.kernels import TorchKernels, cpu_kernels, rotate
from microserve.engine.plan import StepPlan, StepResult
from microserve.engine.progress import Progress
from microserve.engine.sampler import Sampler
from microserve.kv.pool import PagePool, PageShape
from microserve.runtime.errors import ConfigError, InternalError
from microserve.runtime.messages import Layout, ModelInfo
from microserve.runtime.models import resolve_model
from microserve.runtime.settings import parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from microserve.engine.plan import Slice
    from microserve.kv.transfer.base import KvMemory
    from microserve.runtime.settings import EngineConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchExecutor:
    """Implements `Executor` on the CPU, or slowly on a GPU. One step at a time: `collect` computes it."""

    depth = 1

    def __init__(self, decoder: Decoder, pool: PagePool, model: ModelInfo, *, threads: int | None = None) -> None:
        self._decoder = decoder
        self._pool = pool
        self._model = model
        self._sampler = Sampler(decoder.config.vocab_size)
        self._plans: deque[StepPlan] = deque()
        self._threads = threads
        self._device = pool.tensor.device
        shape = pool.shape
        self._layout = Layout(
            model_revision=model.revision,
            dtype=str(shape.dtype).removeprefix("torch."),
            page_size=shape.page_size,
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def total_pages(self) -> int:
        return self._pool.total_pages

    @property
    def memory(self) -> KvMemory:
        return self._pool.memory

    def launch(self, plan: StepPlan) -> None:
        """Takes the step; it is computed when it is collected."""
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # per calling thread, so set where the steps run
        self._plans.append(plan)

    def ended(self) -> bool:
        """There is nothing to wait for: whoever collects computes."""
        return True

    def collect(self) -> StepResult:
        """Computes the oldest launched step. Raises `InternalError` when there is none."""
        if not self._plans:
            raise InternalError("collect() without a launched step")
        plan = self._plans.popleft()
        for sequence in plan.forgotten:
            self._sampler.forget(sequence)
        for start in plan.started:
            self._sampler.start(start)
        if not plan.slices:
            return StepResult(plan.step, ())
        with torch.inference_mode():
            logits, rows = self._compute(plan.slices)
            if not rows:
                return StepResult(plan.step, ())
            return StepResult(plan.step, tuple(self._sampler.sample(logits, rows)))

    def close(self) -> None:
        self._plans.clear()

    def _compute(self, slices: Sequence[Slice]) -> tuple[Tensor, list[tuple[int, int]]]:
        parts = []
        for part in slices:
            if part.tokens is None:
                raise InternalError("a step of this executor needs every token: its depth is 1")
            parts.append(part.tokens)
        attention = _PagedAttention(self._pool, slices, self._decoder)
        tokens = torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(self._device)
        ends = np.cumsum([part.length for part in slices]) - 1
        sampled = [i for i, part in enumerate(slices) if part.sample]
        rows = [(slices[i].sequence, slices[i].output_index) for i in sampled]
        # Where every token is sampled, which is a step of decodes, there is nothing to choose.
        chosen = None if len(rows) == len(tokens) else torch.from_numpy(ends[sampled]).to(self._device)
        hidden = self._decoder.forward(tokens, attention, chosen)
        if not rows:
            return hidden, rows
        return self._decoder.logits(hidden).float().cpu(), rows


class _PagedAttention:
    """Attention of one step: where each new token's KV goes, and which pages each slice reads."""

    def __init__(self, pool: PagePool, slices: Sequence[Slice], decoder: Decoder) -> None:
        shape, window = pool.shape, decoder.config.sliding_window
        self._shape = shape
        self._device = pool.tensor.device
        self._heads = decoder.config.heads
        self._window = window
        self._token_rows = pool.tensor.view(-1, shape.head_dim)
        self._page_rows = pool.tensor.view(-1, shape.page_size * shape.head_dim)
        starts = np.array([part.start for part in slices], dtype=np.int64)
        lengths = np.array([part.length for part in slices], dtype=np.int64)
        first = np.cumsum(lengths) - lengths
        self._clear_begun(pool, slices, starts, starts + lengths)
        positions = np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(first - starts, lengths)
        pages = np.concatenate(
            [
                np.repeat(part.pages, shape.page_size)[part.start : part.start + part.length]
                if part.length > 1
                else part.pages[part.start // shape.page_size : part.start // shape.page_size + 1]
                for part in slices
            ]
        ).astype(np.int64)
        where = self.to_device(positions)
        self._cos, self._sin = decoder.cos[where], decoder.sin[where]
        self._write_rows = self._rows_of_tokens(pages, positions % shape.page_size)
        decodes = [i for i, part in enumerate(slices) if part.length == 1]
        self._decodes = _DecodeBatch(self, slices, decodes, first) if decodes else None
        self._chunks = [_Chunk(self, part, int(first[i]), window) for i, part in enumerate(slices) if part.length > 1]

    @staticmethod
    def _clear_begun(pool: PagePool, slices: Sequence[Slice], starts: np.ndarray, ends: np.ndarray) -> None:
        """Zeroes each page that a slice begins and does not fill.

        Attention reads whole pages and masks what is past the end; but a masked NaN still spoils the sum, and the
        page's last owner may have left one. So a sequence reads only what it wrote itself, and zeros.
        """
        page_size = pool.shape.page_size
        last = (ends - 1) // page_size
        begun = np.flatnonzero((last * page_size >= starts) & (ends % page_size != 0)).tolist()
        if begun:
            pages = [int(slices[i].pages[last[i]]) for i in begun]
            pool.tensor.index_fill_(0, torch.tensor(pages, device=pool.tensor.device), 0.0)

    def to_device(self, array: np.ndarray) -> Tensor:
        """The array where the pool is."""
        return torch.from_numpy(array).to(self._device)

    def _rows_of_tokens(self, pages: np.ndarray, offsets: np.ndarray) -> Tensor:
        """Row numbers int64 [tokens * kv_heads] of layer 0's keys; a layer adds 2 * page_size, values one page_size."""
        shape = self._shape
        heads = pages[:, None] * shape.kv_heads + np.arange(shape.kv_heads)
        rows = heads * (shape.layers * 2 * shape.page_size) + offsets[:, None]
        return self.to_device(rows.reshape(-1))

    def rows_of_pages(self, pages: np.ndarray) -> Tensor:
        """Row numbers int64 [..., kv_heads, pages] of layer 0's keys in `pages`; a layer adds 2, values 1."""
        shape = self._shape
        heads = pages[..., None, :] * shape.kv_heads + np.arange(shape.kv_heads)[:, None]
        return self.to_device(heads * (shape.layers * 2))

    def gather(self, rows: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, kv_heads, pages * page_size, head_dim] of `rows` [batch, kv_heads, pages]."""
        batch, heads, pages = rows.shape
        size = (batch, heads, pages * self._shape.page_size, self._shape.head_dim)
        flat = rows.reshape(-1) + 2 * layer
        return self._page_rows.index_select(0, flat).view(size), self._page_rows.index_select(0, flat + 1).view(size)

    def attend(self, layer: int, turning: Tensor, value: Tensor) -> Tensor:
        """See `Attention.attend`."""
        shape = self._shape
        turned = rotate(turning, self._cos, self._sin)
        query, key = turned[:, : self._heads], turned[:, self._heads :]
        rows = self._write_rows + 2 * layer * shape.page_size
        self._token_rows.index_copy_(0, rows, key.reshape(-1, shape.head_dim))
        self._token_rows.index_copy_(0, rows + shape.page_size, value.reshape(-1, shape.head_dim))
        if self._decodes is not None and not self._chunks:
            return self._decodes.attend(layer, query)
        result = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        if self._decodes is not None:
            result[self._decodes.tokens] = self._decodes.attend(layer, query[self._decodes.tokens])
        for chunk in self._chunks:
            result[chunk.begin : chunk.end] = chunk.attend(layer, query[chunk.begin : chunk.end])
        return result


class _DecodeBatch:
    """Every slice of one token, as one batch padded to the longest."""

    def __init__(self, step: _PagedAttention, slices: Sequence[Slice], chosen: list[int], first: np.ndarray) -> None:
        self._step = step
        self.tokens = step.to_device(first[chosen])
        page_size = step._shape.page_size
        lengths = np.array([slices[i].start + 1 for i in chosen], dtype=np.int64)
        widest = int(-(-lengths.max() // page_size))
        table = np.empty((len(chosen), widest), dtype=np.int64)
        for row, i in enumerate(chosen):
            used = int(-(-lengths[row] // page_size))
            table[row, :used] = slices[i].pages[:used]
            table[row, used:] = slices[i].pages[used - 1]  # padding: its own page, for no other's numbers are safe
        self._rows = step.rows_of_pages(table)
        places = step.to_device(np.arange(widest * page_size))
        limits = step.to_device(lengths).unsqueeze(1)
        visible = places < limits
        if step._window is not None:
            visible &= places >= limits - step._window
        self._mask = None if bool(visible.all()) else visible[:, None, None, :]

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """[decodes, heads * head_dim]. Heads that share KV stand as rows of one query, so nothing is repeated."""
        count, heads, head_dim = query.shape
        key, value = self._step.gather(self._rows, layer)
        kv_heads = key.shape[1]
        grouped = query.reshape(count, kv_heads, heads // kv_heads, head_dim)
        attended = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=self._mask)
        return attended.reshape(count, heads * head_dim)


class _Chunk:
    """A slice of several tokens: part of a prompt."""

    def __init__(self, step: _PagedAttention, part: Slice, begin: int, window: int | None) -> None:
        self._step = step
        self.begin, self.end = begin, begin + part.length
        self._length = part.start + part.length
        used = -(-self._length // step._shape.page_size)
        self._rows = step.rows_of_pages(part.pages[None, :used].astype(np.int64))
        # Without a past and without a window, plain causal attention needs no mask.
        self._causal = part.start == 0 and (window is None or window >= self._length)
        self._mask: Tensor | None = None
        if not self._causal:
            queries = step.to_device(np.arange(part.start, self._length)).unsqueeze(1)
            keys = step.to_device(np.arange(self._length)).unsqueeze(0)
            self._mask = keys <= queries
            if window is not None:
                self._mask &= keys > queries - window

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """[tokens, heads * head_dim]."""
        key, value = self._step.gather(self._rows, layer)
        group = query.shape[1] // key.shape[1]
        key, value = (side[:, :, : self._length].repeat_interleave(group, dim=1) for side in (key, value))
        attended = functional.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0), key, value, attn_mask=self._mask, is_causal=self._causal
        )
        return attended[0].transpose(0, 1).reshape(query.shape[0], -1)


def open_torch_executor(config: EngineConfig, progress: Progress | None = None) -> TorchExecutor:
    """Loads the checkpoint that `config` names and makes a pool of the size it asks for.

    `progress` is told how far it is. Raises `CheckpointError` and `ConfigError`.
    """
    progress = progress if progress is not None else Progress()
    folder = resolve_model(config.model)
    model = read_config(folder)
    device = torch.device("cpu" if config.device == "auto" else config.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {config.device!r}: torch finds no GPU on this machine")
    dtype = _DTYPES["float32" if config.dtype == "auto" else config.dtype]
    max_context = min(config.max_context or model.max_context, model.max_context)
    threads = config.threads
    if threads is not None:
        torch.set_num_threads(threads)
    shape = PageShape(model.kv_heads, model.layers, config.page_size, model.head_dim, dtype)
    pages = config.kv_pages or shape.pages_in(parse_size(config.kv_memory))
    if pages < 1:
        raise ConfigError(f"kv_memory {config.kv_memory} holds no page of {shape.page_bytes} bytes")
    # More pages than every request at its longest could use would only be zeroed memory.
    if config.kv_pages is None:
        pages = min(pages, 2 * sizes(config).max_running * -(-max_context // config.page_size))
    kernels = cpu_kernels(dtype) if device.type == "cpu" else TorchKernels()
    with progress.stage("loading weights") as report:
        if config.dummy_weights:
            weights = dummy_weights(model, dtype=dtype, device=device, pack=kernels.pack, progress=report)
        else:
            weights = load_weights(folder, model, dtype=dtype, device=device, pack=kernels.pack, progress=report)
    decoder = Decoder(model, weights, kernels, max_context=max_context)
    name = config.model_name or Path(folder).name
    info = describe(model, folder, name=name, max_context=max_context, dummy=config.dummy_weights)
    executor = TorchExecutor(decoder, PagePool(pages, shape, device=device), info, threads=threads)
    gc.collect()
    return executor


def describe(model: DecoderConfig, folder: Path, *, name: str, max_context: int, dummy: bool = False) -> ModelInfo:
    """The `ModelInfo` that an engine announces. `dummy`: its weights are made up, and not read from `folder`."""
    return ModelInfo(
        name=name,
        revision=revision(folder, dummy=dummy),
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_context=max_context,
        eos_token_ids=model.eos_token_ids,
        path=str(folder),
    )
