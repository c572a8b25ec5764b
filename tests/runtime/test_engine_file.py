from __future__ import annotations

import json
import os
from importlib import util
from pathlib import Path

import pytest
from _tensorrt_double import engine_bytes, save_engine, sidecar_of
from _tiny_model import save_tiny_model, tiny_manifest, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from admth_runtime import InputError, ManifestError, ModelError
from admth_runtime.cli import _plain
from admth_runtime.engine_file import check_engine, load_engine, read_engine_file, read_header
from admth_runtime.engine_kind import is_engine
from admth_runtime.info import describe_model
from admth_runtime.sidecar import read_sidecar, sidecar_path, write_sidecar


@pytest.fixture(params=["rtx", "tensorrt"])
def engine(request, tmp_path):
    return save_engine(tmp_path, request.param)


def both_ways(path, message, kind=ModelError, **options):
    """Every check says the same, whether the file is only read or loaded."""
    for function in (read_engine_file, load_engine):
        with pytest.raises(kind, match=message) as caught:
            function(path, **options)
        assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_one(engine):
    sidecar = read_sidecar(engine)
    facts, content = load_engine(engine)
    assert content == engine.read_bytes()
    assert (facts.path, facts.size, facts.sha256) == (engine, len(content), sidecar.engine_sha256)
    assert (facts.sidecar, facts.manifest) == (sidecar, sidecar.manifest)
    assert facts.header.flavour == sidecar.flavour
    assert read_engine_file(engine) == facts
    assert check_engine(engine, sidecar) == facts.header
    assert str(facts.header) in ("TensorRT 10.13.3.9", "TensorRT-RTX 1.7.1.116")


@pytest.mark.parametrize(
    ("name", "content", "answer"),
    [
        ("m.plan", b"anything", True),
        ("m.RTX", b"", True),
        ("m.engine", b"ftrt", True),
        ("m.onnx", b"ftrt....", True),
        ("m", b"vtrt....", True),
        ("m.onnx", b"\x08\x0a", False),
        ("m.bin", b"", False),
    ],
)
def test_what_an_engine_is(tmp_path, name, content, answer):
    (tmp_path / name).write_bytes(content)
    assert is_engine(tmp_path / name) is answer
    assert is_engine(tmp_path / "missing.onnx") is False
    assert is_engine(tmp_path) is False


class TestBadEngines:
    def test_missing(self, tmp_path):
        both_ways(tmp_path / "none.plan", "no such engine file; build one with  admth-export trt")

    def test_a_folder(self, tmp_path):
        (tmp_path / "m.plan").mkdir()
        both_ways(tmp_path / "m.plan", "is a folder")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
    def test_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "m.plan")
        both_ways(tmp_path / "m.plan", "not a regular file")

    def test_empty(self, engine):
        engine.write_bytes(b"")
        both_ways(engine, "is empty")

    def test_a_few_bytes(self, engine):
        engine.write_bytes(engine.read_bytes()[:40])
        both_ways(engine, "cut off after 40 bytes, inside its header")

    def test_truncated(self, engine):
        content = engine.read_bytes()
        engine.write_bytes(content[:-1])
        both_ways(engine, f"is truncated: it has {len(content) - 1:,} bytes and its sidecar says {len(content):,}")

    def test_too_long(self, engine):
        engine.write_bytes(engine.read_bytes() + b"x")
        both_ways(engine, "is not the engine of its sidecar: it has .* bytes")

    @pytest.mark.parametrize("place", [28, 64, 500, -1])
    def test_a_flipped_bit(self, engine, place):
        content = bytearray(engine.read_bytes())
        content[place] ^= 1
        engine.write_bytes(content)
        both_ways(engine, r"was altered, or is not the engine of its sidecar: its SHA-256 is .*run  admth-export trt")

    def test_a_foreign_file(self, engine):
        engine.write_bytes(b"PK\x03\x04" + bytes(100))
        both_ways(engine, r"is not a TensorRT engine \(it starts with 50 4b 03 04, not with ftrt or vtrt\)")

    def test_an_onnx_model_by_an_engines_name(self, tmp_path):
        both_ways(save_tiny_model(tmp_path / "m.plan"), "is not a TensorRT engine")

    def test_a_header_glued_on(self, engine):
        engine.write_bytes(b'{"stride": 32}' + engine.read_bytes())
        both_ways(engine, "is not a TensorRT engine")

    def test_another_engine(self, engine):
        flavour = read_sidecar(engine).flavour
        other = engine_bytes(flavour, model=tiny_model(seed=1))
        assert len(other) == engine.stat().st_size
        engine.write_bytes(other)
        both_ways(engine, "not the engine of its sidecar: its SHA-256")

    def test_another_flavour(self, tmp_path):
        path = save_engine(tmp_path, "rtx")
        path.write_bytes(engine_bytes("tensorrt"))
        both_ways(path, "is a TensorRT engine and its sidecar is of a TensorRT-RTX engine")

    def test_another_version(self, tmp_path):
        path = save_engine(tmp_path, "rtx")
        path.write_bytes(engine_bytes("rtx", "1.6.0.99"))
        both_ways(path, r"was built by TensorRT-RTX 1\.6\.0\.99 and its sidecar says 1\.7\.1\.116")

    def test_a_build_number_beyond_a_byte(self, tmp_path):
        content = engine_bytes("rtx", "1.7.1.300")
        (tmp_path / "m.rtx").write_bytes(content)
        write_sidecar(tmp_path / "m.rtx", sidecar_of(content, "rtx", "1.7.1.300"))
        assert read_engine_file(tmp_path / "m.rtx").header.version == (1, 7, 1, 300 % 256)

    @settings(max_examples=60, deadline=None)
    @given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
    def test_any_flipped_bit_is_found(self, tmp_path_factory, place, bit):
        path = save_engine(tmp_path_factory.mktemp("flip"))
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(ModelError):
            read_engine_file(path)


