from part_header import *  # noqa: F401,F403

# --- Algorithm 1 and whole runs -----------------------------------------------------------------


def final_policy(out):
    model = LlamaForCausalLM.from_pretrained(Path(out) / "final")
    return parameters_to_vector(model.parameters()).detach()


def without_clock(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same_run(one, other):
    """Two folders hold the same log, but for the clock, and the same policy bit for bit."""
    assert without_clock(read(one)) == without_clock(read(other))
    assert torch.equal(final_policy(one), final_policy(other))


def fails(argv, capsys, code=2):
    """The one line with which a command ends."""
    capsys.readouterr()
    found = None
    try:
        amft.main([str(word) for word in argv])
    except SystemExit as end:
        found = end.code
    error = capsys.readouterr().err.strip()
    assert found == code, error
    error = error.split("\r")[-1]  # what progress bars left
    assert len(error.splitlines()) == 1 and error.startswith("amft.py: "), error
    return error


def at_call(monkeypatch, owner, name, number, action):
    """Do something as a function is called for the number-th time, then call it."""
    true = getattr(owner, name)
    count = itertools.count(1)

    def acting(*args, **kwargs):
        if next(count) == number:
            action(*args)
        return true(*args, **kwargs)
    monkeypatch.setattr(owner, name, acting)


def cut_off(argv, capsys, monkeypatch, calls, where):
    """A run that ends at so many calls of a function of amft, in the middle of its step."""
    def interrupt(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        at_call(patch, amft, where, calls, interrupt)
        return fails(argv, capsys, code=130)


FIXED = ["--method", "fixed", "--warmup", "0", "--steps", "2", "--advantage", "group"]


@pytest.mark.parametrize("mu, unread", [("1", "rl_gradient"), ("0", "sft_gradient")])
def test_at_mu_one_rl_cannot_matter_and_at_mu_zero_sft_cannot(
        mu, unread, tiny, tmp_path, monkeypatch, unevaluated, rewarded):
    """Would catch a mixture (Eq. 3) with mu on the wrong side, or off: noise for that gradient."""
    tiny_run(tiny, tmp_path / "plain", *FIXED, "--mu", mu)
    tiny_run(tiny, tmp_path / "half", *FIXED, "--mu", "0.5")
    true = getattr(amft, unread)

    def noise(*args):
        grad, *rest = true(*args)
        return torch.randn_like(grad), *rest
    monkeypatch.setattr(amft, unread, noise)
    tiny_run(tiny, tmp_path / "noise", *FIXED, "--mu", mu)
    plain = final_policy(tmp_path / "plain")
    assert torch.equal(plain, final_policy(tmp_path / "noise"))
    assert not torch.equal(plain, final_policy(tmp_path / "half"))


def test_a_policy_that_solves_nothing_learns_by_sft_alone(
        tiny, tmp_path, monkeypatch, unevaluated):
    """Would catch an RL gradient without a reward: it must move as mu L_SFT alone would."""
    monkeypatch.setattr(tasks.Deal, "grade", lambda self, text: "no_answer")
    rows = tiny_run(tiny, tmp_path / "silent", *FIXED, "--mu", "0.4")
    true = amft.rl_gradient

    def nothing(*args):
        grad, *rest = true(*args)
        return 0 * grad, *rest
    monkeypatch.setattr(amft, "rl_gradient", nothing)
    tiny_run(tiny, tmp_path / "sft", *FIXED, "--mu", "0.4")
    assert torch.equal(final_policy(tmp_path / "silent"), final_policy(tmp_path / "sft"))
    steps = [row for row in rows if row["kind"] == "step"]
    assert all(row["zero_adv"] == 1 for row in steps)
    assert all(row["rl_loss"] == 0 for row in steps)


def test_paper_controller_is_equation_6_to_the_letter(
        tiny, tmp_path, unevaluated, rewarded, monkeypatch):
    """Would catch --controller paper with a trace, its own prompts, or another rule than Eq. 6."""
    derivatives = spied(monkeypatch, "step_sensitivity")
    rows = tiny_run(tiny, tmp_path / "run", "--controller", "paper", "--eta-mu", "3")
    assert rows[0]["utility"] == "val"
    assert rows[0]["trace"] == 0.0
    assert [said["trace"] for said in derivatives] == [0.0] * 6
    mu = 0.5
    mixed = [row for row in rows if row["kind"] == "step" and row["step"] > 3]
    assert any("meta_grad" in row for row in mixed)
    for row in mixed:
        assert "meta_own" not in row
        assert row["meta_force"] == pytest.approx(3 * row.get("meta_grad", 0.0))
        entropy_force = 0.5 * (row["target_entropy"] - row["entropy"])
        mu = min(max(mu + row["meta_force"] + entropy_force, 0.05), 0.95)
        assert row["mu"] == pytest.approx(mu)


# --- the log


def test_same_seed_same_log(tiny, tmp_path):
    """Would catch noise that is not the seed's, also in the evaluations; and a seed unread."""
    few = ["--eval-n", "4", "--val-every", "4"]
    first = tiny_run(tiny, tmp_path / "first", *few)
    again = tiny_run(tiny, tmp_path / "again", *few)
    other = tiny_run(tiny, tmp_path / "other", *few, "--seed", "1")
    assert without_clock(first) == without_clock(again)
    assert without_clock(first)[1:] != without_clock(other)[1:]


ALWAYS = {"step", "mu", "sft_loss", "grad_norm", "grad_norm_rl", "grad_norm_sft", "rollouts",
          "seconds"}
MIXED = ALWAYS | {"meta_force", "entropy_force", "target_entropy", "entropy", "rl_loss", "success",
                  "zero_adv", "response_len", "truncated"}
META = {"meta_grad", "meta_se"}


def test_every_key_of_the_log_is_there(tiny, tmp_path):
    """Would catch a row or a key that tables and figures read and the log has no more."""
    rows = tiny_run(tiny, tmp_path / "run", "--eval-n", "4", "--val-every", "4")
    splits = set(tasks.GeneralPoints.splits)
    kinds = Counter(row["kind"] for row in rows)
    assert kinds == {"config": 1, "step": 9, "eval": 2 * len(splits) + 2, "final": 1}
    assert rows[-1]["kind"] == "final"
    assert {"seed", "lr", "torch", "device", "threads"} <= set(rows[0])
    steps = [row for row in rows if row["kind"] == "step"]
    for row in steps:
        assert (MIXED if row["step"] > 3 else ALWAYS) <= set(row)
        assert META & set(row) == (META if row["step"] in (5, 7, 9) else set())
    # The warm-up samples nothing; three looks at validation prompts have 8 x 4 each.
    assert steps[-1]["rollouts"] == (6 + 3) * 8 * 4
    for row in [row for row in rows if row["kind"] == "eval"]:
        assert row["split"] in splits
        assert row["n"] == 4
        assert sum(row["outcomes"].values()) == 4 * row["samples"]
        assert 0 <= row["low"] <= row["success"] <= row["high"] <= 1
        assert row["success"] <= row["any"] <= 1


def noise_of_steps(monkeypatch, tiny, out, *flags):
    """[(seed of torch's noise, indices of the prompts)] of each step, and the training problems."""
    seen, problems = [], []
    true = amft.Method.choose_prompts
    training = tasks.GeneralPoints.training

    def choose_prompts(self, step):
        indices = true(self, step)
        seen.append((torch.initial_seed(), tuple(indices)))
        return indices

    def drawn(self, n, rng):
        problems.extend(training(self, n, rng))
        return problems
    with monkeypatch.context() as patch:
        patch.setattr(amft.Method, "choose_prompts", choose_prompts)
        patch.setattr(tasks.GeneralPoints, "training", drawn)
        tiny_run(tiny, out, "--method", "rl", "--steps", "3", *flags)
    return seen, [problem.prompt for problem in problems]


def test_each_step_of_each_seed_has_its_own_noise_and_problems(
        tiny, tmp_path, monkeypatch, unevaluated):
    """Would catch noise, prompts or demonstrations drawn by the seed or the step's number alone."""
    seen, problems = noise_of_steps(monkeypatch, tiny, tmp_path / "0")
    more, others = noise_of_steps(monkeypatch, tiny, tmp_path / "1", "--seed", "1")
    noises, prompts = zip(*seen, *more)
    assert len(set(noises)) == 6
    assert len(set(prompts)) == 6
    assert len(problems) == len(others) == 200
    assert len(set(problems) & set(others)) < 100


def test_val_every_looks_at_the_policy_of_these_steps(tiny, tmp_path, monkeypatch):
    """Would catch an evaluation a step early or late, twice at the end, or of other splits."""
    def norm(model, tokenizer, task, config, split):
        size = amft.flatten(model).norm().item()
        return dict(split=split, n=1, success=size, low=size, high=size, any=size, greedy=size)
    monkeypatch.setattr(amft, "evaluate", norm)
    updates = spied(monkeypatch, "adamw_step")
    rows = tiny_run(tiny, tmp_path / "run", "--method", "sft", "--val-every", "3")
    evals = [row for row in rows if row["kind"] == "eval"]
    splits = list(tasks.GeneralPoints.splits)
    expected = [(0, split, True) for split in splits]
    expected += [(3, "val", False), (6, "val", False)]
    expected += [(9, split, True) for split in splits]
    assert [(row["step"], row["split"], row["whole"]) for row in evals] == expected
    sizes = [updates[0]["theta"].norm().item()]
    sizes += [said["returns"][0].norm().item() for said in updates]
    assert len(set(sizes)) == 10
    for row in evals:
        assert row["success"] == pytest.approx(sizes[row["step"]], rel=1e-6)


def counted(rollouts, stops):
    """(tokens of each conversation, [did it end?] of each response), row by row by hand."""
    lengths, ended = [], []
    batch = rollouts.batch
    for ids, mask in zip(batch.responses.tolist(), batch.response_mask.tolist()):
        lengths.append(sum(mask))
        for t, own in enumerate(mask):
            if own and (t + 1 == len(mask) or not mask[t + 1]):  # a response's last token
                ended.append(ids[t] in stops)
    return lengths, ended


def test_what_the_log_counts_of_conversations(
        tiny, tmp_path, monkeypatch, unevaluated, rewarded, tokenizer):
    """Would catch truncated of conversations, not responses; lengths or zero_adv of other axes."""
    stops = [tokenizer.eos_token_id, *range(0, len(tokenizer), 20)]  # so that many do end
    monkeypatch.setattr(amft, "stop_token_ids", lambda model: stops)
    looks = spied(monkeypatch, "rollout")
    rows = tiny_run(tiny, tmp_path / "run", "--task", "gp-turns", "--method", "fixed",
                    "--warmup", "0", "--steps", "4", "--samples", "3")
    rows = [row for row in rows if row["kind"] == "step"]
    looks = looks[-4:]  # a foreign checkpoint's check had one before
    some_alike = 0
    for row, look in zip(rows, looks):
        rollouts = look["returns"]
        lengths, ended = counted(rollouts, stops)
        assert len(ended) == sum(len(episode.responses) for episode in rollouts.episodes)
        assert len(ended) > len(rollouts.episodes)  # some had several turns
        assert 0 < row["truncated"] < 1
        assert row["truncated"] == pytest.approx(1 - np.mean(ended))
        assert row["response_len"] == pytest.approx(np.mean(lengths))
        solved = [episode.success for episode in rollouts.episodes]
        groups = [solved[3 * p:3 * p + 3] for p in range(8)]
        alike = [len(set(group)) == 1 for group in groups]
        some_alike += 0 < sum(alike) < 8
        assert row["zero_adv"] == pytest.approx(np.mean(alike))
        assert row["success"] == pytest.approx(np.mean(solved))
    assert some_alike


# --- kill and resume


@pytest.mark.parametrize("flags", [
    [],
    ["--advantage", "group", "--reward", "graded"],
    ["--method", "fixed"],
    ["--method", "sft-rl"],
    ["--ppo-epochs", "2", "--trace", "0.9", "--utility", "train", "--val-every", "2"],
])
def test_an_interrupted_run_goes_on_bit_for_bit(
        tiny, tmp_path, flags, monkeypatch, unevaluated, rewarded, capsys):
    """Would catch state that --resume forgets: cut off before H*, evidence and d theta/d mu are
    there, and in the middle of a mixed step."""
    monkeypatch.setattr(running, "SAVE_SECONDS", -1)
    folder = tmp_path / "run"
    whole = tiny_run(tiny, tmp_path / "unbroken", *flags, "--steps", "10")
    if "--method" not in flags:
        moving = [row["mu"] for row in whole if row["kind"] == "step" and row["step"] > 6]
        assert len(set(moving)) == 4
        assert all(0.05 < mu < 0.95 for mu in moving)
    argv = tiny_argv(tiny, folder, *flags, "--steps", "10")
    error = cut_off(argv, capsys, monkeypatch, 2, "sft_gradient")
    assert f"--resume {folder} goes on after step 1" in error
    updates = 8 if "--ppo-epochs" in flags else 5  # to the middle of step 6
    cut_off(["--resume", folder], capsys, monkeypatch, updates, "adamw_step")
    assert len(read(folder, "step")) == 5
    assert not (folder / "final").exists()
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"kind": "step", "step": 99, "half a li')
    amft.main(["--resume", str(folder)])
    same_run(folder, tmp_path / "unbroken")
    assert "unfinished" in fails(["--resume", folder], capsys)


def test_a_run_that_is_older_than_its_last_state_starts_from_there(
        tiny, tmp_path, monkeypatch, unevaluated, rewarded, capsys):
    """Would catch steps since the last state that are kept in the log and done again."""
    tiny_run(tiny, tmp_path / "unbroken")
    monkeypatch.setattr(running, "SAVE_SECONDS", 1e9)
    folder = tmp_path / "run"
    error = cut_off(tiny_argv(tiny, folder), capsys, monkeypatch, 7, "sft_gradient")
    assert "after step 0" in error
    assert len(read(folder, "step")) == 6
    amft.main(["--resume", str(folder)])
    same_run(folder, tmp_path / "unbroken")


def test_a_run_without_a_state_or_a_step_begins_anew(
        tiny, tmp_path, monkeypatch, unevaluated, capsys):
    """Would catch evaluations of before the first step that stay in the log twice."""
    tiny_run(tiny, tmp_path / "unbroken")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        def interrupt(*_):
            raise KeyboardInterrupt
        at_call(patch, amft, "evaluate", 4, interrupt)
        assert "--resume" not in fails(tiny_argv(tiny, folder), capsys, code=130)
    assert len(read(folder, "eval")) == 3
    assert not (folder / "state.pt").exists()
    amft.main(["--resume", str(folder)])
    same_run(folder, tmp_path / "unbroken")


def test_interrupted_while_a_state_is_written_the_one_before_is_whole(
        tiny, tmp_path, monkeypatch, unevaluated, rewarded):
    """Would catch a state that is written in place."""
    tiny_run(tiny, tmp_path / "unbroken")
    monkeypatch.setattr(running, "SAVE_SECONDS", -1)
    true = Path.write_bytes

    def half(path, state):
        true(path, state[:100])
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        at_call(patch, Path, "write_bytes", 7, half)
        with pytest.raises(SystemExit):
            amft.main(tiny_argv(tiny, tmp_path / "run"))
    amft.main(["--resume", str(tmp_path / "run")])
    same_run(tmp_path / "run", tmp_path / "unbroken")


def wait_for(process, ready):
    while process.poll() is None and not ready():
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed: more steps"


@slow
def test_killed_run_goes_on_bit_for_bit(tiny, tmp_path):
    """Would catch state that only lives in the process: by SIGTERM and by SIGKILL, in its own."""
    program = [sys.executable, amft.__file__]
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    log = killed / "metrics.jsonl"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([*program, *tiny_argv(tiny, killed, "--steps", "400")], **quiet)
    wait_for(process, lambda: log.exists() and len(read(killed, "step")) > 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    reached = len(read(killed, "step"))
    assert reached > 5
    process = subprocess.Popen([*program, "--resume", str(killed)], **quiet)
    wait_for(process, lambda: len(read(killed, "step")) > reached + 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "final").exists()
    subprocess.run([*program, "--resume", str(killed)], check=True)
    subprocess.run([*program, *tiny_argv(tiny, unbroken, "--steps", "400")], check=True)
    same_run(killed, unbroken)


# --- evaluation


def test_eval_only_repeats_the_runs_last_evaluation(tiny, tmp_path, capsys, rewarded):
    """Would catch a policy in final/ that is not the one that was evaluated, or other noise."""
    rows = tiny_run(tiny, tmp_path / "run", "--eval-n", "4", "--steps", "3")
    capsys.readouterr()
    final = str(tmp_path / "run" / "final")
    amft.main(["--eval-only", "--model", final, "--eval-n", "4", "--device", "cpu",
               "--max-new-tokens", "34"])
    printed = capsys.readouterr().out
    last = [row for row in rows if row["kind"] == "eval" and row["step"] == 3]
    assert len(last) == len(tasks.GeneralPoints.splits)
    for row in last:
        assert 0 < row["success"] < 1
        percent = re.escape(f"{100 * row['success']:.1f}")
        assert re.search(rf"\b{row['split']}\b.* {percent}%? \[", printed)


def test_an_evaluation_reports_samples_and_greedy_responses_of_the_same_episodes(base):
    """Would catch other episodes, noise or temperature than said: once more by hand."""
    model, tokenizer = base
    task = tasks.GeneralPoints()
    config = configured(eval_n=20, temperature=0.9)
    row = amft.evaluate(model, tokenizer, task, config, "id", samples=3, at_once=7)
    again = amft.evaluate(model, tokenizer, task, config, "id", samples=3, at_once=7)
    assert row == again
    episodes = task.episodes("id", 20)
    greedy = amft.rollout(model, tokenizer, episodes, 1, 40, temperature=0).episodes
    assert row["greedy"] == pytest.approx(np.mean([episode.success for episode in greedy]))
    assert row["n"] == 20
    assert row["samples"] == 3
    torch.manual_seed(0)
    played = []
    for start in range(0, 20, 7):
        part = episodes[start:start + 7]
        played += amft.rollout(model, tokenizer, part, 3, 40, 0.9).episodes
        amft.rollout(model, tokenizer, part, 1, 40, temperature=0)
    assert [episode.unit for episode in played] == [e.unit for e in episodes for _ in range(3)]
    success = [episode.success for episode in played]
    assert row["success"] == pytest.approx(np.mean(success))
    assert sum(row["outcomes"].values()) == 60
    solved = [any(success[3 * i:3 * i + 3]) for i in range(20)]
    assert row["any"] == pytest.approx(np.mean(solved))
    interval = tasks.interval([(episode.success, episode.unit) for episode in played])
    assert (row["success"], row["low"], row["high"]) == pytest.approx(interval)


def test_interval_covers_when_deals_come_in_clusters():
    """Would catch an interval that counts episodes: 60 multisets are solved or missed as a whole,
    and it must hold the true rate about 95% of the time."""
    rng = random.Random(SEED)
    covered = narrow = 0
    for _ in range(400):
        solved = [rng.random() < 0.4 for _ in range(60)]
        units = [rng.randrange(60) for _ in range(1000)]
        share, low, high = tasks.interval([(solved[unit], unit) for unit in units])
        covered += low <= 0.4 <= high
        narrow += high - low < 0.1
    assert 0.89 < covered / 400 < 0.99
    assert narrow == 0


def test_interval_without_clusters_is_wilsons():
    """Would catch another formula than Wilson's of 1927, for 30 of 100 and at the edge."""
    share, low, high = tasks.interval([(i < 30, i) for i in range(100)])
    assert (share, low, high) == pytest.approx((0.3, 0.2189, 0.3958), abs=1e-3)
    share, low, high = tasks.interval([(False, i) for i in range(50)])
    assert share == low == 0
    assert 0.06 < high < 0.08


# --- whole runs


@pytest.mark.parametrize("flags, mus", [
    ([], [1, 1, 0, 0]),
    (["--warmup", "1"], [1, 0, 0, 0]),
    (["--warmup", "3"], [1, 1, 1, 0]),
])
def test_sft_then_rl_switches_at_the_warm_up_or_half_way(
        flags, mus, tiny, tmp_path, monkeypatch, unevaluated):
    """Would catch RL alone with General Points' own defaults, which have no warm-up."""
    monkeypatch.setattr(tasks.GeneralPoints, "defaults", {**GP_DEFAULTS, "warmup": 0})
    smoke = {name: value for name, value in arguments.SMOKE.items() if name != "warmup"}
    monkeypatch.setattr(arguments, "SMOKE", smoke)
    tiny_run(tiny, tmp_path / "run", "--method", "sft-rl", "--steps", "4", *flags)
    rows = read(tmp_path / "run", "step")
    assert [row["mu"] for row in rows] == mus
    assert ["sft_loss" in row for row in rows] == [mu == 1 for mu in mus]
    assert ["success" in row for row in rows] == [mu == 0 for mu in mus]


def test_micro_batches_do_not_change_a_run(tiny, tmp_path, unevaluated, rewarded):
    """Would catch losses that are divided by a micro-batch's tokens, not the batch's."""
    for size in ("16384", "400"):
        flags = ["--micro-tokens", size, "--steps", "5", "--method", "fixed"]
        tiny_run(tiny, tmp_path / size, *flags)
    whole = final_policy(tmp_path / "16384")
    parts = final_policy(tmp_path / "400")
    start = LlamaForCausalLM.from_pretrained(tiny)
    moved = whole - parameters_to_vector(start.parameters()).detach()
    # Adam's step of an entry with next to no gradient has any sign: most entries, not every one.
    near = (whole - parts).abs() < 0.02 * moved.abs().max()
    assert near.float().mean() > 0.97


def test_amft_learns(tmp_path, monkeypatch):
    """Would catch a loop that runs and does not learn: from the shipped base, on 12 multisets."""
    small = [multiset for multiset, role in tasks.ROLES.items()
             if role == "train" and max(multiset) <= 10 and tasks.solve(multiset)]
    few = random.Random(SEED).sample(small, 12)
    roles = {multiset: role if role != "train" or multiset in few else "unused"
             for multiset, role in tasks.ROLES.items()}
    monkeypatch.setattr(tasks, "ROLES", roles)
    monkeypatch.setattr(tasks.GeneralPoints, "splits", {"id": "these 12"})
    amft.main(["--task", "gp", "--warmup", "50", "--steps", "56", "--prompts", "8", "--lr", "1e-3",
               "--demos", "1000", "--out", str(tmp_path / "run"), "--device", "cpu"])
    rows = read(tmp_path / "run", "eval")
    assert [row["n"] for row in rows] == [12, 12]
    first, last = (row["success"] for row in rows)
    assert last > 1.5 * first, (first, last)
    assert last > first + (1 - first) / 5, (first, last)
