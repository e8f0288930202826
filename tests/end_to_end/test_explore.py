"""`rag-mm explore`: what the page is told and refuses, and the page itself in a browser."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import zlib

import numpy as np
import PIL.Image
import pytest

import rag_mm
from rag_mm.cli import main
from rag_mm.core.document_types import Document, Image, Text

testclient = pytest.importorskip("starlette.testclient")
from rag_mm.api import explore_server, session  # noqa: E402
from rag_mm.decode.contrastive_decoding import Contrast  # noqa: E402

PROMPT = "red apple at the top left on a blue background"
TOKEN = "a token"
HOSTILE = '<img src=x onerror="document.title=1"></script><script>document.title=1</script>'
PICTURE = {"Content-Type": "application/octet-stream"}
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def workdir(tiny_run, tmp_path_factory):
    """A copy of the run, with a stranger's document in its memory."""
    folder = tmp_path_factory.mktemp("explore") / "run"
    shutil.copytree(tiny_run.workdir, folder)
    run = rag_mm.load(str(folder))
    pixels = np.full((32, 32, 3), (250, 10, 250), np.uint8)
    segments = (Text(HOSTILE), Image(pixels))
    stranger = Document("stranger", segments, "javascript:document.title=1", HOSTILE)
    run.memory.add([stranger], run.image_tokenizer)
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    return session.load(workdir)


@pytest.fixture(scope="module")
def client(run):
    return testclient.TestClient(
        explore_server.make_app(run, HOSTILE, TOKEN),
        base_url="http://127.0.0.1:8765",
        headers={"Authorization": f"Bearer {TOKEN}"},
    )


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    PIL.Image.fromarray(pixels).save(data, format="PNG")
    return data.getvalue()


def test_a_text_finds_what_the_memory_finds(client, run):
    found = client.post("/search", json={"text": PROMPT, "k": 3}).json()
    expected = run.memory.search(text=PROMPT, k=3)
    assert found["view"] == "mixed"
    assert [hit["row"] for hit in found["hits"]] == expected.ids[0].tolist()
    best = found["hits"][0]
    assert best["score"] == pytest.approx(float(expected.scores[0, 0]), abs=1e-5)
    assert set(best) == {"id", "score", "text", "image", "url", "license", "row", "link"}
    in_words = client.post("/search", json={"text": PROMPT, "k": 3, "view": "text"}).json()
    assert in_words["view"] == "text"
    assert len(client.post("/search", json={"text": PROMPT}).json()["hits"]) == 12


def test_a_picture_and_a_document_find_themselves(client, run):
    image = run.memory.document(3).image
    found = client.post("/search?k=2", content=png(image), headers=PICTURE).json()
    assert found["view"] == "image" and found["hits"][0]["score"] == pytest.approx(1, abs=1e-4)
    found = client.post("/search", json={"document": run.memory.ids[5], "k": 1}).json()
    assert found["hits"][0]["id"] == run.memory.ids[5]


def test_answers_are_those_of_the_session(client, run):
    for docs in (0, 2):
        answer = client.post("/generate", json={"text": PROMPT, "docs": docs, "seed": 4}).json()
        drawn = run.generate(PROMPT, docs=docs, seed=4)
        assert answer["neighbors"] == drawn.neighbors and len(drawn.neighbors) == docs
        assert answer["image"].startswith("data:image/png;base64,")
    fields = {"text": PROMPT, "docs": 1, "seed": 4, "contrast": 1, "best_of": 2}
    answer = client.post("/generate", json=fields | {"decoding": "jacobi"}).json()
    drawn = run.generate(PROMPT, docs=1, seed=4, contrast=Contrast(), best_of=2, decoding="jacobi")
    scores = [candidate["score"] for candidate in answer["candidates"]]
    np.testing.assert_allclose(scores, drawn.scores[0], atol=1e-6)
    image = run.memory.document(3).image
    answer = client.post("/caption?docs=1", content=png(image), headers=PICTURE).json()
    assert answer["text"] == run.caption(image, docs=1).captions[0]
    assert len(answer["neighbors"]) == 1


def test_a_strangers_words_stay_words(client):
    page = client.get("/", params={"token": TOKEN})
    assert "<script>document" not in page.text and "&lt;script&gt;document" in page.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    (hit,) = client.post("/search", json={"document": "stranger", "k": 1}).json()["hits"]
    assert (hit["text"], hit["url"], hit["link"]) == (HOSTILE, "javascript:document.title=1", None)
    # The script has no way to make markup of a text.
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|write\(", client.get("/explore.js").text
    )


