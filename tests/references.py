"""Naive float64 derivations of every objective, written from the equations alone: loops, nothing of the package.

They are slow on purpose. Anything that carries a gradient is a float64 torch scalar, so that autograd of the plain
formula is the second derivation of the gradient; everything else is python or numpy.
"""

import itertools
import math

import numpy as np
import torch

FLOOR, CEILING = 1e-7, 1 - 2.0**-23


# ---- forward process ----


def alpha(t: torch.Tensor, schedule: str) -> torch.Tensor:
    """Probability that a position stays clean."""
    return 1 - t if schedule == "linear" else 1 - torch.cos(math.pi * (1 - t) / 2)


def masked_probability(t: float, schedule: str) -> float:
    """1 − α(t)."""
    return 1 - alpha(torch.tensor(t, dtype=torch.float64), schedule).item()


def alpha_derivative(t: float, schedule: str) -> float:
    """α′(t) by autograd."""
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(alpha(time, schedule), time)
    return slope.item()


def loss_weight(t: float, schedule: str) -> float:
    """−α′(t) / (1 − α(t))."""
    return -alpha_derivative(t, schedule) / masked_probability(t, schedule)


def chunk_loss_weight(t: float, num_tokens: int, schedule: str) -> float:
    """−α′(t) / (1 − α(t)^k)."""
    return -alpha_derivative(t, schedule) / (1 - (1 - masked_probability(t, schedule)) ** num_tokens)


def denoising(logits_BLV, input_ids_BL, labels_BL, masked_BL, weights_B, normalization: str) -> torch.Tensor:
    """Σ w(t_b)·(−log p(x0)) over masked positions, divided per batch of tokens, per sequence or per batch."""
    num_rows, length = input_ids_BL.shape
    trained = [sum(int(labels_BL[b, i]) != -100 for i in range(length)) for b in range(num_rows)]
    total = logits_BLV.sum() * 0
    for b in range(num_rows):
        divisor = {
            "token": max(sum(trained), 1),
            "sequence": num_rows * max(trained[b], 1),
            "batch": num_rows,
        }[normalization]
        for i in range(length):
            if masked_BL[b, i]:
                nll = -torch.log(torch.softmax(logits_BLV[b, i], -1)[input_ids_BL[b, i]])
                total = total + weights_B[b] * nll / divisor
    return total


# ---- divergences over tokens ----


def _distribution(logits, temperature, size):
    """softmax of the first `size` logits by exp and sum."""
    scaled = logits[:size] / temperature
    weight = torch.exp(scaled - scaled.max().detach())
    return weight / weight.sum()


def _kl(p, q) -> torch.Tensor:
    """Σ p log(p/q), one summand at a time."""
    total = p.sum() * 0
    for p_v, q_v in zip(p, q, strict=True):
        total = total + p_v * (torch.log(p_v) - torch.log(q_v))
    return total


def token_divergence(
    kind: str, student_NV, teacher_NU, weights_N, num_items, temperature=1.0, size=None, beta=0.5
) -> torch.Tensor:
    """T² Σ w_i D(p_T, p_S) / num_items for forward KL, reverse KL, and JSD(β)."""
    total = student_NV.sum() * 0
    for student, teacher, weight in zip(student_NV, teacher_NU, weights_N, strict=True):
        p_s, p_t = _distribution(student, temperature, size), _distribution(teacher.detach(), temperature, size)
        if kind == "forward_kl":
            value = _kl(p_t, p_s)
        elif kind == "reverse_kl":
            value = _kl(p_s, p_t)
        else:
            mixture = beta * p_t + (1 - beta) * p_s
            value = beta * _kl(p_t, mixture) + (1 - beta) * _kl(p_s, mixture)
        total = total + weight * value
    return temperature**2 * total / num_items


# ---- TIDAL ----


def lambda_progress(global_step, max_steps, lambda_init, lambda_max, growth: str) -> float:
    """λ(s), progress as it is: not clamped."""
    s = global_step / max_steps
    shape = (1 - math.cos(math.pi * s)) / 2 if growth == "cosine" else s
    return lambda_init + (lambda_max - lambda_init) * shape


