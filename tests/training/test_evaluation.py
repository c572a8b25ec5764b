"""The evaluation of all code lengths: protocol, JSON, table."""

from __future__ import annotations

import json

import numpy as np
import pytest

from admth_runtime.errors import InputError
from admth_training.data import ArraySource, ImageDataset
from admth_training.data.dataset import one_hot
from admth_training.evaluation import Evaluation, evaluate_lengths
from admth_training.leakage import check_leakage
from admth_training.metrics import TIE_ORDER, evaluate_codes
from admth_training.splits import make_splits


def problem(lengths=(64, 16), queries=20, size=150):
    rng = np.random.default_rng(0)
    codes = {
        n: tuple(rng.integers(0, 256, (count, n // 8), dtype=np.uint8) for count in (queries, size)) for n in lengths
    }
    return codes, one_hot(np.arange(queries) % 3, 3), one_hot(np.arange(size) % 3, 3)


def test_every_length_is_measured_in_increasing_order():
    codes, query_labels, database_labels = problem()
    evaluation = evaluate_lengths(codes, query_labels, database_labels, map_cutoffs=(None, 100))
    assert evaluation.code_lengths == (16, 64)
    for length, pair in codes.items():
        alone = evaluate_codes(*pair, query_labels, database_labels, map_cutoffs=(None, 100))
        assert evaluation.metrics[length] == alone


def test_json_states_the_protocol():
    codes, query_labels, database_labels = problem()
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)
    images[1] = images[0]
    dataset = ImageDataset("toy", one_hot(np.arange(60) % 3, 3), ("a", "b", "c"), ArraySource(images, (("t", 60),)))
    splits = make_splits(dataset, query_size=6, train_size=20, seed=0)
    evaluation = evaluate_lengths(
        codes,
        query_labels,
        database_labels,
        map_cutoffs=(None, 50),
        ap_definition="possible",
        hamming_radius=3,
        dataset=dataset.name,
        splits=splits.describe(),
        leakage=check_leakage(dataset, splits),
    )
    fields = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    protocol = fields["protocol"]
    assert protocol["dataset"] == "toy" and protocol["splits"].startswith("6 queries, 20 training images")
    assert (protocol["query_size"], protocol["database_size"]) == (20, 150)
    assert protocol["map_cutoffs"] == ["all", 50] and protocol["ap_definition"] == "possible"
    assert "min(relevant" in protocol["ap_definition_text"] and protocol["tie_order"] == TIE_ORDER
    assert protocol["hamming_radius"] == 3 and protocol["random_baseline"] == pytest.approx(1 / 3)
    assert protocol["leakage"]["train_in_database"] == 20
    assert fields["code_lengths"] == [16, 64]
    assert fields["metrics"]["64"]["map"]["50"] == evaluation.metrics[64].mean_average_precision[50]
    assert evaluate_lengths(codes, query_labels, database_labels).to_dict()["protocol"]["leakage"] is None


def test_table_holds_the_figures():
    codes, query_labels, database_labels = problem()
    query_labels[0] = [0, 0, 0]
    evaluation = evaluate_lengths(codes, query_labels, database_labels, map_cutoffs=(None, 50))
    lines = evaluation.table().splitlines()
    assert lines[0].split() == ["bits", "mAP@all", "mAP@50", "tie-aware", "P@H<=2", "R@H<=2", "P@100"]
    assert lines[2].split()[:2] == ["16", f"{evaluation.metrics[16].mean_average_precision[None]:.4f}"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[4].startswith("20 queries, 150 database images")
    assert TIE_ORDER in lines[5] and lines[6].startswith("1 queries have no relevant image")


def test_codes_must_be_of_their_length():
    codes, query_labels, database_labels = problem()
    with pytest.raises(InputError, match="no code length"):
        evaluate_lengths({}, query_labels, database_labels)
    with pytest.raises(InputError, match="not a positive multiple of 8"):
        evaluate_lengths({12: codes[16]}, query_labels, database_labels)
    with pytest.raises(InputError, match=r"query codes of shape \[20, 2\] are not of 32 bits: pass \[n, 4\]"):
        evaluate_lengths({32: codes[16]}, query_labels, database_labels)
    with pytest.raises(InputError, match="no code length"):
        Evaluation({})
