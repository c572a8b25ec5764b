"""Calibration as a function: what it writes, what it says of it, and what it refuses."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnx.checker
import pytest
from PIL import Image

from admth_calibration import CalibrationOptions, calibrate
from admth_calibration.gates import Gates
from admth_calibration.images import PixelBatches, open_images
from admth_runtime import HashRuntime, read_model
from admth_runtime.errors import AdmthError, DataError, InputError, ModelError, OutputError
from admth_runtime.files import sha256_of_file
from admth_runtime.manifest import METADATA_KEY, Manifest
from admth_runtime.packing import unpack_bits

NORMS = ("trunk.norm1.window_sum", "trunk.norm2.window_sum")


def quick(target="cpu", **changes):
    """Options that take a second or two."""
    settings = {"images": 128, "check_images": 16, "block_images": 16, "rounding": "zero-sum"}
    return CalibrationOptions(target, **{**settings, **changes})


def bits(path, pixels):
    with HashRuntime(path, device="cpu") as runtime:
        codes = runtime.encode_pixels(pixels)
        return {length: unpack_bits(codes[length]) for length in codes.code_lengths}


def flips(reference, path, pixels):
    wanted, found = bits(reference, pixels), bits(path, pixels)
    return float(np.mean([(wanted[length] != found[length]).mean() for length in wanted]))


@pytest.fixture(scope="module")
def made(lite, pictures, tmp_path_factory):
    """One calibration for both targets, beside its model."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(lite, folder / "model.onnx")
    return folder, calibrate(folder / "model.onnx", f"folder:{pictures}", options=quick("both"))


class TestResult:
    @pytest.mark.parametrize(
        ("index", "target", "name"), [(0, "cpu", "model.int8.onnx"), (1, "trt", "model.int8.trt.onnx")]
    )
    def test_a_model_a_target(self, made, lite, index, target, name):
        folder, results = made
        assert sorted(path.name for path in folder.iterdir()) == [
            "model.int8.onnx",
            "model.int8.trt.onnx",
            "model.onnx",
        ]
        result = results[index]
        assert result.model == folder / name
        assert (result.bytes, result.sha256) == (result.model.stat().st_size, sha256_of_file(result.model))
        onnx.checker.check_model(result.model, full_check=True)
        manifest = read_model(result.model).manifest
        assert manifest == result.manifest
        assert (manifest.precision, manifest.parity) == ("int8", None)
        assert manifest.target == {"cpu": "cpu", "trt": "tensorrt"}[target]
        assert manifest.checkpoint_sha256 == "ab" * 32
        facts = manifest.calibration
        assert (facts["method"], facts["rounding"], facts["target"]) == ("mse", "zero-sum", target)
        assert (facts["images"], facts["broken"], facts["seed"]) == (128, 0, 0)
        assert (facts["bias_correction"], facts["equalisation"]) == (True, True)
        assert facts["source_sha256"] == sha256_of_file(lite)
        assert (facts["layers"], facts["kept_fp32"]) == (54, [])
        assert ("reduce_range" in facts) == (target == "cpu")
        assert "gates" not in facts
        assert (len(result.layers), result.kept, result.report, result.pictures) == (54, (), None, ())
        assert result.bytes < 0.4 * lite.stat().st_size
        predicted = facts["predicted"]
        assert predicted["images"] == 16
        assert (predicted["images_seen_in_calibration"], predicted["images_blended"]) == (False, True)
        assert ("latency_ratio" in predicted) == (target == "cpu")

    def test_the_parity_is_what_the_runtime_gives(self, made, lite, make_smooth):
        """Signs hold well on pictures that nobody has seen, and nearest rounding of min-max ranges is far worse."""
        _, results = made
        pixels = make_smooth(100, 64, 21)
        for result in results:
            assert flips(lite, result.model, pixels) < 0.06

    def test_ranges_are_of_the_images_that_the_digest_names(self, made, pictures):
        _, results = made
        spec = results[0].manifest.preprocessing
        images = open_images(f"folder:{pictures}")
        chosen = np.random.default_rng(0).permutation(len(images))[:128]
        batches = PixelBatches(images, chosen, spec)
        assert sum(len(batch) for batch in batches) == 128
        for result in results:
            assert result.manifest.calibration["data_sha256"] == batches.digest


def test_it_flips_far_fewer_bits_than_nearest_rounding_of_min_max_ranges(lite, pictures, make_smooth, tmp_path):
    plain = quick("trt", method="min-max", rounding="nearest", correct_bias=False, equalise=False, check_images=1)
    ours = quick("trt", block_images=64, check_images=1)
    pixels = make_smooth(200, 64, 5)
    rates = {}
    for name, options in (("plain", plain), ("ours", ours)):
        (made,) = calibrate(lite, f"folder:{pictures}", tmp_path / f"{name}.onnx", options=options)
        rates[name] = flips(lite, made.model, pixels)
    assert rates["ours"] < 0.6 * rates["plain"], rates


