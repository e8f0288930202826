"""What `train.update_guard` costs: our training step with it and without it, in alternating rounds."""

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import optax

from rag_mm.perf.bench import ours, steps, timing
from rag_mm.train import update_guard


def run(
    config: steps.StepBenchConfig,
    num_steps: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Mapping[str, Any]]:
    """Tokens per second of Adam steps, guarded (`ours`) and unguarded (`peer`); case `WIDTH_guard` per width.

    Both run once per round, each after an untimed call of the same step, so most of the machine's noise
    cancels in the ratio of a round. `ratio` is the median over rounds, below 1 by the cost of the guard, and
    `ci95` its 95 % interval.

    Args:
        config: shapes as in the comparison with transformers, threads, and at least `timing.LEAST_ROUNDS`
            rounds.
        num_steps: steps timed together in a round.
        say: called with a progress message.
    """
    with timing.on_threads(config.num_threads):
        cases = {
            f"{width}_guard": _measure(config, width, num_steps, say) for width in config.widths
        }
    return ours.with_machine(cases, config.num_threads)


def _measure(
    config: steps.StepBenchConfig, width: int, num_steps: int, say: Callable[[str], None]
) -> dict[str, Any]:
    say(f"training, width {width}, with and without the guard")
    model, rows = config.model(width), config.rows()
    adam = optax.adam(steps.LEARNING_RATE)
    train_steps = [
        ours.make_train_step(model, tx)
        for tx in (update_guard.guard(adam, update_guard.GuardConfig()), adam)
    ]
    calls = [functools.partial(step, rows, num_steps) for step in train_steps]
    guarded, plain = timing.rounds(calls, config.num_rounds, is_warm=True)
    ratios = [p / g for g, p in zip(guarded, plain, strict=True)]
    num_tokens = rows["tokens"].size * num_steps
    return {
        "ours": num_tokens / statistics.median(guarded),
        "peer": num_tokens / statistics.median(plain),
        "ratio": statistics.median(ratios),
        "ci95": timing.median_interval(ratios),
        "unit": "tokens/s",
        "num_rounds": config.num_rounds,
        "num_steps": num_steps,
    }
