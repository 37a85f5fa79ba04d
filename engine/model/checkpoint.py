"""Loads a Hugging Face checkpoint: safetensors, one file or shards with an index, memory-mapped.

Each tensor is copied once, straight into its place in the merged matrices, so loading needs no second copy of the
model. What does not fit is refused with the file, the tensor and the reason.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from microserve.engine.model.decoder import DecoderWeights, LayerWeights
from microserve.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import Tensor

    from microserve.engine.model.config import DecoderConfig


_FLOATS = ("F64", "F32", "BF16", "F16")
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


def revision(folder: Path, *, dummy: bool = False) -> str:
    """A digest of what a checkpoint is: config.json, and of each weight file its size, header, first and last 64 KiB.

    With `dummy`, of config.json alone.

    Reading all weights would cost seconds a start; the samples tell two fine-tunes of one model apart in practice.
    """
    digest = hashlib.sha256(b"dummy" if dummy else b"")
    for file in [folder / "config.json", *([] if dummy else _weight_files(folder))]:
        stat = file.stat()
        digest.update(f"{file.name}:{stat.st_size}:".encode())
        digest.update(_header(file) if file.suffix == ".safetensors" else file.read_bytes())
    return digest.hexdigest()[:16]


def _header(file: Path) -> bytes:
    """The header of a safetensors file and a sample of its data, so that equal shapes with other values differ."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(size, 16 << 20))
        sample = stream.read(1 << 16)
        stream.seek(max(0, file.stat().st_size - (1 << 16)))
        return header + sample + stream.read()


def load_weights(
    folder: Path,
    config: DecoderConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    pack: Callable[[Tensor], Tensor] = lambda matrix: matrix,
    progress: Callable[[int, int], None] | None = None,
) -> DecoderWeights:
    """The weights in `folder` as `dtype` on `device`, each matrix given to `pack` once it is whole.

    `progress` is called with (tensors read, tensors in all). Raises `CheckpointError`.
    """
    with ExitStack() as stack:
        source = _Source(folder, stack, progress)
        weights = _Loader(config, source, dtype, torch.device(device), pack).load()
        source.check_all_used(tied=config.tied_embeddings)
    return weights


def dummy_weights(
    config: DecoderConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    pack: Callable[[Tensor], Tensor] = lambda matrix: matrix,
    progress: Callable[[int, int], None] | None = None,
) -> DecoderWeights:
    """Weights that are made up, of the right shapes: for measuring, where no checkpoint is at hand.

    `progress` is called with (layers begun, layers in all).
    """
    where = torch.device(device)
    return _Loader(config, _MadeUp(where, config.layers, progress), dtype, where, pack).load()


class _Parts(Protocol):
    """Where a loader finds tensors."""

    def copy(self, name: str, target: Tensor) -> None: ...


class _MadeUp:
    """Norms are 1, biases 0, and matrices normal with a deviation that keeps hidden states of order 1.

    They are the same in every process, as engines that send each other KV need them.
    """

    def __init__(self, device: torch.device, layers: int, progress: Callable[[int, int], None] | None) -> None:
        self._random = torch.Generator(device).manual_seed(0)
        self._layers = layers
        self._progress = progress
        self._done = 0

    def copy(self, name: str, target: Tensor) -> None:
        """Fills `target` with what `name` may be."""
        if self._progress is not None and name.endswith("input_layernorm.weight"):
            self._done += 1
            self._progress(self._done, self._layers)
        if name.endswith("bias"):
            target.zero_()
        elif target.dim() == 1:
            target.fill_(1.0)
        else:
            target.normal_(0.0, target.shape[1] ** -0.5, generator=self._random)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not an index of safetensors shards: {error!r}") from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{index}: names shards that are not there: {', '.join(missing)}")
        return files
    if single.is_file():
        return [single]
    others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    hint = f" ({', '.join(others[:3])} is not safetensors: convert it)" if others else ""
    raise CheckpointError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there{hint}")