@pytest.mark.parametrize(("method", "most"), [("percentile", 0.05), ("entropy", 0.2), ("sign-aware", 0.05)])
def test_other_methods(cnnf, pictures, make_smooth, tmp_path, method, most):
    (made,) = calibrate(cnnf, f"folder:{pictures}", tmp_path / "m.onnx", options=quick(method=method))
    assert made.manifest.calibration["method"] == method
    assert flips(cnnf, made.model, make_smooth(100, 67, 8)) < most


class TestRuns:
    def test_equal_runs_give_equal_files_and_another_seed_another(self, cnnf, pictures, tmp_path):
        data = f"folder:{pictures}"
        first, again, other = (
            calibrate(cnnf, data, tmp_path / f"{name}.onnx", options=quick("trt", seed=seed))[0]
            for name, seed in (("a", 0), ("b", 0), ("c", 1))
        )
        assert first.sha256 == again.sha256 != other.sha256
        assert first.manifest.calibration["data_sha256"] != other.manifest.calibration["data_sha256"]
        assert first.kept == NORMS

    def test_layers_that_stay_in_float(self, cnnf, pictures, tmp_path):
        options = quick(keep_fp32=("trunk.conv1", "rests"))
        (result,) = calibrate(cnnf, f"folder:{pictures}", tmp_path / "m.onnx", options=options)
        assert "trunk.conv1" in result.kept
        assert not [layer for layer in result.layers if layer.startswith("rests")]
        assert result.manifest.calibration["kept_fp32"] == ["trunk.conv1", "rests.0.2", "rests.0.4"]
        with pytest.raises(ModelError, match="no layer is left to quantise"):
            calibrate(cnnf, f"folder:{pictures}", tmp_path / "n.onnx", options=quick(keep_fp32=("*",)))
        with pytest.raises(InputError, match=r"'trunk\.conv9' matches no layer: name one such as trunk\.conv"):
            calibrate(cnnf, f"folder:{pictures}", tmp_path / "n.onnx", options=quick(keep_fp32=("trunk.conv9",)))
        assert not (tmp_path / "n.onnx").exists()

    def test_weights_of_seven_bits(self, cnnf, pictures, tmp_path):
        for reduce_range, largest in (("yes", 63), ("no", 127)):
            options = quick("both", reduce_range=reduce_range)
            shutil.copy(cnnf, tmp_path / "model.onnx")
            cpu, trt = calibrate(tmp_path / "model.onnx", f"folder:{pictures}", options=options)
            assert cpu.manifest.calibration["reduce_range"] == (reduce_range == "yes")
            for result, wanted in ((cpu, largest), (trt, 127)):
                stored = [
                    onnx.numpy_helper.to_array(tensor)
                    for tensor in onnx.load(result.model).graph.initializer
                    if tensor.name.endswith(".weight.int8")
                ]
                assert len(stored) == 10
                assert max(np.abs(values.astype(int)).max() for values in stored) == wanted

    def test_images_to_compare_on(self, cnnf, pictures, make_smooth, tmp_path):
        others = tmp_path / "others"
        others.mkdir()
        for index, pixels in enumerate(make_smooth(9, 48, 77)):
            Image.fromarray(pixels).save(others / f"{index}.png")
        (made,) = calibrate(
            cnnf, f"folder:{pictures}", tmp_path / "m.onnx", check_data=f"folder:{others}", options=quick()
        )
        predicted = made.manifest.calibration["predicted"]
        assert (predicted["images"], predicted["images_blended"], predicted["images_seen_in_calibration"]) == (
            9,
            False,
            False,
        )
        images = open_images(f"folder:{others}")
        pixels = np.stack([images.load(index, made.manifest.preprocessing) for index in range(9)])
        wanted, found = bits(cnnf, pixels)[16], bits(made.model, pixels)[16]
        assert predicted["bit_parity"]["16"] == pytest.approx((wanted == found).mean())
        assert predicted["exact_code_rate"]["16"] == pytest.approx((wanted == found).all(axis=1).mean())
        for path in others.iterdir():
            path.write_bytes(b"no picture")
        with pytest.raises(DataError, match="images of folder:others cannot be read"):
            calibrate(cnnf, f"folder:{pictures}", check_data=f"folder:{others}", options=quick())
        for path in sorted(others.iterdir())[2:]:
            path.unlink()
        with pytest.raises(DataError, match="no image of folder:others to compare on can be read, the first: "):
            calibrate(cnnf, f"folder:{pictures}", check_data=f"folder:{others}", options=quick())


