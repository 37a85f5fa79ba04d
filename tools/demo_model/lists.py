"""Counting, sorting, reversing, repeating, spelling and rephrasing: answers that are computed from the question."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.tools.demo_model import categories, words
from microserve.tools.demo_model.exchange import Exchange, capital, dress
from microserve.tools.demo_model.relations import RELATIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random


def _choice(rng: Random, text: str) -> str:
    return rng.choice([part.strip() for part in text.split("|")])


def _comma(items: Sequence[object]) -> str:
    return ", ".join(str(item) for item in items)


def count_range(rng: Random) -> Exchange:
    """Count from a to b, in steps or backwards; now and then as far as 100 numbers."""
    long = rng.random() < 0.15
    length = rng.randint(20, 100) if long else rng.randint(2, 15)
    start = rng.choice((0, 1, 1, 1, rng.randint(0, 60))) if long else rng.randint(0, 90)
    step = 1 if long else rng.choice((1, 1, 1, 1, 2, 5, 10))
    numbers = list(range(start, start + length * step, step))
    if len(numbers) == 100 and start == 0:
        numbers = [*numbers[1:], 100]
    backwards = rng.random() < 0.2
    if backwards:
        numbers.reverse()
    a, b = numbers[0], numbers[-1]
    by = {1: "", 2: " by twos", 5: " by fives", 10: " by tens"}[step]
    back = rng.choice((" backwards", " down")) if backwards else ""
    ask = _choice(
        rng,
        "Count{back} from {a} to {b}{by}. | Please count{back} from {a} to {b}{by}. | Can you count{back} from"
        " {a} to {b}{by}?"
        " | Count{back}{by} from {a} to {b}. | List the numbers{back} from {a} to {b}{by}. | Say the numbers{back} from"
        " {a} to {b}{by}. | Write the numbers{back} from {a} to {b}{by}. | I want you to count{back} from {a} to"
        " {b}{by}."
        " | Start at {a} and count{back} to {b}{by}. | Give me the numbers{back} from {a} to {b}{by}.",
    ).format(a=a, b=b, by=by, back=back)
    if a == 1 and step == 1 and not backwards and rng.random() < 0.5:
        ask = _choice(rng, "Count to {b}. | Count up to {b}. | Please count to {b}. | Can you count to {b}?").format(
            b=b
        )
    return Exchange("list/count", dress(rng, ask), _comma(numbers) + ".")


def how_many(rng: Random) -> Exchange:
    """How many items a list has."""
    items = rng.sample(words.COMMON_WORDS, rng.randint(1, 9))
    n = len(items)
    ask = _choice(
        rng,
        "How many items are in this list: {l}? | How many words are here: {l} | Count the words: {l} | Count"
        " these: {l}."
        " | How many things are in the list {l}? | Count the items: {l}. | How many are these: {l}? | {l}: how"
        " many items?"
        " | How many items does this list have: {l} | Please count the items in this list: {l}.",
    ).format(l=_comma(items))
    reply = f"There are {n} items in the list." if n > 1 else "There is 1 item in the list."
    return Exchange("list/how-many", dress(rng, ask), reply, str(n))


def sort_numbers(rng: Random) -> Exchange:
    """Sort three to seven numbers up or down."""
    numbers = rng.sample(range(rng.choice((10, 100, 100))), rng.randint(3, 7))
    down = rng.random() < 0.3
    order = (
        _choice(rng, "from largest to smallest | in descending order | from high to low | largest first")
        if down
        else _choice(rng, "from smallest to largest | in ascending order | from low to high | smallest first | ")
    )
    ask = _choice(
        rng,
        "Sort these numbers {o}: {l} | Sort {o}: {l} | Put these numbers in order {o}: {l} | Please sort {l} {o}."
        " | Order the numbers {l} {o}. | Can you sort {l} {o}? | Sort {l} {o}. | Sort the list {l} {o}."
        " | Arrange these numbers {o}: {l} | Write these numbers {o}: {l}",
    ).format(o=order, l=_comma(numbers))
    ask = ask.replace("  ", " ").replace(" :", ":").replace(" .", ".").replace(" ?", "?")
    return Exchange("list/sort-numbers", dress(rng, ask), _comma(sorted(numbers, reverse=down)) + ".")


def extreme(rng: Random) -> Exchange:
    """The largest, smallest, first or last of a list of numbers."""
    numbers = rng.sample(range(100), rng.randint(3, 6))
    word, value = rng.choice(
        (
            ("largest", max(numbers)),
            ("biggest", max(numbers)),
            ("smallest", min(numbers)),
            ("first", numbers[0]),
            ("last", numbers[-1]),
        )
    )
    ask = _choice(
        rng,
        "What is the {w} number of {l}? | Which is the {w} of these numbers: {l}? | Find the {w} number: {l}"
        " | Which number is the {w}: {l}? | Tell me the {w} of {l}. | The {w} number in {l}?"
        " | What is the {w} number in this list: {l}",
    ).format(w=word, l=_comma(numbers))
    return Exchange(
        "list/extreme", dress(rng, ask), f"The {'largest' if word == 'biggest' else word} number is {value}."
    )


def sort_words(rng: Random) -> Exchange:
    """Sort three to six common words by the alphabet."""
    items = rng.sample(words.COMMON_WORDS, rng.randint(3, 6))
    ask = _choice(
        rng,
        "Sort these words: {l} | Sort these words alphabetically: {l} | Put these words in alphabetical order: {l}"
        " | Sort by the alphabet: {l} | Please sort the words {l}. | Sort {l}. | Can you sort {l} alphabetically?"
        " | Alphabetical order: {l} | Arrange these words from A to Z: {l} | Order these words: {l}",
    ).format(l=_comma(items))
    return Exchange("list/sort-words", dress(rng, ask), _comma(sorted(items)) + ".")


def reverse_list(rng: Random) -> Exchange:
    """The same list from back to front."""
    pool = rng.choice((words.COMMON_WORDS, words.NAMES, words.COLOUR_NAMES, tuple(str(n) for n in range(100))))
    items = rng.sample(pool, rng.randint(2, 7))
    ask = _choice(
        rng,
        "Reverse this list: {l} | Reverse the list {l}. | Please reverse: {l} | Write this list backwards: {l}"
        " | Turn this list around: {l} | Say these in reverse order: {l} | Can you reverse {l}? | Reverse: {l}"
        " | List these from last to first: {l} | Give me this list in reverse: {l}",
    ).format(l=_comma(items))
    return Exchange("list/reverse", dress(rng, ask), _comma(items[::-1]) + ".")


_LETTER_BLOCKS = ((0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x4E00, 0x4FFF), (0x3041, 0x3093), (0x1F600, 0x1F64F))


def odd_text(rng: Random) -> str:
    """A few made-up words, now and then from another script, so that copying works for any bytes."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        draw = rng.random()
        if draw < 0.45:
            parts.append("".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8))))
        elif draw < 0.6:
            parts.append(
                "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") for _ in range(rng.randint(2, 8)))
            )
        else:
            low, high = rng.choice(_LETTER_BLOCKS)
            parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4))))
    return " ".join(parts)


