from part_header import *  # noqa: F401,F403


# --- Eqs. 1-2: losses, advantages and their gradients ---------------------------------------------


def nll(logps, rows):
    """Weights of Eq. 2 as it stands: every token of a demonstration counts alike."""
    return torch.ones_like(logps)


def random_tokens(B=6, T=7):
    """(mask with holes, where the task speaks between two responses; three random (B, T))."""
    mask = (torch.rand(B, T) < 0.6).double()
    mask[:, 0] = 1.0
    return mask, [torch.randn(B, T, dtype=torch.float64) for _ in range(3)]


def same_with_gradient(actual, expected, x):
    torch.testing.assert_close(actual, expected)
    slope = torch.autograd.grad(actual, x, retain_graph=True)[0]
    expected_slope = torch.autograd.grad(expected, x, retain_graph=True)[0]
    torch.testing.assert_close(slope, expected_slope)


def test_losses_against_slow_loops():
    """A wrong sign, mask, divisor or side of the clip, in a loss or in its gradient."""
    mask, (logps, old, advantages) = random_tokens()
    logps.requires_grad_()
    likelihood = 0.0
    surrogate = 0.0
    count = 0
    for b, t in mask.nonzero().tolist():
        count += 1
        ratio = math.e ** (logps[b, t] - old[b, t])
        clipped = ratio
        if ratio < 0.8:
            clipped = 0.8
        if ratio > 1.2:
            clipped = 1.2
        advantage = advantages[b, t]
        likelihood = likelihood + logps[b, t]
        surrogate = surrogate - min(ratio * advantage, clipped * advantage)
    same_with_gradient(amft.sft_loss(logps, mask), -likelihood / count, logps)
    same_with_gradient(amft.sft_loss(logps, mask, n_tokens=100), -likelihood / 100, logps)
    ppo = partial(amft.ppo_loss, logps, old, advantages, mask, 0.2)
    same_with_gradient(ppo(), surrogate / count, logps)
    same_with_gradient(ppo(n_tokens=100), surrogate / 100, logps)
    implicit = amft.implicit_reward(logps, old, mask, beta=0.3)
    for b in range(len(mask)):
        own = mask[b].nonzero().squeeze(1)
        expected = 0.3 * sum((logps - old)[b, t].item() for t in own)
        assert implicit[b].item() == pytest.approx(expected)


def test_gae_against_its_definition():
    """A_t = sum_k (gamma lam)^k delta_{t+k} over the policy's own tokens, summed directly."""
    mask, (rewards, values, _) = random_tokens()
    gamma, lam = 0.9, 0.8
    advantages, returns = amft.gae(rewards * mask, values * mask, mask, gamma, lam)
    assert (advantages[mask == 0] == 0).all()
    assert (returns[mask == 0] == 0).all()
    for b, own in enumerate(mask.bool()):
        r = rewards[b][own].tolist()
        v = values[b][own].tolist()
        delta = [now + gamma * later - here for now, here, later in zip(r, v, [*v[1:], 0.0])]
        expected = np.zeros(len(r))
        for i in range(len(r)):
            for k in range(i, len(r)):
                expected[i] += (gamma * lam) ** (k - i) * delta[k]
        np.testing.assert_allclose(advantages[b][own], expected, atol=1e-12)
        np.testing.assert_allclose(returns[b][own], expected + v, atol=1e-12)


