"""A reader's own checkpoint: the real classes of transformers with random weights at small width,
a byte-level BPE trained on the spot, chat templates as the families have them.

    python -m pytest -q recipes/test_models.py
"""

import copy
import importlib
import json
import random
import shutil
import sys
from os.path import commonprefix
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
amft = importlib.import_module("amft")
tasks = importlib.import_module("tasks")
checkpoints = importlib.import_module("recipes.checkpoints")
large = importlib.import_module("recipes.large")


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["amft.py"])


# --- checkpoints made here ------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
THINKING = (  # as Qwen 3: what is not thought is said so, in the last response alone
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
TAGS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
SIZES = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512)
LLAMA_ROPE = dict(
    rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=128)
QWEN = dict(eos="<|endoftext|>", end="<|im_end|>", others=["<|im_start|>"])
# kind: the class; end: what the template ends a turn with; others: more special tokens
FAMILIES = {
    "qwen2": dict(kind="Qwen2", template=CHATML, **QWEN, settings=dict(tie_word_embeddings=True)),
    "qwen3": dict(kind="Qwen3", template=THINKING, **QWEN, settings=dict(head_dim=8)),
    "llama": dict(
        kind="Llama", template=HEADERS, bos="<|begin_of_text|>", eos="<|end_of_text|>",
        end="<|eot_id|>", others=["<|start_header_id|>", "<|end_header_id|>"],
        settings=dict(rope_parameters=LLAMA_ROPE)),
    "gemma3": dict(
        kind="Gemma3", template=TURNS, bos="<bos>", eos="<eos>", end="<end_of_turn>",
        others=["<start_of_turn>"],
        settings=dict(head_dim=8, sliding_window=16, query_pre_attn_scalar=8,
                      layer_types=["sliding_attention", "full_attention"])),
    "mistral": dict(
        kind="Mistral", template=INST, bos="<s>", eos="</s>", end="</s>",
        others=["[INST]", "[/INST]"], settings=dict(sliding_window=20)),
    "phi3": dict(
        kind="Phi3", template=TAGS, eos="<|endoftext|>", end="<|end|>",
        others=["<|user|>", "<|assistant|>"], settings=dict(resid_pdrop=0.5, embd_pdrop=0.5)),
    "plain": dict(kind="Llama", eos="<|endoftext|>", end="<|endoftext|>"),  # a base model
    "moe": dict(
        kind="Qwen2Moe", template=CHATML, **QWEN,
        settings=dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                      shared_expert_intermediate_size=16)),
}
SLIDING = ("gemma3", "mistral")
CHATS = [family for family in FAMILIES if family != "plain"]


@pytest.fixture(scope="module")
def texts():
    """What the tasks say."""
    rng = random.Random(0)
    return [turn.shown + turn.response
            for task in (tasks.GeneralPointsTurns(), tasks.Mathematics()) for _ in range(150)
            for turn in task.sample("train", rng).demonstration()]


@pytest.fixture(scope="module")
def bpe(texts):
    """A byte-level BPE, trained on what the tasks say."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece(texts):
    """As SentencePiece does it: a space is a letter, and every text is given one to begin with."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>"], show_progress=False,
        initial_alphabet=[chr(i) for i in range(33, 127)] + ["\n"])
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_of(family, vocabulary):
    """The family's special tokens and chat template on a vocabulary."""
    about = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(vocabulary.to_str()),
        bos_token=about.get("bos"), eos_token=about["eos"])
    special = dict.fromkeys([*about.get("others", []), about["end"]])
    tokenizer.add_special_tokens(dict(extra_special_tokens=list(special)))
    tokenizer.chat_template = about.get("template")
    return tokenizer


