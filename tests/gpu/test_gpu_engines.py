"""Engines on a real GPU: PyTorch's bits, threads, graphs, memory, zero copies, and errors instead of crashes."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from admth_runtime import DeviceError, HashRuntime, ModelError
from admth_runtime.files import sha256_of_bytes
from admth_runtime.sidecar import read_sidecar, write_sidecar

pytestmark = pytest.mark.gpu

MINIMUM, OPTIMUM, MAXIMUM = 2, 8, 16


def same(a, b) -> bool:
    return all(np.array_equal(a[length], b[length]) for length in a)


class TestParity:
    @pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
    @pytest.mark.parametrize("batch", [1, MINIMUM, OPTIMUM, MAXIMUM, 64])
    def test_the_bits_are_pytorchs(self, build, backbone, precision, batch, check):
        """Below the minimum a batch is padded, above the maximum it is split."""
        case = build(backbone, precision)
        with HashRuntime(case.engine, batch_size=batch) as runtime:
            check(case, runtime.encode_pixels(case.pixels), batch_size=batch)

    def test_the_sidecar_holds_the_parity_of_the_engine(self, case):
        assert read_sidecar(case.engine).measured_parity is not None

    def test_images_come_the_whole_way(self, case, tmp_path, check):
        from PIL import Image

        paths = []
        for number, picture in enumerate(case.pixels[:5]):
            paths.append(tmp_path / f"{number}.png")
            Image.fromarray(picture).save(paths[-1])
        with HashRuntime(case.engine) as runtime:
            check(case, runtime.encode(paths), slice(0, 5))


class TestGraphsAndThreads:
    @pytest.mark.parametrize("graphs", [True, False])
    def test_cuda_graphs_change_nothing(self, case, graphs, check):
        with HashRuntime(case.engine, cuda_graphs=graphs, concurrency=1, batch_size=MAXIMUM) as runtime:
            for _ in range(6):
                check(case, runtime.encode_pixels(case.pixels[:OPTIMUM]), slice(0, OPTIMUM))
            check(case, runtime.encode_pixels(case.pixels[:3]), slice(0, 3))
            for _ in range(3):
                check(case, runtime.encode_pixels(case.pixels[OPTIMUM : 2 * OPTIMUM]), slice(OPTIMUM, 2 * OPTIMUM))

    @pytest.mark.parametrize("concurrency", [1, 3, 8])
    def test_eight_threads(self, case, concurrency, check):
        with HashRuntime(case.engine, concurrency=concurrency, batch_size=MAXIMUM) as runtime:

            def work(seed: int) -> None:
                generator = np.random.default_rng(seed)
                for _ in range(50):
                    start = int(generator.integers(0, 60))
                    stop = int(generator.integers(start + 1, 65))
                    check(case, runtime.encode_pixels(case.pixels[start:stop]), slice(start, stop))

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(work, range(8)))


class TestMemory:
    @pytest.mark.slow
    @pytest.mark.parametrize("graphs", [True, False])
    def test_ten_thousand_calls_do_not_grow(self, build, free_memory, graphs):
        case = build("efficientnet_lite0", "fp16")
        with HashRuntime(case.engine, cuda_graphs=graphs, batch_size=MAXIMUM) as runtime:
            for count in (1, OPTIMUM, MAXIMUM, 20) * 5:
                runtime.encode_pixels(case.pixels[:count])
            before = free_memory()
            for number in range(10_000):
                runtime.encode_pixels(case.pixels[: 1 + number % MAXIMUM])
            assert before - free_memory() < 8 << 20

    def test_closing_gives_the_memory_back(self, case, free_memory):
        with HashRuntime(case.engine) as runtime:  # what CUDA and TensorRT load once stays
            runtime.encode_pixels(case.pixels[:2])
        before = free_memory()
        for _ in range(5):
            with HashRuntime(case.engine, concurrency=2) as runtime, ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda _: runtime.encode_pixels(case.pixels), range(4)))
        assert before - free_memory() < 8 << 20


class TestZeroCopy:
    @pytest.fixture
    def torch(self):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("this PyTorch has no CUDA")
        return torch

    def test_tensors_in_and_out(self, case, torch, check):
        tensor = torch.from_numpy(case.pixels).cuda()
        with HashRuntime(case.engine) as runtime:
            check(case, runtime.encode_pixels(tensor))
            with runtime.encode_device(tensor) as codes:
                for length in codes:
                    on_gpu = torch.as_tensor(codes[length], device="cuda")
                    assert on_gpu.data_ptr() == codes[length].address
                    logits = torch.as_tensor(codes.logits[length], device="cuda")
                    packed = np.packbits(logits.cpu().numpy() > 0, axis=1)
                    assert np.array_equal(on_gpu.cpu().numpy(), packed)

    def test_a_tensor_that_is_still_being_written(self, case, torch, check):
        """The engine waits for the stream that produces the pixels."""
        source = torch.from_numpy(case.pixels).pin_memory()
        stream = torch.cuda.Stream()
        with HashRuntime(case.engine) as runtime:
            for _ in range(20):
                with torch.cuda.stream(stream):
                    target = torch.zeros(source.shape, dtype=torch.uint8, device="cuda")
                    torch.cuda._sleep(2_000_000)
                    target.copy_(source, non_blocking=True)
                    codes = runtime.encode_pixels(target)
                check(case, codes)

    def test_cupy(self, case, check):
        cupy = pytest.importorskip("cupy")
        with HashRuntime(case.engine) as runtime:
            check(case, runtime.encode_pixels(cupy.asarray(case.pixels)))

    def test_pytorchs_own_work_goes_on(self, case, torch):
        matrix = torch.randn(256, 256, device="cuda")
        expected = (matrix @ matrix).cpu()
        with HashRuntime(case.engine) as runtime:
            runtime.encode_pixels(case.pixels)
            assert torch.equal((matrix @ matrix).cpu(), expected)
        assert torch.equal((matrix @ matrix).cpu(), expected)


class TestPycuda:
    def test_the_same_behaviour_in_an_applications_context(self, case, check):
        driver = pytest.importorskip("pycuda.driver")
        driver.init()
        context = driver.Device(0).make_context()
        try:
            with HashRuntime(case.engine) as runtime:
                expected = runtime.encode_pixels(case.pixels)
            with HashRuntime(case.engine, cuda="pycuda") as runtime:
                for _ in range(3):
                    assert same(runtime.encode_pixels(case.pixels), expected)
                with ThreadPoolExecutor(4) as pool:
                    results = list(pool.map(lambda _: runtime.encode_pixels(case.pixels), range(8)))
                assert all(same(codes, expected) for codes in results)
            assert driver.Context.get_current() == context
        finally:
            context.pop()


class TestMismatches:
    def copied(self, case, folder: Path, content: bytes | None = None, **changes) -> Path:
        """The engine under another name, with a sidecar that vouches for whatever it holds."""
        path = folder / case.engine.name
        content = case.engine.read_bytes() if content is None else content
        path.write_bytes(content)
        sidecar = read_sidecar(case.engine)
        fields = {"engine_sha256": sha256_of_bytes(content), "engine_bytes": len(content), **changes}
        write_sidecar(path, replace(sidecar, **fields))
        return path

    def test_another_gpu(self, case, tmp_path):
        path = self.copied(case, tmp_path, compute_capabilities=("sm70",))
        with pytest.raises(DeviceError, match="was built for sm70 and this GPU is sm"):
            HashRuntime(path)

    def test_another_version(self, case, tmp_path):
        content = bytearray(case.engine.read_bytes())
        content[25] ^= 0x40
        version = ".".join(str(part) for part in content[24:28])
        path = self.copied(case, tmp_path, bytes(content), tensorrt_version=version)
        with pytest.raises(DeviceError, match=r"was built by TensorRT.* is installed: install that version, or run"):
            HashRuntime(path)

    def test_other_profiles(self, case, tmp_path):
        from admth_runtime.sidecar import BatchProfile

        path = self.copied(case, tmp_path, profiles=(BatchProfile(1, 8, 64),))
        with pytest.raises(ModelError, match=r"takes batches of 2-16 .* and its sidecar says 1-64"):
            HashRuntime(path)

    def test_a_truncated_engine_is_an_error_of_the_file(self, case, tmp_path):
        path = self.copied(case, tmp_path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ModelError, match="is truncated"):
            HashRuntime(path)

    def test_what_only_tensorrt_can_refuse_is_an_error_too(self, case, tmp_path):
        """A truncated engine with a sidecar that agrees reaches TensorRT; in a process of its own, in case it dies."""
        content = case.engine.read_bytes()
        path = self.copied(case, tmp_path, content[: len(content) // 2])
        done = subprocess.run(
            [sys.executable, "-m", "admth_runtime", "bench", str(path), "--queries", "1", "--warmup", "0"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert "was refused by" in done.stderr or "is refused by" in done.stderr

    def test_another_device_number(self, case):
        from admth_runtime import InputError

        with pytest.raises(InputError, match="'cuda:99' does not exist"):
            HashRuntime(case.engine, device="cuda:99")


class TestOnnxRuntime:
    @pytest.mark.parametrize("provider", ["cuda", "tensorrt", "rtx"])
    def test_its_providers_give_pytorchs_bits(self, build, provider, check):
        case = build("efficientnet_lite0", "fp32")
        try:
            runtime = HashRuntime(case.onnx, provider=provider)
        except DeviceError as error:
            pytest.skip(str(error))
        with runtime:
            assert runtime.device == "cuda"
            check(case, runtime.encode_pixels(case.pixels))


@pytest.mark.slow
def test_latencies_are_written():
    """The table of docs/gpu-results.md, with this card's name; it is the record that engines were run here."""
    repository = Path(__file__).resolve().parents[2]
    out = repository / "docs" / "gpu-results.md"
    script = repository / "benchmarks" / "gpu_latency.py"
    done = subprocess.run([sys.executable, script, "--out", out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from admth_runtime.driver import ask_driver

    assert ask_driver().gpus[0][0] in out.read_text()