def test_group_advantages_by_hand():
    """A baseline that holds the sample itself, or a scale of each prompt's own."""
    rewards = torch.tensor([
        [1.0, 0, 0, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
        [5, -1, -3, -1]], dtype=torch.float64)
    actual, scale = amft.group_advantages(rewards)
    expected = rewards - others_mean(rewards)
    torch.testing.assert_close(actual * scale, expected)
    assert scale == pytest.approx(np.std(expected.numpy()))  # one for the batch, of the population
    first = actual[0] * scale
    assert first.tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    flat, scale = amft.group_advantages(torch.ones(3, 4))
    assert (flat == 0).all() and scale > 0


def advantages_to_go(mask, paid, value):
    """(returns with lambda and gamma 1; advantages over a constant value, less their mean)."""
    togo = paid.flip(1).cumsum(1).flip(1) * mask
    expected = (togo - value) * mask
    mean = expected.sum() / mask.sum()
    return togo, (expected - mean) * mask


def constant_phi(model, value):
    """A value function that says the same of every token, but can learn."""
    phi = amft.value_function(model)
    phi.layers[-1].weight.data.zero_()
    phi.layers[-1].bias.data.fill_(value)
    return phi


@pytest.mark.parametrize("reward", ["graded", "binary"])
@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_graded_rewards_are_the_tasks_points(advantage, reward):
    """Points paid elsewhere than they were made; a phi that learns anything but the returns."""
    # graded pays a response's points where it ends, binary 1 at the end of what succeeded.
    model = toy_model()
    lengths = torch.tensor([2, 1] * 4)
    mask = mask_of(lengths)
    points = torch.randn(8, T) * mask
    success = digits("1001", "0100").double()
    batch = toy_batch([0, 1], 4, mask)
    rollouts = rollouts_of(batch, success, points)
    config = configured(reward=reward, advantage=advantage)
    paid = points
    if reward == "binary":
        paid = torch.zeros_like(mask)
        paid[range(8), lengths - 1] = success.flatten()
    if advantage == "group":
        actual = amft.advantages_of(model, None, rollouts, config)
        totals = paid.sum(1).view(2, 4)
        expected = (totals - others_mean(totals)).reshape(-1, 1) * mask
        torch.testing.assert_close(actual.values * actual.scale, expected)
        return
    phi = constant_phi(model, 0.25)
    learner = copy.deepcopy(phi.layers)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    actual = amft.advantages_of(model, phi, rollouts, config)
    togo, expected = advantages_to_go(mask, paid, 0.25)
    torch.testing.assert_close(actual.values * actual.scale, expected)
    own = actual.values[mask.bool()]
    assert own.std(correction=0).item() == pytest.approx(1.0, rel=1e-3)
    with torch.no_grad():  # what the policy's head reads where it predicts a response's tokens
        states = model.transformer(batch.input_ids).last_hidden_state[:, 2:-1]
    errors = (learner(states).squeeze(-1) - togo) ** 2 * mask
    (0.5 * errors.sum() / mask.sum()).backward()
    optimizer.step()
    for moved, expected in zip(phi.parameters(), learner.parameters(), strict=True):
        torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("columns", [5, 12])
def test_phi_reads_what_the_policys_head_reads(columns):
    """Another layer's states, or another column's than the one that predicts the token."""
    model = toy_model()
    batch = toy_batch([0, 1, 2], 2)
    logits, states = amft.response_outputs(model, batch, hidden=True)
    torch.testing.assert_close(model.lm_head(states), logits)

    class Phi:
        def __call__(self, states):
            self.states = states
            return states.sum(-1)

        def learn(self, values, returns, mask):
            pass
    phi = Phi()
    rollouts = rollouts_of(batch, digits("10", "01", "11").double())
    amft.advantages_of(model, phi, rollouts, configured(micro_tokens=columns))
    logps = model.lm_head(phi.states).log_softmax(-1)
    for b, ids in enumerate(batch.responses):
        said = logps[b, range(T), ids]
        torch.testing.assert_close(said, slow_logps(model, batch, b))


@pytest.mark.parametrize("reward", ["graded", "binary"])
@pytest.mark.parametrize("advantage", ["group", "gae"])
@pytest.mark.parametrize("total", [0.0, 1.0])
def test_equal_rewards_move_nothing(advantage, reward, total):
    """Phi's error alone, blown up to a spread of 1: theta and mu would move on nothing."""
    # Responses of different length, points in different places, one total.
    model, phi = toy_model(), None
    points = torch.zeros(8, T)
    points[:, 0] = total
    points[1, 0] -= 0.5
    points[1, 1] += 0.5
    batch = toy_batch([0, 1], 4, mask_of([1, 2] * 4))
    rollouts = rollouts_of(batch, torch.full((2, 4), total), points)
    config = configured(advantage=advantage, reward=reward)
    if advantage == "gae":
        phi = roughened(amft.value_function(model))
        before = flat_weights(phi)
    advantages = amft.advantages_of(model, phi, rollouts, config)
    assert (advantages.values == 0).all()
    assert advantages.scale == 1
    if phi:
        assert not torch.equal(flat_weights(phi), before)  # it goes on learning
    g_rl, _, loss = amft.rl_gradient(model, batch, advantages, config)
    assert (g_rl == 0).all()
    assert loss == 0
    tangent = torch.randn_like(g_rl)
    own = amft.own_meta_gradient(g_rl, tangent, batch, advantages.scale)
    val = amft.meta_gradient(model, tangent, rollouts, config)
    moved = amft.update_mu(0.4, 1.0, 1.0, [own, val], (2.0, 3.0), config)
    assert moved == (0.4, (2.0, 3.0), (0.0, 0.0))
    # One sample that differs is a signal.
    rollouts.success[0, 0] = 1 - total
    rollouts.rewards[0, 0] = 1 - total
    advantages = amft.advantages_of(model, phi, rollouts, config)
    assert amft.rl_gradient(model, batch, advantages, config)[0].norm() > 0


def test_an_update_with_old_samples_is_the_clipped_one():
    """The RL gradient at a second update: PPO's, against the policy that sampled."""
    model, B, tau = toy_model(), 12, 0.7
    batch = toy_batch([0, 1, 2], 4)
    advantages = amft.Advantages(torch.randn(B, T), 1.0)
    with torch.no_grad():
        old = amft.logps_of(model, batch, tau) + 0.3 * torch.randn(B, T)
    total = 0.0
    for b in range(B):
        ratios = (slow_logps(model, batch, b, tau) - old[b]).exp()
        for ratio, a in zip(ratios, advantages.values[b]):
            clipped = ratio.clamp(0.8, 1.2)
            total = total - min(ratio * a, clipped * a) / (B * T)
    expected = flat_grad(total, model)
    logps = amft.logps_of(model, batch, tau).detach()
    for size in (12, 5):
        config = configured(temperature=tau, micro_tokens=size * 5)
        grad, seen, losses = amft.rl_gradient(model, batch, advantages, config, old)
        close(grad, expected, 1e-4)
        assert losses == pytest.approx(total.item(), rel=1e-3, abs=1e-5)
        np.testing.assert_allclose(seen, logps, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("imitation", ["nll", "rectified"])
def test_the_loss_of_a_demonstration(imitation):
    """Rectified: each token's -log p times its own p, a constant, over all tokens of the batch."""
    model, batch = toy_model(), sequences(PROMPTS[0]).rows(torch.arange(0, 25, 3))
    mask = (torch.rand(batch.response_mask.shape) < 0.7).double()
    mask[:, 0] = 1.0
    batch = batch._replace(response_mask=mask)
    method = amft.SFT(configured(imitation=imitation))
    total = 0.0
    for b in range(len(mask)):
        for logp in slow_logps(model, batch, b):
            weight = logp.exp().item() if imitation == "rectified" else 1.0
            total = total - weight * logp
    expected = flat_grad(total / mask.sum(), model)
    for size in (9, 2):
        config = configured(micro_tokens=size * batch.input_ids.shape[1])
        weights = partial(method.token_weights, None)
        grad, logps, losses = amft.sft_gradient(model, batch, config, weights)
        close(grad, expected, 1e-4)
        mean = (logps * mask).sum() / mask.sum()
        assert losses == pytest.approx(-mean.item(), rel=1e-4)


def test_sft_is_policy_gradient_with_the_implicit_reward():
    """A loss that is not what section 3.2 makes of it, by enumeration."""
    # grad L_SFT = -E_{y~pi}[1[y = y*] / pi(y|x) grad log pi(y|x)], exact-match RL is the same
    # without the 1/pi, and mu L_SFT = mu KL(pi_demo || pi) + mu H(pi_demo).
    model, prompt, best = toy_model(), PROMPTS[0], 7
    batch = sequences(prompt).rows(torch.tensor([best]))
    loss = amft.sft_loss(amft.logps_of(model, batch), batch.response_mask, n_tokens=1)
    g_sft = flat_grad(loss, model)
    policy_gradient = exact_match = 0.0
    for y in range(len(ALL)):
        logp = exact_logps(model, prompt)[y]
        pi = logp.exp().item()
        hit = float(y == best)
        score = flat_grad(logp, model)
        policy_gradient = policy_gradient + pi * (hit / pi) * score
        exact_match = exact_match + pi * hit * score
    close(g_sft, -policy_gradient, 1e-5)
    close(-g_sft * exact_logps(model, prompt)[best].exp(), exact_match, 1e-5)
    # PPO on every response at its probability, advantage 1[y = y*], is exact-match RL.
    everything = sequences(prompt)
    mask = everything.response_mask
    logps = amft.logps_of(model, everything)
    hits = (torch.arange(len(ALL)) == best).double().unsqueeze(1) * mask
    weighted = hits * logps.sum(1, keepdim=True).detach().exp()
    loss = amft.ppo_loss(logps, logps.detach(), weighted, mask, n_tokens=1)
    close(flat_grad(loss, model), -exact_match, 1e-5)
    # Demonstrations that are samples of pi_demo: the expected loss is KL plus a constant.
    demo = torch.rand(len(ALL), dtype=torch.float64).softmax(0)
    one = torch.ones(1, T)
    losses = torch.stack([amft.sft_loss(row.unsqueeze(0), one, n_tokens=1) for row in logps])
    kl = (demo * (demo.log() - exact_logps(model, prompt))).sum()
    entropy = -(demo * demo.log()).sum()
    torch.testing.assert_close((demo * losses).sum(), kl + entropy, rtol=1e-5, atol=1e-6)


def counted_rows(model):
    """(how many sequences each forward pass from now on has; a handle whose remove() ends it)."""
    seen = []

    def count(_, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
    return seen, model.register_forward_pre_hook(count, with_kwargs=True)


def test_gradients_do_not_depend_on_micro_batches_and_silent_groups_add_nothing(base, tokenizer):
    """A divisor of each micro-batch's own, rows lost or counted twice, passes for silent rows."""
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    episodes = [task.sample("train", rng) for _ in range(6)]
    config = configured(samples=4, advantage="group")
    success = digits("1001", "0000", "1111", "0100", "0000", "1110").float()
    rollouts = amft.rollout(model, tokenizer, episodes, 4, 40)
    rollouts = rollouts._replace(success=success)
    batch = rollouts.batch
    mask = batch.response_mask
    advantages = amft.advantages_of(model, None, rollouts, config)
    logps = amft.logps_of(model, batch)  # every row, in one pass, by the textbook formula
    weights = success - others_mean(success)
    weights = weights / weights.std(correction=0)
    loss = -(weights.reshape(-1, 1) * logps * mask).sum()
    expected = flat_grad(loss / mask.sum(), model)
    demos = amft.encode_demos(model, tokenizer, episodes)
    expected_sft = flat_grad(-mean_logp(model, demos), model)
    passes, hook = counted_rows(model)
    for size in (24, 5, 1):
        config.micro_tokens = size * batch.input_ids.shape[1] + 1
        passes.clear()
        close(amft.rl_gradient(model, batch, advantages, config)[0], expected, 1e-3)
        assert sum(passes) == 12  # the three silent groups cost nothing
        assert max(passes) == min(size, 12)
        # A sequence that is longer than micro_tokens goes alone.
        config.micro_tokens = size * demos.input_ids.shape[1] - (size == 1)
        close(amft.sft_gradient(model, demos, config, nll)[0], expected_sft, 1e-3)
    hook.remove()


def test_demonstrations_that_begin_with_a_slip_are_learned_from(base, tokenizer):
    """Rows chosen by their first token's weight: what follows a slip would drop out unseen."""
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints(turns=2)
    deals = [task.sample("train", rng) for _ in range(100)]
    slips = [deal for deal in deals if deal.slips][:2]
    plain = [deal for deal in deals if not deal.slips][:2]
    batch = amft.encode_demos(model, tokenizer, [*slips, *plain])
    assert batch.response_mask[:, 0].tolist() == [0, 0, 1, 1]
    mean = mean_logp(model, batch)
    expected = flat_grad(-mean, model)
    for size in (4, 1):
        config = configured(micro_tokens=size * batch.input_ids.shape[1])
        grad, _, loss = amft.sft_gradient(model, batch, config, nll)
        close(grad, expected, 1e-3)
        assert loss == pytest.approx(-mean.item(), rel=1e-3)


# --- Eq. 3: the step ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e6, 0.1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_step_equals_torch(max_norm, weight_decay):
    """clip_grad_norm_ and AdamW, step after step; entries without any gradient, and no gradient."""
    model = toy_model()
    theta = amft.flatten(model)
    state = fresh(theta)
    how = dict(lr=1e-2, max_norm=max_norm, weight_decay=weight_decay)
    for step in range(4):
        grad = torch.zeros_like(theta)
        if step < 2:
            grad = torch.randn_like(theta) * (torch.rand_like(theta) < 0.5)
        stepped = torch_step(model, grad, state, **how)
        theta, state = amft.adamw_step(theta, grad, state, **how)
        put(model, theta)
        torch.testing.assert_close(theta, flat_weights(stepped), rtol=1e-11, atol=1e-13)
    assert state.step == 4


def test_weights_come_and_go_as_one_vector():
    """theta in another order than torch's, or cut wrongly into the weights."""
    model, other = toy_model(), toy_model()
    theta = amft.flatten(model)
    torch.testing.assert_close(theta, flat_weights(model), rtol=0, atol=0)
    amft.set_theta(other, theta)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    half = copy.deepcopy(model).bfloat16()
    assert amft.flatten(half).dtype == torch.float32
    amft.set_theta(half, theta)
    assert half.dtype == torch.bfloat16
    assert torch.equal(flat_weights(half), theta.bfloat16())


# --- Eqs. 4-5: the derivative of the step, and the meta-gradient ----------------------------------


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("steps_before", [0, 1, 30])
@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_sensitivity_is_the_finite_difference_of_exact_utility(clipped, steps_before, mu):
    """dU/dmu of the exact U after the whole step, torch's own, against <grad U, d theta'/d mu>."""
    model, reward, g_rl, g_sft, state = toy(steps_before)
    # The first step is sign(g) but within eps of 0: keep g(mu) from crossing it.
    if not steps_before:
        g_sft = g_rl * (1 + torch.rand_like(g_rl))

    def mixed(mu):
        return (1 - mu) * g_rl + mu * g_sft
    norm = mixed(mu).norm().item()
    max_norm = norm / 3 if clipped else norm * 3
    how = dict(lr=0.05, max_norm=max_norm)

    def utility(mu):  # through torch's clip and AdamW, then by enumeration
        stepped = torch_step(model, mixed(mu), state, **how)
        with torch.no_grad():
            return exact_utility(stepped, reward).item()
    expected = central_difference(utility, mu, 1e-5)
    theta = amft.flatten(model)
    tangent, _, _ = amft.step_sensitivity(theta, g_rl, g_sft, mu, state, **how)
    after, _ = amft.adamw_step(theta, mixed(mu), state, **how)
    put(model, after)
    slope = flat_grad(exact_utility(model, reward), model)
    # The tolerance is relative to what the inner product could be: it may happen to be near 0.
    size = (slope.norm() * tangent.norm()).item()
    actual = (slope @ tangent).item()
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5 * size + 1e-10)
    if steps_before:
        assert tangent.norm() > 1e-3 * how["lr"]  # there is something to compare


def test_sensitivity_with_a_trace_is_the_derivative_in_a_mu_that_was_larger_all_along():
    """Float64 central differences through torch's own clipping and AdamW, gradients held fixed."""
    generator, N, trace = torch.Generator().manual_seed(SEED), 20, 0.7
    grads = torch.randn(6, 2, N, generator=generator, dtype=torch.float64)

    def final(shift):
        theta = torch.nn.Parameter(torch.ones(N, dtype=torch.float64))
        optimizer = torch.optim.AdamW([theta], lr=0.05, weight_decay=0.0)
        for i, (g_rl, g_sft) in enumerate(grads):
            mu = 0.4 + shift * trace ** (len(grads) - 1 - i)
            theta.grad = (1 - mu) * g_rl + mu * g_sft
            torch.nn.utils.clip_grad_norm_([theta], 2.0)
            optimizer.step()
        return theta.detach()
    expected = central_difference(final, 0.0, 1e-6)
    theta, last = torch.ones(N, dtype=torch.float64), None
    state = fresh(theta)
    how = dict(lr=0.05, max_norm=2.0)
    for g_rl, g_sft in grads:
        last = amft.step_sensitivity(theta, g_rl, g_sft, 0.4, state, last, trace, **how)
        theta, state = amft.adamw_step(theta, 0.6 * g_rl + 0.4 * g_sft, state, **how)
    torch.testing.assert_close(last[0], expected, rtol=1e-5, atol=1e-7)


def test_adams_first_step_hides_mu():
    """A derivative that takes Adam for SGD: on fresh moments the step is sign(g), whatever mu."""
    theta, mixed, apart = torch.randn(3, 50, dtype=torch.float64)
    mixed += 0.1 * mixed.sign()  # where it is as small as eps the sign has a slope
    g_rl = mixed - apart / 2
    g_sft = mixed + apart / 2
    state = fresh(theta)
    how = dict(lr=1.0, max_norm=1e9)
    norms = []
    for _ in range(3):
        tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, **how)[0]
        norms.append(tangent.norm().item())
        theta, state = amft.adamw_step(theta, torch.randn_like(theta), state, **how)
    assert norms[0] < 1e-4
    assert min(norms[1:]) > 0.1


def test_sensitivity_is_finite_where_no_gradient_ever_came():
    """0/0 in the derivative of Adam's root, or of the norm of a gradient that is 0."""
    theta, zeros = torch.randn(4), torch.zeros(4)
    g_rl, g_sft, v = digits("0102", "0032", "0111").float()
    for state in (fresh(theta), amft.AdamState(zeros, v, 9)):
        tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=0.1)[0]
        assert tangent.isfinite().all()
        assert tangent[0] == 0
        nothing = amft.step_sensitivity(theta, zeros, zeros, 0.5, state, lr=0.1)[0]
        assert nothing.isfinite().all()


