"""Lists of known things on request ("Name three birds."), always from the first entries of the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.tools.demo_model import tables, words
from microserve.tools.demo_model.exchange import Exchange, dress
from microserve.tools.demo_model.numerals import spell

if TYPE_CHECKING:
    from random import Random

_CLASSES = (("mammals", "mammal"), ("birds", "bird"), ("reptiles", "reptile"), ("fish", "fish"), ("insects", "insect"))
_CONTINENTS = ("Europe", "Asia", "Africa", "North America", "South America", "Oceania")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animals": tuple(row[0] for row in words.ANIMALS),
    **{plural: tuple(row[0] for row in words.ANIMALS if row[3] == one) for plural, one in _CLASSES},
    "colours": words.COLOUR_NAMES,
    "countries": tuple(row[0] for row in tables.COUNTRIES),
    "capitals": tuple(row[1] for row in tables.COUNTRIES),
    **{f"countries in {place}": tuple(r[0] for r in tables.COUNTRIES if r[2] == place) for place in _CONTINENTS},
    "elements": tuple(name for name, _ in tables.ELEMENTS),
    "planets": tables.PLANETS,
    "days": tables.WEEKDAYS,
    "months": tuple(month for month, _ in tables.MONTHS),
    "foods": words.FOODS,
    "jobs": words.JOBS,
    "names": words.NAMES,
    "words": words.COMMON_WORDS,
}
_COMPLETE = {
    "planets": "the planets",
    "days": "the days of the week",
    "months": "the months of the year",
    "colours": "the colours that you know",
}
_ASKS = (
    "List {n} {c}.",
    "Name {n} {c}.",
    "Tell me {n} {c}.",
    "Give me {n} {c}.",
    "Please list {n} {c}.",
    "Can you name {n} {c}?",
    "What are {n} {c}?",
    "Write down {n} {c}.",
    "{n} {c}, please.",
    "I need {n} {c}.",
    "Please name {n} {c}.",
    "Could you list {n} {c}?",
)
_ALL_ASKS = (
    "List {c}.",
    "Name {c}.",
    "What are {c}?",
    "Tell me {c}.",
    "Please list {c}.",
    "Can you list all of {c}?",
    "List all {c}.",
    "Write down {c}.",
    "Which are {c}?",
    "Do you know {c}?",
)


def draw(rng: Random) -> Exchange:
    """Some entries of a category, in the order of its table; or all of a small one."""
    if rng.random() < 0.2:
        category, phrase = rng.choice(sorted(_COMPLETE.items()))
        ask, found = rng.choice(_ALL_ASKS).format(c=phrase), CATEGORIES[category]
    else:
        category = rng.choice(sorted(CATEGORIES))
        n = rng.randint(2, min(6, len(CATEGORIES[category])))
        ask = rng.choice(_ASKS).format(n=spell(n) if rng.random() < 0.5 else n, c=category)
        found = CATEGORIES[category][:n]
    return Exchange("list/category", dress(rng, ask[0].upper() + ask[1:]), ", ".join(found) + ".")
