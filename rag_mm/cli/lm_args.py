"""The option --lm, a frozen language model, and what may be spent on one behind HTTP."""

import argparse
from typing import TYPE_CHECKING, Any

from rag_mm.core.errors import UserError

if TYPE_CHECKING:
    from rag_mm.frozen_lm.endpoint import EndpointLimits
    from rag_mm.frozen_lm.lm_protocol import FrozenLM

_LM = "frozen language model: a run, such as an imported LLaMA, or http(s)://HOST/v1#MODEL"
# Fields of `EndpointLimits`: the type of the option's value, and what it says.
LIMITS: dict[str, tuple[type, str]] = {
    "timeout": (float, "seconds that one call may take (default: 60)"),
    "retries": (int, "how often a call that fails is repeated (default: 3)"),
    "calls_per_minute": (float, "calls are spaced so that there are no more (default: no limit)"),
    "max_calls": (int, "stop before more calls (default: 10,000)"),
    "price": (float, "price of a million tokens, read or written, in any currency (default: 0)"),
    "max_cost": (float, "stop once that much is spent, in that currency (default: no limit)"),
    "texts_per_call": (int, "prompts sent in one call (default: 16)"),
}


def add_lm(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, without: str, required: bool = False
) -> None:
    """Adds --lm; `without` says what is done without one."""
    default = "" if required else f" (default: {without})"
    parser.add_argument("--lm", required=required, metavar="LM", help=f"{_LM}{default}")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a language model behind HTTP."""
    group = parser.add_argument_group(
        "endpoint",
        "With --lm=http(s)://HOST/v1#MODEL; the key is read from OPENAI_API_KEY. For example: "
        "--lm=http://localhost:8000/v1#smollm --timeout=120 --max-calls=500 --price=0.15 --max-cost=2",
    )
    for name, (kind, text) in LIMITS.items():
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=kind, metavar="X" if kind is float else "N", help=text)


def read_limits(args: argparse.Namespace) -> "EndpointLimits | None":
    """The given limits; None without any.

    Raises:
        UserError: one is out of range, or --lm is no endpoint.
    """
    given: dict[str, Any] = {name: getattr(args, name) for name in LIMITS}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    if args.lm is None or not args.lm.startswith(("http://", "https://")):
        option = next(iter(given)).replace("_", "-")
        raise UserError(f"--{option} is about an endpoint; give --lm=http://HOST/v1#MODEL.")
    from rag_mm.frozen_lm.endpoint import EndpointLimits

    try:
        return EndpointLimits(**given)
    except ValueError as error:
        name, rest = str(error).split(maxsplit=1)
        raise UserError(f"--{name.replace('_', '-')} {rest}.") from None


def open_lm(args: argparse.Namespace, limits: "EndpointLimits | None") -> "FrozenLM | None":
    """The language model of --lm; None without one.

    Raises:
        UserError: there is none at this address.
    """
    if args.lm is None:
        return None
    from rag_mm.api import open_lm as addresses

    return addresses.open_lm(args.lm, limits=limits)


def one_token_line(share: float | None) -> list[str]:
    """The line about `word_text.one_token_share`, if it is known."""
    return [] if share is None else [f"{share:.1%} of the run's words are one token of the LM"]
