"""Tests of pictures and of policies with eyes: what is drawn can be read back, what the policy is
handed is what was drawn, and Eq. 5 holds through a vision-language model, too.

    python -m pytest -q harness/test_pictures.py
"""

import copy
import importlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils import vector_to_parameters
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
amft = importlib.import_module(os.environ.get("AMFT_MODULE", "amft"))
tasks = importlib.import_module("tasks")
loading = importlib.import_module("harness.loading")
pictures = importlib.import_module("harness.pictures")
SEED = int(os.environ.get("AMFT_TEST_SEED", "0"))
TASKS = [name for name in tasks.TASKS if name.endswith("-vl")]


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(SEED)
    monkeypatch.setattr(sys, "argv", ["amft.py"])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "base-vl")


@pytest.fixture(scope="module")
def tiny_eyes(tmp_path_factory, tokenizer):
    """A vision-language checkpoint small enough for end-to-end tests."""
    torch.manual_seed(SEED)
    folder = tmp_path_factory.mktemp("eyes")
    config = LlavaConfig.from_pretrained(ROOT / "base-vl")
    parts = (config.text_config, config.vision_config)
    for part in parts:
        part.hidden_size = 12
        part.intermediate_size = 16
        part.num_attention_heads = 2
    config.text_config.num_hidden_layers = 2
    config.text_config.num_key_value_heads = 2
    config.text_config.head_dim = 6
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def shipped(name, **settings):
    """(task, model, tokenizer, config): a task, and the policy that lies here for it."""
    task = tasks.TASKS[name]()
    config = amft.Config(task=name, device="cpu", **settings)
    model, tokenizer = loading.load_policy(config, task, amft)
    return task, model, tokenizer, config


def drawn(task, n, split="train"):
    """n episodes of a split."""
    rng = random.Random(SEED)
    return [task.sample(split, rng) for _ in range(n)]


# --- What is drawn ---

def cards_of(picture):
    """The four cards, in reading order."""
    return [picture[top:top + 24, left:left + 24] for top in (0, 24) for left in (0, 24)]


def marks(card):
    """Where a card is not white, whatever the ink."""
    return (card.astype(int).sum(-1) < 600)[2:22, 4:20]


def nearest(seen, templates):
    """The name of the template that differs from what is seen in the fewest pixels."""
    return min(templates, key=lambda name: (seen != templates[name]).sum())


def test_a_nearest_template_reader_recovers_every_card_in_black_and_red():
    """Cards that look alike, lie in another order, or have another ink than their suit's."""
    rank_of = {}
    for rank in tasks.RANKS:
        card = cards_of(tasks.draw_cards((rank,) * 4, "SSSS"))[0]
        rank_of[rank] = marks(card)[:12]
    pip_of = {}
    for suit in "SCHD":
        card = cards_of(tasks.draw_cards(("A",) * 4, suit * 4))[0]
        pip_of[suit] = marks(card)[12:]
    rng = random.Random(SEED)
    seen = set()
    for suits in 150 * ("SC", "HD", "SCHD"):
        ranks = rng.choices(tasks.RANKS, k=4)
        chosen = rng.choices(suits, k=4)
        picture = tasks.draw_cards(tuple(ranks), "".join(chosen))
        assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8
        for rank, suit, card in zip(ranks, chosen, cards_of(picture)):
            assert nearest(marks(card)[:12], rank_of) == rank
            assert nearest(marks(card)[12:], pip_of) == suit
            inner = card[3:22, 5:20]
            red = inner[marks(card)[1:, 1:][:19, :15]].mean(0)[0]
            assert (red > 100) == (suit in "HD")
            seen.add((rank, suit))
    assert len(seen) == 52


VIEWS = ((0, 0), (0, 24), (24, 0), (24, 24))  # front and right above, behind and left below
PLACES = [(view, offset) for view in range(4) for offset in (-1, 0, 1)]


def read_sign(picture, place, style):
    """(how unlike, name) of the sign that fits best in a place of the picture."""
    view, offset = place
    top = VIEWS[view][0] + 5
    left = VIEWS[view][1] + 8 + 7 * offset
    patch = picture[top:top + 7, left:left + 7]
    ink = np.array(style.ink, float)
    board = np.array(style.sign, float)
    fits = []
    for name, sign in tasks.signs().items():
        expected = np.where(sign[..., None], ink, board)
        fits.append((abs(patch - expected).mean(), name))
    return min(fits)


