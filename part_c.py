from part_header import *  # noqa: F401,F403

from tokenizers import processors

# --- Conversations of the policy with a task ---

ALL_TASKS = list(tasks.TASKS)
TEXT_TASKS = [name for name in ALL_TASKS if not name.endswith("-vl")]


def shipped(name, **options):
    """(task, model, tokenizer, config): a task, and the policy that lies here for it."""
    task = tasks.TASKS[name](**options)
    room = task.defaults.get("max_new_tokens", amft.Config.max_new_tokens)
    config = configured(task=name, max_new_tokens=room)
    model, tokenizer = loading.load_policy(config, task, amft)
    return task, model, tokenizer, config


def drawn(task, n, split="train", seed=SEED):
    """n episodes of a split."""
    rng = random.Random(seed)
    return [task.sample(split, rng) for _ in range(n)]


def ends_of_responses(batch):
    """(B, T), True on each response's last token: what follows is shown, padding or nothing."""
    mask = batch.response_mask.bool()
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return mask & ~following


def alone(model, batch, row):
    """Log-probabilities of a row's own tokens by a plain forward pass: no padding, no company."""
    if batch.images[row]:
        pixels = np.stack(batch.images[row]).transpose(0, 3, 1, 2)
        pixels = torch.tensor(pixels) / 127.5 - 1  # black is -1, white 1
        model = partial(model, pixel_values=pixels)
    return slow_logps(model, batch, row)


def entropies_of(model, batch):
    """(B, T), at temperature 1, of the logits that training sees."""
    with torch.no_grad():
        logps = amft.response_outputs(model, batch)[0].log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


@pytest.fixture(scope="module", params=ALL_TASKS)
def played(request):
    """Conversations of a shipped policy, so hot that it fails, tries again and is cut off."""
    task, model, tokenizer, config = shipped(request.param)
    episodes = drawn(task, 4)
    torch.manual_seed(SEED)
    with pytest.MonkeyPatch.context() as patch:
        replies = spied(patch, "generate_reply")
        rollouts = amft.rollout(
            model, tokenizer, episodes, 3, config.max_new_tokens, temperature=2.0)
    if request.param in ("gp-turns", "virl", "virl-vl"):
        T = rollouts.batch.response_mask.shape[1]
        assert max(len(episode.responses) for episode in rollouts.episodes) > 1
        assert (rollouts.batch.attention_mask[:, -T:] == 0).any()
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, episodes=episodes, rollouts=rollouts, replies=replies)


def test_conversations_alone_and_in_company(played):
    """Padding, holes, positions or pictures that change what training sees of a conversation."""
    demos = amft.encode_demos(played.model, played.tokenizer, played.episodes)
    for batch in (played.rollouts.batch, demos):
        with torch.no_grad():
            together = amft.logps_of(played.model, batch)
            by_itself = [alone(played.model, batch, row) for row in range(len(batch.input_ids))]
        for row, expected in enumerate(by_itself):
            own = together[row][batch.response_mask[row].bool()]
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=2e-3)


def test_rows_of_a_batch_keep_their_pictures(played):
    """A micro-batch whose pictures belong to other rows."""
    batch = played.rollouts.batch
    for row in range(len(batch.input_ids)):
        for rows in (slice(row, row + 1), torch.tensor([row])):
            part = batch.rows(rows)
            assert torch.equal(part.input_ids, batch.input_ids[row:row + 1])
            assert torch.equal(part.attention_mask, batch.attention_mask[row:row + 1])
            assert torch.equal(part.response_mask, batch.response_mask[row:row + 1])
            assert len(part.images) == 1 and len(part.images[0]) == len(batch.images[row])
            for picture, expected in zip(part.images[0], batch.images[row]):
                assert np.array_equal(picture, expected)


