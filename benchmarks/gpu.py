"""What one GPU does: 128 replies of 100 tokens by a policy of SmolLM2-135M's shape, beside the least that memory
allows; what rounding does to PPO's ratio; then seconds a step and peak memory of the default run, and of random weights
in the shape of Qwen2.5-0.5B.

    python benchmarks/gpu.py                         # needs a GPU of 24 GB
    python benchmarks/gpu.py --only sampling --model FOLDER    # 128 x 100 tokens of a checkpoint, alone
    python benchmarks/gpu.py --layers 28 --width 1536 --heads 12 --inner 8960     # Qwen2.5-1.5B: 80 GB
    python benchmarks/gpu.py --tiny                  # the same path in a minute, on a CPU, too
    python benchmarks/speed.py --steps 12            # the ratio to TRL's GRPOTrainer

The figures of one H200 stand in recipes/README.md. The large policy has Qwen2.5's sizes and vocabulary in
Llama's class (the same but for a few biases) and the small base's tokenizer, so that nothing is
downloaded; its samples are noise, and as long as they may be.

Sampling (goal on one H100 that does nothing else: 0.3 s): the same tokens by transformers' `generate`, by
our decode step called for each token, and by the same step replayed as a CUDA graph. Roofline: bytes that
a token must read (weights, and the keys and values so far), over the bandwidth of a copy on this device.
Between the two lie the kernels of a step, of which a profile shows the groups.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import amft  # noqa: E402
from benchmarks.speed import finish_work, where  # noqa: E402
from harness import capture  # noqa: E402
from harness.cache import with_room  # noqa: E402
from harness.loading import device_of  # noqa: E402
from harness.run import Run  # noqa: E402

SHAPE = dict(layers=24, width=896, heads=14, inner=4864, vocab=151936)  # Qwen2.5-0.5B's
TINY = dict(layers=2, width=64, heads=2, inner=128, vocab=2000)
SMOLLM2 = dict(layers=30, width=576, heads=9, kv_heads=3, inner=1536, vocab=49152)  # 135M


def n_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def noise(layers, width, heads, inner, vocab, kv_heads=2):
    """(model, tokenizer): random weights of a shape."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    return model, tokenizer


def large(folder, args):
    """A checkpoint folder of that shape, and its number of parameters."""
    model, tokenizer = noise(args.layers, args.width, args.heads, args.inner, args.vocab)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return n_parameters(model)


# --- Sampling ---
def bandwidth(device):
    """Bytes a second that a copy reads and writes."""
    x = torch.empty(2 ** 28 if device == "cpu" else 2 ** 30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    seconds = []
    for _ in range(6):
        finish_work(device)
        start = time.perf_counter()
        y.copy_(x)
        finish_work(device)
        seconds.append(time.perf_counter() - start)
    return 2 * len(x) / min(seconds)


def bytes_of_a_token(model, conversations, columns):
    """What one decode step must read: each weight once, and the keys and values of so many columns."""
    config, size = model.config.get_text_config(), model.dtype.itemsize
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * columns * conversations
    return size * (n_parameters(model) + cache)


@torch.no_grad()
def sampled(model, ids, tokens, how):
    """Seconds of replies of so many tokens to (B, S) prompts: by generate, the step itself, or its replay."""
    device = ids.device.type
    mask = torch.ones_like(ids)
    finish_work(device)
    start = time.perf_counter()
    if how == "generate":
        model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=tokens,
                       min_new_tokens=tokens)
    else:
        cache = with_room(model, amft.prefill(model, ids, mask, []), ids.shape[1] + tokens)
        nobody = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        reply = amft.generate_reply(model, ids, mask, cache, nobody, tokens, 1.0)
        assert reply.ids.shape[1] == tokens, "the policy ended its replies, so that they are no measure"
    finish_work(device)
    return time.perf_counter() - start


