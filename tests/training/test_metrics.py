"""Retrieval metrics against scikit-learn and against plain loops."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score

from admth_runtime.errors import InputError
from admth_runtime.packing import hamming_distance
from admth_training.metrics import TIE_ORDER, evaluate_codes


def eye(*classes, count=4):
    return np.eye(count, dtype=np.uint8)[list(classes)]


def random_problem(rng, queries, database, *, bits=16, classes=5, multi=True):
    codes = [rng.integers(0, 256, (n, bits // 8), dtype=np.uint8) for n in (queries, database)]
    if multi:
        labels = [(rng.random((n, classes)) < 0.3).astype(np.uint8) for n in (queries, database)]
    else:
        labels = [np.eye(classes, dtype=np.uint8)[rng.integers(0, classes, n)] for n in (queries, database)]
    return *codes, *labels


# --- a plain reference ------------------------------------------------------------------------------------------------


def ranking(query_code, database_codes):
    distances = [int(hamming_distance(query_code, code)) for code in database_codes]
    return sorted(range(len(distances)), key=lambda i: (distances[i], i)), distances


def average_precision(relevance, cutoff, denominator, relevant):
    found, total = 0, 0.0
    for rank, hit in enumerate(relevance[:cutoff], start=1):
        if hit:
            found += 1
            total += found / rank
    divisor = found if denominator == "found" else min(relevant, cutoff)
    return total / divisor if divisor else 0.0


def reference(query_codes, database_codes, query_labels, database_labels, cutoffs, precision_at, radius, denominator):
    rows = []
    for code, labels in zip(query_codes, query_labels, strict=True):
        order, distances = ranking(code, database_codes)
        relevant = [bool((labels & database_labels[i]).any()) for i in range(len(order))]
        ranked = [relevant[i] for i in order]
        ball = sum(distance <= radius for distance in distances)
        hits = sum(relevant[i] for i in range(len(order)) if distances[i] <= radius)
        rows.append(
            {
                **{("ap", k): average_precision(ranked, k or len(order), denominator, sum(relevant)) for k in cutoffs},
                **{("p", n): sum(ranked[:n]) / n for n in precision_at},
                "precision": hits / ball if ball else 0.0,
                "recall": hits / sum(relevant) if any(relevant) else 0.0,
                "ball_ap": average_precision(ranked, ball, "found", sum(relevant)),
                "empty": ball == 0,
                "share": sum(relevant) / len(order),
            }
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


@settings(max_examples=80, deadline=None)
@given(data=st.data(), denominator=st.sampled_from(["found", "possible"]), radius=st.integers(0, 8))
def test_small_cases_equal_plain_loops(data, denominator, radius):
    queries, size, classes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    # Few different bytes make many ties.
    code = st.sampled_from([0, 1, 3, 0xF0, 0xFF])
    codes = [data.draw(arrays(np.uint8, (n, 1), elements=code)) for n in (queries, size)]
    labels = [data.draw(arrays(np.uint8, (n, classes), elements=st.integers(0, 1))) for n in (queries, size)]
    cutoffs = (None, *sorted({1, min(3, size), size}))
    at = tuple(sorted({1, size}))
    expected = reference(*codes, *labels, cutoffs, at, radius, denominator)
    result = evaluate_codes(
        *codes, *labels, map_cutoffs=cutoffs, precision_at=at, hamming_radius=radius, ap_definition=denominator
    )
    for k in cutoffs:
        assert result.mean_average_precision[k] == pytest.approx(expected["ap", k], abs=1e-12)
    for n in at:
        assert result.precision_at[n] == pytest.approx(expected["p", n], abs=1e-12)
    assert result.precision_within_radius == pytest.approx(expected["precision"], abs=1e-12)
    assert result.recall_within_radius == pytest.approx(expected["recall"], abs=1e-12)
    assert result.map_within_radius == pytest.approx(expected["ball_ap"], abs=1e-12)
    assert result.empty_balls == pytest.approx(expected["empty"])
    assert result.random_baseline == pytest.approx(expected["share"])


@settings(max_examples=40, deadline=None)
@given(
    codes=arrays(np.uint8, (5, 1), elements=st.sampled_from([0, 1, 3])),
    relevant=arrays(np.uint8, (5, 1), elements=st.integers(0, 1)),
)
def test_tie_aware_map_is_the_mean_over_all_orders(codes, relevant):
    query = np.zeros((1, 1), np.uint8)
    label = np.ones((1, 1), np.uint8)
    orders = [
        evaluate_codes(query, codes[list(order)], label, relevant[list(order)]).mean_average_precision[None]
        for order in itertools.permutations(range(5))
    ]
    result = evaluate_codes(query, codes, label, relevant)
    assert result.tie_aware_map == pytest.approx(np.mean(orders), abs=1e-12)


@pytest.mark.parametrize("multi", [False, True])
def test_map_equals_scikit_learn_without_ties(multi):
    rng = np.random.default_rng(0)
    # Database codes at the distances 0 to 64, one each, so that scores rank without ties.
    bits = np.tril(np.ones((65, 64), np.uint8), -1)
    database = np.packbits(bits, axis=1)[rng.permutation(65)]
    _, _, query_labels, database_labels = random_problem(rng, 20, 65, multi=multi)
    query_labels[:, 0] = 1
    database_labels[0, 0] = 1
    query = np.zeros((20, 8), np.uint8)
    result = evaluate_codes(query, database, query_labels, database_labels)
    scores = -hamming_distance(query[:1], database).astype(float)
    assert len(set(scores)) == 65
    expected = [
        average_precision_score(((labels & database_labels).sum(axis=1) > 0).astype(int), scores)
        for labels in query_labels
    ]
    assert result.mean_average_precision[None] == pytest.approx(np.mean(expected), abs=1e-12)
    assert result.tie_aware_map == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("bits", [8, 16, 48, 64, 256, 512])
@pytest.mark.parametrize("classes", [3, 10, 21, 33, 80, 130])
def test_every_width_of_codes_and_labels(bits, classes):
    rng = np.random.default_rng(bits + classes)
    problem = random_problem(rng, 6, 50, bits=bits, classes=classes)
    expected = reference(*problem, (None, 10), (10,), bits // 2, "found")
    result = evaluate_codes(*problem, map_cutoffs=(None, 10), precision_at=(10,), hamming_radius=bits // 2)
    assert result.mean_average_precision[None] == pytest.approx(expected["ap", None], abs=1e-12)
    assert result.mean_average_precision[10] == pytest.approx(expected["ap", 10], abs=1e-12)
    assert result.precision_within_radius == pytest.approx(expected["precision"], abs=1e-12)


def test_ties_go_to_the_lower_database_index():
    query, database = np.zeros((1, 2), np.uint8), np.zeros((4, 2), np.uint8)
    first = evaluate_codes(query, database, eye(0), eye(0, 1, 1, 1))
    last = evaluate_codes(query, database, eye(0), eye(1, 1, 1, 0))
    assert first.mean_average_precision[None] == 1.0 and last.mean_average_precision[None] == 0.25
    assert first.tie_aware_map == last.tie_aware_map == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert first.tie_order == TIE_ORDER and "ascending database index" in TIE_ORDER


def test_both_denominators_by_hand():
    query, database = np.zeros((1, 1), np.uint8), np.asarray([[0], [1], [3], [7]], np.uint8)
    labels = eye(1, 0, 0, 0)
    found = evaluate_codes(query, database, eye(0), labels, map_cutoffs=(None, 2))
    possible = evaluate_codes(query, database, eye(0), labels, map_cutoffs=(None, 2), ap_definition="possible")
    full = (1 / 2 + 2 / 3 + 3 / 4) / 3
    assert found.mean_average_precision == pytest.approx({None: full, 2: 1 / 2})
    assert possible.mean_average_precision == pytest.approx({None: full, 2: 1 / 4})


def test_queries_without_a_hit_count_zero():
    query, database = np.zeros((2, 1), np.uint8), np.asarray([[0], [0xFF]], np.uint8)
    result = evaluate_codes(query, database, eye(0, 3), eye(0, 1))
    assert result.mean_average_precision[None] == 0.5 and result.queries_without_relevant == 1
    assert result.tie_aware_map == 0.5 and result.recall_within_radius == 0.5


def test_an_empty_ball_counts_zero():
    query, database = np.asarray([[0], [0xFF]], np.uint8), np.zeros((3, 1), np.uint8)
    result = evaluate_codes(query, database, eye(0, 0), eye(0, 0, 0))
    assert (result.precision_within_radius, result.recall_within_radius, result.empty_balls) == (0.5, 0.5, 0.5)
    assert result.map_within_radius == 0.5 and result.mean_average_precision[None] == 1.0


def test_curve_runs_over_every_radius():
    problem = random_problem(np.random.default_rng(3), 7, 90)
    curve = evaluate_codes(*problem).curve
    distances = hamming_distance(problem[0][:, None], problem[1][None])
    relevance = (problem[2].astype(int) @ problem[3].T.astype(int)) > 0
    assert len(curve.precision) == 17 and curve.recall[-1] == 1.0
    for radius in range(17):
        ball = distances <= radius
        hits = (ball & relevance).sum()
        assert curve.recall[radius] == pytest.approx(hits / relevance.sum())
        assert curve.precision[radius] == (pytest.approx(hits / ball.sum()) if ball.any() else None)
        each = [(b & r).sum() / max(b.sum(), 1) for b, r in zip(ball, relevance, strict=True)]
        assert curve.macro_precision[radius] == pytest.approx(np.mean(each))


def test_results_do_not_depend_on_the_blocks(monkeypatch):
    problem = random_problem(np.random.default_rng(4), 30, 100)
    steps = []
    whole = evaluate_codes(*problem, advance=steps.append)
    assert steps == [30]
    monkeypatch.setattr("admth_training.metrics._BLOCK_PAIRS", 700)
    steps.clear()
    assert evaluate_codes(*problem, advance=steps.append) == whole
    assert steps == [7, 7, 7, 7, 2]


def test_default_cutoffs_stop_at_the_database():
    for size, expected in ((50, []), (250, [100, 200]), (1200, list(range(100, 1001, 100)))):
        problem = random_problem(np.random.default_rng(5), 2, size)
        assert list(evaluate_codes(*problem).precision_at) == expected


def test_json_form():
    result = evaluate_codes(*random_problem(np.random.default_rng(6), 3, 120), map_cutoffs=(None, 100))
    fields = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert set(fields["map"]) == {"all", "100"} and fields["precision_at"].keys() == {"100"}
    assert fields["pr_curve"]["radius"] == list(range(17)) and fields["tie_order"] == TIE_ORDER
    assert fields["code_length"] == 16 and fields["ap_definition"] == "found"


CODES, LABELS = np.zeros((4, 2), np.uint8), np.ones((4, 3), np.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"map_cutoffs": (0,)}, "cut-off 0 of mAP@K is not a positive integer"),
        ({"map_cutoffs": (-1,)}, "cut-off -1 of mAP@K"),
        ({"map_cutoffs": (2.5,)}, "cut-off 2.5"),
        ({"map_cutoffs": (5,)}, "cut-off 5 of mAP@K exceeds the 4 database codes"),
        ({"precision_at": (100,)}, "cut-off 100 of P@N exceeds the 4"),
        ({"precision_at": (True,)}, "cut-off True"),
        ({"hamming_radius": 17}, "radius 17 is not from 0 to the code length 16"),
        ({"hamming_radius": -1}, "radius -1"),
        ({"ap_definition": "voc"}, "'voc' is unknown: use one of found, possible"),
        ({"database_codes": CODES[:0], "database_labels": LABELS[:0]}, "there are no database codes"),
        ({"query_codes": CODES[:0], "query_labels": LABELS[:0]}, "there are no query codes"),
        ({"database_labels": LABELS[:3]}, "4 database codes and 3 database labels"),
        ({"database_labels": LABELS[:, :2]}, "query labels of 3 classes and database labels of 2"),
        ({"database_codes": np.zeros((4, 4), np.uint8)}, "16 bits and database codes of 32 bits"),
        ({"query_codes": np.zeros((4, 2), np.float32)}, r"query codes are float32 \[4, 2\], not uint8"),
        ({"query_labels": np.zeros(4, np.uint8)}, r"query labels are uint8 \[4\], not uint8 of two dimensions"),
        ({"query_labels": [[1]]}, "query labels are list"),
    ],
)
def test_bad_arguments_are_one_line(change, message):
    arguments = {"query_codes": CODES, "database_codes": CODES, "query_labels": LABELS, "database_labels": LABELS}
    with pytest.raises(InputError, match=message) as caught:
        evaluate_codes(**{**arguments, **change})
    assert "\n" not in str(caught.value)


# VmHWM and not ru_maxrss, which a child process inherits from a large parent.
MEMORY_SCRIPT = """
import numpy as np
from admth_training.metrics import evaluate_codes

rng = np.random.default_rng(0)
queries, size, classes = 1000, 200_000, 81
arguments = [rng.integers(0, 256, (n, 8), dtype=np.uint8) for n in (queries, size)]
arguments += [rng.integers(0, 2, (n, classes), dtype=np.uint8) for n in (queries, size)]
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
result = evaluate_codes(*arguments, map_cutoffs=(None, 5000))
print(before * 1024, peak() * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded():
    """1,000 x 200,000 distances would take 400 MB; what is kept for a query is 1 KiB, so 5,000 queries add 4 MB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split())
    assert peak < 512 << 20
    assert peak - before < 100 << 20
