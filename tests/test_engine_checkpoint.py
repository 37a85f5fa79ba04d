"""Checkpoints: what does not fit is refused with the file and the reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from microserve.engine.model.checkpoint import dummy_weights, load_weights, revision
from microserve.engine.model.config import read_config
from microserve.engine.model.random_checkpoint import write_random_checkpoint
from microserve.engine.plan import Sampled, SequenceStart, Slice, StepPlan
from microserve.engine.torch_executor import open_torch_executor
from microserve.runtime.config import EngineConfig
from microserve.runtime.errors import CheckpointError, ConfigError
from microserve.runtime.messages import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "model", arch="llama")


def load(folder: Path) -> None:
    load_weights(folder, read_config(folder), dtype=torch.float32)


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_one_file_and_shards_load_the_same(tmp_path: Path) -> None:
    one = write_random_checkpoint(tmp_path / "one", arch="qwen2")
    many = write_random_checkpoint(tmp_path / "many", arch="qwen2", shard=True)
    assert len(list(many.glob("*.safetensors"))) == 3
    left, right = (load_weights(f, read_config(f), dtype=torch.float32) for f in (one, many))
    assert torch.equal(left.layers[1].qkv, right.layers[1].qkv)
    assert left.layers[1].qkv_bias is not None
    assert right.layers[1].qkv_bias is not None
    assert torch.equal(left.layers[1].qkv_bias, right.layers[1].qkv_bias)


def test_merged_matrices_hold_the_parts_in_order(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    weights = load_weights(folder, read_config(folder), dtype=torch.float32)
    at = "model.layers.0."
    parts = [tensors[f"{at}self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(weights.layers[0].qkv, torch.cat(parts))
    parts = [tensors[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(weights.layers[0].gate_up, torch.cat(parts))
    assert not torch.equal(weights.head, weights.embedding)


def test_progress_counts_every_tensor(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_weights(folder, read_config(folder), dtype=torch.float32, progress=lambda *at: seen.append(at))
    assert seen == [(i, 21) for i in range(1, 22)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported"),
        ({"architectures": []}, "None is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers: 'two' is not a positive whole number"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
        ({"head_dim": 15}, "odd"),
        ({"eos_token_id": "end"}, "eos_token_id"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    (folder / "generation_config.json").unlink()
    set_config(folder, **changes)
    with pytest.raises(CheckpointError, match=r"(config\.json|model)") as caught:
        load(folder)
    assert said in caught.value.message


def test_both_spellings_of_rotary_settings_mean_the_same(folder: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    set_config(folder, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    old = read_config(folder).inverse_frequencies()
    set_config(
        folder, rope_theta=1.0, rope_scaling=None, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}
    )
    assert read_config(folder).inverse_frequencies() == old


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "'model.layers.1.mlp.up_proj.weight' is missing"),
        (lambda t: t.pop("lm_head.weight"), "'lm_head.weight' is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), r"shape \(65,\), but config.json asks for \(64,\)"),
        (lambda t: t.update({"model.layers.0.extra": torch.ones(1)}), "no place in this architecture"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "dtype I8: quantised"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], said: str
) -> None:
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_a_truncated_file_and_missing_files_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not safetensors"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load(folder)


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", shard=True)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not there: model-1\.safetensors"):
        load(folder)


def test_the_revision_changes_with_config_and_with_weights(folder: Path) -> None:
    first = revision(folder)
    assert revision(folder) == first
    change_tensors(folder, lambda t: t["model.norm.weight"].add_(1.0))
    second = revision(folder)
    assert second != first
    set_config(folder, rope_theta=1.0)
    assert revision(folder) not in (first, second)


def test_the_executor_refuses_a_pool_without_a_page_and_a_device_it_has_not(folder: Path) -> None:
    with pytest.raises(ConfigError, match="holds no page"):
        open_torch_executor(EngineConfig(model=str(folder), kv_memory="1K"))
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        open_torch_executor(EngineConfig(model=str(folder), device="cuda:99"))


def test_weights_that_are_made_up_are_the_same_in_every_engine(folder: Path) -> None:
    """As engines that send each other KV need them, whatever else their processes drew."""
    config = read_config(folder)
    one, _, two = (
        dummy_weights(config, dtype=torch.bfloat16),
        torch.randn(3),
        dummy_weights(config, dtype=torch.bfloat16),
    )
    assert torch.equal(one.head, two.head)
    assert torch.equal(one.layers[-1].down, two.layers[-1].down)
    assert not torch.equal(one.layers[0].down, one.layers[1].down)


def first_token(folder: Path) -> Sampled:
    """What an executor that makes up its weights says to a prompt of eleven tokens."""
    executor = open_torch_executor(EngineConfig(model=str(folder), dummy_weights=True, kv_pages=4, page_size=4))
    sampling = SamplingParams(temperature=0.0, logprobs=20)
    start = SequenceStart(1, np.empty(0, dtype=np.int32), 0, sampling, 7, executor.model.eos_token_ids)
    part = Slice(1, np.arange(11, dtype=np.int32), 0, np.array([2, 0, 3], dtype=np.int32), True, 0)
    executor.launch(StepPlan(1, (part,), (start,), ()))
    (sampled,) = executor.collect().sampled
    executor.close()
    return sampled


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_every_architecture_serves_from_its_config_alone(tmp_path: Path, arch: str, changes: dict[str, Any]) -> None:
    whole = write_random_checkpoint(tmp_path / "whole", arch=arch, **changes)
    folder = tmp_path / "config"
    folder.mkdir()
    (whole / "config.json").rename(folder / "config.json")
    one, two = first_token(folder), first_token(folder)
    assert one.error is None
    assert one.logprobs is not None
    assert one.token == one.logprobs.top_ids[0]
    assert np.isfinite(one.logprobs.top_logprobs).all()
    assert one == two, "they are not the same in every engine"
