"""A language model behind an OpenAI-compatible HTTP endpoint, such as vLLM's (`lm_protocol.FrozenLM`)."""

import dataclasses
import os
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rag_mm.core import checks
from rag_mm.core.errors import UserError
from rag_mm.frozen_lm import answers
from rag_mm.frozen_lm.lm_protocol import Completions

_INSTALL = (
    "An endpoint needs the package openai; install the extra: pip install 'rag_mm[endpoint]'."
)


@dataclasses.dataclass(frozen=True)
class EndpointLimits:
    """How an endpoint is asked, and what may be spent on it.

    Attributes:
        timeout: seconds that one call may take, at most a day.
        retries: how often a call is repeated, at growing intervals, after a timeout, a lost connection, a
            full server or its error; repetitions are not counted as calls.
        calls_per_minute: calls are spaced so that there are no more, at least 0.01; None: as fast as it
            answers.
        max_calls: calls until the endpoint is no longer asked.
        price: of a million tokens, read or written, in any currency.
        max_cost: in that currency; the call that reaches it is the last. None: no limit.
        texts_per_call: prompts sent in one call.
    """

    timeout: float = 60.0
    retries: int = 3
    calls_per_minute: float | None = None
    max_calls: int = 10_000
    price: float = 0.0
    max_cost: float | None = None
    texts_per_call: int = 16

    def __post_init__(self):
        checks.at_least(self, 0, "retries", "price", "max_cost")
        checks.at_least(self, 1, "max_calls", "texts_per_call")
        checks.at_least(self, 0.01, "calls_per_minute")
        checks.above(self, 0, "timeout")
        checks.between(self, 0, 86_400, "timeout")