@pytest.mark.parametrize("look", range(len(tasks.LOOKS)))
def test_a_nearest_sign_reader_recovers_every_landmark_in_every_look(look):
    """A landmark at another bearing than the route's, or one that cannot be told from another."""
    assert "front and right above, behind and left below" in tasks.PictureRoute.layout
    for i, name in enumerate(tasks.NAMES):
        bearing = (i + look) % 8
        picture = tasks.draw_views((name, bearing), look, "x").astype(float)
        assert picture.shape == (48, 48, 3)
        read = {place: read_sign(picture, place, tasks.LOOKS[look]) for place in PLACES}
        wanted = {(view, offset) for view, offset in PLACES if (2 * view + offset) % 8 == bearing}
        best = sorted(read, key=lambda place: read[place][0])[:len(wanted)]
        assert set(best) == wanted
        assert all(read[place][1] == name for place in wanted)
    assert not np.array_equal(tasks.draw_views(None, look, "x"), picture)


@pytest.mark.parametrize("split", ["train", *tasks.GeneralPointsPictures.splits])
def test_cards_are_in_the_picture_alone(split):
    """A prompt that tells the cards, red suits where training has black ones, cards misread."""
    for deal in drawn(tasks.GeneralPointsPictures(), 100, split):
        assert set(deal.suits) <= set("HD" if split == "ood_visual" else "SC")
        assert f"Cards: {tasks.IMAGE}. J counts as" in deal.prompt
        assert deal.image.shape == (48, 48, 3)
        wrong = json.loads(deal.expert)
        wrong["cards"][3] = "A" if wrong["cards"][3] != "A" else "K"
        response = json.dumps(wrong)
        assert deal.grade(response) == "wrong_cards"
        assert not deal.recognised(response)


@pytest.mark.parametrize("split", ["train", *tasks.VIRLPictures.splits])
def test_landmarks_are_in_the_picture_alone(split):
    """An observation that names its landmark, or another look than the split's."""
    for route in drawn(tasks.VIRLPictures(), 30, split):
        assert (route.look > 0) == (split == "ood_visual")
        _, first = route.prompt.split("\nO_1: ")
        assert first == f"{tasks.IMAGE}You observe an image of 4 views\nA_1: "
        for turn in route.demonstration()[1:]:
            assert tasks.NOTHING not in turn.shown
            assert not any(name in turn.shown for name in tasks.NAMES)


def test_deals_in_pictures_keep_their_roles():
    """A deal that is trained on and asked for in red."""
    for split in ("train", "val", "heldout", "ood_visual"):
        deals = drawn(tasks.GeneralPointsPictures(), 50, split)
        role = "heldout" if split == "ood_visual" else split
        assert {tasks.ROLES[deal.unit] for deal in deals} == {role}


# --- What python tasks.py --show draws ---

def show(name, folder, **environment):
    argv = [sys.executable, str(ROOT / "tasks.py"), "--show", name]
    return subprocess.run(
        argv, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("name", TASKS)
def test_show_draws_what_the_policy_sees(name, tmp_path):
    """No picture, an empty one, or one that is left anywhere but below runs/, which git ignores."""
    pytest.importorskip("matplotlib")
    shown = show(name, tmp_path)
    assert shown.returncode == 0, shown.stderr
    for split in ("train", *tasks.TASKS[name].splits):
        assert f"--- {split}: " in shown.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.relative_to(tmp_path) for path in files] == [Path("runs", f"{name}.png")]
    assert files[0].stat().st_size > 10_000
    assert shown.stdout.splitlines()[-1].endswith(f"runs/{name}.png")


