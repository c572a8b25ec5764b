"""``admth-calibrate``: as a function, and as users run it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import pytest

from admth_calibration import CalibrationOptions, calibrate
from admth_calibration.images import PixelBatches, open_images
from admth_runtime import HashRuntime, read_model
from admth_runtime.errors import DataError, InputError, ModelError
from admth_runtime.files import sha256_of_file
from admth_runtime.packing import unpack_bits
from admth_runtime.preprocessing import PreprocessingSpec

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "200"}


def run_cli(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "admth_calibration", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )


def fails(done, *parts):
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


class TestFunction:
    def test_a_calibrated_model(self, lite, pictures, tmp_path):
        shutil.copy(lite, tmp_path / "model.onnx")
        result = calibrate(tmp_path / "model.onnx", f"folder:{pictures}", options=CalibrationOptions(images=128))
        assert result.model == tmp_path / "model.int8.trt.onnx"
        assert (result.bytes, result.sha256) == (result.model.stat().st_size, sha256_of_file(result.model))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.int8.trt.onnx", "model.onnx"]
        onnx.checker.check_model(result.model, full_check=True)
        model = read_model(result.model)
        manifest = model.manifest
        assert manifest == result.manifest
        assert (manifest.precision, manifest.target, manifest.parity) == ("int8", "tensorrt", None)
        assert manifest.checkpoint_sha256 == "ab" * 32
        facts = manifest.calibration
        assert (facts["method"], facts["target"], facts["images"], facts["broken"]) == ("min-max", "trt", 128, 0)
        assert facts["source_sha256"] == sha256_of_file(lite)
        assert facts["layers"] == len(result.layers)
        predicted = facts["predicted"]
        assert predicted["images"] == 32  # of 160, the 128 of the calibration are not looked at again
        assert predicted["images_are_those_of_the_calibration"] is False
        assert result.bytes < 0.4 * lite.stat().st_size

    def test_the_prediction_is_what_the_runtime_gives(self, lite, pictures, tmp_path):
        options = CalibrationOptions(images=128, check_images=9, seed=3)
        result = calibrate(lite, f"folder:{pictures}", tmp_path / "m.onnx", options=options)
        images = open_images(f"folder:{pictures}")
        order = np.random.default_rng(3).permutation(len(images))
        spec = result.manifest.preprocessing
        pixels = np.stack([images.load(int(index), spec) for index in order[128:137]])
        chosen = order[:128]
        batches = PixelBatches(images, chosen, spec)
        for _ in batches:
            pass
        assert result.manifest.calibration["data_sha256"] == batches.digest
        with HashRuntime(lite, device="cpu") as exact, HashRuntime(result.model, device="cpu") as rounded:
            wanted, found = exact.encode_pixels(pixels), rounded.encode_pixels(pixels)
        predicted = result.manifest.calibration["predicted"]
        for length in (16, 32):
            different = unpack_bits(wanted[length]) != unpack_bits(found[length])
            assert predicted["bit_parity"][str(length)] == pytest.approx(1 - different.mean())
            assert predicted["exact_code_rate"][str(length)] == pytest.approx((~different.any(axis=1)).mean())
            margin = predicted["max_flip_margin"][str(length)]
            if different.any():
                assert margin == pytest.approx(np.abs(wanted.logits[length])[different].max(), rel=1e-5)
            else:
                assert margin is None

    def test_equal_runs_give_equal_files(self, cnnf, pictures, tmp_path):
        options = CalibrationOptions(images=128, check_images=4)
        first = calibrate(cnnf, f"folder:{pictures}", tmp_path / "a.onnx", options=options)
        again = calibrate(cnnf, f"folder:{pictures}", tmp_path / "b.onnx", options=options)
        assert first.sha256 == again.sha256
        assert first.kept == ("trunk.norm1.window_sum", "trunk.norm2.window_sum")

    def test_layers_that_stay_in_fp32(self, cnnf, pictures, tmp_path):
        options = CalibrationOptions(images=128, check_images=4, keep_fp32=("trunk.conv1", "rests"))
        result = calibrate(cnnf, f"folder:{pictures}", tmp_path / "m.onnx", options=options)
        assert "trunk.conv1" in result.kept
        assert not [layer for layer in result.layers if layer.startswith("rests")]
        assert result.manifest.calibration["kept_fp32"] == list(result.kept)
        everything = CalibrationOptions(images=128, keep_fp32=("*",))
        with pytest.raises(ModelError, match="no layer is left to quantise"):
            calibrate(cnnf, f"folder:{pictures}", tmp_path / "n.onnx", options=everything)
        assert not (tmp_path / "n.onnx").exists()

    def test_what_is_no_fp32_model(self, cnnf, pictures, tmp_path):
        made = calibrate(cnnf, f"folder:{pictures}", tmp_path / "m.onnx", options=CalibrationOptions(check_images=2))
        with pytest.raises(ModelError, match=r"is int8 already: pass the FP32 model of  admth-export onnx"):
            calibrate(made.model, f"folder:{pictures}")

    def test_options_out_of_range(self):
        with pytest.raises(InputError, match="target 'gpu' is unknown: use trt"):
            CalibrationOptions(target="gpu")
        with pytest.raises(InputError, match="images 64 is not an integer from 128"):
            CalibrationOptions(images=64)
        with pytest.raises(InputError, match="check images 0 is not an integer from 1"):
            CalibrationOptions(check_images=0)


class TestImages:
    def test_few_images_are_refused(self, cnnf, pictures, tmp_path):
        few = tmp_path / "few"
        few.mkdir()
        for path in sorted(pictures.iterdir())[:127]:
            shutil.copy(path, few)
        with pytest.raises(DataError, match="holds 127 images and a calibration takes 128 or more"):
            calibrate(cnnf, f"folder:{few}", tmp_path / "m.onnx")
        shutil.copy(sorted(pictures.iterdir())[130], few)
        result = calibrate(cnnf, f"folder:{few}", tmp_path / "m.onnx", options=CalibrationOptions(check_images=5))
        predicted = result.manifest.calibration["predicted"]
        assert predicted["images"] == 5
        assert predicted["images_are_those_of_the_calibration"] is True

    def test_broken_images_are_left_out_and_counted(self, cnnf, pictures, tmp_path):
        some = tmp_path / "some"
        shutil.copytree(pictures, some)
        for name in ("000.png", "001.png"):
            (some / name).write_bytes(b"no picture")
        options = CalibrationOptions(images=160, check_images=40)
        result = calibrate(cnnf, f"folder:{some}", tmp_path / "m.onnx", options=options)
        facts = result.manifest.calibration
        assert facts["images"] + facts["broken"] == 128
        for index in range(40):
            (some / f"{index:03}.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"images of folder:some cannot be read, the first: .*\.png"):
            calibrate(cnnf, f"folder:{some}", tmp_path / "n.onnx", options=options)
        assert not (tmp_path / "n.onnx").exists()

    def test_lists(self, pictures, tmp_path):
        listing = tmp_path / "train.txt"
        names = [path.name for path in sorted(pictures.iterdir())[:3]]
        listing.write_text(f"/data/{names[0]} 0 1\n\n/data/{names[1]}\t1 0\n/data/{names[2]}\n")
        images = open_images(f"list:{listing}", root=pictures, strip_prefix="/data/")
        assert list(images.sources) == [pictures / name for name in names]
        assert len(open_images(f"list:{tmp_path}", root=pictures, strip_prefix="/data/")) == 3
        spec = PreprocessingSpec(32, 32)
        assert images.load(1, spec).shape == (32, 32, 3)
        listing.write_text("\n")
        with pytest.raises(DataError, match="is empty: write the path"):
            open_images(f"list:{listing}")

    def test_fashion_mnist(self, tmp_path):
        values = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
        content = struct.pack(">HBB3I", 0, 8, 3, *values.shape) + values.tobytes()
        file = tmp_path / "train-images-idx3-ubyte.gz"
        file.write_bytes(gzip.compress(content))
        images = open_images(f"fashion-mnist:{tmp_path}")
        assert len(images) == 5
        pixels = images.load(2, PreprocessingSpec(28, 28))
        np.testing.assert_array_equal(pixels, np.repeat(values[2][:, :, None], 3, axis=2))
        file.write_bytes(gzip.compress(content[:-3]))
        with pytest.raises(DataError, match="does not hold the 5 images of its header"):
            open_images(f"fashion-mnist:{tmp_path}")
        file.write_bytes(gzip.compress(content)[:-9])
        with pytest.raises(DataError, match="is truncated or corrupt"):
            open_images(f"fashion-mnist:{tmp_path}")
        file.write_bytes(gzip.compress(b"hello"))
        with pytest.raises(DataError, match="is no IDX file of images"):
            open_images(f"fashion-mnist:{tmp_path}")
        file.unlink()
        with pytest.raises(DataError, match="holds neither train-images"):
            open_images(f"fashion-mnist:{tmp_path}")

    def test_the_same_pixels_as_in_training(self, tmp_path):
        """Two readers of one format must not drift apart."""
        from admth_training.data import open_dataset

        folder = Path(__file__).parents[2] / "examples" / "fashion-mnist-mini"
        ours, theirs = open_images(f"fashion-mnist:{folder}"), open_dataset(f"fashion-mnist:{folder}")
        spec = PreprocessingSpec(32, 32)
        assert len(ours) == len(theirs.official_splits.train)
        for index in (0, 17, len(ours) - 1):
            np.testing.assert_array_equal(ours.load(index, spec), theirs.load(index, spec))

    @pytest.mark.parametrize("spec", ["pictures", "zip:pictures", "folder:", "folder: "])
    def test_specifications_that_name_nothing(self, spec):
        with pytest.raises(InputError, match="names no images: write kind:path, one of folder:DIR, list:FILE"):
            open_images(spec)

    def test_paths_that_are_nothing(self, tmp_path):
        with pytest.raises(DataError, match="does not exist: pass a folder of images"):
            open_images(f"folder:{tmp_path / 'no'}")
        with pytest.raises(InputError, match="no images in"):
            open_images(f"folder:{tmp_path}")
        with pytest.raises(DataError, match="cannot be read"):
            open_images(f"list:{tmp_path / 'no.txt'}")
        with pytest.raises(InputError, match="--root and --strip-prefix mean nothing"):
            open_images(f"folder:{tmp_path}", root=tmp_path)


class TestCommand:
    def test_the_bare_command_works_beside_a_model(self, cnnf, pictures, tmp_path):
        shutil.copy(cnnf, tmp_path / "model.onnx")
        done = run_cli("--data", f"folder:{pictures}", "--target", "trt", "--check-images", 8, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        lines = done.stdout.splitlines()
        assert lines[0] == "10 layers in INT8, 2 with weights in FP32, ranges of 128 images"
        assert "predicted parity with the FP32 model, on 8 images on the CPU" in lines[1]
        assert lines[-2].startswith("wrote model.int8.trt.onnx (")
        assert lines[-1] == "next: admth-export trt model.int8.trt.onnx --int8"

    def test_json(self, cnnf, pictures, tmp_path):
        out = tmp_path / "m.onnx"
        words = [
            cnnf,
            "--data",
            f"folder:{pictures}",
            "--images",
            128,
            "--check-images",
            4,
            "--keep-fp32",
            "trunk.conv1",
        ]
        done = run_cli(*words, "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        fields = json.loads(done.stdout)
        assert fields["model"] == str(out)
        assert fields["sha256"] == sha256_of_file(out)
        assert "trunk.conv1" in fields["kept"]
        assert fields["calibration"]["predicted"]["images"] == 4

    def test_help_imports_nothing_heavy(self):
        program = (
            "import atexit, sys\n"
            "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'PIL'}\n"
            "atexit.register(lambda: print('LOADED', sorted(heavy & set(sys.modules))))\n"
            "from admth_calibration.cli import main\n"
            "main()\n"
        )
        for word in ("--help", "--version"):
            done = subprocess.run([sys.executable, "-c", program, word], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert "LOADED []" in done.stdout

    def test_bad_input(self, cnnf, pictures, tmp_path):
        data = ("--data", f"folder:{pictures}")
        fails(run_cli(cnnf), "--data")
        fails(run_cli(cnnf, *data, "--target", "cpu"), "target 'cpu' is unknown: use trt")
        fails(run_cli(cnnf, *data, "--images", 100), "images 100 is not an integer from 128")
        fails(run_cli(cnnf, "--data", "folder:/no/such"), "/no/such does not exist")
        fails(run_cli(tmp_path / "absent.onnx", *data), "no such model file")
        fails(run_cli(*data, cwd=tmp_path), "model.onnx: no such model file")
        fails(run_cli(cnnf, *data, "--out", tmp_path / "m.bin"), "a model's name ends with .onnx")
        fails(run_cli(cnnf, *data, "--out", tmp_path / "no" / "m.onnx"), "its folder does not exist")
        fails(run_cli(cnnf, *data, "--out", cnnf), "it is the model itself")
        fails(run_cli(cnnf, *data, "--keep-fp32", "trunk.conv9", "--out", tmp_path / "m.onnx"), "matches no layer")
        assert list(tmp_path.iterdir()) == []
