"""Writes a small random checkpoint: for tests, and for trying things out where no model is at hand.

    python -m microserve.engine.model.random_checkpoint FOLDER --arch qwen3 --seed 1

It is a complete Hugging Face folder: config, safetensors, and a byte-level tokenizer that encodes any text, with a chat
template. What the model says is noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from microserve.engine.model.config import ARCHITECTURES, read_config
from microserve.runtime.errors import CheckpointError

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def write_random_checkpoint(
    folder: Path, *, arch: str = "llama", seed: int = 0, scale: float = 0.08, shard: bool = False, **overrides: Any
) -> Path:
    """Writes the checkpoint and returns its folder. `overrides` replace keys of config.json (None removes one).

    `scale` is the standard deviation of the weights; `shard` writes one file per layer and an index.
    """
    names = {short: name for name, short in ARCHITECTURES.items()}
    if arch not in names:
        raise CheckpointError(f"architecture {arch!r} is not one of {', '.join(sorted(names))}")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder)
    config: dict[str, Any] = {
        "architectures": [names[arch]],
        "model_type": arch,
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": vocabulary - len(SPECIALS),
        "pad_token_id": vocabulary - len(SPECIALS),
        "torch_dtype": "float32",
    }
    if arch == "mistral":
        config["sliding_window"] = None
    config = {key: value for key, value in {**config, **overrides}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    ends = {"eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(ends) + "\n", encoding="utf-8")
    _write_weights(folder, _random_weights(folder, seed, scale), shard=shard)
    return folder


def _random_weights(folder: Path, seed: int, scale: float) -> dict[str, torch.Tensor]:
    config = read_config(folder)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def norm(size: int) -> torch.Tensor:
        return 1.0 + torch.randn(size, generator=generator) * 0.1

    hidden, wide, queries = config.hidden_size, config.intermediate_size, config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    weights = {"model.embed_tokens.weight": random(config.vocab_size, hidden), "model.norm.weight": norm(hidden)}
    if not config.tied_embeddings:
        weights["lm_head.weight"] = random(config.vocab_size, hidden)
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{name}.weight"] = norm(hidden)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            weights[f"{at}self_attn.{name}_proj.weight"] = random(rows, hidden)
            if config.qkv_bias:
                weights[f"{at}self_attn.{name}_proj.bias"] = random(rows)
        weights[f"{at}self_attn.o_proj.weight"] = random(hidden, queries)
        if config.output_bias:
            weights[f"{at}self_attn.o_proj.bias"] = random(hidden)
        if config.qk_norm:
            weights[f"{at}self_attn.q_norm.weight"] = norm(config.head_dim)
            weights[f"{at}self_attn.k_norm.weight"] = norm(config.head_dim)
        for name, rows, columns in (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide)):
            weights[f"{at}mlp.{name}_proj.weight"] = random(rows, columns)
            if config.mlp_bias:
                weights[f"{at}mlp.{name}_proj.bias"] = random(rows)
    return weights


def _write_weights(folder: Path, weights: dict[str, torch.Tensor], *, shard: bool) -> None:
    metadata = {"format": "pt"}
    if not shard:
        save_file(weights, folder / "model.safetensors", metadata=metadata)
        return
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights.items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata=metadata)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path) -> int:
    """Writes a byte-level tokenizer without merges; returns its vocabulary's size: 256 bytes and the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
        "eos_token": SPECIALS[0],
        "pad_token": SPECIALS[0],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return int(tokenizer.get_vocab_size())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m microserve.engine.model.random_checkpoint",
        description="Write a small random checkpoint. What the model says is noise.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--arch", default="llama", choices=sorted(ARCHITECTURES.values()), help="architecture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size")
    parser.add_argument("--layers", type=int, default=2, help="layers")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="KV heads")
    parser.add_argument("--head-dim", type=int, default=16, help="size of a head")
    parser.add_argument("--context", type=int, default=1024, help="longest context, tokens")
    args = parser.parse_args()
    write_random_checkpoint(
        args.folder,
        arch=args.arch,
        seed=args.seed,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.context,
    )
    print(f"wrote {args.folder}")


if __name__ == "__main__":
    main()
