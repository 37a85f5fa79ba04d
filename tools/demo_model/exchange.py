"""What every generator of the corpus speaks: questions with one exact answer, and conversations made of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random


class Split(Enum):
    """Which phrasings and which number pairs a generator may use."""

    TRAIN = "train"
    HELD_OUT = "held-out"  # never seen in training: only for the figures


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and the one answer that counts as right."""

    kind: str
    ask: str
    reply: str
    value: str = ""  # the bare answer ("Paris"), for those who ask for no sentence; empty where there is none


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; the fields are those of the chat template."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True, slots=True)
class Dialog:
    """A conversation that ends with the assistant; every assistant turn is a training target."""

    kind: str
    messages: tuple[Message, ...]


OPENERS = (
    "Please: ",
    "Hi! ",
    "Hello! ",
    "Hey, ",
    "Quick question: ",
    "Next question: ",
    "One more thing: ",
    "I have a question: ",
    "OK. ",
    "Good. ",
    "Now: ",
    "Question: ",
    "So, ",
    "Well, ",
    "Hello there. ",
    "Good morning. ",
    "My question is this: ",
    "I wonder: ",
)
CLOSERS = (" Thanks.", " Thank you!", " Please answer.", " I am curious.", " Thanks!", " Please.", " Be brief.")


def article(noun: str) -> str:
    """`a dog`, `an owl`; by the first letter, which is right for the nouns of our tables."""
    return f"an {noun}" if noun[0] in "aeiouAEIOU" else f"a {noun}"


def capital(text: str) -> str:
    """The text with its first letter in upper case and the rest unchanged."""
    return text[:1].upper() + text[1:]


def pick(rng: Random, train: tuple[str, ...], held_out: tuple[str, ...], split: Split) -> str:
    """A phrasing of the split; held-out phrasings are never drawn for training."""
    return rng.choice(held_out if split is Split.HELD_OUT else train)


def dress(rng: Random, ask: str) -> str:
    """Vary how a question is typed: words around it, lower case, a missing or wrong final mark, swapped letters."""
    draw = rng.random()
    if draw < 0.55:
        return ask
    if draw < 0.67:
        return rng.choice(OPENERS) + ask
    if draw < 0.73:
        return ask + rng.choice(CLOSERS)
    if draw < 0.83:
        return ask.lower()
    if draw < 0.91:
        return ask.rstrip("?.! ")
    if draw < 0.97:
        return ask.lower().rstrip("?.! ")
    if draw < 0.985:
        return ask.rstrip("?.! ") + "?"
    position = rng.randrange(1, max(2, len(ask) - 2))
    if position + 2 <= len(ask) and ask[position : position + 2].isalpha():
        return ask[:position] + ask[position + 1] + ask[position] + ask[position + 2 :]
    return ask
