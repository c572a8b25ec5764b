"""The page of ``admth-run browse`` in a real headless Chromium."""

from __future__ import annotations

import pytest
from _browse_corpus import COLOURS, PER_COLOUR, UPLOAD_LIMIT, make_corpus, served
from _chromium import Chromium
from PIL import Image

from admth_runtime.runtime import HashRuntime

HITS = "document.querySelectorAll('.columns:not(.loading) .hit').length"
FIRST = 1 << 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="module")
def server(folder, tiny_path):
    with HashRuntime(tiny_path, threads=1) as runtime, served(make_corpus(folder, runtime), runtime) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture
def page(browser, server):
    browser.open("about:blank")
    browser.problems.clear()
    browser.requests.clear()
    browser.open(server.url)
    browser.wait("document.querySelectorAll('#gallery img').length > 0")
    yield browser
    foreign = [url for url in browser.requests if not url.startswith((server.url, "data:", "about:"))]
    assert not foreign, foreign
    assert not [problem for problem in browser.problems if "404" not in problem], browser.problems


def choose(page, path, hits=40):
    page.choose_file("#file", path)
    page.wait(f"{HITS} === {hits}")


def test_page_starts_empty_and_says_what_it_serves(page):
    assert page.run("document.querySelector('#facts').textContent").startswith(
        f"{len(COLOURS) * PER_COLOUR + 3} images · 16, 32, 48, 64 bits · model.onnx"
    )
    assert page.run("document.querySelector('#empty').checkVisibility()")
    assert page.run(HITS) == 0


def test_chosen_file_shows_every_length_side_by_side(page, folder, tmp_path):
    choose(page, folder / "photos" / "red" / "000.png")
    columns = page.run(
        """[...document.querySelectorAll('.column')].map((column) => ({
            title: column.querySelector('h3').textContent,
            left: column.getBoundingClientRect().left,
            top: column.getBoundingClientRect().top,
            distances: [...column.querySelectorAll('.distance b')].map((node) => parseInt(node.textContent)),
            cells: column.querySelectorAll('.hit:first-child rect').length,
            differing: [...column.querySelectorAll('.hit')].map(
                (hit) => hit.querySelectorAll('.differs, .differs-zero').length),
        }))"""
    )
    assert [column["title"].split(" bits")[0] for column in columns] == ["16", "32", "48", "64"]
    assert all(column["title"].endswith(" ms") for column in columns)
    assert len({column["top"] for column in columns}) == 1
    assert [column["left"] for column in columns] == sorted({column["left"] for column in columns})
    assert [column["cells"] for column in columns] == [16, 32, 48, 64]
    for column in columns:
        assert column["distances"] == sorted(column["distances"]) == column["differing"]
        assert column["distances"][0] == 0
    assert page.run("[...document.querySelectorAll('#times dt')].map((node) => node.textContent)") == [
        "decode",
        "resize",
        "inference",
        "search, 4 lengths",
        "together",
    ]
    assert page.run("document.querySelectorAll('#codes rect').length") == 160
    opacities = page.run(
        "[...document.querySelectorAll('#codes rect')].map((node) => node.getAttribute('fill-opacity'))"
    )
    assert len(set(opacities)) > 50  # shaded by the margin
    page.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1440, 1000) and len(picture.convert("RGB").getcolors(1 << 20)) > 200


def test_dropped_file_is_searched(page, folder):
    page.drop_file(folder / "photos" / "green" / "003.jpg")
    page.wait(f"{HITS} === 40")
    assert page.run("document.querySelector('#query-name').textContent") == "003.jpg (64×48)"
    assert page.run("document.querySelector('#preview').naturalWidth") == 64
    assert page.run("document.querySelector('#overlay').hidden")


def test_neighbours_and_the_corpus_become_queries_and_going_back_works(page, folder):
    choose(page, folder / "photos" / "blue" / "001.jpg")
    page.run("document.querySelectorAll('.use')[1].click()")
    page.wait("location.hash.startsWith('#id=') && document.querySelector('#query-name').textContent.includes('/')")
    first = page.run("document.querySelector('#query-name').textContent")
    page.wait("[...document.querySelectorAll('.use')].some((node) => node.disabled)")
    page.run("document.querySelector('#gallery button').click()")
    page.wait(f"document.querySelector('#query-name').textContent !== {first!r}")
    assert page.run("document.querySelectorAll('#gallery button[aria-pressed=true]').length") == 1
    page.run("history.back()")
    page.wait(f"document.querySelector('#query-name').textContent === {first!r}")


def test_address_with_an_id_opens_the_search(page, server):
    page.open(f"{server.url}#id={FIRST + 7}")
    page.wait(f"{HITS} === 40")
    assert "/red/007.jpg" in page.run("document.querySelector('#query-name').textContent")