def make_checkpoint(family, tokenizer, folder):
    about = FAMILIES[family]
    bos, eos, end = (
        tokenizer.convert_tokens_to_ids(about[name]) if name in about else None
        for name in ("bos", "eos", "end"))
    prefix = "Gemma3Text" if family == "gemma3" else about["kind"]
    config = getattr(transformers, prefix + "Config")(**{
        **SIZES, **about.get("settings", {}),
        "vocab_size": len(tokenizer) + 13,  # more rows than tokens, as real vocabularies are padded
        "pad_token_id": None, "bos_token_id": bos, "eos_token_id": eos})
    torch.manual_seed(0)
    model = getattr(transformers, about["kind"] + "ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = [end, eos] if end != eos else eos
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(bpe, tmp_path_factory):
    """checkpoint(family) -> its folder."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = make_checkpoint(family, tokenizer_of(family, bpe), folder)
        return made[family]
    return make


@pytest.fixture
def rewarded(monkeypatch):
    """Rewards that a random policy does get."""
    def grade(self, text):
        return "correct" if len(text) % 2 else "no_answer"
    monkeypatch.setattr(tasks.Deal, "grade", grade)


@pytest.fixture
def untrained(monkeypatch):
    """What is not refused ends here, not after a whole run."""
    def train(*_):
        raise AssertionError("this was to be refused")
    monkeypatch.setattr(amft, "train", train)


def loaded(folder, **settings):
    """(model, tokenizer, task, config) as a run has them."""
    config = amft.Config(**{
        "device": "cpu", "model": str(folder), "task": "gp-turns", "max_new_tokens": 60,
        **settings})
    task = tasks.TASKS[config.task]()
    return *amft.load_policy(config, task, amft), task, config


def sampled(model, tokenizer, task, prompts, max_new_tokens, split="train"):
    """Three samples of each of some prompts."""
    rng = random.Random(1)
    episodes = [task.sample(split, rng) for _ in range(prompts)]
    return amft.rollout(model, tokenizer, episodes, 3, max_new_tokens)


def single(task):
    """An episode with one attempt."""
    episode = task.sample("train", random.Random(0))
    episode.attempts = 1
    return episode


def slipping(task):
    """An episode whose demonstration has two turns."""
    rng = random.Random(0)
    return next(deal for deal in (task.sample("train", rng) for _ in range(200)) if deal.slips)


def plain_logps(model, ids):
    """log_softmax of an unpadded row (S,) by a forward pass of its own, (S - 1, V), t of t + 1."""
    with torch.no_grad():
        return model(ids.unsqueeze(0)).logits[0, :-1].double().log_softmax(-1)


def own_logps(model, ids, own):
    """log pi of the policy's own tokens in an unpadded row."""
    return plain_logps(model, ids).gather(1, ids[1:, None]).squeeze(1)[own[1:]].float()


def row_of(batch, row):
    """(ids of a row without padding and holes, which of them are the policy's own)."""
    keep = batch.attention_mask[row].bool()
    before = torch.zeros(batch.input_ids.shape[1] - batch.response_mask.shape[1])
    own = torch.cat([before, batch.response_mask[row]])[keep].bool()
    return batch.input_ids[row][keep], own


def fails(argv, capsys):
    """The one line with which a run refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        amft.main([str(x) for x in argv])
    error = capsys.readouterr().err.strip().split("\r")[-1]
    assert info.value.code == 2
    assert len(error.splitlines()) == 1 and error.startswith("amft.py: "), error
    return error


def log_of(folder):
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


# --- every architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_sampled_is_the_policy_that_is_trained(family, checkpoint, monkeypatch, rewarded):
    """A token's probability when drawn, and when differentiated, is a plain forward pass's."""
    model, tokenizer, task, _ = loaded(checkpoint(family))
    assert model.config._attn_implementation == "sdpa"
    assert not any(module.training for module in model.modules())
    drawn, draw, caches, room = [], amft.draw, set(), amft.with_room

    def spied_draw(logits, temperature):
        choice = draw(logits, temperature)
        logps = (logits / temperature).log_softmax(-1)
        drawn.append(logps.gather(1, choice.unsqueeze(1)).squeeze(1))
        return choice

    def with_room(*args):
        cache = room(*args)
        caches.add(type(cache).__name__)
        return cache
    monkeypatch.setattr(amft, "draw", spied_draw)
    monkeypatch.setattr(amft, "with_room", with_room)
    rollouts = sampled(model, tokenizer, task, 3, 7)
    batch, mask = rollouts.batch, rollouts.batch.response_mask
    assert max(len(e.responses) for e in rollouts.episodes) > 1 and mask.sum(1).unique().numel() > 1
    assert caches == {"DynamicCache" if family in SLIDING else "StaticCache"}
    with torch.no_grad():
        trained = amft.logps_of(model, batch)
    # A draw is made for each column that sampling adds; the columns between are the task's.
    columns = [t for t in range(mask.shape[1]) if mask[:, t].any()]
    assert len(columns) == len(drawn)
    spoken = torch.zeros_like(trained)
    spoken[:, columns] = torch.stack(drawn, 1)
    for row in range(len(mask)):
        expected = own_logps(model, *row_of(batch, row))
        for logps in (spoken, trained):
            own = logps[row][mask[row].bool()]
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_forms_of_the_meta_gradient(family, checkpoint, rewarded):
    """Backward and a dot product against forward mode along d theta/d mu, in float64."""
    model, tokenizer, task, config = loaded(checkpoint(family), samples=3, micro_tokens=1)
    if family in ("moe", "phi3"):  # the same with checkpointing
        model = loaded(checkpoint(family), gradient_checkpointing=1)[0]
    rollouts = sampled(model, tokenizer, task, 3, 6, "val")
    rollouts = rollouts._replace(success=torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 1, 1]]))
    tangent = torch.randn_like(amft.flatten(model))
    slope, error = amft.meta_gradient(model, tangent, rollouts, config)
    # sdpa and the grouped product of a mixture of experts have no forward mode.
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    theta = {name: p.detach() for name, p in model.named_parameters()}
    parts = tangent.double().split([p.numel() for p in theta.values()])
    moved = {name: part.view_as(theta[name]) for name, part in zip(theta, parts)}

    def scores(weights):  # log pi of each conversation (9,), alone and by the plain formula
        total = []
        for row in range(9):
            ids, own = row_of(rollouts.batch, row)
            output = torch.func.functional_call(
                model, weights, (ids.unsqueeze(0),), dict(use_cache=False))
            logps = output.logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            total.append(logps[own[1:]].sum())
        return torch.stack(total)
    slopes = torch.func.jvp(scores, (theta,), (moved,))[1]
    r = rollouts.success.double()
    baseline = (r.sum(1, keepdim=True) - r) / 2
    expected = ((r - baseline) * slopes.view(3, 3)).mean(1)
    assert slope == pytest.approx(expected.mean().item(), rel=1e-3)
    assert error == pytest.approx((expected.std() / 3 ** 0.5).item(), rel=1e-3)


RUN = ("--task gp-turns --device cpu --max-new-tokens 60 --smoke --prompts 3 --samples 3 --steps 3 "
       "--warmup 1 --meta-every 1 --sft-batch 4").split()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_saved_loaded_and_evaluated(family, checkpoint, tmp_path, rewarded, monkeypatch):
    """A warm-up, AMFT's steps, and then the policy as anyone would load it."""
    monkeypatch.setattr(tasks.GeneralPointsTurns, "splits", {"val": "one is enough here"})
    out = tmp_path / "run"
    amft.main([*RUN, "--eval-n", "3", "--model", checkpoint(family), "--out", str(out),
               "--lr", "1e-3", "--utility", "both"])
    rows = log_of(out)
    steps = [row for row in rows if row["kind"] == "step"]
    assert rows[-1]["kind"] == "final" and all(row["grad_norm"] > 0 for row in steps)
    assert "meta_grad" in steps[-1] and "meta_own" in steps[-1]
    theta = torch.load(out / "state.pt", weights_only=True)["theta"]
    model = AutoModelForCausalLM.from_pretrained(out / "final")
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    about = FAMILIES[family]
    assert type(model).__name__ == about["kind"] + "ForCausalLM"
    assert tokenizer.eos_token == about["eos"]
    assert checkpoints.end_of_turn(tokenizer) == about["end"]
    assert torch.equal(amft.flatten(model), theta)
    before = amft.flatten(AutoModelForCausalLM.from_pretrained(checkpoint(family)))
    assert (theta != before).any()
    seen, evaluate = [], amft.evaluate

    def watched(*args):
        seen.append(evaluate(*args))
        return seen[-1]
    monkeypatch.setattr(amft, "evaluate", watched)
    amft.main([*RUN[:6], "--eval-n", "3", "--eval-samples", "4", "--eval-only", "--model", str(out / "final")])
    last = [row for row in rows if row["kind"] == "eval"][-1]
    at_training = [row for row in seen if row["split"] == last["split"]][-1]
    for key, value in at_training.items():
        if key == "hits":
            continue
        assert last[key] == (list(value) if isinstance(value, tuple) else value), key


# --- what a checkpoint brings along ---------------------------------------------------------------

HABITS = dict(
    do_sample=True, temperature=0.3, top_k=3, top_p=0.5, min_p=0.2, typical_p=0.5,
    epsilon_cutoff=0.05, eta_cutoff=0.05, repetition_penalty=1.8, no_repeat_ngram_size=1,
    encoder_repetition_penalty=1.5, bad_words_ids=[[7], [8]], suppress_tokens=[9, 10],
    begin_suppress_tokens=[11], sequence_bias=[[[12], 50.0]], forced_bos_token_id=13,
    forced_eos_token_id=14, min_new_tokens=3, exponential_decay_length_penalty=[1, 5.0],
    guidance_scale=2.0, renormalize_logits=True, num_beams=2, num_return_sequences=2,
    penalty_alpha=0.6, max_time=1e-9, stop_strings=["a"], return_dict_in_generate=True,
    use_cache=False, length_penalty=3.0)


@pytest.mark.parametrize(
    "habit", ["all", "repetition_penalty", "sequence_bias", "suppress_tokens", "min_p"])
def test_nothing_of_the_checkpoints_own_way_to_sample_enters(habit, checkpoint, tmp_path):
    """Sampled tokens have the policy's own frequencies, and greedy ones are its argmax."""
    folder = tmp_path / "habits"
    shutil.copytree(checkpoint("qwen2"), folder)
    file = folder / "generation_config.json"
    habits = HABITS if habit == "all" else {habit: HABITS[habit]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **habits}))
    model, tokenizer, task, _ = loaded(folder)
    episode = single(task)
    prompt = torch.tensor(amft.encode_text(model, tokenizer, episode.prompt))
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
    """A wrong end of turn, or one end where a checkpoint has two; the end must be learned, too."""
    model, tokenizer, task, _ = loaded(checkpoint(family))
    eos, end = FAMILIES[family]["eos"], FAMILIES[family]["end"]
    assert checkpoints.end_of_turn(tokenizer) == end
    ends = amft.stop_token_ids(model)
    assert ends == checkpoints.ends_of(model, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ends) == list(dict.fromkeys([end, eos]))
    deal = slipping(task)
    batch = amft.encode_demos(model, tokenizer, [deal])
    ids, own = row_of(batch, 0)
    assert tokenizer.decode(ids[own]) == deal.expert + end