def test_what_is_attended_to_is_the_conversation(played):
    """Attention to padding, to a hole, or to anything but prompt, responses and observations."""
    batch = played.rollouts.batch
    for row, episode in enumerate(played.rollouts.episodes):
        replay = copy.copy(played.episodes[row // 3])
        expected = replay.prompt
        for response in episode.responses:
            shown, _, done = replay.step(response)
            expected += response
            if not done:
                expected += shown
        if played.model.config.model_type == "llava":  # a token for each of a picture's patches
            expected = expected.replace(tasks.IMAGE, 16 * tasks.IMAGE)
        attended = batch.input_ids[row][batch.attention_mask[row].bool()]
        text = played.tokenizer.decode(attended)
        assert text.replace("<eos>", "") == expected
        # One end a response, and one for each turn that the others go on without this row.
        inside = re.sub("(<eos>)+$", "", text)
        assert inside.count("<eos>") <= len(episode.responses) - 1


def test_what_was_graded_is_what_was_said(played):
    """A response that goes on after its end, or that is graded as another text than the batch's."""
    batch = played.rollouts.batch
    for row, episode in enumerate(played.rollouts.episodes):
        own = batch.response_mask[row].bool()
        spoken = played.tokenizer.decode(batch.responses[row][own])
        assert own.any() and len(episode.responses) == len(episode.history)
        assert spoken.count("<eos>") <= len(episode.responses)
        assert spoken.replace("<eos>", "") == "".join(episode.responses)


def test_points_stand_on_the_last_token_of_each_response(played):
    """Points on a response's first token, on another turn, or off the policy's tokens."""
    rollouts = played.rollouts
    last = ends_of_responses(rollouts.batch)
    assert last.sum() < rollouts.batch.response_mask.sum()
    for row, episode in enumerate(rollouts.episodes):
        points = [episode.outcomes[outcome][0] for outcome in episode.history]
        assert rollouts.rewards[row][last[row]].tolist() == pytest.approx(points)
        assert (rollouts.rewards[row][~last[row]] == 0).all()


def test_every_token_is_sampled_from_the_policy_that_is_trained(played):
    """A cache, a hole or a position by which sampling saw other distributions than training."""
    batch = played.rollouts.batch
    trained = entropies_of(played.model, batch)
    start = batch.input_ids.shape[1] - batch.response_mask.shape[1]  # of the first response
    spoken = 0
    for call in played.replies:
        reply = call["returns"]
        first = call["input_ids"].shape[1] - start
        columns = slice(first, first + reply.ids.shape[1])
        own = reply.mask.bool()
        assert torch.equal(reply.ids[own], batch.responses[:, columns][own])
        torch.testing.assert_close(
            reply.entropy[own], trained[:, columns][own], rtol=1e-3, atol=3e-3)
        spoken += own.sum().item()
    assert spoken == batch.response_mask.sum().item()


def test_entropy_is_that_of_the_policys_own_tokens(tiny, tokenizer):
    """An entropy that counts what a finished response is padded with."""
    task = tasks.GeneralPoints()
    model, _ = loading.load_policy(configured(model=tiny, max_new_tokens=34), task, amft)
    seen = amft.rollout(model, tokenizer, drawn(task, 16), 16, 60)
    lengths = seen.batch.response_mask.sum(1)
    assert lengths.min() < lengths.max()
    total = (entropies_of(model, seen.batch) * seen.batch.response_mask).sum()
    assert seen.entropy == pytest.approx(total.item() / lengths.sum().item(), rel=1e-4)


def test_a_conversation_ends_where_the_next_response_might_not_fit(tiny, tokenizer):
    """The check of room, one token or one response too early or too late."""
    task = tasks.GeneralPoints(turns=3)
    model, _ = loading.load_policy(configured(model=tiny, max_new_tokens=34), task, amft)

    def tokens_and_turns(room):
        torch.manual_seed(SEED)
        model.config.max_position_embeddings = room
        rollouts = amft.rollout(model, tokenizer, drawn(task, 8), 2, 34)
        turns = max(len(episode.responses) for episode in rollouts.episodes)
        return rollouts.batch.input_ids.shape[1], turns, rollouts.truncated
    width, turns, truncated = tokens_and_turns(10 ** 6)
    assert turns == 3 and truncated > 0.5  # so that some response in the last turn is a longest one
    assert tokens_and_turns(width)[:2] == (width, 3)
    shorter, turns, _ = tokens_and_turns(width - 1)
    assert turns == 2 and shorter < width - 34


def test_demonstrations_teach_what_is_right_and_show_what_went_wrong():
    """A loss on a wrong response, or an expert's answer without the failure that it follows."""
    task, model, tokenizer, _ = shipped("gp", turns=2)
    deal = next(deal for deal in drawn(task, 100) if deal.slips)
    batch = amft.encode_demos(model, tokenizer, [deal])
    taught = tokenizer.decode(batch.responses[0][batch.response_mask[0].bool()])
    assert taught == deal.expert + "<eos>"
    feedback = tasks.FEEDBACK.format(deal.outcomes["wrong_result"][1]) + "\n"
    whole = deal.prompt + deal.slips[0] + "<eos>" + feedback + deal.expert + "<eos>"
    assert tokenizer.decode(batch.input_ids[0]) == whole


@pytest.mark.parametrize("name", ALL_TASKS)
def test_rewards_and_gradients_of_whole_conversations(name):
    """Success that is paid per turn, an RL gradient that is not the textbook's over all turns."""
    task, model, tokenizer, config = shipped(name)
    config.advantage = "group"
    seen = amft.rollout(model, tokenizer, drawn(task, 4), 4, config.max_new_tokens)
    assert seen.success.reshape(-1).tolist() == [float(e.success) for e in seen.episodes]
    if not seen.success.std(1).any():  # no signal by chance
        seen = seen._replace(success=(torch.arange(16).view(4, 4) % 3 == 0).float())
    config.micro_tokens = 3 * seen.batch.input_ids.shape[1]
    advantages = amft.advantages_of(model, None, seen, config)
    grad, _, _ = amft.rl_gradient(model, seen.batch, advantages, config)
    weights = seen.success - others_mean(seen.success)
    weights = (weights / weights.std(correction=0)).flatten()
    n_tokens = seen.batch.response_mask.sum()
    rows = []
    for row in range(16):
        logps = alone(model, seen.batch, row)
        rows.append(flat_grad(-weights[row] * logps.sum() / n_tokens, model))
    # Where a prompt's samples are alike, theirs cancel: the largest row is the error's yardstick.
    largest = max(row.norm() for row in rows)
    assert (grad - sum(rows)).norm() <= 5e-3 * largest and largest > 0


# --- Chat templates ---

CHAT = ("{% for m in messages %}"
        "{% if m.role == 'user' %} where {{ m.content }}\n"
        "{% else %}Turn {{ m.content }}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}Turn {% endif %}")


def test_a_chat_model_gets_its_own_template_turn_by_turn(tokenizer):
    """Prompt, response and observation that do not add up to the template's conversation."""
    model = shipped("gp")[1]
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT
    said = [dict(role="user", content="3 + 4"),
            dict(role="assistant", content="8"),
            dict(role="user", content="10")]
    whole = chat.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    prompt = amft.encode_text(model, chat, "3 + 4")
    response = chat("8")["input_ids"] + [chat.eos_token_id]
    observation = amft.encode_text(model, chat, "10", first=False)
    text = chat.decode(prompt + response + observation)
    assert text == whole and text.count("Turn ") == 2  # asked to speak at each turn


@pytest.mark.parametrize(
    "template", [None, CHAT, "{{ bos_token }}" + CHAT], ids=["none", "without BOS", "with BOS"])
def test_a_conversation_begins_once(tokenizer, template):
    """A second BOS before a chat template that has one, or one before an observation."""
    task, model, _, _ = shipped("gp", turns=2)
    begins = copy.deepcopy(tokenizer)
    begins.add_special_tokens(dict(bos_token="<bos>"))
    bos = begins.bos_token_id
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)])
    assert begins("3 + 4")["input_ids"].count(bos) == 1  # it adds one by itself, as Llama's do
    begins.chat_template = template
    n = 0 if template == CHAT else 1
    prompt = amft.encode_text(model, begins, "3 + 4")
    assert prompt.count(bos) == n and (prompt[0] == bos) == (n == 1)
    assert bos not in amft.encode_text(model, begins, "10", first=False)
    deals = [deal for deal in drawn(task, 60) if deal.slips][:5]
    batch = amft.encode_demos(model, begins, deals)
    assert (batch.input_ids == bos).sum(1).tolist() == [n] * 5
    assert not (batch.responses == bos).any()


