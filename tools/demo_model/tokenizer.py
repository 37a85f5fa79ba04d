"""Train the byte-level BPE tokenizer on the corpus, and write its files with the chat template.

`python -m microserve.tools.demo_model.tokenizer` writes tokenizer.json and tokenizer_config.json (seconds on a CPU).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from microserve.tools.demo_model import corpus

if TYPE_CHECKING:
    from collections.abc import Iterator

BUNDLED = Path(__file__).resolve().parents[2] / "runtime" / "bundled" / "demo"
PAD, END, ROLES = "<|pad|>", "<|end|>", {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL = (PAD, END, *ROLES.values())  # ids 0..4, in this order

# Words keep the space before them; every digit stands alone, so that sums can be learnt digit by digit.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] in ['system', 'developer'] -%}<|system|>"
    "{%- elif message['role'] == 'user' -%}<|user|>"
    "{%- elif message['role'] == 'assistant' -%}<|assistant|>"
    "{%- else -%}{{ raise_exception('the demo model knows the roles system, user and assistant only') }}"
    "{%- endif -%}"
    "{{ message['content'] | trim }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def texts(seed: int, dialogs: int) -> Iterator[str]:
    """The contents of so many conversations with short documents."""
    rng = Random(f"{seed}/tokenizer")
    for _ in range(dialogs):
        for message in corpus.draw(rng, 12).messages:
            yield message.content


def train(seed: int, dialogs: int, vocabulary: int) -> Tokenizer:
    """A tokenizer that can encode any Unicode text: all 256 bytes are in its alphabet."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(seed, dialogs), trainer)
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as `transformers` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": list(ROLES.values()),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, and nothing of `transformers`."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def main() -> None:
    """Train and write the tokenizer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder of the model")
    parser.add_argument("--seed", type=int, default=1, help="seed of the corpus (default 1)")
    parser.add_argument("--dialogs", type=int, default=200_000, help="conversations to learn from (default 200,000)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="number of tokens (default 4,096)")
    arguments = parser.parse_args()
    tokenizer = train(arguments.seed, arguments.dialogs, arguments.vocabulary)
    write(tokenizer, arguments.out, 4096)
    print(f"{tokenizer.get_vocab_size()} tokens written to {arguments.out}")


if __name__ == "__main__":
    main()
