"""The TensorRT backend's own logic, on a double of TensorRT and CUDA that executes the model with ONNX Runtime."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from _cuda_double import CUresult, Machine
from _tensorrt_double import CudaGraphStrategy, assert_clean, engine_bytes, install, save_engine
from _tiny_model import LENGTHS, SIZE

from admth_runtime import DeviceError, HashRuntime, InputError, ManifestError, ModelError, read_model
from admth_runtime.engines.lane import LaneSpec, TensorSpec
from admth_runtime.errors import CodeLengthError, MissingExtraError
from admth_runtime.sidecar import BatchProfile

FLAVOURS = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
def gpu(monkeypatch, machine):
    install(monkeypatch, machine, "tensorrt", "tensorrt_rtx", pycuda=True)
    yield machine
    assert_clean(machine)


@pytest.fixture(params=FLAVOURS)
def flavour(request):
    return request.param


@pytest.fixture
def engine_path(tmp_path, flavour):
    return save_engine(tmp_path, flavour)


@pytest.fixture(scope="module")
def reference(tiny_path):
    """What ONNX Runtime gives for seventy pictures."""
    pixels = np.random.default_rng(7).integers(0, 256, (70, SIZE, SIZE, 3), dtype=np.uint8)
    with HashRuntime(tiny_path, device="cpu", threads=1) as runtime:
        return runtime.encode(pixels)


def check(codes, reference, rows=slice(None)):
    assert codes.code_lengths == LENGTHS
    for length in LENGTHS:
        assert np.array_equal(codes[length], reference[length][rows])
        # ONNX Runtime's sums depend on the batch in the last bits.
        np.testing.assert_allclose(codes.logits[length], reference.logits[length][rows], rtol=1e-5, atol=1e-3)


@pytest.fixture(params=["bindings", "pycuda"])
def cuda(request, gpu):
    """Each CUDA layer; with pycuda the application lives in a context of its own."""
    if request.param == "pycuda":
        context = sys.modules["pycuda.driver"].Device(0).make_context()
        yield "pycuda"
        gc.collect()
        assert gpu.contexts() == [context._name]
        type(context).pop()
    else:
        yield "bindings"
        assert gpu.contexts() == []


class TestSameBits:
    def test_codes_and_logits_are_onnx_runtimes(self, cuda, engine_path, pixels, reference):
        with HashRuntime(engine_path, cuda=cuda) as runtime:
            check(runtime.encode(pixels), reference)
            check(runtime.encode_pixels(pixels[:1]), reference, slice(0, 1))

    @pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 32, 33, 70])
    def test_every_batch(self, gpu, engine_path, pixels, reference, count):
        with HashRuntime(engine_path, batch_size=64) as runtime:
            check(runtime.encode(pixels[:count]), reference, slice(0, count))
            assert max(gpu.calls["batches"]) <= 16
            assert sum(gpu.calls["batches"]) == count

    def test_a_call_changes_nothing_for_the_next(self, gpu, engine_path, pixels, reference):
        with HashRuntime(engine_path, batch_size=16) as runtime:
            for start, stop in [(0, 16), (16, 17), (17, 33), (5, 9), (5, 9), (5, 9), (9, 13), (60, 70)]:
                check(runtime.encode_pixels(pixels[start:stop]), reference, slice(start, stop))

    def test_results_are_the_callers_own(self, gpu, engine_path, pixels, reference):
        with HashRuntime(engine_path) as runtime:
            first = runtime.encode(pixels[:4])
            runtime.encode(pixels[4:8])
        check(first, reference, slice(0, 4))

    def test_paths_pictures_and_arrays(self, gpu, engine_path, tmp_path, pixels, reference):
        from PIL import Image

        Image.fromarray(pixels[0]).save(tmp_path / "0.png")
        with HashRuntime(engine_path) as runtime:
            codes = runtime.encode([tmp_path / "0.png", Image.fromarray(pixels[1]), pixels[2]])
        check(codes, reference, slice(0, 3))

    def test_pixels_that_are_not_contiguous(self, gpu, engine_path, pixels, reference):
        with HashRuntime(engine_path) as runtime:
            check(runtime.encode(pixels[::2]), reference, slice(None, None, 2))

    def test_facts(self, gpu, engine_path, flavour):
        with HashRuntime(engine_path) as runtime:
            engine = runtime.engine
            assert (engine.name, engine.device, engine.threads) == (FLAVOURS[flavour], "cuda", 1)
            assert engine.version == sys.modules[FLAVOURS[flavour]].__version__
            assert engine.max_batch == 16
            assert runtime.manifest.precision == "fp16"
            assert runtime.model_path == engine_path
            assert len(runtime.model_sha256) == 64
            assert f"{FLAVOURS[flavour]} on cuda" in repr(runtime)


class TestProfiles:
    def test_a_batch_below_the_minimum_is_padded(self, gpu, tmp_path, pixels, reference):
        path = save_engine(tmp_path, profiles=((4, 8, 16),))
        with HashRuntime(path) as runtime:
            check(runtime.encode(pixels[:1]), reference, slice(0, 1))
            check(runtime.encode(pixels[:18]), reference, slice(0, 18))
        assert gpu.calls["batches"] == [4, 16, 4]

    def test_several_profiles(self, gpu, tmp_path, pixels, reference):
        path = save_engine(tmp_path, "tensorrt", profiles=((1, 1, 1), (8, 16, 32)))
        with HashRuntime(path) as runtime:
            for count in (1, 3, 8, 32, 1):
                check(runtime.encode(pixels[:count]), reference, slice(0, count))
        assert gpu.calls["batches"] == [1, 8, 8, 32, 1]

    @pytest.mark.parametrize(
        ("count", "place"),
        [(1, (0, 1)), (2, (0, 2)), (3, (1, 4)), (4, (1, 4)), (8, (1, 8)), (9, (2, 9)), (64, (2, 64))],
    )
    def test_the_tightest_profile_is_taken(self, count, place):
        pixels = TensorSpec("images", np.dtype(np.uint8), (SIZE, SIZE, 3))
        profiles = (BatchProfile(1, 1, 2), BatchProfile(4, 4, 8), BatchProfile(4, 32, 64))
        assert LaneSpec(pixels, (), profiles, False, "m").place(count) == place

    def test_profiles_that_the_sidecar_does_not_say(self, gpu, tmp_path):
        path = save_engine(tmp_path, changes={"profiles": (BatchProfile(1, 8, 32),)})
        with pytest.raises(ModelError, match=r"takes batches of 1-16 \(best 4\) and its sidecar says 1-32 .*run  "):
            HashRuntime(path)


class TestGraphs:
    def test_a_batch_that_comes_again_is_captured_once(self, gpu, tmp_path, pixels, reference):
        with HashRuntime(save_engine(tmp_path, "tensorrt"), concurrency=1) as runtime:
            for _ in range(5):
                check(runtime.encode(pixels[:8]), reference, slice(0, 8))
            assert gpu.calls["execute"] == 2  # once plainly, once into the graph
            assert gpu.calls["cuGraphLaunch"] == 4
            runtime.encode(pixels[:3])
            assert gpu.log.count("graph") == 1  # another shape changes the context, so the graph goes
            for _ in range(3):
                check(runtime.encode(pixels[:8]), reference, slice(0, 8))
            assert gpu.calls["cuStreamBeginCapture"] == 2

    def test_off(self, gpu, tmp_path, pixels):
        with HashRuntime(save_engine(tmp_path, "tensorrt"), cuda_graphs=False) as runtime:
            for _ in range(4):
                runtime.encode(pixels[:8])
        assert "cuStreamBeginCapture" not in gpu.calls
        assert gpu.calls["execute"] == 4

    def test_pycuda_has_none(self, gpu, tmp_path, pixels, reference):
        context = sys.modules["pycuda.driver"].Device(0).make_context()
        with HashRuntime(save_engine(tmp_path, "tensorrt"), cuda="pycuda") as runtime:
            for _ in range(4):
                check(runtime.encode(pixels[:8]), reference, slice(0, 8))
        assert gpu.calls["execute"] == 4
        context.pop()

    @pytest.mark.parametrize(("wanted", "strategy"), [(True, CudaGraphStrategy.WHOLE_GRAPH_CAPTURE), (False, None)])
    def test_rtx_captures_by_itself(self, gpu, tmp_path, pixels, wanted, strategy):
        with HashRuntime(save_engine(tmp_path, "rtx"), cuda_graphs=wanted) as runtime:
            for _ in range(4):
                runtime.encode(pixels[:8])
        assert gpu.calls["strategies"] == [strategy]
        assert "cuStreamBeginCapture" not in gpu.calls

    def test_an_engine_that_cannot_be_captured_runs_plainly(self, gpu, tmp_path, pixels, reference, caplog):
        path = save_engine(tmp_path, "tensorrt", uncapturable=True)
        with caplog.at_level(logging.WARNING), HashRuntime(path) as runtime:
            for _ in range(4):
                check(runtime.encode(pixels[:8]), reference, slice(0, 8))
        assert len(caplog.records) == 1
        assert "CUDA graphs are off" in caplog.text


class TestThreads:
    @pytest.mark.parametrize("concurrency", [1, 3])
    def test_eight_threads(self, cuda, tmp_path, pixels, reference, concurrency):
        context = None
        if cuda == "pycuda":
            context = sys.modules["pycuda.driver"].Context.get_current()
        path = save_engine(tmp_path, "tensorrt")
        with HashRuntime(path, cuda=cuda, concurrency=concurrency, batch_size=16) as runtime:

            def work(seed: int) -> None:
                generator = np.random.default_rng(seed)
                for _ in range(12):
                    start = int(generator.integers(0, 50))
                    stop = start + int(generator.integers(1, 20))
                    check(runtime.encode_pixels(pixels[start:stop]), reference, slice(start, stop))

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(work, range(8)))
        assert context is None or context is sys.modules["pycuda.driver"].Context.get_current()

    def test_no_more_contexts_than_asked_for(self, gpu, tmp_path, pixels):
        with HashRuntime(save_engine(tmp_path), concurrency=2) as runtime:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: runtime.encode(pixels[:8]), range(40)))
            assert 1 <= len(gpu.calls["strategies"]) <= 2
        assert gpu.log.count("context") == len(gpu.calls["strategies"])

    def test_close_waits_for_calls_under_way(self, gpu, tmp_path, pixels):
        runtime = HashRuntime(save_engine(tmp_path))
        closer = threading.Thread(target=runtime.close)
        with runtime.engine._pool.lease():
            closer.start()
            closer.join(0.1)
            assert closer.is_alive()
            assert gpu.allocations
        closer.join(10)
        assert not closer.is_alive()
        assert gpu.allocations == {}
        with pytest.raises(InputError, match="is closed"):
            runtime.encode(pixels)

    def test_a_waiting_caller_learns_that_the_engine_was_closed(self, gpu, tmp_path, pixels):
        runtime = HashRuntime(save_engine(tmp_path), concurrency=1)
        engine, errors = runtime.engine, []

        def call() -> None:
            try:
                engine.run(pixels[:4])
            except InputError as error:
                errors.append(error)

        with engine._pool.lease():
            waiter, closer = threading.Thread(target=call), threading.Thread(target=runtime.close)
            waiter.start()
            time.sleep(0.05)
            closer.start()
            waiter.join(10)
        closer.join(10)
        assert len(errors) == 1
        assert "closed" in str(errors[0])

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_forked_child_is_told(self, gpu, tmp_path, pixels):
        with HashRuntime(save_engine(tmp_path)) as runtime:
            queue = multiprocessing.get_context("fork").Queue()

            def child() -> None:
                try:
                    runtime.encode(pixels[:2])
                except DeviceError as error:
                    queue.put(str(error))
                runtime.close()

            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            assert "before the process was forked" in queue.get(timeout=30)
            process.join(30)
            assert process.exitcode == 0
            runtime.encode(pixels[:2])


class TestRelease:
    def test_order(self, gpu, engine_path, pixels):
        runtime = HashRuntime(engine_path, concurrency=1, cuda_graphs=False)
        engine = runtime.engine
        runtime.encode(pixels)
        assert gpu.log == []
        runtime.close()
        outputs = 2 * len(LENGTHS)
        assert gpu.log == [
            "context", "engine", "runtime",
            *["device memory"] * (outputs + 1), *["pinned memory"] * (outputs + 1), "stream",
        ]  # fmt: skip
        del runtime, engine
        gc.collect()
        assert gpu.log[-1] == "primary"
        assert_clean(gpu)

    def test_closing_twice_is_no_error(self, gpu, engine_path):
        runtime = HashRuntime(engine_path)
        engine = runtime.engine
        runtime.close()
        runtime.close()
        engine.close()

    def test_one_that_is_forgotten_is_closed(self, gpu, engine_path, pixels):
        HashRuntime(engine_path).encode(pixels[:3])
        assert_clean(gpu)

    def test_buffers_are_allocated_once(self, gpu, engine_path, pixels):
        with HashRuntime(engine_path, concurrency=1) as runtime:
            before = dict(gpu.calls)
            for count in (1, 16, 70, 3, 16, 16):
                runtime.encode(pixels[:count])
            for name in ("cuMemAlloc", "cuMemHostAlloc", "cuStreamCreate"):
                assert gpu.calls[name] == before[name]

    @pytest.mark.parametrize("cuda", ["bindings", "pycuda"])
    def test_the_interpreters_exit_closes(self, tmp_path, cuda):
        """Before the handlers that were registered before: pycuda.autoinit ends its context in one."""
        save_engine(tmp_path, "tensorrt")
        script = textwrap.dedent("""
            import atexit, sys, weakref
            sys.path[:0] = sys.argv[3:]
            import pytest, numpy as np
            from _cuda_double import Machine
            from _tensorrt_double import install
            weakref.finalize(Machine, print, end="")  # now weakref's own exit handler is there, and runs late
            machine, cuda = Machine(), sys.argv[2]
            install(pytest.MonkeyPatch(), machine, "tensorrt", pycuda=True)
            context = sys.modules["pycuda.driver"].Device(0).make_context() if cuda == "pycuda" else None

            def end():
                print(machine.log[:3], len(machine.log), machine.violations, machine.allocations, machine.streams)
                if context is not None:
                    type(context).pop()

            atexit.register(end)
            from admth_runtime import HashRuntime
            runtime = HashRuntime(sys.argv[1], cuda=cuda, cuda_graphs=False)
            runtime.encode(np.zeros((3, 12, 12, 3), np.uint8))
        """)
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "model.fp16.plan"), cuda, str(Path(__file__).parent)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        freed = 3 + 2 * (2 * len(LENGTHS) + 1) + 1  # TensorRT's three, two buffers a tensor, and the stream
        assert done.stdout.strip() == f"['context', 'engine', 'runtime'] {freed} [] {{}} {{}}"
        assert done.stderr == ""

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("cuMemAlloc", "the GPU has no memory left"),
            ("cuMemHostAlloc", "the GPU has no memory left"),
            ("cuStreamCreate", "the GPU has no memory left"),
            ("cuDevicePrimaryCtxRetain", "the GPU has no memory left"),
        ],
    )
    def test_a_failure_while_opening_leaves_nothing(self, gpu, engine_path, function, message):
        gpu.fail[function] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
        with pytest.raises(DeviceError, match=message):
            HashRuntime(engine_path)

    def test_memory_that_is_too_small(self, gpu, engine_path):
        gpu.memory = 5000
        with pytest.raises(DeviceError, match=r"no memory left .*--batch MIN OPT MAX"):
            HashRuntime(engine_path)

    def test_a_second_context_that_cannot_be_had_does_not_hurt_the_first(self, gpu, tmp_path, pixels, reference):
        with HashRuntime(save_engine(tmp_path), concurrency=2) as runtime:
            gpu.memory = sum(size for size, _ in gpu.allocations.values())
            with runtime.engine._pool.lease(), pytest.raises(DeviceError, match="no memory left"):
                runtime.encode(pixels[:4])
            check(runtime.encode(pixels[:4]), reference, slice(0, 4))


class TestFailures:
    def test_an_execution_that_fails(self, gpu, tmp_path, pixels):
        runtime = HashRuntime(save_engine(tmp_path, fails=True))
        with runtime, pytest.raises(DeviceError, match=r"failed on a batch of 3 .the GPU has no memory left"):
            runtime.encode(pixels[:3])

    def test_an_error_while_waiting(self, gpu, engine_path, pixels, reference):
        with HashRuntime(engine_path) as runtime:
            runtime.encode(pixels[:4])
            gpu.fail["cuMemcpyDtoHAsync"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
            with pytest.raises(DeviceError, match="CUDA failed in cuMemcpyDtoHAsync with CUDA_ERROR_ILLEGAL_ADDRESS"):
                runtime.encode(pixels[:4])
            check(runtime.encode(pixels[:4]), reference, slice(0, 4))

    def test_no_execution_context(self, gpu, tmp_path):
        with pytest.raises(DeviceError, match=r"no execution context could be made .the GPU has no memory left"):
            HashRuntime(save_engine(tmp_path, no_context=True))

    @pytest.mark.parametrize(
        ("message", "meaning"),
        [
            (
                "The engine plan file is generated on an incompatible device, expecting compute 8.9 got 8.6",
                "another GPU",
            ),
            (
                "The engine plan file is not compatible with this version of TensorRT, expecting 10.13",
                "another version",
            ),
            (
                "Version tag does not match. Note: Current Version: 236, Serialized Engine Version: 228",
                "another version",
            ),
            ("Platform specific tag mismatch detected. TensorRT plan files are only supported on", "operating system"),
            ("Something new", "TensorRT says: Something new"),
        ],
    )
    def test_an_engine_that_tensorrt_refuses(self, gpu, tmp_path, message, meaning):
        with pytest.raises(ModelError, match=rf"was refused by tensorrt 10\.13\.3\.9 .*{meaning}.*run  admth-export"):
            HashRuntime(save_engine(tmp_path, "tensorrt", refused=message))

    def test_an_engine_of_other_outputs(self, gpu, tmp_path):
        from _tiny_model import tiny_manifest

        path = save_engine(tmp_path, changes={"manifest": tiny_manifest((16, 32, 48))})
        with pytest.raises(ModelError, match=r"code_64 is an output of UINT8 .* and should be absent"):
            HashRuntime(path)

    def test_rtx_refuses_by_the_header(self, gpu, tmp_path):
        path = save_engine(tmp_path)
        content = bytearray(path.read_bytes())
        content[40] = 3
        path.write_bytes(content)
        from _tensorrt_double import sidecar_of

        from admth_runtime.sidecar import write_sidecar

        write_sidecar(path, sidecar_of(bytes(content)))
        with pytest.raises(ModelError, match=r"refused by this TensorRT-RTX or GPU .version mismatch, unsupported cc"):
            HashRuntime(path)
        assert "deserialize" not in gpu.calls


class TestBeforeAnythingIsExecuted:
    """Every mismatch is one sentence, and TensorRT's runtime is not started for it."""

    @pytest.fixture(autouse=True)
    def untouched(self, machine):
        yield
        assert "deserialize" not in machine.calls
        assert "runtime" not in machine.log

    def test_another_gpu(self, gpu, tmp_path):
        gpu.gpus = [("Double 3090", 8, 6)]
        with pytest.raises(DeviceError, match=r"was built for sm89 and this GPU is sm86: .*--flavor rtx --gpu sm86"):
            HashRuntime(save_engine(tmp_path))

    @pytest.mark.parametrize(
        ("flavour", "version"), [("rtx", "1.6.0.1"), ("rtx", "2.7.0.1"), ("tensorrt", "10.3.0.26")]
    )
    def test_another_version(self, gpu, tmp_path, flavour, version):
        with pytest.raises(
            DeviceError, match=rf"was built by TensorRT.* {version} and tensorrt.* is installed: .*run  "
        ):
            HashRuntime(save_engine(tmp_path, flavour, version))

    def test_no_tensorrt(self, monkeypatch, machine, tmp_path):
        install(monkeypatch, machine)
        with pytest.raises(MissingExtraError, match=r"built by TensorRT-RTX 1\.7\.1\.116.*pip install 'admth\[rtx\]'"):
            HashRuntime(save_engine(tmp_path))

    def test_a_plain_plan_on_the_lean_runtime(self, monkeypatch, machine, tmp_path):
        install(monkeypatch, machine, "tensorrt_lean")
        with pytest.raises(DeviceError, match=r"version-compatible plans only.*--version-compatible"):
            HashRuntime(save_engine(tmp_path, "tensorrt", "11.4.0.106"))

    def test_no_cuda_bindings(self, gpu, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'admth\[tensorrt\]'"):
            HashRuntime(save_engine(tmp_path))

    def test_pycuda_without_a_context(self, gpu, tmp_path):
        with pytest.raises(DeviceError, match=r"joins the current pycuda context and there is none: .*autoinit"):
            HashRuntime(save_engine(tmp_path), cuda="pycuda")

    def test_pycuda_on_another_gpu(self, gpu, tmp_path):
        gpu.gpus = [("Double L4", 8, 9)] * 2
        context = sys.modules["pycuda.driver"].Device(1).make_context()
        with pytest.raises(InputError, match="'cuda:0' is not the GPU of the current pycuda context, 'cuda:1'"):
            HashRuntime(save_engine(tmp_path), cuda="pycuda")
        context.pop()

    def test_no_driver(self, monkeypatch, tmp_path):
        from admth_runtime import driver

        def missing(library):
            raise OSError(f"{library}: cannot open shared object file: No such file or directory")

        monkeypatch.setattr(driver.ctypes, "CDLL", missing)
        with pytest.raises(DeviceError, match=r"model\.fp16\.rtx needs an NVIDIA GPU: no NVIDIA driver; .*='cpu'"):
            HashRuntime(save_engine(tmp_path))

    def test_a_driver_that_does_not_start(self, gpu, tmp_path):
        gpu.start_code = 803
        with pytest.raises(DeviceError, match=r"does not start \(CUDA error 803\)"):
            HashRuntime(save_engine(tmp_path))

    def test_a_driver_without_a_gpu(self, gpu, tmp_path):
        gpu.gpus = []
        with pytest.raises(DeviceError, match="sees no GPU"):
            HashRuntime(save_engine(tmp_path))

    def test_an_old_driver(self, gpu, monkeypatch, tmp_path):
        from admth_runtime.engines import flavours

        gpu.driver_version = 12040
        monkeypatch.setattr(flavours.metadata, "version", lambda name: "1.7.1.116")
        with pytest.raises(DeviceError, match=r"supports CUDA 12\.4 and tensorrt-rtx-cu13 needs CUDA 13: .*-cu12"):
            HashRuntime(save_engine(tmp_path))

    def test_the_cpu(self, gpu, tmp_path):
        with pytest.raises(InputError, match="runs on an NVIDIA GPU only"):
            HashRuntime(save_engine(tmp_path), device="cpu")

    def test_a_provider(self, gpu, tmp_path):
        with pytest.raises(InputError, match="provider 'cuda' is one of ONNX Runtime's"):
            HashRuntime(save_engine(tmp_path), provider="cuda")

    def test_a_gpu_that_is_not_there(self, gpu, tmp_path):
        with pytest.raises(InputError, match="'cuda:3' does not exist: this machine has 1 GPU"):
            HashRuntime(save_engine(tmp_path), device="cuda:3")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"cuda": "rocm"}, "cuda 'rocm' is unknown: use one of bindings, pycuda"),
            ({"concurrency": 0}, "concurrency 0 is not a positive integer"),
            ({"concurrency": True}, "concurrency True is not"),
            ({"device": "cuda:x"}, "device 'cuda:x' is unknown"),
            ({"batch_size": 0}, "batch_size 0"),
        ],
    )
    def test_options(self, gpu, tmp_path, options, message):
        with pytest.raises(InputError, match=message):
            HashRuntime(save_engine(tmp_path), **options)

    def test_without_a_sidecar(self, gpu, tmp_path):
        path = save_engine(tmp_path)
        Path(f"{path}.json").unlink()
        with pytest.raises(ManifestError, match=r"has no sidecar .*executable code.*trust_engine=True"):
            HashRuntime(path)
        with pytest.raises(InputError, match=r"manifest=read_model\('model.onnx'\)"):
            HashRuntime(path, trust_engine=True)