@torch.no_grad()
def kernels(model, ids, tokens):
    """{group: seconds} on the device of one decode step in the middle of the replies, by torch's profiler."""
    mask = torch.ones_like(ids)
    cache = with_room(model, amft.prefill(model, ids, mask, []), ids.shape[1] + tokens)
    speaking = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    state = capture.begin(ids, mask, speaking, amft.stop_token_ids(model), 1.0, tokens)
    step = capture.Eager(partial(amft.decode_step, model), cache, state)
    column = ids.shape[1]
    for column in range(column, column + tokens // 2):
        step.advance(column)
    with torch.profiler.profile() as profile:
        step.advance(column + 1)
        finish_work(ids.device.type)
    groups = dict.fromkeys(("matrix products", "attention", "the rest"), 0.0)
    for row in profile.key_averages():
        if ids.is_cuda and row.device_type != DeviceType.CUDA:
            continue  # a launch, to which its kernel's time is written, too
        own = row.self_device_time_total if ids.is_cuda else row.self_cpu_time_total
        name = row.key.lower()
        if "attention" in name or "flash" in name or "fmha" in name:
            group = "attention"
        elif any(word in name for word in ("mm", "gemm", "cutlass", "nvjet", "linear")):
            group = "matrix products"
        else:
            group = "the rest"
        groups[group] += own / 1e6
    return groups


# --- Rounding ---
def first_ratios(model, tokenizer, episodes, samples, tokens, micro_tokens):
    """PPO's ratios before any update, 1 but for rounding: (training / sampling, training / training in passes of
    micro_tokens), each of all sampled tokens (n,)."""
    drawn, draw = [], amft.draw

    def spy(logits, temperature):
        token = draw(logits, temperature)
        logps = (logits / temperature).log_softmax(-1)
        drawn.append(logps.gather(1, token.unsqueeze(1)).squeeze(1))
        return token
    record = dict(capture.RECORD)
    capture.RECORD.clear()  # a replay does not call draw
    amft.draw = spy
    try:
        batch = amft.rollout(model, tokenizer, episodes, samples, tokens).batch
    finally:
        amft.draw = draw
        capture.RECORD.update(record)
    columns = batch.response_mask.any(0)  # a draw was made for each of these; the task wrote the others
    own = batch.response_mask[:, columns].bool()
    with torch.no_grad():
        at_once = amft.logps_of(model, batch)
        passes = amft.micro_batches(batch, batch.response_mask, micro_tokens)
        in_parts = torch.cat([amft.logps_of(model, batch.rows(rows)) for rows in passes])
    trained = at_once[:, columns][own]
    sampled_then = torch.stack(drawn, 1)[own]
    return (trained - sampled_then).exp(), (trained - in_parts[:, columns][own]).exp()


def rounding(args):
    """Print how many tokens have a ratio outside 1 +- 0.1 before the first update, in bfloat16 and in float32."""
    task = amft.TASKS["math"]()
    for bf16 in (1, 0):
        config = amft.Config(task="math", model=args.model or "base", device=args.device, bf16=bf16,
                             max_new_tokens=args.tokens)
        model, tokenizer = amft.load_policy(config, task, amft)
        torch.manual_seed(0)
        episodes = task.training(args.conversations // 8 or 1, random.Random(0))
        both = first_ratios(model, tokenizer, episodes, 8, args.tokens, 512)
        for name, ratio in zip(("sampling", f"passes of {512} tokens"), both):
            outside = ((ratio - 1).abs() > 0.1).float().mean().item()
            print(f"{model.dtype}, training against {name}: {outside:.3%} of {len(ratio)} tokens have a ratio outside "
                  f"1 +- 0.1; the largest |log ratio| is {ratio.log().abs().max().item():.3f}")


def sampling(args):
    """Print how long B replies of n tokens take, and what a step's time is spent on."""
    shape = dict(TINY, kv_heads=1) if args.tiny else SMOLLM2
    if args.model:
        config = amft.Config(task="math", model=args.model, device=args.device, max_new_tokens=args.tokens)
        model, _ = amft.load_policy(config, amft.TASKS["math"](), amft)
    else:
        model, _ = noise(**shape)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    model = model.to(args.device, dtype).eval()
    model.generation_config.eos_token_id = [model.config.get_text_config().vocab_size]  # no reply ends early
    B, n = args.conversations, args.tokens
    rng = random.Random(0)
    prompt = [[rng.randrange(100, 500) for _ in range(50)] for _ in range(B)]
    ids = torch.tensor(prompt, device=args.device)
    print(f"{B} replies of {n} tokens to prompts of 50, {n_parameters(model):,} parameters in {dtype}")
    ways = ["generate", "a decode step for each token"]
    ways += ["a replayed decode step"] * (args.device in capture.RECORD)
    record = dict(capture.RECORD)
    for how in ways:
        capture.RECORD.clear()
        if how == "a replayed decode step":
            capture.RECORD.update(record)
        runs = [sampled(model, ids, n, how) for _ in range(1 + args.steps)]
        print(f"{how:32}{statistics.median(runs[1:]):8.3f} s  (first {runs[0]:.3f})")
    capture.RECORD.update(record)
    wide, speed = bytes_of_a_token(model, B, 50 + n / 2), bandwidth(args.device)
    print(f"{'roofline':32}{n * wide / speed:8.3f} s  "
          f"({wide / 1e6:.0f} MB a token, {speed / 1e9:.0f} GB/s)")
    for group, seconds in kernels(model, ids, n).items():
        print(f"{'  kernels of all steps, ' + group:32}{n * seconds:8.3f} s")


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
    parser.add_argument("--only", choices=("sampling", "rounding", "memory"), help="one of the parts")
    parser.add_argument("--model", help="a checkpoint to sample from, in place of random weights")
    parser.add_argument("--conversations", type=int, default=128, help="to sample side by side")
    parser.add_argument("--tokens", type=int, default=100, help="of each reply")
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
    elif args.device == "cpu" and args.only not in ("sampling", "rounding"):
        parser.error("no GPU here: --tiny shows that this runs, and --only sampling or rounding what a CPU does")
    return args


def main():
    args = arguments()
    print(where(args.device), time.strftime("%Y-%m-%d"), sep=", ")
    for part in (sampling, rounding, memory):
        if args.only in (None, part.__name__):
            part(args)


def memory(args):
    """Print seconds a step and peak memory of whole runs."""
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
    print("| policy | parameters | seconds a step | peak | floats a parameter |",
          "|---|---|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    main()