def test_pointing_at_an_image_marks_it_at_every_length(page, server):
    page.open(f"{server.url}#id={FIRST + 7}")
    page.wait(f"{HITS} === 40")
    page.run("document.querySelector('.hit').dispatchEvent(new Event('mouseenter'))")
    marked = page.run("[...document.querySelectorAll('.hit.same')].map((node) => node.dataset.id)")
    assert marked == [str(FIRST + 7)] * 4
    page.run("document.querySelector('.hit').dispatchEvent(new Event('mouseleave'))")
    assert page.run("document.querySelectorAll('.hit.same').length") == 0


def test_filter_and_number_of_neighbours(page, folder):
    choose(page, folder / "photos" / "red" / "000.png")
    page.run(
        "document.querySelector('#k').value = '5'; document.querySelector('#k').dispatchEvent(new Event('change'))"
    )
    page.wait(f"{HITS} === 20")
    page.run("document.querySelector('#filter').focus()")
    page.call("Input.insertText", text="grey")
    page.wait("document.querySelector('#results-title').textContent.includes('12 images whose path contains')")
    assert page.run("[...document.querySelectorAll('.hit img')].every((node) => node.alt.includes('/grey/'))")
    page.call("Input.insertText", text="ish")
    page.wait("document.querySelector('#empty').checkVisibility()")
    assert page.run("document.querySelector('#empty').textContent") == "No image's path contains “greyish”."


def test_order_by_the_logits(page, folder):
    choose(page, folder / "photos" / "red" / "002.png")
    page.run(
        "document.querySelector('#rerank').value = 'asymmetric';"
        "document.querySelector('#rerank').dispatchEvent(new Event('change'))"
    )
    page.wait("document.querySelectorAll('.distance b[title*=score]').length === 40")


def test_gallery_filter(page):
    page.run("document.querySelector('#corpus-filter').focus()")
    page.call("Input.insertText", text="green")
    page.wait(f"document.querySelectorAll('#gallery img').length === {PER_COLOUR}")
    page.call("Input.insertText", text="x")
    page.wait("document.querySelector('#gallery-note').checkVisibility()")
    assert page.run("document.querySelector('#gallery-note').textContent") == "No image's path contains “greenx”."


def test_files_that_are_gone_show_a_placeholder_and_stored_codes(page, server):
    page.open(f"{server.url}#id={FIRST + len(COLOURS) * PER_COLOUR + 1}")
    page.wait(f"{HITS} === 40")
    assert "stored codes are used" in page.run("document.querySelector('#query-note').textContent")
    # A placeholder is a picture too: nothing on the page is a broken image.
    page.wait("[...document.querySelectorAll('.hit img')].every((node) => node.complete && node.naturalWidth > 0)")
    assert page.run("document.querySelectorAll('.hit img[src*=\"1152921504606847025\"]').length") > 0


def test_errors_are_said_and_go_away(page, tmp_path, folder):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    page.choose_file("#file", broken)
    page.wait("!document.querySelector('#error').hidden")
    assert (
        page.run("document.querySelector('#error p').textContent") == "broken.png: is not an image that Pillow can read"
    )
    large = tmp_path / "large.png"
    large.write_bytes(b"x" * (UPLOAD_LIMIT + 1))
    page.choose_file("#file", large)
    page.wait("document.querySelector('#error p').textContent.includes('larger than')")
    gone = tmp_path / "gone.png"
    page.drop_file(gone)
    page.wait("document.querySelector('#error p').textContent === 'gone.png cannot be read: is it a folder, or gone?'")
    choose(page, folder / "photos" / "red" / "000.png")
    assert page.run("document.querySelector('#error').hidden")
    page.problems.clear()  # Chromium logs the refusal of the first upload


def test_keyboard_reaches_everything(page, server):
    page.open(f"{server.url}#id={FIRST}")
    page.wait(f"{HITS} === 40")
    page.run("document.body.focus()")
    reached = []
    for _ in range(8):
        page.press("Tab", code=9)
        reached.append(page.run("document.activeElement.id || document.activeElement.className"))
    assert reached[:5] == ["skip", "file", "filter", "rerank", "k"]
    assert "use" in reached
    page.run("document.querySelectorAll('#gallery button')[1].focus()")
    page.press("Enter", text="\r", code=13)
    page.wait(f"location.hash !== '#id={FIRST}'")


def test_every_picture_has_a_text_and_every_control_a_name(page, server):
    page.open(f"{server.url}#id={FIRST}")
    page.wait(f"{HITS} === 40")
    assert page.run("[...document.querySelectorAll('.hit img, #gallery img, #preview')].every((node) => node.alt)")
    assert page.run("[...document.querySelectorAll('svg[role=img]')].every((node) => node.getAttribute('aria-label'))")
    assert page.run("[...document.querySelectorAll('input, select')].every((node) => node.labels.length === 1)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_follows_the_colour_scheme_and_narrow_windows(page, server, scheme):
    page.open(f"{server.url}#id={FIRST}")
    page.wait(f"{HITS} === 40")
    try:
        page.prefer(scheme)
        red = page.run("parseInt(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0])")
        assert (red > 200) == (scheme == "light")
        page.resize(390, 800)
        assert page.run("document.documentElement.scrollWidth") <= 390
        page.resize(1440, 1000)
    finally:
        page.prefer("")
