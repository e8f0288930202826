"""The server of `rag-mm explore`, without a model: its token, its queue, and connections that say nothing."""

import contextlib
import json
import socket
import threading
import time
import types

import numpy as np
import pytest

uvicorn = pytest.importorskip("uvicorn")
testclient = pytest.importorskip("starlette.testclient")
from rag_mm.api import explore_connections, explore_server, steering_options  # noqa: E402
from rag_mm.core import image_files  # noqa: E402

TOKEN = "a-token"
ASKED = {"Authorization": f"Bearer {TOKEN}"}


class Session:
    """Draws for some time, and counts how often and how many at once."""

    def __init__(self, seconds=0.0):
        self.generator = types.SimpleNamespace(layout=types.SimpleNamespace(max_docs=2))
        self.memory = [None] * 3
        self.tuned_on = frozenset()
        self.seconds, self.drawn, self.most, self._now = seconds, [], 0, 0
        self._lock = threading.Lock()

    def generate(self, text, docs, best_of, guidance, **others):
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self.seconds)
        with self._lock:
            self._now -= 1
            self.drawn.append(text)
        if text == "broken":
            raise RuntimeError("a bug")
        image = np.zeros((1, 2, 2, 3), np.uint8)
        scores = candidates = None
        if best_of > 1:
            candidates = np.stack([image] * best_of, axis=1)
            scores = np.arange(best_of, dtype=np.float32)[None] * guidance.weight
        return types.SimpleNamespace(
            images=image, neighbors=[], candidates=candidates, scores=scores
        )


@pytest.fixture
def client():
    app = explore_server.make_app(Session(), "run", TOKEN)
    return testclient.TestClient(app, base_url="http://127.0.0.1:1", raise_server_exceptions=False)


@pytest.mark.parametrize("token", ["", "a-toke", "a-token1", "é", "A-TOKEN"])
def test_without_the_token_nothing_is_answered(client, token):
    assert client.get("/", params={"token": token}).status_code == 403
    wrong = {"Authorization": f"Bearer {token}".encode()}
    for path in ("/search", "/generate", "/caption", "/edit", "/ask"):
        # A body of any size or kind is refused before it is read.
        answer = client.post(path, content=b"x", headers=wrong)
        assert answer.status_code == 403 and "with its token" in answer.json()["error"]
    # The token in an address is for the page alone: pages of other sites could send it nowhere else.
    assert client.post("/generate", params={"token": TOKEN}, json={"text": "a"}).status_code == 403


def test_with_the_token_the_page_and_its_requests_are_answered(client):
    page = client.get("/", params={"token": TOKEN})
    assert page.status_code == 200 and TOKEN not in page.text
    answer = client.post("/generate", json={"text": "a"}, headers=ASKED)
    assert answer.json()["image"].startswith("data:image/png")
    assert client.post("/generate", json={"text": "broken"}, headers=ASKED).status_code == 500
    bad = client.post(
        "/generate", content=b"[" * 9999, headers=ASKED | {"Content-Type": "application/json"}
    )
    assert bad.status_code == 400 and "not a JSON object" in bad.json()["error"]


def test_candidates_come_with_their_scores(client):
    fields = {"text": "a", "best_of": 3, "guidance": 0.5}
    answer = client.post("/generate", json=fields, headers=ASKED).json()
    assert [candidate["score"] for candidate in answer["candidates"]] == [0.0, 0.5, 1.0]
    assert all(each["image"].startswith("data:image/png") for each in answer["candidates"])
    assert "candidates" not in client.post("/generate", json={"text": "a"}, headers=ASKED).json()


def test_the_page_has_a_field_for_every_option(client):
    page = client.get("/", params={"token": TOKEN}).text
    for name in (*steering_options.NAMES, "best_of", "decoding"):
        assert f'name="{name}"' in page
    assert 'id="instruct"' not in page and 'name="boxes"' not in page


def png(level):
    return image_files.encode_png(np.full((2, 2, 3), level, np.uint8))


class Tuned(Session):
    """Answers with what it was asked."""

    def __init__(self):
        super().__init__()
        self.tuned_on = frozenset({"recolor"})
        self.asked = []

    def edit(self, image, text, **options):
        self.asked.append((image, text, options))
        images = np.zeros((options["num"], 2, 2, 3), np.uint8)
        return types.SimpleNamespace(images=images, neighbors=[])

    def ask(self, image, text, docs):
        self.asked.append((image, text, docs))
        return types.SimpleNamespace(answers=["a pear"], neighbors=[])

    def generate(self, text, **options):
        self.asked.append((text, options))
        return super().generate(text, **options)


@pytest.fixture
def tuned():
    return Tuned()


@pytest.fixture
def instruct(tuned):
    """Sends files with the fields of an address."""
    app = explore_server.make_app(tuned, "run", TOKEN)
    client = testclient.TestClient(app, base_url="http://127.0.0.1:1")
    headers = ASKED | {"Content-Type": "application/octet-stream"}

    def send(path, *files, **fields):
        return client.post(path, params=fields, content=b"".join(files), headers=headers)

    send.client = client
    return send