class TestTrust:
    def test_without_a_sidecar(self, engine):
        sidecar_path(engine).unlink()
        both_ways(engine, "has no sidecar .*executable code.*trust_engine=True", ManifestError)
        with pytest.raises(ManifestError, match="executable code"):
            check_engine(engine, None)
        assert check_engine(engine, None, trust_engine=True) == read_header(engine)

    def test_trust_needs_a_manifest(self, engine):
        sidecar_path(engine).unlink()
        both_ways(engine, "nothing says what images it takes", InputError, trust_engine=True)
        facts = read_engine_file(engine, trust_engine=True, manifest=tiny_manifest())
        assert (facts.sidecar, facts.manifest) == (None, tiny_manifest())

    def test_trust_does_not_excuse_a_sidecar_that_disagrees(self, engine):
        engine.write_bytes(engine.read_bytes()[:-1] + b"!")
        both_ways(engine, "was altered", trust_engine=True)

    def test_nor_one_that_was_edited(self, engine):
        fields = json.loads(sidecar_path(engine).read_text())
        fields["flavour"] = "rtx" if fields["flavour"] == "tensorrt" else "tensorrt"
        sidecar_path(engine).write_text(json.dumps(fields))
        both_ways(engine, "was edited", ManifestError, trust_engine=True)

    def test_two_manifests(self, engine):
        both_ways(engine, "leave manifest out", InputError, manifest=tiny_manifest())


def test_info_describes_an_engine(engine):
    facts = describe_model(engine)
    assert facts["precision"] == "fp16"
    assert facts["profiles"] == [{"min": 1, "opt": 4, "max": 16}]
    assert facts["compute_capabilities"] == ["sm89"]
    assert facts["source"]["name"] == "model.onnx"
    assert facts["code_lengths"] == [16, 32, 48, 64]
    json.dumps(facts)
    assert all("\n" not in _plain(value) for value in facts.values())


def test_info_refuses_what_the_runtime_refuses(engine):
    engine.write_bytes(engine.read_bytes() + b"x")
    with pytest.raises(ModelError, match="not the engine of its sidecar"):
        describe_model(engine)


@pytest.mark.skipif(util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_the_header_of_a_real_engine(tmp_path):
    """What is read from the header is what TensorRT-RTX writes there."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(tiny_model().SerializeToString())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("images", *[(batch, 12, 12, 3) for batch in (1, 4, 16)])
    config.add_optimization_profile(profile)
    content = bytes(builder.build_serialized_network(network, config))
    path: Path = tmp_path / "real.rtx"
    path.write_bytes(content)
    header = read_header(path)
    assert header.flavour == "rtx"
    assert header.version_text == trt.__version__
    write_sidecar(path, sidecar_of(content, "rtx", trt.__version__))
    assert read_engine_file(path).header == header
    for damaged in (content[:-1], content[:100], bytes([*content[:-1], content[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"is truncated|was altered"):
            read_engine_file(path)
