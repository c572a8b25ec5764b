from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from _tiny_model import LENGTHS, SIZE, expected_logits, save_tiny_model, tiny_manifest, tiny_model
from PIL import Image

from admth_runtime import DeviceError, HashRuntime, ImageError, InputError, ManifestError, ModelError, preprocess
from admth_runtime import engine as engine_module
from admth_runtime.cpu import usable_cores
from admth_runtime.errors import MissingExtraError


@pytest.fixture
def runtime(tiny_path):
    with HashRuntime(tiny_path, threads=1) as opened:
        yield opened


def same(a, b) -> bool:
    return a.code_lengths == b.code_lengths and all(np.array_equal(a[length], b[length]) for length in a)


def test_the_tiny_model_is_a_valid_deployed_graph():
    onnx.checker.check_model(tiny_model(), full_check=True)


def test_codes_and_logits_are_the_networks(runtime, pixels):
    codes = runtime.encode(pixels)
    assert codes.code_lengths == LENGTHS
    assert codes.count == len(pixels)
    for length in LENGTHS:
        expected = expected_logits(pixels, length)
        assert codes.logits[length].dtype == np.float32
        np.testing.assert_allclose(codes.logits[length], expected, rtol=1e-4, atol=1e-2)
        assert codes[length].dtype == np.uint8
        assert codes[length].flags.c_contiguous
        assert np.array_equal(codes[length], np.packbits(codes.logits[length] > 0, axis=1))


def test_facts(runtime, tiny_path):
    assert runtime.manifest == tiny_manifest()
    assert runtime.code_lengths == LENGTHS
    assert (runtime.device, runtime.threads, runtime.batch_size) == ("cpu", 1, 32)
    assert (runtime.engine.name, runtime.engine.version) == ("onnxruntime", onnxruntime.__version__)
    assert runtime.model_path == tiny_path
    assert runtime.model_sha256 == hashlib.sha256(tiny_path.read_bytes()).hexdigest()
    assert "onnxruntime on cpu" in repr(runtime)


def test_every_kind_of_images_gives_the_same_codes(runtime, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 31, 40, 3), dtype=np.uint8)
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(picture).save(paths[-1])
    expected = runtime.encode_pixels(np.stack([preprocess(p, runtime.manifest.preprocessing) for p in pictures]))
    kinds = [
        pictures,
        list(pictures),
        tuple(pictures),
        iter(pictures),
        (picture for picture in pictures),
        paths,
        [str(path) for path in paths],
        np.array([str(path) for path in paths]),
        [Image.fromarray(picture) for picture in pictures],
        [paths[0], pictures[1], Image.open(paths[2]), str(paths[3]), pictures[4]],
        np.ascontiguousarray(pictures[:, ::-1])[:, ::-1],
        runtime.preprocess(pictures),
        runtime.preprocess(paths),
    ]
    for images in kinds:
        assert same(runtime.encode(images), expected)
    for one in (pictures[0], paths[0], str(paths[0]), Image.fromarray(pictures[0])):
        assert np.array_equal(runtime.encode(one)[64], expected[64][:1])


def test_an_array_of_the_networks_size_passes_untouched_even_with_a_crop(tmp_path, pixels):
    from admth_runtime import PreprocessingSpec

    manifest = tiny_manifest(preprocessing=PreprocessingSpec(SIZE, SIZE, crop_fraction=0.5))
    with HashRuntime(save_tiny_model(tmp_path / "m.onnx", manifest=manifest), threads=1) as cropped:
        whole = cropped.encode(pixels)
        assert same(cropped.encode(list(pixels)), whole)
        assert same(cropped.encode_pixels(pixels), whole)


@pytest.mark.parametrize("batch_size", [1, 7, 70, 1000])
def test_batches_do_not_change_the_codes(tiny_path, runtime, pixels, batch_size):
    expected = runtime.encode(pixels)
    with HashRuntime(tiny_path, threads=1, batch_size=batch_size) as other:
        assert same(other.encode(pixels), expected)
        assert same(other.encode(list(pixels)), expected)
        assert np.array_equal(other.preprocess(list(pixels)), pixels)


def test_generators_are_consumed_a_batch_at_a_time(tiny_path, pixels, monkeypatch):
    taken, seen = [], []
    with HashRuntime(tiny_path, threads=1, batch_size=4) as opened:
        run = opened.engine.run
        monkeypatch.setattr(opened.engine, "run", lambda batch: (seen.append((len(batch), len(taken))), run(batch))[1])
        opened.encode(taken.append(1) or picture for picture in pixels[:10])
    assert seen == [(4, 4), (4, 8), (2, 10)]