# --- Every task ---

class Sums(tasks.Episode):
    """A task as a student would add it: a + b, in three attempts."""
    outcomes = {"correct": (1.0, ""), "wrong": (-1.0, "your formula is not a formula")}
    attempts = 3

    def __init__(self, a, b):
        self.a = a
        self.b = b

    @property
    def prompt(self):
        return f"{self.a} + {self.b} = "

    @property
    def expert(self):
        return str(self.a + self.b)

    @property
    def unit(self):
        return self.a, self.b

    def grade(self, response):
        return "correct" if response == self.expert else "wrong"


class Addition(tasks.Task):
    episode = Sums
    splits = {"val": "sums below 40", "heldout": "larger ones"}

    def draw(self, split, rng):
        low, high = (20, 40) if split == "heldout" else (0, 19)
        return Sums(rng.randint(low, high), rng.randint(low, high))


def test_a_new_task_in_thirty_lines(tiny, tmp_path, monkeypatch):
    """A task that needs more than a subclass of Episode and one of Task."""
    monkeypatch.setitem(tasks.TASKS, "sums", Addition)
    rows = tiny_run(tiny, tmp_path / "sums", "--task", "sums", "--max-new-tokens", "5")
    evals = [row for row in rows if row["kind"] == "eval"]
    assert rows[-1]["kind"] == "final"
    assert {row["split"] for row in evals} == {"val", "heldout"}
    for row in evals:  # one to three responses in each conversation
        conversations = row["n"] * row["samples"]
        assert conversations <= sum(row["outcomes"].values()) <= 3 * conversations
        assert 0 <= row["first_try"][0] <= row["success"]
    turns = Sums(2, 3).demonstration()
    assert [(turn.response, turn.learn) for turn in turns] == [("5", True)]


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_every_task_runs(name, tiny, tmp_path, monkeypatch):
    """A task that cannot be trained on, or a log without what its conversations tell."""
    splits = dict(list(tasks.TASKS[name].splits.items())[:2])
    monkeypatch.setattr(tasks.TASKS[name], "splits", splits)
    length = "90" if name == "math" else "60"
    rows = tiny_run(
        tiny, tmp_path / name, "--task", name, "--max-new-tokens", length, "--prompts", "3",
        "--steps", "3", "--warmup", "1", "--eval-n", "4", "--meta-every", "2")
    kinds = Counter(row["kind"] for row in rows)
    assert kinds == {"config": 1, "step": 3, "eval": 2 * len(splits), "final": 1}
    assert "val" in splits and "meta_grad" in read(tmp_path / name, "step")[-1]
    for row in read(tmp_path / name, "eval"):
        assert ("step_accuracy" in row) == (name in ("virl", "gp-turns"))
        assert ("recognition" in row) == (name == "virl")
        shares = [row[key] for key in ("step_accuracy", "first_try", "recognition") if key in row]
        assert all(0 <= low <= share <= high <= 1 for share, low, high in shares)


@pytest.mark.parametrize("name", ALL_TASKS)
def test_the_shipped_policies_are_above_chance_and_below_saturation(name):
    """A base that knows nothing of a task, so that RL has no signal, or has nothing to learn."""
    task, model, tokenizer, config = shipped(name)
    config.eval_n = 24
    row = amft.evaluate(model, tokenizer, task, config, "id", 2)
    assert 0 < row["success"] < 1 and sum(row["outcomes"].values()) >= 24


def test_tasks_know_nothing_of_a_model():
    """An import in tasks.py of torch or transformers, which takes seconds."""
    code = "import sys, tasks; print({'torch', 'transformers', 'amft'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert shown.stdout == "set()\n", shown.stderr


def test_a_task_is_shown_at_once(tmp_path):
    """python tasks.py --show that takes long, misses a split, or leaves files of a task in text."""
    before = sum(os.times()[2:4])
    argv = [sys.executable, str(HERE / "tasks.py"), "--show", "gp"]
    shown = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert sum(os.times()[2:4]) - before < 1.5  # seconds of a processor; torch alone takes more
    assert shown.returncode == 0 and shown.stderr == ""
    for split in ("train", *tasks.GeneralPoints.splits):
        assert f"--- {split}: " in shown.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("turns", [0, 3])
@pytest.mark.parametrize("name", ALL_TASKS)
def test_every_demonstration_is_graded_correct(name, turns):
    """An expert that fails on a split, a slip that is learned, an episode that playing changes."""
    task = tasks.TASKS[name](turns=turns)
    rng = random.Random(SEED)
    for split in ["train", *task.splits]:
        for _ in range(200):
            episode = task.sample(split, rng)
            assert episode.attempts == (turns or type(task).turns or type(episode).attempts)
            replay = copy.copy(episode)
            shown = replay.prompt
            done = False
            total = 0.0
            for turn in episode.demonstration():
                assert not done and turn.shown == shown
                assert (turn.image is None) == (tasks.IMAGE not in shown)
                assert replay.recognised(turn.response) is not False
                shown, reward, done = replay.step(turn.response)
                assert (replay.history[-1] == "correct") == turn.learn
                total += reward
            assert done and replay.success
            assert total == sum(episode.outcomes[outcome][0] for outcome in replay.history)
            assert not episode.history and not episode.responses and episode.point == 0


@pytest.mark.parametrize("name", [name for name in ALL_TASKS if name.startswith("gp")])
def test_demonstrations_show_what_to_do_after_a_failure(name):
    """Tasks of several attempts whose demonstrations never fail first, or always do."""
    episodes = drawn(tasks.TASKS[name](turns=3), 300)
    kinds = Counter(len(episode.demonstration()) for episode in episodes)
    assert set(kinds) == {1, 2} and min(kinds.values()) > 60


