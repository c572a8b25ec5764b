"""Sources of a corpus: what is listed, in which order, and what is refused."""

from __future__ import annotations

import os
import tarfile

import pytest
from _corpus import make_parquet, make_pictures, make_tar, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from admth_runtime import InputError
from admth_runtime.corpus.listing import Listing, write_listing
from admth_runtime.corpus.parquet_images import ImageColumn
from admth_runtime.corpus.sources import Listed, list_source, recognise
from admth_runtime.corpus.tar_members import tar_images
from admth_runtime.encoding import list_images


def uris(source: object, column: str = "image", recursive: bool = True) -> list[str]:
    return [each.uri for each in list_source(recognise(str(source)), column=column, recursive=recursive)]


class TestFoldersListsAndGlobs:
    def test_a_folder_is_listed_as_for_a_single_file(self, tmp_path):
        folder = make_pictures(tmp_path / "pictures", 20)
        (folder / "notes.txt").write_text("no image")
        assert uris(folder) == list_images([folder])
        assert uris(folder, recursive=False) == list_images([folder], recursive=False)

    def test_links_to_folders_are_not_followed(self, tmp_path):
        folder = make_pictures(tmp_path / "pictures", 3)
        (folder / "loop").symlink_to(folder)
        assert len(uris(folder)) == 3

    def test_a_list_takes_paths_as_they_stand(self, tmp_path):
        (tmp_path / "all.txt").write_text("b.png\n\n/c/d e.jpg\r\nb.png\n", newline="")
        assert uris(tmp_path / "all.txt") == ["b.png", "/c/d e.jpg", "b.png"]

    def test_a_glob_is_sorted_and_may_be_recursive(self, tmp_path):
        folder = make_pictures(tmp_path / "pictures", 6)
        found = uris(folder / "**" / "*.png")
        assert found == sorted(found)
        assert len(found) == 6

    def test_lists_and_globs_may_name_archives(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_tar(tmp_path / "b.tar", {"k.png": picture(0)})
        make_parquet(tmp_path / "a.parquet", [picture(1), None])
        (tmp_path / "all.txt").write_text("b.tar\nx.png\na.parquet\n")
        assert uris("all.txt") == ["b.tar!/k.png", "x.png", "a.parquet!/0", "a.parquet!/1"]
        assert uris("[ab].*") == ["a.parquet!/0", "a.parquet!/1", "b.tar!/k.png"]

    def test_a_name_that_is_not_utf8_is_a_known_problem(self, tmp_path):
        os.close(os.open(os.fsencode(tmp_path) + b"/\xff.png", os.O_CREAT | os.O_WRONLY))
        (listed,) = list_source(recognise(str(tmp_path)), column="image", recursive=True)
        assert listed.uri == f"{tmp_path}/\\udcff.png"
        assert listed.problem == "its name is not UTF-8: rename the file"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("none.png", "none.png: no such file or folder"),
            ("a.tar.gz", "is a compressed tar, in which no worker can seek: unpack it"),
            ("a.tgz", "is a compressed tar"),
        ],
    )
    def test_what_is_refused(self, tmp_path, name, message):
        if name.startswith("a"):
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=message):
            recognise(str(tmp_path / name))


class TestTars:
    @pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_webdataset(self, tmp_path, kind):
        deep = "d" * 90 + "/" + "e" * 90 + ".JPG"
        members = {"a.png": picture(0), "a.json": b"{}", "b/c.png": picture(1), "._a.png": b"", deep: b"bad"}
        path = make_tar(tmp_path / "s.tar", members, kind)
        found = list(tar_images(path))
        assert [name for name, _, _ in found] == ["a.png", "b/c.png", deep]
        content = path.read_bytes()
        assert [content[offset : offset + size] for _, offset, size in found] == [picture(0), picture(1), b"bad"]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.binary(min_size=1, max_size=1500), min_size=1, max_size=4), st.data())
    def test_a_truncated_tar_is_refused_wherever_it_ends(self, tmp_path_factory, contents, data):
        folder = tmp_path_factory.mktemp("tar")
        path = make_tar(folder / "s.tar", {f"{n}.png": content for n, content in enumerate(contents)})
        whole = path.read_bytes()
        end = max(offset + size for _, offset, size in tar_images(path))
        end += -end % 512
        path.write_bytes(whole[: data.draw(st.integers(0, end))])
        with pytest.raises(InputError, match=r"truncated|is empty"):
            list(tar_images(path))

    def test_a_damaged_header_is_refused_and_named(self, tmp_path):
        path = make_tar(tmp_path / "s.tar", {"a.png": b"a" * 600, "b.png": b"b", "c.png": b"c"})
        content = bytearray(path.read_bytes())
        content[2048 - 512 + 3] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is damaged: there is no tar header at byte 1,536"):
            list(tar_images(path))

    def test_what_is_no_tar(self, tmp_path):
        (tmp_path / "s.tar").write_bytes(picture(0, (40, 40)))
        with pytest.raises(InputError, match="is no tar, or damaged or compressed"):
            list(tar_images(tmp_path / "s.tar"))


