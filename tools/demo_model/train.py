"""Train the demo model from scratch on one GPU, in minutes (`--device cpu` with tiny settings is for trying it out).

`python -m microserve.tools.demo_model.train --out DIR` writes config.json, generation_config.json, model.safetensors
(bfloat16) and training.json into DIR, now and then during training and at the end. Needs tokenizer.json in DIR
or in the bundled folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from microserve.tools.demo_model import corpus
from microserve.tools.demo_model import model as shape
from microserve.tools.demo_model.batches import Batches, encode, make, pack
from microserve.tools.demo_model.exchange import Dialog, Message, Split
from microserve.tools.demo_model.settings import Settings
from microserve.tools.demo_model.tokenizer import BUNDLED, load

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM


class Trainer:
    """Model, optimizer and schedule; `step` takes one packed batch."""

    def __init__(self, model: LlamaForCausalLM, settings: Settings, device: str) -> None:
        placed: Any = model
        self.model: LlamaForCausalLM = placed.to(device)
        self.settings, self.device = settings, device
        self.flex = device != "cpu"
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": settings.decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=self.flex)
        self.run_layer: Callable[..., Tensor] = torch.compile(shape.decoder_layer) if self.flex else shape.decoder_layer

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to 2% of the peak."""
        s = self.settings
        if step < s.warmup:
            return s.rate * (step + 1) / s.warmup
        done = (step - s.warmup) / max(1, s.steps - s.warmup)
        return s.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy in nats over the tokens to learn."""
        ids, positions, document = batch["grid"].to(self.device, non_blocking=True)
        where, target = batch["learn"].to(self.device, non_blocking=True)
        mask = shape.document_attention(document, 128 if self.flex else None)
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.flex):
            hidden = shape.hidden_states(self.model, ids, positions, mask, self.run_layer)
            embedding: Any = self.model.get_input_embeddings()
            logits = functional.linear(hidden.flatten(0, 1)[where], embedding.weight)
        return functional.cross_entropy(logits.float(), target)

    def step(self, step: int, batch: dict[str, Tensor]) -> Tensor:
        """One update; returns the loss without waiting for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        loss = self.loss(batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def held_out_batch(folder: Path, settings: Settings, questions: int) -> dict[str, Tensor]:
    """Single questions in phrasings and with number pairs that training never sees."""
    rng = Random(f"{settings.seed}/held-out")
    dialogs = []
    for _ in range(questions):
        exchange = corpus.single(rng, Split.HELD_OUT)
        dialogs.append(Dialog("held-out", (Message("user", exchange.ask), Message("assistant", exchange.reply))))
    return pack(encode(load(folder), dialogs), settings.rows, settings.length)


@torch.no_grad()
def held_out_losses(trainer: Trainer, folder: Path, settings: Settings) -> dict[str, float]:
    """Losses in nats a token: new conversations of the training kind, and questions in unseen phrasings."""
    tokenizer = load(folder)
    fresh = [
        make(tokenizer, Random(f"{settings.seed}/validation/{i}"), settings.rows, settings.length, settings.longest)
        for i in range(4)
    ]
    questions = held_out_batch(folder, settings, min(1000, settings.rows * settings.length // 128))
    return {
        "new_conversations": sum(float(trainer.loss(batch)) for batch in fresh) / len(fresh),
        "unseen_phrasings": float(trainer.loss(questions)),
    }


def save(model: LlamaForCausalLM, folder: Path, summary: dict[str, Any]) -> None:
    """Write the bfloat16 checkpoint and the summary; the model in memory stays float32."""
    copy: Any = shape.new_model(model.config.vocab_size, 0, model.config.num_hidden_layers)
    copy.load_state_dict({name: value.detach().cpu() for name, value in model.state_dict().items()})
    copy.to(torch.bfloat16).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n")


def environment(device: str) -> dict[str, str]:
    """What the run ran on."""
    name = torch.cuda.get_device_name() if device != "cpu" else platform.processor() or "cpu"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def main() -> None:
    """Train the demo model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder of the model (default: the bundled one)")
    parser.add_argument("--tokenizer", type=Path, default=BUNDLED, help="folder with tokenizer.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1), help="processes that make batches")
    parser.add_argument("--save-every", type=int, default=2000, help="steps between checkpoints (default 2,000)")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    arguments = parser.parse_args()
    settings = Settings(**{name: getattr(arguments, name) for name in asdict(Settings())})
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(1)  # its spinning threads would take the cores of the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    tokenizer = load(arguments.tokenizer)
    trainer = Trainer(
        shape.new_model(tokenizer.get_vocab_size(), settings.seed, settings.layers), settings, arguments.device
    )
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters:,} parameters, {settings}", flush=True)
    loader = DataLoader(
        Batches(arguments.tokenizer, settings),
        batch_size=None,
        num_workers=arguments.workers,
        prefetch_factor=8 if arguments.workers else None,
        multiprocessing_context="forkserver" if arguments.workers else None,
        pin_memory=arguments.device != "cpu",
    )  # fmt: skip
    log: list[dict[str, float]] = []
    summary: dict[str, Any] = {
        "command": "python -m microserve.tools.demo_model.train " + " ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in asdict(settings).items()
        ),
        "settings": asdict(settings),
        "parameters": parameters,
        "environment": environment(arguments.device),
        "log": log,
    }  # fmt: skip
    began = time.perf_counter()
    learnt = torch.zeros((), device=arguments.device)
    seen = targets = 0
    every = max(1, settings.steps // 60)
    waited = 0.0
    batches = iter(loader)
    for step in range(settings.steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        learnt += trainer.step(step, batch)
        seen += settings.rows * settings.length
        targets += batch["learn"].shape[1]
        if (step + 1) % every == 0 or step < 3:
            n = every if step >= 3 else 1
            seconds = time.perf_counter() - began
            log.append(
                {"step": step + 1, "loss": round(float(learnt) / n, 4), "tokens": seen, "seconds": round(seconds, 1)}
            )
            print(
                f"step {step + 1} loss {float(learnt) / n:.4f} tokens {seen / 1e6:.1f}M after {seconds:.1f} s,"
                f" waited {waited:.1f} s",
                flush=True,
            )
            learnt.zero_()
        if (step + 1) % arguments.save_every == 0:
            save(trainer.model, arguments.out, summary)
    summary["tokens"], summary["answer_tokens"] = seen, targets
    summary["seconds"] = round(time.perf_counter() - began, 1)
    summary["held_out_loss"] = held_out_losses(trainer, arguments.tokenizer, settings)
    save(trainer.model, arguments.out, summary)
    print(json.dumps({key: summary[key] for key in ("tokens", "seconds", "held_out_loss")}), flush=True)


if __name__ == "__main__":
    main()