def toy_tangent(steps_before=10):
    """(model, reward, d theta'/d mu of a step of it)."""
    model, reward, g_rl, g_sft, state = toy(steps_before)
    theta = amft.flatten(model)
    return model, reward, amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=0.05)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_meta_gradient_is_exactly_unbiased(temperature):
    """A bias of Eq. 5: its mean over every pair of responses is <grad U, tangent>, enumerated."""
    # U is the success of sampling at the temperature; each pair counts at its probability, G = 2.
    model, reward, tangent = toy_tangent()
    size = tangent.norm().item()
    config = configured(temperature=temperature)
    success = digits("10").double()
    expected = []
    total = []
    for prompt, r in zip(PROMPTS[:2], reward):
        right = r.nonzero().squeeze(1)[:4].tolist()
        wrong = (1 - r).nonzero().squeeze(1)[:7].tolist()
        logps = exact_logps(model, prompt, temperature)
        # A task whose responses are these, renormalised: fewer pairs, as exact.
        p = torch.zeros(len(ALL))
        p[right + wrong] = logps[right + wrong].softmax(0)
        value = 0.0  # sum over pairs of p_y p_z estimate(y, z); pairs of equal reward have none
        for y, z in itertools.product(right, wrong):
            pair = batch_of(prompt.expand(2, -1), ALL[[y, z]])
            estimate, _ = amft.meta_gradient(model, tangent, rollouts_of(pair, success), config)
            # Given y right and z wrong, r_y - r_z = 1: half of the difference of their scores.
            half = (logps[y] - logps[z]) / 2
            score = flat_grad(half, model, retain_graph=True) @ tangent
            assert estimate == pytest.approx(score.item(), rel=1e-3, abs=1e-5 * size)
            value += 2 * (p[y] * p[z]).item() * estimate
        total.append(value)
        slope = flat_grad(p[right].sum(), model) @ tangent
        expected.append(slope.item())
    assert total == pytest.approx(expected, rel=2e-3, abs=1e-5 * size)


@pytest.mark.parametrize("rows", [100, 3, 1])
def test_meta_gradient_against_a_slow_loop(rows):
    """A wrong baseline, scale, mask or row of a micro-batch; an error that is not over prompts."""
    # Prompts of different difficulty, two without a signal, conversations of different length.
    model, P, G, tau = toy_model(), 5, 4, 0.7
    lengths = torch.randint(1, 3, (P * G,))
    batch = toy_batch([0, 1, 2, 0, 1], G, mask_of(lengths))
    success = digits("1000", "1100", "1111", "0111", "0000").double()
    weights = (success - others_mean(success)) / G
    tangent = torch.randn_like(amft.flatten(model))
    slopes = []
    for p in range(P):
        total = 0.0
        for g in range(G):
            logp = slow_logps(model, batch, p * G + g, tau).sum()
            total = total + weights[p, g] * logp
        slope = flat_grad(total, model) @ tangent
        slopes.append(slope.item())
    config = configured(temperature=tau, samples=G, micro_tokens=rows * 5)
    slope, error = amft.meta_gradient(model, tangent, rollouts_of(batch, success), config)
    size = np.abs(slopes).max()
    assert slope == pytest.approx(np.mean(slopes), rel=1e-4, abs=1e-5 * size)
    assert error == pytest.approx(np.std(slopes, ddof=1) / math.sqrt(P), rel=1e-4)
    assert slopes[2] == 0
    assert slopes[4] == 0


