"""``admth-run`` as its users meet it: through real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from _tiny_model import LENGTHS, save_tiny_model, tiny_manifest, tiny_model
from onnx import TensorProto, helper
from PIL import Image

from admth_runtime import HashIndex, HashRuntime, read_codes


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "admth_runtime", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=cwd, env={**os.environ, **environment}
    )


def succeeds(*arguments: object, **options) -> subprocess.CompletedProcess:
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done


def fails(message: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """The last line of standard error is the one error, there is no traceback, and the exit code is 1."""
    done = run(*arguments, **options)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert message in lines[-1]
    return done


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model, thirty pictures, and their codes in both formats."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "model.onnx")
    (folder / "pictures" / "sub").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(30):
        place = folder / "pictures" / ("sub" if number % 3 == 0 else ".")
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(place / f"{number:02}.png")
    for suffix in ("npz", "parquet"):
        succeeds("encode", "pictures", "--out", f"codes.{suffix}", cwd=folder)
    return folder


class TestHelp:
    @pytest.mark.parametrize("command", [(), ("encode",), ("search",), ("info",), ("doctor",), ("bench",), ("stream",)])
    def test_help_is_instant_and_imports_nothing_heavy(self, command):
        script = (
            "import sys\nfrom admth_runtime.cli import main\n"
            "sys.argv[0] = 'admth-run'\n"
            "try:\n    main()\nfinally:\n"
            "    heavy = {'numpy', 'PIL', 'onnxruntime', 'torch', 'onnx', 'pyarrow'} & set(sys.modules)\n"
            "    assert not heavy, heavy\n"
        )
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script, *command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Usage: admth-run")
        assert time.perf_counter() - start < 5

    def test_without_arguments_the_help_is_shown(self):
        assert "Commands:" in run().stdout

    def test_the_console_script_is_installed(self):
        script = Path(sys.executable).with_name("admth-run")
        done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("admth ")


class TestEncode:
    @pytest.mark.parametrize("suffix", ["npz", "parquet"])
    def test_the_file_holds_the_runtimes_codes(self, home, suffix):
        encoded = read_codes(home / f"codes.{suffix}")
        assert len(encoded) == 30
        assert encoded.uris[0] == "pictures/01.png"
        assert encoded.uris[-1] == "pictures/sub/27.png"
        with HashRuntime(home / "model.onnx", threads=1) as runtime:
            codes = runtime.encode([home / uri for uri in encoded.uris])
            assert encoded.model_sha256 == runtime.model_sha256
        for length in LENGTHS:
            assert np.array_equal(encoded.codes[length], codes[length])
        assert not (home / f"codes.{suffix}.errors.json").exists()

    def test_what_it_prints(self, home, tmp_path):
        done = succeeds("encode", home / "pictures", "-m", home / "model.onnx", "-o", tmp_path / "c.npz")
        wrote, following = done.stdout.splitlines()
        assert wrote.startswith(f"wrote {tmp_path / 'c.npz'}: 30 images, codes of 16, 32, 48 and 64 bits")
        assert following.startswith("next:  admth-run search")
        assert done.stderr == ""  # no progress bar where there is no terminal

    def test_json_logits_batch_threads_and_one_folder_deep(self, home, tmp_path):
        out = tmp_path / "c.parquet"
        done = succeeds(
            "encode", "pictures", "--out", out, "--logits", "--batch", 7, "--threads", 1, "--no-recursive",
            "--device", "cpu", "--json", cwd=home,
        )  # fmt: skip
        facts = json.loads(done.stdout)
        assert facts["images"] == 20
        assert facts["unreadable"] == 0
        assert facts["errors_file"] is None
        assert facts["code_lengths"] == list(LENGTHS)
        encoded = read_codes(out)
        assert np.array_equal(np.packbits(encoded.codes.logits[48] > 0, axis=1), encoded.codes[48])

    def test_unreadable_images_are_listed_on_stderr_and_in_a_file(self, home, tmp_path):
        bad = tmp_path / "bad.jpg"
        bad.write_bytes(b"")
        out = tmp_path / "c.npz"
        done = succeeds("encode", home / "pictures", bad, "-m", home / "model.onnx", "-o", out, "--max-error-rate", 0.1)
        assert f"unreadable: {bad}: is empty" in done.stderr
        errors = tmp_path / "c.npz.errors.json"
        assert json.loads(errors.read_text()) == [{"path": str(bad), "reason": "is empty"}]
        assert len(read_codes(out)) == 30
        succeeds("encode", home / "pictures", "-m", home / "model.onnx", "-o", out)
        assert not errors.exists()  # a later run without errors does not leave the old list

    def test_too_many_unreadable_images_write_nothing(self, home, tmp_path):
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        Image.new("RGB", (9, 9)).save(pictures / "good.png")
        (pictures / "bad.jpg").write_bytes(b"text")
        done = fails("1 of 2 images cannot be read, more than --max-error-rate 0.01",
                     "encode", pictures, "-m", home / "model.onnx", "-o", tmp_path / "c.npz")  # fmt: skip
        assert "unreadable: " in done.stderr.splitlines()[0]
        (pictures / "good.png").unlink()
        fails("nothing to encode", "encode", pictures, "-m", home / "model.onnx", "-o", tmp_path / "c.npz",
              "--max-error-rate", 1)  # fmt: skip
        assert listing(tmp_path) == ["pictures", "pictures/bad.jpg"]

    def test_from_another_folder(self, home, tmp_path):
        relative = os.path.relpath(home, tmp_path)
        succeeds("encode", f"{relative}/pictures", "-m", f"{relative}/model.onnx", "-o", "c.npz", cwd=tmp_path)
        assert read_codes(tmp_path / "c.npz").uris[0] == f"{relative}/pictures/01.png"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("pictures", "-m", "none.onnx"), "none.onnx: no such model file; make one with  admth-export onnx"),
            (("none", ), "none: no such file or folder"),
            (("empty", ), "no images in empty"),
            (("pictures", "-o", "codes.csv"), "give the file one of these endings"),
            (("pictures", "-o", "none/codes.npz"), "cannot write none/codes.npz: its folder does not exist"),
            (("pictures", "-o", "folder.npz"), "cannot write folder.npz: it is a folder"),
            (("pictures", "--batch", "0"), "batch_size 0"),
            (("pictures", "--threads", "0"), "threads 0"),
            (("pictures", "--device", "tpu"), "device 'tpu' is unknown"),
            (("pictures", "--max-error-rate", "2"), "max_error_rate 2.0 is not between 0 and 1"),
            (("pictures", "--batch", "many"), "Invalid value for '--batch'"),
            ((), "Missing argument"),
        ],
    )  # fmt: skip
    def test_bad_arguments(self, home, tmp_path, arguments, message):
        for name in ("pictures", "model.onnx"):
            (tmp_path / name).symlink_to(home / name)
        for name in ("empty", "folder.npz"):
            (tmp_path / name).mkdir()
        fails(message, "encode", *arguments, cwd=tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "folder.npz", "model.onnx", "pictures"]

    def test_cuda_without_a_gpu(self, home, tmp_path):
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has CUDA")
        fails("device 'cuda' cannot be had", "encode", home / "pictures", "-m", home / "model.onnx",
              "-o", tmp_path / "c.npz", "--device", "cuda")  # fmt: skip

    def test_a_full_disk_leaves_nothing(self, home, tmp_path):
        script = (
            "import resource, signal, sys\nfrom admth_runtime.cli import main\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\nmain()\n"
        )
        arguments = ["encode", str(home / "pictures"), "-m", str(home / "model.onnx"), "-o", str(tmp_path / "c.npz")]
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: cannot write {tmp_path / 'c.npz'}: ")
        assert listing(tmp_path) == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_interruption_leaves_nothing(self, home, tmp_path, number):
        """Four hundred names of one large picture take far longer to decode than the test waits."""
        large = tmp_path / "large"
        large.mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
        Image.fromarray(noise).save(large / "0.png", compress_level=1)
        for copy in range(1, 400):
            (large / f"{copy}.png").hardlink_to(large / "0.png")
        out = tmp_path / "out"
        out.mkdir()
        command = [sys.executable, "-m", "admth_runtime", "encode", str(large)]
        process = subprocess.Popen([*command, "-m", str(home / "model.onnx"), "-o", str(out / "c.npz")],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert errors == "error: interrupted: nothing half-written was left behind\n"
        assert output == ""
        assert listing(out) == []


class TestBadModels:
    """Every kind of model that must be refused, through the command that would load it."""

    def check(self, tmp_path, content: bytes | None, message: str, name: str = "m.onnx") -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        picture = tmp_path / "a.png"
        Image.new("RGB", (9, 9)).save(picture)
        fails(message, "encode", picture, "-m", path, "-o", tmp_path / "c.npz")
        fails(message, "info", path)
        assert not (tmp_path / "c.npz").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "no such model file"),
            (b"", "is empty"),
            (b"no model at all, but text", "is not an ONNX model"),
            (tiny_model().SerializeToString()[:9000], "is truncated or damaged"),
            (tiny_model(manifest="").SerializeToString(), "has no admth manifest"),
            (tiny_model(manifest=tiny_manifest((16,))).SerializeToString(), "has ['code_32', 'code_48'"),
            (
                tiny_model(manifest=tiny_manifest().to_json().replace('"format_version": 1', '"format_version": 2'))
                .SerializeToString(),
                "format version 2 is newer than 1",
            ),
        ],
    )  # fmt: skip
    def test_files_and_manifests(self, tmp_path, content, message):
        self.check(tmp_path, content, message)

    def test_external_data(self, tmp_path):
        model = tiny_model()
        tensor = TensorProto(name="w", data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="weights.bin")
        model.graph.initializer.append(tensor)
        self.check(tmp_path, model.SerializeToString(), "keeps data in another file")

    def test_unknown_domain(self, tmp_path):
        model = tiny_model()
        model.graph.node.append(helper.make_node("Run", [], ["k"], domain="evil.ops"))
        self.check(tmp_path, model.SerializeToString(), "unknown domain 'evil.ops'")

    def test_tensorrt_engines(self, tmp_path):
        self.check(tmp_path, b"ftrt" + bytes(60), "has no sidecar m.fp16.plan.json", name="m.fp16.plan")
        self.check(tmp_path, b"ftrt", "cut off after 4 bytes", name="m.fp16.plan")


class TestSearch:
    def test_a_picture_finds_itself(self, home):
        done = succeeds("search", "pictures/07.png", "--index", "codes.npz", "-k", 3, cwd=home)
        title, head, first, *rest = done.stdout.splitlines()
        assert title == "nearest of 30 images at 64 bits"
        assert head.split() == ["rank", "distance", "uri"]
        assert first.split() == ["1", "0", "pictures/07.png"]
        assert len(rest) == 2

    @pytest.mark.parametrize("suffix", ["npz", "parquet"])
    @pytest.mark.parametrize("length", LENGTHS)
    def test_json_equals_the_index(self, home, suffix, length):
        index = HashIndex.load(home / f"codes.{suffix}")
        with HashRuntime(home / "model.onnx", threads=1) as runtime:
            code = runtime.encode(home / "pictures" / "08.png")[length]
        hits = index.search(code, 5)
        done = succeeds("search", "pictures/08.png", "-i", f"codes.{suffix}", "--length", length, "-k", 5, "--json",
                        cwd=home)  # fmt: skip
        found = json.loads(done.stdout)
        assert found["length"] == length
        assert found["code"] == code.tobytes().hex()
        assert [hit["id"] for hit in found["hits"]] == hits.ids[0].tolist()
        assert [hit["distance"] for hit in found["hits"]] == hits.distances[0].tolist()
        assert [hit["uri"] for hit in found["hits"]] == index.uris_of(hits.ids[0])

    def test_a_code_needs_no_model(self, home, tmp_path):
        code = read_codes(home / "codes.npz").codes.hex(32)[4]
        done = succeeds("search", code.upper(), "-i", home / "codes.npz", "-k", 1, cwd=tmp_path)
        assert done.stdout.splitlines()[-1].split() == ["1", "0", read_codes(home / "codes.npz").uris[4]]

    def test_k_beyond_the_index_is_capped_with_a_note(self, home):
        done = succeeds("search", "00" * 8, "-i", "codes.npz", "-k", 99, "--json", cwd=home)
        assert "note: codes.npz holds 30 images, fewer than -k 99" in done.stderr
        assert len(json.loads(done.stdout)["hits"]) == 30

    def test_codes_of_another_model_are_refused(self, home, tmp_path):
        other = save_tiny_model(tmp_path / "other.onnx", seed=1)
        fails(
            "encode the images again with this model",
            "search",
            "pictures/01.png",
            "-i",
            "codes.npz",
            "-m",
            other,
            cwd=home,
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ("pictures/01.png", "-i", "codes.npz", "--length", "12"),
                "code length 12 is not there: this model or file has",
            ),
            (("pictures/01.png", "-i", "none.npz"), "none.npz: no such file"),
            (("pictures/01.png", "-i", "model.onnx"), "give the file one of these endings"),
            (("pictures/01.png",), "Missing option '--index'"),
            (("pictures/01.png", "-i", "codes.npz", "-k", "0"), "-k 0 is less than 1"),
            (("none.png", "-i", "codes.npz"), "none.png: no such image file"),
            (("pictures", "-i", "codes.npz"), "is a folder, not an image"),
            (("model.onnx", "-i", "codes.npz"), "model.onnx: is not an image"),
            (("0012ab", "-i", "codes.npz"), "code length 24 is not there"),
            (("0012", "-i", "codes.npz", "--length", "64"), "the code 0012 has 16 bits, not --length 64"),
            (("001", "-i", "codes.npz"), "not a code in hexadecimal"),
        ],
    )
    def test_bad_arguments(self, home, arguments, message):
        fails(message, "search", *arguments, cwd=home)

    @pytest.mark.parametrize("suffix", ["npz", "parquet"])
    def test_a_damaged_index(self, home, tmp_path, suffix):
        whole = (home / f"codes.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
        fails("is damaged or", "search", "00" * 8, "-i", tmp_path / f"cut.{suffix}")


class TestInfo:
    def test_a_model(self, home):
        facts = json.loads(succeeds("info", home / "model.onnx", "--json").stdout)
        assert facts["code_lengths"] == list(LENGTHS)
        assert facts["preprocessing"]["height"] == 12
        assert facts["precision"] == "fp32"
        assert facts["checkpoint_sha256"] == "ab" * 32
        assert facts["parity"] is None
        assert facts["inputs"] == ["images: uint8 [batch, 12, 12, 3]"]
        assert facts["operators"]["Gemm"] == 4
        with HashRuntime(home / "model.onnx", threads=1) as runtime:
            assert facts["sha256"] == runtime.model_sha256
        text = succeeds("info", home / "model.onnx").stdout
        assert "code lengths" in text
        assert "16, 32, 48, 64" in text

    @pytest.mark.parametrize("suffix", ["npz", "parquet"])
    def test_a_file_of_codes(self, home, suffix):
        facts = json.loads(succeeds("info", home / f"codes.{suffix}", "--json").stdout)
        assert facts["images"] == 30
        assert facts["code_lengths"] == list(LENGTHS)
        assert facts["logits"] is False
        fails("no such file", "info", f"none.{suffix}")


class TestDoctor:
    def test_a_machine_that_works(self):
        facts = json.loads(succeeds("doctor", "--json").stdout)
        assert facts["engine_works"] is True
        assert facts["cores"] >= 1
        text = succeeds("doctor").stdout
        assert text.splitlines()[-1] == "ready: an engine ran a model just now"

    def test_a_machine_without_an_engine(self, tmp_path):
        (tmp_path / "onnxruntime.py").write_text("raise ImportError('broken')")
        done = run("doctor", PYTHONPATH=str(tmp_path))
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "advice: no engine works: run  pip install" in done.stdout
        assert done.stdout.splitlines()[-1] == "not ready: no engine works"

    def test_encode_without_an_engine_names_the_extra(self, home, tmp_path):
        (tmp_path / "onnxruntime.py").write_text("raise ImportError('broken')")
        fails(
            "pip install 'admth[cpu]'",
            "encode",
            "pictures",
            "-o",
            tmp_path / "c.npz",
            cwd=home,
            PYTHONPATH=str(tmp_path),
        )


class TestBench:
    def test_generated_pictures(self, home, tmp_path):
        picture = tmp_path / "bench.svg"
        done = succeeds(
            "bench", "model.onnx", "--queries", 5, "--warmup", 1, "--samples", 6, "--batch", 2, "--threads", 1,
            "--picture", picture, "--json", cwd=home,
        )  # fmt: skip
        facts = json.loads(done.stdout)
        assert facts["pictures"] == "generated JPEGs of 640x480"
        assert (facts["batch"], facts["queries"], facts["warmup"], facts["threads"]) == (2, 5, 1, 1)
        assert facts["engine"].startswith("onnxruntime ")
        assert {"admth", "python", "numpy", "pillow"} <= set(facts["versions"])
        assert facts["cpu"]
        assert set(facts["milliseconds"]) == {"decode", "preprocess", "inference", "end_to_end"}
        assert all(0 < stage["p50"] <= stage["p90"] <= stage["p99"] for stage in facts["milliseconds"].values())
        assert facts["single_stream"]["conforms"] is False
        assert facts["single_stream"]["p90_milliseconds"] == facts["milliseconds"]["end_to_end"]["p90"]
        assert (facts["offline"]["samples"], facts["offline"]["batch"]) == (6, 2)
        assert set(facts["offline"]["images_per_second"]) == set(facts["milliseconds"])
        assert facts["images_per_second"] == facts["offline"]["images_per_second"]["end_to_end"]
        assert picture.read_text().startswith("<svg ")

    def test_own_pictures(self, home):
        done = succeeds("bench", "model.onnx", "pictures", "--queries", 3, "--warmup", 0, "--samples", 0, cwd=home)
        assert "30 files" in done.stdout
        assert "3 queries of one image; not conforming, since MLPerf asks for 1,024 or more" in done.stdout
        assert "offline" not in done.stdout

    def test_bad_arguments(self, home, tmp_path):
        fails("--queries 0 is less than 1", "bench", "model.onnx", "--queries", 0, cwd=home)
        fails("--samples -1 is less than 0", "bench", "model.onnx", "--samples", -1, cwd=home)
        fails("no such model file", "bench", "none.onnx", cwd=home)
        fails("name it a.svg", "bench", "model.onnx", "--picture", "a.png", cwd=home)
        fails("its folder does not exist", "bench", "model.onnx", "--picture", "none/a.svg", cwd=home)
