"""A relation between table entries: one canonical answer, and many phrasings of the question, some held out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from microserve.tools.demo_model.exchange import Exchange, Split, article, capital, dress

if TYPE_CHECKING:
    from collections.abc import Iterable
    from random import Random

FRAMES = (
    "What is {np}?",
    "What's {np}?",
    "Tell me {np}.",
    "Please tell me {np}.",
    "Can you tell me {np}?",
    "Could you tell me {np}?",
    "Could you please tell me {np}?",
    "Do you know {np}?",
    "Name {np}.",
    "Give me {np}.",
    "I would like to know {np}.",
    "I want to know {np}.",
    "I'd like to know {np}.",
    "{np}?",
    "{np}, please.",
    "{np}",
    "Which is {np}?",
    "Say what {np} is.",
    "Tell me what {np} is.",
    "Please say what {np} is.",
    "Do you know what {np} is?",
    "Can you say what {np} is?",
    "Do you happen to know {np}?",
    "What would you say is {np}?",
    "I forgot {np}. What is it?",
    "I need {np}.",
    "I need to know {np}.",
    "Remind me of {np}.",
    "Let me know {np}.",
    "Write down {np}.",
    "Can you name {np}?",
    "What do you think is {np}?",
    "Could you remind me what {np} is?",
    "A friend asked me about {np}.",
    "I am looking for {np}.",
    "Answer this: what is {np}?",
)
HELD_FRAMES = (
    "Would you tell me {np}?",
    "Can you remind me of {np}?",
    "I am trying to remember {np}.",
    "Please name {np}.",
    "Tell me, what is {np}?",
    "Do you remember {np}?",
)


@dataclass(frozen=True, slots=True)
class Relation:
    """Pairs (x, y) with one sentence that answers, noun phrases that fit FRAMES, and whole questions.

    Templates may use {x}, {X} (first letter in upper case), {ax} (with an article), and the same for y in the reply.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    reply: str
    phrases: tuple[str, ...]
    asks: tuple[str, ...]
    held_phrases: tuple[str, ...]
    held_asks: tuple[str, ...]
    weight: float = 1.0

    def fill(self, template: str, x: str, y: str = "") -> str:
        """The template with this pair in it."""
        return template.format(
            x=x, X=capital(x), ax=article(x), Ax=capital(article(x)), y=y, ay=article(y) if y else ""
        )

    def sentence(self, x: str, y: str) -> str:
        """The canonical answer for a pair."""
        return self.fill(self.reply, x, y)

    def question(self, rng: Random, split: Split, x: str) -> str:
        """A question about x. For the held-out split the template as a whole was never seen in training."""
        draw = rng.random()
        if split is Split.TRAIN:
            if draw < 0.5:
                return self.fill(rng.choice(self.asks), x)
            frame, phrase = rng.choice(FRAMES), rng.choice(self.phrases)
        elif draw < 0.4:
            return self.fill(rng.choice(self.held_asks), x)
        elif draw < 0.7:
            frame, phrase = rng.choice(HELD_FRAMES), rng.choice(self.phrases)
        else:
            frame, phrase = rng.choice(FRAMES), rng.choice(self.held_phrases)
        text = frame.format(np=self.fill(phrase, x))
        return capital(text)

    def exchange(self, rng: Random, split: Split, pair: tuple[str, str]) -> Exchange:
        """One question about one pair, dressed for training and plain for the figures."""
        ask = self.question(rng, split, pair[0])
        return Exchange(
            f"fact/{self.name}", dress(rng, ask) if split is Split.TRAIN else ask, self.sentence(*pair), pair[1]
        )


def unique_inverse(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The pairs turned round, without those whose answer would not be unique."""
    listed = [pair for pair in pairs if pair[1]]
    times = Counter(y for _, y in listed)
    return tuple((y, x) for x, y in listed if times[y] == 1)


def known(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in pairs if pair[0] and pair[1])


def both_ways(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    listed = tuple(pairs)
    answers = dict(listed)
    for x, y in listed:
        answers.setdefault(y, x)
    return tuple(answers.items())


def relation(
    name: str,
    pairs: Iterable[tuple[str, str]],
    reply: str,
    phrases: str,
    asks: str,
    held_phrases: str,
    held_asks: str,
    weight: float = 1.0,
) -> Relation:
    """A relation from templates separated by `|`, to keep the list below readable."""
    split = [tuple(part.strip() for part in text.split("|")) for text in (phrases, asks, held_phrases, held_asks)]
    return Relation(name, tuple(pairs), reply, split[0], split[1], split[2], split[3], weight)