class _Source:
    """Tensors by name, across files that stay mapped while loading."""

    def __init__(self, folder: Path, stack: ExitStack, progress: Callable[[int, int], None] | None) -> None:
        self._folder = folder
        self._progress = progress
        self._handles: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        for file in _weight_files(folder):
            try:
                handle = stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
                names = handle.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
            for name in names:
                self._handles[name] = handle
                self._files[name] = file
        self._unused = set(self._handles)

    def has(self, name: str) -> bool:
        return name in self._handles

    def copy(self, name: str, target: Tensor) -> None:
        """Copies the tensor into `target`, which fixes its shape. Raises `CheckpointError`."""
        handle = self._handles.get(name)
        if handle is None:
            raise CheckpointError(f"{self._folder}: tensor {name!r} is missing")
        where = f"{self._files[name]}: tensor {name!r}"
        part = handle.get_slice(name)
        kind, shape = part.get_dtype(), tuple(part.get_shape())
        if kind not in _FLOATS:
            raise CheckpointError(f"{where} has dtype {kind}: quantised checkpoints are not supported")
        if shape != tuple(target.shape):
            raise CheckpointError(f"{where} has shape {shape}, but config.json asks for {tuple(target.shape)}")
        target.copy_(handle.get_tensor(name))
        self._unused.discard(name)
        if self._progress is not None:
            self._progress(len(self._handles) - len(self._unused), len(self._handles))

    def check_all_used(self, *, tied: bool) -> None:
        """Raises `CheckpointError` if the files hold tensors that this model has no place for."""
        extra = sorted(name for name in self._unused if not name.endswith(_IGNORED_SUFFIXES))
        if tied:
            extra = [name for name in extra if name != "lm_head.weight"]
        if extra:
            raise CheckpointError(
                f"{self._files[extra[0]]}: {len(extra)} tensors have no place in this architecture, "
                f"such as {', '.join(repr(name) for name in extra[:3])}"
            )


class _Loader:
    def __init__(
        self,
        config: DecoderConfig,
        source: _Parts,
        dtype: torch.dtype,
        device: torch.device,
        pack: Callable[[Tensor], Tensor],
    ) -> None:
        self.config = config
        self.source = source
        self.dtype = dtype
        self.device = device
        self.pack = pack

    def load(self) -> DecoderWeights:
        config = self.config
        vocab, hidden = config.vocab_size, config.hidden_size
        embedding = self.rows(vocab, hidden, [("model.embed_tokens.weight", vocab)])
        layers = [self.layer(index) for index in range(config.layers)]
        norm = self.vector(hidden, [("model.norm.weight", hidden)])
        if config.tied_embeddings:
            head = self.pack(embedding)  # its rows are looked up too, so it is kept as it is besides
        else:
            head = self.matrix(vocab, hidden, [("lm_head.weight", vocab)])
        return DecoderWeights(embedding, layers, norm, head)

    def layer(self, index: int) -> LayerWeights:
        config = self.config
        at = f"model.layers.{index}."
        attention, mlp = at + "self_attn.", at + "mlp."
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        wide, hidden = config.intermediate_size, config.hidden_size
        projections = [(f"{attention}{name}_proj", rows) for name, rows in (("q", queries), ("k", keys), ("v", keys))]
        gates = [(f"{mlp}{name}_proj", wide) for name in ("gate", "up")]

        def weights(parts: list[tuple[str, int]]) -> list[tuple[str, int]]:
            return [(name + ".weight", rows) for name, rows in parts]

        def biases(present: bool, parts: list[tuple[str, int]]) -> Tensor | None:
            named = [(name + ".bias", rows) for name, rows in parts]
            return self.vector(sum(rows for _, rows in parts), named) if present else None

        def head_norm(name: str) -> Tensor | None:
            return self.vector(config.head_dim, [(attention + name, config.head_dim)]) if config.qk_norm else None

        output = [(attention + "o_proj", hidden)]
        down = [(mlp + "down_proj", hidden)]
        return LayerWeights(
            input_norm=self.vector(hidden, [(at + "input_layernorm.weight", hidden)]),
            qkv=self.matrix(queries + 2 * keys, hidden, weights(projections)),
            qkv_bias=biases(config.qkv_bias, projections),
            query_norm=head_norm("q_norm.weight"),
            key_norm=head_norm("k_norm.weight"),
            output=self.matrix(hidden, queries, weights(output)),
            output_bias=biases(config.output_bias, output),
            mlp_norm=self.vector(hidden, [(at + "post_attention_layernorm.weight", hidden)]),
            gate_up=self.matrix(2 * wide, hidden, weights(gates)),
            gate_up_bias=biases(config.mlp_bias, gates),
            down=self.matrix(hidden, wide, weights(down)),
            down_bias=biases(config.mlp_bias, down),
        )

    def matrix(self, rows: int, columns: int, parts: Iterable[tuple[str, int]]) -> Tensor:
        """One packed matrix of which each part of the checkpoint fills some rows, from the top."""
        return self.pack(self.rows(rows, columns, parts))

    def rows(self, rows: int, columns: int, parts: Iterable[tuple[str, int]]) -> Tensor:
        """The same, not packed."""
        return self.fill(torch.empty(rows, columns, dtype=self.dtype, device=self.device), parts)

    def vector(self, size: int, parts: Iterable[tuple[str, int]]) -> Tensor:
        return self.fill(torch.empty(size, dtype=self.dtype, device=self.device), parts)

    def fill(self, target: Tensor, parts: Iterable[tuple[str, int]]) -> Tensor:
        row = 0
        for name, rows in parts:
            self.source.copy(name, target[row : row + rows])
            row += rows
        return target