class TestFlavours:
    def test_a_version_compatible_plan_runs_on_the_lean_runtime(
        self, monkeypatch, machine, tmp_path, pixels, reference
    ):
        install(monkeypatch, machine, "tensorrt_lean")
        path = save_engine(tmp_path, "tensorrt", "10.3.0.26", changes={"version_compatible": True})
        with HashRuntime(path) as runtime:
            assert runtime.engine.name == "tensorrt_lean"
            check(runtime.encode(pixels), reference)
        assert machine.calls["host_code"] is True
        assert_clean(machine)

    def test_a_plain_plan_may_not_run_code_on_the_host(self, gpu, tmp_path):
        HashRuntime(save_engine(tmp_path, "tensorrt")).close()
        assert gpu.calls["host_code"] is False

    def test_the_lean_runtime_is_taken_where_tensorrt_is_older(self, monkeypatch, machine, tmp_path):
        install(monkeypatch, machine, "tensorrt", "tensorrt_lean")
        path = save_engine(tmp_path, "tensorrt", "11.0.0.1", changes={"version_compatible": True})
        with HashRuntime(path) as runtime:
            assert runtime.engine.name == "tensorrt_lean"

    def test_the_patch_does_not_count(self, gpu, tmp_path):
        HashRuntime(save_engine(tmp_path, "rtx", "1.7.0.3")).close()

    def test_an_engine_that_is_trusted(self, gpu, tmp_path, tiny_path, pixels, reference):
        path = tmp_path / "foreign.engine"
        path.write_bytes(engine_bytes("tensorrt"))
        manifest = read_model(tiny_path).manifest
        with HashRuntime(path, trust_engine=True, manifest=manifest) as runtime:
            check(runtime.encode(pixels), reference)

    def test_the_second_gpu(self, gpu, tmp_path, pixels, reference):
        gpu.gpus = [("Double 3090", 8, 6), ("Double L4", 8, 9)]
        with HashRuntime(save_engine(tmp_path), device="cuda:1") as runtime:
            check(runtime.encode(pixels), reference)

    def test_the_callers_context_stays_current(self, gpu, tmp_path, pixels):
        gpu.contexts().append("the caller's")
        with HashRuntime(save_engine(tmp_path)) as runtime:
            runtime.encode(pixels[:2])
            assert gpu.contexts() == ["the caller's"]
        assert gpu.contexts() == ["the caller's"]
        gpu.contexts().clear()


