"""Small arithmetic: two-digit sums and differences with held-out pairs, times tables, exact division, word problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from microserve.tools.demo_model import words
from microserve.tools.demo_model.exchange import Exchange, Split, dress, pick
from microserve.tools.demo_model.numerals import spell

if TYPE_CHECKING:
    from random import Random

HELD_OUT_SHARE = 8  # about one pair in so many is never seen in training


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation: its sign and how people ask for it ({a}, {b} are the operands)."""

    name: str
    sign: str
    asks: tuple[str, ...]
    held_asks: tuple[str, ...]


def _op(name: str, sign: str, asks: str, held_asks: str) -> Operation:
    return Operation(
        name, sign, tuple(a.strip() for a in asks.split("|")), tuple(a.strip() for a in held_asks.split("|"))
    )


_SIGN_ASKS = (
    "{a} {s} {b} | {a} {s} {b} = | {a} {s} {b} = ? | {a}{s}{b} | {a}{s}{b}= | What is {a} {s} {b}? | What's {a}"
    " {s} {b}?"
    " | What is {a}{s}{b}? | Calculate {a} {s} {b}. | Compute {a} {s} {b}. | How much is {a} {s} {b}? | Work out"
    " {a} {s} {b}."
    " | Solve {a} {s} {b}. | Please compute {a} {s} {b}. | Can you work out {a} {s} {b}? | {a} {s} {b} is what?"
    " | {a} {s} {b}, please. | Tell me {a} {s} {b}. | What do you get for {a} {s} {b}? | Can you calculate {a} {s} {b}?"
    " | What does {a} {s} {b} equal? | {a} {s} {b} equals what? | Do the sum {a} {s} {b}. | Answer: {a} {s} {b} | "
)
_HELD_SIGN_ASKS = (
    "Would you work out {a} {s} {b}? | Please tell me what {a} {s} {b} is. | What would {a} {s} {b} be?"
    " | Give me the result of {a} {s} {b}. | "
)

ADD = _op(
    "add",
    "+",
    _SIGN_ASKS + "What is {a} plus {b}? | How much is {a} plus {b}? | Add {a} and {b}. | Add {b} to {a}."
    " | What is the sum of {a} and {b}? | {a} plus {b}? | What do {a} and {b} make together? | Sum {a} and {b}."
    " | Please add {a} and {b}. | What do you get if you add {a} and {b}? | What is {a} added to {b}?"
    " | Find the sum of {a} and {b}. | If I have {a} and get {b} more, how many do I have? | {a} plus {b} is what?",
    _HELD_SIGN_ASKS + "Could you add {a} and {b}? | Tell me the sum of {a} and {b}. | How much do {a} and {b} make?"
    " | What number is {a} plus {b}?",
)
SUBTRACT = _op(
    "subtract",
    "-",
    _SIGN_ASKS + "What is {a} minus {b}? | How much is {a} minus {b}? | Subtract {b} from {a}. | Take {b} from {a}."
    " | What is the difference of {a} and {b}? | {a} minus {b}? | What is {a} less {b}? | Take away {b} from {a}."
    " | Please subtract {b} from {a}. | What do you get if you subtract {b} from {a}? | What remains of {a} minus {b}?"
    " | Find the difference of {a} and {b}. | If I have {a} and give away {b}, how many are left? | {a} minus {b}"
    " is what?"
    " | What is left of {a} when I take away {b}? | How much remains of {a} after taking {b}? | What remains if I"
    " take {b}"
    " from {a}? | I had {a} and lost {b}. How many are left? | How many are left when {b} of {a} are gone?"
    " | How much is {a} if you take away {b}? | What is left when you take {b} from {a}?",
    _HELD_SIGN_ASKS
    + "Could you subtract {b} from {a}? | Tell me {a} minus {b}. | How much is left of {a} if I take {b}?"
    " | What number is {a} minus {b}?",
)
MULTIPLY = _op(
    "multiply",
    "*",
    _SIGN_ASKS + "What is {a} times {b}? | {a} times {b}? | {a} x {b} | What is {a} x {b}? | Multiply {a} by {b}."
    " | Multiply {a} and {b}. | How much is {a} times {b}? | What is the product of {a} and {b}? | Find {a} times {b}.",
    _HELD_SIGN_ASKS + "Could you multiply {a} by {b}? | Tell me {a} times {b}. | What number is {a} times {b}?",
)
DIVIDE = _op(
    "divide",
    "/",
    _SIGN_ASKS
    + "What is {a} divided by {b}? | {a} divided by {b}? | Divide {a} by {b}. | How much is {a} divided by {b}?"
    " | How many times does {b} go into {a}? | Share {a} among {b}. | Find {a} divided by {b}.",
    _HELD_SIGN_ASKS + "Could you divide {a} by {b}? | Tell me {a} divided by {b}. | What number is {a} divided by {b}?",
)


def is_held_out(operation: Operation, a: int, b: int) -> bool:
    """Whether the pair is kept from training; for sums both orders of a pair are kept together."""
    low, high = (min(a, b), max(a, b)) if operation is ADD else (a, b)
    return a > 9 and b > 9 and (low * 7919 + high * 104_729 + 13) * 2_654_435_761 % 2**32 // 2**16 % HELD_OUT_SHARE == 0