def test_show_without_matplotlib_ends_in_a_line(tmp_path):
    """An ImportError's traceback where the pictures cannot be drawn, or a text that is lost."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError('it is not here')")
    folder = tmp_path / "empty"
    folder.mkdir()
    shown = show("gp-vl", folder, PYTHONPATH=str(tmp_path))
    assert shown.returncode == 0 and shown.stderr == ""
    assert "--- ood_visual: " in shown.stdout
    assert "pip install matplotlib" in shown.stdout.splitlines()[-1]
    assert list(folder.iterdir()) == []


# --- What the policy is handed ---

def test_pixels_are_from_minus_one_to_one():
    """Pixels from 0 to 1, colours last, or pictures in another order than their rows'."""
    rng = np.random.default_rng(SEED)
    images = [rng.integers(0, 256, (48, 48, 3), np.uint8) for _ in range(3)]
    images[0][0, 0] = (0, 255, 51)
    made = pictures.pixel_values([images[:1], [], images[1:]], "cpu")
    pixels = made["pixel_values"]
    assert list(made) == ["pixel_values"] and pixels.dtype == torch.float32
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])
    assert pixels.shape == (3, 3, 48, 48)
    for picture, image in zip(pixels, images):
        for colour in range(3):
            expected = (image[:, :, colour].astype(float) - 127.5) / 127.5
            assert np.allclose(picture[colour].numpy(), expected, atol=1e-6)


def test_nothing_is_handed_of_no_pictures():
    """An empty pixel_values, which a policy without eyes does not take."""
    assert pictures.pixel_values([[], []], "cpu") == {}


def views_of(route):
    """A route's pictures, drawn one by one from its stops."""
    return [tasks.draw_views(stop.landmark, route.look, f"{route.city} {point}")
            for point, stop in enumerate(route.stops)]


