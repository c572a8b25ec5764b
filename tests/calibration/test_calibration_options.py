"""Options, gates, and whether this processor's weights take seven bits."""

from __future__ import annotations

import pytest

from admth_calibration import CalibrationOptions
from admth_calibration.gates import Gates
from admth_calibration.making import needs_reduced_range
from admth_calibration.mixed import FrontPoint
from admth_calibration.options import check_out, default_out
from admth_calibration.scoring import Score
from admth_runtime.errors import InputError, OutputError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": "gpu"}, "target 'gpu' is unknown: use cpu, trt or both"),
        ({"method": "max"}, "method 'max' is unknown: use min-max, percentile, entropy, mse or sign-aware"),
        ({"rounding": "up"}, "rounding 'up' is unknown: use nearest, zero-sum or gptq"),
        ({"reduce_range": "maybe"}, "reduce range 'maybe' is unknown: use auto, yes or no"),
        ({"images": 64}, "images 64 is not an integer from 128"),
        ({"images": 128.5}, r"images 128\.5 is not an integer from 128"),
        ({"check_images": 0}, "check images 0 is not an integer from 1"),
        ({"block_images": 4}, "block images 4 is not an integer from 8"),
        ({"seed": -1}, "seed -1 is not an integer from 0"),
        ({"seed": True}, "seed True is not an integer from 0"),
    ],
)
def test_options_out_of_range(values, message):
    with pytest.raises(InputError, match=message):
        CalibrationOptions(**values)


def test_defaults():
    options = CalibrationOptions()
    assert (options.target, options.targets) == ("cpu", ("cpu",))
    assert not options.gates.any
    assert CalibrationOptions("both").targets == ("cpu", "trt")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"min_bit_parity": 99.5},
            r"--min-bit-parity 99\.5 is not above 0 and at most 1; write a share such as 0\.995",
        ),
        ({"min_bit_parity": 0.0}, "--min-bit-parity 0 is not above 0"),
        ({"min_bit_parity": 0.4}, r"--min-bit-parity 0\.4 is no better than chance: ask for 0\.9 or more"),
        ({"min_bit_parity": float("nan")}, "--min-bit-parity nan is not above 0"),
        ({"min_map_ratio": 1.5}, r"--min-map-ratio 1\.5 is not above 0 and at most 1"),
        ({"max_latency_ratio": -1.0}, "--max-latency-ratio -1 is not above 0 and at most 10$"),
        ({"max_latency_ratio": 75}, "--max-latency-ratio 75 is not above 0 and at most 10$"),
    ],
)
def test_gates_out_of_range(values, message):
    with pytest.raises(InputError, match=message):
        Gates(**values)


def test_gates_say_by_how_much_they_are_missed():
    point = FrontPoint((), Score({16: 0.999, 32: 0.9912}, {16: 1.0, 32: 1.0}, 0.0, 0.0), 0.81, 1, "all INT8")
    gates = Gates(0.995, 0.99, 0.75)
    assert gates.to_dict() == {"min_bit_parity": 0.995, "min_map_ratio": 0.99, "max_latency_ratio": 0.75}
    assert not gates.met_by(point)
    assert gates.misses(point, 0.98) == [
        "bit parity 99.120 % misses 99.500 % by 0.380 points",  # of the worst length
        "latency 0.810 of FP32 misses 0.750 by 0.060",
        "mAP 0.9800 of FP32's misses 0.9900 by 0.0100",
    ]
    assert Gates(0.99, 0.99, 0.9).misses(point, 0.995) == []
    assert Gates().met_by(point)
    assert Gates().to_dict() == {}
    # Time is not measured for TensorRT, and then is no reason to refuse.
    assert not Gates(max_latency_ratio=0.5).too_slow(FrontPoint((), point.score, None, 1, "all INT8"))


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", ("avx2",), True),
        ("AMD64", ("avx2", "avx512f"), True),
        ("x86_64", (), True),
        ("x86_64", ("avx2", "avx_vnni"), False),
        ("x86_64", ("avx512f", "avx512_vnni"), False),
        ("x86_64", ("amx_int8",), False),
        ("aarch64", (), False),
        ("arm64", ("asimddp",), False),
    ],
)
def test_products_overflow_on_x86_without_vnni(machine, flags, expected):
    assert needs_reduced_range(machine, flags) is expected


def test_names_of_files(tmp_path):
    assert default_out(tmp_path / "model.onnx", "cpu") == tmp_path / "model.int8.onnx"
    assert default_out(tmp_path / "model.onnx", "trt") == tmp_path / "model.int8.trt.onnx"
    with pytest.raises(OutputError, match=r"a model's name ends with \.onnx; pass for example --out m\.onnx"):
        check_out(tmp_path / "model.onnx", tmp_path / "m.int8")
    with pytest.raises(OutputError, match="its folder does not exist"):
        check_out(tmp_path / "model.onnx", tmp_path / "no" / "m.onnx")
