"""The shape of the demo model, and its forward pass over packed rows of conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable

CONTEXT = 4096
PAD_ID, END_ID = 0, 1


def new_model(vocabulary: int, seed: int, layers: int = 8) -> LlamaForCausalLM:
    """A fresh Llama with 4 query heads and 2 key-value heads of 64, about seven million parameters at 8 layers."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = dict(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    model = LlamaForCausalLM(LlamaConfig(**shape))
    generation: Callable[..., GenerationConfig] = GenerationConfig
    model.generation_config = generation(eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=False)
    # residual branches start small, so that the depth does not blow up the residual stream
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_((2 * layers) ** -0.5)
    return model


def rotary(positions: Tensor, theta: float = 10000.0, head_dim: int = 64) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary embedding, float32 [rows, 1, length, head_dim], halves repeated as in Llama."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def document_attention(document: Tensor, block: int | None) -> Tensor | BlockMask:
    """Causal attention within each document of packed rows (int [rows, length], each document contiguous).

    With a block size it is a FlexAttention mask: a block of queries sees the blocks from where the document of its
    first query begins up to itself, so the list of blocks needs no [length, length] matrix. Without, a dense bool
    mask [rows, 1, length, length] for the CPU.
    """
    rows, length = document.shape
    if block is None:
        same = document[:, None, :, None] == document[:, None, None, :]
        return same & torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    blocks = length // block
    index = torch.arange(length, device=document.device).expand(rows, length)
    fresh = torch.ones_like(document, dtype=torch.bool)
    fresh[:, 1:] = document[:, 1:] != document[:, :-1]
    starts = torch.where(fresh, index, 0).cummax(dim=1).values[:, ::block] // block  # [rows, blocks]
    number = torch.arange(blocks, device=document.device)
    count = (number - starts + 1).to(torch.int32)
    # the order of the blocks that are not visited does not matter, but each must occur once
    indices = ((starts[:, :, None] + number) % blocks).to(torch.int32)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document[b, q] == document[b, k])

    return BlockMask.from_kv_blocks(count[:, None], indices[:, None], BLOCK_SIZE=block, mask_mod=visible)


def decoder_layer(
    x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask, epsilon: float, weights: tuple[Tensor, ...]
) -> Tensor:
    """One Llama layer on [rows, length, hidden]; its nine weights in the order of `layer_weights`."""
    before, q_weight, k_weight, v_weight, o_weight, after, gate, up, down = weights
    rows, length, _ = x.shape

    def norm(value: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(value, (value.shape[-1],), weight, epsilon)

    def heads(value: Tensor) -> Tensor:
        return value.view(rows, length, -1, 64).transpose(1, 2)

    h = norm(x, before)
    q = _rotate(heads(functional.linear(h, q_weight)), cos, sin)
    k = _rotate(heads(functional.linear(h, k_weight)), cos, sin)
    v = heads(functional.linear(h, v_weight))
    mixed: Any
    if isinstance(mask, Tensor):
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    else:
        mixed = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    x = x + functional.linear(mixed.transpose(1, 2).reshape(rows, length, -1), o_weight)
    h = norm(x, after)
    return x + functional.linear(functional.silu(functional.linear(h, gate)) * functional.linear(h, up), down)


def layer_weights(layer: Any) -> tuple[Tensor, ...]:
    """The weights of a decoder layer of `transformers`' Llama."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = (
        layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    )  # fmt: skip
    return tuple(module.weight for module in modules)


def hidden_states(
    model: LlamaForCausalLM,
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | BlockMask,
    run_layer: Callable[..., Tensor] = decoder_layer,
) -> Tensor:
    """Final hidden states [rows, length, hidden] of packed rows, computed with the parameters of `transformers`' model.

    `ids` and `positions` are integers [rows, length]; positions restart with each conversation, and the mask of
    `document_attention` keeps conversations apart. `run_layer` is `decoder_layer` or its compiled form: compiling one
    layer takes an eighth of the time of compiling all.
    """
    inner: Any = model.model
    epsilon = model.config.rms_norm_eps
    cos, sin = rotary(positions)
    x = inner.embed_tokens(ids)
    for layer in inner.layers:
        x = run_layer(x, cos, sin, mask, epsilon, layer_weights(layer))
    return functional.rms_norm(x, (x.shape[-1],), inner.norm.weight, epsilon)
