"""A server of text completions in this process, whose model prefers letters that came before."""

import contextlib
import http.server
import json
import math
import threading
from collections.abc import Iterator


def log_prob(before: str, letter: str) -> float:
    """Of a letter among 26, by how often it came before."""
    return math.log((1 + before.count(letter)) / (26 + len(before)))


def tokens_of(text: str) -> list[str]:
    """Two letters a token."""
    return [text[i : i + 2] for i in range(0, len(text), 2)]


class Handler(http.server.BaseHTTPRequestHandler):
    """Text completions; `server.behave` may answer otherwise first."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        status, answer = self.server.behave(self, asked)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def complete(self, asked: dict) -> tuple[int, dict]:
        choices = []
        for index, prompt in enumerate(asked["prompt"]):
            text = (prompt if asked.get("echo") else "") + "ab" * (asked["max_tokens"])
            choice = {"index": index, "text": text, "finish_reason": "length"}
            if asked.get("logprobs"):
                tokens = tokens_of(text)
                offsets = [2 * i for i in range(len(tokens))]
                values = [
                    sum(log_prob(text[: at + i], c) for i, c in enumerate(token))
                    for at, token in zip(offsets, tokens, strict=True)
                ]
                choice["logprobs"] = {
                    "tokens": tokens,
                    "text_offset": offsets,
                    "token_logprobs": [None, *values[1:]],
                }
            choices.append(choice)
        usage = {"prompt_tokens": 100, "completion_tokens": 0, "total_tokens": 100}
        body = {"id": "1", "object": "text_completion", "created": 0, "model": asked["model"]}
        # In another order, as an endpoint may.
        return 200, body | {"choices": choices[::-1], "usage": usage}

    def log_message(self, *args):
        """Nothing on stderr."""


class Server(http.server.ThreadingHTTPServer):
    """What it was asked, and what it does instead, if anything."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.behave = Handler.complete

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
