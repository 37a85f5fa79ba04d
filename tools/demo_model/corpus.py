"""Conversations from all generators: single questions, mixed chats, personas, memory, documents, and plain stories.

`python -m microserve.tools.demo_model.corpus --samples 20` prints some. Everything follows from the seed.
"""

from __future__ import annotations

import argparse
import math
from random import Random

from microserve.tools.demo_model import documents, facts, json_tasks, lists, smalltalk, stories, sums, tables, words
from microserve.tools.demo_model.exchange import Dialog, Exchange, Message, Split, capital, dress

GENERIC_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a helpful, honest assistant.",
    "You are a kind and helpful assistant. Keep your answers short.",
    "You are an assistant that answers questions.",
    "Answer the questions of the user.",
    "Be helpful and friendly.",
    "Be brief.",
    "You are a chat assistant.",
    "Help the user.",
    "You are a helpful AI assistant.",
    "Answer in English.",
    "You are the microserve demo model.",
    "You are a careful assistant. If you do not know something, say so.",
    "You are a small and polite assistant.",
    "Please answer every question as well as you can.",
    "You are talking with a visitor of our demo.",
)
SHORT_SYSTEM = (
    "Answer with one word.",
    "Reply with just the answer.",
    "You answer in one word.",
    "Give only the answer, no sentence.",
    "Be very brief: only the answer.",
    "Answer with the bare answer and nothing else.",
)
SHORT_REQUESTS = (
    " Just the answer.",
    " Answer with one word.",
    " Only the answer, please.",
    " One word, please.",
    " Give only the answer.",
    " No sentence, just the answer.",
)
_PERSONAS = (
    "You are {n}, a {a} {j}.",
    "Your name is {n}. You are a {a} {j}.",
    "You are {n}, a {j} who is {a}.",
    "You play {n}, a {a} {j}.",
    "Act as {n}, a {a} {j}.",
    "Pretend to be {n}, a {a} {j}.",
)
_WHO_ASKS = (
    "Who are you?",
    "What is your name?",
    "What's your name?",
    "Introduce yourself.",
    "Tell me about yourself.",
    "Hello! Who are you?",
    "Do you have a name?",
    "Who am I talking to?",
    "What are you?",
)
_JOB_ASKS = ("What is your job?", "What do you do?", "What do you do for a living?", "What is your work?")
_SIGN_OFFS = (
    "End every answer with the word {w}.",
    "Always end your answers with {w}.",
    "You end each answer with the word {w}.",
    "Finish every reply with {w}.",
)

# what the user says about himself, how the model takes it, how it is asked for, how it is recalled
_MEMORIES: tuple[tuple[str, str, str, str], ...] = (
    (
        "My name is {v}.|I am {v}.|I'm {v}.|Hi, I'm {v}.|Hello, my name is {v}.|Call me {v}.|You can call me {v}."
        "|Hello! I am {v}.|Hi! My name is {v}. Nice to meet you.|Please call me {v}.",
        "Nice to meet you, {v}!",
        "What is my name?|What's my name?|Do you remember my name?|Who am I?|Tell me my name.|Say my name."
        "|Do you know my name?|Can you tell me my name?|Which name do I have?|Remember my name?",
        "Your name is {v}.",
    ),
    (
        "My favourite colour is {v}.|I like {v} best of all colours.|The colour I like best is {v}.|My favorite"
        " color is {v}.",
        "{V} is a nice colour.",
        "What is my favourite colour?|Which colour do I like?|What's my favorite color?|Do you remember my"
        " favourite colour?",
        "Your favourite colour is {v}.",
    ),
    (
        "I live in {v}.|My home is in {v}.|I come from {v}.|I am from {v}.",
        "{v} sounds like a nice place.",
        "Where do I live?|Where am I from?|Do you remember where I live?|In which place do I live?|Where is my home?",
        "You live in {v}.",
    ),
    (
        "I have a dog called {v}.|My dog is called {v}.|The name of my dog is {v}.|My dog's name is {v}.",
        "{v} is a good name for a dog.",
        "What is the name of my dog?|What is my dog called?|How is my dog called?|Do you remember the name of my dog?",
        "Your dog is called {v}.",
    ),
    (
        "I work as a {v}.|I am a {v}.|My job is {v}.|By trade I am a {v}.",
        "That is a fine job.",
        "What is my job?|What do I do for a living?|What is my work?|Do you remember my job?",
        "You are a {v}.",
    ),
    (
        "Remember the number {v}.|My lucky number is {v}.|The number is {v}.|Please keep the number {v} in mind.",
        "I will remember the number {v}.",
        "What is the number?|Which number did I tell you?|What number should you remember?|Do you remember the number?"
        "|What is my number?",
        "The number is {v}.",
    ),
    (
        "Remember the word {v}.|The secret word is {v}.|Please remember this word: {v}.|The password is {v}.",
        "I will remember the word {v}.",
        "What is the word?|Which word did I tell you?|What is the secret word?|What is the password?|Do you"
        " remember the word?",
        "The word is {v}.",
    ),
)
NOT_TOLD = "You have not told me that yet."


