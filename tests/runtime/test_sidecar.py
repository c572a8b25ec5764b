from __future__ import annotations

import json
from dataclasses import replace

import pytest
from _tensorrt_double import engine_bytes, save_engine, sidecar_of
from _tiny_model import tiny_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from admth_runtime import InputError, ManifestError, OutputError
from admth_runtime.sidecar import BatchProfile, Sidecar, read_sidecar, sidecar_path, write_sidecar

CONTENT = engine_bytes()
SIDECAR = sidecar_of(CONTENT)


def test_where_it_is(tmp_path):
    assert sidecar_path(tmp_path / "model.fp16.plan") == tmp_path / "model.fp16.plan.json"


def test_written_and_read(tmp_path):
    whole = replace(
        SIDECAR,
        layers_kept={"features.0": "fp32"},
        build_options={"workspace_mib": 512},
        predicted_parity={"minimum_bit_parity": 0.9995},
        measured_parity={"minimum_bit_parity": 0.9993},
        version_compatible=False,
        compute_capabilities=("sm86", "sm120"),
        profiles=(BatchProfile(1, 1, 1), BatchProfile(2, 8, 32)),
    )
    assert write_sidecar(tmp_path / "m.rtx", whole) == tmp_path / "m.rtx.json"
    assert read_sidecar(tmp_path / "m.rtx") == whole
    assert whole.max_batch == 32


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        replace,
        st.just(SIDECAR),
        build_seconds=st.floats(0, 1e6),
        layers_kept=st.dictionaries(st.text(), st.sampled_from(["fp32", "fp16"]), max_size=3),
        compute_capabilities=st.lists(st.sampled_from(["sm80", "sm89", "sm120"]), min_size=1, max_size=3).map(tuple),
        engine_bytes=st.integers(1, 2**40),
        version_compatible=st.booleans(),
    )
)
def test_any_sidecar_survives_json(sidecar):
    assert Sidecar.from_dict(json.loads(json.dumps(sidecar.to_dict()))) == sidecar


def test_with_measured_parity():
    assert SIDECAR.with_measured_parity({"a": 1}) == replace(SIDECAR, measured_parity={"a": 1})


def test_rebuild_command():
    assert SIDECAR.rebuild_command == "admth-export trt model.onnx --fp16 --flavor rtx"
    mixed = replace(SIDECAR, flavour="tensorrt", build_options={"precision": "--int8 --fp16"}, version_compatible=True)
    assert mixed.rebuild_command == ("admth-export trt model.onnx --int8 --fp16 --flavor tensorrt --version-compatible")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flavour": "cuda"}, "flavour 'cuda' is unknown: use one of tensorrt, rtx"),
        ({"tensorrt_version": "ten"}, "'ten' is not a version"),
        ({"compute_capabilities": ()}, "not names such as sm89"),
        ({"compute_capabilities": ("8.9",)}, "not names such as sm89"),
        ({"profiles": ()}, "profiles are empty"),
        ({"engine_sha256": "AB" * 32}, "engine_sha256"),
        ({"source_sha256": ""}, "source_sha256"),
        ({"engine_bytes": 0}, "engine_bytes 0"),
        ({"source_name": "../model.onnx"}, "not a file name without folders"),
    ],
)
def test_values_that_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(SIDECAR, **changes)


@pytest.mark.parametrize("limits", [(0, 1, 2), (2, 1, 4), (1, 8, 4), (1, 2.0, 4), (True, 1, 1), (-1, 1, 1)])
def test_batch_limits_that_are_refused(limits):
    with pytest.raises(InputError, match=r"batch limits .*--batch MIN OPT MAX"):
        BatchProfile(*limits)


class TestReading:
    @pytest.fixture
    def engine(self, tmp_path):
        return save_engine(tmp_path)

    def change(self, engine, edit):
        path = sidecar_path(engine)
        fields = json.loads(path.read_text())
        edit(fields)
        path.write_text(json.dumps(fields))

    def test_missing(self, engine):
        sidecar_path(engine).unlink()
        with pytest.raises(ManifestError, match=r"has no sidecar model\.fp16\.rtx\.json.*admth-export trt"):
            read_sidecar(engine)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"", "is not JSON"),
            (b"[1, 2]", "is a JSON list, not a sidecar"),
            (b"{}", "format version None is not a positive integer"),
            (b'{"format_version": 99}', "format version 99 is newer than 1.*pip install -U admth"),
            (b"\xff\xfe", "cannot be read"),
            (b"[" * 100_000, "is not JSON"),
            (b" " * (17 << 20), "is no sidecar"),
        ],
    )
    def test_broken(self, engine, text, message):
        sidecar_path(engine).write_bytes(text)
        with pytest.raises(ManifestError, match=message) as caught:
            read_sidecar(engine)
        assert "\n" not in str(caught.value)

    def test_a_folder_in_its_place(self, engine):
        sidecar_path(engine).unlink()
        sidecar_path(engine).mkdir()
        with pytest.raises(ManifestError, match="cannot be read"):
            read_sidecar(engine)

    @pytest.mark.parametrize("field", [name for name in SIDECAR.to_dict() if not name.endswith("_parity")])
    def test_a_field_that_is_missing(self, engine, field):
        self.change(engine, lambda fields: fields.pop(field))
        with pytest.raises(ManifestError, match=r"is missing|is not a positive integer"):
            read_sidecar(engine)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda f: f.update(compute_capabilities=["sm86"]), "was edited after it was written"),
            (lambda f: f["manifest"].update(precision="fp32"), "was edited"),
            (lambda f: f["engine"].update(sha256="0" * 64), "was edited"),
            (lambda f: f["profiles"][0].update(max=64), "was edited"),
            (lambda f: f.update(predicted_parity={"minimum_bit_parity": 1.0}), "was edited"),
            (lambda f: f.update(new="field"), "was edited"),
            (lambda f: f.update(digest="0" * 64), "was edited"),
            (lambda f: f.update(profiles=[3]), "profile 3 is no object"),
            (lambda f: f["profiles"][0].update(min=True), "field 'min' is True"),
            (lambda f: f.update(compute_capabilities=[89]), "not a list of text"),
            (lambda f: f.update(flavour="cuda"), "flavour 'cuda' is unknown"),
            (lambda f: f["manifest"].update(format_version=99), "manifest's format version 99 is newer"),
            (lambda f: f.update(version_compatible=1), "field 'version_compatible' is 1"),
        ],
    )
    def test_edited(self, engine, edit, message):
        self.change(engine, edit)
        with pytest.raises(ManifestError, match=message) as caught:
            read_sidecar(engine)
        assert str(sidecar_path(engine)) in str(caught.value)

    def test_an_edit_of_white_space_is_none(self, engine):
        path = sidecar_path(engine)
        path.write_text(json.dumps(json.loads(path.read_text())))
        read_sidecar(engine)

    def test_it_cannot_be_written(self, tmp_path):
        with pytest.raises(OutputError, match="folder does not exist"):
            write_sidecar(tmp_path / "none" / "m.rtx", SIDECAR)


def test_the_manifest_is_the_models():
    assert SIDECAR.manifest == tiny_manifest(precision="fp16", target="tensorrt")
