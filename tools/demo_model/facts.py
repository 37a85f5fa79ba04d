"""Facts from the tables as questions, drawn at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.tools.demo_model.exchange import Exchange, Split
from microserve.tools.demo_model.relations import RELATIONS

if TYPE_CHECKING:
    from random import Random

    from microserve.tools.demo_model.relation import Relation

FOLLOW_UPS = ("And {x}?", "What about {x}?", "How about {x}?", "And what about {x}?", "Same question for {x}.", "{x}?")
BY_NAME = {relation.name: relation for relation in RELATIONS}
_WEIGHTS = [relation.weight * len(relation.pairs) ** 0.5 for relation in RELATIONS]


def draw(rng: Random, split: Split = Split.TRAIN) -> tuple[Relation, Exchange]:
    """A random fact: relations weighted by their size and importance, pairs uniform."""
    relation = rng.choices(RELATIONS, _WEIGHTS)[0]
    return relation, relation.exchange(rng, split, rng.choice(relation.pairs))


def follow_up(rng: Random, relation: Relation) -> Exchange:
    """A short question that only makes sense after one about the same relation."""
    pair = rng.choice(relation.pairs)
    ask = rng.choice(FOLLOW_UPS).format(x=pair[0])
    return Exchange("follow-up", ask, relation.sentence(*pair), pair[1])