class OnGpu:
    """What a library with the CUDA array interface gives."""

    def __init__(self, machine, array, *, offset=0, **facts):
        self._machine = machine
        self._start = machine.upload(array, offset) - offset
        machine.primary += 1  # its library lives in the primary context too
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (self._start + offset, False),
            "version": 3,
            "strides": None,
            "stream": None,
            **facts,
        }

    def release(self):
        del self._machine.allocations[self._start]
        self._machine.primary -= 1


class TestOnTheGpu:
    def test_pixels_are_read_where_they_are(self, cuda, gpu, engine_path, pixels, reference):
        array = OnGpu(gpu, pixels)
        with HashRuntime(engine_path, cuda=cuda, batch_size=8) as runtime:
            uploads = gpu.calls.get("cuMemcpyHtoDAsync", 0)
            check(runtime.encode_pixels(array), reference)
            check(runtime.encode(array), reference)
            assert gpu.calls.get("cuMemcpyHtoDAsync", 0) == uploads
        array.release()

    def test_codes_stay_there(self, cuda, gpu, engine_path, pixels, reference):
        array = OnGpu(gpu, pixels)
        with HashRuntime(engine_path, cuda=cuda) as runtime:
            for given in (array, pixels, pixels[::-1][::-1]):
                downloads = gpu.calls.get("cuMemcpyDtoHAsync", 0)
                codes = runtime.encode_device(given)
                assert gpu.calls.get("cuMemcpyDtoHAsync", 0) == downloads
                assert (codes.count, codes.code_lengths, len(codes)) == (70, LENGTHS, 4)
                for length in LENGTHS:
                    facts = codes[length].__cuda_array_interface__
                    assert (facts["shape"], facts["typestr"], facts["version"]) == ((70, length // 8), "|u1", 3)
                    found = gpu.download(facts["data"][0], facts["shape"], np.uint8)
                    assert np.array_equal(found, reference[length])
                    logits = codes.logits[length]
                    found = gpu.download(logits.address, logits.shape, logits.dtype)
                    np.testing.assert_allclose(found, reference.logits[length], rtol=1e-5, atol=1e-3)
                codes.close()
                codes.close()
        array.release()

    def test_codes_outlive_the_engine(self, gpu, engine_path, pixels, reference):
        with HashRuntime(engine_path) as runtime:
            codes = runtime.encode_device(pixels)
        del runtime
        gc.collect()
        assert gpu.primary == 1
        kept = codes[64]
        del codes
        gc.collect()
        assert np.array_equal(gpu.download(kept.address, kept.shape, kept.dtype), reference[64])
        del kept
        gc.collect()
        assert_clean(gpu)

    def test_an_unknown_length(self, gpu, engine_path, pixels):
        message = "code length 24 is not there: this model has 16, 32, 48, 64"
        with HashRuntime(engine_path) as runtime, runtime.encode_device(pixels[:1]) as codes:
            assert 24 not in codes
            with pytest.raises(CodeLengthError, match=message):
                codes[24]

    def test_an_address_that_tensorrt_cannot_read_is_copied(self, gpu, engine_path, pixels, reference):
        array = OnGpu(gpu, pixels[:5], offset=16)
        with HashRuntime(engine_path) as runtime:
            check(runtime.encode(array), reference, slice(0, 5))
        array.release()

    def test_a_small_batch_is_padded(self, gpu, tmp_path, pixels, reference):
        array = OnGpu(gpu, pixels[:5])
        with HashRuntime(save_engine(tmp_path, profiles=((8, 8, 16),))) as runtime:
            check(runtime.encode(array), reference, slice(0, 5))
        array.release()

    def test_a_buffer_that_is_used_again_is_captured(self, gpu, tmp_path, pixels, reference):
        array, other = OnGpu(gpu, pixels[:8]), OnGpu(gpu, pixels[8:16])
        with HashRuntime(save_engine(tmp_path, "tensorrt")) as runtime:
            for _ in range(4):
                check(runtime.encode(array), reference, slice(0, 8))
            assert gpu.calls["execute"] == 2
            check(runtime.encode(other), reference, slice(8, 16))
            check(runtime.encode(pixels[:8]), reference, slice(0, 8))
        array.release()
        other.release()

    def test_the_producers_stream_is_waited_for(self, cuda, gpu, engine_path, pixels, reference):
        array = OnGpu(gpu, np.zeros_like(pixels), stream=1)
        address = array.__cuda_array_interface__["data"][0]
        source = np.ascontiguousarray(pixels)
        import ctypes

        gpu.stream(1).put(lambda: ctypes.memmove(address, source.ctypes.data, source.nbytes))
        with HashRuntime(engine_path, cuda=cuda) as runtime:
            check(runtime.encode(array), reference)
        array.release()

    @pytest.mark.parametrize(
        ("array", "facts", "message"),
        [
            (np.zeros((2, SIZE, SIZE, 3), np.float32), {}, r"pixels are float32 \[2, 12, 12, 3\]"),
            (np.zeros((2, 3, SIZE, SIZE), np.uint8), {}, r"not a uint8 array \[n, 12, 12, 3\]"),
            (np.zeros((2, SIZE, SIZE, 3), np.uint8), {"strides": (864, 36, 3, 1)}, "not C-contiguous"),
            (np.zeros((2, SIZE, SIZE, 3), np.uint8), {"mask": object()}, "not C-contiguous"),
            (np.zeros((1, SIZE, SIZE, 3), np.uint8), {"shape": (0, SIZE, SIZE, 3)}, "no images"),
        ],
    )
    def test_arrays_that_are_refused(self, gpu, engine_path, array, facts, message):
        given = OnGpu(gpu, array, **facts)
        with HashRuntime(engine_path) as runtime:
            for method in (runtime.encode, runtime.encode_pixels, runtime.encode_device):
                with pytest.raises(InputError, match=message):
                    method(given)
        given.release()

    def test_onnx_runtime_keeps_to_the_computers_memory(self, gpu, tiny_path, pixels):
        array = OnGpu(gpu, pixels[:2])
        with HashRuntime(tiny_path, device="cpu", threads=1) as runtime:
            with pytest.raises(InputError, match="where onnxruntime does not read them"):
                runtime.encode(array)
            with pytest.raises(InputError, match="encode_device needs a TensorRT engine"):
                runtime.encode_device(pixels)
        array.release()

    def test_encode_device_checks_arrays(self, gpu, engine_path, pixels):
        with HashRuntime(engine_path) as runtime:
            with pytest.raises(InputError, match="pixels are float64"):
                runtime.encode_device(pixels / 2)
            with pytest.raises(InputError, match="no images"):
                runtime.encode_device(pixels[:0])
        with pytest.raises(InputError, match="is closed"):
            runtime.encode_device(pixels)