def conversation(turns):
    roles = ("user", "assistant")
    texts = [text for turn in turns for text in (turn.shown, turn.response)]
    return [dict(role=roles[i % 2], content=text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("family", CHATS)
def test_a_demonstration_is_the_templates_own_text(family, checkpoint):
    """One space too few before a response, a header that is missing, a turn that ends twice."""
    model, tokenizer, task, _ = loaded(checkpoint(family))
    end = FAMILIES[family]["end"]
    turns = slipping(task).demonstration()
    assert len(turns) == 2
    batch = amft.encode_demos(model, tokenizer, [slipping(task)])
    ours = tokenizer.decode(row_of(batch, 0)[0])
    theirs = tokenizer.apply_chat_template(conversation(turns), tokenize=False)
    theirs = theirs[:theirs.rindex(end)] + end  # Phi 3's goes on after the last turn
    if family == "qwen3":  # the first response was the last one when it was said
        first, second = ours.split(turns[0].response)
        head, silent = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
        assert first.endswith(head + silent) and silent not in theirs.split(turns[0].response)[0]
        ours = first.removesuffix(silent) + turns[0].response + second
    n = len(commonprefix([ours, theirs]))  # a diff of long lines takes minutes
    assert (ours[n:][:30], theirs[n:][:30]) == ("", "")


def test_a_space_that_a_tokenizer_writes_by_itself_is_not_written_twice(sentencepiece, tmp_path):
    """SentencePiece begins a text with a space: ids are those of the whole, Mistral's template."""
    folder = make_checkpoint("mistral", tokenizer_of("mistral", sentencepiece), tmp_path)
    model, tokenizer, task, _ = loaded(folder, max_new_tokens=150)
    turns = slipping(task).demonstration()
    batch = amft.encode_demos(model, tokenizer, [slipping(task)])
    theirs = tokenizer.apply_chat_template(conversation(turns), tokenize=False)
    expected = tokenizer(theirs, add_special_tokens=False)["input_ids"]
    space = "\u2581"
    assert any(token.startswith(space) for token in tokenizer.convert_ids_to_tokens(expected))
    assert row_of(batch, 0)[0].tolist() == expected


@pytest.mark.parametrize("template, error", [
    (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "is trained"),
    (CHATML.replace("{{ m.content }}", "{{ m.content | replace('=', ' = ') }}"), "is trained"),
    (CHATML.replace("{{ m.content }}", "{{ m.content }} over"), "writes 'over' between")])
def test_a_template_that_writes_responses_otherwise_is_refused(
        template, error, checkpoint, tmp_path, capsys, untrained):
    """What is learned would not be what anyone who uses the template reads."""
    shutil.copytree(checkpoint("qwen2"), tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text(template)
    argv = ["--device", "cpu", "--max-new-tokens", "60", "--out", tmp_path / "run"]
    assert error in fails([*argv, "--model", tmp_path / "other"], capsys)


OPENS = CHATML.replace("{{ m.content }}", "{{ thought }}{{ m.content }}")
THOUGHT = "{% if m.role == 'assistant' %}{% set thought = '<think>\n' %}{% else %}{% set thought = '' %}{% endif %}"
CLOSES = {  # by which word a template closes the thought that it opens before every response
    "field": "{% if m.reasoning_content is string %}"
             "{% set thought = thought + m.reasoning_content + '\n</think>\n\n' %}{% endif %}",
    "word": "{% if enable_thinking is defined and not enable_thinking %}"
            "{% set thought = thought + '\n</think>\n\n' %}{% endif %}",
    "own": "{% if m.role == 'assistant' and quiet is defined %}{% set thought = '' %}{% endif %}",
    "never": ""}


def thinking(how):
    """A template whose response begins in a thought, which it closes if it is told how."""
    closing = CLOSES[how]
    if how == "word":
        closing = "{% if m.role == 'assistant' %}" + closing + "{% endif %}"
    return OPENS.replace("<|im_start|>", THOUGHT + closing + "<|im_start|>", 1)


@pytest.mark.parametrize("how", CLOSES)
def test_demonstrations_are_no_thoughts(how, checkpoint, tmp_path, capsys, untrained):
    """A response that is learned inside a <think> which stays open."""
    shutil.copytree(checkpoint("qwen2"), tmp_path / "thinks")
    (tmp_path / "thinks" / "chat_template.jinja").write_text(thinking(how))
    settings = dict(chat_template_kwargs='{"quiet": true}') if how == "own" else {}
    if how == "never":
        argv = ["--device", "cpu", "--max-new-tokens", "60", "--out", tmp_path / "run"]
        assert "opens a <think>" in fails([*argv, "--model", tmp_path / "thinks"], capsys)
        argv += ["--chat-template-kwargs", "quiet"]
        assert "is not a JSON object" in fails([*argv, "--model", tmp_path / "thinks"], capsys)
        return
    model, tokenizer, task, _ = loaded(tmp_path / "thinks", **settings)
    batch = amft.encode_demos(model, tokenizer, [slipping(task)])
    said = tokenizer.decode(row_of(batch, 0)[0])
    thoughts = 0 if how == "own" else 2
    assert said.count("<think>\n") == said.count("\n</think>\n\n") == thoughts
    sampled(model, tokenizer, task, 2, 4)


def test_a_template_is_not_told_todays_date(checkpoint, tmp_path):
    """The same seed, and another log tomorrow."""
    shutil.copytree(checkpoint("llama"), tmp_path / "dated")
    dated = "Today is {% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}. " + HEADERS
    (tmp_path / "dated" / "chat_template.jinja").write_text(dated)
    model, tokenizer, task, _ = loaded(tmp_path / "dated", max_new_tokens=80)
    prompt = tokenizer.decode(amft.encode_text(model, tokenizer, single(task).prompt))
    assert "Today is 26 Jul 2024. " in prompt


def test_a_mixtures_router_is_not_asked(checkpoint, tmp_path):
    """output_router_logits, as Mixtral's and Qwen3-MoE's configurations may have it."""
    shutil.copytree(checkpoint("moe"), tmp_path / "moe")
    settings = json.loads((tmp_path / "moe" / "config.json").read_text())
    settings["output_router_logits"] = True
    (tmp_path / "moe" / "config.json").write_text(json.dumps(settings))
    model, tokenizer, task, config = loaded(tmp_path / "moe")
    batch = sampled(model, tokenizer, task, 2, 4).batch
    assert not model.config.output_router_logits
    assert amft.logps_of(model, batch).shape == batch.response_mask.shape


def test_a_refusal_names_the_kind_of_attention(bpe, tmp_path, capsys, untrained):
    """Linear attention and ALiBi: refused for numbers that differ, without a word of why."""
    argv = ["--device", "cpu", "--max-new-tokens", "60", "--out", tmp_path / "run", "--model"]
    tokenizer = tokenizer_of("plain", bpe)
    ids = dict(vocab_size=len(tokenizer) + 13, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    models = {
        "linear attention": transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(
            **SIZES, **ids, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
            linear_num_key_heads=2, linear_num_value_heads=4, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"])),
        "ALiBi": transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=24, n_layer=2, n_head=4, **ids))}
    for kind, model in models.items():
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        folder = tmp_path / kind
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        error = fails([*argv, folder], capsys)
        assert kind in error and "not supported" in error


def test_a_tokenizer_whose_space_the_template_lacks_is_refused(
        sentencepiece, tmp_path, capsys, untrained):
    """SentencePiece, and a response that begins a line: as it is encoded a space would be there."""
    folder = make_checkpoint("phi3", tokenizer_of("phi3", sentencepiece), tmp_path / "checkpoint")
    argv = ["--device", "cpu", "--max-new-tokens", "150", "--out", tmp_path / "run"]
    error = fails([*argv, "--model", folder], capsys)
    assert "its chat template writes" in error and "is trained" in error


def test_any_of_the_checkpoints_end_tokens_ends_a_response(checkpoint):
    """Each end alone stops a response, is its last token, and is not in the text that is graded."""
    model, tokenizer, task, _ = loaded(checkpoint("qwen2"))
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for end in ends:
        head = copy.deepcopy(model)
        bias = torch.zeros(model.config.vocab_size)
        bias[end] = 9.0
        head.get_output_embeddings().register_forward_hook(lambda _, __, out: out + bias)
        rollouts = amft.rollout(head, tokenizer, [single(task)], 40, 12)
        last = 0
        for row, episode in enumerate(rollouts.episodes):
            ids, own = row_of(rollouts.batch, row)
            response = ids[own].tolist()
            last += response[-1] == end
            assert not set(response[:-1]) & set(ends) and "<|" not in episode.responses[0]
        assert last > 20 and rollouts.truncated < 0.5


def test_what_cannot_be_a_policy_is_refused_in_one_line(
        checkpoint, tmp_path, capsys, monkeypatch, untrained):
    """Faults that show late in a run: no positions, no cache, other pictures, no gradient."""
    mamba, vl, small = (tmp_path / name for name in ("mamba", "vl", "small"))
    shutil.copytree(checkpoint("plain"), mamba)
    transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=700, hidden_size=16, num_hidden_layers=2, state_size=4)).save_pretrained(mamba)
    start = ["--device", "cpu", "--max-new-tokens", "60", "--out", tmp_path / "run", "--model"]
    assert "not a checkpoint for gp" in fails([*start, mamba], capsys)
    shutil.copytree(checkpoint("qwen2"), vl)
    rope = dict(rope_type="default", mrope_section=[1, 1, 1], rope_theta=1e4)
    vision = dict(depth=1, embed_dim=16, num_heads=2, hidden_size=24, mlp_ratio=1)
    transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(
        text_config=dict(SIZES, vocab_size=700, rope_parameters=rope), vision_config=vision,
        image_token_id=5)).save_pretrained(vl)
    error = fails([*start, vl, "--task", "gp-vl"], capsys)
    assert "not a vision-language checkpoint for gp-vl" in error
    shutil.copytree(checkpoint("plain"), small)
    few = transformers.LlamaConfig(**SIZES, vocab_size=300)
    transformers.LlamaForCausalLM(few).save_pretrained(small)
    assert "tokens that the model lacks" in fails([*start, small], capsys)
    true = amft.model_inputs

    def without_padding(ids, attention_mask, *rest):
        return true(ids, torch.ones_like(attention_mask), *rest)
    monkeypatch.setattr(amft, "model_inputs", without_padding)
    error = fails([*start, checkpoint("plain")], capsys)
    assert "padding and a cache change its log-probabilities" in error
    monkeypatch.setattr(amft, "model_inputs", true)

    def no_gradient(loss, inputs, **_):
        return [torch.full_like(x, torch.nan) for x in inputs]
    monkeypatch.setattr(torch.autograd, "grad", no_gradient)
    assert "its gradient is not finite" in fails([*start, checkpoint("plain")], capsys)
    assert not (tmp_path / "run").exists()