HOSTILE = [
    "", "{}", "null", "[" * 100_000, "[" * 999, "9" * 999, '{"a":' * 300, "\x00\uffff",
    "\\boxed{" * 5000, "{" * 10 ** 6, '{"action": "stop()", "action": "forward()"}',
    '{"action": ["stop()"]}', '{"action": {}}', '{"formula": {}}', "\\boxed{" + "9" * 10 ** 6 + "}",
    "\\boxed{}", "\\boxed{1", "\\boxed{1/0}", "\\boxed{9**9**9}", "\\boxed{" + "\\frac{" * 999,
]


@pytest.mark.parametrize("name", ALL_TASKS)
def test_wrong_responses_get_their_named_outcome_in_bounded_time(name):
    """A text that a grader takes long over, stumbles over, or takes for an answer."""
    task = tasks.TASKS[name]()
    rng = random.Random(SEED)
    for text in HOSTILE:
        episode = task.sample("train", rng)
        start = time.process_time()
        observation, reward, done = episode.step(text)
        assert time.process_time() - start < 0.1
        assert episode.history == ("no_answer",) and not episode.success
        assert reward == episode.outcomes["no_answer"][0]
        assert done == (episode.attempts == 1) and len(observation) < 200
        episode.recognised(text)


def test_measures_of_conversations_with_failures():
    """first_try of first responses alone, or of lost conversations; a wrong step accuracy."""
    task = tasks.VIRL()
    fresh = task.sample("train", random.Random(SEED))

    def route(**failures):
        """Played with so many failures at some points."""
        played = copy.copy(fresh)
        done = False
        while not done:
            wrong = played.tries < failures.get(f"at_{played.point}", 0)
            _, _, done = played.step("x" if wrong else played.expert)
        return played
    flawless = route()
    routes = [flawless, route(at_0=1), route(at_2=1), route(at_1=2)]  # the last one is lost
    row = task.measures(routes, [flawless, routes[3]])
    n = fresh.points
    assert row["success"] == 0.75 and row["any"] == 1.0 and row["greedy"] == 0.5
    assert row["first_try"][0] == 0.25
    assert row["step_accuracy"][0] == pytest.approx((3 * n + 1) / (n + 2 * (n + 1) + 3))
    assert row["outcomes"]["correct"] == 3 * n + 1 and row["outcomes"]["no_answer"] == 4
    assert row["recognition"][0] == row["step_accuracy"][0]  # "x" reads nothing right


def near(hits, n, chance):
    """Do n draws hit as often as their chance predicts, within 4.5 standard deviations?"""
    return abs(hits - n * chance) < 4.5 * math.sqrt(n * chance * (1 - chance)) + 1e-9


def exact_chance(numbers, target=24):
    """Share of random_formula over shuffled numbers that makes the target, by every way it goes."""
    def values(part):
        if len(part) == 1:
            return {Fraction(part[0]): Fraction(1)}
        total = Counter()
        cuts = range(1, len(part))
        for cut in cuts:
            pairs = itertools.product(values(part[:cut]).items(), values(part[cut:]).items())
            for (a, p), (b, q) in pairs:
                share = p * q / 4 / len(cuts)
                if a is None or b is None:
                    total[None] += 4 * share
                    continue
                for value in (a + b, a - b, a * b, a / b if b else None):
                    total[value] += share
        return total
    orders = itertools.permutations(numbers)
    return float(sum(values(order).get(target, 0) for order in orders)) / 24


def test_random_formulas_score_what_chance_predicts():
    """A grader of General Points that is too generous or too strict to random formulas."""
    n = 4000
    rng = random.Random(SEED)
    deal = tasks.GeneralPoints().sample("heldout", rng)
    hits = 0
    for _ in range(n):
        (formula, _), _ = tasks.random_formula(rng.sample(deal.numbers, 4), rng)
        hits += deal.grade(deal.respond(formula)) == "correct"
    chance = exact_chance(deal.numbers)
    assert abs(hits - n * chance) < 4.5 * math.sqrt(n * chance) + 1


@pytest.mark.parametrize("split, actions", [("id", 10), ("ood_rule", 6), ("ood_rule_hard", 6)])
def test_random_actions_score_what_chance_predicts(split, actions):
    """Routes whose right action can be guessed more often than one in so many."""
    rng = random.Random(SEED)
    task = tasks.VIRL()
    routes = 600
    right = said = passed = 0
    for _ in range(routes):
        route = task.sample(split, rng)
        assert len(set(route.actions)) == actions
        done = False
        while not done:
            _, _, done = route.step(route.respond(rng.choice(route.actions)))
        right += route.history.count("correct")
        said += len(route.history)
        passed += route.point > 0
    chance = 1 / actions
    assert near(right, said, chance)
    assert near(passed, routes, 1 - (1 - chance) ** 2)  # of the first stop, in two attempts


def test_random_numbers_score_what_chance_predicts():
    """Problems of mathematics whose answer can be guessed."""
    rng = random.Random(SEED)
    problems = [tasks.Mathematics().sample("heldout", rng) for _ in range(4000)]
    whole = sum(Fraction(problem.answer).denominator == 1 for problem in problems)
    chance = whole / 101  # answers lie in 0..100
    hits = sum(p.grade(f"\\boxed{{{rng.randint(0, 100)}}}") == "correct" for p in problems)
    assert abs(hits - chance) < 4.5 * math.sqrt(chance)


# --- General Points ---

def brute_force(numbers):
    """Can these numbers make 24? Join any two, in floating point, until one is left."""
    if len(numbers) == 1:
        return abs(numbers[0] - 24) < 1e-6
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [numbers[k] for k in range(len(numbers)) if k not in (i, j)]
        a = numbers[i]
        b = numbers[j]
        joined = (a + b, a - b, a * b, a / b if b else math.inf)
        if any(brute_force(rest + [c]) for c in joined):
            return True
    return False


def exact(formula):
    """Its value by Python's own arithmetic, in fractions; None after a division by zero."""
    try:
        return eval(re.sub("([0-9]+)", r"Fraction(\1)", formula))
    except ZeroDivisionError:
        return None


def answer(formula, **others):
    return json.dumps(dict(others, formula=formula))


