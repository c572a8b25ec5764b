from __future__ import annotations

import json

import pytest
from _tiny_model import tiny_manifest

from admth_runtime.errors import InputError, ManifestError
from admth_runtime.manifest import FORMAT_VERSION, Manifest, output_names


def edited(**changes) -> str:
    fields = json.loads(tiny_manifest().to_json())
    for name, value in changes.items():
        if value is ...:
            del fields[name]
        else:
            fields[name] = value
    return json.dumps(fields)


def test_there_and_back():
    manifest = tiny_manifest(precision="int8", target="cpu", calibration={"method": "minmax"}, parity={"flips": 0})
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_fields_that_a_later_version_adds_are_ignored():
    assert Manifest.from_json(edited(colour="blue")) == tiny_manifest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "newer than .* pip install -U admth"),
        ({"format_version": ...}, "format version None"),
        ({"format_version": "1"}, "format version '1'"),
        ({"format_version": True}, "format version True"),
        ({"bit_order": "lsb"}, "bit order 'lsb'"),
        ({"bit_order": ...}, "bit order None"),
        ({"code_lengths": ...}, "'code_lengths' is missing"),
        ({"code_lengths": 16}, "'code_lengths' is 16"),
        ({"code_lengths": []}, "no code length"),
        ({"code_lengths": [12]}, "multiple of 8"),
        ({"code_lengths": [32, 16]}, "do not increase"),
        ({"code_lengths": ["16"]}, "multiple of 8"),
        ({"preprocessing": ...}, "'preprocessing' is missing"),
        ({"preprocessing": {"height": 8}}, "lacks the fields"),
        ({"preprocessing": {"height": 8, "width": 8, "gamma": 2}}, "unknown to this version"),
        ({"network": []}, "'network'"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"precision": 32}, "'precision' is 32"),
        ({"target": "tpu"}, "target 'tpu'"),
        ({"checkpoint_sha256": "abc"}, "64 lower-case hexadecimal"),
        ({"checkpoint_sha256": ...}, "'checkpoint_sha256' is missing"),
        ({"calibration": 1}, "'calibration' is 1"),
        ({"parity": "good"}, "'parity' is 'good'"),
        ({"created_by": None}, "'created_by'"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ManifestError, match=message) as caught:
        Manifest.from_json(edited(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_text_that_is_no_manifest(text):
    with pytest.raises(ManifestError):
        Manifest.from_json(text)


def test_bad_values_are_refused_at_construction():
    with pytest.raises(InputError, match="precision"):
        tiny_manifest(precision="fp4")


def test_outputs_are_compared_with_the_lengths():
    manifest = tiny_manifest((16, 32))
    names = output_names((16, 32))
    assert names == ("code_16", "logits_16", "code_32", "logits_32")
    manifest.check_outputs(tuple(reversed(names)))
    with pytest.raises(ManifestError, match=r"lacks \['logits_32'\]"):
        manifest.check_outputs(names[:3])
    with pytest.raises(ManifestError, match=r"has \['extra'\] beside"):
        manifest.check_outputs((*names, "extra"))
