"""Opens the GPU executor: weights, a pool of what memory is left after the worst step, captured graphs."""

from __future__ import annotations

import gc
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from microserve.engine.limits import sizes
from microserve.engine.model.checkpoint import dummy_weights, load_weights
from microserve.engine.model.config import read_config
from microserve.engine.model.decoder import Decoder
from microserve.engine.progress import Progress
from microserve.engine.torch_executor import describe
from microserve.kv.pool import PagePool, PageShape
from microserve.runtime.errors import ConfigError
from microserve.runtime.log import get_logger
from microserve.runtime.models import resolve_model
from microserve.runtime.settings import DEFAULT_KV_MEMORY, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from microserve.engine.cuda_executor import CudaExecutor
    from microserve.runtime.settings import EngineConfig

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SPARE = 1 << 30
"""Bytes left for what the profile does not see: graphs, libraries, transfers."""
_FEWEST_PAGES = 16

_COMPILING = 1800.0
"""Seconds that compiling one kernel may take, on a machine that is busy."""

_log = get_logger(__name__)


def cuda_device(name: str) -> torch.device | None:
    """The GPU that `device` names; None when it names none, or "auto" finds none."""
    if name == "auto":
        return torch.device("cuda:0") if torch.cuda.is_available() else None
    if not name.startswith("cuda"):
        return None
    device = torch.device(name if ":" in name else f"{name}:0")
    count = torch.cuda.device_count()
    if device.index is None or device.index >= count:
        raise ConfigError(f"device {name!r}: this machine has {count} GPUs that torch can use")
    return device


def gpu_bytes(device: torch.device) -> int:
    """Memory of the GPU in all."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def open_cuda_executor(config: EngineConfig, device: torch.device, progress: Progress | None = None) -> CudaExecutor:
    """Loads the checkpoint that `config` names onto `device`.

    `progress` is told how far it is. Raises `CheckpointError` and `ConfigError`.
    """
    progress = progress if progress is not None else Progress()
    # Left to itself, the torch executor takes the CPU.
    plain = f"--executor torch --device {device}"
    if find_spec("flashinfer") is None:
        raise ConfigError(
            f"executor cuda needs FlashInfer: pip install 'microserve[cuda]'; or say {plain}, "
            "which serves on this GPU without it, slowly"
        )
    began = time.monotonic()
    folder = Path(resolve_model(config.model))
    model = read_config(folder)
    if config.dtype == "float32":
        raise ConfigError("dtype float32: the cuda executor computes in bfloat16 or float16")
    if model.head_dim % 64:
        raise ConfigError(
            f"head_dim {model.head_dim}: FlashInfer's attention takes multiples of 64; say {plain}, which "
            "serves on this GPU without it, slowly"
        )
    own = model.dtype if model.dtype in _DTYPES else "bfloat16"
    dtype = _DTYPES[own if config.dtype == "auto" else config.dtype]
    max_context = min(config.max_context or model.max_context, model.max_context)
    torch.cuda.set_device(device)
    with progress.stage("loading weights") as report:
        if config.dummy_weights:
            weights = dummy_weights(model, dtype=dtype, device=device, progress=report)
        else:
            weights = load_weights(folder, model, dtype=dtype, device=device, progress=report)
    loaded = time.monotonic()
    max_running, step_tokens = sizes(config, gpu_bytes(device))
    # FlashInfer and Triton are looked for only here: their kernels may have to be compiled first.
    from microserve.engine.cuda_adjust import Adjustments
    from microserve.engine.cuda_executor import CudaExecutor, adjusted_room
    from microserve.engine.cuda_inputs import table_room
    from microserve.engine.cuda_profile import worst_step_bytes
    from microserve.engine.model.cuda_kernels import CudaKernels

    shape = PageShape(model.kv_heads, model.layers, config.page_size, model.head_dim, dtype)
    with first_step(progress):
        decoder = Decoder(model, weights, CudaKernels(dtype, device), max_context=max_context)
        peak = worst_step_bytes(decoder, shape, device, step_tokens, max_running)
    profiled = time.monotonic()
    # Made later: what graphs leave their logits in, what is counted for penalties, and three page tables of int32.
    peak += max_running * model.vocab_size * dtype.itemsize
    peak += Adjustments.bytes_of(adjusted_room(max_running), model.vocab_size)
    peak += 3 * 4 * table_room(max_running, max_context, config.page_size)
    pages = _pool_pages(config, shape, device, peak, max_context)
    pool = PagePool(pages, shape, device=device)
    info = describe(
        model,
        folder,
        name=config.model_name or folder.name,
        max_context=max_context,
        dummy=config.dummy_weights,
    )
    with compiling_stage(progress, "capturing graphs") as report:
        executor = CudaExecutor(decoder, pool, info, max_running=max_running, step_tokens=step_tokens, progress=report)
    _log.info(
        "gpu ready",
        device=str(device),
        pages=pages - 1,
        kv_gib=round(pool.nbytes / 2**30, 1),
        worst_step_gib=round(peak / 2**30, 2),
        free_gib=round(torch.cuda.mem_get_info(device)[0] / 2**30, 1),
        load_s=round(loaded - began, 2),
        profile_s=round(profiled - loaded, 2),
        capture_s=round(time.monotonic() - profiled, 2),
    )
    gc.collect()
    return executor


def first_step(progress: Progress) -> AbstractContextManager[object]:
    """The stage of the first step, in which FlashInfer compiles."""
    if not _flashinfer_modules():
        _log.info("kernels are not compiled yet: the first start takes minutes", folder=str(kernel_folder()))
    return compiling_stage(progress, "measuring the worst step")


def compiling_stage(progress: Progress, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A stage in which FlashInfer and Triton compile what no start before has left: that is told as soon as it is
    seen."""
    before = compiled_kernels()
    return progress.stage(
        what,
        patience=_COMPILING,
        probe=lambda: compiled_kernels() - before,
        probed="compiling kernels, which the first start does",
    )


