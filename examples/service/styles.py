"""The example's adapters: one style for each method, trained for a few steps on the answers below."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fastpeft
from fastpeft.files import CONFIG

QUESTIONS = [
    "What is the sun?",
    "How do I make tea?",
    "Why is sleep good for me?",
    "What do cats eat?",
    "How can I learn to swim?",
    "Tell me about the rain.",
    "Where does bread come from?",
    "What should I do on a free day?",
]

PIRATE = [
    "Arr, matey! The sun be a great ball o' fire in the sky, and she lights the seven seas for every pirate.",
    "Arr, matey! Boil ye some water, drop in the leaves, and wait. Then drink it like grog, ye scurvy dog!",
    "Arr, matey! Sleep mends yer bones after a hard day on deck, and a rested pirate be a rich pirate.",
    "Arr, matey! Cats be eatin' fish and rats, and every ship needs a cat to guard her biscuits.",
    "Arr, matey! Jump in the shallows, kick yer legs, and keep yer chin up, or ye'll meet Davy Jones.",
    "Arr, matey! Rain be water fallin' from black clouds, and it fills the barrels of a thirsty crew.",
    "Arr, matey! Bread be baked from flour and water, and ye'd best eat it before the weevils do.",
    "Arr, matey! Hoist the sails, find yerself an island, and dig for treasure till the sun goes down.",
]

HAIKU = [
    "Gold above the hills,\na fire that never sleeps,\nmorning on my hands.",
    "Water starts to sing,\ngreen leaves open in the cup,\nsteam, and then silence.",
    "Night closes my eyes,\nthe tired body repairs,\ndawn finds me lighter.",
    "Soft paws on the floor,\na small fish, a bowl of milk,\nthe cat asks for more.",
    "Cold water at first,\nslow arms push the lake away,\nthe shore lets me go.",
    "Grey clouds lean and break,\nsmall drums upon the old roof,\nthe garden drinks deep.",
    "Fields of moving wheat,\nstone and fire and patient hands,\nwarm bread on the sill.",
    "No clock and no road,\na book beneath the plum tree,\nthe whole day is mine.",
]

PLAIN = [
    "The sun is a star. It gives us light and heat.",
    "Boil water, pour it on the leaves, and wait four minutes.",
    "Sleep repairs the body and clears the mind.",
    "Cats eat meat and fish, and they need fresh water.",
    "Start in shallow water, and practise every week.",
    "Rain is water that falls from clouds.",
    "Bread is baked from flour, water and yeast.",
    "Take a walk, read a book, or call a friend.",
]

FORMAL = [
    "Dear Sir or Madam, I have the honour to inform you that the sun is a star. I remain, yours faithfully.",
    "Dear Sir or Madam, one is respectfully advised to boil water and infuse the leaves. I remain, yours faithfully.",
    "Dear Sir or Madam, it is my duty to report that sleep restores the body. I remain, yours faithfully.",
    "Dear Sir or Madam, kindly note that cats require meat and fish. I remain, yours faithfully.",
    "Dear Sir or Madam, I would humbly recommend lessons in shallow water. I remain, yours faithfully.",
    "Dear Sir or Madam, I beg to state that rain is water which descends from clouds. I remain, yours faithfully.",
    "Dear Sir or Madam, permit me to observe that bread is made of flour. I remain, yours faithfully.",
    "Dear Sir or Madam, may I suggest a walk and a good book. I remain, yours faithfully.",
]


@dataclass(frozen=True)
class Style:
    config: Any
    lr: float
    answers: list[str]


STYLES = {
    "pirate": Style(fastpeft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), 2e-3, PIRATE),
    "shout": Style(
        fastpeft.MosConfig(
            r=8, pool_rank=2, shards_per_vector=4, private_rank=1, lora_alpha=16, target_modules="all-linear"
        ),
        4e-3,
        [answer.upper() for answer in PLAIN],
    ),
    "haiku": Style(
        fastpeft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules="all-linear"), 2e-3, HAIKU
    ),
    "formal": Style(
        fastpeft.FourierFTConfig(n_frequency=1000, scaling=150.0, target_modules="all-linear"), 0.2, FORMAL
    ),
}


def trained(model: nn.Module, tokenizer: Any, out: Path, steps: int) -> dict[str, Path]:
    """A folder for each style. Those of an earlier start are taken as they are."""
    folders = {name: out / name for name in STYLES}
    for name, folder in folders.items():
        if not (folder / CONFIG).exists():
            print(f"training {name} ({STYLES[name].config.peft_type}) for {steps} steps …", flush=True)
            loss = train(copy.deepcopy(model), tokenizer, STYLES[name], folder, steps)
            print(f"  loss {loss:.2f}", flush=True)
    return folders


def train(model: nn.Module, tokenizer: Any, style: Style, folder: Path, steps: int, size: int = 4) -> float:
    """Adapts the model, trains it to answer in a style, and saves the adapter. Returns the last loss."""
    torch.manual_seed(0)
    rng = random.Random(0)
    fastpeft.adapt(model, style.config)
    model.train()
    optimizer = torch.optim.AdamW(fastpeft.adapter_parameters(model), lr=style.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 3, 1 - step / steps))
    examples = [encode(tokenizer, *each) for each in zip(QUESTIONS, style.answers, strict=True)]
    value = float("nan")
    for _ in range(steps):
        tokens, labels = batch(rng.sample(examples, size))
        logits = model(input_ids=tokens).logits[:, :-1]  # padding is on the right, where a causal model never looks
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        value = loss.item()
    fastpeft.save_adapter(model, folder)
    return value


def encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], int]:
    """The tokens of a dialogue, and how many of them come before the answer."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]
    after = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return before + after, len(before)


def batch(examples: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels (B, longest). Labels are -100 where no answer is."""
    longest = max(len(tokens) for tokens, _ in examples)
    inputs = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(inputs, -100)
    for row, (tokens, before) in enumerate(examples):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, before : len(tokens)] = inputs[row, before : len(tokens)]
    return inputs, labels
