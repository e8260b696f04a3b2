"""Seconds a step and peak memory of the default run, and of random weights in the shape of Qwen2.5-0.5B.

    python benchmarks/gpu.py                         # needs a GPU of 24 GB
    python benchmarks/gpu.py --layers 28 --width 1536 --heads 12 --inner 8960     # Qwen2.5-1.5B: 80 GB
    python benchmarks/gpu.py --tiny                  # the same path in a minute, on a CPU, too
    python benchmarks/speed.py --steps 12            # the ratio to TRL's GRPOTrainer

The figures of one H200 stand in recipes/README.md. The large policy has Qwen2.5's sizes and vocabulary in
Llama's class (the same but for a few biases) and the small base's tokenizer, so that nothing is
downloaded; its samples are noise, and as long as they may be.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import amft  # noqa: E402
from benchmarks.speed import where  # noqa: E402
from harness.loading import device_of  # noqa: E402
from harness.run import Run  # noqa: E402

SHAPE = dict(layers=24, width=896, heads=14, inner=4864, vocab=151936)  # Qwen2.5-0.5B's
TINY = dict(layers=2, width=64, heads=2, inner=128, vocab=2000)


def n_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def large(folder, args):
    """A checkpoint folder of that shape, and its number of parameters."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=args.inner,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=2,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return n_parameters(model)


def measured(name, parameters, flags, gpu):
    """Run amft.py with these flags, without evaluations and states; a row of the table."""
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        amft.main([*flags, "--out", f"{folder}/run"])
        log = Path(folder, "run", "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in log.splitlines()]
    seconds = [row["seconds"] for row in rows if row["kind"] == "step"]
    each = (seconds[-1] - seconds[0]) / (len(seconds) - 1)  # the first step warms up
    row = f"| {name} | {parameters:,} | {each:.2f} |"
    if not gpu:
        return f"{row} | |"
    peak = torch.cuda.max_memory_allocated()
    return f"{row} {peak / 2 ** 30:.1f} GiB | {peak / 4 / parameters:.1f} |"


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=3, help="at least 2: the first warms up")
    parser.add_argument("--device", default="auto", help="auto: the first here of cuda, mps, cpu")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to see that this runs")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: must be at least 2, of which the first warms up")
    try:
        args.device = device_of(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.tiny:
        vars(args).update(TINY)
    elif args.device == "cpu":
        parser.error("no GPU here: --tiny shows that this runs")
    return args


def main():
    args = arguments()
    Run.evaluate = Run.save = Run.finish = lambda *_, **__: None
    gpu = args.device.startswith("cuda")
    common = ["--task", "gp", "--device", args.device, "--steps", str(args.steps),
              "--warmup", "0", "--meta-every", "1"]
    base, _ = amft.load_policy(amft.Config(device="cpu"), amft.TASKS["gp"](), amft)
    lines = [measured("base, default sizes", n_parameters(base), common, gpu)]
    with tempfile.TemporaryDirectory() as folder:
        parameters = large(folder, args)
        sizes = ["--model", folder, "--prompts", "8", "--samples", "8", "--sft-batch", "16",
                 "--lr", "2e-6", "--bf16", "--gradient-checkpointing", "--micro-tokens", "1024"]
        lines.append(measured("random weights", parameters, common + sizes, gpu))
    print(where(args.device))
    print("| policy | parameters | seconds a step | peak | floats a parameter |",
          "|---|---|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    main()