def grade(response, numbers, target=24):
    return tasks.Deal(("A",) * 4, tasks.RULE_10, tuple(numbers), "", target).grade(response)


def test_solver_and_grader_against_brute_force_on_every_multiset():
    """A multiset that the solver misses, a formula of its own that is wrong, or one graded so."""
    solvable = 0
    for numbers in tasks.MULTISETS:
        solutions = tasks.solve(numbers)
        assert bool(solutions) == brute_force(list(numbers)), numbers
        assert len(set(solutions)) == len(solutions)
        solvable += bool(solutions)
        for formula in solutions:
            used = sorted(map(int, re.findall("[0-9]+", formula)))
            assert exact(formula) == 24 and used == list(numbers)
            assert grade(answer(formula + "=24"), numbers) == "correct"
    assert len(tasks.MULTISETS) == 1820 and solvable == 1362
    small = [numbers for numbers in tasks.MULTISETS if max(numbers) <= 10]
    assert sum(bool(tasks.solve(numbers)) for numbers in small) == 566
    assert "8/(3-8/3)" in tasks.solve((3, 3, 8, 8))  # floating point misses this one


BRACKETINGS = (
    "(({a}{x}{b}){y}{c}){z}{d}", "({a}{x}({b}{y}{c})){z}{d}", "({a}{x}{b}){y}({c}{z}{d})",
    "{a}{x}(({b}{y}{c}){z}{d})", "{a}{x}({b}{y}({c}{z}{d}))", "{a}{x}{b}{y}{c}{z}{d}")


def test_grader_on_every_bracketing():
    """Precedence, associativity or brackets that the grader reads otherwise than Python."""
    rng = random.Random(SEED)
    for numbers in rng.sample(tasks.MULTISETS, 4):
        seen = Counter()
        orders = set(itertools.permutations(numbers))
        operators = itertools.product("+-*/", repeat=3)
        for (a, b, c, d), (x, y, z) in itertools.product(orders, operators):
            for form in BRACKETINGS:
                formula = form.format(a=a, b=b, c=c, d=d, x=x, y=y, z=z)
                expected = "correct" if exact(formula) == 24 else "wrong_result"
                assert grade(answer(formula), numbers) == expected, formula
                seen[expected] += 1
        assert bool(seen["correct"]) == bool(tasks.solve(numbers))


def brief(value):
    """Of a parameter, for the test's name."""
    return ascii(value)[:24]


@pytest.mark.parametrize("formula, outcome", [
    ("(1+2+3)*4=24", "correct"),
    ("(1+2+3)*4", "correct"),
    (" ( 1 + 2+3) *4 = 24 ", "correct"),
    ("(1+2+3)*4=25", "illegal_formula"),
    ("(1+2+3)*4=24=24", "illegal_formula"),
    ("1+2+3+4=24", "wrong_result"),
    ("4/(3-1-2)=24", "wrong_result"),
    ("4*3*2=24", "illegal_number"),
    ("(1+2+3)*4*1=24", "illegal_number"),
    ("12+3*4=24", "illegal_number"),
    ("9**9**9**9", "illegal_formula"),
    ("__import__('os').system('true')", "illegal_formula"),
    ("-1+2+3*4", "illegal_formula"),
    ("(1+2+3)(4)", "illegal_formula"),
    ("(1+2+3*4", "illegal_formula"),
    ("", "illegal_formula"),
    ("(1+2+3))*4", "illegal_formula"),
    ("01+2+3*4", "illegal_formula"),
    ("(1+2+3)*\u0664", "illegal_formula"),
    ("(1+2+3)*\uff14", "illegal_formula"),
    ("(1+2+3)//4", "illegal_formula"),
    ("1.0+2+3*4", "illegal_formula"),
    ("1 2+3*4", "illegal_formula"),
    ("1+2+3*4\n", "illegal_formula"),
    ("9" * 50, "illegal_formula"),
    ("(" * 59, "illegal_formula"),
    ("1+" * 40000 + "1", "no_answer"),
    ("(" * 100_000, "no_answer"),
], ids=brief)
def test_grader_on_hostile_formulas(formula, outcome):
    """A formula that is run as code, takes long, or is taken for another one."""
    start = time.process_time()
    assert grade(answer(formula), (4, 3, 2, 1)) == outcome
    assert time.process_time() - start < 0.05


@pytest.mark.parametrize("response, outcome", [
    ("[" * 100_000, "no_answer"),
    ("[" * 999, "no_answer"),
    ("9" * 999, "no_answer"),
    ("", "no_answer"),
    ("null", "no_answer"),
    ("[1]", "no_answer"),
    (answer("(1+2+3)*4", number=math.nan), "no_answer"),
    (answer("(1+2+3)*4", cards=[-math.inf]), "no_answer"),
    ("{}", "no_answer"),
    ('{"formula": 24}', "no_answer"),
    ('{"formula": ["24"]}', "no_answer"),
    ("NaN", "no_answer"),
    ('{"formula": "(1+2+3)*4", "formula": "(1+2+3)*4"}', "no_answer"),
    (answer("(1+2+3)*4") + "x", "no_answer"),
    (answer("(1+2+3)*4", cards=[], number="rubbish"), "correct"),
], ids=brief)
def test_grader_on_hostile_text(response, outcome):
    """A response that is no JSON object with one formula, and is graded as if it were."""
    start = time.process_time()
    assert grade(response, (4, 3, 2, 1)) == outcome
    assert time.process_time() - start < 0.05


def test_digits_that_were_not_dealt_cannot_be_glued():
    """A 1 and a 0 that are read as the 10 that was dealt."""
    assert grade(answer("10+10+4*1"), (10, 10, 4, 1)) == "correct"
    assert grade(answer("1 0+10+4*1"), (10, 10, 4, 1)) == "illegal_formula"
    assert grade(answer("11+13+1-1"), (1, 1, 1, 1)) == "illegal_number"


OTHER_RULES = {
    "ood_rule": {(11, 12, 13)},
    "fake": {(11, 12, 13)},
    "ood_small": {(5, 5, 5), (7, 7, 7)}}


