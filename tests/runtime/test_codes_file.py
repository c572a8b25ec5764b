from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from admth_runtime import EncodedImages, HashCodes, InputError, OutputError, read_codes, write_codes
from admth_runtime.codes_file import CODES_METADATA_KEY
from admth_runtime.errors import MissingExtraError

FORMATS = ("parquet", "npz")


def make(count: int = 7, *, logits: bool = True, lengths=(16, 48), seed: int = 0) -> EncodedImages:
    generator = np.random.default_rng(seed)
    values = {length: generator.normal(size=(count, length)).astype(np.float32) for length in lengths}
    codes = {length: np.packbits(value > 0, axis=1) for length, value in values.items()}
    return EncodedImages(
        ids=generator.permutation(count).astype(np.int64) * 10,
        uris=tuple(f"folder/Bild ü {number}.jpg" for number in range(count)),
        codes=HashCodes(codes, values if logits else None),
        model_sha256="ab" * 32,
        preprocessing_sha256="cd" * 32,
    )


def equal(a: EncodedImages, b: EncodedImages) -> bool:
    return (
        np.array_equal(a.ids, b.ids)
        and a.uris == b.uris
        and a.code_lengths == b.code_lengths
        and tuple(a.codes.logits) == tuple(b.codes.logits)
        and all(np.array_equal(a.codes[length], b.codes[length]) for length in a.codes)
        and all(np.array_equal(a.codes.logits[length], b.codes.logits[length]) for length in a.codes.logits)
        and (a.model_sha256, a.preprocessing_sha256, a.created_by)
        == (b.model_sha256, b.preprocessing_sha256, b.created_by)
    )


@pytest.fixture(params=FORMATS)
def path(request, tmp_path):
    return tmp_path / f"codes.{request.param}"


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("logits", [True, False])
def test_there_and_back(path, count, logits):
    encoded = make(count, logits=logits)
    write_codes(path, encoded)
    back = read_codes(path)
    assert equal(back, encoded)
    assert len(back) == count
    assert back.ids.dtype == np.int64
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_unknown_model_stays_unknown(path):
    write_codes(path, replace(make(), model_sha256=None, preprocessing_sha256=None))
    assert read_codes(path).model_sha256 is None


def test_parquet_is_readable_by_others(tmp_path):
    encoded = make()
    write_codes(tmp_path / "a.parquet", encoded)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["id", "uri", "code_16", "code_48", "logits_16", "logits_48"]
    assert table.schema.field("id").type == pa.int64()
    assert table.schema.field("uri").type == pa.string()
    assert table.schema.field("code_48").type == pa.binary(6)
    assert table.schema.field("logits_48").type == pa.list_(pa.float32(), 48)
    assert table["code_16"].to_pylist() == [row.tobytes() for row in encoded.codes[16]]
    facts = json.loads(table.schema.metadata[CODES_METADATA_KEY.encode()])
    assert facts["bit_order"] == "msb"
    assert facts["code_lengths"] == [16, 48]
    assert facts["model_sha256"] == "ab" * 32


def test_parquet_in_several_row_groups(tmp_path):
    encoded = make(100)
    write_codes(tmp_path / "a.parquet", encoded)
    pq.write_table(pq.read_table(tmp_path / "a.parquet"), tmp_path / "b.parquet", row_group_size=30)
    assert equal(read_codes(tmp_path / "b.parquet"), encoded)


def test_npz_is_readable_by_numpy(tmp_path):
    encoded = make()
    write_codes(tmp_path / "a.npz", encoded)
    with np.load(tmp_path / "a.npz") as archive:
        assert np.array_equal(archive["code_16"], encoded.codes[16])
        assert archive["uri"].tolist() == list(encoded.uris)


