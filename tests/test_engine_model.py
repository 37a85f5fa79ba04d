"""The model's description and program: read as `transformers` reads it, computed as it computes it."""

from __future__ import annotations

import json
import runpy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from microserve.engine.model.checkpoint import load_weights
from microserve.engine.model.config import ARCHITECTURES, read_config
from microserve.engine.model.decoder import Decoder
from microserve.engine.model.kernels import Kernels, PackedKernels, TorchKernels, cpu_kernels, rotate
from microserve.engine.model.random_checkpoint import write_random_checkpoint
from microserve.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_config(folder: Path, raw: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_config_of_nothing_but_defaults_means_what_transformers_takes_it_for(tmp_path: Path, name: str) -> None:
    import transformers

    theirs = getattr(transformers, name.removesuffix("ForCausalLM") + "Config")()
    ours = read_config(
        write_config(
            tmp_path,
            {
                "architectures": [name],
                "vocab_size": theirs.vocab_size,
                "hidden_size": theirs.hidden_size,
                "intermediate_size": theirs.intermediate_size,
                "num_hidden_layers": theirs.num_hidden_layers,
                "num_attention_heads": theirs.num_attention_heads,
                "max_position_embeddings": theirs.max_position_embeddings,
            },
        )
    )
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_config_that_transformers_saves_is_read_in_full(tmp_path: Path, name: str) -> None:
    import transformers

    theirs = getattr(transformers, name.removesuffix("ForCausalLM") + "Config")(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=20,
        rms_norm_eps=1e-5,
        max_position_embeddings=777,
        tie_word_embeddings=True,
        rope_parameters={**LLAMA3, "rope_theta": 500000.0},
        eos_token_id=[7, 9],
        architectures=[name],
        **({"sliding_window": 40} if name == "MistralForCausalLM" else {}),
    )
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    assert ours.architecture == theirs.model_type
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.layers) == (300, 96, 160, 3)
    assert (ours.heads, ours.kv_heads, ours.group, ours.head_dim) == (6, 3, 2, 20)
    assert (ours.norm_eps, ours.max_context, ours.tied_embeddings) == (1e-5, 777, True)
    assert ours.sliding_window == (40 if name == "MistralForCausalLM" else None)
    assert ours.eos_token_ids == (7, 9)
    assert ours.qkv_bias == (name == "Qwen2ForCausalLM")
    assert ours.qk_norm == (name == "Qwen3ForCausalLM")
    assert (ours.output_bias, ours.mlp_bias) == (False, False)
    inverse, scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    assert scale == 1.0
    torch.testing.assert_close(torch.tensor(ours.inverse_frequencies()), inverse, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arch", "changes", "said"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "a window in some layers only"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "a window in some layers only"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "not one set of settings"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": -2.0}},
            "-2.0, not a positive number, as 'factor'",
        ),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "is not below high_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "on a part of each head"),
        ("llama", {"rms_norm_eps": 0}, "not a positive number"),
        ("mistral", {"sliding_window": 0}, "sliding_window: 0 is not a positive whole number"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(
    tmp_path: Path, arch: str, changes: dict[str, Any], said: str
) -> None:
    folder = write_random_checkpoint(tmp_path, arch=arch)
    raw = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        read_config(write_config(folder, {**raw, **changes}))
    assert said in caught.value.message


def test_a_window_that_is_not_used_is_none(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, arch="qwen2", sliding_window=64, use_sliding_window=False)
    assert read_config(folder).sliding_window is None
    folder = write_random_checkpoint(tmp_path, arch="mistral")
    raw = json.loads((folder / "config.json").read_text())
    assert read_config(write_config(folder, {**raw, "sliding_window": None})).sliding_window is None


_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(allow_nan=True),
    st.text(max_size=3),
    st.just([]),
    st.just([[]]),
    st.just({}),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), st.sampled_from(["linear", 1, None])
    ),
)
_KEYS = [
    "architectures",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "sliding_window",
    "layer_types",
    "use_sliding_window",
    "partial_rotary_factor",
    "vocab_size",
    "eos_token_id",
    "tie_word_embeddings",
    "quantization_config",
    "max_position_embeddings",
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arch=st.sampled_from(sorted(ARCHITECTURES)), changes=st.dictionaries(st.sampled_from(_KEYS), _ODD, max_size=3))
def test_whatever_a_config_says_it_is_read_or_refused(tmp_path: Path, arch: str, changes: dict[str, Any]) -> None:
    raw = {
        "architectures": [arch],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    write_config(tmp_path, {**raw, **changes})
    try:
        config = read_config(tmp_path)
    except CheckpointError as error:
        refused = error
    else:
        assert len(config.inverse_frequencies()) == config.head_dim // 2
        return
    assert str(tmp_path) in refused.message


class _Contiguous:
    """Attention over the step's own tokens, without pages: the whole sequence at once."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        self._heads = decoder.config.heads
        self._cos, self._sin = decoder.cos[:tokens], decoder.sin[:tokens]

    def attend(self, layer: int, turning: Tensor, value: Tensor) -> Tensor:
        turned = rotate(turning, self._cos, self._sin)
        query, key = turned[:, : self._heads], turned[:, self._heads :]
        group = query.shape[1] // key.shape[1]
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return attended.transpose(0, 1).reshape(query.shape[0], -1)


def decode(folder: Path, ids: list[int], kernels: Kernels, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [tokens, vocab] of every position."""
    config = read_config(folder)
    weights = load_weights(folder, config, dtype=dtype, pack=kernels.pack)
    decoder = Decoder(config, weights, kernels, max_context=len(ids))
    with torch.inference_mode():
        return decoder.logits(decoder.forward(torch.tensor(ids), _Contiguous(decoder, len(ids)))).float()


def reference(folder: Path, ids: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would leave a thread behind
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": {**LLAMA3, "rope_theta": 1e4}}),
        ("llama", {"hidden_size": 66, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 22}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
        ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 0.1}),
    ],
)
@pytest.mark.parametrize("kernels", [TorchKernels(), cpu_kernels(torch.float32)])
def test_logits_are_those_of_transformers(
    tmp_path: Path, arch: str, overrides: dict[str, Any], kernels: Kernels
) -> None:
    folder = write_random_checkpoint(tmp_path, arch=arch, scale=0.2, seed=5, **overrides)
    ids = np.random.default_rng(1).integers(0, 256, 90).tolist()
    torch.testing.assert_close(decode(folder, ids, kernels), reference(folder, ids), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_bfloat16_rounds_where_transformers_rounds(tmp_path: Path, arch: str) -> None:
    """Both are as far from float32; what is computed in float32 inside a norm is so in both."""
    folder = write_random_checkpoint(tmp_path, arch=arch, scale=0.1, seed=6)
    ids = np.random.default_rng(1).integers(0, 256, 40).tolist()
    exact = reference(folder, ids)
    theirs = (reference(folder, ids, torch.bfloat16) - exact).square().mean().sqrt()
    ours = (decode(folder, ids, cpu_kernels(torch.bfloat16), torch.bfloat16) - exact).square().mean().sqrt()
    assert ours < 1.25 * theirs


def test_rows_that_are_not_wanted_change_nothing_for_the_others(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, arch="qwen3", scale=0.2, seed=5)
    config, ids = read_config(folder), torch.arange(40)
    decoder = Decoder(config, load_weights(folder, config, dtype=torch.float32), TorchKernels(), max_context=40)
    with torch.inference_mode():
        every = decoder.forward(ids, _Contiguous(decoder, 40))
        chosen = torch.tensor([39, 0, 17])
        torch.testing.assert_close(decoder.forward(ids, _Contiguous(decoder, 40), chosen), every[chosen])
        none = torch.empty(0, dtype=torch.long)
        assert decoder.forward(ids, _Contiguous(decoder, 40), none).shape == (0, config.hidden_size)


def test_packed_matrices_give_the_same_products() -> None:
    generator = torch.Generator().manual_seed(0)
    kernels = cpu_kernels(torch.float32)
    for rows, columns in ((96, 64), (64, 96), (260, 7)):
        weight, bias = torch.randn(rows, columns, generator=generator), torch.randn(rows, generator=generator)
        packed = kernels.pack(weight)
        for count in (1, 2, 17, 64):
            x = torch.randn(count, columns, generator=generator)
            for offset in (None, bias):
                expected = functional.linear(x, weight, offset)
                torch.testing.assert_close(kernels.linear(x, packed, offset), expected, rtol=1e-4, atol=1e-4)


def test_kernels_that_this_torch_lacks_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(self: PackedKernels, weight: Tensor) -> Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(PackedKernels, "pack", lacking)
    assert type(cpu_kernels(torch.float32)) is TorchKernels
    monkeypatch.setattr(PackedKernels, "pack", lambda self, weight: weight)
    monkeypatch.setattr(PackedKernels, "linear", lambda self, x, weight, bias: x.new_zeros(len(x), len(weight)))
    assert type(cpu_kernels(torch.float32)) is TorchKernels, "nor are those that compute something else"


def test_the_random_checkpoint_is_complete_for_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = tmp_path / "model"
    monkeypatch.setattr("sys.argv", ["random_checkpoint", str(folder), "--arch", "qwen3", "--seed", "4"])
    with pytest.warns(RuntimeWarning, match="found in sys.modules"):  # this file has imported it
        runpy.run_module("microserve.engine.model.random_checkpoint", run_name="__main__")
    assert capsys.readouterr().out == f"wrote {folder}\n"
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    text = "Grüße, 世界! \U0001f600\x00\t\n ‏नमस्ते <|end|x"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>hi<|end|><|assistant|>"
    assert tokenizer.encode(chat, add_special_tokens=False)[0] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_the_seed_decides_the_random_checkpoint(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        return (write_random_checkpoint(tmp_path / name, seed=seed) / "model.safetensors").read_bytes()

    assert weights("a", 1) == weights("b", 1)
    assert weights("a", 1) != weights("c", 2)
    with pytest.raises(CheckpointError, match="architecture 'gpt2' is not one of llama, mistral, qwen2, qwen3"):
        write_random_checkpoint(tmp_path / "d", arch="gpt2")
