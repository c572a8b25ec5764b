"""What may be asked of an engine: precision switches, options, flavours, and what each flavour refuses by name."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from admth_export.tensorrt import flavours
from admth_export.tensorrt.flavours import RTX, TENSORRT, check_version, choose_flavour
from admth_export.tensorrt.options import EngineOptions, EnginePrecision, parse_gpus, parse_layers
from admth_runtime.driver import CudaFacts
from admth_runtime.errors import DeviceError, InputError, MissingExtraError, OutputError
from admth_runtime.sidecar import BatchProfile

FP32, FP16, INT8, MIXED = (
    EnginePrecision("fp32"),
    EnginePrecision("fp16"),
    EnginePrecision("int8"),
    EnginePrecision("int8", half_rest=True),
)


@pytest.mark.parametrize(
    ("flags", "precision", "label"),
    [
        ({"fp32"}, FP32, "fp32"),
        ({"fp16"}, FP16, "fp16"),
        ({"int8"}, INT8, "int8"),
        ({"int8", "fp16"}, MIXED, "int8.fp16"),
    ],
)
def test_precision_of_switches(flags, precision, label):
    found = EnginePrecision.of_flags(fp32="fp32" in flags, fp16="fp16" in flags, int8="int8" in flags)
    assert found == precision
    assert found.label == label
    assert set(found.flags.replace("--", "").split()) == flags


def test_no_precision_and_contradictions():
    with pytest.raises(InputError, match="no precision is named: pass --fp32, --fp16, --int8"):
        EnginePrecision.of_flags(fp32=False, fp16=False, int8=False)
    with pytest.raises(InputError, match="--fp32 and --fp16 contradict each other"):
        EnginePrecision.of_flags(fp32=True, fp16=True, int8=False)
    with pytest.raises(InputError, match="--fp32 and --int8 contradict each other"):
        EnginePrecision.of_flags(fp32=True, fp16=False, int8=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workspace_mib": 0}, "workspace 0 MiB is not from 1"),
        ({"optimization_level": 6}, "optimization level 6 is not from 0 to 5"),
        ({"gpus": ("ada",)}, "GPU 'ada' is not a compute capability: write it as sm89"),
        ({"gpus": ("sm89", "sm89")}, "names one twice"),
    ],
)
def test_options_out_of_range(values, message):
    with pytest.raises(InputError, match=message):
        EngineOptions(**values)


def test_batch_limits():
    with pytest.raises(
        InputError, match=r"batch limits \(8, 4, 32\) are out of order: pass them as --batch MIN OPT MAX"
    ):
        BatchProfile(8, 4, 32)
    with pytest.raises(InputError, match=r"the largest batch 70,000 is beyond 65,535"):
        EngineOptions(batch=BatchProfile(1, 8, 70_000))


@given(
    st.lists(st.sampled_from(["75", "80", "86", "89", "120", "121"]), min_size=1, max_size=6, unique=True), st.data()
)
def test_gpus_are_read_in_every_usual_spelling(numbers, data):
    spellings = [
        data.draw(
            st.sampled_from([f"sm{number}", f"SM{number}", number, f"{number[:-1]}.{number[-1]}", f" sm{number} "])
        )
        for number in numbers
    ]
    assert parse_gpus(",".join(spellings)) == tuple(f"sm{number}" for number in numbers)


def test_gpus_and_layers_of_nothing():
    assert parse_gpus(None) == ()
    with pytest.raises(InputError, match="names no GPU"):
        parse_gpus(" , ")
    assert parse_layers([]) == (True, ())
    assert parse_layers(["auto,trunk.stem", "first"]) == (True, ("trunk.stem", "first"))
    assert parse_layers(["trunk.stem"]) == (False, ("trunk.stem",))
    with pytest.raises(InputError, match="--keep-fp32 is empty"):
        parse_layers([" "])


def test_a_timing_cache_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match=r"timing cache: .*its folder does not exist"):
        EngineOptions(timing_cache=tmp_path / "no" / "cache").check_files()
    with pytest.raises(OutputError, match=r"timing cache: .*it is a folder"):
        EngineOptions(timing_cache=tmp_path).check_files()
    EngineOptions(timing_cache=tmp_path / "cache").check_files()


class TestRefusals:
    @pytest.mark.parametrize(
        ("flavour", "values", "message"),
        [
            (RTX, {"timing_cache": "cache"}, "TensorRT-RTX cannot honour --timing-cache: it measures nothing"),
            (RTX, {"version_compatible": True}, "TensorRT-RTX cannot honour --version-compatible"),
            (TENSORRT, {"gpus": ("sm89",)}, "TensorRT cannot honour --gpu: its engines are for the GPU of the machine"),
            (RTX, {"gpus": ("sm87",)}, "does not build for sm87: .*a Jetson's, build on it with --flavor tensorrt"),
            (RTX, {"gpus": ("sm90",)}, "does not build for sm90"),
        ],
    )
    def test_what_a_flavour_cannot_do_is_refused_by_name(self, flavour, values, message):
        with pytest.raises(InputError, match=message):
            flavour.check(EngineOptions(**values), FP16)

    def test_turing_wants_half(self):
        options = EngineOptions(gpus=("sm75",))
        with pytest.raises(
            InputError, match=r"no FP32 matrix products for sm75 \(Turing\).*pass --fp16, or leave sm75"
        ):
            RTX.check(options, FP32)
        with pytest.raises(InputError, match="pass --int8 --fp16, or leave sm75 out"):
            RTX.check(options, INT8)
        RTX.check(options, FP16)
        RTX.check(options, MIXED)

    def test_what_is_not_asked_for_is_not_refused(self):
        RTX.check(EngineOptions(workspace_mib=512, optimization_level=5, gpus=("sm86", "sm120")), FP32)
        TENSORRT.check(EngineOptions(version_compatible=True, optimization_level=0), INT8)


class TestChoice:
    def test_an_unknown_name(self):
        with pytest.raises(InputError, match="flavor 'onnx' is unknown: use auto, tensorrt or rtx"):
            choose_flavour("onnx")
        assert choose_flavour("tensorrt") is TENSORRT

    @pytest.mark.parametrize(
        ("installed", "gpus", "expected"),
        [
            ({"tensorrt"}, 0, TENSORRT),
            ({"tensorrt_rtx"}, 1, RTX),
            ({"tensorrt", "tensorrt_rtx"}, 0, RTX),
            ({"tensorrt", "tensorrt_rtx"}, 1, TENSORRT),
        ],
    )
    def test_auto_takes_what_can_build_here(self, monkeypatch, installed, gpus, expected):
        monkeypatch.setattr(flavours.util, "find_spec", lambda name: object() if name in installed else None)
        monkeypatch.setattr(flavours, "ask_driver", lambda: CudaFacts(bool(gpus), gpus=(("NVIDIA L4", "sm89"),) * gpus))
        assert choose_flavour("auto") is expected

    def test_neither_is_installed(self, monkeypatch):
        monkeypatch.setattr(flavours.util, "find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match=r"pip install 'admth\[tensorrt\]'  .*pip install 'admth\[rtx\]'"):
            choose_flavour("auto")

    def test_a_flavour_that_is_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(
            MissingExtraError, match=r"building TensorRT-RTX engines needs .*pip install 'admth\[rtx\]'"
        ):
            RTX.load()
        assert not RTX.installed()

    @pytest.mark.parametrize("version", ["8.6.1", "10.2.0.19"])
    def test_too_old(self, monkeypatch, version):
        module = ModuleType("tensorrt")
        module.__version__ = version
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        with pytest.raises(DeviceError, match=r"is too old: install 10\.3 or newer, on a Jetson with JetPack 6\.1"):
            TENSORRT.load()

    @pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106"])
    def test_new_enough(self, version):
        check_version(TENSORRT, version)

    def test_tensorrt_builds_for_the_gpu_that_is_there(self, monkeypatch):
        monkeypatch.setattr(flavours, "ask_driver", lambda: CudaFacts(True, "12.8", 1, None, (("Orin", "sm87"),)))
        assert TENSORRT.targets(EngineOptions()) == ("sm87",)
        monkeypatch.setattr(flavours, "ask_driver", lambda: CudaFacts(False, problem="no NVIDIA driver"))
        with pytest.raises(DeviceError, match=r"here is no NVIDIA driver: .*--onnx-only, or .*--flavor rtx"):
            TENSORRT.targets(EngineOptions())
        assert RTX.targets(EngineOptions()) == ("sm80", "sm86", "sm89", "sm120", "sm121")
        assert RTX.targets(EngineOptions(gpus=("sm75",))) == ("sm75",)