def rewrite(path, *, metadata=None, drop=(), **columns) -> None:
    """Change metadata fields or columns of a written file with the format's own library."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            content = {name: archive[name] for name in archive.files if name not in drop}
        facts = json.loads(str(content[CODES_METADATA_KEY])) | (metadata or {})
        np.savez(path, **{**content, CODES_METADATA_KEY: np.asarray(json.dumps(facts)), **columns})
        return
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[CODES_METADATA_KEY.encode()]) | (metadata or {})
    for name, values in columns.items():
        kind = pa.binary(values.shape[1]) if values.ndim == 2 and values.dtype == np.uint8 else None
        array = pa.array([row.tobytes() for row in values], kind) if kind else pa.array(values)
        table = table.set_column(table.column_names.index(name), name, array)
    pq.write_table(
        table.drop_columns(list(drop)).replace_schema_metadata({CODES_METADATA_KEY: json.dumps(facts)}), path
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"format_version": 2}}, "format version 2 is newer than 1"),
        ({"metadata": {"format_version": None}}, "no format version"),
        ({"metadata": {"bit_order": "lsb"}}, "bit order 'lsb' is not 'msb'"),
        ({"metadata": {"code_lengths": [16, 64]}}, r"lacks the columns \['code_64', 'logits_64'\]"),
        ({"metadata": {"code_lengths": None}}, "names no code lengths"),
        ({"metadata": {"code_lengths": [12]}}, "multiple of 8"),
        ({"metadata": {"model_sha256": 5}}, "model_sha256 5 is no text"),
        ({"drop": ("uri",)}, "uri"),
        ({"drop": ("logits_48",)}, r"lacks the columns \['logits_48'\]"),
        ({"id": np.zeros(7, np.int64)}, "ids repeat"),
        ({"id": np.arange(7, dtype=np.int32)}, "ids are int32"),
        ({"code_16": np.zeros((7, 3), np.uint8)}, r"code_16 is uint8 \[7, 3\], not uint8 \[7, 2\]"),
        ({"code_16": np.zeros(7, np.int64)}, "code_16 is int64"),
        ({"logits_16": np.zeros(7, np.float64)}, "logits_16 is float64"),
        ({"uri": np.arange(7)}, "uri"),
    ],
)
def test_files_that_break_the_schema(path, changes, message):
    write_codes(path, make())
    rewrite(path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_codes(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nulls_are_refused(tmp_path):
    write_codes(tmp_path / "a.parquet", make())
    table = pq.read_table(tmp_path / "a.parquet")
    table = table.set_column(1, "uri", pa.array([None] * 7, pa.string()))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="uri has 7 nulls"):
        read_codes(tmp_path / "a.parquet")


def test_files_of_others(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    np.save(tmp_path / "b.npy", np.zeros(3))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", x=np.array([{}], dtype=object))  # pickled: never loaded
    pq.write_table(pa.table({"x": [1]}), tmp_path / "d.parquet")
    for name, message in {"a.npz": "without admth's metadata", "b.npz": "no .npz", "c.npz": "Object arrays cannot be",
                          "d.parquet": "without admth's metadata"}.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            read_codes(tmp_path / name)


def test_missing_empty_folder_and_unknown_ending(tmp_path):
    for suffix in FORMATS:
        (tmp_path / f"empty.{suffix}").touch()
        (tmp_path / f"folder.{suffix}").mkdir()
        for name, message in {"none": "no such file", "empty": "is empty", "folder": "is a folder"}.items():
            with pytest.raises(InputError, match=message):
                read_codes(tmp_path / f"{name}.{suffix}")
    with pytest.raises(InputError, match=r"\.parquet or \.npz"):
        read_codes(tmp_path / "codes.csv")
    with pytest.raises(InputError, match=r"\.parquet or \.npz"):
        write_codes(tmp_path / "codes", make())
    with pytest.raises(OutputError, match="folder does not exist"):
        write_codes(tmp_path / "none" / "codes.npz", make())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for suffix in FORMATS:
        write_codes(folder / f"a.{suffix}", make())
    return {suffix: (folder / f"a.{suffix}").read_bytes() for suffix in FORMATS}


@pytest.mark.parametrize("suffix", FORMATS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncation_is_one_line(written, suffix, tmp_path, data):
    whole = written[suffix]
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
    with pytest.raises(InputError) as caught:
        read_codes(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", FORMATS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_one_line_or_harmless(written, suffix, tmp_path, data):
    content = bytearray(written[suffix])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    try:
        assert len(read_codes(path)) == 7
    except InputError as error:
        assert "\n" not in str(error)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (lambda: write_codes(tmp_path / "a.parquet", make()), lambda: read_codes(tmp_path / "a.parquet")):
        with pytest.raises(MissingExtraError, match=r"pip install 'admth\[parquet\]'"):
            call()
    write_codes(tmp_path / "a.npz", make())
    assert len(read_codes(tmp_path / "a.npz")) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.zeros(7, np.int64)}, "ids repeat"),
        ({"ids": np.arange(6, dtype=np.int64)}, "one for each uri"),
        ({"ids": np.arange(7, dtype=np.float64)}, "float64"),
        ({"codes": HashCodes({})}, "no code length"),
        ({"codes": HashCodes({16: np.zeros((7, 2), np.int16)})}, "code_16 is int16"),
        ({"codes": HashCodes({16: np.zeros((6, 2), np.uint8)})}, r"uint8 \[6, 2\]"),
    ],
)
def test_inconsistent_tables_cannot_be_made(changes, message):
    with pytest.raises(InputError, match=message):
        replace(make(), **changes)
