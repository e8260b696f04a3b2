"""What a GPU tells: seconds a step and peak memory of the default run, and of random weights in the shape of Qwen2.5-0.5B.
The figures of one H200 stand in recipes/README.md.

    python benchmarks/gpu.py                         # needs a GPU of 24 GB
    python benchmarks/gpu.py --layers 28 --width 1536 --heads 12 --inner 8960     # the shape of Qwen2.5-1.5B: 80 GB
    python benchmarks/gpu.py --tiny --device cpu     # the same path in a minute
    python benchmarks/speed.py --steps 12            # the ratio to TRL's GRPOTrainer (on the CPU as it stands)

The large policy has Qwen2.5's sizes and vocabulary in Llama's class (the same but for a few biases) and the small base's
tokenizer, so that nothing is downloaded; its samples are noise, and as long as they may be. Flags that this amft.py does
not have are left out, and named.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import amft  # noqa: E402


def large(folder, args):
    """A checkpoint folder of that shape, and its number of parameters."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.width, intermediate_size=args.inner, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def measured(name, parameters, argv, gpu):
    """Run it without evaluations and states; print a row of the table."""
    amft.Run.report = amft.Run.save = lambda *_, **__: None
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        amft.main([*argv, "--out", f"{folder}/run"])
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if row["kind"] == "step"]
    each = (seconds[-1] - seconds[0]) / (len(seconds) - 1)  # the first step warms up
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    row = f"| {name} | {parameters:,} | {each:.2f} |"
    return row + (f" {peak / 2 ** 30:.1f} GiB | {peak / 4 / parameters:.1f} |" if gpu else " | |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(layers=24, width=896, heads=14, inner=4864, vocab=151936, steps=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a shape for a CPU, to see that this runs")
    args = parser.parse_args()
    if args.tiny:
        args.layers, args.width, args.heads, args.inner, args.vocab = 2, 64, 2, 128, 2000
    gpu = args.device.startswith("cuda")
    if gpu and not torch.cuda.is_available():
        sys.exit("no GPU here: --tiny --device cpu shows that this runs")
    has = {field.name for field in dataclasses.fields(amft.Config)}
    wanted = {"bf16": [], "gradient_checkpointing": [], "micro_tokens": ["1024"]}
    print("left out:", *("--" + name.replace("_", "-") for name in wanted if name not in has))
    extra = [x for name, value in wanted.items() if name in has for x in ("--" + name.replace("_", "-"), *value)]
    common = ["--task", "gp", "--device", args.device, "--steps", str(args.steps), "--warmup", "0", "--meta-every", "1"]
    lines = [measured("base, default sizes", sum(p.numel() for p in amft.load_policy(
        amft.Config(device="cpu"), amft.TASKS["gp"]())[0].parameters()), common, gpu)]
    with tempfile.TemporaryDirectory() as folder:
        parameters = large(folder, args)
        lines.append(measured("random weights", parameters, [
            *common, "--model", folder, "--prompts", "8", "--samples", "8", "--sft-batch", "16", "--lr", "2e-6", *extra], gpu))
    print(torch.cuda.get_device_name() if gpu else "CPU", "torch", torch.__version__)
    print("| policy | parameters | seconds a step | peak | floats a parameter |\n|---|---|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    main()