@pytest.mark.parametrize(
    ("path", "sent", "status", "complaint"),
    [
        ("/search", dict(json={"text": " "}), 400, "text is empty"),
        ("/search", dict(json={}), 400, "field text is missing"),
        ("/search", dict(json=[1]), 400, "not a JSON object"),
        ("/search", dict(json={"text": "a", "k": 0}), 400, "field k must be an integer from 1 to 60"),
        ("/search", dict(json={"text": "a", "k": [1]}), 400, "field k must be an integer"),
        ("/search", dict(json={"text": "a", "view": "x"}), 400, "no view 'x'"),
        ("/search", dict(json={"document": "none"}), 400, "no document with the id 'none'"),
        ("/search", dict(content=b"GIF89a", headers=PICTURE), 400, "not a JPEG, PNG or WebP"),
        ("/search", dict(content=b"", headers=PICTURE), 400, "it is empty"),
        ("/search", dict(json={"text": "a" * (1 << 16)}), 413, "more than 65,536 bytes"),
        ("/search", dict(data={"text": "a"}), 415, "neither application/json"),
        ("/generate", dict(json={"text": "a", "docs": 3}), 400, "field docs must be an integer"),
        ("/generate", dict(json={"text": "a " * 99, "docs": 0}), 400, "shorten it"),
        ("/caption", dict(json={"docs": 1}), 400, "no image to caption"),
        ("/none", dict(json={}), 404, "Not Found"),
    ],
)  # fmt: skip
def test_what_is_refused(client, path, sent, status, complaint):
    answer = client.post(path, **sent)
    assert answer.status_code == status
    assert complaint in answer.json()["error"]


def test_a_picture_too_large_is_refused_by_its_header(client):
    small = png(np.zeros((1, 1, 3), np.uint8))
    header = small[12:16] + (60_000).to_bytes(4, "big") * 2 + small[24:29]
    huge = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
    answer = client.post("/search", content=huge, headers=PICTURE)
    assert answer.status_code == 400 and "pixels" in answer.json()["error"]


