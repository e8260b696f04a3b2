"""A reader's own checkpoint and own problems: the real classes of transformers with random weights at small width, a
byte-level BPE trained on the spot, chat templates as the families have them.

    python -m pytest -q recipes/test_models.py
"""

import copy
import importlib
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
amft, tasks = importlib.import_module("amft"), importlib.import_module("tasks")


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["amft.py"])


# --- checkpoints made here ----------------------------------------------------------------------------------------

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HEADERS = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
           "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
TURNS = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
         "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
TAGS = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
INST = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}")
SIZES = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512)
# name: (class, template, BOS, EOS, what the template ends a turn with, other special tokens, of the configuration)
FAMILIES = {
    "qwen2": ("Qwen2", CHATML, None, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"], dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", CHATML, None, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"], dict(head_dim=8)),
    "llama": ("Llama", HEADERS, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"],
              dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                        original_max_position_embeddings=128))),
    "gemma3": ("Gemma3", TURNS, "<bos>", "<eos>", "<end_of_turn>", ["<start_of_turn>"],
               dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"])),
    "mistral": ("Mistral", INST, "<s>", "</s>", "</s>", ["[INST]", "[/INST]"], dict(sliding_window=20)),
    "phi3": ("Phi3", TAGS, None, "<|endoftext|>", "<|end|>", ["<|user|>", "<|assistant|>"], dict(resid_pdrop=0.5, embd_pdrop=0.5)),
    "plain": ("Llama", None, None, "<|endoftext|>", "<|endoftext|>", [], {}),  # a base model has no template
    "moe": ("Qwen2Moe", CHATML, None, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"],
            dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)),
}


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE, trained on what the tasks say."""
    rng, tokenizer = random.Random(0), Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [turn.shown + turn.response for task in (tasks.GeneralPointsTurns(), tasks.Mathematics())
             for _ in range(150) for turn in task.sample("train", rng).demonstration()]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(bpe, tmp_path_factory):
    """checkpoint(family) -> its folder."""
    made = {}

    def make(family):
        if family in made:
            return made[family]
        name, template, bos, eos, end, others, settings = FAMILIES[family]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), bos_token=bos, eos_token=eos)
        tokenizer.add_special_tokens(dict(extra_special_tokens=list(dict.fromkeys([*others, end]))))
        tokenizer.chat_template = template
        ids = tokenizer.convert_tokens_to_ids
        prefix = "Gemma3Text" if name == "Gemma3" else name
        config = getattr(transformers, prefix + "Config")(**{
            **SIZES, **settings, "vocab_size": len(tokenizer) + 13, "pad_token_id": None, "bos_token_id": ids(bos) if bos else None,
            "eos_token_id": ids(eos)})  # more rows than tokens, as real vocabularies are padded
        torch.manual_seed(0)
        model = getattr(transformers, name + "ForCausalLM")(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.generation_config.eos_token_id = [ids(end), ids(eos)] if end != eos else ids(eos)
        made[family] = str(tmp_path_factory.mktemp(family))
        model.save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
        return made[family]
    return make


@pytest.fixture
def rewarded(monkeypatch):
    """Rewards that a random policy does get."""
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: "correct" if len(text) % 2 else "no_answer")


def configured(folder, **settings):
    return amft.Config(**{"device": "cpu", "model": folder, "task": "gp-turns", "max_new_tokens": 60, **settings})


def loaded(folder, **settings):
    config = configured(folder, **settings)
    task = tasks.TASKS[config.task]()
    return *amft.load_policy(config, task), task, config


def plain_logps(model, ids):
    """log_softmax of an unpadded row (S,) by a forward pass of its own, (S - 1, V): column t predicts t + 1."""
    with torch.no_grad():
        return model(ids.unsqueeze(0)).logits[0, :-1].double().log_softmax(-1)


def row_of(batch, row):
    """(ids of a row without padding and holes, which of them are the policy's own)."""
    keep = batch.attention[row].bool()
    own = torch.cat([torch.zeros(batch.ids.shape[1] - batch.mask.shape[1]), batch.mask[row]])[keep].bool()
    return batch.ids[row][keep], own


def fails(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        amft.main([str(x) for x in argv])
    error = capsys.readouterr().err.strip().split("\r")[-1]
    assert info.value.code == 2 and len(error.splitlines()) == 1 and error.startswith("amft.py: "), error
    return error


# --- every architecture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_sampled_is_the_policy_that_is_trained(family, checkpoint, monkeypatch, rewarded):
    """Each token's probability when it was drawn is that of a plain forward pass; so is the one that is differentiated."""
    model, tokenizer, task, _ = loaded(checkpoint(family))
    assert model.config._attn_implementation == "sdpa" and not any(module.training for module in model.modules())
    drawn, true = [], torch.multinomial

    def multinomial(probabilities, *args, **kwargs):
        choice = true(probabilities, *args, **kwargs)
        drawn.append(probabilities.gather(1, choice).squeeze(1).log())
        return choice
    monkeypatch.setattr(torch, "multinomial", multinomial)
    rng = random.Random(1)
    rollouts = amft.rollout(model, tokenizer, [task.sample("train", rng) for _ in range(3)], 3, 7)
    batch = rollouts.batch
    assert max(len(e.responses) for e in rollouts.episodes) > 1 and batch.mask.sum(1).unique().numel() > 1
    with torch.no_grad():
        trained = amft.logps_of(model, batch)
    # A draw is made for each column that generation adds; the columns between are the task's.
    columns = [t for t in range(batch.mask.shape[1]) if batch.mask[:, t].any()]
    assert len(columns) == len(drawn)
    sampled = torch.zeros_like(trained)
    sampled[:, columns] = torch.stack(drawn, 1)
    for row in range(len(batch.ids)):
        ids, own = row_of(batch, row)
        expected = plain_logps(model, ids).gather(1, ids[1:, None]).squeeze(1)[own[1:]].float()
        for logps in (sampled, trained):
            torch.testing.assert_close(logps[row][batch.mask[row].bool()], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_forms_of_the_meta_gradient(family, checkpoint, rewarded):
    """Backward and a dot product, as the code does, against forward mode (torch.func.jvp) along d theta/d mu, in float64 and
    with the implementations that have it: sdpa and the grouped product of a mixture of experts have none."""
    model, tokenizer, task, config = loaded(checkpoint(family), samples=3, micro_tokens=1)
    if family in ("moe", "phi3"):  # the same with checkpointing
        model = loaded(checkpoint(family), gradient_checkpointing=1)[0]
    rng = random.Random(1)
    seen = amft.rollout(model, tokenizer, [task.sample("val", rng) for _ in range(3)], 3, 6)
    seen = seen._replace(success=torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 1, 1]]))
    tangent = torch.randn_like(amft.flatten(model))
    slope, error = amft.meta_gradient(model, tangent, seen, config)
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    theta = {name: p.detach() for name, p in model.named_parameters()}
    moved = dict(zip(theta, (part.view_as(p) for p, part in zip(theta.values(), tangent.double().split(
        [p.numel() for p in theta.values()])))))

    def scores(weights):  # log pi of each conversation (9,), alone and by the plain formula
        total = []
        for row in range(9):
            ids, own = row_of(seen.batch, row)
            logits = torch.func.functional_call(model, weights, (ids.unsqueeze(0),), dict(use_cache=False)).logits
            total.append(logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)[own[1:]].sum())
        return torch.stack(total)
    slopes = torch.func.jvp(scores, (theta,), (moved,))[1]
    r = seen.success.double()
    baseline = (r.sum(1, keepdim=True) - r) / 2
    expected = ((r - baseline) * slopes.view(3, 3)).mean(1)
    assert slope == pytest.approx(expected.mean().item(), rel=1e-3)
    assert error == pytest.approx((expected.std() / 3 ** 0.5).item(), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_saved_loaded_and_evaluated(family, checkpoint, tmp_path, rewarded, capsys, monkeypatch):
    """A warm-up, AMFT's steps, and then the policy as anyone would load it."""
    monkeypatch.setattr(tasks.GeneralPointsTurns, "splits", {"val": "one is enough here"})
    out = tmp_path / "run"
    common = ["--task", "gp-turns", "--device", "cpu", "--max-new-tokens", "60", "--eval-n", "3"]
    amft.main([*common, "--smoke", "--model", checkpoint(family), "--out", str(out), "--prompts", "3", "--samples", "3", "--steps",
               "3", "--warmup", "1", "--meta-every", "1", "--sft-batch", "4", "--lr", "1e-3", "--utility", "both"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]
    steps = [row for row in rows if row["kind"] == "step"]
    assert rows[-1]["kind"] == "final" and "meta_grad" in steps[-1] and "meta_own" in steps[-1]
    assert all(row["grad_norm"] > 0 for row in steps)
    theta = torch.load(out / "state.pt", weights_only=True)["theta"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "final"), AutoTokenizer.from_pretrained(out / "final")
    assert torch.equal(amft.flatten(model), theta) and type(model).__name__ == FAMILIES[family][0] + "ForCausalLM"
    assert (tokenizer.eos_token, tasks.end_of_turn(tokenizer)) == FAMILIES[family][3:5]
    before = amft.flatten(AutoModelForCausalLM.from_pretrained(checkpoint(family)))
    assert (theta != before).any()
    seen, true = [], amft.evaluate
    monkeypatch.setattr(amft, "evaluate", lambda *args: seen.append(true(*args)) or seen[-1])
    amft.main([*common, "--eval-only", "--model", str(out / "final")])
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert all(last[key] == (list(value) if isinstance(value, tuple) else value) for key, value in seen[0].items())


# --- what a checkpoint brings along -------------------------------------------------------------------------------

HABITS = dict(
    do_sample=True, temperature=0.3, top_k=3, top_p=0.5, min_p=0.2, typical_p=0.5, epsilon_cutoff=0.05, eta_cutoff=0.05,
    repetition_penalty=1.8, no_repeat_ngram_size=1, encoder_repetition_penalty=1.5, bad_words_ids=[[7], [8]], suppress_tokens=[9, 10],
    begin_suppress_tokens=[11], sequence_bias=[[[12], 50.0]], forced_bos_token_id=13, forced_eos_token_id=14, min_new_tokens=3,
    exponential_decay_length_penalty=[1, 5.0], guidance_scale=2.0, renormalize_logits=True, num_beams=2, num_return_sequences=2,
    penalty_alpha=0.6, max_time=1e-9, stop_strings=["a"], return_dict_in_generate=True, use_cache=False, length_penalty=3.0)


@pytest.mark.parametrize("habit", ["all", "repetition_penalty", "sequence_bias", "suppress_tokens", "min_p"])
def test_nothing_of_the_checkpoints_own_way_to_sample_enters(habit, checkpoint, tmp_path):
    """Sampled tokens have the policy's own frequencies, and greedy ones are its argmax."""
    folder = tmp_path / "habits"
    shutil.copytree(checkpoint("qwen2"), folder)
    file = folder / "generation_config.json"
    habits = HABITS if habit == "all" else {habit: HABITS[habit]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **habits}))
    model, tokenizer, task, _ = loaded(folder)
    episode = task.sample("train", random.Random(0))
    episode.attempts = 1
    prompt = torch.tensor(tasks.encode_shown(model, tokenizer, episode.prompt))
    with torch.no_grad():
        p = model(prompt.unsqueeze(0)).logits[0, -1].softmax(-1).numpy()
    first = amft.rollout(model, tokenizer, [episode], 3000, 2).batch.responses[:, 0]
    counts = np.bincount(first, minlength=len(p))
    assert (abs(counts - 3000 * p) < 5 * np.sqrt(3000 * p * (1 - p)) + 2).all()
    said = amft.rollout(model, tokenizer, [episode], 1, 12, temperature=0).batch
    ids, own = row_of(said, 0)
    argmax = plain_logps(model, ids).argmax(-1)
    assert own.sum() > 2 and torch.equal(ids[1:][own[1:]], argmax[own[1:]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_ends_as_the_template_ends_it(family, checkpoint):
    """Demonstrations are the template's own rendering, turn by turn; the last token that is learned is its end of turn."""
    model, tokenizer, task, _ = loaded(checkpoint(family))
    eos, end = FAMILIES[family][3:5]
    assert tasks.end_of_turn(tokenizer) == end
    assert {tokenizer.convert_ids_to_tokens(i) for i in tasks.ends_of(model, tokenizer)} == {eos, end}
    rng = random.Random(0)
    deal = next(deal for deal in (task.sample("train", rng) for _ in range(200)) if deal.slips)
    batch = amft.encode_demos(model, tokenizer, [deal])
    ids, own = row_of(batch, 0)
    assert tokenizer.decode(ids[own]) == deal.expert + end
    turns = deal.demonstration()
    assert len(turns) == 2
    if FAMILIES[family][1]:
        said = [m for turn in turns for m in (dict(role="user", content=turn.shown), dict(role="assistant", content=turn.response))]
        whole = tokenizer.apply_chat_template(said, tokenize=False).rstrip()
        whole = whole[:whole.rindex(end)] + end  # Phi 3's goes on after the last turn
        said = tokenizer.decode(ids)
        assert said.replace(" ", "") == whole.replace(" ", "")  # Mistral's has a space before what is said


def test_any_of_the_checkpoints_end_tokens_ends_a_response(checkpoint):
    model, tokenizer, task, _ = loaded(checkpoint("qwen2"))
    ids = tokenizer.convert_tokens_to_ids
    for end in ("<|im_end|>", "<|endoftext|>"):
        head = copy.deepcopy(model)
        bias = torch.zeros(model.config.vocab_size)
        bias[ids(end)] = 9.0
        head.get_output_embeddings().register_forward_hook(lambda _, __, out: out + bias)
        episode = task.sample("train", random.Random(0))
        episode.attempts = 1
        seen = amft.rollout(head, tokenizer, [episode], 40, 12)
        own = [row_of(seen.batch, row) for row in range(40)]
        ends = [ids_[mine][-1].item() for ids_, mine in own]
        assert ends.count(ids(end)) > 20 and seen.truncated < 0.5
        for (ids_, mine), e in zip(own, seen.episodes):
            assert sum(i in (ids("<|im_end|>"), ids("<|endoftext|>")) for i in ids_[mine][:-1].tolist()) == 0
            assert "<|" not in e.responses[0]


def test_what_cannot_be_a_policy_is_refused_in_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    """At the start, whatever the fault: no positions, no cache of the usual kind, pictures of another kind."""
    def train(*_):
        raise AssertionError("this was to be refused")
    monkeypatch.setattr(amft, "train", train)
    mamba = tmp_path / "mamba"
    shutil.copytree(checkpoint("plain"), mamba)
    transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=700, hidden_size=16, num_hidden_layers=2, state_size=4)).save_pretrained(mamba)
    start = ["--device", "cpu", "--max-new-tokens", "60", "--out", tmp_path / "run", "--model"]
    assert "not a checkpoint for gp" in fails([*start, mamba], capsys)
    vl = tmp_path / "vl"
    shutil.copytree(checkpoint("qwen2"), vl)
    sizes = dict(SIZES, vocab_size=700, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 1], rope_theta=1e4))
    transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(
        text_config=sizes, vision_config=dict(depth=1, embed_dim=16, num_heads=2, hidden_size=24, mlp_ratio=1),
        image_token_id=5)).save_pretrained(vl)
    assert "not a vision-language checkpoint for gp-vl" in fails([*start, vl, "--task", "gp-vl"], capsys)
    small = tmp_path / "small"
    shutil.copytree(checkpoint("plain"), small)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=300)).save_pretrained(small)
    assert "tokens that the model lacks" in fails([*start, small], capsys)
    true = tasks.inputs
    monkeypatch.setattr(tasks, "inputs", lambda ids, attention, *rest: true(ids, torch.ones_like(attention), *rest))
    assert "padding and a cache change its log-probabilities" in fails([*start, checkpoint("plain")], capsys)
    monkeypatch.setattr(tasks, "inputs", true)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, inputs, **_: [torch.full_like(x, torch.nan) for x in inputs])
    assert "its gradient is not finite" in fails([*start, checkpoint("plain")], capsys)
    assert not (tmp_path / "run").exists()