def tidal_lambda(progress: float, lambda_max: float, t: float, axes: str) -> float:
    """λ(s, t) on both axes, or on one."""
    return {"both": progress * (1 - t), "progress": progress, "time": lambda_max * (1 - t)}[axes]


def timestep_weight(t: float, kind: str) -> float:
    """ω(t)."""
    return 1.0 if kind == "uniform" else math.exp(-((t - 0.5) ** 2) / (2 * 0.15**2))


def tidal_logit(student_NV, teacher_NU, lambda_N, weights_N, num_items, temperature=1.0, size=None) -> torch.Tensor:
    """T² Σ ω KL(r ‖ p_S) / num_items with r = sg softmax(((1−λ) z_S + λ z_T) / T)."""
    total = student_NV.sum() * 0
    for student, teacher, strength, weight in zip(student_NV, teacher_NU, lambda_N, weights_N, strict=True):
        mixed = (1 - strength) * student[:size].detach() + strength * teacher[:size].detach()
        target = _distribution(mixed, temperature, None)
        total = total + weight * _kl(target, _distribution(student, temperature, size))
    return temperature**2 * total / num_items


def expected_strength(schedule, lambda_init, lambda_max, growth, axes, weight, epsilon, num_points=400) -> float:
    """∫∫ λ(s,t) ω(t) (1−α(t)) ds dt / ∫ (1−α(t)) dt by the midpoint rule on a grid."""
    progress = [(i + 0.5) / num_points for i in range(num_points)]
    times = [epsilon + (1 - epsilon) * (i + 0.5) / num_points for i in range(num_points)]
    top = bottom = 0.0
    for t in times:
        masked = masked_probability(t, schedule)
        bottom += masked
        for s in progress:
            at_s = lambda_progress(s, 1.0, lambda_init, lambda_max, growth)
            top += tidal_lambda(at_s, lambda_max, t, axes) * timestep_weight(t, weight) * masked / num_points
    return top / bottom


# ---- chunks ----


def chunk_log_likelihoods(logits_NV, targets_N, chunk_ids_N, num_chunks: int) -> list[torch.Tensor]:
    """ℓ of each chunk: Σ log p(true token) over its tokens, 0 for a chunk without tokens."""
    totals = [logits_NV.new_zeros(()) for _ in range(num_chunks)]
    for logits, target, chunk in zip(logits_NV, targets_N.tolist(), chunk_ids_N.tolist(), strict=True):
        if chunk >= 0:
            totals[chunk] = totals[chunk] + torch.log(_distribution(logits, 1.0, None)[target])
    return totals


def chunk_objective(
    kind: str, student_C, teacher_C, weights_C, num_items, temperature=1.0, lambda_C=None
) -> torch.Tensor:
    """Σ w_c e(c) / num_items for CALM, reverse CALM, Bernoulli reverse KL, chunk TIDAL and its reverse."""
    total = sum(student_C) * 0
    for c, (student, teacher) in enumerate(zip(student_C, teacher_C, strict=True)):
        p_s = torch.exp(student / temperature).clamp(FLOOR, CEILING)
        p_t = torch.exp(teacher / temperature).clamp(FLOOR, CEILING).detach()
        if kind.startswith("tidal"):
            p_t = ((1 - lambda_C[c]) * p_s.detach() + lambda_C[c] * p_t).clamp(FLOOR, CEILING)
        if kind in ("calm", "tidal"):
            value = -(p_t * torch.log(p_s) + (1 - p_t) * torch.log(1 - p_s))
        else:
            value = -(p_s * torch.log(p_t) + (1 - p_s) * torch.log(1 - p_t))
        if kind == "bernoulli_reverse_kl":
            value = value + p_s * torch.log(p_s) + (1 - p_s) * torch.log(1 - p_s)
        total = total + weights_C[c] * value
    return total / num_items


