"""Images in, codes of every length out: one inference call on a model's own preprocessing."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from admth_runtime.cpu import usable_cores
from admth_runtime.decode_threads import DecodeThreads
from admth_runtime.engine import DeviceEngine, Engine, EngineOptions, is_on_gpu, open_engine
from admth_runtime.errors import ImageError, InputError
from admth_runtime.in_flight import CallGate
from admth_runtime.manifest import Manifest
from admth_runtime.preprocessing import PreprocessingSpec, preprocess
from admth_runtime.results import HashCodes

if TYPE_CHECKING:
    from admth_runtime.engines.device_arrays import DeviceCodes
    from admth_runtime.self_test import SelfTestReport

__all__ = ["HashRuntime", "ImageLike", "Images"]

UInt8Array = NDArray[np.uint8]
ImageLike = str | os.PathLike[str] | Image.Image | UInt8Array
"""One image: a path, a Pillow image, or uint8 ``[H, W, 3]`` in RGB order."""

Images = ImageLike | Iterable[ImageLike]
"""One image, an iterable of images, or uint8 ``[n, H, W, 3]``."""


class HashRuntime:
    """A model that is ready to encode images.

    It is safe to share between threads: any number may call it at once, and each gets the codes that it would get
    alone. Closing it lets the calls in flight end well, and refuses those that come later.

    Use it as a context manager, or call :meth:`close`::

        with HashRuntime("model.onnx", threads=2) as runtime:
            codes = runtime.encode(["a.jpg", "b.png"])
            codes[64]  # uint8 [2, 8]

    Args:
        model: an ONNX model made by ``admth-export onnx``, or a TensorRT engine made by ``admth-export trt`` with its
            sidecar beside it. The file is checked before any engine sees it.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"`` for the second GPU. A device that is named and cannot
            be had raises; only ``"auto"`` falls back to the CPU, and logs it once. A TensorRT engine needs a GPU.
        provider: ONNX models: the execution provider of ONNX Runtime, ``"cpu"``, ``"cuda"``, ``"tensorrt"`` or
            ``"rtx"``; None takes the device's own. One that is named and cannot be had raises.
        threads: CPU threads of one inference call; None takes one a usable physical core.
        batch_size: the most images in one inference call; more are split. An engine splits further at the largest
            batch of its profiles.
        decode_threads: threads that decode the files of a batch side by side, shared by all calls; None takes one a
            usable core, and 1 decodes in the thread that calls.
        self_test: encode the golden pictures of the manifest now, and raise where their codes are not as they were
            when the model was made; see :meth:`self_test`.
        trust_engine: TensorRT: accept an engine that has no sidecar. An engine is executable code, so say so only of
            a file whose origin you know.
        manifest: TensorRT: the manifest for such an engine, ``read_model("model.onnx").manifest``.
        cuda: TensorRT: ``"bindings"`` uses the GPU's primary context, as PyTorch, CuPy and ONNX Runtime do;
            ``"pycuda"`` joins the context that the application made with pycuda and that is current now.
        concurrency: TensorRT: how many calls may be on the GPU at once, each with buffers of its own; more wait.
        cuda_graphs: TensorRT: capture a CUDA graph of a batch size that comes again.

    Raises:
        ModelError: the file is missing, broken, unsafe, altered, or refused by the engine.
        ManifestError: it has no manifest or sidecar, or one that is too new, edited, or disagrees with the model.
        DeviceError: the device cannot be had, or the engine was built for another.
        MissingExtraError: no inference engine is installed.
        SelfTestError: the model gives other codes here than it should.
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "auto",
        provider: str | None = None,
        threads: int | None = None,
        batch_size: int = 32,
        decode_threads: int | None = None,
        self_test: bool = False,
        trust_engine: bool = False,
        manifest: Manifest | None = None,
        cuda: str = "bindings",
        concurrency: int = 2,
        cuda_graphs: bool = True,
    ) -> None:
        _check_positive("batch_size", batch_size)
        _check_positive("decode_threads", usable_cores() if decode_threads is None else decode_threads)
        options = EngineOptions(
            device=device,
            provider=provider,
            threads=threads,
            cuda=cuda,
            concurrency=concurrency,
            cuda_graphs=cuda_graphs,
            trust_engine=trust_engine,
            manifest=manifest,
        )
        self._engine: Engine | None = None
        self._model, self._engine = open_engine(Path(model), options)
        described = self._model.manifest
        self._shape = described.preprocessing.shape
        self._batch_size = batch_size
        self._outputs = tuple((length, f"code_{length}", f"logits_{length}") for length in described.code_lengths)
        self._decoders = DecodeThreads(decode_threads or usable_cores())
        alive = weakref.ref(self)  # a reference would keep a runtime that is forgotten until the next collection
        self._calls = CallGate(
            lambda: _free(alive()), f"this HashRuntime of {self._model.path} is closed: open the model again"
        )
        if self_test:
            try:
                self.self_test()
            except BaseException:
                self.close()
                raise

    @property
    def manifest(self) -> Manifest:
        """What the model says of itself."""
        return self._model.manifest

    @property
    def code_lengths(self) -> tuple[int, ...]:
        """The code lengths in bits, increasing."""
        return self._model.manifest.code_lengths

    @property
    def model_sha256(self) -> str:
        """SHA-256 of the model file, 64 hexadecimal digits; computed when it is first asked for."""
        return self._model.sha256

    @property
    def model_path(self) -> Path:
        """The model file."""
        return self._model.path

    @property
    def batch_size(self) -> int:
        """The most images in one inference call."""
        return self._batch_size

    @property
    def decode_threads(self) -> int:
        """Threads that decode the files of a batch."""
        return self._decoders.count

    @property
    def engine(self) -> Engine:
        """The engine that runs the model, with its name and version.

        Raises:
            InputError: the runtime is closed.
        """
        self._calls.check()
        assert self._engine is not None
        return self._engine

    @property
    def device(self) -> str:
        """Where the model runs: ``"cpu"`` or ``"cuda"``."""
        return self.engine.device

    @property
    def threads(self) -> int:
        """CPU threads of one inference call."""
        return self.engine.threads

    def encode(self, images: Images) -> HashCodes:
        """Encode images to the codes of every length.

        Args:
            images: a path, a Pillow image, uint8 ``[H, W, 3]``, an iterable of those, or uint8 ``[n, H, W, 3]``.
                An iterable is consumed in batches, so a generator over any number of images needs bounded memory.
                An array of the network's own size passes without preprocessing.

        Returns:
            The codes and logits of the n images, in order.

        Raises:
            InputError: there is no image, an array has a wrong dtype or shape, or the runtime is closed.
            ImageError: an image cannot be read; the message names it.
            DeviceError: the engine failed.
        """
        if is_on_gpu(images) or (
            isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == self._shape
        ):
            return self.encode_pixels(images)
        with self._calls:
            engine = self.engine
            parts = [self._codes(engine.run(pixels)) for pixels in self._batches(images)]
        if not parts:
            raise InputError(_NO_IMAGES)
        return HashCodes.concatenate(parts)

    def encode_pixels(self, pixels: Any) -> HashCodes:
        """Encode uint8 ``[n, H, W, 3]`` of the network's own size: :meth:`encode` without preprocessing.

        Args:
            pixels: a NumPy array; on a TensorRT engine also an array on the GPU, such as a PyTorch tensor, which is
                read where it is.

        Raises:
            InputError: another dtype, shape or layout, no image, or the runtime is closed.
            DeviceError: the engine failed.
        """
        with self._calls:
            engine = self.engine
            if is_on_gpu(pixels):
                if not isinstance(engine, DeviceEngine):
                    raise InputError(
                        f"the pixels are on the GPU, where {engine.name} does not read them: pass them as a NumPy array"
                    )
                return self._codes(engine.run(pixels))
            pixels = self._checked(pixels)
            count = len(pixels)
            if count <= self._batch_size:
                return self._codes(engine.run(pixels))
            starts = range(0, count, self._batch_size)
            return HashCodes.concatenate(
                [self._codes(engine.run(pixels[start : start + self._batch_size])) for start in starts]
            )

    def encode_device(self, pixels: Any) -> DeviceCodes:
        """Encode pixels and leave codes and logits on the GPU, for PyTorch, CuPy and the like.

        Args:
            pixels: uint8 ``[n, H, W, 3]`` of the network's own size: an array on the GPU, which is read where it is
                (DLPack or ``__cuda_array_interface__``), or a NumPy array.

        Returns:
            The codes and logits of the n images, complete, as arrays that ``torch.as_tensor(codes[64])`` or
            ``cupy.asarray(codes[64])`` take without a copy.

        Raises:
            InputError: another dtype, shape, layout or GPU, the runtime is closed, or its engine is not TensorRT.
            DeviceError: the engine failed.
        """
        with self._calls:
            engine = self.engine
            if not isinstance(engine, DeviceEngine):
                raise InputError(
                    f"encode_device needs a TensorRT engine and {self._model.path} runs on {engine.name}: "
                    "use encode_pixels"
                )
            return engine.run_on_device(pixels if is_on_gpu(pixels) else self._checked(pixels))

    def preprocess(self, images: Images) -> UInt8Array:
        """Turn images into the network's pixels, uint8 ``[n, H, W, 3]``, without inference.

        Raises:
            InputError: there is no image, an array has a wrong dtype or shape, or the runtime is closed.
            ImageError: an image cannot be read; the message names it.
        """
        with self._calls:
            parts = list(self._batches(images))
        if not parts:
            raise InputError(_NO_IMAGES)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def self_test(self) -> SelfTestReport:
        """Encode the few synthetic pictures whose codes the manifest holds, and compare.

        It takes four images' inference, needs no file, and may run while other threads encode, so that a device may
        repeat it every day.

        Returns:
            How many bits were compared at each code length, and how many differ within what rounding explains.

        Raises:
            SelfTestError: more bits differ than rounding explains; the message says at which code length, and how many.
            ManifestError: the model was made without golden vectors.
            InputError: the runtime is closed.
            DeviceError: the engine failed.
        """
        from admth_runtime.self_test import run_self_test

        return run_self_test(self)

    def close(self) -> None:
        """Refuse further calls, wait for those in flight in other threads, and free the engine.

        Closing twice is no error.
        """
        self._calls.close()

    def __enter__(self) -> HashRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        engine = self._engine
        state = "closed" if self._calls.closed or engine is None else f"{engine.name} on {engine.device}"
        return f"HashRuntime({str(self._model.path)!r}, code_lengths={self.code_lengths}, {state})"

    def _checked(self, pixels: Any) -> UInt8Array:
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != self._shape:
            found = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise InputError(
                f"pixels are {found}, not a uint8 array [n, {', '.join(map(str, self._shape))}]: "
                "call preprocess on the images first, or pass them to encode"
            )
        if len(pixels) == 0:
            raise InputError(_NO_IMAGES)
        return np.ascontiguousarray(pixels)

    def _codes(self, outputs: dict[str, NDArray[Any]]) -> HashCodes:
        return HashCodes(
            {length: outputs[code] for length, code, _ in self._outputs},
            {length: outputs[logits] for length, _, logits in self._outputs},
        )

    def _batches(self, images: Images) -> Iterator[UInt8Array]:
        """Preprocess lazily, ``batch_size`` images at a time: files side by side, all else as it comes.

        A generator may hand out one picture or array again and again with other content, so what is no file is read
        before the next one is asked for.
        """
        spec = self._model.manifest.preprocessing
        numbered = enumerate(_as_iterable(images))
        while batch := [_taken(index, image, spec) for index, image in islice(numbered, self._batch_size)]:
            files = [place for place, taken in enumerate(batch) if isinstance(taken, (str, Path))]
            decoded = self._decoders.map(partial(preprocess, spec=spec), [batch[place] for place in files])
            for place, pixels in zip(files, decoded, strict=True):
                batch[place] = pixels
            yield np.stack(batch)

    def _free(self) -> None:
        engine, self._engine = self._engine, None
        self._decoders.close()
        if engine is not None:
            engine.close()