def kernel_folder() -> Path:
    """Where FlashInfer keeps what it has compiled for this machine."""
    from flashinfer.jit import env

    return Path(env.FLASHINFER_JIT_DIR)


def compiled_kernels() -> int:
    """How many modules of FlashInfer's and kernels of Triton's are compiled already."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    return _flashinfer_modules() + sum(1 for _ in triton.glob("*/*.cubin"))


def _flashinfer_modules() -> int:
    """Compiled here, or before they were packaged."""
    from flashinfer.jit import env

    folders = (kernel_folder(), Path(env.FLASHINFER_AOT_DIR))
    return sum(1 for folder in folders for _ in folder.glob("*/*.so"))


def _pool_pages(config: EngineConfig, shape: PageShape, device: torch.device, peak: int, max_context: int) -> int:
    """Pages of the pool, the one for padding included."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    if config.kv_pages is not None:
        needed = shape.page_bytes * (config.kv_pages + 1) + peak + _SPARE
        if needed > free:
            raise ConfigError(
                f"kv_pages {config.kv_pages}: with what the worst step and libraries need, {needed / 2**30:.1f} GiB; "
                f"{device} has {free / 2**30:.1f} GiB free"
            )
        return config.kv_pages + 1
    room = int(total * config.gpu_memory) - (total - free) - peak - _SPARE
    if config.kv_memory != DEFAULT_KV_MEMORY:
        given = parse_size(config.kv_memory)
        if given < room and shape.pages_in(given) < _FEWEST_PAGES:
            raise ConfigError(
                f"kv_memory {config.kv_memory}: a page takes {shape.page_bytes / 2**20:.2g} MiB, and a pool needs "
                f"{_FEWEST_PAGES} of them"
            )
        room = min(room, given)
    pages = shape.pages_in(max(0, room))
    least = -(-max_context // config.page_size)
    if pages < _FEWEST_PAGES:
        raise ConfigError(
            f"{device} has {free / 2**30:.1f} GiB free; the worst step needs {peak / 2**30:.1f} and no page is left: "
            "lower step_tokens or max_running, or raise gpu_memory"
        )
    if pages < least:
        _log.warning("the pool is smaller than one request at its longest", pages=pages, longest=least)
    return pages
