"""The bundled demo model: its files, its tokenizer, its figures on a small sample, and the generator behind them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from safetensors import safe_open
from transformers import AutoTokenizer

from microserve.tools.demo_model import batches, corpus, evaluate, json_tasks, model, numerals, smalltalk, sums
from microserve.tools.demo_model.exchange import Dialog, Exchange, Message, Split
from microserve.tools.demo_model.relations import RELATIONS
from microserve.tools.demo_model.tokenizer import BUNDLED, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load(BUNDLED)


@pytest.fixture(scope="module")
def fast_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED)


@dataclass(frozen=True)
class Sample:
    """Questions of one kind with the answers that the bundled model gave."""

    exchanges: list[Exchange]
    answers: list[evaluate.Answer]

    @property
    def right(self) -> int:
        pairs = zip(self.exchanges, self.answers, strict=True)
        return sum(answer.stopped and answer.text == exchange.reply for exchange, answer in pairs)


@pytest.fixture(scope="module")
def bundled() -> Iterator[evaluate.Model]:
    """The bundled model on one thread: on a busy machine, threads that wait for each other cost more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield evaluate.Model(BUNDLED, "cpu")
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def samples(bundled: evaluate.Model) -> dict[str, Sample]:
    """All single questions, answered in one batch, which is much faster than one call for each test."""
    rng = Random(7)
    held = Split.HELD_OUT
    facts = [relation.exchange(rng, held, rng.choice(relation.pairs)) for relation in rng.choices(RELATIONS, k=40)]
    kinds = {
        "facts": facts,
        "sums": [sums.two_digit(rng, operation, held) for operation in (sums.ADD, sums.SUBTRACT) for _ in range(20)],
        "json": [json_tasks.draw(rng, held) for _ in range(20)],
        "unknown": [Exchange("unknown", "What is the population of Zorbania?", smalltalk.UNKNOWN)],
        "repeat": [Exchange("repeat", "Say this is a test", "this is a test")],
    }
    flat = [exchange for exchanges in kinds.values() for exchange in exchanges]
    answers = iter(bundled.answers([[Message("user", exchange.ask)] for exchange in flat], 72))
    return {name: Sample(exchanges, [next(answers) for _ in exchanges]) for name, exchanges in kinds.items()}


def test_folder_holds_the_checkpoint_and_stays_small() -> None:
    assert {path.name for path in BUNDLED.iterdir()} == FILES
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 16_000_000


