"""What is refused before a GPU is touched."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch

from microserve.engine import cuda_open
from microserve.engine.cuda_segments import segment_sizes
from microserve.engine.model.random_checkpoint import write_random_checkpoint
from microserve.kv.pool import PageShape
from microserve.runtime.config import EngineConfig
from microserve.runtime.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def test_without_flashinfer_the_error_says_what_to_install_and_what_serves_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_open, "find_spec", lambda name: None if name == "flashinfer" else find_spec(name))
    config = EngineConfig(model=str(tmp_path), executor="cuda")
    with pytest.raises(ConfigError) as refused:
        cuda_open.open_cuda_executor(config, torch.device("cuda:0"))
    assert str(refused.value) == (
        "executor cuda needs FlashInfer: pip install 'microserve[cuda]'; or say --executor torch --device cuda:0, "
        "which serves on this GPU without it, slowly"
    )


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cuda_open.cuda_device("cuda:1") == torch.device("cuda:1")
    assert cuda_open.cuda_device("cuda") == torch.device("cuda:0")
    assert cuda_open.cuda_device("cpu") is None
    with pytest.raises(ConfigError, match="device 'cuda:2': this machine has 2 GPUs that torch can use"):
        cuda_open.cuda_device("cuda:2")


def test_a_pool_that_does_not_fit_is_refused_and_one_that_fits_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 16 << 30))
    shape = PageShape(8, 32, 16, 128, torch.bfloat16)
    assert shape.page_bytes == 2 << 20
    device = torch.device("cuda:0")
    fits = 3 * 512 - 1  # and the one for padding: 3 GiB beside 6 of the worst step and one to spare
    config = EngineConfig(model="m", kv_pages=fits)
    assert cuda_open._pool_pages(config, shape, device, 6 << 30, 1000) == fits + 1
    config = EngineConfig(model="m", kv_pages=fits + 1)
    with pytest.raises(ConfigError, match=r"kv_pages 1536: .*10\.0 GiB; cuda:0 has 10\.0 GiB free"):
        cuda_open._pool_pages(config, shape, device, 6 << 30, 1000)


def test_a_head_size_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_open, "find_spec", lambda name: object())
    folder = write_random_checkpoint(tmp_path / "m", arch="llama", hidden_size=160, head_dim=80, num_attention_heads=2)
    config = EngineConfig(model=str(folder), executor="cuda")
    with pytest.raises(
        ConfigError,
        match="head_dim 80: FlashInfer's attention takes multiples of 64; say --executor torch --device cuda:0,",
    ):
        cuda_open.open_cuda_executor(config, torch.device("cuda:0"))


def test_a_pool_of_too_few_pages_names_what_made_it_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 16 << 30))
    shape, device = PageShape(8, 32, 16, 128, torch.bfloat16), torch.device("cuda:0")
    small = EngineConfig(model="m", kv_memory="31MiB", gpu_memory=0.9)
    with pytest.raises(ConfigError, match="kv_memory 31MiB: a page takes 2 MiB, and a pool needs 16 of them"):
        cuda_open._pool_pages(small, shape, device, 1 << 30, 1000)
    with pytest.raises(ConfigError, match="lower step_tokens or max_running"):
        cuda_open._pool_pages(small, shape, device, 9 << 30, 1000)
    enough = EngineConfig(model="m", kv_memory="32MiB", gpu_memory=0.9)
    assert cuda_open._pool_pages(enough, shape, device, 1 << 30, 1000) == 16


def test_graphs_of_steps_with_prompts_are_captured_for_no_more_tokens_than_a_step_has() -> None:
    assert segment_sizes(8192)[-1] == 768
    assert segment_sizes(200) == (16, 32, 64, 96, 128, 192)
    assert segment_sizes(1) == (16,)
