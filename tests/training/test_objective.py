"""Both terms of the objective: values and gradients against plain loops, stability, and the readings of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from admth_training.config import ObjectiveConfig
from admth_training.objective import admth_loss, consistency_loss, pairwise_likelihood_loss, similarity


def plain_likelihood(codes, labels, scale):
    """Eq. 5-7 as they are printed, pair by pair, in double precision."""
    total, pairs = 0.0, 0
    for i in range(len(codes)):
        for j in range(len(codes)):
            if i == j:
                continue
            theta = scale * float(np.dot(codes[i], codes[j]))
            similar = bool((labels[i] & labels[j]).any())
            probability = 1 / (1 + math.exp(-theta))
            total -= math.log(probability if similar else 1 - probability)
            pairs += 1
    return total / pairs


def plain_consistency(codes, maps, short_to_long):
    """Eq. 8 entry by entry, in double precision."""
    values = []
    for k, matrix in enumerate(maps):
        source, target = (codes[k], codes[k + 1]) if short_to_long else (codes[k + 1], codes[k])
        squares = [
            (target[i][b] - sum(matrix[a][b] * source[i][a] for a in range(len(source[i])))) ** 2
            for i in range(len(source))
            for b in range(len(target[i]))
        ]
        values.append(sum(squares) / len(squares))
    return sum(values) / len(values)


def some_labels(rng, n, classes=4):
    labels = (rng.random((n, classes)) < 0.4).astype(np.uint8)
    labels[np.arange(n), rng.integers(0, classes, n)] = 1
    return labels


def test_similarity_is_sharing_a_label():
    labels = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 0, 1]], dtype=torch.uint8)
    assert similarity(labels).tolist() == [[1, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert similarity(labels.bool(), labels[:1]).tolist() == [[1], [0], [1]]


def test_similarity_counts_many_shared_labels_once():
    # 300 shared labels overflow a uint8 product; the answer is still one.
    assert similarity(torch.ones(2, 300, dtype=torch.uint8)).tolist() == [[1, 1], [1, 1]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.sampled_from([8, 16]), st.sampled_from([0.5, 1.0, 0.1]))
def test_likelihood_equals_the_plain_loop(seed, n, length, scale):
    rng = np.random.default_rng(seed)
    codes, labels = np.tanh(rng.normal(size=(n, length)) * 2), some_labels(rng, n)
    loss = pairwise_likelihood_loss(torch.from_numpy(codes), similarity(torch.from_numpy(labels)), scale=scale)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(plain_likelihood(codes, labels, scale), rel=1e-5)


@pytest.mark.parametrize("short_to_long", [True, False])
def test_consistency_equals_the_plain_loop(short_to_long):
    rng = np.random.default_rng(3)
    codes = [np.tanh(rng.normal(size=(5, length))) for length in (8, 16, 24)]
    shapes = [(8, 16), (16, 24)] if short_to_long else [(16, 8), (24, 16)]
    maps = [rng.normal(size=shape) for shape in shapes]
    loss = consistency_loss(
        [torch.from_numpy(h) for h in codes], [torch.from_numpy(q) for q in maps], short_to_long=short_to_long
    )
    assert float(loss) == pytest.approx(plain_consistency(codes, maps, short_to_long), rel=1e-5)


def test_consistency_is_zero_where_the_map_is_exact():
    rng = np.random.default_rng(0)
    short, matrix = (
        torch.from_numpy(rng.normal(size=(6, 8))).float(),
        torch.from_numpy(rng.normal(size=(8, 16))).float(),
    )
    assert float(consistency_loss([short, short @ matrix], [matrix])) == pytest.approx(0.0, abs=1e-10)


def numeric_gradient(function, array, step=1e-6):
    gradient = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        upper, lower = array.copy(), array.copy()
        upper[index] += step
        lower[index] -= step
        gradient[index] = (function(upper) - function(lower)) / (2 * step)
    return gradient


def test_gradients_equal_differences_of_the_plain_loops():
    rng = np.random.default_rng(5)
    logits = [rng.normal(size=(4, 8)), rng.normal(size=(4, 16))]
    labels = some_labels(rng, 4)
    matrix = rng.normal(size=(8, 16)) * 0.3
    config = ObjectiveConfig(alpha=3.0, beta=2.0)

    def plain(short, long, q):
        codes = [np.tanh(short), np.tanh(long)]
        likelihood = sum(plain_likelihood(h, labels, 0.5) for h in codes) / 2
        return 3.0 * likelihood + 2.0 * plain_consistency(codes, [q], True)

    tensors = [torch.tensor(array, requires_grad=True) for array in (*logits, matrix)]
    terms = admth_loss(tensors[:2], torch.from_numpy(labels), tensors[2:], config)
    assert float(terms.total.detach()) == pytest.approx(plain(*logits, matrix), rel=1e-5)
    terms.total.backward()
    expected = [
        numeric_gradient(lambda x: plain(x, logits[1], matrix), logits[0]),
        numeric_gradient(lambda x: plain(logits[0], x, matrix), logits[1]),
        numeric_gradient(lambda x: plain(logits[0], logits[1], x), matrix),
    ]
    for tensor, gradient in zip(tensors, expected, strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), gradient, atol=2e-6)


def test_analytic_gradient_of_the_likelihood():
    """The gradient at h_i is the sum over pairs of 2 scale (sigmoid(theta) - s) h_j, over n (n - 1)."""
    rng = np.random.default_rng(8)
    codes = torch.tensor(np.tanh(rng.normal(size=(6, 16))), dtype=torch.float64, requires_grad=True)
    similar = similarity(torch.from_numpy(some_labels(rng, 6)))
    pairwise_likelihood_loss(codes, similar).backward()
    h = codes.detach()
    weights = torch.sigmoid(0.5 * h @ h.T) - similar
    weights.fill_diagonal_(0)
    torch.testing.assert_close(codes.grad, (weights @ h / 30).to(codes.dtype), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_extreme_logits_stay_finite(dtype, size):
    rng = np.random.default_rng(1)
    signs = [np.sign(rng.normal(size=(8, length))) * size for length in (16, 64)]
    logits = [torch.tensor(array, dtype=dtype, requires_grad=True) for array in signs]
    q = torch.eye(16, 64, requires_grad=True)
    labels = torch.from_numpy(some_labels(rng, 8))
    terms = admth_loss(logits, labels, [q], ObjectiveConfig())
    terms.total.backward()
    for value in (terms.total, terms.likelihood, terms.consistency):
        assert value.dtype == torch.float32
        assert math.isfinite(value.item())
    assert all(bool(torch.isfinite(tensor.grad).all()) for tensor in (*logits, q))


def test_the_losses_stay_in_fp32_under_autocast():
    logits = [torch.full((4, 16), 0.1, requires_grad=True)]
    labels = torch.eye(4, dtype=torch.uint8)
    plain = admth_loss(logits, labels, [], ObjectiveConfig()).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = admth_loss(logits, labels, [], ObjectiveConfig()).total
    assert inside.dtype == torch.float32
    assert inside.item() == plain.item()


@pytest.mark.parametrize("labels", [torch.ones(6, 1), torch.eye(6)], ids=["all similar", "all dissimilar"])
def test_batches_of_one_kind_of_pair(labels):
    logits = [torch.randn(6, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)]
    terms = admth_loss(logits, labels, [], ObjectiveConfig())
    terms.total.backward()
    assert math.isfinite(terms.total.item())
    assert bool(torch.isfinite(logits[0].grad).all())


def test_a_single_length_has_no_consistency():
    terms = admth_loss([torch.randn(4, 64)], torch.eye(4), [], ObjectiveConfig(alpha=2.0))
    assert float(terms.consistency) == 0.0
    assert float(terms.total) == pytest.approx(2 * float(terms.likelihood))


def test_the_size_of_the_loss_does_not_depend_on_the_batch():
    """Doubling a batch by repeating it changes the mean only by the pairs of an image with its own copy."""
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(size=(40, 16))).float()
    labels = torch.from_numpy(some_labels(rng, 40))
    once = admth_loss([logits], labels, [], ObjectiveConfig(alpha=1.0)).total
    twice = admth_loss([logits.repeat(2, 1)], labels.repeat(2, 1), [], ObjectiveConfig(alpha=1.0)).total
    assert float(twice) == pytest.approx(float(once), rel=0.05)


def test_gradient_descent_separates_classes():
    """From small random logits, the objective alone gives equal codes within a class and other ones outside."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.eye(4).repeat_interleave(5, dim=0)
    logits = [(0.1 * torch.randn(20, length, generator=generator)).requires_grad_() for length in (16, 32)]
    q = torch.eye(16, 32).requires_grad_()
    optimizer = torch.optim.Adam([*logits, q], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        admth_loss(logits, labels, [q], ObjectiveConfig()).total.backward()
        optimizer.step()
    for values in logits:
        bits = (values.detach() > 0).float()
        distances = torch.cdist(bits, bits, p=0)
        similar = similarity(labels).bool()
        assert float(distances[similar].max()) < float(distances[~similar].min())