def _free(runtime: HashRuntime | None) -> None:
    if runtime is not None:
        runtime._free()


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} {value!r} is not a positive integer: pass 1 or more")


_NO_IMAGES = "no images were given: pass at least one"


def _as_iterable(images: Any) -> Iterable[ImageLike]:
    if isinstance(images, np.ndarray):
        if images.ndim == 4:
            return _checked_stack(images)
        # One image, right or wrong, or a vector of paths.
        return [images] if images.ndim != 1 else images.tolist()
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if isinstance(images, (bytes, bytearray, memoryview)):
        raise InputError("encoded bytes are not an image: pass  PIL.Image.open(io.BytesIO(data))")
    if not isinstance(images, Iterable):
        kind = type(images).__name__
        raise InputError(f"images of type {kind} are unknown: pass paths, PIL images or uint8 arrays, or an iterable")
    return images


def _checked_stack(images: NDArray[Any]) -> UInt8Array:
    if images.dtype == np.uint8 and images.shape[3] != 3 and images.shape[1] == 3:
        raise InputError(f"images of shape {images.shape} are channels first: use images.transpose(0, 2, 3, 1)")
    return images


def _taken(index: int, image: ImageLike, spec: PreprocessingSpec) -> Any:
    """Return a file's path as it is, and the pixels of anything else, which the caller may change from now on."""
    if isinstance(image, (str, os.PathLike)):
        return Path(image)
    try:
        pixels = preprocess(image, spec)
    except (ImageError, InputError) as error:
        raise type(error)(f"image {index}: {error}") from error
    return pixels.copy() if isinstance(image, np.ndarray) and np.may_share_memory(pixels, image) else pixels
