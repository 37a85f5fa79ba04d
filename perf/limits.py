"""The least time that a model's shape leaves a GPU, from what the GPU can do at best (`perf.roofline`).

A decode step reads every weight but the embedding, or computes with it, whichever takes longer, and reads the KV of its
sequences. A prefill computes every product but the head's, whose one row is nothing, and causal attention.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

COPY, PRODUCT, ATTENTION = "copy", "bf16 product 8192", "attention, 8192 tokens"
"""Rows of `perf.roofline`, in TB/s and TFLOP/s."""
LASTING = f"{PRODUCT}, under load"
"""The same product, after it has run for a while: what the board's power leaves."""
_BYTES = 2
"""Of a weight, and of an element of KV: bf16 or fp16."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a GPU can do: bytes/s of a copy, read and written ones; FLOP/s of a large product, and of attention."""

    copy: float
    product: float
    attention: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a model of the Llama family asks for. Weights are counted in elements, norms left out."""

    body: int
    """Weights of the layers."""
    head: int
    kv_bytes: int
    """Of one token."""
    attention_flops: int
    """Of one query against one key, all layers: a product for the score, and one for the value."""

    def decode_step(self, batch: int, context: float, rates: Rates) -> float:
        """Seconds of a step of `batch` sequences of `context` tokens each."""
        weights = self.body + self.head
        return max(weights * _BYTES / rates.copy, 2 * weights * batch / rates.product) + (
            batch * context * self.kv_bytes / rates.copy
        )

    def prefill(self, tokens: int, rates: Rates) -> float:
        """Seconds of one prompt."""
        products = 2 * self.body * tokens / rates.product
        return max(products, self.body * _BYTES / rates.copy) + self.attention(tokens) / rates.attention

    def attention(self, tokens: int) -> float:
        """FLOPs of causal attention over a prompt: half of all pairs."""
        return self.attention_flops * tokens**2 / 2

    def throughput(self, requests: int, prompt: int, output: int, rates: Rates) -> float:
        """Output tokens/s of so many requests at once: all prefills, then all decodes together."""
        decode = output * self.decode_step(requests, prompt + output / 2, rates)
        return requests * output / (requests * self.prefill(prompt, rates) + decode)


def work_of(config: Mapping[str, Any]) -> Work:
    """Of a Hugging Face `config.json`."""
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    projections = hidden * size * (2 * heads + 2 * kv_heads)
    return Work(
        body=layers * (projections + 3 * hidden * config["intermediate_size"]),
        head=hidden * config["vocab_size"],
        kv_bytes=layers * 2 * kv_heads * size * _BYTES,
        attention_flops=layers * heads * size * 4,
    )


def measured() -> tuple[Rates, Rates]:
    """What this machine's GPU can do, measured now: for a moment, and with the products that it does under load.

    In a process of its own, which gives the memory back: what is held against it wants all of it. Raises `SystemExit`
    where that process fails; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "roofline.json"
        ended = subprocess.run([sys.executable, "-m", "perf.roofline", "--json", str(file)], stdout=sys.stderr)
        if ended.returncode:
            raise SystemExit("the limits of the GPU could not be measured")
        found = {row["name"]: 1e12 * row["median"] for row in json.loads(file.read_text())["rows"]}
    best = Rates(copy=found[COPY], product=found[PRODUCT], attention=found[ATTENTION])
    return best, replace(best, product=found[LASTING])