def result(operation: Operation, a: int, b: int) -> int:
    """The exact result; division must come out even."""
    if operation is ADD:
        return a + b
    if operation is SUBTRACT:
        return a - b
    return a * b if operation is MULTIPLY else a // b


def sentence(operation: Operation, a: int, b: int) -> str:
    """The canonical answer."""
    return f"{a} {operation.sign} {b} = {result(operation, a, b)}."


def ask_for(rng: Random, operation: Operation, a: int, b: int, split: Split) -> Exchange:
    """A question about one pair of operands."""
    template = pick(rng, operation.asks, operation.held_asks, split)
    ask = template.format(a=a, b=b, s=operation.sign)
    if split is Split.TRAIN:
        ask = ask if ask[0].isdigit() and rng.random() < 0.7 else dress(rng, ask)
    return Exchange(f"sum/{operation.name}", ask, sentence(operation, a, b), str(result(operation, a, b)))


def two_digit(rng: Random, operation: Operation, split: Split) -> Exchange:
    """Two-digit addition or subtraction from the pairs of the split."""
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if operation is SUBTRACT and a < b and rng.random() < 0.7:
            a, b = b, a
        if is_held_out(operation, a, b) is (split is Split.HELD_OUT):
            return ask_for(rng, operation, a, b, split)


def draw(rng: Random, split: Split = Split.TRAIN) -> Exchange:
    """A random calculation."""
    kind = rng.random()
    if kind < 0.62:
        return two_digit(rng, ADD if kind < 0.31 else SUBTRACT, split)
    if kind < 0.72:
        operation = ADD if rng.random() < 0.5 else SUBTRACT
        a, b = rng.randint(0, 99), rng.randint(0, 9)
        return ask_for(rng, operation, a, b, split)
    if kind < 0.78:
        return ask_for(rng, ADD, rng.randint(10, 999), rng.randint(100, 999), split)
    if kind < 0.87:
        return ask_for(rng, MULTIPLY, rng.randint(0, 12), rng.randint(0, 12), split)
    if kind < 0.93:
        b = rng.randint(1, 12)
        return ask_for(rng, DIVIDE, b * rng.randint(0, 12), b, split)
    return word_problem(rng) if rng.random() < 0.8 else comparison(rng)


def word_problem(rng: Random) -> Exchange:
    """A sum in a one-line story; its pairs are trained pairs only."""
    name, thing = rng.choice(words.NAMES), rng.choice(words.THINGS)
    operation = ADD if rng.random() < 0.5 else SUBTRACT
    while True:
        a, b = rng.randint(2, 60), rng.randint(1, 39)
        if a >= b and not is_held_out(operation, a, b):
            break
    said_a, said_b = (spell(a), spell(b)) if rng.random() < 0.2 else (str(a), str(b))
    verb = rng.choice(
        ("gets {b} more", "buys {b} more", "finds {b} more", "makes {b} more")
        if operation is ADD
        else ("gives away {b}", "loses {b}", "sells {b}", "breaks {b}")
    ).format(b=said_b)
    question = rng.choice(
        (f"How many {thing} does {name} have now?", f"How many {thing} are there now?", "How many now?")
    )
    ask = f"{name} has {said_a} {thing} and {verb}. {question}"
    value = result(operation, a, b)
    reply = f"{name} has {value} {thing} now, because {sentence(operation, a, b)}"
    return Exchange("sum/word-problem", ask, reply, str(value))


def comparison(rng: Random) -> Exchange:
    """Which of two numbers is larger or smaller."""
    a, b = rng.sample(range(100), 2)
    larger = rng.random() < 0.5
    words_for = ("larger", "bigger", "greater") if larger else ("smaller", "less")
    word = rng.choice(words_for)
    template = rng.choice(
        (
            "Which is {w}, {a} or {b}?",
            "Which number is {w}: {a} or {b}?",
            "What is {w}, {a} or {b}?",
            "{a} or {b}: which is {w}?",
        )
    )
    low, high = sorted((a, b))
    reply = f"{high} is larger than {low}." if larger else f"{low} is smaller than {high}."
    return Exchange(
        "sum/comparison", dress(rng, template.format(w=word, a=a, b=b)), reply, str(high if larger else low)
    )


def follow_up(rng: Random, value: int) -> Exchange | None:
    """Go on from a result ("Now add 5."), where it stays within two digits and among trained pairs."""
    operation = ADD if rng.random() < 0.5 else SUBTRACT
    b = rng.randint(1, 20)
    if not 0 <= value <= 99 or (operation is SUBTRACT and b > value) or is_held_out(operation, value, b):
        return None
    verbs = (
        ("Add {b}.", "Now add {b}.", "Add {b} to that.", "And plus {b}?")
        if operation is ADD
        else ("Subtract {b}.", "Now subtract {b}.", "Take {b} from that.", "And minus {b}?")
    )
    return Exchange(
        "sum/follow-up", rng.choice(verbs).format(b=b), sentence(operation, value, b), str(result(operation, value, b))
    )
