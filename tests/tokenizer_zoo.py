"""Small tokenizers of every kind that checkpoints bring, trained on the spot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from pathlib import Path

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Ein Jäger aus Kurpfalz, der reitet durch den grünen Wald. Ça va très bien, déjà vu!",
    "日本語のテキストと 中文文本 混在, emoji 😀🎉👩‍👩‍👧 and flags 🇩🇪.",
    "def main():\n    return {'a': 1, \"b\": [2, 3]}\n\n\tprint(x)  # tabs",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    """GPT-2's kind: what Llama 3 and Qwen use."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("ÄÖ added", special=False), AddedToken("日added", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """SentencePiece's kind, as Llama 2 and Mistral write it: prefix space, and bytes for what the vocabulary lacks."""
    words = ["▁", "▁the", "▁quick", "é", "日", "本", "a", "b", "c", "d", "e", "o", "x", "▁fox", "es", "."]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    model = models.BPE(
        vocab={name: index for index, name in enumerate(names)},
        merges=[],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def metaspace(scheme: str = "always") -> Tokenizer:
    """T5's and newer Llama conversions' kind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    """BERT's kind: its decoder looks at neighbours, so it has no table of pieces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_checkpoint(folder: Path, tokenizer: Tokenizer | None = None, **settings: object) -> Path:
    """The text files of a checkpoint in `folder`. `settings` go to tokenizer_config.json; None leaves one out."""
    chosen = tokenizer if tokenizer is not None else byte_level()
    chosen.save(str(folder / "tokenizer.json"))
    merged = {"chat_template": CHAT_TEMPLATE, "eos_token": "</s>", "bos_token": {"content": "<s>"}, **settings}
    kept = {name: value for name, value in merged.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    (folder / "config.json").write_text(json.dumps({"vocab_size": chosen.get_vocab_size()}))
    return folder
