from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from _tiny_model import LENGTHS, SIZE, save_tiny_model, tiny_manifest, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image

from admth_runtime import HashRuntime, InputError, Manifest, ManifestError, SelfTestError
from admth_runtime.manifest import METADATA_KEY
from admth_runtime.self_test import (
    GoldenVectors,
    LengthCheck,
    SelfTestReport,
    golden_pixels,
    golden_vectors,
    golden_vectors_of,
)

NOISE = {"fp32": 0.02, "fp16": 0.1, "int8": 0.25}


@pytest.fixture(scope="module")
def golden(tiny_path) -> dict:
    with HashRuntime(tiny_path, threads=1) as runtime:
        return golden_vectors_of(runtime)


@pytest.fixture(scope="module")
def good(golden, tmp_path_factory):
    """A tiny model with its golden vectors."""
    return save_tiny_model(tmp_path_factory.mktemp("good") / "model.onnx", manifest=tiny_manifest(golden=golden))


def damaged(golden, path, change, *names: str):
    """A tiny model with the golden vectors of a sound one, and some weights changed."""
    model = tiny_model(manifest=tiny_manifest(golden=golden))
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def bad(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("bad") / "model.onnx"
    return damaged(golden, path, lambda weights: -weights, "w48")


class TestPixels:
    @pytest.mark.parametrize(
        ("shape", "digest"),
        [
            ((12, 12, 3), "87fd44d46439eec97b16a22231b564af871f3a53514e6ee65df7cde8d25fd5fb"),
            ((96, 96, 3), "0e9e9a1b09a1637bc5f5dc86fc212124b33530a4d0bc545688887f12f1e5fa68"),
            ((224, 160, 3), "ed18f2e9c164321565ed46e6cfd470be088689a7cd971a589a9f7fbed6823318"),
            ((1, 1, 3), "ad34a5931f8fe8f51e82893f1d74dd6ddd78e0a621fbdaf893d59da195fac1c6"),
        ],
    )
    def test_the_recipe_never_changes(self, shape, digest):
        pixels = golden_pixels(shape)
        assert pixels.shape == (4, *shape)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == digest

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 300), st.integers(1, 300))
    def test_every_size_can_be_drawn_and_pictures_differ(self, height, width):
        pixels = golden_pixels((height, width, 3))
        if height > 7 and width > 7:
            assert len({picture.tobytes() for picture in pixels}) == 4
            assert pixels.std(axis=(1, 2, 3)).min() > 20


class TestVectors:
    def logits(self, seed: int) -> dict[int, np.ndarray]:
        generator = np.random.default_rng(seed)
        return {length: generator.normal(0, 3, (4, length)).astype(np.float32) for length in LENGTHS}

    def check(self, manifest: Manifest, logits: dict[int, np.ndarray]) -> SelfTestReport:
        """What a model with these logits would be told."""
        from admth_runtime.self_test import _check

        vectors = GoldenVectors.from_dict(manifest.golden, manifest.code_lengths)
        return SelfTestReport(
            {length: _check(vectors, length, np.packbits(values > 0, axis=1)) for length, values in logits.items()}
        )

    @pytest.mark.parametrize("precision", NOISE)
    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_noise_of_the_precision_is_no_alarm(self, precision, seed):
        logits = self.logits(seed)
        manifest = tiny_manifest(precision=precision)
        manifest = replace(manifest, golden=golden_vectors(logits, manifest))
        generator = np.random.default_rng(seed)
        noisy = {}
        for length, values in logits.items():
            most = NOISE[precision] * np.sqrt(np.mean(values.astype(np.float64) ** 2))
            noisy[length] = values + generator.choice([-0.999, 0.999], values.shape) * most
        report = self.check(manifest, noisy)
        assert report.passed
        assert all(check.wrong == 0 for check in report.lengths.values())

    @pytest.mark.parametrize(("precision", "share"), [("fp32", 0.0), ("fp16", 0.01), ("int8", 0.03)])
    def test_how_many_bits_may_differ(self, precision, share):
        logits = self.logits(1)
        manifest = tiny_manifest(precision=precision)
        manifest = replace(manifest, golden=golden_vectors(logits, manifest))
        reliable = np.abs(logits[64]) > NOISE[precision] * np.sqrt(np.mean(logits[64].astype(np.float64) ** 2))
        places = np.argwhere(reliable)
        allowed = int(np.ceil(share * len(places)))
        for flips, passes in ((allowed, True), (allowed + 1, False)):
            turned = {length: values.copy() for length, values in logits.items()}
            for row, bit in places[:flips]:
                turned[64][row, bit] *= -1
            report = self.check(manifest, turned)
            assert report.lengths[64] == LengthCheck(len(places), flips, allowed)
            assert report.passed is passes

    def test_they_are_small_and_survive_the_manifest(self, golden):
        manifest = tiny_manifest(golden=golden)
        again = Manifest.from_json(manifest.to_json())
        assert again == manifest
        assert GoldenVectors.from_dict(again.golden, LENGTHS).to_dict() == golden
        assert len(json.dumps(golden)) < 1000

    def test_another_precision_does_not_inherit_them(self, golden):
        manifest = tiny_manifest(golden=golden)
        assert replace(manifest, target="cpu").golden == golden
        assert replace(manifest, precision="int8").golden is None

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_values_that_are_not_finite(self, value):
        logits = self.logits(0)
        logits[32][1, 1] = value
        with pytest.raises(InputError, match="at 32 bits"):
            golden_vectors(logits, tiny_manifest())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"recipe": "integer-patterns-2"},
                r"'integer-patterns-2' are unknown to this version.*pip install -U admth",
            ),
            ({"recipe": None}, "unknown to this version"),
            ({"codes": {}}, "malformed"),
            ({"codes": None}, "malformed"),
            ({"codes": {str(length): ["00"] for length in LENGTHS}}, "do not fit"),
            ({"reliable": {str(length): ["zz"] for length in LENGTHS}}, "malformed"),
            ({"tolerance": "much"}, "malformed"),
            ({"tolerance": 2}, "do not fit"),
        ],
    )
    def test_malformed_ones_are_refused_when_they_are_used(self, golden, change, message, tmp_path):
        manifest = tiny_manifest(golden={**golden, **change})
        path = save_tiny_model(tmp_path / "model.onnx", manifest=manifest)
        with HashRuntime(path, threads=1) as runtime, pytest.raises(ManifestError, match=message) as caught:
            runtime.self_test()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