def single(rng: Random, split: Split = Split.TRAIN) -> Exchange:
    """One question of any kind that needs no context."""
    draw = rng.random()
    if draw < 0.36:
        return facts.draw(rng, split)[1]
    if draw < 0.6:
        return sums.draw(rng, split)
    if draw < 0.76:
        return lists.draw(rng)
    if draw < 0.87:
        return json_tasks.draw(rng, split)
    if draw < 0.97:
        return smalltalk.draw(rng)
    return stories.draw(rng)


def _messages(exchanges: list[Exchange], system: str | None = None) -> tuple[Message, ...]:
    turns = [Message("system", system)] if system else []
    for exchange in exchanges:
        turns += [Message("user", exchange.ask), Message("assistant", exchange.reply)]
    return tuple(turns)


def chat(rng: Random) -> Dialog:
    """One to six questions; facts and sums now and then get follow-ups."""
    exchanges: list[Exchange] = []
    turns = rng.choice((1, 1, 1, 1, 1, 2, 2, 3, 4, 6))
    while len(exchanges) < turns:
        draw = rng.random()
        if draw < 0.12:
            relation, exchange = facts.draw(rng)
            exchanges += [exchange, *(facts.follow_up(rng, relation) for _ in range(rng.randint(1, 2)))]
        elif draw < 0.18:
            exchange = sums.draw(rng)
            exchanges.append(exchange)
            value = int(exchange.value) if exchange.value.lstrip("-").isdigit() else -1
            follow = sums.follow_up(rng, value)
            if follow is not None and exchange.kind != "sum/comparison":
                exchanges.append(follow)
        else:
            exchanges.append(single(rng))
    system = rng.choice(GENERIC_SYSTEM) if rng.random() < 0.4 else None
    return Dialog("chat", _messages(exchanges, system))


def terse(rng: Random) -> Dialog:
    """Bare answers because the system prompt or the question asks for them."""
    by_system = rng.random() < 0.6
    exchanges = []
    for _ in range(rng.randint(1, 3)):
        exchange = facts.draw(rng)[1] if rng.random() < 0.7 else sums.draw(rng)
        if not exchange.value or exchange.kind == "fact/glossary":
            continue
        ask = exchange.ask if by_system else exchange.ask + rng.choice(SHORT_REQUESTS)
        exchanges.append(Exchange("terse", ask, capital(exchange.value)))
    if not exchanges:
        return chat(rng)
    system = rng.choice(SHORT_SYSTEM) if by_system else (rng.choice(GENERIC_SYSTEM) if rng.random() < 0.3 else None)
    return Dialog("terse", _messages(exchanges, system))


def persona(rng: Random) -> Dialog:
    """A name and a job from the system prompt, and ordinary questions around them."""
    name = rng.choice(words.NAMES) if rng.random() < 0.6 else documents.made_up_name(rng)
    job, adjective = rng.choice(words.JOBS), rng.choice(words.ADJECTIVES)
    system = rng.choice(_PERSONAS).format(n=name, j=job, a=adjective)
    if rng.random() < 0.3:
        system += " " + rng.choice(GENERIC_SYSTEM[2:13])
    exchanges = [Exchange("persona", dress(rng, rng.choice(_WHO_ASKS)), f"I am {name}, a {adjective} {job}.")]
    if rng.random() < 0.4:
        exchanges.append(Exchange("persona", dress(rng, rng.choice(_JOB_ASKS)), f"I am a {job}."))
    exchanges += [single(rng) for _ in range(rng.randint(0, 2))]
    rng.shuffle(exchanges)
    clean = [e for e in exchanges if e.kind == "persona" or e.reply != smalltalk.WHO]
    return Dialog("persona", _messages(clean, system))