# --- memory and precision -------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 10, 10 ** 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probabilities_keep_one_copy_of_the_logits(dtype, at_once, monkeypatch):
    """Value and gradient against log_softmax in float64 of the same logits, of any dtype."""
    monkeypatch.setattr(large.InParts, "at_once", at_once)
    B, T, V = 5, 3, 11
    logits = (4 * torch.randn(B, T, V)).to(dtype).requires_grad_()
    ids, g, kept = torch.randint(V, (B, T)), torch.randn(B, T), []

    def keep(x):
        kept.append(x)
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logps = large.InParts.apply(amft.token_logps, logits, ids)
    exact = logits.detach().double().requires_grad_()
    expected = exact.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logps.double(), expected, rtol=rtol, atol=rtol)
    slope, = torch.autograd.grad(logps, logits, g.to(logps.dtype))
    right, = torch.autograd.grad(expected, exact, g.double())
    assert slope.dtype == dtype
    rounding = 5e-3 if dtype == torch.bfloat16 else rtol
    torch.testing.assert_close(slope.double(), right, rtol=rounding, atol=rounding)
    # The logits, which are there anyway.
    assert sum(x.numel() for x in kept if x.is_floating_point()) == B * T * V


@pytest.mark.parametrize("family", ["qwen2", "moe", "phi3"])
def test_gradient_checkpointing_changes_memory_alone(family, checkpoint, rewarded):
    """Phi 3 has dropout, which must stay off. Sampling still uses the cache."""
    results, memory = [], []
    for on in (0, 1):
        model, tokenizer, task, config = loaded(
            checkpoint(family), gradient_checkpointing=on, samples=3)
        torch.manual_seed(1)
        rollouts = sampled(model, tokenizer, task, 2, 6)
        rollouts = rollouts._replace(success=torch.tensor([[1.0, 0, 0], [0, 1, 1]]))
        batch, kept = rollouts.batch, []
        advantages = amft.advantages_of(model, None, rollouts, config)

        def keep(x):
            kept.append(x.numel())
            return x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logps = amft.logps_of(model, batch)
        gradient = amft.rl_gradient(model, batch, advantages, config)[0]
        results.append((batch.input_ids, logps.detach(), gradient))
        memory.append(sum(kept))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert memory[1] < 0.5 * memory[0]


