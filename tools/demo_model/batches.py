"""Conversations as token ids, packed into rows; made by worker processes while the GPU trains."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from microserve.tools.demo_model import corpus
from microserve.tools.demo_model.model import CONTEXT, END_ID
from microserve.tools.demo_model.tokenizer import ROLES, load

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

    from microserve.tools.demo_model.exchange import Dialog, Message
    from microserve.tools.demo_model.settings import Settings


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as ids, and for each id whether the model shall learn to write it."""

    ids: list[int]
    learn: list[bool]


def role_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of the token that opens a turn, by role; raises ValueError for a tokenizer that is not the demo's."""
    found = {}
    for role, token in ROLES.items():
        number = tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no token {token}")
        found[role] = number
    return found


def encode(tokenizer: Tokenizer, dialogs: Sequence[Dialog]) -> list[Encoded]:
    """Ids exactly as the chat template gives them; a plain story has no role token; its first id is not learnt."""
    roles = role_ids(tokenizer)
    flat = [message.content for dialog in dialogs for message in dialog.messages]
    contents = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    result = []
    for dialog in dialogs:
        ids: list[int] = []
        learn: list[bool] = []
        for message in dialog.messages:
            content = [*next(contents).ids, END_ID]
            head = [] if dialog.kind == "plain" else [roles[message.role]]
            ids += head + content
            learn += [False] * len(head) + [message.role == "assistant"] * len(content)
        result.append(Encoded(ids, learn))
    return result


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of a prompt that asks for the next assistant turn."""
    roles = role_ids(tokenizer)
    ids: list[int] = []
    for message in messages:
        ids += [roles[message.role], *tokenizer.encode(message.content, add_special_tokens=False).ids, END_ID]
    return [*ids, roles["assistant"]]


def pack(encoded: Sequence[Encoded], rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of whole conversations, longest first into the first row with room; what does not fit is left out.

    Returns `grid`, int32 [3, rows, length]: ids, positions (restarting) and document numbers (0 is padding); and
    `learn`, int64 [2, n]: flat indices of the positions to learn from, and the ids that follow them.
    """
    grid = np.zeros((3, rows, length), np.int32)
    used = [0] * rows
    where: list[np.ndarray] = []
    target: list[np.ndarray] = []
    first = 0
    for number, item in enumerate(sorted(encoded, key=lambda one: -len(one.ids)), 1):
        n = len(item.ids)
        row = next((r for r in range(first, rows) if used[r] + n <= length), None)
        if row is None:
            continue
        begin = used[row]
        values = np.asarray(item.ids, np.int32)
        grid[0, row, begin : begin + n] = values
        grid[1, row, begin : begin + n] = np.arange(n)
        grid[2, row, begin : begin + n] = number
        learn = np.flatnonzero(np.asarray(item.learn[1:], bool))
        where.append(row * length + begin + learn)
        target.append(values[1:][learn])
        used[row] = begin + n
        while first < rows - 1 and used[first] > length - 8:
            first += 1
    learn_ids = np.stack((np.concatenate(where), np.concatenate(target))).astype(np.int64)
    return {"grid": torch.from_numpy(grid), "learn": torch.from_numpy(learn_ids)}


def make(tokenizer: Tokenizer, rng: Random, rows: int, length: int, longest: int) -> dict[str, torch.Tensor]:
    """One batch of fresh conversations."""
    encoded: list[Encoded] = []
    tokens = 0
    while tokens < rows * length:
        for item in encode(tokenizer, [corpus.draw(rng, longest) for _ in range(64)]):
            if len(item.ids) <= min(length, CONTEXT):
                encoded.append(item)
                tokens += len(item.ids)
    return pack(encoded, rows, length)


class Batches(IterableDataset[dict[str, torch.Tensor]]):
    """Batch number i follows from the seed and i alone, whatever the number of workers."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """This worker's share of the batches, in order."""
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        tokenizer, settings = load(self.folder), self.settings
        for step in range(first, settings.steps, stride):
            longest = settings.longest if step >= settings.long_from * settings.steps else min(50, settings.longest)
            yield make(tokenizer, Random(f"{settings.seed}/{step}"), settings.rows, settings.length, longest)