@pytest.mark.parametrize("split", ["train", *tasks.GeneralPoints.splits])
def test_a_split_is_what_it_says(split):
    """Deals under another rule than their split's, without a face, or of numbers not shown."""
    for deal in drawn(tasks.GeneralPoints(), 1500, split):
        assert deal.grade(deal.expert) == "correct" and deal.prompt.endswith("Make 24.\n")
        stated = dict(re.findall("([JQK]) counts as ([0-9]+)", deal.prompt))
        rule = tuple(int(stated[face]) for face in "JQK")
        assert rule in OTHER_RULES.get(split, {(10, 10, 10)})
        shown = re.search("Cards: (.*?)[.] J", deal.prompt)[1].split(", ")
        meaning = dict(stated, A="1")
        values = tuple(int(meaning.get(rank, rank)) for rank in shown)
        assert (values == deal.numbers) == (split != "fake")
        if split in OTHER_RULES:
            assert set(shown) & set("JQK")


def test_splits_are_disjoint():
    """A multiset of numbers that is trained on and asked for elsewhere."""
    task = tasks.GeneralPoints()
    rng = random.Random(SEED)
    seen = {}
    for split in ["train", *task.splits]:
        deals = [task.sample(split, rng) for _ in range(1500)]
        seen[split] = {tuple(sorted(deal.numbers)) for deal in deals}
    roles = {}
    for numbers, role in tasks.ROLES.items():
        roles.setdefault(role, set()).add(numbers)
    assert (seen["id"] | seen["train"]) <= roles["train"] and seen["val"] <= roles["val"]
    assert len(seen["id"] & seen["train"]) > 0.5 * len(seen["id"])
    for a, b in itertools.combinations(("train", "val", "heldout", "ood_rule"), 2):
        assert not seen[a] & seen[b]
    for split in ("heldout", "ood_rule", "ood_small", "fake"):
        assert seen[split] <= roles["heldout"]


def test_feedback_says_what_was_wrong_and_not_how_near_it_was():
    """Feedback that differs within an outcome, and so helps to search; a try beyond the last."""
    rng = random.Random(SEED)
    task = tasks.GeneralPoints(turns=5)
    said = {}
    for _ in range(3000):
        deal = task.sample("train", rng)
        (formula, _), _ = tasks.random_formula(rng.sample(deal.numbers, rng.choice((3, 4))), rng)
        beginning = deal.formula[:rng.randrange(len(deal.formula) + 1)]  # of a solution
        observation, _, done = deal.step(deal.respond(rng.choice((formula, beginning))))
        said.setdefault(deal.history[0], set()).add(observation)
        assert done == (deal.history[0] == "correct")
    assert set(said) == {"correct", "wrong_result", "illegal_number", "illegal_formula"}
    assert all(len(texts) == 1 for texts in said.values())
    deal = task.sample("train", rng)
    assert [deal.step("x")[2] for _ in range(5)] == [False] * 4 + [True]
    assert not deal.success


# --- V-IRL ---

ROUTE_SPLITS = ["train", *tasks.VIRL.splits]
DEGREES = {name: 45 * i for i, name in enumerate(tasks.HEADINGS)}
BEARINGS = {
    "front": 0, "right front": 45, "right": 90, "right behind": 135,
    "behind": 180, "left behind": 225, "left": 270, "left front": 315}
TURN_WORDS = {45: "slightly right", 90: "right", 135: "right",
              225: "left", 270: "left", 315: "slightly left"}
TURN = "(?:First, turn|Turn)(?: ((?:slightly )?(?:left|right)))?(?: to face (\\w+))?[.]"
MOVE = "Move forward until you reach (next intersection|destination)(?: where (.*))?[.]"


def city_of(split, route):
    """The city that a route of this split goes through, made anew from its seed."""
    role = split if split in ("train", "val") else "train" if split == "id" else "heldout"
    share = "heldout" if role == "heldout" else "train"
    names = [name for name in tasks.NAMES if tasks.NAME_ROLES[name] == share]
    return tasks.City(f"{role} {route.city}", names)


def read_legs(route, split):
    """[(heading in degrees, place or None)] of the instruction, read word by word."""
    heading = DEGREES[re.search("You face (\\w+)[.]", route.prompt)[1]]
    legs = []
    for i, line in enumerate(route.lines):
        if i % 2 == 0:
            relative, absolute = re.fullmatch(TURN, line).groups()
            turn = (DEGREES[absolute] - heading) % 360
            assert turn in TURN_WORDS
            assert relative == (None if split == "ood_rule_hard" else TURN_WORDS[turn])
            heading = DEGREES[absolute]
        else:
            end, place = re.fullmatch(MOVE, line).groups()
            assert (end == "destination") == (i == len(route.lines) - 1)
            legs.append((heading, place))
    return legs


def stands_there(landmark, place, heading):
    """Is the landmark of a node what the instruction says stands there?"""
    if landmark is None or place is None:
        return landmark is place
    name, bearing = re.fullmatch("(.*) is on your (.*)", place).groups()
    where = (45 * landmark[1] - heading - BEARINGS[bearing]) % 360
    return name == landmark[0] and where == 0


def leads(city, node, legs):
    """Do the legs lead from this node along streets, past what they say?"""
    if not legs:
        return True
    heading, place = legs[0]
    east = round(math.sin(math.radians(heading)))
    north = round(math.cos(math.radians(heading)))
    following = (node[0] + east, node[1] + north)
    if following not in city.streets[node].values():
        return False
    if not stands_there(city.landmarks.get(following), place, heading):
        return False
    return leads(city, following, legs[1:])


@pytest.mark.parametrize("split", ROUTE_SPLITS)
def test_routes_are_walks_through_their_city(split):
    """An instruction that leads off the streets, to no landmark, or past others than it says."""
    for route in drawn(tasks.VIRL(), 150, split):
        city = city_of(split, route)
        legs = read_legs(route, split)
        assert len(legs) in (2, 3) and legs[-1][1]
        assert any(leads(city, node, legs) for node in city.streets)