def test_meta_gradient_with_advantages_of_ones_own():
    """Advantages that are handed over: another baseline than the group's, with its scale."""
    model, P, G = toy_model(), 2, 3
    batch = toy_batch([0, 1], G)
    values = torch.randn(P, G)
    tangent = torch.randn_like(amft.flatten(model))
    total = 1.7 * (values.flatten() * slow_totals(model, batch)).mean()
    expected = (flat_grad(total, model) @ tangent).item()
    rollouts = rollouts_of(batch, torch.ones(P, G))
    for rows in (100, 2):
        config = configured(micro_tokens=rows * 5)
        slope, _ = amft.meta_gradient(model, tangent, rollouts, config, (values, 1.7))
        assert slope == pytest.approx(expected, rel=1e-4)


def test_the_standard_error_of_the_meta_gradient_covers():
    """Sampled on the toy world: the mean is the truth, and 95% intervals hold it."""
    model, reward, tangent = toy_tangent()
    with torch.no_grad():
        probabilities = torch.stack([exact_logps(model, p).exp() for p in PROMPTS])
    truth = (flat_grad(exact_utility(model, reward), model) @ tangent).item()
    P, G, repetitions = 24, 4, 150
    estimates = np.zeros(repetitions)
    errors = np.zeros(repetitions)
    for i in range(repetitions):
        which = torch.randint(3, (P,))
        samples = torch.multinomial(probabilities[which], G, replacement=True)
        batch = batch_of(PROMPTS[which].repeat_interleave(G, 0), ALL[samples.flatten()])
        rollouts = rollouts_of(batch, reward[which.unsqueeze(1), samples])
        estimates[i], errors[i] = amft.meta_gradient(model, tangent, rollouts, configured())
    assert abs(z_score(estimates, truth)) < 4.5
    assert np.sqrt(np.mean(errors ** 2)) == pytest.approx(estimates.std(), rel=0.45)
    # Half the error would cover 67%; where success is rare the mean of so few prompts is skewed,
    # and 95% is not reached.
    assert np.mean(abs(estimates - truth) < 1.96 * errors) > 0.78


@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_own_meta_gradient_is_the_slope_of_the_samples_utility(advantage):
    """A wrong sign or unit: d/dh of the mean of (r - baseline) log pi at theta + h tangent."""
    # Conversations of different length, a prompt without signal.
    model, P, G, tau = toy_model(), 4, 6, 0.8
    mask = mask_of(torch.randint(1, 3, (P * G,)))
    batch = toy_batch([0, 1, 2, 0], G, mask)
    success = digits("000100", "101010", "110111", "000000").double()
    config = configured(advantage=advantage, samples=G, temperature=tau)
    phi = None
    baseline = others_mean(success).flatten()
    if advantage == "gae":  # a value of 0 everywhere: every token's return is the reward
        phi = constant_phi(model, 0.0)
        mean = (success.flatten() * mask.sum(1)).sum() / mask.sum()
        baseline = mean.expand(P * G)
    advantages = amft.advantages_of(model, phi, rollouts_of(batch, success), config)
    g_rl = amft.rl_gradient(model, batch, advantages, config)[0]
    tangent = torch.randn_like(amft.flatten(model))
    weights = (success.flatten() - baseline) / (P * G)

    def weighted(h):
        moved = put(copy.deepcopy(model), amft.flatten(model) + h * tangent)
        with torch.no_grad():
            return (weights @ slow_totals(moved, batch, tau)).item()
    expected = central_difference(weighted, 0.0, 1e-5)
    slope, error = amft.own_meta_gradient(g_rl, tangent, batch, advantages.scale)
    size = (g_rl.norm() * tangent.norm()).item() * advantages.scale * T
    assert slope == pytest.approx(expected, rel=1e-4, abs=1e-5 * size)
    assert error == abs(slope) > 0


def test_own_meta_gradient_is_unbiased_whatever_the_value_function_says():
    """A bias that praises what the RL gradient does anyway: phi knows nothing here."""
    # Sampled, against <grad U, tangent> by enumeration; also where nearly all responses succeed.
    # With lambda = 0 the RL gradient has a direction of its own there, and the tangent is that of a
    # policy that went that way: the test would see a bias.
    model, reward, _, _, _ = toy(0)
    phi = roughened(amft.value_function(model))
    phi.learn = lambda *_: None
    with torch.no_grad():
        probabilities = torch.stack([exact_logps(model, p).exp() for p in PROMPTS])
    rare = (probabilities - 0.05).abs().argmin(1)
    nearly = torch.ones_like(reward)
    nearly[range(3), rare] = 0.0

    def sampled(reward, B=384):
        which = torch.randint(3, (B,))
        samples = torch.multinomial(probabilities[which], 1).squeeze(1)
        batch = batch_of(PROMPTS[which], ALL[samples])
        return rollouts_of(batch, reward[which, samples].view(-1, 8))

    def one_step(rollouts):  # the Advantages of lambda = 0: A_t = r_t + V_{t+1} - V_t
        _, states = amft.response_outputs(model, rollouts.batch, hidden=True)
        first, second = phi(states).detach().T
        raw = torch.stack([second - first, rollouts.success.flatten() - second], 1)
        scale = raw.std(correction=0).item()
        return amft.Advantages((raw - raw.mean()) / scale, scale)

    def all_along(rollouts):  # lambda = 1, the default
        return amft.advantages_of(model, phi, rollouts, configured())

    def gradient(rollouts, advantages):
        return amft.rl_gradient(model, rollouts.batch, advantages, configured())[0]

    def slopes(reward, advantages_of, n):
        for _ in range(n):
            rollouts = sampled(reward)
            advantages = advantages_of(rollouts)
            g_rl = gradient(rollouts, advantages)
            yield amft.own_meta_gradient(g_rl, tangent, rollouts.batch, advantages.scale)[0]

    def z_of(reward, advantages_of, n=40):
        truth = (flat_grad(exact_utility(model, reward), model) @ tangent).item()
        return z_score(list(slopes(reward, advantages_of, n)), truth)
    tangent = 0.0
    for _ in range(20):
        rollouts = sampled(nearly)
        tangent = tangent - gradient(rollouts, one_step(rollouts))
    assert abs(z_of(reward, all_along)) < 4.5
    assert abs(z_of(nearly, all_along)) < 4.5
    assert z_of(nearly, one_step, 160) > 3
    assert set(slopes(torch.ones_like(reward), all_along, 3)) == {0.0}