def test_a_tuned_decoder_edits_and_answers(tuned, instruct):
    page = instruct.client.get("/", params={"token": TOKEN}).text
    assert 'id="instruct"' in page and 'name="boxes"' in page and 'id="structure"' in page
    edited = instruct("/edit", png(1), text="a", num=2, seed=3, image_guidance="1.5").json()
    assert len(edited["images"]) == 2
    image, text, options = tuned.asked.pop()
    assert text == "a" and image.max() == 1 and options["second"] is None
    assert options["image_guidance"] == 1.5 and options["guidance"] == 1.0 and options["seed"] == 3
    one, two = png(1), png(2)
    instruct("/edit", one, two, text="a", first=len(one))
    image, _, options = tuned.asked.pop()
    assert image.max() == 1 and options["second"].max() == 2
    answer = instruct("/ask", png(7), text="what?", docs=1).json()
    assert answer["text"] == "a pear" and tuned.asked.pop()[1:] == ("what?", 1)


def test_boxes_and_structures_reach_the_decoder(tuned, instruct):
    """Fields of an address are texts, also numbers."""
    instruct("/generate", png(5), text="a", feature="edges", guidance="1.5", contrast="2")
    _, options = tuned.asked.pop()
    assert options["structure"].max() == 5 and options["feature"] == "edges"
    assert options["guidance"].weight == 1.5 and options["contrast"].k == 2
    fields = {"text": "a", "boxes": '[{"name": "pear", "box": [0, 1, 2, 3]}]'}
    instruct.client.post("/generate", json=fields, headers=ASKED)
    _, options = tuned.asked.pop()
    assert options["boxes"] == [("pear", [0, 1, 2, 3])] and options["structure"] is None


@pytest.mark.parametrize(
    ("path", "files", "fields", "complaint"),
    [
        ("/edit", [png(1)], dict(text="a", first=0), "number of bytes of the first"),
        ("/edit", [png(1)], dict(text="a", first=10**6), "number of bytes of the first"),
        ("/edit", [png(1)], dict(text="a", first="x"), "number of bytes of the first"),
        ("/edit", [png(1), b"no"], dict(text="a", first=len(png(1))), "not a JPEG, PNG or WebP"),
        ("/edit", [png(1)], dict(text="a", guidance="much"), "field guidance must be a number"),
        ("/edit", [png(1)], dict(text="a", num=17), "field num must be an integer from 1 to 16"),
        ("/edit", [png(1)], dict(), "field text is missing"),
        ("/ask", [png(1)], dict(text="a", docs=3), "field docs must be an integer from 0 to 2"),
        ("/generate", [png(1)], dict(text="a", boxes="{}"), "field boxes is not a JSON list"),
    ],
)
def test_a_bad_instruction_is_refused(instruct, path, files, fields, complaint):
    answer = instruct(path, *files, **fields)
    assert answer.status_code == 400 and complaint in answer.json()["error"]


@pytest.mark.parametrize("path", ["/edit", "/ask"])
def test_an_instruction_without_a_picture_is_refused(instruct, path):
    answer = instruct.client.post(path, json={"text": "a"}, headers=ASKED)
    assert answer.status_code == 400 and "has no image to" in answer.json()["error"]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"guidance": -1}, "guidance weight is -1"),
        ({"guidance": "many"}, "guidance weight is 'many'"),
        ({"null": "bare"}, "there is no guidance and no contrast"),
        ({"contrast": 0}, "contrast k is 0"),
        ({"best_of": 17}, "field best_of must be an integer from 1 to 16"),
        ({"decoding": 1}, "field decoding is missing or not a text"),
    ],
)
def test_what_cannot_steer_is_refused(client, fields, complaint):
    answer = client.post("/generate", json={"text": "a"} | fields, headers=ASKED)
    assert answer.status_code == 400 and complaint in answer.json()["error"]


@contextlib.contextmanager
def serving(session, read_seconds=20.0):
    """A real server on a free port, which is yielded."""
    app = explore_server.make_app(session, "run", TOKEN)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=explore_connections.make_protocol(read_seconds),
            log_level="error",
            timeout_graceful_shutdown=1,
        )
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def send(port, text):
    """A connection that asks for a drawing of `text`."""
    body = json.dumps({"text": text}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(head.encode() + body)
    return connection


def test_one_is_drawn_at_a_time_and_who_leaves_is_not_drawn_for():
    session = Session(seconds=0.3)
    with serving(session) as port:
        first = send(port, "first")
        time.sleep(0.1)
        leavers = [send(port, f"leaver {i}") for i in range(30)]
        for connection in leavers:
            connection.close()
        last = send(port, "last")
        started = time.monotonic()
        assert b"200 OK" in last.recv(1 << 16) and b"200 OK" in first.recv(1 << 16)
        assert time.monotonic() - started < 5
        first.close()
        last.close()
    assert session.most == 1 and {"first", "last"} <= set(session.drawn)
    assert len(session.drawn) < 10, session.drawn


@pytest.mark.parametrize(
    "start", [b"", b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab"]
)
def test_half_a_request_is_not_waited_for(start):
    with serving(Session(), read_seconds=0.5) as port:
        held = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(20)]
        for connection in held:
            connection.sendall(start)
        for connection in held:
            while connection.recv(1 << 16):  # Nothing, once the server has closed it.
                pass
            connection.close()
        with send(port, "after") as connection:
            assert b"200 OK" in connection.recv(1 << 16)


def test_a_long_answer_is_waited_for():
    with serving(Session(seconds=1.5), read_seconds=0.5) as port, send(port, "slow") as connection:
        assert b"200 OK" in connection.recv(1 << 16)


def test_connections_are_limited():
    with serving(Session(), read_seconds=1.0) as port:
        count = explore_connections.MAX_CONNECTIONS
        held = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(count)]
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as one_more:
            assert one_more.recv(1) == b""
        for connection in held:
            connection.close()
