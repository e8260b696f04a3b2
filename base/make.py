"""Make the base policy from nothing: a word-level tokenizer and a small Llama, pretrained on synthetic text.

    python base/make.py --compile                     # writes this folder; 51 minutes on two CPU cores, also busy
    python base/make.py --steps 20 --out some/folder  # a trial

The text is the prompt and the response of General Points with everything about the game drawn at random: four cards,
what J, Q and K count as (1..13 each; half the time all three alike), a random formula over the four numbers, and as
target whatever the formula makes (an integer in 1..100). So the base learns to read the stated rule, to copy, to write
legal formulas, and to come near a target, but no particular target and no particular rule. A multiset of values that
an evaluation split or the controller's validation split uses never occurs here with target 24 (`example` drops it).
"""

import argparse
import math
import random
import sys
import time
from fractions import Fraction
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tasks  # noqa: E402

SPECIALS = ["<pad>", "<eos>", "<unk>"]
# Text that never varies is one token, so that following the original's JSON format costs a few tokens, not hundreds.
FRAGMENTS = [tasks.INSTRUCTION + "\nCards: ", ". J counts as ", ", Q counts as ", ", K counts as ", ". Make ", ".\n",
             '{"cards": ["', '", "', '"], "number": [', '], "formula": "', '"}', ", ", "=", "+", "-", "*", "/", "(", ")"]
WORDS = FRAGMENTS + ["A", "J", "Q", "K"] + [str(n) for n in range(101)]


def make_tokenizer():
    """Every fragment, operator, bracket and integer 0..100 is one token; decoding gives back the same text."""
    escape = lambda text: "".join("\\" + c if c in r"\.[]{}()*+-/|^$?" else c for c in text)  # noqa: E731
    pattern = "|".join([escape(f) for f in sorted(FRAGMENTS, key=len, reverse=True)] + ["[0-9]+", "."])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIALS + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   padding_side="left", clean_up_tokenization_spaces=False)


def random_formula(numbers, rng):
    """((text, precedence), value) of a random formula that uses each number once; value None if undefined."""
    if len(numbers) == 1:
        return (str(numbers[0]), tasks.ATOM), Fraction(numbers[0])
    cut = rng.randrange(1, len(numbers))
    (left, a), (right, b), op = random_formula(numbers[:cut], rng), random_formula(numbers[cut:], rng), rng.choice("+-*/")
    value = None if a is None or b is None or (op == "/" and b == 0) else tasks.apply(op, a, b)
    return tasks.join(left, op, right), value


def example(rng):
    """One (prompt, response) of pretraining text."""
    while True:
        ranks = tuple(rng.choices(tasks.RANKS, k=4))
        alike, free = rng.randint(1, 13), [rng.randint(1, 13) for _ in tasks.FACES]
        rule = dict(zip(tasks.FACES, [alike] * 3 if rng.random() < 0.5 else free))
        numbers = tasks.values_of(ranks, rule)
        (formula, _), value = random_formula(rng.sample(numbers, 4), rng)
        if value is None or value.denominator != 1 or not 1 <= value <= 100:
            continue
        if value == tasks.TARGET and tasks.ROLES[tuple(sorted(numbers))] != "train":
            continue  # kept for evaluation: this deal is never seen making 24
        return tasks.write_prompt(ranks, rule, value), tasks.write_response(ranks, numbers, formula, value)


def make_batch(tokenizer, size, rng):
    """(ids, labels), each (size, T), right-padded: only responses carry loss, since prompts are random."""
    pairs = [example(rng) for _ in range(size)]
    prompts, responses = ([ids + [tokenizer.eos_token_id] * is_response for ids in tokenizer(list(texts))["input_ids"]]
                          for is_response, texts in enumerate(zip(*pairs)))
    rows = [(p + r, [-100] * len(p) + r) for p, r in zip(prompts, responses)]
    width = 52  # one shape for every batch: --compile compiles once
    pad = lambda row, fill: row + [fill] * (width - len(row))  # noqa: E731
    return (torch.tensor([pad(ids, tokenizer.pad_token_id) for ids, _ in rows]),
            torch.tensor([pad(labels, -100) for _, labels in rows]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=128, help="examples in a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate; 100 steps up, then cosine to 1%%")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, attn_implementation="eager")).to(args.device)
    forward = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(100, args.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, 0.505 + 0.495 * math.cos(math.pi * step / args.steps)))

    start, smooth = time.time(), None
    for _ in (bar := trange(args.steps, desc="pretraining", mininterval=5)):
        ids, labels = (tensor.to(args.device) for tensor in make_batch(tokenizer, args.batch_size, rng))
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            loss = forward(input_ids=ids, labels=labels).loss  # causal and right-padded: padding needs no mask
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {parameters:,} parameters, {args.steps} steps of {args.batch_size}, loss {smooth:.4f}, "
          f"{(time.time() - start) / 60:.1f} minutes on {args.device} ({torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