class TestAtLoad:
    def test_a_sound_model_passes_and_says_what_was_compared(self, good):
        with HashRuntime(good, threads=1, batch_size=3, self_test=True) as runtime:
            report = runtime.self_test()
            assert runtime.encode_pixels(golden_pixels((SIZE, SIZE, 3))).count == 4
        assert report.passed
        assert set(report.lengths) == set(LENGTHS)
        for length, check in report.lengths.items():
            assert check.wrong == 0
            assert 0.9 * 4 * length < check.checked <= 4 * length
        assert str(report).startswith("passed: 0 of ")
        assert report.to_dict()["passed"] is True

    def test_a_mismatch_says_which_length_and_how_many_bits(self, bad):
        with pytest.raises(SelfTestError) as caught:
            HashRuntime(bad, threads=1, self_test=True)
        message = str(caught.value)
        assert f"{bad} fails its self-test with onnxruntime" in message
        assert "at 48 bits" in message
        assert "checked bits differ and 0 may" in message
        assert not any(f"at {length} bits" in message for length in (16, 32, 64))
        assert "\n" not in message
        with HashRuntime(bad, threads=1) as runtime:  # it is off by default
            with pytest.raises(SelfTestError):
                runtime.self_test()
            runtime.encode(np.zeros((1, SIZE, SIZE, 3), np.uint8))

    @pytest.mark.parametrize(
        "change",
        [
            np.zeros_like,
            lambda weights: weights * np.random.default_rng(0).normal(1, 0.3, weights.shape).astype(np.float32),
            lambda weights: np.concatenate([weights[:8] * 0, weights[8:]]),
            lambda weights: weights[::-1].copy(),
        ],
        ids=["lost", "noisy", "a page of zeros", "shuffled"],
    )
    def test_damaged_weights_are_found(self, golden, tmp_path, change):
        path = damaged(golden, tmp_path / "model.onnx", change, *(f"w{length}" for length in LENGTHS))
        with pytest.raises(SelfTestError, match="fails its self-test"):
            HashRuntime(path, threads=1, self_test=True)

    def test_a_model_without_golden_vectors(self, tiny_path):
        with pytest.raises(ManifestError, match="has no golden vectors to test itself with: export it again"):
            HashRuntime(tiny_path, threads=1, self_test=True)

    def test_an_older_manifest_still_loads(self, good, tmp_path):
        model = onnx.load(good)
        fields = json.loads(model.metadata_props[0].value)
        del fields["golden"]
        onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(fields)})
        (tmp_path / "old.onnx").write_bytes(model.SerializeToString())
        with HashRuntime(tmp_path / "old.onnx", threads=1) as runtime:
            assert runtime.manifest.golden is None

    def test_a_closed_runtime_says_so(self, good):
        runtime = HashRuntime(good, threads=1)
        runtime.close()
        with pytest.raises(InputError, match="closed"):
            runtime.self_test()


class TestCommands:
    def run(self, *arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "admth_runtime", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    def test_a_damaged_model_stops_every_command_before_its_work(self, bad, tmp_path):
        Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
        (tmp_path / "pictures").mkdir()
        out = tmp_path / "codes.npz"
        for arguments in (
            ("info", bad, "--self-test"),
            ("encode", tmp_path / "a.png", "--model", bad, "--out", out, "--self-test"),
            ("encode", tmp_path / "a.png", "--model", bad, "--out", tmp_path / "corpus", "--self-test"),
            ("bench", bad, "--self-test", "--queries", 1, "--samples", 0),
        ):
            done = self.run(*arguments)
            assert done.returncode == 1
            assert done.stderr.splitlines()[-1].startswith(f"error: {bad} fails its self-test")
            assert "at 48 bits" in done.stderr
        assert not out.exists()
        assert not (tmp_path / "corpus").exists()

    def test_search_and_info_of_a_sound_one(self, good, bad, tmp_path):
        Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
        done = self.run("encode", tmp_path / "a.png", "--model", good, "--out", tmp_path / "c.npz", "--self-test")
        assert done.returncode == 0, done.stderr
        query = ("search", tmp_path / "a.png", "--index", tmp_path / "c.npz", "--self-test", "--model")
        assert self.run(*query, good).returncode == 0
        assert "fails its self-test" in self.run(*query, bad).stderr
        assert "--self-test is for models" in self.run("info", tmp_path / "c.npz", "--self-test").stderr
        plain = self.run("info", good, "--self-test")
        assert plain.stdout.splitlines()[-1].startswith("self test")
        facts = json.loads(self.run("info", good, "--self-test", "--json").stdout)
        assert facts["golden_vectors"] == "integer-patterns-1"
        assert facts["self_test"]["bits"]["64"]["wrong"] == 0
