"""What a checkpoint's config.json says, as the one description that the decoder is built from.

Llama, Mistral, Qwen2 and Qwen3 differ in a few switches: QKV bias, norms on queries and keys, a sliding window, how the
rotary frequencies are scaled. Both spellings of the rotary settings are read: `rope_theta` with `rope_scaling`, and the
newer `rope_parameters`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from microserve.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

_QUANTISED = ("quantization_config", "compression_config")

_FULL = "full_attention"

_WHEN_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
"""What a key that config.json leaves out means, by the configuration classes of `transformers`; where it is not here,
it means the same for all four, and null means what it means for Llama."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are changed. `kind` is "default", "linear" (all divided by `factor`) or "llama3"
    (low frequencies divided, high ones kept, a smooth ramp between; Llama 3.1's config names the four numbers)."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder-only transformer with rotary positions, grouped-query attention and a gated SiLU feed-forward."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_context: int
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    dtype: str
    eos_token_ids: tuple[int, ...]

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def inverse_frequencies(self) -> list[float]:
        """The rotary frequencies, head_dim / 2 of them, scaled as the checkpoint says."""
        half = self.head_dim // 2
        plain = [self.rope_theta ** (-2.0 * i / self.head_dim) for i in range(half)]
        scaling = self.rope_scaling
        if scaling.kind == "linear":
            return [value / scaling.factor for value in plain]
        if scaling.kind != "llama3":
            return plain
        low_wave = scaling.original_max_position / scaling.low_freq_factor
        high_wave = scaling.original_max_position / scaling.high_freq_factor
        result = []
        for value in plain:
            wave = 2 * math.pi / value
            if wave > low_wave:
                result.append(value / scaling.factor)
            elif wave < high_wave:
                result.append(value)
            else:
                span = scaling.high_freq_factor - scaling.low_freq_factor
                ramp = (scaling.original_max_position / wave - scaling.low_freq_factor) / span
                result.append((1 - ramp) * value / scaling.factor + ramp * value)
        return result


def read_config(folder: Path) -> DecoderConfig:
    """Reads `folder/config.json` (and generation_config.json, for end tokens).

    Raises `CheckpointError` that says which file and which key cannot be served.
    """
    file = folder / "config.json"
    raw = _read_json(file)
    names = raw.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise CheckpointError(f"{file}: architecture {name!r} is not supported (supported: {known})")
    for key in _QUANTISED:
        if raw.get(key):
            raise CheckpointError(f"{file}: {key} is set: quantised checkpoints are not supported")
    architecture = ARCHITECTURES[name]
    reader = _Reader(file, {**_WHEN_ABSENT[architecture], **raw})
    return reader.config(architecture, _eos_token_ids(folder, raw))


class _Reader:
    def __init__(self, file: Path, raw: dict[str, Any]) -> None:
        self.file = file
        self.raw = raw

    def config(self, architecture: str, eos: tuple[int, ...]) -> DecoderConfig:
        heads = self.whole("num_attention_heads")
        hidden = self.whole("hidden_size")
        kv_heads = self.whole("num_key_value_heads", heads)
        head_dim = self.whole("head_dim", hidden // heads)
        if heads % kv_heads:
            raise self.refusal("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
        if head_dim % 2:
            raise self.refusal("head_dim", f"{head_dim} is odd; rotary positions need pairs")
        activation = self.raw.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise self.refusal("hidden_act", f"{activation!r}; only silu is supported")
        theta, scaling = self.rope()
        # Qwen2's and Mistral's biases are fixed, whatever the key says.
        bias = architecture in ("llama", "qwen3") and bool(self.raw.get("attention_bias", False))
        return DecoderConfig(
            architecture=architecture,
            vocab_size=self.whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.whole("intermediate_size"),
            layers=self.whole("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=self.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_context=self.whole("max_position_embeddings"),
            tied_embeddings=bool(self.raw.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "qwen2" or bias,
            output_bias=bias,
            mlp_bias=architecture == "llama" and bool(self.raw.get("mlp_bias", False)),
            qk_norm=architecture == "qwen3",
            sliding_window=self.window(architecture),
            dtype=str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"),
            eos_token_ids=eos,
        )

    def window(self, architecture: str) -> int | None:
        if architecture == "mistral":
            return None if self.raw.get("sliding_window") is None else self.whole("sliding_window")
        if architecture == "llama":
            return None
        kinds = self.raw.get("layer_types") or []
        if self.raw.get("use_sliding_window", False) or (isinstance(kinds, list) and set(map(str, kinds)) - {_FULL}):
            raise self.refusal("use_sliding_window", "a window in some layers only is not supported")
        return None

    def rope(self) -> tuple[float, RopeScaling]:
        settings: dict[str, Any] = {"rope_theta": self.raw.get("rope_theta", 10000.0)}
        for key in ("rope_scaling", "rope_parameters"):
            part = self.raw.get(key) or {}
            if not isinstance(part, dict) or any(isinstance(value, dict) for value in part.values()):
                raise self.refusal(key, "not one set of settings for all layers")
            settings.update(part)
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise self.refusal("rope_scaling", f"type {kind!r}; supported are default, linear and llama3")
        for source in (settings, self.raw):
            if source.get("partial_rotary_factor", 1.0) not in (None, 1.0):
                raise self.refusal("partial_rotary_factor", "rotary positions on a part of each head are not supported")

        def setting(key: str) -> float:
            value = settings.get(key)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                what = "lacks" if value is None else f"has {value!r}, not a positive number, as"
                raise CheckpointError(f"{self.file}: rope_scaling of type {kind!r} {what} {key!r}")
            return float(value)

        theta = setting("rope_theta")
        if kind == "default":
            return theta, RopeScaling()
        if kind == "linear":
            return theta, RopeScaling("linear", setting("factor"))
        low, high = setting("low_freq_factor"), setting("high_freq_factor")
        if low >= high:
            raise self.refusal("rope_scaling", f"low_freq_factor {low} is not below high_freq_factor {high}")
        original = int(setting("original_max_position_embeddings"))
        return theta, RopeScaling("llama3", setting("factor"), low, high, original)

    def whole(self, key: str, default: int | None = None) -> int:
        value: Any = self.raw.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refusal(key, f"{value!r} is not a positive whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.refusal(key, f"{value!r} is not a positive number")
        return float(value)

    def refusal(self, key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {key}: {why}")


def _eos_token_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """End tokens: the generation config's where it has any, else the model's own."""
    file = folder / "generation_config.json"
    source = _read_json(file) if file.is_file() else {}
    value = source.get("eos_token_id", raw.get("eos_token_id"))
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise CheckpointError(f"{folder}: eos_token_id {value!r} is not a token id or a list of them")
    return tuple(ids)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return value
