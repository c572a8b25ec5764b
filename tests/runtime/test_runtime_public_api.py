from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import admth_runtime

MODULES = [
    name.removeprefix("admth_runtime.")
    for _, name, _ in pkgutil.walk_packages(admth_runtime.__path__, "admth_runtime.")
    if not name.endswith("__main__")
]

PUBLIC = [
    "AdmthError",
    "CodeLengthError",
    "DeviceCodes",
    "DeviceError",
    "EncodedImages",
    "Engine",
    "HashCodes",
    "HashIndex",
    "HashPipeline",
    "HashRuntime",
    "ImageError",
    "InputError",
    "Manifest",
    "ManifestError",
    "MissingExtraError",
    "ModelError",
    "ModelFile",
    "OnnxFile",
    "OutputError",
    "PipelineError",
    "PipelineOptions",
    "PreprocessingSpec",
    "QueueFullError",
    "SearchHits",
    "SelfTestError",
    "Sidecar",
    "__version__",
    "from_hex",
    "hamming_distance",
    "hamming_matrix",
    "load_image",
    "pack_bits",
    "pack_logits",
    "preprocess",
    "read_codes",
    "read_model",
    "read_onnx",
    "read_sidecar",
    "to_hex",
    "unpack_bits",
    "write_codes",
]


def test_the_public_names_are_these():
    assert admth_runtime.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_resolves_and_is_where_type_checkers_look(name):
    value = getattr(admth_runtime, name)
    assert name in dir(admth_runtime)
    if name == "__version__":
        return
    tree = ast.parse(Path(admth_runtime.__file__).read_text())
    home = next(
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}
    )
    assert getattr(importlib.import_module(home), name) is value
    assert value.__doc__


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        admth_runtime.nothing  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_offers(name):
    if name == "_version":
        return
    module = importlib.import_module(f"admth_runtime.{name}")
    assert module.__doc__
    assert len(module.__all__) == len(set(module.__all__))
    for public in module.__all__:
        assert hasattr(module, public)


@pytest.mark.parametrize("name", ["__main__", *MODULES])
def test_no_module_imports_another_room_or_a_training_package(name):
    place = Path(admth_runtime.__file__).parent.joinpath(*name.split("."))
    tree = ast.parse((place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text())
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"torch", "onnx", "admth_training", "admth_export", "runtime", "training", "export"}
