"""Measure the demo model on held-out questions: unseen phrasings, unseen number pairs, new documents and chats.

`python -m microserve.tools.demo_model.evaluate` reads the bundled checkpoint as float32, answers greedily with
`transformers`, prints a table and writes JSON on request. An answer counts only if it is equal to the expected text
and the model stopped by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM

from microserve.tools.demo_model import corpus, json_tasks, lists, smalltalk, stories, sums
from microserve.tools.demo_model.batches import encode_prompt
from microserve.tools.demo_model.exchange import Dialog, Exchange, Message, Split
from microserve.tools.demo_model.model import CONTEXT, END_ID, PAD_ID
from microserve.tools.demo_model.relations import RELATIONS
from microserve.tools.demo_model.tokenizer import BUNDLED, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tokenizers import Tokenizer

TARGETS = {"facts": 0.95, "add": 0.90, "subtract": 0.90, "json valid": 0.95}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote, and whether it stopped by itself."""

    text: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class Score:
    """One line of the table."""

    name: str
    questions: int
    exact: float
    stopped: float


def _ask(exchange: Exchange, system: str | None = None) -> Dialog:
    head = (Message("system", system),) if system else ()
    return Dialog(exchange.kind, (*head, Message("user", exchange.ask), Message("assistant", exchange.reply)))


def _last_turn(make: Callable[[Random], Dialog], rng: Random, n: int) -> list[Dialog]:
    return [make(rng) for _ in range(n)]


