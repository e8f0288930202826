"""An OpenAI-compatible endpoint: a server in this process, whose model prefers letters that came before."""

import math
import time

import local_endpoint
import numpy as np
import pytest

from rag_mm.api.open_lm import open_lm
from rag_mm.core.errors import UserError
from rag_mm.frozen_lm.endpoint import Endpoint, EndpointLimits


@pytest.fixture
def server():
    with local_endpoint.serving() as started:
        yield started


@pytest.fixture
def address(server):
    return server.address


def test_it_scores_by_the_log_probabilities_of_the_given_text(server, address):
    model = open_lm(f"{address}#tiny")
    found = model.score(["aabb", "bbcc"], ["aa", "bbbb"], prefix="zz", calibration=["xxyy"])

    def sum_of(start, candidate):
        return sum(
            local_endpoint.log_prob(start + candidate[:i], c) for i, c in enumerate(candidate)
        )

    rows = [[sum_of("zz" + p, c) for c in ("aa", "bbbb")] for p in ("aabb", "bbcc", "xxyy")]
    np.testing.assert_allclose(found, np.array(rows)[:2] - np.array(rows)[2], rtol=1e-5)
    assert found.dtype == np.float32
    assert server.asked[0]["model"] == "tiny" and server.asked[0]["echo"]


def test_it_completes_in_calls_of_a_few_texts(server, address):
    model = Endpoint(address, "tiny", EndpointLimits(texts_per_call=2))
    made = model.generate(["x", "y", "z"], num_tokens=3)
    assert made.texts == ["ababab"] * 3 and made.tokens == [[], [], []]
    assert [each["prompt"] for each in server.asked] == [["x", "y"], ["z"]]
    with pytest.raises(UserError, match="does not tell its model's vocabulary"):
        _ = model.vocabulary


def test_an_endpoint_without_log_probabilities_of_given_tokens_refuses_score(server, address):
    def without_echo(handler, asked):
        return handler.complete(asked | {"echo": False})

    def without_log_probs(handler, asked):
        return handler.complete(asked | {"logprobs": None})

    def refuse(handler, asked):
        return 400, {"error": {"message": "echo is not\nsupported"}}

    for behave in (without_echo, without_log_probs, refuse):
        server.behave = behave
        with pytest.raises(
            UserError, match=r"score is not possible with .*echo with logprobs"
        ) as e:
            open_lm(f"{address}#tiny").score(["aa"], ["bb"])
        assert "\n" not in str(e.value)


def test_a_server_that_fails_for_a_moment_is_asked_again(server, address):
    failures = [503, 429]

    def fail_first(handler, asked):
        if failures:
            return failures.pop(), {"error": {"message": "busy"}}
        return handler.complete(asked)

    server.behave = fail_first
    model = Endpoint(address, "tiny", EndpointLimits(retries=2))
    assert model.generate(["x"], num_tokens=1).texts == ["ab"] and len(server.asked) == 3
    failures += [503, 503]
    with pytest.raises(UserError, match="refused the call to tiny .503, .*busy"):
        Endpoint(address, "tiny", EndpointLimits(retries=1)).generate(["x"])


def test_a_slow_or_absent_server_gives_one_sentence(server, address):
    server.behave = lambda handler, asked: (time.sleep(1), handler.complete(asked))[1]
    limits = EndpointLimits(timeout=0.1, retries=0)
    with pytest.raises(UserError, match=r"did not answer within 0.1 seconds"):
        Endpoint(address, "tiny", limits).generate(["x"])
    with pytest.raises(UserError, match="cannot be reached") as error:
        Endpoint("http://127.0.0.1:9/v1", "tiny", limits).score(["x"], ["y"])
    assert "\n" not in str(error.value)


def test_an_answer_that_fits_no_completion_gives_one_sentence(server, address):
    model = Endpoint(address, "tiny", EndpointLimits(retries=0))
    server.behave = lambda handler, asked: (404, {"error": {"message": "no model tiny"}})
    with pytest.raises(UserError, match="refused the call to tiny .404, .*no model tiny"):
        model.generate(["x"])
    server.behave = lambda handler, asked: (200, {"choices": []})
    with pytest.raises(UserError, match="returned 0 completions of 1 texts"):
        model.generate(["x"])


@pytest.mark.parametrize("answer", ["a page", [1], {"choices": [{"index": 0, "text": None}]}])
def test_an_answer_of_another_form_gives_one_sentence(server, address, answer):
    server.behave = lambda handler, asked: (200, answer)
    with pytest.raises(UserError, match="sent no completion"):
        Endpoint(address, "tiny", EndpointLimits(retries=0)).generate(["x"])


@pytest.mark.parametrize("value", [math.nan, "high"])
def test_a_log_probability_that_is_no_number_gives_one_sentence(server, address, value):
    told = {"token_logprobs": [None, value], "text_offset": [0, 1]}
    choice = {"index": 0, "text": "xy", "logprobs": told}
    server.behave = lambda handler, asked: (200, {"choices": [choice]})
    with pytest.raises(UserError, match="returned none of 'y'"):
        Endpoint(address, "tiny", EndpointLimits(retries=0)).score(["x"], ["y"])


def test_calls_and_cost_are_limited(server, address):
    model = Endpoint(address, "tiny", EndpointLimits(max_calls=2, texts_per_call=1))
    with pytest.raises(UserError, match="was called 2 times, the limit"):
        model.generate(["x", "y", "z"], num_tokens=1)
    assert len(server.asked) == 2
    # 100 tokens a call, at 10 per million: 0.001.
    model = Endpoint(address, "tiny", EndpointLimits(price=10, max_cost=0.002))
    for _ in range(2):
        model.generate(["x"], num_tokens=1)
    assert model.cost == pytest.approx(0.002) and model.num_calls == 2
    with pytest.raises(UserError, match="has cost 0.002, which reaches the limit"):
        model.generate(["x"], num_tokens=1)


def test_calls_are_spaced(server, address):
    model = Endpoint(address, "tiny", EndpointLimits(calls_per_minute=300, texts_per_call=1))
    start = time.monotonic()
    model.generate(["x", "y", "z"], num_tokens=1)
    assert time.monotonic() - start >= 2 * 60 / 300


def test_an_address_without_a_model_is_refused(address):
    with pytest.raises(UserError, match="names no model; add #"):
        open_lm(address)


@pytest.mark.parametrize("url", ["localhost:abc/v1", "[::1/v1", "", "x y/v1"])
def test_what_is_no_address_gives_one_sentence(url):
    with pytest.raises(UserError, match="is no address; write it as"):
        open_lm(f"http://{url}#tiny")


@pytest.mark.parametrize("wrong", [dict(timeout=0), dict(max_calls=0), dict(price=-1)])
def test_limits_out_of_range(wrong):
    with pytest.raises(ValueError, match="give"):
        EndpointLimits(**wrong)