class Endpoint:
    """A model of an endpoint's text completions (`/completions`).

    Example:
        model = Endpoint("http://localhost:8000/v1", "HuggingFaceTB/SmolLM2-135M")
        model.generate(["Once upon a time"], num_tokens=8).texts

    Attributes:
        url, model: the endpoint's base address, and the name of the model there.
        limits: see `EndpointLimits`.
        num_calls, cost: what has been spent.
    """

    def __init__(self, url: str, model: str, limits: EndpointLimits | None = None):
        """Connects with the key in the environment variable OPENAI_API_KEY, if there is one.

        Raises:
            UserError: the package openai is missing, or `url` is no address.
        """
        _check_address(url)
        try:
            import openai
        except ImportError as error:
            raise UserError(_INSTALL) from error
        self.url, self.model, self.limits = url, model, limits or EndpointLimits()
        self.num_calls, self.cost, self._next_call = 0, 0.0, 0.0
        self._client = openai.OpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.limits.timeout,
            max_retries=self.limits.retries,
        )
        self._errors = openai

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """An endpoint does not tell it: always raises UserError."""
        raise UserError(
            f"{self.url} does not tell its model's vocabulary; use the model's own files."
        )

    def score(
        self,
        prompts: Sequence[str],
        candidates: Sequence[str],
        *,
        prefix: str | None = None,
        calibration: Sequence[str] = (),
    ) -> np.ndarray:
        """log p(candidate | prefix + prompt), float32 [B, C]; see `lm_protocol.FrozenLM.score`.

        Every text is sent whole, to be returned with its tokens' log-probabilities (`echo`).

        Raises:
            UserError: the endpoint does not return them, does not answer, or a limit is reached.
        """
        answers.check(prompts, candidates, calibration)
        starts = [(prefix or "") + text for text in (*prompts, *calibration)]
        pairs = [(start, candidate) for start in starts for candidate in candidates]
        options = dict(echo=True, logprobs=1, max_tokens=1, temperature=0.0)
        choices = self._complete([start + candidate for start, candidate in pairs], options)
        found = [self._log_prob(choice, *pair) for choice, pair in zip(choices, pairs, strict=True)]
        scores = np.array(found, np.float32).reshape(len(starts), len(candidates))
        return answers.calibrate(scores, len(prompts))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Completions:
        """Completes each prompt by at most `num_tokens` tokens; their ids are not told.

        Raises:
            UserError: the endpoint does not answer, refuses an argument, or a limit is reached.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        options = dict(max_tokens=num_tokens, temperature=temperature, seed=seed)
        choices = self._complete(texts, options)
        return Completions([[] for _ in choices], [choice.text for choice in choices])

    def _log_prob(self, choice: Any, start: str, candidate: str) -> float:
        whole, told = start + candidate, choice.logprobs
        values = (told.token_logprobs if told else None) or []
        offsets = (told.text_offset if told else None) or []
        if not choice.text.startswith(whole) or len(values) != len(offsets) or not values:
            raise UserError(self._no_score("it returned no log-probabilities of the given text"))
        ends = [*offsets[1:], len(choice.text)]
        own = [
            value
            for value, offset, end in zip(values, offsets, ends, strict=True)
            if end > len(start) and offset < len(whole)
        ]
        if not own or any(type(value) not in (int, float) or value != value for value in own):
            raise UserError(self._no_score(f"it returned none of {candidate[:40]!r}"))
        return float(sum(own))

    def _no_score(self, reason: str) -> str:
        return (
            f"score is not possible with {self.url}: {reason}; it needs an endpoint whose completions "
            "support echo with logprobs, such as vLLM's."
        )

    def _complete(self, texts: list[str], options: dict[str, Any]) -> list[Any]:
        """One choice for each text, in calls of a few texts."""
        found: list[Any] = []
        size = self.limits.texts_per_call
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            call = lambda part=part: self._client.completions.create(
                model=self.model, prompt=part, **options
            )
            answer = self._call(call, "echo" in options)
            choices = getattr(answer, "choices", None)  # The client checks no answer's form.
            if not isinstance(choices, list) or any(
                type(getattr(each, "text", None)) is not str for each in choices
            ):
                raise UserError(
                    f"{self.url} sent no completion; give the base address, which mostly ends in /v1."
                )
            choices = sorted(choices, key=lambda choice: choice.index or 0)
            if len(choices) != len(part):
                raise UserError(
                    f"{self.url} returned {len(choices)} completions of {len(part)} texts; it is not "
                    "compatible."
                )
            self._pay(answer, part, choices)
            found += choices
        return found

    def _pay(self, answer: Any, texts: list[str], choices: list[Any]) -> None:
        usage = answer.usage
        # Without a count, each byte may be a token.
        count = sum(len(text.encode()) for text in (*texts, *(choice.text for choice in choices)))
        count = getattr(usage, "total_tokens", None) or count
        self.cost += self.limits.price * count / 1e6

    def _call(self, call: Callable[[], Any], is_score: bool) -> Any:
        limits, errors = self.limits, self._errors
        if self.num_calls >= limits.max_calls:
            raise UserError(
                f"{self.url} was called {self.num_calls:,} times, the limit; raise max_calls to go on."
            )
        if limits.max_cost is not None and self.cost >= limits.max_cost:
            raise UserError(
                f"{self.url} has cost {self.cost:.4g}, which reaches the limit; raise max_cost to go on."
            )
        if limits.calls_per_minute is not None:
            time.sleep(max(0.0, self._next_call - time.monotonic()))
            self._next_call = time.monotonic() + 60 / limits.calls_per_minute
        self.num_calls += 1
        try:
            return call()
        except errors.APITimeoutError:
            raise UserError(
                f"{self.url} did not answer within {limits.timeout:g} seconds; try again or raise timeout."
            ) from None
        except errors.APIConnectionError as error:
            raise UserError(
                f"{self.url} cannot be reached ({str(error)[:80]}); start its server or mend the address."
            ) from None
        except errors.APIStatusError as error:
            reason = f"{error.status_code}, {_short(error.message)}"
            if is_score and error.status_code in (400, 422, 501):
                raise UserError(self._no_score(f"it refused the call ({reason})")) from None
            raise UserError(f"{self.url} refused the call to {self.model} ({reason}).") from None
        except (errors.APIError, ValueError) as error:  # A ValueError is of JSON.
            raise UserError(f"{self.url} sent no completion ({_short(str(error))}).") from None


def _check_address(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0 and not set(url) & set(" \t\n")
    except ValueError:  # Such as a port that is no number.
        is_whole = False
    if not is_whole:
        raise UserError(f"{url[:80]!r} is no address; write it as http://localhost:8000/v1.")


def _short(message: str) -> str:
    return " ".join(message.split())[:120]