def test_a_conversation_has_its_pictures_in_reading_order():
    """Pictures of a demonstration or a rollout in another order, twice, or of another row."""
    task, model, tokenizer, config = shipped("virl-vl")
    routes = drawn(task, 3)
    demos = amft.encode_demos(model, tokenizer, routes)
    for route, images in zip(routes, demos.images):
        assert not np.array_equal(views_of(route), views_of(route)[::-1])
        assert np.array_equal(images, views_of(route))
    rollouts = amft.rollout(model, tokenizer, routes, 4, config.max_new_tokens)
    assert len({episode.point for episode in rollouts.episodes}) > 1
    for row, episode in enumerate(rollouts.episodes):
        seen = episode.point + (not episode.success)  # a stop's is shown once, not at its retries
        expected = views_of(routes[row // 4])[:seen]
        assert np.array_equal(rollouts.batch.images[row], expected)


def test_every_picture_has_its_tokens():
    """A text with more or fewer tokens for a picture than the model reads of it."""
    _, model, tokenizer, _ = shipped("gp-vl")
    ids = amft.encode_text(model, tokenizer, f"Cards: {tasks.IMAGE}. {tasks.IMAGE}")
    features = model.get_image_features(torch.zeros(2, 3, 48, 48)).pooler_output
    assert ids.count(model.config.image_token_id) == sum(len(of_one) for of_one in features)


def test_a_policy_cannot_say_a_picture():
    """A sampled picture token, with which no picture would come."""
    task, model, tokenizer, _ = shipped("gp-vl")
    batch = amft.encode_demos(model, tokenizer, drawn(task, 1))
    with torch.no_grad():
        logits, _ = amft.response_outputs(model, batch)
    assert (logits[..., model.config.image_token_id] < -1e8).all()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_with_pictures_runs(name, tiny_eyes, tmp_path, monkeypatch):
    """A task that cannot be trained on, or a log without what its conversations tell."""
    splits = dict(list(tasks.TASKS[name].splits.items())[:2])
    monkeypatch.setattr(tasks.TASKS[name], "splits", splits)
    out = tmp_path / name
    amft.main([
        "--task", name,
        "--smoke",
        "--model", tiny_eyes,
        "--out", str(out),
        "--device", "cpu",
        "--max-new-tokens", "60",
        "--prompts", "3",
        "--steps", "3",
        "--warmup", "1",
        "--eval-n", "4",
        "--meta-every", "2"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kinds = Counter(row["kind"] for row in rows)
    assert kinds == {"config": 1, "step": 3, "eval": 2 * len(splits), "final": 1}
    assert "val" in splits
    steps = [row for row in rows if row["kind"] == "step"]
    evals = [row for row in rows if row["kind"] == "eval"]
    assert "meta_grad" in steps[-1]
    for row in evals:
        assert "recognition" in row and ("step_accuracy" in row) == (name == "virl-vl")
        shares = [row[key] for key in ("step_accuracy", "first_try", "recognition") if key in row]
        assert all(0 <= low <= share <= high <= 1 for share, low, high in shares)


# --- Eq. 5 through a policy with eyes ---

def flat_grad(loss, model):
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([grad.reshape(-1) for grad in grads])


def torch_step(model, grad, state, lr, max_norm):
    """A step by torch: clip_grad_norm_ and AdamW on a copy of the model."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    ms = state.m.split(sizes)
    vs = state.v.split(sizes)
    grads = grad.split(sizes)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for p, m, v, g in zip(parameters, ms, vs, grads):
        p.grad = g.view_as(p).clone()
        optimizer.state[p] = dict(
            step=torch.tensor(float(state.step)),
            exp_avg=m.view_as(p).clone(),
            exp_avg_sq=v.view_as(p).clone())
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return model


@pytest.fixture
def in_float64(monkeypatch):
    """The library takes norms and softmax in float32: too coarse for a finite difference."""
    def norm(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))


def test_meta_gradient_of_a_policy_with_eyes(tiny_eyes, tokenizer, in_float64):
    """dU/dmu that is not the finite difference of the exact U through torch's own step."""
    # U is over every response of one token to three prompts with a picture.
    task = tasks.GeneralPointsPictures()
    config = amft.Config(task="gp-vl", device="cpu", model=tiny_eyes, max_new_tokens=60)
    model, _ = loading.load_policy(config, task, amft)
    model = model.double()
    deals = drawn(task, 3, "val")
    prompts = [torch.tensor(amft.encode_text(model, tokenizer, deal.prompt)) for deal in deals]
    vocabulary = len(tokenizer)
    generator = torch.Generator().manual_seed(SEED)
    reward, other = torch.rand(2, 3, vocabulary, generator=generator) < 0.3

    def exact(model):
        """log pi of every response of one token to every prompt, (3, V)."""
        logps = []
        for ids, deal in zip(prompts, deals):
            picture = torch.tensor(deal.image.transpose(2, 0, 1))
            pixels = picture.double() / 127.5 - 1
            logits = model(input_ids=ids.unsqueeze(0), pixel_values=pixels.unsqueeze(0)).logits
            logps.append(logits[0, -1].log_softmax(-1))
        return torch.stack(logps)

    theta = amft.flatten(model)
    state = amft.AdamState(torch.zeros_like(theta), torch.zeros_like(theta), 0)
    for _ in range(5):
        noise = torch.randn(len(theta), generator=generator, dtype=torch.float64)
        theta, state = amft.adamw_step(theta, noise, state, lr=1e-3, max_norm=1e9)
    vector_to_parameters(theta.clone(), model.parameters())
    g_rl = -flat_grad((exact(model).exp() * other).sum(), model)
    of_demos = exact(model)[range(3), [5, 6, 7]]
    g_sft = -flat_grad(of_demos.sum(), model)
    how = dict(lr=0.02, max_norm=0.5)
    mu = 0.4
    h = 1e-3

    def utility(mu):
        """U after a step at this mu."""
        after = torch_step(model, (1 - mu) * g_rl + mu * g_sft, state, **how)
        with torch.no_grad():
            return (exact(after).exp() * reward).sum().item() / 3
    near = utility(mu + h) - utility(mu - h)
    far = utility(mu + 2 * h) - utility(mu - 2 * h)
    expected = (8 * near - far) / (12 * h)

    d_theta = amft.step_sensitivity(theta, g_rl, g_sft, mu, state, **how)[0]
    stepped, _ = amft.adamw_step(theta, (1 - mu) * g_rl + mu * g_sft, state, **how)
    vector_to_parameters(stepped.clone(), model.parameters())
    banned = model.config.image_token_id  # that one has no probability
    words = [word for word in range(vocabulary) if word != banned]
    actual = 0.0
    for ids, deal, r in zip(prompts, deals, reward):
        n = len(words)
        rows = torch.cat([ids.expand(n, -1), torch.tensor(words).unsqueeze(1)], 1)
        batch = amft.Batch(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            response_mask=torch.ones(n, 1),
            images=[[deal.image]] * n)
        logps = amft.logps_of(model, batch).squeeze(1)
        weights = logps.exp().detach() * r[words]
        score = flat_grad((weights * logps).sum(), model)
        actual += (score @ d_theta).item() / 3
    size = (score.norm() * d_theta.norm()).item()
    assert size > 0
    assert actual == pytest.approx(expected, rel=1e-3, abs=1e-4 * size)