def test_bf16_keeps_theta_and_its_sums_in_float32(checkpoint, tmp_path, rewarded, monkeypatch):
    """Steps that bfloat16 cannot tell add up in theta; what samples, and is saved, is rounded."""
    monkeypatch.setattr(tasks.GeneralPointsTurns, "splits", {"val": "one is enough here"})
    used, rollout = set(), amft.rollout

    def watched(model, *args, **more):
        used.update(p.dtype for p in model.parameters())
        return rollout(model, *args, **more)
    monkeypatch.setattr(amft, "rollout", watched)
    out = tmp_path / "run"
    amft.main([*RUN, "--eval-n", "2", "--model", checkpoint("qwen3"), "--out", str(out), "--bf16",
               "--lr", "1e-6"])
    assert used == {torch.bfloat16}
    state = torch.load(out / "state.pt", weights_only=True)
    theta, sensitivity = state["theta"], state["modules"][0]["sensitivity"]
    sums = [theta, *state["adam"][:2], *sensitivity]
    assert all(x.dtype == torch.float32 for x in sums)
    final = AutoModelForCausalLM.from_pretrained(out / "final", dtype="auto")
    saved = torch.cat([p.reshape(-1) for p in final.parameters()])
    assert final.dtype == torch.bfloat16 and torch.equal(saved, theta.bfloat16())
    before = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"))
    before = amft.flatten(before).bfloat16()
    moved = theta != before
    assert moved.float().mean() > 0.5
    assert (theta.bfloat16() == before)[moved].float().mean() > 0.9