def test_published_settings_leave_mu_to_the_entropy_term(base, tokenizer):
    """At learning rate 1e-6 and eta_mu 1e-4, 25 meta-gradients move mu by less than 1e-6."""
    config = configured(
        controller="paper", eta_mu=1e-4, eta_h=0.0, lr=1e-6, utility="val", trace=0.0,
        advantage="group", samples=8, prompts=16)
    model, task, rng = copy.deepcopy(base[0]), tasks.GeneralPoints(), random.Random(SEED)
    theta = amft.flatten(model)
    state = fresh(theta)

    def sampled(split):
        return [task.sample(split, rng) for _ in range(16)]

    def g_sft_of_a_batch():
        demos = amft.encode_demos(model, tokenizer, sampled("train"))
        return amft.sft_gradient(model, demos, config, nll)[0]
    for _ in range(30):  # the warm-up; on fresh moments entries with g(mu) near 0 make heavy tails
        theta, state = amft.adamw_step(theta, g_sft_of_a_batch(), state, lr=config.lr)
    for _ in range(3):
        seen = amft.rollout(model, tokenizer, sampled("train"), 8, 40)
        advantages = amft.advantages_of(model, None, seen, config)
        g_rl = amft.rl_gradient(model, seen.batch, advantages, config)[0]
        g_sft = g_sft_of_a_batch()
        tangent = amft.step_sensitivity(theta, g_rl, g_sft, 0.5, state, lr=config.lr)[0]
        theta, state = amft.adamw_step(theta, (g_rl + g_sft) / 2, state, lr=config.lr)
    put(model, theta)
    seen = amft.rollout(model, tokenizer, sampled("val"), 8, 40)
    slope, error = amft.meta_gradient(model, tangent, seen, config)
    assert error > 0
    far = [(abs(slope) + 2 * error, error)]  # the far end of the interval
    mu = 0.5
    for _ in range(500 // 20):  # all 25 updates in the same direction
        mu, _, _ = amft.update_mu(mu, 1.0, 1.0, far, (0.0, 0.0), config)
    assert 0 < mu - 0.5 < 1e-6, (slope, error)


def test_reference_codes_formula_has_the_wrong_sign():
    """The public code's formula climbs the validation loss, by finite differences."""
    # It adds -alpha <grad CE_val, g_SFT - g_RL> to mu (adaptive_weight_controller.py:41, :80):
    # under its own SGD step that is d CE_val/d mu. Utility is -CE_val.
    model, _, g_rl, g_sft, _ = toy(3)
    labels = torch.randint(len(ALL), (3,))
    theta, alpha = amft.flatten(model), 0.05

    def cross_entropy(mu):
        put(model, theta - alpha * ((1 - mu) * g_rl + mu * g_sft))
        return -sum(exact_logps(model, p)[y] for p, y in zip(PROMPTS, labels)) / 3

    def utility(mu):
        with torch.no_grad():
            return -cross_entropy(mu).item()
    slope = central_difference(utility, 0.5, 1e-5)
    reference = -alpha * (flat_grad(cross_entropy(0.5), model) @ (g_sft - g_rl)).item()
    assert reference == pytest.approx(-slope, rel=1e-4, abs=1e-8 * alpha)
    assert slope != 0


# --- Eq. 6: the controller ------------------------------------------------------------------------


def controller(**settings):
    return configured(**{**dict(eta_mu=0.1, eta_h=0.5, mu_min=0.1, mu_max=0.9), **settings})


NO_EVIDENCE = (0.0, 0.0)


def moved(estimates, evidence, mu=0.5, entropy=1.0, target=1.0, **settings):
    """update_mu with a memory of half."""
    return amft.update_mu(
        mu, entropy, target, estimates, evidence, controller(**settings), memory=0.5)


def test_controller_on_hand_computed_values():
    """A wrong sign of the entropy term, a bound that does not hold, evidence that fades wrongly."""
    # Entropy 0.2 below target, no meta-gradient: Eq. 6 raises mu by 0.5 * 0.2; the paper's text
    # lowers it.
    assert moved([], NO_EVIDENCE, target=1.2)[0] == pytest.approx(0.6)
    assert moved([], NO_EVIDENCE, target=1.2, eta_h=-0.5)[0] == pytest.approx(0.4)
    assert moved([], NO_EVIDENCE, target=1.2, eta_h=0.0)[0] == 0.5
    # Eq. 6 to the letter.
    mu, _, forces = moved([(-3.0, 1.0)], NO_EVIDENCE, target=1.2, controller="paper")
    assert mu == pytest.approx(0.3)
    assert forces == pytest.approx((-0.3, 0.1))
    assert moved([], NO_EVIDENCE, entropy=0.0, target=9.0)[0] == 0.9  # mu_max
    assert moved([], NO_EVIDENCE, entropy=9.0, target=0.0)[0] == 0.1  # mu_min
    # Evidence: z = -2 moves mu by eta_mu (2 Phi(-2) - 1) = -0.1 * 0.9544997.
    mu, evidence, forces = moved([(-4.0, 2.0)], NO_EVIDENCE)
    assert forces[0] == pytest.approx(-0.09544997)
    assert evidence == pytest.approx((-4.0, 4.0))
    # Then 0.5 * -4 + 2 = 0 with variance 0.25 * 4 + 9: contradicting evidence cancels.
    mu, evidence, forces = moved([(2.0, 3.0)], evidence, mu=mu)
    assert forces[0] == 0
    assert evidence == pytest.approx((0.0, 10.0))
    # No group with signal: nothing is known, nothing moves.
    assert moved([(0.0, 0.0)], NO_EVIDENCE)[0] == 0.5
    # Two new estimates enter side by side, the sum 3 - 4, variances 1 + 4; old evidence fades once.
    both = moved([(3.0, 1.0), (-4.0, 2.0)], (2.0, 8.0))[1]
    assert both == pytest.approx((0.0, 7.0))
    one = moved([(3.0, 1.0), (0.0, 0.0)], (2.0, 8.0))[1]
    assert one == pytest.approx((4.0, 3.0))


def test_evidence_does_not_depend_on_the_scale_of_the_meta_gradient_and_is_calibrated_without_signal():
    """A meta-gradient of 1e-9 moves mu as one of 1 does; without a signal mu goes nowhere."""
    noise = np.random.default_rng(SEED).normal(size=4000)
    moves = []
    for scale in (1.0, 1e-9):
        evidence, forces = NO_EVIDENCE, []
        for x in noise * scale:
            _, evidence, (force, _) = moved([(x, scale)], evidence, eta_mu=1.0)
            forces.append(force)
        moves.append(np.array(forces))
    np.testing.assert_allclose(moves[0], moves[1], rtol=1e-6)
    # Under no signal 2 Phi(z) - 1 is uniform on (-1, 1).
    assert abs(moves[0].mean()) < 0.07
    assert moves[0].std() == pytest.approx(1 / math.sqrt(3), rel=0.07)


# --- the policy: encoding and log-probabilities ---------------------------------------------------


def test_log_probabilities_of_large_logits():
    """log(softmax) would underflow to -inf."""
    logits = torch.tensor([
        [0.0, 300.0, -300.0],
        [1e4, 0.0, 1e4]])
    logps = amft.token_logps(logits, torch.tensor([2, 1]))
    torch.testing.assert_close(logps, torch.tensor([-600.0, -1e4 - math.log(2)]))
    logits = 3 * torch.randn(2, 3, V, dtype=torch.float64)
    ids = torch.randint(V, (2, 3))
    logps = amft.token_logps(logits, ids)
    for b, t in np.ndindex(2, 3):
        exps = [math.exp(x) for x in logits[b, t]]
        expected = exps[ids[b, t]] / sum(exps)
        assert logps[b, t].exp().item() == pytest.approx(expected, rel=1e-9)


def test_the_temperature_of_log_probabilities():
    """A temperature that is left out, or multiplies."""
    model, batch = toy_model(), sequences(PROMPTS[2])
    for temperature in (1.0, 0.5, 2.0):
        expected = exact_logps(model, PROMPTS[2], temperature).detach()
        actual = amft.logps_of(model, batch, temperature).sum(1).detach()
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


def left_padded(batch, columns):
    """The batch with more columns of padding on the left."""
    pad = torch.zeros(len(batch.input_ids), columns, dtype=torch.long)
    return batch._replace(
        input_ids=torch.cat([pad, batch.input_ids], 1),
        attention_mask=torch.cat([pad, batch.attention_mask], 1))


def test_log_probabilities_do_not_depend_on_the_company(base, tokenizer):
    """Padding that is read, a column too far, or an end without loss."""
    # Alone and unpadded, by a plain forward pass, against a left- and right-padded batch.
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    splits = ("train", "heldout", "ood_rule", "ood_small")
    episodes = [task.sample(split, rng) for split in splits]
    batch = amft.encode_demos(model, tokenizer, episodes)
    for padded in (batch, left_padded(batch, 2)):
        with torch.no_grad():
            logps = amft.logps_of(model, padded)
        for episode, row, mask in zip(episodes, logps, padded.response_mask):
            prompt = tokenizer(episode.prompt)["input_ids"]
            response = tokenizer(episode.expert)["input_ids"] + [tokenizer.eos_token_id]
            assert mask.sum() == len(response)
            ids = torch.tensor([prompt + response])
            with torch.no_grad():
                plain = model(ids).logits[0].log_softmax(-1)
            expected = plain[len(prompt) - 1:-1][range(len(response)), response]
            np.testing.assert_allclose(row[:len(response)], expected, atol=2e-4)


def test_left_padding_keeps_absolute_positions():
    """GPT-2 learns a vector for each position: a prompt shifted by its padding would show."""
    model, batch = toy_model(), sequences(PROMPTS[1])
    actual = amft.logps_of(model, left_padded(batch, 2)).sum(1).detach()
    np.testing.assert_allclose(actual, exact_logps(model, PROMPTS[1]).detach(), rtol=1e-4)


def test_padding_of_what_is_shown_is_not_read(base, tokenizer):
    """An observation's padding that is attended to; where nothing is shown there is one end."""
    model = base[0]
    texts = ["Cards: 3, 4", "", "Cards: 10, J, Q, K. Make 24. Again:"]
    episodes = [tasks.GeneralPoints().sample("train", random.Random(SEED))] * 3
    ids, attention_mask, images = amft.encode_observations(model, tokenizer, episodes, texts)
    assert images == [[], [], []]
    for row, text in enumerate(texts):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = expected or [tokenizer.eos_token_id]
        padding = ids.shape[1] - len(expected)
        assert attention_mask[row].tolist() == [0] * padding + [1] * len(expected)
        assert ids[row, padding:].tolist() == expected


# --- the policy: sampling -------------------------------------------------------------------------


def generated(model, input_ids, attention_mask, max_new_tokens, temperature):
    """transformers' own response to each row (B, <= n), which amft.py does not call."""
    sampling = dict(do_sample=False)
    if temperature:
        sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    ids = model.generate(
        input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, **sampling)
    return ids[:, input_ids.shape[1]:]


def length_of(said, end):
    """How many ids a response has, its end included."""
    return said.index(end) + 1 if end in said else len(said)


def a_reply(model, input_ids, attention_mask, max_new_tokens, temperature, done=None):
    """A Reply to whole conversations, which are read first."""
    cache = amft.prefill(model, input_ids, attention_mask, [])
    if done is None:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
    return amft.generate_reply(
        model, input_ids, attention_mask, cache, done, max_new_tokens, temperature)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["<pad>", "<eos>"])