def plain_text(rng: Random) -> str:
    """A few common words in any order, small ones among them, or a known sentence."""
    draw = rng.random()
    if draw < 0.25:
        return " ".join(rng.choices(words.COMMON_WORDS, k=rng.randint(1, 10)))
    if draw < 0.75:
        text = " ".join(rng.choices(words.SMALL_WORDS, k=rng.randint(1, 10)))
        return capital(text) + rng.choice(("", ".", "!", "?")) if rng.random() < 0.4 else text
    relation = rng.choice(RELATIONS)
    return relation.sentence(*rng.choice(relation.pairs))


def repeat(rng: Random) -> Exchange:
    """Say a text again, unchanged."""
    text = odd_text(rng) if rng.random() < 0.5 else plain_text(rng)
    ask = _choice(
        rng,
        "Repeat after me: {t} | Repeat: {t} | Say: {t} | Please repeat this: {t} | Echo: {t} | Say this: {t} |"
        " Copy this: {t}"
        " | Repeat this text: {t} | Can you repeat this? {t} | Write exactly this: {t} | Say exactly: {t} | Echo"
        " this: {t} | Say '{t}' | Say \"{t}\" | Repeat '{t}' | Repeat \"{t}\" | Say {t} | Please say {t} | Repeat {t}"
        ' | Write {t} | Please repeat "{t}" | Say "{t}", please. | Say: \'{t}\' | Say the words {t} | Say this:'
        ' "{t}"'
        " | Just say {t} | Say {t}",
    ).format(t=text)
    return Exchange("list/repeat", ask, text)


def spell_word(rng: Random) -> Exchange:
    """Spell a word with hyphens, or name its first or last letter, or count its letters."""
    word = rng.choice(words.COMMON_WORDS)
    draw = rng.random()
    if draw < 0.4:
        ask = _choice(
            rng, "Spell {w}. | Spell the word {w}. | How do you spell {w}? | Please spell {w}. | Can you spell {w}?"
        )
        reply = "-".join(word.upper()) + "."
    elif draw < 0.6:
        ask = _choice(
            rng, "What is the first letter of {w}? | First letter of {w}? | Which letter does {w} begin with?"
        )
        reply = f"The first letter of {word} is {word[0].upper()}."
    elif draw < 0.8:
        ask = _choice(rng, "What is the last letter of {w}? | Last letter of {w}? | Which letter does {w} end with?")
        reply = f"The last letter of {word} is {word[-1].upper()}."
    else:
        ask = _choice(rng, "How many letters are in {w}? | How many letters does {w} have? | Count the letters of {w}.")
        reply = f"The word {word} has {len(word)} letters."
    return Exchange("list/spell", dress(rng, ask.format(w=word)), reply)