def test_arrays_that_are_not_contiguous(runtime, pixels):
    turned = np.asfortranarray(pixels)
    assert not turned.flags.c_contiguous
    assert same(runtime.encode(turned), runtime.encode(pixels))
    assert same(runtime.encode(pixels[::2]), runtime.encode(pixels[::2].copy()))


@pytest.mark.parametrize(
    "nothing", [[], (), iter([]), np.empty((0, SIZE, SIZE, 3), np.uint8), np.empty((0, 5, 5, 3), np.uint8)]
)
def test_zero_images_are_refused(runtime, nothing):
    with pytest.raises(InputError, match="no images were given"):
        runtime.encode(nothing)


def test_zero_pixels_are_refused(runtime):
    with pytest.raises(InputError, match="no images were given"):
        runtime.encode_pixels(np.empty((0, SIZE, SIZE, 3), np.uint8))
    with pytest.raises(InputError, match="no images were given"):
        runtime.preprocess([])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, SIZE, SIZE, 3), np.float32), "image 0: .* float32 is not uint8"),
        (np.zeros((2, 3, SIZE, SIZE), np.uint8), r"channels first: use images.transpose\(0, 2, 3, 1\)"),
        (np.zeros((3, SIZE, SIZE), np.uint8), "channels first"),
        (np.zeros((SIZE, SIZE), np.uint8), "is gray"),
        (np.zeros((2, SIZE, SIZE, 4), np.uint8), "alpha channel"),
        (np.zeros((1, 1, SIZE, SIZE, 3), np.uint8), r"not \[height, width, 3\]"),
        (np.uint8(3), "shape|unknown"),
        (b"\x89PNG", "encoded bytes"),
        (5, "type int"),
        (None, "type NoneType"),
        ([np.zeros((4, 4, 3), np.uint8), 7], "image 1: .* type int"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)], "image 1: .* is gray"),
    ],
)
def test_wrong_images_are_answered_with_the_mend(runtime, images, message):
    with pytest.raises(InputError, match=message) as caught:
        runtime.encode(images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pixels", [np.zeros((1, SIZE, SIZE, 3)), np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((1, 9, 9, 3), np.uint8), [1]]
)
def test_wrong_pixels_are_refused(runtime, pixels):
    with pytest.raises(InputError, match=r"not a uint8 array \[n, 12, 12, 3\]"):
        runtime.encode_pixels(pixels)