@pytest.mark.parametrize("temperature", [0, 0.6, 1.0, 1.5])
def test_replies_are_those_of_generate(temperature, padding, base, tokenizer):
    """Other ids than transformers' own loop says, greedy or at the same seed, with its padding."""
    # Prompts of different length.
    model, rng = copy.deepcopy(base[0]), random.Random(SEED)
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(padding)
    episodes = []
    for task in (tasks.GeneralPoints(), tasks.Mathematics(), tasks.VIRL()):
        episodes += [task.sample("train", rng), task.sample("train", rng)]
    prompts = [episode.prompt for episode in episodes]
    ids, attention_mask, _ = amft.encode_observations(model, tokenizer, episodes, prompts, True)
    assert len(set(attention_mask.sum(1).tolist())) >= 3
    for max_new_tokens in (100, 12):
        torch.manual_seed(SEED)
        expected = generated(model, ids, attention_mask, max_new_tokens, temperature)
        torch.manual_seed(SEED)
        reply = a_reply(model, ids, attention_mask, max_new_tokens, temperature)
        assert reply.ids.tolist() == expected.tolist()
        lengths = [length_of(said, tokenizer.eos_token_id) for said in expected.tolist()]
        assert torch.equal(reply.mask, mask_of(lengths, expected.shape[1]))
        ended = (expected == tokenizer.eos_token_id).any(1)
        assert torch.equal(reply.truncated, ~ended)