# --- memory and precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 10, 10 ** 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probabilities_keep_one_copy_of_the_logits(dtype, at_once, monkeypatch):
    """Value and gradient against log_softmax in float64 of the same logits, whatever their dtype."""
    monkeypatch.setattr(tasks.InParts, "at_once", at_once)
    B, T, V = 5, 3, 11
    logits = (4 * torch.randn(B, T, V)).to(dtype).requires_grad_()
    ids, g, kept = torch.randint(V, (B, T)), torch.randn(B, T), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        logps = tasks.InParts.apply(amft.token_logps, logits, ids)
    exact = logits.detach().double().requires_grad_()
    expected = exact.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logps.double(), expected, rtol=rtol, atol=rtol)
    (slope,), (right,) = (torch.autograd.grad(x, y, g.to(x.dtype)) for x, y in ((logps, logits), (expected, exact)))
    assert slope.dtype == dtype
    rounding = 5e-3 if dtype == torch.bfloat16 else rtol
    torch.testing.assert_close(slope.double(), right, rtol=rounding, atol=rounding)
    assert sum(x.numel() for x in kept if x.is_floating_point()) == B * T * V  # the logits, which are there anyway


@pytest.mark.parametrize("family", ["qwen2", "moe", "phi3"])
def test_gradient_checkpointing_changes_memory_alone(family, checkpoint, rewarded):
    """Phi 3 has dropout, which must stay off. Sampling still uses the cache."""
    results = []
    for on in (0, 1):
        model, tokenizer, task, config = loaded(checkpoint(family), gradient_checkpointing=on, samples=3)
        torch.manual_seed(1)
        rng, kept = random.Random(1), []
        seen = amft.rollout(model, tokenizer, [task.sample("train", rng) for _ in range(2)], 3, 6)
        seen = seen._replace(success=torch.tensor([[1.0, 0, 0], [0, 1, 1]]))
        advantages = amft.advantages_of(model, None, seen, config)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            logps = amft.logps_of(model, seen.batch)
        results.append((seen.batch.ids, logps.detach(), amft.rl_gradient(model, seen.batch, advantages, config)[0], sum(kept)))
    for a, b in zip(results[0][:3], results[1][:3]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert results[1][3] < 0.5 * results[0][3]


def test_bf16_keeps_theta_and_its_sums_in_float32(checkpoint, tmp_path, rewarded, monkeypatch):
    """Steps smaller than bfloat16 can tell add up in theta; what samples is theta rounded, and it is what is saved."""
    monkeypatch.setattr(tasks.GeneralPointsTurns, "splits", {"val": "one is enough here"})
    used, true = [], amft.rollout
    monkeypatch.setattr(amft, "rollout", lambda model, *args: used.append({p.dtype for p in model.parameters()}) or true(model, *args))
    out = tmp_path / "run"
    amft.main(["--task", "gp-turns", "--device", "cpu", "--max-new-tokens", "60", "--eval-n", "2", "--smoke", "--model",
               checkpoint("qwen3"), "--out", str(out), "--bf16", "--prompts", "3", "--samples", "3", "--steps", "3", "--warmup", "1",
               "--meta-every", "1", "--sft-batch", "4", "--lr", "1e-6"])
    assert used and all(dtypes == {torch.bfloat16} for dtypes in used)
    state = torch.load(out / "state.pt", weights_only=True)
    theta, before = state["theta"], amft.flatten(AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"))).bfloat16()
    assert theta.dtype == torch.float32 and all(x.dtype == torch.float32 for x in (*state["adam"][:2], *state["method"]["tangents"]))
    final = AutoModelForCausalLM.from_pretrained(out / "final", dtype="auto")
    assert final.dtype == torch.bfloat16 and torch.equal(torch.cat([p.reshape(-1) for p in final.parameters()]), theta.bfloat16())
    moved = theta != before
    assert moved.float().mean() > 0.5 and (theta.bfloat16() == before)[moved].float().mean() > 0.9
    model, tokenizer, task, _ = loaded(checkpoint("qwen3"), bf16=1)
    rng = random.Random(1)
    batch = true(model, tokenizer, [task.sample("train", rng) for _ in range(2)], 3, 6).batch
    trained, temperate = amft.logps_of(model, batch), amft.logps_of(model, batch, 0.7)
    assert trained.dtype == temperate.dtype == torch.float32 and amft.flatten(model).dtype == torch.float32
    for row in range(len(batch.ids)):
        ids, own = row_of(batch, row)
        expected = plain_logps(model, ids).gather(1, ids[1:, None]).squeeze(1)[own[1:]].float()
        assert (trained[row][batch.mask[row].bool()] - expected).abs().max() < 0.1
    exact = (amft.outputs(model, batch)[0].double() / 0.7).log_softmax(-1).gather(-1, batch.responses.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(temperate.double(), exact, rtol=1e-5, atol=1e-5)


# --- a reader's own problems --------------------------------------------------------------------------------------


def write(path, rows, start="", end="\n"):
    path.write_bytes((start + end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end).encode())
    return str(path)


def sums(n, start=0):
    return [dict(prompt=f"What is {i} plus {i % 7}?", solution=f"{i} + {i % 7} = {i + i % 7}", answer=str(i + i % 7))
            for i in range(start, start + n)]


def test_the_example_runs_as_it_is(tmp_path, monkeypatch):
    """recipes/example.jsonl, with the policy that lies here."""
    rows = [json.loads(line) for line in (HERE / "example.jsonl").read_text().split("\n")[:-1]]
    assert len(rows) == 20 and all(set(row) == {"prompt", "solution", "answer"} for row in rows)
    out = tmp_path / "run"
    amft.main(["--task", "math", "--data", str(HERE / "example.jsonl"), "--smoke", "--steps", "4", "--device", "cpu", "--out", str(out)])
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]
    last = {row["split"]: row for row in log if row["kind"] == "eval" and row["step"] == 4}
    assert set(last) == {"val", "id", "heldout"} and sum(row["n"] for row in last.values()) == 20
    assert all(row["success"] > 0.3 for row in last.values())


def test_lines_end_at_newlines_alone(tmp_path):
    rows = sums(60)
    rows[3]["solution"] += " \u2028and \u0085so \u000b on"
    for start, end in (("", "\n"), ("\ufeff", "\n"), ("", "\r\n")):
        problems = tasks.read_problems(write(tmp_path / "own.jsonl", rows, start, end))
        assert len(problems) == 60 and problems[3].solution.startswith(rows[3]["solution"])
        assert [p.answer for p in problems] == [row["answer"] for row in rows] and problems[7].source.endswith("line 8")


def test_every_length_is_checked(checkpoint, tmp_path, capsys):
    rows = sums(60)
    for i in (17, 40):
        rows[i]["solution"] = "so " * i + rows[i]["solution"]
    file = write(tmp_path / "own.jsonl", rows)
    start = ["--task", "math", "--smoke", "--steps", "3", "--eval-n", "1", "--device", "cpu", "--model", checkpoint("plain"),
             "--data", file, "--out", tmp_path / "run"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("plain"))
    lengths = [len(tokenizer(p.solution)["input_ids"]) + 1 for p in tasks.read_problems(file)]
    most = sorted(lengths)[-3]
    assert sorted(lengths)[-2] > most
    error = fails([*start, "--max-new-tokens", most], capsys)
    assert "2 of 60 demonstrations are longer" in error and ("line 18;" in error or "line 41;" in error)
    assert f"the longest has {max(lengths)} tokens" in error
    error = fails([*start, "--max-new-tokens", "500"], capsys)
    assert "more than the model's 512" in error
    rows[5]["prompt"] = "What? " * 400
    error = fails([*start[:-3], write(tmp_path / "own.jsonl", rows), *start[-2:], "--max-new-tokens", max(lengths)], capsys)
    assert "line 6 has" in error and "more than the model's 512" in error


def test_a_text_with_unknown_parts_is_refused(tmp_path, capsys):
    """The tokenizer of the policy that lies here knows few words: those of a later line must not become <unk>."""
    rows = [json.loads(line) for line in (HERE / "example.jsonl").read_text().split("\n")[:-1]]
    rows[11]["prompt"] = rows[11]["prompt"].replace("How many", "How many blue")
    file = write(tmp_path / "own.jsonl", rows)
    assert "line 12" in fails(["--task", "math", "--device", "cpu", "--data", file, "--out", tmp_path / "run"], capsys)


def test_the_longest_solution_is_not_a_demonstration_where_it_is_only_evaluated(checkpoint, tmp_path):
    """Nor the policy's business: it may answer in fewer words."""
    rows = sums(40)
    rows[39]["solution"] = "long " * 60 + rows[39]["solution"]
    task = tasks.Mathematics(data_test=write(tmp_path / "test.jsonl", rows))
    amft.load_policy(configured(checkpoint("plain"), max_new_tokens=100, task="math"), task)


def test_near_duplicates_have_one_role(tmp_path):
    rows = sums(150)
    twins = [dict(row, prompt=row["prompt"].upper().replace(" ", "  ") if i % 2 else "  " + row["prompt"].replace(" ", "\u00a0"))
             for i, row in enumerate(rows)]
    rows += [dict(rows[0], prompt="Caf\u00e9, how many?"), dict(rows[0], prompt="Cafe\u0301, how  many?")]
    task = tasks.Mathematics(data=write(tmp_path / "own.jsonl", rows[:150] + twins + rows[150:]))
    roles = {}
    for role, problems in task.problems.items():
        for problem in problems:
            roles.setdefault(int(problem.source.rsplit(" ")[-1]) - 1, role)
    assert all(roles[i] == roles[i + 150] for i in range(150)) and roles[300] == roles[301]
    assert len({problem.unit for problems in task.problems.values() for problem in problems}) == 151


def test_a_file_that_is_only_evaluated(tmp_path, capsys):
    rows = sums(100)
    rows[90]["solution"] = "long " * 500 + rows[90]["solution"]  # not a demonstration
    data, test = write(tmp_path / "own.jsonl", rows[:70]), write(tmp_path / "test.jsonl", rows[60:])
    rows[65]["prompt"] = rows[65]["prompt"].upper()
    task = tasks.Mathematics(data=data, data_test=write(tmp_path / "test.jsonl", rows[60:]))
    assert "10 of 70 problems" in capsys.readouterr().err
    assert list(task.splits) == ["val", "id", "heldout", "test"]
    units = {role: {p.unit for p in problems} for role, problems in task.problems.items()}
    assert len(units["test"]) == 40 and not units["test"] & (units["train"] | units["val"] | units["heldout"])
    assert len(task.episodes("test", 400)) == 40 and {e.unit for e in task.episodes("test", 400)} == units["test"]
    assert [e.unit for e in task.episodes("test", 7)] == [e.unit for e in task.episodes("test", 7)]
    assert all(p.exam for p in task.problems["test"]) and not any(p.exam for p in task.problems["train"])
    alone = tasks.Mathematics(data_test=test)  # with the task's own training problems
    assert "test" in alone.splits and alone.sample("train", random.Random(0)).source == ""
    assert "--data-test" in fails(["--task", "gp", "--data-test", test, "--out", tmp_path / "run"], capsys)


def test_prompts_ask_for_the_form_of_the_answer(tmp_path):
    row = dict(prompt="What is 6 times 7?", solution="6 * 7 = 42\n#### 42", answer="42")
    rows = [row, dict(row, prompt="What is 6 times 7? Put it in \\boxed{}.", solution="It is \\boxed{42}"),
            dict(row, prompt="What is 6 times 7? End with #### and the number."),
            dict(row, prompt="End with #### and 6 times 7", solution="6 * 7 = 42")]
    asked, boxed, hashes, unsaid = tasks.read_problems(write(tmp_path / "own.jsonl", rows))
    assert asked.prompt == f"What is 6 times 7? {tasks.REQUEST}" and asked.solution == row["solution"] + "\nAnswer: \\boxed{42}"
    assert (boxed.prompt, boxed.solution) == (rows[1]["prompt"], rows[1]["solution"])
    assert (hashes.prompt, hashes.solution) == (rows[2]["prompt"], row["solution"])
    assert unsaid.grade(unsaid.solution) == "correct"
    for wrong in ("6 * 7 = 41\n#### 41", "\\boxed{41}"):
        with pytest.raises(ValueError, match="line 1.*another answer"):
            tasks.read_problems(write(tmp_path / "own.jsonl", [dict(row, solution=wrong)]))


@pytest.mark.parametrize("response, outcome", [
    ("6 * 7 = 42\n#### 42", "correct"), ("#### 42", "correct"), ("so #### 42\n ", "correct"), ("#### 42.0", "correct"),
    ("#### 41", "wrong_answer"), ("#### 42\nor so", "no_answer"), ("#### Step\n42", "no_answer"), ("### 42", "no_answer"),
    ("#### 42 apples", "no_answer"), ("\\boxed{41}\n#### 42", "wrong_answer"), ("#### 41 #### 42", "correct"),
    ("#### 9" + "9" * 10 ** 6, "no_answer"), ("####" * 10 ** 6, "no_answer"), (" " * 10 ** 6 + "#### 42", "no_answer"),
    ("#### 6*7", "no_answer"), ("####", "no_answer")])
def test_an_answer_after_four_hashes(response, outcome):
    assert tasks.Problem("", "", "42").grade(response) == outcome


def test_a_file_is_gone_through_without_replacement(tmp_path):
    task = tasks.Mathematics(data=write(tmp_path / "own.jsonl", sums(500)))
    n = len(task.problems["train"])
    few = [p.source for p in task.training(n // 2, random.Random(0))]
    assert len(set(few)) == n // 2
    many = [p.source for p in task.training(2 * n + 9, random.Random(0))]
    assert len(many) == 2 * n + 9
    for epoch in (many[:n], many[n:2 * n]):
        assert len(set(epoch)) == n
    assert many[:n] != many[n:2 * n] and many[:n // 2] == few
    assert many[:n] != [p.source for p in task.training(n, random.Random(1))]