def test_an_unreadable_file_is_named(runtime, tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
        runtime.encode([tmp_path / "none.jpg"])
    with pytest.raises(ImageError, match="image 0: a floating-point picture"):
        runtime.encode([Image.fromarray(np.zeros((3, 3), np.float32))])


def test_a_closed_runtime_says_so(tiny_path, pixels):
    opened = HashRuntime(tiny_path, threads=1)
    engine = opened.engine
    opened.close()
    opened.close()
    for call in (lambda: opened.encode(pixels), lambda: opened.encode_pixels(pixels), lambda: opened.threads):
        with pytest.raises(InputError, match="is closed: open the model again"):
            call()
    with pytest.raises(InputError, match="closed"):
        engine.run(pixels)
    assert opened.code_lengths == LENGTHS
    assert "closed" in repr(opened)


def test_many_threads_share_one_runtime(runtime, pixels):
    expected = runtime.encode(pixels)
    barrier = threading.Barrier(6)

    def work(_: int) -> bool:
        barrier.wait()
        return all(same(runtime.encode(pixels), expected) for _ in range(10))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_closing_while_others_encode_gives_codes_or_the_closed_error(tiny_path, pixels):
    opened = HashRuntime(tiny_path, threads=1)
    expected = opened.encode(pixels)
    outcomes = []

    def work() -> None:
        try:
            while True:
                assert same(opened.encode(pixels), expected)
        except InputError as error:
            outcomes.append("closed" in str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    opened.close()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device 'gpu' is unknown: use one of auto, cpu, cuda"),
        ({"threads": 0}, "threads 0"),
        ({"threads": 1.5}, "threads 1.5"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": "8"}, "batch_size '8'"),
    ],
)
def test_arguments_out_of_range(tiny_path, arguments, message):
    with pytest.raises(InputError, match=message):
        HashRuntime(tiny_path, **arguments)


def test_threads_default_to_the_usable_cores(tiny_path):
    with HashRuntime(tiny_path) as opened:
        assert opened.threads == usable_cores()


def test_models_that_are_not_ours(tmp_path):
    with pytest.raises(ModelError, match="no such model file"):
        HashRuntime(tmp_path / "none.onnx")
    with pytest.raises(ManifestError, match="no admth manifest"):
        HashRuntime(save_tiny_model(tmp_path / "bare.onnx", manifest=""))


def test_a_graph_that_the_engine_refuses(tmp_path):
    broken = tiny_model()
    broken.graph.node[0].op_type = "NoSuchOperator"
    (tmp_path / "a.onnx").write_bytes(broken.SerializeToString())
    with pytest.raises(ModelError, match=r"a\.onnx: onnxruntime .* refuses the model \(.*NoSuchOperator") as caught:
        HashRuntime(tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    newer = tiny_model()
    newer.ir_version = 99
    (tmp_path / "b.onnx").write_bytes(newer.SerializeToString())
    with pytest.raises(ModelError, match=r"\(Unsupported model IR version: 99.*pip install -U onnxruntime"):
        HashRuntime(tmp_path / "b.onnx")


def test_a_failing_run_is_one_line(runtime, monkeypatch, pixels):
    def fail(*_):
        raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(
            "[ONNXRuntimeError] : 6 : X : out of\nmemory"
        )

    monkeypatch.setattr(runtime.engine, "_session", SimpleNamespace(run=fail))
    with pytest.raises(DeviceError, match=r"failed on a batch of 32 .*out of"):
        runtime.encode(pixels)


class TestDevices:
    @pytest.mark.usefixtures("cuda_wheel")
    def test_a_driver_that_is_too_old(self, tiny_path, monkeypatch):
        message = (
            "/src/cuda_call.cc:129 std::conditional_t<THRW, void, Status> CudaCall(ERRTYPE, const char*, int) [with "
            "ERRTYPE = cudaError; bool THRW = true] CUDA failure 35: CUDA driver version is insufficient ; GPU=0"
        )

        def fail(*_, **__):
            raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(message)

        monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
        with pytest.raises(DeviceError, match="'cuda' cannot be had: CUDA failure 35: CUDA driver version is insuff"):
            HashRuntime(tiny_path, device="cuda")

    @pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has a CUDA engine")
    def test_cuda_that_cannot_be_had_raises_and_auto_takes_the_cpu(self, tiny_path):
        with pytest.raises(DeviceError, match=r"device 'cuda' cannot be had: .*pip install 'admth\[gpu\]'"):
            HashRuntime(tiny_path, device="cuda")
        with HashRuntime(tiny_path, device="auto", threads=1) as opened:
            assert opened.device == "cpu"

    @pytest.fixture
    def cuda_wheel(self, monkeypatch):
        """What onnxruntime-gpu does on a machine without a GPU: CUDA is offered, warned about, and left out."""
        real = onnxruntime.InferenceSession
        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
        )
        monkeypatch.setattr(
            onnxruntime,
            "InferenceSession",
            lambda path, options, providers, **more: real(path, options, providers=providers[-1:], **more),
        )

    @pytest.mark.usefixtures("cuda_wheel")
    def test_a_provider_that_does_not_start_raises_or_falls_back_once(self, tiny_path, caplog, pixels):
        with pytest.raises(DeviceError, match="started only CPUExecutionProvider"):
            HashRuntime(tiny_path, device="cuda")
        with caplog.at_level(logging.WARNING), HashRuntime(tiny_path, device="auto", threads=1) as opened:
            opened.encode(pixels)
            opened.encode(pixels)
        assert opened._engine is None
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "running on the CPU instead" in caplog.text


def test_without_an_engine_the_extra_is_named(tiny_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"running a model needs .*pip install 'admth\[cpu\]'"):
        HashRuntime(tiny_path)


def test_the_programs_floating_point_mode_is_left_alone(tiny_path, pixels):
    tiny = np.array([1e-40], np.float32)
    with HashRuntime(tiny_path, threads=1) as opened:
        opened.encode(pixels)
        assert (tiny * np.float32(0.5))[0] > 0
    assert engine_module.DEVICES == ("auto", "cpu", "cuda")


def test_imports_are_lazy(tiny_path):
    script = (
        "import sys\nimport admth_runtime\n"
        "assert not {'numpy', 'PIL', 'typer', 'onnxruntime', 'torch'} & set(sys.modules), 'import admth_runtime'\n"
        "from admth_runtime import HashRuntime\n"
        "assert not {'typer', 'onnxruntime', 'torch', 'onnx', 'pyarrow'} & set(sys.modules), 'HashRuntime'\n"
        "HashRuntime(sys.argv[1]).close()\n"
        "assert 'onnxruntime' in sys.modules\n"
        "assert not {'typer', 'torch', 'onnx', 'pyarrow', 'rich'} & set(sys.modules), 'a runtime'\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tiny_path)], check=True)