class TestRefused:
    def test_few_images(self, cnnf, pictures, tmp_path):
        few = tmp_path / "few"
        few.mkdir()
        for path in sorted(pictures.iterdir())[:127]:
            shutil.copy(path, few)
        with pytest.raises(DataError, match="holds 127 images and a calibration takes 128 or more"):
            calibrate(cnnf, f"folder:{few}", tmp_path / "m.onnx")
        shutil.copy(sorted(pictures.iterdir())[130], few)
        (result,) = calibrate(cnnf, f"folder:{few}", tmp_path / "m.onnx", options=quick(check_images=5))
        predicted = result.manifest.calibration["predicted"]
        assert (predicted["images"], predicted["images_seen_in_calibration"]) == (5, True)

    def test_constant_images(self, cnnf, tmp_path):
        folder = tmp_path / "flat"
        folder.mkdir()
        for index in range(128):
            Image.new("RGB", (40, 40), (index % 3,) * 3).save(folder / f"{index:03}.png")
        with pytest.raises(DataError, match="128 images of folder:flat have 3 different pixel values in all"):
            calibrate(cnnf, f"folder:{folder}", tmp_path / "m.onnx", options=quick())
        assert not (tmp_path / "m.onnx").exists()

    def test_broken_images_are_left_out_and_counted(self, cnnf, pictures, tmp_path):
        some = tmp_path / "some"
        shutil.copytree(pictures, some)
        for name in ("000.png", "001.png"):
            (some / name).write_bytes(b"no picture")
        (result,) = calibrate(cnnf, f"folder:{some}", tmp_path / "m.onnx", options=quick(images=160))
        facts = result.manifest.calibration
        assert facts["images"] + facts["broken"] == 128
        for index in range(40):
            (some / f"{index:03}.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"images of folder:some cannot be read, the first: .*\.png"):
            calibrate(cnnf, f"folder:{some}", tmp_path / "n.onnx", options=quick())
        assert not (tmp_path / "n.onnx").exists()

    def test_what_is_no_fp32_model(self, cnnf, pictures, tmp_path):
        data = f"folder:{pictures}"
        (made,) = calibrate(cnnf, data, tmp_path / "m.onnx", options=quick(check_images=2))
        with pytest.raises(ModelError, match=r"is int8 already: pass the FP32 model of  admth-export onnx"):
            calibrate(made.model, data)
        model = onnx.load(made.model)
        source = {item.key: item.value for item in onnx.load(cnnf).metadata_props}
        half = Manifest.from_json(source[METADATA_KEY]).to_json().replace('"fp32"', '"fp16"')
        cases = (
            (source, r"the weight of the layer trunk\.conv1 is quantised already: pass the FP32 model"),
            ({METADATA_KEY: half}, "is fp16 already: pass the FP32 model"),
            ({}, "manifest"),
        )
        for index, (metadata, message) in enumerate(cases):
            path = tmp_path / f"{index}.onnx"
            del model.metadata_props[:]
            onnx.helper.set_model_props(model, metadata)
            onnx.save(model, path)
            with pytest.raises(AdmthError, match=message) as caught:
                calibrate(path, data)
            assert "\n" not in str(caught.value)
        (tmp_path / "broken.onnx").write_bytes(cnnf.read_bytes()[:5000])
        (tmp_path / "empty.onnx").write_bytes(b"")
        for name in ("broken.onnx", "empty.onnx", "absent.onnx"):
            with pytest.raises(AdmthError, match=name):
                calibrate(tmp_path / name, data)

    def test_places_to_write(self, cnnf, pictures, tmp_path):
        data = f"folder:{pictures}"
        with pytest.raises(OutputError, match="it is the model itself"):
            calibrate(cnnf, data, cnnf)
        with pytest.raises(OutputError, match=r"a model's name ends with \.onnx"):
            calibrate(cnnf, data, tmp_path / "m.bin")
        with pytest.raises(InputError, match="names one file and --target both makes two"):
            calibrate(cnnf, data, tmp_path / "m.onnx", options=quick("both"))

    def test_no_data(self, cnnf):
        with pytest.raises(InputError, match="needs images for its ranges: pass --data"):
            calibrate(cnnf)

    def test_map_without_labels_is_refused_before_any_work(self, cnnf, pictures, monkeypatch):
        from admth_calibration import making

        monkeypatch.setattr(making, "observe", lambda *_, **__: pytest.fail("worked for nothing"))
        with pytest.raises(InputError, match=r"--min-map-ratio needs labels and folder:pictures\d has none"):
            calibrate(cnnf, f"folder:{pictures}", options=quick(gates=Gates(min_map_ratio=0.9)))