def test_config_describes_a_llama_with_heads_of_64_and_a_context_of_4096() -> None:
    config = json.loads((BUNDLED / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["max_position_embeddings"] >= 4096
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == model.END_ID
    assert json.loads((BUNDLED / "generation_config.json").read_text())["eos_token_id"] == model.END_ID


def test_weights_are_bfloat16_and_between_4_and_8_million() -> None:
    parameters = 0
    with safe_open(BUNDLED / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert bool(tensor.isfinite().all())
            parameters += tensor.numel()
    assert 4_000_000 <= parameters <= 8_000_000
    assert parameters == json.loads((BUNDLED / "training.json").read_text())["parameters"]


def test_recorded_figures_meet_the_targets() -> None:
    summary = json.loads((BUNDLED / "training.json").read_text())
    sets = summary["held_out_questions"]["sets"]
    assert {name: sets[name]["exact"] >= target for name, target in evaluate.TARGETS.items()} == dict.fromkeys(
        evaluate.TARGETS, True
    )
    assert summary["held_out_loss"]["unseen_phrasings"] < 0.2


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_tokenizer_round_trips_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_takes_digits_one_by_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("1984", add_special_tokens=False).tokens == ["1", "9", "8", "4"]


def test_transformers_tokenizes_as_we_do(tokenizer: Tokenizer, fast_tokenizer: Any) -> None:
    rng = Random(5)
    for _ in range(100):
        dialog = corpus.draw(rng, 8)
        for message in dialog.messages:
            ids = tokenizer.encode(message.content, add_special_tokens=False).ids
            assert fast_tokenizer.encode(message.content) == ids
            assert fast_tokenizer.decode(ids) == message.content


def test_chat_template_writes_the_training_format(tokenizer: Tokenizer, fast_tokenizer: Any) -> None:
    rng = Random(6)
    for _ in range(100):
        dialog = corpus.chat(rng)
        chat = [{"role": message.role, "content": message.content} for message in dialog.messages]
        rendered = fast_tokenizer.apply_chat_template(chat, tokenize=False)
        assert tokenizer.encode(rendered).ids == batches.encode(tokenizer, [dialog])[0].ids
        prompt = fast_tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.encode(prompt).ids == batches.encode_prompt(tokenizer, dialog.messages[:-1])


def test_chat_template_is_readable_and_refuses_unknown_roles(fast_tokenizer: Any) -> None:
    chat = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": " Hello! "}]
    rendered = fast_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|system|>Be brief.<|end|><|user|>Hello!<|end|><|assistant|>"
    with pytest.raises(TemplateError, match="roles system, user and assistant only"):
        fast_tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_facts_in_unseen_phrasings(samples: dict[str, Sample]) -> None:
    assert samples["facts"].right >= 38  # of 40


def test_two_digit_sums_of_unseen_pairs(samples: dict[str, Sample]) -> None:
    assert samples["sums"].right >= 36  # of 40


def test_json_on_request_is_valid(samples: dict[str, Sample]) -> None:
    answers = samples["json"].answers
    assert sum(answer.stopped and evaluate.is_json(answer.text) for answer in answers) >= 19  # of 20


def test_every_turn_stops_by_itself(samples: dict[str, Sample]) -> None:
    assert all(answer.stopped for sample in samples.values() for answer in sample.answers)


def test_story_is_readable_and_ends(bundled: evaluate.Model) -> None:
    (story,) = bundled.answers([[Message("user", "Tell me a story about a fox.")]], 300)
    assert story.stopped
    assert " fox " in story.text
    assert story.text.count(". ") >= 5


def test_repeats_what_it_is_told(samples: dict[str, Sample]) -> None:
    assert samples["repeat"].right == 1


def test_unknown_questions_get_a_polite_answer(samples: dict[str, Sample]) -> None:
    assert samples["unknown"].right == 1


def test_system_prompt_and_earlier_turns_are_used(bundled: evaluate.Model) -> None:
    persona = [Message("system", "You are Vela, a cheerful baker."), Message("user", "Who are you?")]
    memory = [
        Message("system", "You are a helpful assistant."),
        Message("user", "My name is Ada."),
        Message("assistant", "Nice to meet you, Ada!"),
        Message("user", "What is the capital of France?"),
        Message("assistant", "The capital of France is Paris."),
        Message("user", "What is my name?"),
    ]
    answers = [answer.text for answer in bundled.answers([persona, memory], 24)]
    assert answers == ["I am Vela, a cheerful baker.", "Your name is Ada."]


def test_questions_about_a_long_document(bundled: evaluate.Model) -> None:
    sets = evaluate.document_questions(bundled.tokenizer, Random(10), 1000, 2)
    found = bundled.answers([dialog.messages[:-1] for dialog in sets], 64)
    assert [answer.text for answer in found] == [dialog.messages[-1].content for dialog in sets]


def test_corpus_follows_from_the_seed() -> None:
    first, second = Random("1/3"), Random("1/3")
    assert [corpus.draw(first, 40) for _ in range(200)] == [corpus.draw(second, 40) for _ in range(200)]


def test_held_out_pairs_never_occur_in_training() -> None:
    rng = Random(11)
    for operation in (sums.ADD, sums.SUBTRACT):
        for _ in range(2000):
            left, _, right_side = sums.two_digit(rng, operation, Split.TRAIN).reply.partition(f" {operation.sign} ")
            assert not sums.is_held_out(operation, int(left), int(right_side.partition(" ")[0]))
        share = sum(sums.is_held_out(operation, a, b) for a in range(10, 100) for b in range(10, 100)) / 8100
        assert 0.1 < share < 0.16


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: str(relation.name))
def test_relations_keep_some_phrasings_back(relation: Any) -> None:
    assert len(relation.asks) >= 15
    assert set(relation.held_asks).isdisjoint(relation.asks)
    assert set(relation.held_phrases).isdisjoint(relation.phrases)
    assert len({x for x, _ in relation.pairs}) == len(relation.pairs)


def test_json_tasks_expect_what_json_writes() -> None:
    rng = Random(12)
    for split in Split:
        for _ in range(200):
            reply = json_tasks.draw(rng, split).reply
            assert json.dumps(json.loads(reply)) == reply


@pytest.mark.parametrize(("number", "word"), [(0, "zero"), (13, "thirteen"), (40, "forty"), (99, "ninety-nine")])
def test_numbers_in_words(number: int, word: str) -> None:
    assert numerals.spell(number) == word


def test_numbers_beyond_a_hundred_are_refused() -> None:
    with pytest.raises(ValueError, match="101 is not in"):
        numerals.spell(101)


def test_only_the_answers_are_learnt(tokenizer: Tokenizer) -> None:
    dialog = Dialog("chat", (Message("user", "Hi"), Message("assistant", "Hello!")))
    encoded = batches.encode(tokenizer, [dialog])[0]
    packed = batches.pack([encoded], 1, 16)
    where, target = packed["learn"].tolist()
    assert tokenizer.decode(target, skip_special_tokens=False) == "Hello!<|end|>"
    assert [packed["grid"][0].flatten()[index + 1] for index in where] == target


def test_packed_rows_give_the_logits_of_each_conversation_alone(tokenizer: Tokenizer) -> None:
    network = model.new_model(tokenizer.get_vocab_size(), seed=1, layers=2).eval()
    rng = Random(13)
    encoded = batches.encode(tokenizer, [corpus.terse(rng) for _ in range(5)])
    ids, positions, document = batches.pack(encoded, 1, 512)["grid"]
    embedding: Any = network.get_input_embeddings()
    with torch.no_grad():
        hidden = model.hidden_states(network, ids, positions, model.document_attention(document, None))
        for number, item in enumerate(sorted(encoded, key=lambda one: -len(one.ids)), 1):
            assert positions[document == number].tolist() == list(range(len(item.ids)))
            alone = network(torch.tensor([item.ids])).logits[0]
            torch.testing.assert_close(hidden[document == number] @ embedding.weight.T, alone, atol=1e-5, rtol=1e-5)


def test_block_mask_covers_exactly_the_dense_mask() -> None:
    rng = Random(14)
    lengths = [rng.randint(3, 90) for _ in range(12)]
    flat = [number for number, n in enumerate(lengths, 1) for _ in range(n)][:384]
    document = torch.tensor([flat + [0] * (384 - len(flat))], dtype=torch.int32)
    dense = model.document_attention(document, None)
    blocks: Any = model.document_attention(document, 128)
    visited = blocks.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert isinstance(dense, torch.Tensor)
    assert bool((visited | ~dense[0, 0]).all())
    queries = torch.arange(384)
    seen = blocks.mask_mod(torch.tensor(0), torch.tensor(0), queries[:, None], queries[None, :])
    assert torch.equal(seen, dense[0, 0])


def test_bundled_folder_is_package_data() -> None:
    assert Path(__file__).resolve().parents[1] / "runtime" / "bundled" / "demo" == BUNDLED