@pytest.mark.parametrize("split", ROUTE_SPLITS)
def test_actions_are_those_of_the_instruction(split):
    """Routes without an end, or with turns in another frame than the split's or at no corner."""
    lengths = Counter()
    for route in drawn(tasks.VIRL(), 150, split):
        actions = [stop.action for stop in route.stops]
        lengths[len(actions)] += 1
        assert actions[-1] == "stop()" and actions.count("stop()") == 1
        turns = [stop for stop in route.stops if stop.action.startswith("turn")]
        assert len(turns) == len(route.lines) / 2
        for turn in turns:
            word = re.fullmatch("turn_direction\\((.*)\\)", turn.action)[1]
            assert (word in DEGREES) == (not split.startswith("ood_rule"))
            assert turn.intersection == (turn is not turns[0])
        others = [stop for stop in route.stops if not stop.action.startswith("turn")]
        assert not any(stop.intersection for stop in others)
    assert min(lengths) >= 3 and max(lengths) <= 10 and len(lengths) > 4


def test_cities_and_names_of_new_splits_are_new(monkeypatch):
    """A city or a landmark's name of training that a new split has, too."""
    task = tasks.VIRL()
    rng = random.Random(SEED)
    City = tasks.City
    seeds = []
    monkeypatch.setattr(
        tasks, "City", lambda seed, names: seeds.append(seed) or City(seed, names))
    names = {}
    cities = {}
    for split in ROUTE_SPLITS:
        seeds.clear()
        text = " ".join(task.sample(split, rng).prompt for _ in range(300))
        names[split] = {name for name in tasks.NAMES if name in text}
        cities[split] = set(seeds)
    assert names["id"] == names["train"] == names["val"] and len(names["train"]) == 40
    for split in ("heldout", "ood_rule", "ood_rule_hard"):
        assert not names[split] & names["train"] and len(names[split]) == 24
        assert not cities[split] & (cities["val"] | cities["train"])
    assert len(cities["heldout"]) > 50 and cities["id"] & cities["train"]
    assert not cities["val"] & cities["train"]


def test_cities_of_different_roles_differ():
    """A city of a new split whose streets are those of one that is trained on."""
    streets = {}
    for role in ("train", "val", "heldout", "pretraining"):
        cities = [tasks.City(f"{role} {i}", tasks.NAMES) for i in range(tasks.CITIES)]
        streets[role] = {str(city.streets) for city in cities}
    for a, b in itertools.combinations(streets, 2):
        assert not streets[a] & streets[b]


def test_feedback_is_never_wrong_about_an_intersection():
    """Feedback on an intersection that is none, that was seen, or where the text does not say."""
    rng = random.Random(SEED)
    task = tasks.VIRL()
    outcomes = Counter()
    illegal = ("fly()", "turn_direction(up)")
    for _ in range(400):
        route = task.sample("train", rng)
        done = False
        while not done:
            stop = route.stops[route.point]
            end = route.point in (0, route.points - 1)  # the ends are corners, too
            say = rng.choice((tasks.NOTHING, tasks.NOTHING + tasks.CROSSING, stop.seen))
            action = stop.action
            if rng.random() > 0.7:
                action = rng.choice((*route.actions, *illegal))
            said = json.dumps({"current observation": say, "action": action})
            observation, _, done = route.step(said)
            outcome = route.history[-1]
            outcomes[outcome] += 1
            assert (outcome == "correct") == (action == stop.action)
            assert (outcome == "illegal_action") == (action in illegal)
            claims = "intersection" in say
            if "you are not at an intersection" in observation:
                assert claims and not stop.intersection and not end
            elif "you are at an intersection" in observation:
                assert stop.intersection and not claims
            elif outcome == "wrong_action":
                assert claims == stop.intersection or end
    assert set(outcomes) == set(tasks.Route.outcomes) - {"no_answer"}


def test_each_point_has_its_own_attempts():
    """Two failures at different stops that end a route, or two at one that do not."""
    route = drawn(tasks.VIRL(), 1)[0]
    failing = copy.copy(route)
    for point in range(route.points):
        assert route.step("x")[2] is False and route.point == point
        _, _, done = route.step(route.expert)
    assert done and route.success and len(route.history) == 2 * route.points
    assert failing.step("x")[2] is False and failing.step("x")[2] is True
    assert not failing.success


# --- Mathematics ---

STEP = r"(\w+) = (\w+)(?: (.) (\w+))?[.]"  # of a prompt: name = first, or name = first op second


def work_out(steps, rule):
    """{name: value} of the prompt's steps; rule: (operator, what it means), or None."""
    known = {}

    def value(word):
        return known[word] if word in known else Fraction(word)
    for name, first, op, second in steps:
        a = value(first)
        if not op:
            known[name] = a
            continue
        b = value(second)
        if rule and op == rule[0]:
            known[name] = eval(rule[1], {}, dict(a=a, b=b))
        else:
            known[name] = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[op]
    return known


@pytest.mark.parametrize("split", ["train", *tasks.Mathematics.splits])
def test_problems_by_reading_the_prompt(split):
    """A wrong answer, a wrong line of a solution, or a problem that is not as its split says."""
    for problem in drawn(tasks.Mathematics(), 400, split):
        explained = re.match("a (.) b means (.*?)[.] ", problem.prompt)
        assert bool(explained) == (split == "ood_rule")
        rule = explained.groups() if explained else None
        steps = re.findall(STEP, problem.prompt[explained.end() if explained else 0:])
        known = work_out(steps, rule)
        assert len(steps) - 1 in ((5,) if split == "ood_length" else (3, 4))
        asked = re.search(r"How many (\w+)\?", problem.prompt)[1]
        assert Fraction(problem.answer) == known[asked] and asked == steps[-1][0]
        for equation in re.findall(r"\w+ = (.*?)[.] ", problem.solution):
            sides = equation.split(" = ")
            plain = [side for side in sides if not set(side) & set(tasks.SYMBOLS)]
            assert len({exact(side) for side in plain}) == 1, equation