def test_log_probabilities_of_bf16_are_float32(checkpoint, rewarded):
    """Near a plain pass's; the temperature divides logits that are not rounded again."""
    model, tokenizer, task, _ = loaded(checkpoint("qwen3"), bf16=1)
    batch = sampled(model, tokenizer, task, 2, 6).batch
    trained, temperate = amft.logps_of(model, batch), amft.logps_of(model, batch, 0.7)
    assert trained.dtype == temperate.dtype == amft.flatten(model).dtype == torch.float32
    for row in range(len(batch.input_ids)):
        expected = own_logps(model, *row_of(batch, row))
        assert (trained[row][batch.response_mask[row].bool()] - expected).abs().max() < 0.1
    logits, _ = amft.response_outputs(model, batch)
    exact = (logits.double() / 0.7).log_softmax(-1)
    exact = exact.gather(-1, batch.responses.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(temperate.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_first_ratio_is_1_whatever_is_rounded(checkpoint, rewarded, monkeypatch):
    """PPO's ratio against the log-probabilities of sampling, which bfloat16 rounds differently; or
    one that changes with the size of a pass."""
    gpu = importlib.import_module("benchmarks.gpu")
    ratios, exp = [], torch.Tensor.exp
    for bf16, most in ((0, 1e-4), (1, 0.5)):
        model, tokenizer, task, config = loaded(checkpoint("qwen3"), bf16=bf16, micro_tokens=60)
        episodes = [task.sample("train", random.Random(i)) for i in range(4)]
        sampling, parts = gpu.first_ratios(model, tokenizer, episodes, 3, 30, 60)
        assert 0 < (sampling - 1).abs().max() < most
        assert (parts - 1).abs().max() < most / 5
        rollouts = sampled(model, tokenizer, task, 3, 20)
        advantages = amft.Advantages(torch.ones_like(rollouts.batch.response_mask), 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "exp", lambda x: ratios.append(exp(x)) or ratios[-1])
            amft.rl_gradient(model, rollouts.batch, advantages, config)
    assert ratios and all((ratio == 1).all() for ratio in ratios)


def test_a_conversation_that_has_no_room_is_refused_before_the_run(checkpoint, monkeypatch):
    """A demonstration of many turns, each short enough, that ends beyond the model's positions in the middle of a run."""
    folder = checkpoint("plain")
    task = amft.TASKS["virl"]()
    config = amft.Config(task="virl", model=str(folder), device="cpu", max_new_tokens=400)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    longest = amft.encode_demos(model, tokenizer, task.training(100, random.Random(0))).input_ids.shape[1]
    assert longest > 2 * 400
    monkeypatch.setattr(checkpoints, "max_length", lambda model: longest - 200)
    with pytest.raises(ValueError, match="a demonstration of the task has .* the model has room for"):
        checkpoints.check_texts(amft, model, tokenizer, task, config.max_new_tokens)
    monkeypatch.setattr(checkpoints, "max_length", lambda model: 2 * longest)
    checkpoints.check_texts(amft, model, tokenizer, task, config.max_new_tokens)