def test_only_this_machine_is_answered(client):
    """A name of somebody else's that leads here is refused, whatever is asked."""
    assert client.get("/", headers={"Host": "attacker.example"}).status_code == 400
    page = client.get("/", params={"token": TOKEN}, headers={"Host": "localhost:8765"})
    assert page.status_code == 200


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere"], "nowhere"),
        (["nowhere", "--port=70000"], "--port=70000 is not a port"),
        ([], "RUN"),
    ],
)
def test_mistakes(capsys, words, complaint):
    assert main.main(["explore", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_without_the_libraries_the_extra_is_named(capsys, monkeypatch):
    from rag_mm.cli import explore

    monkeypatch.setattr(explore, "_LIBRARIES", ("no_such_library",))
    assert main.main(["explore", "nowhere"]) == 2
    assert "[explore]" in capsys.readouterr().err


@contextlib.contextmanager
def serve(workdir: pathlib.Path, *options: str):
    """The real command on a free port; its address. Ctrl-C ends it with exit code 0."""
    program = str(pathlib.Path(sys.executable).with_name("rag-mm"))
    command = [program, "explore", str(workdir), *options]
    process = subprocess.Popen([*command, "--port=0"], stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr.readline, "")
        address = next(m.group() for line in lines if (m := re.search(r"http://127\.\S+", line)))
        urllib.request.urlopen(address, timeout=300).close()
        yield address
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_the_page_in_a_browser(workdir, run, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    (tmp_path / "chosen.png").write_bytes(png(run.memory.document(3).image))
    (tmp_path / "text.png").write_text("no picture")
    expect = playwright.expect
    expect.set_options(timeout=300_000)
    with serve(workdir) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.set_default_timeout(300_000)
        page.goto(address)
        title = page.title()
        page.fill("#text", PROMPT)
        page.keyboard.press("Enter")
        expect(page.locator("#answers img")).to_have_count(3)
        expect(page.locator("#hits li")).to_have_count(12)
        expect(page.locator("#answers h3")).to_have_text(
            ["no documents", "1 document", "2 documents"]
        )
        expect(page.locator("#status")).to_have_text("")
        if folder := os.environ.get("RAG_MM_SCREENSHOTS"):
            page.screenshot(path=pathlib.Path(folder) / "explore.png")
        # Steered, with candidates; a mistake is said.
        page.click("#options summary")
        page.fill("#options [name=guidance]", "1.5")
        page.fill("#options [name=best_of]", "2")
        page.select_option("#options [name=null]", "caption")
        page.focus("#text")
        page.keyboard.press("Enter")
        expect(page.locator("#answers .candidates img")).to_have_count(6)
        expect(page.locator("#status")).to_have_text("")
        page.fill("#options [name=guidance]", "")
        page.focus("#text")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_contain_text("there is no guidance and no contrast")
        assert len(wrong) == 1 and "400" in wrong.pop()
        page.select_option("#options [name=null]", "")
        # A picture, dropped as a hand drops it.
        dropped = page.evaluate_handle(
            """async () => {
                const canvas = Object.assign(document.createElement('canvas'), {width: 40, height: 30});
                const data = await new Promise((done) => canvas.toBlob(done, 'image/png'));
                const moved = new DataTransfer();
                moved.items.add(new File([data], 'dropped.png', {type: 'image/png'}));
                return moved;
            }"""
        )
        page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
        expect(page.locator("#answers .said")).to_have_count(3)
        expect(page.locator("#asked")).to_have_text("dropped.png · view image")
        # And one chosen; it finds itself.
        page.set_input_files("#file", tmp_path / "chosen.png")
        expect(page.locator("#hits li").first).to_contain_text("1.000")
        # What is refused is said.
        page.set_input_files("#file", tmp_path / "text.png")
        expect(page.locator("#status")).to_have_text("The file is not a JPEG, PNG or WebP image.")
        assert len(wrong) == 1 and "400" in wrong.pop()
        # A stranger's words are shown and do nothing.
        page.evaluate("() => ask({document: 'stranger'}, 'stranger')")
        expect(page.locator("#hits li").first).to_contain_text("onerror")
        expect(page.locator("#hits li").first.locator("a")).to_have_count(0)
        assert page.title() == title and wrong == []
        browser.close()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_the_page_of_a_tuned_decoder_in_a_browser(called_tuned, run, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    picture, small = tmp_path / "a.png", tmp_path / "small.png"
    picture.write_bytes(png(run.memory.document(3).image))
    small.write_bytes(png(np.zeros((9, 8, 3), np.uint8)))
    expect = playwright.expect
    expect.set_options(timeout=300_000)
    with serve(called_tuned, "--stage=sft") as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.set_default_timeout(300_000)
        page.goto(address)
        page.fill("#instruction", "make it red")
        page.click("button[value=edit]")
        expect(page.locator("#status")).to_have_text("Choose a picture.")
        page.set_input_files("#picture", picture)
        page.fill("#instruct [name=num]", "2")
        page.fill("#instruct [name=image_guidance]", "1.5")
        page.click("button[value=edit]")
        expect(page.locator("#answers img")).to_have_count(2)
        expect(page.locator("#answers h3")).to_have_text("make it red")
        page.set_input_files("#second", picture)
        page.click("button[value=edit]")
        expect(page.locator("#status")).to_have_text("")
        expect(page.locator("#answers img")).to_have_count(2)
        page.click("button[value=ask]")
        expect(page.locator("#answers .said")).to_have_count(3)
        # Boxes, then a structure, which takes the place of a document; one of another size is refused.
        page.click("#options summary")
        page.fill("#boxes", '[{"name": "apple", "box": [0, 0, 8, 8]}]')
        page.fill("#text", "on red")
        page.keyboard.press("Enter")
        expect(page.locator("#answers img")).to_have_count(3)
        page.fill("#boxes", "")
        page.set_input_files("#structure", picture)
        page.focus("#text")
        page.keyboard.press("Enter")
        expect(page.locator("#answers h3")).to_have_text(["no documents", "1 document"])
        if folder := os.environ.get("RAG_MM_SCREENSHOTS"):
            page.screenshot(path=pathlib.Path(folder) / "tuned.png")
        page.set_input_files("#structure", small)
        page.focus("#text")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_contain_text("The structure has 8 x 9 pixels")
        assert wrong == []
        browser.close()


@pytest.mark.slow
def test_the_server_listens_to_this_machine_alone(workdir):
    """Bound to loopback: whatever other addresses the machine has do not lead there."""
    with serve(workdir) as address:
        port = int(re.search(r":(\d+)/", address)[1])
        lines = pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]
        bound = {line.split()[1] for line in lines if line.split()[3] == "0A"}
        assert [place for place in bound if place.endswith(f":{port:04X}")] == [
            f"0100007F:{port:04X}"
        ]