def sign_off(rng: Random) -> Dialog:
    """A word from the system prompt at the end of every answer."""
    word = rng.choice(words.COMMON_WORDS)
    exchanges = []
    for _ in range(rng.randint(1, 3)):
        exchange = facts.draw(rng)[1] if rng.random() < 0.6 else smalltalk.draw(rng)
        exchanges.append(Exchange("sign-off", exchange.ask, f"{exchange.reply} {capital(word)}!"))
    return Dialog("sign-off", _messages(exchanges, rng.choice(_SIGN_OFFS).format(w=word)))


def _memory_value(rng: Random, index: int) -> str:
    if index == 1:
        return rng.choice(words.COLOUR_NAMES)
    if index == 2:
        return rng.choice(tables.COUNTRIES)[1] if rng.random() < 0.5 else documents.made_up_name(rng)
    if index == 4:
        return rng.choice(words.JOBS)
    if index == 5:
        return str(rng.randint(2, 999))
    if index == 6:
        return rng.choice(words.COMMON_WORDS)
    return rng.choice(words.NAMES) if rng.random() < 0.5 else documents.made_up_name(rng)


def memory(rng: Random) -> Dialog:
    """Something that the user said earlier, asked for after other turns; or asked for though never said."""
    indices = rng.sample(range(len(_MEMORIES)), rng.choice((1, 1, 2, 3)))
    told: list[Exchange] = []
    asked: list[Exchange] = []
    for index in indices:
        says, takes, asks, recalls = _MEMORIES[index]
        value = _memory_value(rng, index)
        told.append(
            Exchange("memory", rng.choice(says.split("|")).format(v=value), takes.format(v=value, V=capital(value)))
        )
        ask = dress(rng, rng.choice(asks.split("|")))
        if rng.random() < 0.1:
            told.pop()
            asked.append(Exchange("memory", ask, NOT_TOLD))
        else:
            asked.append(Exchange("memory", ask, recalls.format(v=value)))
    between = [single(rng) for _ in range(rng.choice((0, 0, 1, 2, 3)))]
    rng.shuffle(asked)
    system = rng.choice(GENERIC_SYSTEM) if rng.random() < 0.3 else None
    return Dialog("memory", _messages(told + between + asked, system))


def document(rng: Random, sentences: int) -> Dialog:
    """A document and several questions about it, with the document in the first user turn or in the system prompt."""
    made = documents.draw(rng, sentences)
    questions = list(made.questions)
    if rng.random() < 0.3:
        return Dialog("document", _messages(questions, documents.system_prompt(rng, made)))
    questions[0] = documents.ask_in_user_turn(rng, made, questions[0])
    system = rng.choice(GENERIC_SYSTEM) if rng.random() < 0.3 else None
    return Dialog("document", _messages(questions, system))


def plain_story(rng: Random) -> Dialog:
    """A story without a chat around it: one assistant turn and no user (see `train.encode`)."""
    return Dialog("plain", (Message("assistant", stories.tell(rng, stories.draw_plot(rng))),))


def draw(rng: Random, longest: int) -> Dialog:
    """A conversation of any kind; documents have up to `longest` sentences (12 tokens each)."""
    kind = rng.random()
    if kind < 0.66:
        return chat(rng)
    if kind < 0.72:
        return terse(rng)
    if kind < 0.77:
        return persona(rng)
    if kind < 0.80:
        return sign_off(rng)
    if kind < 0.88:
        return memory(rng)
    if kind < 0.90:
        return plain_story(rng)
    # log-uniform, so that short texts are as usual as long ones
    return document(rng, round(2 ** rng.uniform(1, math.log2(longest))))


def main() -> None:
    """Print samples."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--samples", type=int, default=10, help="how many conversations (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="seed (default 1)")
    parser.add_argument("--longest", type=int, default=40, help="sentences of the longest document (default 40)")
    arguments = parser.parse_args()
    rng = Random(arguments.seed)
    for _ in range(arguments.samples):
        dialog = draw(rng, arguments.longest)
        print(f"--- {dialog.kind}")
        for message in dialog.messages:
            print(f"{message.role}: {message.content}")


if __name__ == "__main__":
    main()