def complete_chunks(masked_BL, chunk_ids_BL, labels_BL, num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Completed mask and hit chunks, by searching each chunk's members."""
    masked, chunk_ids, labels = (np.asarray(array) for array in (masked_BL, chunk_ids_BL, labels_BL))
    completed, hit = masked.copy(), np.zeros((len(masked), num_chunks), dtype=bool)
    for b in range(len(masked)):
        for c in range(num_chunks):
            members = [i for i in range(masked.shape[1]) if chunk_ids[b, i] == c]
            hit[b, c] = any(masked[b, i] for i in members)
            for i in members:
                if hit[b, c] and labels[b, i] != -100:
                    completed[b, i] = True
    return completed, hit


def complementary_split(masked, uniform, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Parts A and B, element by element."""
    masked, uniform = np.asarray(masked), np.asarray(uniform)
    part_a, part_b = np.zeros_like(masked), np.zeros_like(masked)
    for index in np.ndindex(masked.shape):
        if masked[index]:
            (part_a if uniform[index] < ratio else part_b)[index] = True
    return part_a, part_b


# ---- inverse distillation ----


def keyed_uniforms(seed: int, epoch: int, row_key: int, count: int, stream: int) -> np.ndarray:
    """The first draws of a row's numbered stream."""
    low, high = row_key % 2**32, row_key // 2**32 % 2**32
    return np.random.default_rng([seed, low, high, epoch + 1, stream + 1]).random(count, dtype=np.float32)


def clean_distribution(logits, mask) -> torch.Tensor:
    """softmax over the tokens that are not [MASK], one at a time; 0 at [MASK]."""
    weights = [torch.exp(z) * (0.0 if v == mask else 1.0) for v, z in enumerate(logits)]
    return torch.stack([weight / sum(weights) for weight in weights])


def soft_denoising(logits_NV, q_NV, weights_N, num_items, mask=None) -> torch.Tensor:
    """L(f, q) = Σ_i w_i Σ_v −q_iv log f_iv / num_items over v ≠ [MASK]."""
    total = logits_NV.sum() * 0
    for logits, q, weight in zip(logits_NV, q_NV, weights_N, strict=True):
        f = clean_distribution(logits, mask)
        for v in range(len(f)):
            if v != mask:
                total = total - weight * q[v] * torch.log(f[v])
    return total / num_items


def inverse_student(student_NV, teacher_NV, fake_NV, weights_N, num_items, mask=None) -> torch.Tensor:
    """L(f*, q) − L(f, q), q = softmax of the student's logits without [MASK]."""
    q_NV = [clean_distribution(logits, mask) for logits in student_NV]
    real = soft_denoising(teacher_NV.detach(), q_NV, weights_N, num_items, mask)
    return real - soft_denoising(fake_NV.detach(), q_NV, weights_N, num_items, mask) + student_NV.sum() * 0


# ---- block visibility ----


def block_visibility_mask(length: int, block_size: int, order: str = "xt_x0") -> np.ndarray:
    """bool (2L, 2L), row = query: the three cases of the rule, pair by pair."""
    noised_half = 0 if order == "xt_x0" else 1
    mask = np.zeros((2 * length, 2 * length), dtype=bool)
    for q in range(2 * length):
        for k in range(2 * length):
            q_noised, k_noised = q // length == noised_half, k // length == noised_half
            q_block, k_block = q % length // block_size, k % length // block_size
            for case in (
                q_noised == k_noised and q_block == k_block,
                q_noised and not k_noised and q_block > k_block,
                not q_noised and not k_noised and q_block >= k_block,
            ):
                mask[q, k] |= case
    return mask


# ---- samples ----


def corpus_perplexity(next_token_log_probs, rows, starts) -> float:
    """exp of the mean of −log p(token | everything before it) over all tokens from each row's start on.

    `next_token_log_probs(prefix)` is the scorer run on one unpadded prefix, once per token.
    """
    total, count = 0.0, 0
    for row, start in zip(rows, starts, strict=True):
        for i in range(max(start, 1), len(row)):
            total -= float(next_token_log_probs(row[:i])[row[i]])
            count += 1
    return math.exp(total / count)


def histogram_entropy(sequence, vocab_size: int) -> float:
    """−Σ_v f_v log f_v of one sequence's token frequencies, every token of the vocabulary looked for."""
    total = 0.0
    for token in range(vocab_size):
        frequency = sum(1 for other in sequence if other == token) / len(sequence)
        total -= frequency * math.log(frequency) if frequency else 0.0
    return total


# ---- inverse distillation of two modes, AAA and BBB, by loops over strings ----

WORDS = ["".join(letters) for letters in itertools.product("AB", repeat=3)]
SUBSETS = [set(subset) for size in range(4) for subset in itertools.combinations(range(3), size)]


def hide(word: str, hidden: set[int]) -> str:
    """The word with `_` at the hidden positions."""
    return "".join("_" if i in hidden else letter for i, letter in enumerate(word))


def word_posterior(words: dict, state: str, position: int) -> list:
    """P(A), P(B) at a position among the words that agree with what the state shows; None, None if none does."""
    agreeing = {word: p for word, p in words.items() if all(s in ("_", w) for s, w in zip(state, word, strict=True))}
    total = sum(agreeing.values())
    if total == 0:
        return [None, None]
    return [sum(p for word, p in agreeing.items() if word[position] == letter) / total for letter in "AB"]


def word_sampler(predict, num_steps: int) -> dict[str, float]:
    """Words by ancestral sampling, state by state; `predict(step, state, position) -> [P(A), P(B)]`."""
    law = {"___": 1.0}
    for step in range(num_steps):
        after = {}
        reveal = 1 / (num_steps - step)
        for state, mass in law.items():
            masked = [i for i in range(3) if state[i] == "_"]
            for letters in itertools.product("_AB", repeat=len(masked)):
                p, new = mass, list(state)
                for i, letter in zip(masked, letters, strict=True):
                    p *= 1 - reveal if letter == "_" else reveal * predict(step, state, i)["AB".index(letter)]
                    new[i] = letter
                if p:
                    after["".join(new)] = after.get("".join(new), 0.0) + p
        law = after
    return law


def two_mode_students(q, times) -> list[tuple]:
    """(probability of (t′, x_t′), step, x_t′, {word: P(word | x_t′)}) with the graph of `q(step, state, position)`."""
    found = []
    for step, t in enumerate(times):
        for data in ("AAA", "BBB"):
            for hidden in SUBSETS:
                weight = 0.5 * t ** len(hidden) * (1 - t) ** (3 - len(hidden)) / len(times)
                state, words = hide(data, hidden), {}
                for word in WORDS:
                    p = torch.ones((), dtype=torch.float64)
                    for i in range(3):
                        p = p * (q(step, state, i)["AB".index(word[i])] if i in hidden else float(word[i] == data[i]))
                    words[word] = p
                found.append((weight, step, state, words))
    return found


def two_mode_inverse_loss(q, times, teacher_words, epsilon, through_sample=False):
    """Σ over t′, x_t′, x̂0, what is masked of it, and t, of w(t)·Σ_i ⟨q_i, log f_i − log f*_i⟩, f optimal.

    The integral over t ∈ [ε, 1] of t^(m−1) (1−t)^(3−m) is that of the expanded polynomial. With `through_sample` the
    probability of x_t keeps its graph, which the method leaves out. Returns the loss and the student's words.
    """
    students = two_mode_students(q, times)
    generated = {word: sum(weight * words[word] for weight, _, _, words in students) for word in WORDS}
    fixed = {word: p.item() for word, p in generated.items()}
    total = torch.zeros((), dtype=torch.float64)
    for hidden in SUBSETS[1:]:
        m = len(hidden)
        polynomial = np.polynomial.Polynomial([0] * (m - 1) + [1]) * np.polynomial.Polynomial([1, -1]) ** (3 - m)
        integral = polynomial.integ()
        time_weight = (integral(1) - integral(epsilon)) / (1 - epsilon)
        for weight, step, before, words in students:
            for word, p in words.items():
                after = hide(word, hidden)
                value = 0.0
                for i in hidden:
                    fake, real = word_posterior(fixed, after, i), word_posterior(teacher_words, after, i)
                    shown = before[i]
                    for v, letter in enumerate("AB"):
                        q_v = q(step, before, i)[v] if shown == "_" else float(shown == letter)
                        if fake[v]:
                            value = value + q_v * (math.log(fake[v]) - math.log(real[v]))
                total = total + weight * time_weight * (p if through_sample else p.item()) * value
    return total, generated


# ---- uniform-state diffusion ----


def gaussian_alpha(gamma: float, num_tokens: int, num_points: int = 20_000) -> float:
    """α of Gaussian noise on a one-hot: the midpoint rule, Φ by erf, on entries themselves rather than deviations."""
    signal, noise = math.sqrt(1 / (1 + math.exp(gamma))), math.sqrt(1 / (1 + math.exp(-gamma)))
    low, high = -12 * noise, signal + 12 * noise
    width, largest = (high - low) / num_points, 0.0
    for i in range(num_points):
        x = low + (i + 0.5) * width
        density = math.exp(-(((x - signal) / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi))
        below = (1 + math.erf(x / noise / math.sqrt(2))) / 2
        largest += width * density * below ** (num_tokens - 1)
    return (largest - 1 / num_tokens) / (1 - 1 / num_tokens)


def uniform_divergence(q, f, z: int, alpha, rate) -> torch.Tensor:
    """(α′/(Vα)) [V/x̄_z − V/x̄^f_z − Σ_v (x̄_v/x̄_z)(log x̄^f_z − log x̄^f_v + log x̄_v − log x̄_z)], α′ = −rate."""
    size = len(q)
    bar = [size * alpha * p + 1 - alpha for p in q]
    bar_f = [size * alpha * p + 1 - alpha for p in f]
    total = size / bar[z] - size / bar_f[z]
    for v in range(size):
        logs = torch.log(bar_f[z]) - torch.log(bar_f[v]) + torch.log(bar[v]) - torch.log(bar[z])
        total = total - bar[v] / bar[z] * logs
    return -rate / (size * alpha) * total


def uniform_step(f, z: int, alpha: float, next_alpha: float) -> list[float]:
    """P(v at the next time | z now), by Bayes over every clean token and every v."""
    size = len(f)

    def kept(target, source, share):
        return share * (target == source) + (1 - share) / size

    joint = [
        sum(f[x] * kept(v, x, next_alpha) * kept(z, v, alpha / next_alpha) for x in range(size)) for v in range(size)
    ]
    return [value / sum(joint) for value in joint]


def uniform_inverse_losses(networks, tokens, trained, alphas, gammas, noises, temperature):
    """L(f, q) with q and x_t fixed, and L(f*, q) − L(f, q) with their graph, of one row, position by position.

    `networks` are student, teacher and fake: `network(probabilities (L, V), noise levels (L,)) -> logits (L, V)`.
    """
    student, teacher, fake = networks
    length, size = noises[0].shape

    def noised(clean, which):
        signal = math.sqrt(1 / (1 + math.exp(gammas[which])))
        noise = math.sqrt(1 / (1 + math.exp(-gammas[which])))
        soft, hard = [], []
        for i in range(length):
            latent = signal * clean[i] + noise * noises[which][i]
            soft.append(torch.softmax(latent / temperature, 0) if trained[i] else clean[i])
            hard.append(int(latent.argmax()) if trained[i] else tokens[i])
        levels = torch.tensor([(1 - alphas[which]) * float(flag) for flag in trained], dtype=torch.float64)
        return torch.stack(soft), hard, levels

    real = torch.eye(size, dtype=torch.float64)[torch.tensor(tokens)]
    soft, _, levels = noised(real, 0)
    q = torch.softmax(student(soft, levels), -1)
    clean = torch.stack([q[i] if trained[i] else real[i] for i in range(length)])

    def loss(network, clean):
        soft, hard, levels = noised(clean, 1)
        f = torch.softmax(network(soft, levels), -1)
        return sum(uniform_divergence(clean[i], f[i], hard[i], alphas[1], 1.0) for i in range(length) if trained[i])

    return loss(fake, clean.detach()), loss(teacher, clean) - loss(fake, clean)