class TestParquet:
    @pytest.mark.parametrize("struct", [False, True])
    def test_rows_in_any_order(self, tmp_path, struct):
        images = [picture(n) if n != 5 else None for n in range(20)]
        column = ImageColumn(make_parquet(tmp_path / "a.parquet", images, struct=struct), "image")
        assert column.rows == 20
        assert [column.read(row) for row in (0, 19, 5, 7, 6)] == [images[row] for row in (0, 19, 5, 7, 6)]
        column.close()

    def test_what_is_refused(self, tmp_path):
        path = make_parquet(tmp_path / "a.parquet", [b"x"], column="jpg")
        with pytest.raises(InputError, match="has no column 'image': name one of label, jpg with --column"):
            ImageColumn(path, "image")
        with pytest.raises(InputError, match="holds int64, not the bytes of images"):
            ImageColumn(path, "label")
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(InputError, match="is damaged or not Parquet"):
            ImageColumn(path, "jpg")


class TestListing:
    def test_shards_are_row_groups_and_the_digest_is_of_the_content(self, tmp_path):
        folder = make_pictures(tmp_path / "pictures", 25)
        sources = [recognise(str(folder))]
        facts = [
            write_listing(tmp_path / f"{size}.parquet", sources, column="image", recursive=True, shard_size=size)
            for size in (10, 7)
        ]
        assert facts[0] == facts[1]
        assert facts[0].images == 25
        listing = Listing(tmp_path / "10.parquet")
        assert [len(listing.shard(number)) for number in range(3)] == [10, 10, 5]
        assert [each.uri for number in range(3) for each in listing.shard(number)] == uris(folder)
        (folder / "zzz.png").write_bytes(picture(0))
        more = write_listing(tmp_path / "m.parquet", sources, column="image", recursive=True, shard_size=10)
        assert more.images == 26
        assert more.sha256 != facts[0].sha256

    def test_each_image_once(self, tmp_path):
        folder = make_pictures(tmp_path / "pictures", 6)
        (tmp_path / "all.txt").write_text("\n".join([*uris(folder), uris(folder)[0]]))
        sources = [recognise(str(source)) for source in (folder, folder / "sub", tmp_path / "all.txt")]
        facts = write_listing(tmp_path / "l.parquet", sources, column="image", recursive=True, shard_size=10)
        assert facts.images == 6

    def test_nothing_found_names_what_is_there(self, tmp_path):
        make_tar(tmp_path / "a.tar", {})
        with pytest.raises(InputError, match=r"no images in .*, but \.tar files: pass"):
            write_listing(
                tmp_path / "l.parquet", [recognise(str(tmp_path))], column="image", recursive=True, shard_size=1
            )
        assert not (tmp_path / "l.parquet").exists()

    def test_every_field_survives(self, tmp_path):
        path = make_tar(tmp_path / "a.tar", {"x.png": picture(0)})
        write_listing(tmp_path / "l.parquet", [recognise(str(path))], column="image", recursive=True, shard_size=5)
        (listed,) = Listing(tmp_path / "l.parquet").shard(0)
        state = path.stat()
        size = len(picture(0))
        assert listed == Listed(f"{path}!/x.png", str(path), state.st_size, state.st_mtime_ns, 512, size, None)
