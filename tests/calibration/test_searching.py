"""Mixed precision to a gate: what each layer costs, which layers stay in float, and gates that cannot be met."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from admth_calibration import CalibrationOptions, calibrate
from admth_calibration.gates import Gates
from admth_calibration.images import open_images
from admth_calibration.mixed import FrontPoint, pareto_front, search_layers
from admth_calibration.retrieval import mean_average_precision
from admth_calibration.scoring import Score, Scorer
from admth_calibration.sensitivity import LayerSensitivity
from admth_runtime import HashRuntime
from admth_runtime.errors import InputError, ModelError
from admth_runtime.packing import unpack_bits

# A coarse recipe, so that the tiny network has something to search for.
COARSE = CalibrationOptions(
    "trt",
    images=128,
    check_images=32,
    block_images=16,
    method="min-max",
    rounding="nearest",
    correct_bias=False,
    equalise=False,
)


def parity(reference, candidate, pixels):
    with HashRuntime(reference, device="cpu") as exact, HashRuntime(candidate, device="cpu") as rounded:
        wanted, found = exact.encode_pixels(pixels), rounded.encode_pixels(pixels)
    return {length: float((unpack_bits(wanted[length]) == unpack_bits(found[length])).mean()) for length in (16,)}


@pytest.fixture(scope="module")
def classes(tmp_path_factory, make_smooth):
    """160 pictures in two folders, a class each, and of another kind to compare on."""
    root = tmp_path_factory.mktemp("classes")
    for index, pixels in enumerate(make_smooth(200, 48, 17)):
        folder = root / ("data" if index < 160 else "check") / ("warm" if pixels[..., 0].mean() > 128 else "cold")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return root


@pytest.fixture(scope="module")
def check(classes):
    return {"data": f"folder:{classes / 'data'}", "check_data": f"folder:{classes / 'check'}"}


@pytest.fixture(scope="module")
def found(cnnf, check, tmp_path_factory):
    """The coarse recipe without a gate, and to a gate halfway between it and FP32."""
    folder = tmp_path_factory.mktemp("found")
    (plain,) = calibrate(cnnf, out=folder / "plain.onnx", options=replace(COARSE, sensitivity=True), **check)
    before = plain.manifest.calibration["predicted"]["bit_parity"]["16"]
    assert before < 0.995  # or there would be nothing to find
    gate = round((1 + before) / 2, 4)
    options = replace(COARSE, gates=Gates(min_bit_parity=gate, min_map_ratio=0.9))
    (met,) = calibrate(cnnf, out=folder / "met.onnx", options=options, **check)
    return plain, gate, met


class TestSearch:
    def test_the_written_model_meets_the_gate_with_few_layers_in_float(self, cnnf, check, found):
        plain, gate, met = found
        kept = [name for name in met.kept if not name.endswith("window_sum")]
        assert 1 <= len(kept) <= 5
        assert met.manifest.calibration["kept_fp32"] == kept
        assert met.manifest.calibration["gates"] == {"min_bit_parity": gate, "min_map_ratio": 0.9}
        images = open_images(check["check_data"])
        order = np.random.default_rng(0)
        order.permutation(160)
        chosen = order.permutation(len(images))[:32]
        pixels = np.stack([images.load(int(index), met.manifest.preprocessing) for index in chosen])
        measured = parity(cnnf, met.model, pixels)
        assert measured[16] == pytest.approx(met.manifest.calibration["predicted"]["bit_parity"]["16"])
        assert measured[16] >= gate > parity(cnnf, plain.model, pixels)[16]
        assert 0.9 <= met.manifest.calibration["predicted"]["map_ratio"]["16"] <= 1.2
        assert met.bytes > plain.bytes

    def test_the_report_and_the_pictures(self, found):
        plain, gate, met = found
        assert met.report == met.model.with_name("met.calibration.json")
        report = json.loads(met.report.read_text())
        assert (report["model"], report["sha256"]) == (met.model.name, met.sha256)
        assert report["calibration"]["gates"]["min_bit_parity"] == gate
        points = report["points"]
        assert points[0]["kept"] == []
        assert {point["family"] for point in points} == {"all INT8", "ranked", "first layers", "chosen"}
        assert points[-1]["kept"] == met.manifest.calibration["kept_fp32"]
        assert points[-1]["bit_parity"]["16"] >= gate > points[0]["bit_parity"]["16"]
        assert all(point["latency_ratio"] is None and point["bytes"] > 1e6 for point in points)
        assert [path.name for path in met.pictures] == ["met.pareto.png", "met.sensitivity.png"]
        for path in (*met.pictures, *plain.pictures):
            with Image.open(path) as picture:
                assert picture.width > 700
                assert len(set(picture.convert("L").tobytes())) > 50
        assert [path.name for path in plain.pictures] == ["plain.sensitivity.png"]

    def test_sensitivities(self, found):
        plain, _, met = found
        rows = json.loads(plain.report.read_text())["sensitivity"]
        assert {row["layer"] for row in rows} == set(plain.layers)
        assert {row["kind"] for row in rows} == {"conv", "dense"}
        errors = [row["error_alone"] for row in rows]
        assert errors == sorted(errors, reverse=True)
        assert all(row["flips_alone"] >= 0 and row["flips_without"] >= 0 for row in rows)
        flipped = 1 - plain.manifest.calibration["predicted"]["bit_parity"]["16"]
        # The worst layer alone does a good part of the harm, and not more than all of them by far.
        assert 0.2 * flipped <= max(row["flips_alone"] for row in rows) <= 1.5 * flipped
        # Squared errors nearly add up.
        total = np.sqrt(np.square(errors).sum())
        assert 0.5 < total / plain.manifest.calibration["predicted"]["logit_error"] < 2
        # Without --sensitivity the slow half is not measured.
        assert all(row["flips_without"] is None for row in json.loads(met.report.read_text())["sensitivity"])


class TestGatesThatAreMissed:
    def test_latency_says_by_how_much_and_writes_nothing(self, cnnf, pictures, tmp_path):
        shutil.copy(cnnf, tmp_path / "model.onnx")
        options = replace(COARSE, target="cpu", check_images=8, gates=Gates(max_latency_ratio=0.001))
        with pytest.raises(
            ModelError,
            match=r"no INT8 model for cpu meets the gates, and nothing is written: .*latency 0\.\d+ of FP32 misses "
            r"0\.001 by 0\.\d+: lower a gate",
        ):
            calibrate(tmp_path / "model.onnx", f"folder:{pictures}", options=options)
        assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]

    def test_one_target_of_both(self, cnnf, pictures, tmp_path):
        shutil.copy(cnnf, tmp_path / "model.onnx")
        options = replace(COARSE, target="both", gates=Gates(min_bit_parity=1.0, max_latency_ratio=0.001))
        with pytest.raises(ModelError, match=r"no INT8 model for cpu meets .*latency \d\.\d+ of FP32 misses 0\.001"):
            calibrate(tmp_path / "model.onnx", f"folder:{pictures}", options=options)
        assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]

    def test_map(self, cnnf, classes, tmp_path):
        shutil.copytree(classes / "check", tmp_path / "other")
        (tmp_path / "other" / "warm").rename(tmp_path / "other" / "hot")
        (tmp_path / "other" / "cold").rename(tmp_path / "other" / "icy")
        options = replace(COARSE, gates=Gates(min_map_ratio=0.5))
        with pytest.raises(InputError, match="folder:other shares no label with folder:data: pass data with the same"):
            calibrate(cnnf, f"folder:{classes / 'data'}", check_data=f"folder:{tmp_path / 'other'}", options=options)

    def test_images_that_cannot_be_read_do_not_shift_labels(self, cnnf, classes, tmp_path):
        shutil.copytree(classes, tmp_path / "some")
        for part in ("data", "check"):
            sorted((tmp_path / "some" / part).rglob("*.png"))[3].write_bytes(b"no picture")
        options = replace(COARSE, check_images=40, images=160, gates=Gates(min_map_ratio=0.5))
        (made,) = calibrate(
            cnnf,
            f"folder:{tmp_path / 'some' / 'data'}",
            tmp_path / "m.onnx",
            check_data=f"folder:{tmp_path / 'some' / 'check'}",
            options=options,
        )
        assert 0.9 < made.manifest.calibration["predicted"]["map_ratio"]["16"] < 1.1


class TestParts:
    def point(self, kept, parity, ratio=None, size=100):
        return FrontPoint(tuple(kept), Score({16: parity}, {16: parity}, 0.0, 0.0), ratio, size, "ranked")

    def test_the_front(self):
        points = [
            self.point("a" * index, *values)
            for index, values in enumerate([(0.9, 0.5), (0.95, 0.7), (0.94, 0.8), (0.99, 0.9), (0.9, 0.4)])
        ]
        assert pareto_front(points) == [points[4], points[1], points[3]]
        sized = [self.point("", 0.9, None, 50), self.point("a", 0.95, None, 60), self.point("b", 0.94, None, 70)]
        assert pareto_front(sized) == sized[:2]

    def test_the_search_takes_the_cheapest_set_that_meets_the_gate(self):
        """With errors that add up, on layers of known costs: the ranking is error over cost."""
        layers = [f"l{index}" for index in range(12)]
        errors = dict(zip(layers, np.linspace(0.2, 1.3, 12), strict=True))
        costs = {name: 1.0 + (index % 3) for index, name in enumerate(layers)}
        total = sum(value**2 for value in errors.values())
        built = []

        def measure(kept, family="all INT8"):
            left = sum(errors[name] ** 2 for name in layers if name not in kept)
            built.append(tuple(kept))
            return FrontPoint(
                tuple(kept),
                Score({16: 1 - 0.05 * (left / total) ** 0.5}, {16: 0.5}, 0.0, 0.0),
                0.5 + 0.01 * sum(costs[name] for name in kept),
                100,
                family,
            )

        def refit(kept):
            return "fitted", measure(kept, "chosen")

        gates = Gates(min_bit_parity=0.97)
        sensitivities = [LayerSensitivity(name, "conv", 0.0, error, None) for name, error in errors.items()]
        found = search_layers(
            measure([]),
            layers,
            sensitivities,
            costs,
            gates,
            measure,
            refit,
            lambda kept: ("rebuilt", measure(kept, "chosen")),
        )
        assert found.chosen == "fitted"
        assert gates.met_by(found.point)
        assert len(set(built)) < 24  # of 4,096 sets
        fewer = sorted(layers, key=lambda name: -(errors[name] ** 2) / costs[name])
        best = next(count for count in range(12) if gates.met_by(measure(fewer[:count])))
        assert set(found.point.kept) == set(fewer[:best])
        assert all(
            layers.index(a) < layers.index(b) for a, b in zip(found.point.kept, found.point.kept[1:], strict=False)
        )
        # A gate on time that no set meets: the nearest miss is the fastest that is there.
        missed = search_layers(
            measure([]),
            layers,
            sensitivities,
            costs,
            Gates(0.97, max_latency_ratio=0.51),
            measure,
            refit,
            lambda kept: ("rebuilt", measure(kept, "chosen")),
        )
        assert missed.chosen is None

    def test_scores(self, case, candidate):
        found = case("lite")
        scorer = Scorer(found.model, found.pixels)
        same = scorer.score(found.model)
        assert (same.least, same.mean, same.error) == (1.0, 1.0, 0.0)
        score = scorer.score(candidate("lite", "trt").model)
        logits = scorer.logits(candidate("lite", "trt").model)
        for length in (16, 32):
            equal = (logits[length] > 0) == (scorer.reference[length] > 0)
            assert score.bit_parity[length] == pytest.approx(equal.mean())
            assert score.exact_code_rate[length] == pytest.approx(equal.all(axis=1).mean())
        assert score.risk > same.risk
        assert score.least == min(score.bit_parity.values())
        weights = scorer.image_weights()
        assert weights.mean() == pytest.approx(1, abs=1e-4)
        assert weights.std() > 0
        nearest = [np.abs(scorer.reference[32][index]).min() for index in (weights.argmax(), weights.argmin())]
        assert nearest[0] < nearest[1] + 0.5

    def test_map_is_what_a_plain_loop_gives(self):
        rng = np.random.default_rng(0)
        queries, database = (rng.integers(0, 256, (count, 2), dtype=np.uint8) for count in (7, 60))
        relevant = rng.random((7, 60)) < 0.2
        relevant[3] = False
        found = []
        for query, wanted in zip(queries, relevant, strict=True):
            distances = np.unpackbits(query ^ database, axis=1).sum(axis=1)
            hits, precisions = 0, []
            for rank, index in enumerate(sorted(range(60), key=lambda item: (distances[item], item)), start=1):
                if wanted[index]:
                    hits += 1
                    precisions.append(hits / rank)
            if precisions:
                found.append(np.mean(precisions))
        assert mean_average_precision(queries, database, relevant) == pytest.approx(np.mean(found))
        assert mean_average_precision(queries, database, np.zeros_like(relevant)) == 0.0
