"""Short stories from a grammar, on request and as plain text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from microserve.tools.demo_model import words
from microserve.tools.demo_model.exchange import Exchange, article, capital, dress

if TYPE_CHECKING:
    from random import Random

HEROES = str.split(
    "fox|cat|dog|mouse|owl|rabbit|bear|hedgehog|duck|frog|horse|goat|squirrel|turtle|penguin|donkey|lion|wolf|bird|robot"
    "|dragon|giant|wizard|knight|princess|baker|fisher|gardener|clockmaker|sailor",
    "|",
)
_PLACES = (
    ("forest", "in a quiet forest"),
    ("village", "in a small village"),
    ("castle", "in an old castle"),
    ("island", "on a green island"),
    ("river", "by a slow river"),
    ("mountain", "on a high mountain"),
    ("city", "in a busy city"),
    ("garden", "in a wild garden"),
    ("sea", "by the cold sea"),
    ("library", "in a dusty library"),
    ("moon", "on the moon"),
    ("desert", "in a wide desert"),
)
_LOST = ("silver key", "red kite", "old map", "golden bell", "blue lantern", "small drum", "warm hat", "brass compass",
         "glass marble", "wooden flute", "green umbrella", "paper boat")  # fmt: skip
_LEARNED = ("play the violin", "bake bread", "read the stars", "build a boat", "sing in tune", "swim across the pond",
            "whistle like the wind", "draw maps", "repair clocks", "tell jokes")  # fmt: skip
_OBSTACLES = (
    "But a storm came, and the rain did not stop for three days.",
    "But the path was steep, and the night was very dark.",
    "But nobody knew the way, and the map was wet.",
    "But the bridge was broken, and the water was deep.",
    "But a thick fog came down, and all the lamps went out.",
    "But the first try failed, and so did the second.",
    "But the wind was strong and blew everything away.",
    "But it was winter, and the snow lay as high as a door.",
)
_HELP = (
    '"Do not worry," said {h2}. "I will help you."',
    '"Come with me," said {h2}. "Two see more than one."',
    '"I know what to do," said {h2}, and smiled.',
    '"Let us sit down and think," said {h2}.',
    '"First we eat," said {h2}, and shared some {food}.',
    '"You are not alone," said {h2}, and took {n} by the hand.',
)
_WORK = (
    "Together they walked until the morning.",
    "They worked all day and half the night.",
    "They asked everyone they met, and everyone helped a little.",
    "They tried again, slowly and with care.",
    "They built a small raft from branches and rope.",
    "They followed the stars, one step after another.",
    "They lit a fire, and the light showed them the way.",
)
_FOUND = ("under a stone", "in a hollow tree", "behind the door", "at the bottom of a basket", "in a bird nest")
_FEELINGS = ("happy", "proud", "thankful", "tired but happy", "full of joy", "glad")
_ENDINGS = (
    "That evening they danced until the moon came up.",
    "Since that day they have been the best of friends.",
    "They still tell the story when the nights are long.",
    "Then they had a big bowl of soup and slept well.",
    "And every year, on the same day, they meet again.",
    "And that is how a small deed became a big friendship.",
)
_MORALS = (
    "A friend makes every road shorter.",
    "Those who ask for help find it.",
    "Patience opens many doors.",
    "Small steps lead far.",
    "It is good to share.",
    "Courage grows when you use it.",
    "Kindness comes back to you.",
)
_OPENINGS = ("Once upon a time there was", "Long ago there was", "There once was", "Once there lived")
_MIDDAY = (
    "On the way they met {a3}, who gave them some {food}.",
    "In the afternoon they rested under a tree and listened to the birds.",
    "They passed a mill, a well and a field full of flowers.",
    "At noon the sun came out, and everything looked easier.",
    "They sang an old song to keep their spirits up.",
    "A cold wind blew, but they kept going.",
    "They crossed a narrow bridge, one after the other.",
)

_ASKS = (
    "Tell me a story about {a}.",
    "Tell me a short story about {a}.",
    "Write a story about {a}.",
    "Write a short story about {a}.",
    "Can you tell me a story about {a}?",
    "I would like a story about {a}.",
    "Please tell me a story about {a}.",
    "A story about {a}, please.",
    "Could you write a story about {a}?",
    "Make up a story about {a}.",
    "Invent a story about {a}.",
    "Do you know a story about {a}?",
    "Once upon a time story with {a}, please.",
)
_OPEN_ASKS = (
    "Tell me a story.",
    "Tell me a short story.",
    "Write a story.",
    "Can you tell me a story?",
    "I would like to hear a story.",
    "Please tell me a story.",
    "Another story, please.",
    "Do you know a story?",
    "I am bored. Tell me something.",
    "Write a short story.",
    "Story, please.",
    "Tell me a bedtime story.",
)
_CLAUSES = (" named {n}", " called {n}", " with the name {n}")


@dataclass(frozen=True, slots=True)
class Plot:
    """What a request fixes; the grammar fills in the rest."""

    hero: str
    name: str
    place: str
    where: str
    long: bool


def draw_plot(rng: Random) -> Plot:
    """A random plot."""
    place, where = rng.choice(_PLACES)
    return Plot(rng.choice(HEROES), rng.choice(words.NAMES), place, where, rng.random() < 0.2)


def tell(rng: Random, plot: Plot) -> str:
    """The story of a plot: 8 to 11 sentences, or 14 to 20 for a long one."""
    friend = rng.choice([hero for hero in HEROES if hero != plot.hero])
    friend_name = rng.choice([name for name in words.NAMES if name != plot.name])
    third = rng.choice([hero for hero in HEROES if hero not in (plot.hero, friend)])
    fill = {
        "n": plot.name,
        "h2": friend_name,
        "a3": article(third),
        "food": rng.choice(words.FOODS),
    }
    adjective = rng.choice(words.ADJECTIVES)
    lost = rng.random() < 0.6
    treasure, skill = rng.choice(_LOST), rng.choice(_LEARNED)
    parts = [f"{rng.choice(_OPENINGS)} {article(adjective)} {plot.hero} named {plot.name} who lived {plot.where}."]
    if lost:
        parts.append(f"One morning {plot.name} could not find the {treasure}.")
        parts.append(rng.choice((f"{plot.name} looked everywhere.", f"{plot.name} searched the whole house.")))
    else:
        parts.append(f"More than anything, {plot.name} wanted to learn to {skill}.")
        parts.append(rng.choice((f"{plot.name} practised every day.", f"{plot.name} dreamed of it every night.")))
    parts.append(rng.choice(_OBSTACLES))
    parts.append(f"Then {plot.name} met {friend_name}, {article(rng.choice(words.ADJECTIVES))} {friend}.")
    parts.append(rng.choice(_HELP).format(**fill))
    parts.append(rng.choice(_WORK))
    if plot.long:
        parts += [line.format(**fill) for line in rng.sample(_MIDDAY, rng.randint(4, len(_MIDDAY)))]
        parts.append(f'"{rng.choice(_MORALS)[:-1]}," said {friend_name}, and {plot.name} nodded.')
    if lost:
        parts.append(f"At last {plot.name} found the {treasure} {rng.choice(_FOUND)}.")
    else:
        parts.append(f"At last {plot.name} could {skill}.")
    parts.append(f"{plot.name} was {rng.choice(_FEELINGS)}.")
    parts.append(rng.choice(_ENDINGS))
    if rng.random() < 0.3:
        parts.append(rng.choice(_MORALS))
    return " ".join(parts)


def draw(rng: Random) -> Exchange:
    """A request for a story: open, or about a hero, a name or a place; long when asked."""
    plot = draw_plot(rng)
    if rng.random() < 0.3:
        ask = rng.choice(_OPEN_ASKS)
        if plot.long:
            ask = rng.choice(("Tell me a long story.", "Write a long story.", "Please tell me a long story."))
    else:
        about = article(plot.hero)
        if rng.random() < 0.4:
            about += rng.choice(_CLAUSES).format(n=plot.name)
        if rng.random() < 0.2:
            about += f" {plot.where}"
        ask = rng.choice(_ASKS).format(a=about)
        if plot.long:
            ask = ask.replace("short ", "").replace("a story", "a long story").replace("A story", "A long story")
            ask = ask if "long" in ask else ask + " Make it long."
    return Exchange("story", dress(rng, capital(ask)), tell(rng, plot))
