"""What reading a checkpoint adds to a start: start to ready of an engine, against plainly reading the same files.

The checkpoint is of a real model's shape, in bf16, and its weights are random. It has just been written when the first
engine starts, so it lies in the page cache, and no disk is measured. A second start follows, then the plain reading.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from microserve.engine.model.config import read_config
from perf.engine import started
from perf.harness import Benchmark, Sample, number
from perf.shapes import SHAPES, write_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from microserve.engine.model.config import DecoderConfig

_BYTES = 2
"""Of a weight in bf16."""
_SHARD_BYTES = 4 << 30
_PIECE = 16 << 20
"""Bytes that the plain reading asks for at once."""


def main() -> None:
    bench = Benchmark("loading", "an engine that reads a checkpoint: start to ready")
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, help="cut the shape to so many layers (default: all of them)")
    parser.add_argument("--folder", type=Path, help="where there is room for it (default: the system's temporary one)")
    parser.add_argument("--device", default="cuda:0", help="(default: %(default)s)")
    parser.add_argument("--executor", choices=("cuda", "torch"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--flags", default="", help="further flags of the engine, separated by spaces")
    args = bench.arguments(parser, repeat=1, warmup=0)
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        changes = {} if args.layers is None else {"num_hidden_layers": args.layers}
        model = write_shape(Path(folder) / args.shape, args.shape, **changes)
        # In another process: here, torch would keep memory of the GPU that the engine is to have.
        writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(model, args.device))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit("perf.loading: the checkpoint was not written; it says why above")
        first, *later = asyncio.run(_starts(args, model))
        files = sorted(model.glob("*.safetensors"))
        nbytes = sum(file.stat().st_size for file in files)
        began = time.perf_counter()
        _read(files)
        seconds = time.perf_counter() - began
    limit = f"{number(seconds)} to read"
    shards = f"{nbytes / 1e9:.1f} GB in {len(files)} shards"
    bench.row("first start to ready", Sample((first,)), unit="s", limit=limit, note=f"{shards}, just written")
    bench.row("second start to ready", Sample(tuple(later)), unit="s", limit=limit)
    bench.row("plain reading", Sample((nbytes / seconds / 1e9,)), unit="GB/s", note="the same files, once")
    bench.finish(args)


async def _starts(args: argparse.Namespace, model: Path) -> list[float]:
    """Seconds from start to ready of the first engine, then of those that count as the second."""
    # As in perf.engine.
    flags = ["--model", str(model), "--executor", args.executor, "--device", args.device]
    flags += ["--max-context", "16384", *args.flags.split()]
    seconds = []
    for _ in range(1 + args.repeat):
        async with started(flags) as engine:
            seconds.append(engine.seconds)
    return seconds


def _read(files: Sequence[Path]) -> None:
    """Reads them from end to end, one after the other, and keeps nothing."""
    piece = bytearray(_PIECE)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(piece):
                pass


def write_checkpoint(folder: Path, device: str) -> None:
    """Writes the weights that config.json in `folder` asks for. Made on `device`; memory holds one shard at a time.

    Raises `SystemExit` where there is no such device, or no room.
    """
    where = torch.device(device)
    if where.type == "cuda" and torch.cuda.device_count() <= (where.index or 0):
        raise SystemExit(f"perf.loading: there is no {device} (--device)")
    shapes = tensor_shapes(read_config(folder))
    total = sum(map(_nbytes, shapes.values()))
    if total > (free := shutil.disk_usage(folder).free):
        raise SystemExit(
            f"perf.loading: {total / 1e9:.1f} GB of weights do not fit the {free / 1e9:.1f} free (--folder)"
        )
    generator = torch.Generator(where).manual_seed(0)
    parts = shards(shapes, _SHARD_BYTES)
    files: dict[str, str] = {}
    for count, part in enumerate(parts, 1):
        began = time.perf_counter()
        file = f"model-{count:05}-of-{len(parts):05}.safetensors"
        tensors = {name: _random(name, shape, generator).cpu() for name, shape in part.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
        written, seconds = sum(map(_nbytes, part.values())), time.perf_counter() - began
        print(f"  {file}: {written / 1e9:.1f} GB in {seconds:.1f} s", file=sys.stderr, flush=True)
        # Before the next ones are made.
        del tensors
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, in the order in which an engine reads them."""
    hidden, wide, queries = config.hidden_size, config.intermediate_size, config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    attention = (("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries))
    mlp = (("gate", wide, hidden), ("up", wide, hidden), ("down", hidden, wide))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = (hidden,)
        for name, rows, columns in attention:
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, columns)
            if config.output_bias if name == "o" else config.qkv_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            shapes[f"{at}self_attn.{name}.weight"] = (config.head_dim,)
        for name, rows, columns in mlp:
            shapes[f"{at}mlp.{name}_proj.weight"] = (rows, columns)
            if config.mlp_bias:
                shapes[f"{at}mlp.{name}_proj.bias"] = (rows,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def shards(shapes: Mapping[str, tuple[int, ...]], most: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors, in order, in parts of at most `most` bytes each. A larger tensor is a part of its own."""
    parts: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for name, shape in shapes.items():
        nbytes = _nbytes(shape)
        if not parts or nbytes > room:
            parts.append({})
            room = most
        parts[-1][name] = shape
        room -= nbytes
    return parts


def _nbytes(shape: tuple[int, ...]) -> int:
    return _BYTES * prod(shape)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values as the engine makes them up: norms are 1, biases 0, matrices keep hidden states of order 1."""
    tensor = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    if name.endswith("bias"):
        return tensor.zero_()
    if len(shape) == 1:
        return tensor.fill_(1.0)
    return tensor.normal_(0.0, shape[1] ** -0.5, generator=generator)


if __name__ == "__main__":
    main()
