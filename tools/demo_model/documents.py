"""Made-up documents of any length with questions at the end; every answer stands in the document, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from microserve.tools.demo_model import stories, words
from microserve.tools.demo_model.exchange import Exchange, capital

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

NOT_FOUND = "The document does not say."

_SYLLABLES = str.split(
    "ba be bo da de do fa fe ga go ka ke ko la le li lo lu ma me mi mo na ne ni no pa pe ra re ri ro sa se so ta"
    " te ti to"
    " va ve vi wa we za ze bran dal fen gar hal kel lor mar nor pel ros sel tor val wen"
)
_FILLER = (
    "The weather was mild for the season.",
    "Nothing else of note happened that day.",
    "The road to the market was busy in the morning.",
    "Several people asked about the old bridge.",
    "The bells rang at noon, as they always do.",
    "A cart with hay stood in front of the mill.",
    "In the evening a light rain began to fall.",
    "The council talked about the new well.",
    "Children played near the fountain until dusk.",
    "The harvest was neither good nor bad.",
    "Most of the shops were closed on that day.",
    "A cat slept on the steps of the town hall.",
    "The clerk wrote everything down with care.",
    "The wind turned to the west after lunch.",
    "Two barrels were repaired in the workshop.",
    "The notes of last week were read aloud.",
    "Somebody left an umbrella at the inn.",
    "The river was low but clear.",
)
_INSTRUCTIONS = (
    "Read this document and answer the question.\n\n{d}\n\nQuestion: {q}",
    "{d}\n\nQuestion: {q}",
    "{d}\n\n{q}",
    "Here is a text.\n\n{d}\n\n{q}",
    "Use this text to answer.\n\n{d}\n\nQuestion: {q}",
    "Document:\n{d}\n\nQuestion: {q}",
    "Please read the following.\n\n{d}\n\n{q}",
    "Text: {d}\n\nAnswer this: {q}",
    "I have a document for you.\n\n{d}\n\nPlease answer: {q}",
    "{q}\n\n{d}",
)
_SYSTEM = (
    "Answer from this document.\n\n{d}",
    "You answer questions about this document.\n\n{d}",
    "Use only this text to answer questions.\n\n{d}",
    "Document:\n{d}",
    "{d}",
)


@dataclass(frozen=True, slots=True)
class Document:
    """A text and questions whose answers are in it."""

    text: str
    questions: tuple[Exchange, ...]


def made_up_name(rng: Random) -> str:
    """A name that nobody has, of two or three syllables."""
    return capital("".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3))))


def _distinct(rng: Random, n: int, make: Callable[[Random], str]) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < n:
        found[make(rng)] = None
    return list(found)


def _person_name(rng: Random) -> str:
    return rng.choice(words.NAMES) if rng.random() < 0.5 else made_up_name(rng)


def _qa(rng: Random, asks: str, reply: str) -> Exchange:
    return Exchange("document", rng.choice([ask.strip() for ask in asks.split("|")]), reply)


def _people(rng: Random, facts: int) -> tuple[list[str], list[Exchange]]:
    """Who lives where, works as what, likes what, keeps how many of what."""
    names = _distinct(rng, max(1, facts // 2), _person_name)
    places = _distinct(rng, len(names), made_up_name)
    lines, questions = [], []
    for name, place in zip(names, places, strict=True):
        job, food, thing = rng.choice(words.JOBS), rng.choice(words.FOODS), rng.choice(words.THINGS)
        number = rng.randint(2, 99)
        choices = [
            (
                f"{name} is a {job} and lives in {place}.",
                [
                    _qa(rng, f"Where does {name} live? | In which place does {name} live? | {name} lives where?"
                        f" | What is the home town of {name}?", f"{name} lives in {place}."),
                    _qa(rng, f"What is the job of {name}? | What does {name} do for a living? | What is {name}'s job?"
                        f" | Which job does {name} have?", f"{name} is a {job}."),
                    _qa(rng, f"Who lives in {place}? | Which person lives in {place}? | Tell me who lives in {place}.",
                        f"{name} lives in {place}."),
                ],
            ),
            (
                f"{name} likes {food} and keeps {number} {thing}.",
                [
                    _qa(rng, f"What does {name} like? | What food does {name} like? | Which food does {name} like?"
                        f" | What does {name} like to eat?", f"{name} likes {food}."),
                    _qa(rng, f"How many {thing} does {name} keep? | How many {thing} does {name} have?"
                        f" | Tell me how many {thing} {name} keeps.", f"{name} keeps {number} {thing}."),
                    _qa(rng, f"What does {name} keep? | Which things does {name} keep?",
                        f"{name} keeps {number} {thing}."),
                ],
            ),
        ]  # fmt: skip
        for line, asks in choices if rng.random() < 0.6 else choices[:1]:
            lines.append(line)
            questions += asks
    absent = made_up_name(rng)
    if absent not in names and absent not in places:
        questions.append(
            _qa(rng, f"Where does {absent} live? | What does {absent} like? | Who lives in {absent}?", NOT_FOUND)
        )
    return lines, questions


def _warehouse(rng: Random, facts: int) -> tuple[list[str], list[Exchange]]:
    """What lies on which shelf."""
    shelves = _distinct(rng, facts + 1, lambda r: f"{r.choice('ABCDEFGHKLMNPRST')}-{r.randint(1, 99)}")
    absent = shelves.pop()
    lines, questions = [], []
    for shelf in shelves:
        goods = f"{rng.choice(words.MATERIALS)} {rng.choice(words.THINGS)}"
        number = rng.randint(2, 99)
        lines.append(rng.choice(("Shelf {s} holds {n} {g}.", "On shelf {s}"
            " there are {n} {g}.", "Shelf {s}: {n} {g}.")).format(
            s=shelf, n=number, g=goods))  # fmt: skip
        questions.append(
            _qa(rng, f"What is on shelf {shelf}? | What does shelf {shelf} hold? | What lies on shelf {shelf}?"
                f" | Shelf {shelf} holds what? | What can I find on shelf"
                f" {shelf}?", f"Shelf {shelf} holds {number} {goods}.")
        )  # fmt: skip
    questions.append(_qa(rng, f"What is on shelf {absent}? | What does shelf {absent} hold?", NOT_FOUND))
    return lines, questions


def _codes(rng: Random, facts: int) -> tuple[list[str], list[Exchange]]:
    """Code words and numbers of made-up projects."""
    names = _distinct(rng, facts + 1, made_up_name)
    absent = names.pop()
    lines, questions = [], []
    for name in names:
        code = f"{rng.choice(words.COMMON_WORDS)}-{rng.choice(words.COMMON_WORDS)}-{rng.randint(10, 99)}"
        lines.append(
            rng.choice(("The code word of {n} is {c}.", "The secret code of {n} is {c}.")).format(n=name, c=code)
        )
        questions.append(
            _qa(rng, f"What is the code word of {name}? | What is the code of {name}? | Which code does {name} have?"
                f" | What is the secret code of {name}? | Tell me the code word for"
                f" {name}.", f"The code of {name} is {code}.")
        )  # fmt: skip
    questions.append(_qa(rng, f"What is the code word of {absent}? | Which code does {absent} have?", NOT_FOUND))
    return lines, questions


def _journey(rng: Random, facts: int) -> tuple[list[str], list[Exchange]]:
    """A diary: where, on which day, what was eaten and seen."""
    places = _distinct(rng, facts + 1, made_up_name)
    absent = places.pop()
    lines, questions = [], []
    for day, place in enumerate(places, 1):
        food, sight = rng.choice(words.FOODS), f"{rng.choice(words.ADJECTIVES)} {rng.choice(stories.HEROES)}"
        lines.append(f"On day {day} we reached {place}, where we ate {food} and met a {sight}.")
        questions += [
            _qa(rng, f"Which place was reached on day {day}? | Where were they on day {day}? | What was reached"
                f" on day {day}?",
                f"On day {day} they reached {place}."),
            _qa(rng, f"What did they eat in {place}? | What was eaten in {place}? | Which food did they eat in"
                f" {place}?",
                f"In {place} they ate {food}."),
            _qa(rng, f"Who did they meet in {place}? | Whom did they meet in"
                f" {place}?", f"In {place} they met a {sight}."),
            _qa(rng, f"On which day did they reach {place}? | When did they reach {place}?",
                f"They reached {place} on day {day}."),
        ]  # fmt: skip
    questions.append(_qa(rng, f"What did they eat in {absent}? | When did they reach {absent}?", NOT_FOUND))
    return lines, questions


def draw(rng: Random, sentences: int) -> Document:
    """A document of about so many sentences (12 tokens each) and up to eight questions about it, in random order."""
    kind = rng.choice((_people, _warehouse, _codes, _journey))
    # from one needle in a haystack of filler to nothing but facts
    share = rng.choice((0.0, 0.1, 0.3, 0.6, 1.0))
    facts = max(1, min(int(sentences * share), 90))
    lines, questions = kind(rng, facts)
    ordered = kind is _journey
    filler = [rng.choice(_FILLER) for _ in range(max(0, sentences - len(lines)))]
    if filler and rng.random() < 0.4:
        filler = filler[: len(filler) // 2]
        while len(filler) + len(lines) < sentences:
            filler += stories.tell(rng, stories.draw_plot(rng)).split(". ")[:-1]
        filler = [line if line[-1] in '.!?"' else line + "." for line in filler]
    if ordered:
        places = sorted(rng.sample(range(len(lines) + len(filler)), len(lines)))
        text = list(filler)
        for place, line in zip(places, lines, strict=True):
            text.insert(place, line)
    else:
        text = lines + filler
        rng.shuffle(text)
    joined = ""
    for index, line in enumerate(text):
        joined += line if index == 0 else ("\n" if rng.random() < 0.15 else " ") + line
    rng.shuffle(questions)
    return Document(joined, tuple(questions[:8]))


def ask_in_user_turn(rng: Random, document: Document, question: Exchange) -> Exchange:
    """The document and the question in one user turn."""
    return Exchange(question.kind, rng.choice(_INSTRUCTIONS).format(d=document.text, q=question.ask), question.reply)


def system_prompt(rng: Random, document: Document) -> str:
    """The document as a system prompt, for questions in user turns."""
    return rng.choice(_SYSTEM).format(d=document.text)