@torch.no_grad()
def test_every_turn_is_that_of_generate(base, tokenizer):
    """A cache, padding or holes that change what the policy says in a later turn."""
    # Greedy conversations of several turns, side by side: each response is what transformers' own
    # loop says to that conversation so far, alone.
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPointsTurns()
    episodes = [task.sample("ood_rule", rng) for _ in range(6)]
    for i, episode in enumerate(episodes):
        episode.attempts = 1 + i % 3  # so that some are over before others
    rollouts = amft.rollout(model, tokenizer, episodes, 1, 40, temperature=0)
    batch = rollouts.batch
    turns = [len(episode.responses) for episode in rollouts.episodes]
    assert min(turns) == 1
    assert max(turns) > 1
    ended = 0
    for row, played in enumerate(rollouts.episodes):
        shown = tokenizer(played.prompt)["input_ids"]
        for outcome, response in zip(played.history, played.responses):
            ids = torch.tensor([shown])
            said = generated(model, ids, torch.ones_like(ids), 40, 0)[0].tolist()
            ended += said[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(said).removesuffix("<eos>") == response
            shown = shown + said
            if response is not played.responses[-1]:
                _, wrong = played.outcomes[outcome]
                feedback = tasks.FEEDBACK.format(wrong) + "\n"
                shown = shown + tokenizer(feedback)["input_ids"]
        real = batch.attention_mask[row].bool()
        conversation = batch.input_ids[row][real].tolist()
        assert conversation[:len(shown)] == shown
        # What was over long before the others were is shown ends that nobody reads.
        assert set(conversation[len(shown):]) <= {tokenizer.eos_token_id}
    assert rollouts.truncated == pytest.approx(1 - ended / sum(turns))


class Scripted:
    """A policy that says in row b what script[b] holds, and keeps what it is asked."""

    def __init__(self, *script, stop, pad):
        self.generation_config = SimpleNamespace(eos_token_id=stop, pad_token_id=pad)
        self.script = digits(*script)
        self.asked = []

    def __call__(self, **inputs):
        said = self.script[:, len(self.asked)]
        self.asked.append(SimpleNamespace(**copy.deepcopy(inputs)))
        logits = 100.0 * torch.nn.functional.one_hot(said, 10)
        return SimpleNamespace(logits=logits.unsqueeze(1))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_reply_ends_when_all_are_done(temperature):
    """An end that is missed, a pass too many, a conversation that was over and speaks on."""
    # Several ends, one of which is padding too.
    model = Scripted("18222", "92222", "11182", "11111", stop=[8, 9], pad=9)
    ids = digits("777", "777", "777", "777")
    attention_mask = digits("111", "011", "001", "111")
    done = digits("0001")[0].bool()
    reply = amft.generate_reply(model, ids, attention_mask, None, done, 5, temperature)
    assert torch.equal(reply.ids, digits("1899", "9999", "1118", "9999"))
    assert torch.equal(reply.mask, digits("1100", "1000", "1111", "0000").float())
    assert not reply.truncated.any()
    assert len(model.asked) == 4
    ids = torch.cat([ids, reply.ids], 1)
    attention_mask = torch.cat([attention_mask, reply.mask.long()], 1)
    for column, asked in enumerate(model.asked, start=2):
        assert torch.equal(asked.input_ids, ids[:, column:column + 1])
        known = attention_mask[:, :column + 1]
        assert torch.equal(asked.attention_mask, known)
        speaking = known[:, -1].bool()
        position = known.sum(1) - 1
        assert torch.equal(asked.position_ids.squeeze(1)[speaking], position[speaking])


def test_a_reply_without_an_end_is_truncated():
    """Padding that the policy says itself is a token like others; room used up is no end."""
    ids = digits("77", "77", "77")
    nobody = torch.zeros(3, dtype=torch.bool)
    for room, truncated in ((3, "011"), (4, "010")):
        model = Scripted("0081", "1111", "1118", stop=8, pad=0)
        reply = amft.generate_reply(model, ids, torch.ones_like(ids), None, nobody, room, 0)
        assert torch.equal(reply.truncated, digits(truncated)[0].bool())
        expected = digits("1110", "1111", "1111").float()
        assert torch.equal(reply.mask, expected[:, :room])


def test_points_stand_on_a_responses_last_token(base, tokenizer):
    """Points on another token, graded ends, or a conversation that is over asked again."""
    model, end = base[0], tokenizer.eos_token_id

    class Echo(tasks.Episode):
        outcomes = {"correct": (1.0, ""), "short": (2.0, "it was short")}
        attempts = 2

        def grade(self, response):
            return "correct" if response == tokenizer.decode(right) else "short"
    right = tokenizer("Cards: 10")["input_ids"][:2]
    a, b = right
    ids = torch.tensor([
        [a, b, end],
        [a, end, 0],
        [a, b, 0],
        [end, 0, 0],
        [0, 0, 0]])
    mask = mask_of([3, 2, 2, 1, 0], 3)
    done = mask[:, 0] == 0
    played = [Echo() for _ in ids]
    reply = amft.Reply(ids, mask, torch.zeros_like(mask), torch.zeros_like(done))
    observations, points, over = amft.answer_replies(model, tokenizer, played, reply, done)
    assert torch.equal(points, digits("001", "020", "010", "200", "000").float())
    assert over.tolist() == [True, False, True, False, True]
    assert torch.equal(done, mask[:, 0] == 0)
    again = tasks.FEEDBACK.format("it was short") + "\n"
    assert observations == ["", again, "", again, ""]
    assert played[1].responses == (tokenizer.decode([a]),)
    assert played[3].responses == ("",)
    assert played[4].responses == ()


def test_rollout_samples_the_policy(base, tokenizer):
    """Ids, masks, texts and entropy belong together, and greedy is an argmax without any cache."""
    model, rng, task = base[0], random.Random(SEED), tasks.GeneralPoints()
    end = tokenizer.eos_token_id
    episodes = [task.sample("train", rng) for _ in range(3)]
    prompts = [tokenizer(episode.prompt)["input_ids"] for episode in episodes]
    rollouts = amft.rollout(model, tokenizer, episodes, 5, 40, temperature=1.0)
    batch = rollouts.batch
    width = batch.response_mask.shape[1]
    assert len(batch.input_ids) == len(rollouts.episodes) == 15
    assert batch.input_ids.shape == batch.attention_mask.shape
    with torch.no_grad():
        logits = model(batch.input_ids).logits  # the prompts have one length: no left padding
    entropies = []
    for b, (ids, episode) in enumerate(zip(batch.input_ids.tolist(), rollouts.episodes)):
        prompt, response = ids[:-width], ids[-width:]
        assert prompt == prompts[b // 5]
        n = length_of(response, end)
        said = [1.0] * n + [0.0] * (width - n)
        assert batch.response_mask[b].tolist() == said
        assert batch.attention_mask[b].tolist() == [1] * len(prompt) + said
        text = tokenizer.decode(response[:n]).removesuffix("<eos>")
        assert episode.responses == (text,)
        for t in range(n):
            p = logits[b, len(prompt) - 1 + t].softmax(-1)
            logp = p.clamp(min=1e-30).log()
            entropies.append(-(p * logp).sum().item())
    assert rollouts.entropy == pytest.approx(np.mean(entropies), rel=1e-3)
    # From one shared reading of the prompts.
    greedy = amft.rollout(model, tokenizer, episodes, 1, 40, temperature=0).episodes
    for prompt, episode in zip(prompts, greedy):
        said = []
        while len(said) < 40 and end not in said:
            ids = torch.tensor([prompt + said])
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            said.append(logits.argmax().item())
        text = tokenizer.decode(said).removesuffix("<eos>")
        assert episode.responses == (text,)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampling_frequencies_and_truncation(temperature, tiny, tokenizer):
    """Top-k or top-p left on, or another temperature, in first tokens of 4,000 samples."""
    model = LlamaForCausalLM.from_pretrained(tiny).eval()
    episode = tasks.GeneralPoints().sample("train", random.Random(SEED))
    rollouts = amft.rollout(model, tokenizer, [episode], 4000, 1, temperature)
    prompt = torch.tensor([tokenizer(episode.prompt)["input_ids"]])
    with torch.no_grad():
        p = (model(prompt).logits[0, -1] / temperature).softmax(-1).numpy()
    counts = np.bincount(rollouts.batch.input_ids[:, -1], minlength=len(p))
    expected = 4000 * p
    spread = np.sqrt(expected * (1 - p))
    assert (abs(counts - expected) < 5 * spread + 2).all()
    assert (p > 0).all()
    assert (counts > 0).sum() > 55  # more than a top-50 would leave
    assert rollouts.truncated == pytest.approx(1 - counts[tokenizer.eos_token_id] / 4000)


# --- methods, and the loop that asks them ---------------------------------------------------------

METHODS = sorted(amft.METHODS)


def used(method, **flags):
    """As flags, those that the method reads; a flag that it does not is refused."""
    words = []
    for name, value in flags.items():
        if name not in arguments.METHOD_FLAGS[method].unused:
            words += ["--" + name.replace("_", "-"), str(value)]
    return words


def steps_of(rows):
    return [row for row in rows if row["kind"] == "step"]


def load(folder):
    return LlamaForCausalLM.from_pretrained(folder).eval()


def test_mu_follows_the_logged_meta_gradients(tiny, tmp_path, unevaluated, rewarded):
    """A force of other gradients, of another d theta/d mu, or of another policy's samples."""
    # Every force and every mu again from the log, in a slow loop: a step's own gradients move its
    # own mu, along the d theta/d mu that the steps before it left; so do validation prompts.
    methods, updates = watched("amft")
    rows = tiny_run(tiny, tmp_path / "run", "--steps", "12", "--trace", "0.5", "--eta-h", "0.1",
                    methods=methods)
    config = configured(max_new_tokens=34)
    rows = steps_of(rows)[3:]
    updates = updates[3:]
    model = load(tiny)
    # The second mixed step has a step before it.
    assert "meta_own" not in rows[0] and "meta_grad" not in rows[0]
    assert [row["step"] for row in rows if "meta_grad" in row] == [5, 7, 9, 11]
    for last, update, row in zip(updates, updates[1:], rows[1:]):
        d_theta = last.after["sensitivity"][0]
        batch, scale = update.rollouts.batch, update.advantages.scale
        own = amft.own_meta_gradient(update.g_rl, d_theta, batch, scale)
        assert row["meta_own"] == pytest.approx(own[0], rel=1e-6)
        assert (update.val is None) == ("meta_grad" not in row)
        if update.val:
            val = amft.meta_gradient(put(model, update.theta), d_theta, update.val, config)
            assert (row["meta_grad"], row["meta_se"]) == pytest.approx(val, rel=1e-4)
    mu, total, variance = 0.5, 0.0, 0.0
    for row in rows:
        new = []
        if row.get("meta_own"):
            new.append((row["meta_own"], row["meta_own"]))
        if row.get("meta_se"):
            new.append((row["meta_grad"], row["meta_se"]))
        force = 0.0
        if new:  # evidence fades where there is new evidence
            total = 0.98 * total + sum(x for x, _ in new)
            variance = 0.98 ** 2 * variance + sum(error * error for _, error in new)
            force = 0.05 * math.erf(total / math.sqrt(2 * variance))
        assert row["meta_force"] == pytest.approx(force)
        assert row["entropy_force"] == pytest.approx(0.1 * (rows[0]["entropy"] - row["entropy"]))
        mu = min(max(mu + force + row["entropy_force"], 0.05), 0.95)
        assert row["mu"] == pytest.approx(mu)
    assert sum(row["meta_force"] != 0 for row in rows) >= 4


@pytest.mark.parametrize("utility, seen", [("val", {"meta_grad"}), ("train", {"meta_own"})])
def test_utility_says_whose_success_moves_mu(utility, seen, tiny, tmp_path, unevaluated, rewarded):
    """An estimate that is made though it was not asked for."""
    rows = steps_of(tiny_run(tiny, tmp_path / "run", "--utility", utility))
    assert {"meta_grad", "meta_own"} & set().union(*rows) == seen


def test_the_step_and_its_derivative_hang_together_in_training(
        tiny, tmp_path, unevaluated, rewarded):
    """A step, or its derivative, at another learning rate, mu or state than the loop's."""
    # theta is where torch's own optimiser goes on (1 - mu) g_RL + mu g_SFT, at a learning rate that
    # falls linearly to 0; each d theta/d mu is that of this very step, and is handed the one before
    # at the share trace.
    methods, updates = watched("amft")
    flags = ["--lr", "1e-3", "--trace", "0.7"]
    rows = tiny_run(tiny, tmp_path / "run", *flags, methods=methods)
    assert len(updates) == 9
    rates = [1e-3 * (1 - i / 9) for i in range(9)]
    assert [update.lr for update in updates] == pytest.approx(rates)
    assert [update.mu for update in updates] == [row["mu"] for row in steps_of(rows)]
    thetas = [update.theta for update in updates] + [flat_weights(load(tmp_path / "run" / "final"))]
    torch.testing.assert_close(thetas[0], flat_weights(load(tiny)), rtol=0, atol=0)
    theta = torch.nn.Parameter(thetas[0].clone())
    optimizer = torch.optim.AdamW([theta], weight_decay=0.0)
    last = None
    for update, after in zip(updates, thetas[1:], strict=True):
        theta.grad = (1 - update.mu) * update.g_rl + update.mu * update.g_sft
        torch.nn.utils.clip_grad_norm_([theta], 1.0)
        optimizer.param_groups[0]["lr"] = update.lr
        optimizer.step()
        torch.testing.assert_close(after, theta.detach(), rtol=1e-5, atol=1e-6)
        assert update.adam.step == update.t - 1
        if update.rollouts is None:
            assert update.after["sensitivity"] is None
            continue
        expected = amft.step_sensitivity(
            update.theta, update.g_rl, update.g_sft, update.mu, update.adam, last,
            0.7, lr=update.lr)
        for actual, right in zip(update.after["sensitivity"], expected):
            torch.testing.assert_close(actual, right)
        last = expected
    assert len({update.mu for update in updates[3:]}) == 6
    other = tiny_run(tiny, tmp_path / "other", "--lr", "1e-3", "--trace", "0")
    with_trace, without = ([row.get("meta_own") for row in steps_of(x)] for x in (rows, other))
    assert with_trace != without


def test_sensitivity_fades_once_a_step_however_many_updates_it_has(
        tiny, tmp_path, unevaluated, rewarded):
    """A trace that fades at every update, or a ratio to a policy that did not sample."""
    # All updates of a step belong to its one mu: --trace 0 keeps them all, forgets the step before.
    methods, updates = watched("amft")
    flags = ["--ppo-epochs", "3", "--trace", "0", "--lr", "1e-2", "--utility", "train"]
    tiny_run(tiny, tmp_path / "run", *flags, methods=methods)
    updates = updates[3:]  # the warm-up has one a step
    assert [update.t for update in updates] == [t for t in range(4, 10) for _ in range(3)]
    assert [update.first for update in updates] == [True, False, False] * 6
    assert updates[-1].choices == 9  # mu is chosen once a step
    last = None
    for update in updates:
        trace = 0.0 if update.first else 1.0
        expected = amft.step_sensitivity(
            update.theta, update.g_rl, update.g_sft, update.mu, update.adam, last,
            trace, lr=update.lr)
        for actual, right in zip(update.after["sensitivity"], expected):
            torch.testing.assert_close(actual, right)
        last = expected
    model, config = load(tiny), configured()
    stale = 0
    for i in range(0, 18, 3):
        first, second, third = updates[i:i + 3]
        assert first.mu == second.mu == third.mu
        batch = first.rollouts.batch
        with torch.no_grad():
            at_sampling = amft.logps_of(put(model, first.theta), batch)
        for update in (first, second, third):
            put(model, update.theta)
            g_rl, logps, _ = amft.rl_gradient(model, batch, first.advantages, config, at_sampling)
            close(update.g_rl, g_rl, 1e-4)
            now = amft.rl_gradient(model, batch, first.advantages, config)[0]
            stale += (now - g_rl).norm() > 1e-2 * g_rl.norm()
    assert stale > 6  # it does matter


def test_the_target_entropy_is_measured_once_and_the_look_ahead_is_on_validation_prompts(
        tiny, tmp_path, monkeypatch, unevaluated, rewarded):
    """H* of every step anew; a look-ahead on training prompts, or sampled in another way."""
    seen = spied(monkeypatch, "rollout")
    rows = steps_of(tiny_run(tiny, tmp_path / "run", "--temperature", "1.3"))
    mixed = [row for row in rows if "entropy" in row]
    assert [row["step"] for row in mixed] == [4, 5, 6, 7, 8, 9]
    assert {row["target_entropy"] for row in mixed} == {mixed[0]["entropy"]}
    assert len({row["entropy"] for row in mixed}) > 1
    seen = [call for call in seen if call["max_new_tokens"] == 34]  # loading tries a checkpoint out
    order = "train train val train train val train train val".split()
    for call, role in zip(seen, order, strict=True):
        assert {tasks.ROLES[episode.unit] for episode in call["returns"].episodes} == {role}
        assert call["temperature"] == 1.3
        assert call["samples"] == 4


def loss_of_a_step(model, step, mu, imitation, tau):
    """Eq. 3 of a Step's samples and demonstrations, row by row."""
    loss = 0.0
    if step.rollouts:
        success, batch = step.rollouts.success, step.rollouts.batch
        A = success - others_mean(success)
        A = (A / np.std(A.numpy())).reshape(-1)
        for i in range(len(A)):
            logps = slow_logps(model, batch, i, tau)
            loss = loss - (1 - mu) * A[i] * logps.sum() / batch.response_mask.sum()
    if step.demos:
        for i in range(len(step.demos.input_ids)):
            logps = slow_logps(model, step.demos, i)
            p = logps.exp().detach() if imitation == "rectified" else 1.0
            loss = loss - mu * (p * logps).sum() / step.demos.response_mask.sum()
    return loss


@pytest.mark.parametrize("imitation", ["nll", "rectified"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_is_the_gradient_of_its_loss(
        method, imitation, tiny, tmp_path, monkeypatch, unevaluated):
    """Through train(): mu, advantages, temperature, stop-gradient and the normalisation at once."""
    hard, easy = ["correct", *3 * ["no_answer"]], [*3 * ["correct"], "no_answer"]
    outcomes = itertools.cycle(3 * hard + 3 * easy)
    graded(monkeypatch, lambda response: next(outcomes))  # whatever is said
    methods, updates = watched(method)
    settings = dict(imitation=imitation, warmup=0, advantage="group", prompts=6, sft_batch=9)
    rows = tiny_run(
        tiny, tmp_path / "run", "--method", method, "--steps", "3", "--temperature", "0.8",
        *used(method, meta_every=3, **settings), methods=methods)
    step, after = updates[:2]
    mu = {"sft": 1.0, "rl": 0.0, "sft-rl": 1.0}.get(method, 0.5)  # sft-rl: the first third is SFT
    assert steps_of(rows)[0]["mu"] == mu
    assert (step.demos is not None) == (mu > 0)
    assert (step.rollouts is not None) == (mu < 1)
    if step.rollouts:
        assert set(step.rollouts.success.sum(1).tolist()) == {1, 3}
    if step.demos:
        assert len(step.demos.input_ids) == 9
    model = load(tiny)
    grad = flat_grad(loss_of_a_step(model, step, mu, imitation, 0.8), model)
    assert steps_of(rows)[0]["grad_norm"] == pytest.approx(grad.norm().item(), rel=2e-3)
    clipped = grad / max(1.0, grad.norm().item())
    close(after.adam.m, 0.1 * clipped, 2e-3)  # Adam's first moment after one step


@pytest.mark.parametrize("advantage", ["gae", "group"])
@pytest.mark.parametrize("method", METHODS)
def test_the_budget_and_batches_without_signal(
        method, advantage, tiny, tmp_path, monkeypatch, unevaluated):
    """Responses not counted, NaN or a move where no prompt, or every prompt, is solved."""
    warmup = {"sft": 6, "rl": 0}.get(method, 1)
    looks = 2 if method == "amft" else 0  # at steps 3 and 5
    settings = dict(prompts=5, sft_batch=10, advantage=advantage, warmup=1, meta_every=2)
    for outcome in ("correct", "no_answer"):
        graded(monkeypatch, lambda response: outcome)
        rows = tiny_run(tiny, tmp_path / outcome, "--method", method, "--steps", "6",
                        *used(method, **settings))
        steps = steps_of(rows)
        assert len(steps) == 6
        sampled = (6 - warmup + looks) * 5 * 4
        assert rows[-1]["rollouts"] == steps[-1]["rollouts"] == sampled
        numbers = [x for row in steps for x in row.values() if isinstance(x, float)]
        assert np.isfinite(numbers).all()
        assert [row["mu"] for row in steps[:warmup]] == [1.0] * warmup
        for row in steps[warmup:]:
            assert row["zero_adv"] == 1
            assert row["success"] == (outcome == "correct")
            assert ("sft_loss" in row) == (method not in ("rl", "sft-rl"))
            assert row["rl_loss"] == row["grad_norm_rl"] == 0
            assert row.get("meta_force", 0) == 0
            if method in ("rl", "sft-rl"):
                assert row["mu"] == row["grad_norm"] == 0


@slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_the_defaults_that_a_user_types(method, tmp_path):
    """A default that one method cannot do with."""
    out = tmp_path / "run"
    flags = ["--smoke", "--device", "cpu", "--eval-n", "8"]
    amft.main(["--method", method, "--out", str(out), *flags])
    assert read(out)[-1]["kind"] == "final"