def question_sets(tokenizer: Tokenizer, seed: int, size: int) -> dict[str, list[Dialog]]:
    """Dialogs by set; each ends with the expected answer. Facts: every pair of every relation once."""
    rng = Random(f"{seed}/evaluate")
    held = Split.HELD_OUT
    sets: dict[str, list[Dialog]] = {
        "facts": [_ask(relation.exchange(rng, held, pair)) for relation in RELATIONS for pair in relation.pairs],
        "add": [_ask(sums.two_digit(rng, sums.ADD, held)) for _ in range(size)],
        "subtract": [_ask(sums.two_digit(rng, sums.SUBTRACT, held)) for _ in range(size)],
        "json": [_ask(json_tasks.draw(rng, held)) for _ in range(size)],
        "lists": [_ask(lists.draw(rng)) for _ in range(size)],
        "chat, last turn": _last_turn(corpus.chat, rng, size),
        "memory": _last_turn(corpus.memory, rng, size // 2),
        "persona": _last_turn(corpus.persona, rng, size // 2),
        "bare answers": _last_turn(corpus.terse, rng, size // 2),
        "sign-off": _last_turn(corpus.sign_off, rng, size // 2),
        "says it does not know": [_ask(smalltalk.unknown(rng)) for _ in range(size // 2)],
    }
    for tokens in (500, 1000, 2000, 3500):
        sets[f"documents of about {tokens:,} tokens"] = document_questions(tokenizer, rng, tokens, max(1, size // 4))
    return sets


def document_questions(tokenizer: Tokenizer, rng: Random, tokens: int, n: int) -> list[Dialog]:
    """Single questions about documents, whose prompts are within a tenth of so many tokens."""
    dialogs: list[Dialog] = []
    while len(dialogs) < n:
        dialog = _single_question(corpus.document(rng, rng.randint(tokens // 28, tokens // 9)))
        if 0.9 * tokens < len(encode_prompt(tokenizer, dialog.messages[:-1])) <= 1.1 * tokens:
            dialogs.append(dialog)
    return dialogs


def _single_question(dialog: Dialog) -> Dialog:
    """The document and its first question alone."""
    end = next(i for i, message in enumerate(dialog.messages) if message.role == "assistant")
    return Dialog("document", dialog.messages[: end + 1])


class Model:
    """A checkpoint as float32 with its tokenizer, answering batches greedily."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        self.tokenizer: Tokenizer = load(folder)
        model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def answers(self, prompts: Sequence[Sequence[Message]], limit: int, tokens_a_batch: int = 32_768) -> list[Answer]:
        """One greedy answer of at most `limit` tokens for each prompt, in order."""
        encoded = [encode_prompt(self.tokenizer, prompt)[-(CONTEXT - limit) :] for prompt in prompts]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        found: dict[int, Answer] = {}
        while order:
            width = len(encoded[order[0]])
            chosen = [i for n, i in enumerate(order) if (n + 1) * (len(encoded[i]) + limit) <= tokens_a_batch][
                :256
            ] or order[:1]
            order = order[len(chosen) :]
            width = max(len(encoded[i]) for i in chosen)
            ids = torch.full((len(chosen), width), PAD_ID)
            attention = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
                attention[row, width - len(encoded[i]) :] = 1
            written = self.model.generate(
                ids.to(self.device), attention_mask=attention.to(self.device), max_new_tokens=limit, do_sample=False
            )[:, width:].tolist()
            for row, i in enumerate(chosen):
                stopped = END_ID in written[row]
                body = written[row][: written[row].index(END_ID)] if stopped else written[row]
                found[i] = Answer(self.tokenizer.decode(body), stopped)
        return [found[i] for i in range(len(encoded))]


def is_json(text: str) -> bool:
    """Whether a text is valid JSON and an object or an array."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except json.JSONDecodeError:
        return False


def score(name: str, right: Iterable[bool], answers: Sequence[Answer]) -> Score:
    """Shares of right and of stopped answers."""
    marks = list(right)
    n = len(marks)
    return Score(name, n, sum(marks) / n, sum(answer.stopped for answer in answers) / n)


def evaluate(model: Model, seed: int, size: int, misses: int) -> list[Score]:
    """All sets; prints up to `misses` wrong answers of each."""
    scores: list[Score] = []
    for name, dialogs in question_sets(model.tokenizer, seed, size).items():
        expected = [dialog.messages[-1].content for dialog in dialogs]
        limit = max(64, max(len(model.tokenizer.encode(text).ids) for text in expected) + 24)
        answers = model.answers([dialog.messages[:-1] for dialog in dialogs], limit)
        right = [answer.stopped and answer.text == text for answer, text in zip(answers, expected, strict=True)]
        if name == "json":
            scores.append(score("json valid", [a.stopped and is_json(a.text) for a in answers], answers))
            name = "json exact"
        if name == "chat, last turn":  # stories are free: they only have to end
            right = [r or (a.stopped and len(text) > 300) for r, a, text in zip(right, answers, expected, strict=True)]
        scores.append(score(name, right, answers))
        print(f"{name}: {scores[-1].exact:.1%} of {len(dialogs)}", flush=True)
        wrong: dict[str, list[str]] = defaultdict(list)
        for dialog, answer, ok in zip(dialogs, answers, right, strict=True):
            if not ok:
                wrong[dialog.kind].append(f"{dialog.messages[-2].content[-90:]!r} -> {answer.text[:90]!r}")
        for kind, lines in sorted(wrong.items(), key=lambda item: -len(item[1])):
            for line in lines[: max(1, misses // len(wrong))] if misses else []:
                print(f"    {kind} ({len(lines)}): {line}")
    rng = Random(f"{seed}/stories")
    asks = [stories.draw(rng).ask for _ in range(max(1, size // 10))]
    told = model.answers([[Message("user", ask)] for ask in asks], 600)
    scores.append(score("stories end by themselves", [a.stopped and len(a.text) > 100 for a in told], told))
    return scores


def main() -> int:
    """Evaluate a checkpoint; the exit status is 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED, help="folder of the model (default: the bundled one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=2, help="seed of the questions (default 2; training used 1)")
    parser.add_argument("--size", type=int, default=400, help="questions in a set (default 400; facts: all of them)")
    parser.add_argument("--misses", type=int, default=0, help="wrong answers to print for each set (default 0)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--record", action="store_true", help="put the figures into training.json beside the model")
    arguments = parser.parse_args()
    began = time.perf_counter()
    scores = evaluate(Model(arguments.model, arguments.device), arguments.seed, arguments.size, arguments.misses)
    print(f"{'set':<40}{'questions':>10}{'exact':>9}{'stopped':>9}{'target':>9}")
    for line in scores:
        target = f"{TARGETS[line.name]:.0%}" if line.name in TARGETS else ""
        print(f"{line.name:<40}{line.questions:>10}{line.exact:>9.1%}{line.stopped:>9.1%}{target:>9}")
    print(f"{time.perf_counter() - began:.0f} s, float32 on {arguments.device}, seed {arguments.seed}")
    figures = {
        line.name: {"questions": line.questions, "exact": round(line.exact, 4), "stopped": round(line.stopped, 4)}
        for line in scores
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.record:
        path = arguments.model / "training.json"
        summary = json.loads(path.read_text())
        summary["held_out_questions"] = {"seed": arguments.seed, "device": arguments.device, "sets": figures}
        path.write_text(json.dumps(summary, indent=2) + "\n")
    return int(any(line.exact < TARGETS.get(line.name, 0.0) for line in scores))


if __name__ == "__main__":
    sys.exit(main())