def test_problems_of_different_roles_differ():
    """A problem that is trained on, under whatever names, and asked for elsewhere."""
    task = tasks.Mathematics()
    rng = random.Random(SEED)
    units = {}
    for split in ["train", *task.splits]:
        units[split] = {task.sample(split, rng).unit for _ in range(3000)}
    assert units["train"] & units["id"]
    for a, b in itertools.combinations(("train", "val", "heldout", "ood_length", "ood_rule"), 2):
        assert not units[a] & units[b]


def test_roles_have_their_shares():
    """A hash that gives a role more or fewer problems than its share."""
    share = Counter(tasks.role_of(str(i)) for i in range(20_000))
    assert share["train"] == pytest.approx(12_000, rel=0.03)
    assert share["val"] == pytest.approx(4000, rel=0.06)


@pytest.mark.parametrize("right, box, outcome", [
    ("1/2", "1/2", "correct"),
    ("1/2", "0.5", "correct"),
    ("1/2", "\\frac{1}{2}", "correct"),
    ("1/2", "2/4", "correct"),
    ("1/2", "\\dfrac{1}{2}", "correct"),
    ("1/2", " 1 / 2 ", "correct"),
    ("1/2", "$0.50$", "correct"),
    ("1000", "1,000", "correct"),
    ("1,000", "1000.0", "correct"),
    ("-3", "-3", "correct"),
    ("-1/2", "-\\frac{1}{2}", "correct"),
    ("3", "-3", "wrong_answer"),
    ("7", "+7", "correct"),
    ("7", "007", "correct"),
    ("1/3", "0.333", "wrong_answer"),
    ("7", "8", "wrong_answer"),
    ("1000", "1,00", "no_answer"),
    ("1000", "10,00", "no_answer"),
    ("7", "7 apples", "no_answer"),
    ("7", "x=7", "no_answer"),
    ("7", "3+4", "no_answer"),
    ("7", "7e0", "no_answer"),
    ("7", "\u0667", "no_answer"),
    ("7", "--7", "no_answer"),
    ("7", "\\frac{14}{2}x", "no_answer"),
    ("1/2", "1//2", "no_answer"),
    ("7", "7/0", "no_answer"),
    ("7", "\\frac{7}{0}", "no_answer"),
    ("7", "7.", "no_answer"),
    ("7", "seven", "no_answer"),
    ("7", "", "no_answer"),
    ("1/2", "{1/2}", "no_answer"),
    ("x+1", "x+1", "correct"),
    ("x+1", "1+x", "wrong_answer"),
])
def test_equal_numbers_in_different_forms(right, box, outcome):
    """A right number that is refused for its form, a text that passes, a box before the last."""
    problem = tasks.Problem("", "", right)
    assert problem.grade(f"so \\boxed{{{box}}} it is") == outcome
    assert problem.grade(f"\\boxed{{99}} no, \\boxed{{{box}}}") == outcome
    assert problem.grade(f"\\boxed{{{box}}} no, \\boxed{{99}}") == "wrong_answer"
    assert problem.grade(f"\\boxed{{{box}") == problem.grade(box) == "no_answer"


# --- The base policies ---

def test_pretraining_never_makes_24_of_a_deal_kept_for_evaluation():
    """Pretraining that gives away a deal of an evaluation, or that leaves out more than those."""
    make = importlib.import_module("make")
    rng = random.Random(SEED)
    task = tasks.GeneralPoints()
    evaluated = set()
    for split in task.splits:
        if split != "id":
            deals = [task.sample(split, rng) for _ in range(3000)]
            evaluated |= {tuple(sorted(deal.numbers)) for deal in deals}
    seen = Counter()
    for _ in range(40_000):
        deal = make.gp(rng)
        numbers = json.loads(deal.expert)["number"]
        target = int(re.search(r"Make (\d+)\.\n$", deal.prompt)[1])
        assert grade(deal.expert, numbers, target) == "correct"
        seen[tuple(sorted(numbers)) in evaluated, target == 24] += 1
    assert seen[True, True] == 0 and seen[False, True] > 100 and seen[True, False] > 1000


def test_pretraining_never_explains_an_operator_of_ood_rule():
    """Pretraining on a meaning that ood_rule asks for, or on problems that are not trained on."""
    make = importlib.import_module("make")
    rng = random.Random(SEED)

    def meaning(prompt):
        """What its operator means, whichever sign it has: "a @ b means 2 * a + b"."""
        return "a @" + prompt[3:prompt.index(". ")]
    used = {meaning(problem.prompt) for problem in drawn(tasks.Mathematics(), 400, "ood_rule")}
    seen = set()
    for _ in range(4000):
        problem = make.mathematics(rng)
        assert tasks.role_of(problem.unit) == "train"
        if problem.prompt.startswith("a "):
            seen.add(meaning(problem.prompt))
    assert len(used) == len(tasks.OOD_MEANINGS) and len(seen) > 8 and not used & seen


@pytest.mark.parametrize("name", ALL_TASKS)
def test_the_tokenizer_gives_back_every_text(name, tokenizer):
    """A text of a task that comes back changed, or with an unknown token in it."""
    task = tasks.TASKS[name]()
    for split in ["train", *task.splits]:
        for episode in drawn(task, 30, split):
            for turn in episode.demonstration():
                text = turn.shown + turn.response
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("shipped_as", ["base", "base-vl"])
def test_base_recipes_run_and_make_the_shipped_tokenizer(shipped_as, tmp_path, tokenizer):
    """A recipe that fails, or that makes another tokenizer or architecture than those shipped."""
    make = importlib.import_module("make")
    made = tmp_path / "made"
    flags = ["--pictures", "--init", str(HERE / "base")] if shipped_as == "base-vl" else []
    make.main(["--steps", "3", "--tokens", "1000", "--device", "cpu", "--out", str(made), *flags])
    kept = HERE / shipped_as
    assert AutoTokenizer.from_pretrained(made).get_vocab() == tokenizer.get_vocab()
    assert AutoTokenizer.from_pretrained(kept).get_vocab() == tokenizer.get_vocab()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (made, kept)]
    for config in configs:
        del config["transformers_version"]
    assert configs[0] == configs[1]
    sizes = [file.stat().st_size for file in kept.iterdir() if file.is_file()]
    assert sum(sizes) < 10 * 2 ** 20