def change_case(rng: Random) -> Exchange:
    """A few common words in upper case, or back in lower case."""
    text = " ".join(rng.sample(words.COMMON_WORDS, rng.randint(1, 4)))
    if rng.random() < 0.7:
        ask = _choice(
            rng,
            "Write this in upper case: {t} | Put this in capitals: {t} | Upper case: {t} | Make this upper case: {t}"
            " | Please write {t} in capital letters. | Capitalise {t}. | Convert to upper case: {t} | Shout: {t}",
        ).format(t=text)
        return Exchange("list/upper", ask, text.upper())
    ask = _choice(
        rng, "Write this in lower case: {t} | Lower case: {t} | Make this lower case: {t} | Convert to lower case: {t}"
    )
    return Exchange("list/lower", ask.format(t=text.upper()), text)


_DEEDS = str.split(
    "open the door|close the window|give me the cup|pass the salt|bring the book|wait for me|turn on the lamp"
    "|help me with the boxes|tell me a story|show me the map|carry the basket|clean the table|call the"
    " doctor|feed the cat"
    "|water the flowers|sing a song|write a letter|find my keys|light the candle|come to the garden|paint the fence",
    "|",
)


def polite(rng: Random) -> Exchange:
    """An order as a polite request."""
    deed = rng.choice(_DEEDS)
    ask = _choice(
        rng,
        "Rephrase politely: {D}. | Say this politely: {D}. | Make this polite: {D}! | Turn this into a polite"
        " request: {D}."
        " | How do I say this politely: {D}? | Please rephrase this politely: {D}. | Make it friendly: {D}!",
    ).format(D=capital(deed))
    return Exchange("list/polite", ask, f"Could you please {deed}?")


_SCENES = (
    ("{n} is in the {p}.", "Is {n} in the {p}?", "{n} is not in the {p}."),
    ("{n} likes {f}.", "Does {n} like {f}?", "{n} does not like {f}."),
    ("{n} has a {w}.", "Does {n} have a {w}?", "{n} does not have a {w}."),
    ("{n} is a {j}.", "Is {n} a {j}?", "{n} is not a {j}."),
    ("{n} can swim.", "Can {n} swim?", "{n} cannot swim."),
    ("The {w} is {c}.", "Is the {w} {c}?", "The {w} is not {c}."),
)
_ROOMS = ("garden", "kitchen", "market", "library", "forest", "harbour", "school", "tower", "station", "village")
_PLAIN_THINGS = ("boat", "book", "kite", "lamp", "drum", "hat", "coat", "bell", "map", "key", "mirror", "wagon")


def rephrase(rng: Random) -> Exchange:
    """A statement as a question or in the negative."""
    statement, question, negative = rng.choice(_SCENES)
    fill = {
        "n": rng.choice(words.NAMES),
        "p": rng.choice(_ROOMS),
        "f": rng.choice(words.FOODS),
        "w": rng.choice(_PLAIN_THINGS),
        "j": rng.choice(words.JOBS),
        "c": rng.choice(words.COLOUR_NAMES),
    }
    if rng.random() < 0.5:
        ask = _choice(rng, "Make this a question: {s} | Turn this into a question: {s} | Rephrase as a question: {s}")
        reply = question.format(**fill)
    else:
        ask = _choice(
            rng, "Negate this: {s} | Make this negative: {s} | Say the opposite of this: {s} | Deny this: {s}"
        )
        reply = negative.format(**fill)
    return Exchange("list/rephrase", ask.format(s=statement.format(**fill)), reply)


_GENERATORS: tuple[tuple[Callable[[Random], Exchange], float], ...] = (
    (count_range, 2.0),
    (how_many, 1.5),
    (sort_numbers, 2.5),
    (extreme, 1.0),
    (sort_words, 2.0),
    (reverse_list, 1.5),
    (repeat, 3.0),
    (spell_word, 1.0),
    (change_case, 1.0),
    (polite, 0.5),
    (rephrase, 1.0),
    (categories.draw, 1.5),
)


def draw(rng: Random) -> Exchange:
    """A random task of this module."""
    generator = rng.choices([one for one, _ in _GENERATORS], [weight for _, weight in _GENERATORS])[0]
    return generator(rng)
