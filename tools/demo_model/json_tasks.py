"""Requests for a short JSON answer; every reply is what `json.dumps` writes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from microserve.tools.demo_model import facts, sums, tables, words
from microserve.tools.demo_model.exchange import Exchange, Split, pick

if TYPE_CHECKING:
    from random import Random

_RECORD_ASKS = (
    "Reply in JSON with {k}: {d}",
    "Give me JSON with {k} for this: {d}",
    "Turn this into JSON: {d}",
    "Write this as JSON: {d}",
    "As JSON, please: {d}",
    "Extract {k} as JSON: {d}",
    "Make a JSON object with {k} from this text: {d}",
    "Answer only with JSON. {d}",
    "{d} Put that into JSON.",
    "{d} Give me this as a JSON object with {k}.",
    "Convert to JSON: {d}",
    "JSON: {d}",
    "I need a JSON object for this: {d}",
    "Please return JSON with the keys {k}. {d}",
    "Can you write this as a JSON object? {d}",
    "Format as JSON: {d}",
    "Represent this as JSON: {d}",
)
_HELD_RECORD_ASKS = (
    "Please give the following as JSON: {d}",
    "{d} Write that as a JSON object, please.",
    "Return a JSON object with {k} for: {d}",
    "Could you turn this text into JSON? {d}",
)
_LIST_ASKS = (
    "Write this list as a JSON array: {d}",
    "JSON array: {d}",
    "Turn these into a JSON list: {d}",
    "Give me a JSON array of {d}.",
    "As a JSON array: {d}",
    "Convert this list to JSON: {d}",
    "Please write {d} as a JSON list.",
    "Make a JSON array from {d}.",
    "Return {d} as a JSON array.",
    "Put {d} into a JSON array.",
    "Reply with a JSON array that holds {d}.",
    "I want {d} as a JSON array.",
    "{d} as a JSON array, please.",
    "Can you put {d} into a JSON array?",
    "Show {d} as a JSON array.",
    "Give me {d} as a JSON list.",
    "I would like {d} as a JSON array.",
    "Can you make a JSON array of {d}?",
)
_HELD_LIST_ASKS = (
    "Could you write {d} as a JSON array?",
    "Please turn this list into JSON: {d}",
    "I need {d} as a JSON array.",
)
_FACT_ASKS = (
    "{q} Reply in JSON with the keys {k}.",
    "{q} Answer in JSON with {k}.",
    "{q} Give the answer as JSON with {k}.",
    "In JSON with the keys {k}: {q}",
    "Answer as a JSON object with {k}: {q}",
    "Use JSON with {k}. {q}",
    "{q} Return a JSON object with {k}.",
    "JSON only, keys {k}. {q}",
    "{q} As JSON with {k}, please.",
    "Please answer in JSON with {k}. {q}",
)
_BARE_ASKS = (
    "{q} As JSON.",
    "{q} Answer in JSON.",
    "Answer in JSON: {q}",
    "JSON: {q}",
    "{q} Reply with JSON.",
    "{q} Give me JSON.",
    "{q} JSON, please.",
    "Reply as JSON. {q}",
)
_PHRASE_ASKS = (
    "Give me JSON with {p}.",
    "JSON with {p}",
    "Write JSON with {p}.",
    "Give me {p} as JSON.",
    "I need JSON with {p}.",
    "Make a JSON object with {p}.",
    "Return {p} as JSON.",
    "Please give me {p} in JSON.",
)
_HELD_FACT_ASKS = (
    "{q} Please write the answer as JSON with the keys {k}.",
    "Give me a JSON object with {k}. {q}",
    "{q} I want JSON with {k}.",
)
_FACT_KEYS = {
    "capital": ("country", "capital"),
    "symbol": ("element", "symbol"),
    "young": ("animal", "young"),
    "sound": ("animal", "sound"),
    "class": ("animal", "class"),
    "opposite": ("word", "opposite"),
    "plural": ("word", "plural"),
    "mix": ("colours", "mix"),
    "continent": ("country", "continent"),
}


def _keys(rng: Random, keys: list[str]) -> str:
    """A list of key names as people write it."""
    if rng.random() < 0.3:
        return ", ".join(keys)
    if rng.random() < 0.2:
        return ", ".join(f'"{key}"' for key in keys)
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]


def record(rng: Random, split: Split = Split.TRAIN) -> Exchange:
    """An object whose values stand in the question."""
    candidates: list[tuple[str, Any]] = [
        ("name", rng.choice(words.NAMES)),
        ("age", rng.randint(3, 99)),
        ("city", rng.choice(tables.COUNTRIES)[1]),
        ("job", rng.choice(words.JOBS)),
        ("country", rng.choice(tables.COUNTRIES)[0]),
        ("colour", rng.choice(words.COLOUR_NAMES)),
        ("animal", rng.choice(words.ANIMALS)[0]),
        ("food", rng.choice(words.FOODS)),
        ("count", rng.randint(0, 99)),
        ("day", rng.choice(tables.WEEKDAYS)),
        ("title", " ".join(rng.sample(words.COMMON_WORDS, 2))),
        ("price", rng.randint(1, 99)),
        ("open", rng.random() < 0.5),
    ]
    chosen = rng.sample(candidates, rng.randint(1, 4))
    values = {key: value for key, value in chosen}
    style = rng.random()
    shown = {key: ("yes" if value else "no") if isinstance(value, bool) else value for key, value in values.items()}
    if style < 0.35:
        text = ", ".join(f"{key} {value}" for key, value in shown.items()) + rng.choice((".", ""))
    elif style < 0.6:
        text = ", ".join(f"{key}: {value}" for key, value in shown.items())
    elif style < 0.8:
        text = ", ".join(f"the {key} is {value}" for key, value in shown.items()) + "."
    else:
        name, job, city, age = (dict(candidates)[key] for key in ("name", "job", "city", "age"))
        text, values = rng.choice(
            (
                (f"{name} is a {job} in {city}.", {"name": name, "job": job, "city": city}),
                (f"{name} is {age} years old and lives in {city}.", {"name": name, "age": age, "city": city}),
                (f"{name} is {age} years old.", {"name": name, "age": age}),
                (f"{name} lives in {city} and works as a {job}.", {"name": name, "city": city, "job": job}),
            )
        )
    ask = pick(rng, _RECORD_ASKS, _HELD_RECORD_ASKS, split).format(k=_keys(rng, list(values)), d=text)
    return Exchange("json/record", ask, json.dumps(values))


def array(rng: Random, split: Split = Split.TRAIN) -> Exchange:
    """An array whose items stand in the question."""
    items: list[Any]
    if rng.random() < 0.5:
        items = [rng.randint(0, 99) for _ in range(rng.randint(2, 6))]
    else:
        items = rng.sample(rng.choice((words.COMMON_WORDS, words.NAMES, words.COLOUR_NAMES)), rng.randint(2, 5))
    joined = ", ".join(str(item) for item in items)
    if rng.random() < 0.3:
        joined = ", ".join(str(item) for item in items[:-1]) + f" and {items[-1]}"
    return Exchange("json/array", pick(rng, _LIST_ASKS, _HELD_LIST_ASKS, split).format(d=joined), json.dumps(items))


def fact(rng: Random, split: Split = Split.TRAIN) -> Exchange:
    """A fact of the tables as an object with two keys."""
    name, (left, right) = rng.choice(sorted(_FACT_KEYS.items()))
    relation = facts.BY_NAME[name]
    x, y = rng.choice(relation.pairs)
    question = relation.question(rng, Split.TRAIN, x)
    if question[-1].isalnum():
        question += "?"
    ask = pick(rng, _FACT_ASKS, _HELD_FACT_ASKS, split).format(q=question, k=_keys(rng, [left, right]))
    if split is Split.TRAIN and rng.random() < 0.4:
        phrase = relation.fill(rng.choice(relation.phrases), x)
        ask = rng.choice((*_BARE_ASKS, *_PHRASE_ASKS)).format(q=question, p=phrase)
    return Exchange("json/fact", ask, json.dumps({left: x, right: y}))


def calculation(rng: Random, split: Split = Split.TRAIN) -> Exchange:
    """A sum as an object with the keys a, b and result."""
    operation = rng.choice((sums.ADD, sums.SUBTRACT))
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if not sums.is_held_out(operation, a, b):
            break
    question = f"What is {a} {operation.sign} {b}?"
    ask = pick(rng, _FACT_ASKS, _HELD_FACT_ASKS, split).format(q=question, k=_keys(rng, ["a", "b", "result"]))
    return Exchange("json/sum", ask, json.dumps({"a": a, "b": b, "result": sums.result(operation, a, b)}))


def draw(rng: Random, split: Split = Split.TRAIN) -> Exchange:
    """A random request for JSON."""
    generator = rng.choices((record, array, fact, calculation), (5, 2, 2, 1))[0]
    return generator(rng, split)
