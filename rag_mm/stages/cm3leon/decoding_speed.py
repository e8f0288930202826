"""Measures time and passes per image of the ways of decoding, excluding compilation.

Times differ between runs of the same bits, so they are recorded with the costs, not with a stage's metrics.
"""

import dataclasses

import jax
import numpy as np

from rag_mm.decode import tasks
from rag_mm.stages.cm3leon import decoding_settings
from rag_mm.stages.cm3leon.decoding_scenes import DecodingScenes
from rag_mm.stages.cm3leon.decoding_settings import DecodingSetting, DecodingStageConfig
from rag_mm.stages.ra_cm3 import latency

TEMPERATURE = 0.7
STREAMS_BATCH = 4  # Images at once, of the comparison of two streams with one.
RATIO = f"two_streams_to_one_batch{STREAMS_BATCH}"


@dataclasses.dataclass(frozen=True)
class DecodingSpeed:
    """Of one way of decoding: images at once, time and passes after the prompt for each image."""

    kind: str
    batch: int
    milliseconds: float
    passes: float

    @property
    def figures(self) -> dict[str, float]:
        """As they are recorded in the metrics of the run."""
        prefix = f"{self.kind}_batch{self.batch}"
        return {f"{prefix}_ms": round(self.milliseconds, 3), f"{prefix}_passes": self.passes}


def kinds(config: DecodingStageConfig) -> dict[str, DecodingSetting]:
    """What is timed: plain sampling, two streams of either kind, and parallel decoding of one and two."""
    sampled = decoding_settings.plain(TEMPERATURE)
    guided = decoding_settings.guided(config.guided_nulls[0], 1.5, TEMPERATURE)
    return {
        "plain": sampled,
        "guidance": guided,
        "contrast": decoding_settings.contrast(
            config.contrasts[config.ranked_contrast], TEMPERATURE
        ),
        "jacobi": decoding_settings.jacobi(sampled),
        "jacobi_guidance": decoding_settings.jacobi(guided),
    }


def measure(config: DecodingStageConfig, scenes: DecodingScenes) -> list[DecodingSpeed]:
    """Times every kind with `speed_batches`, and one and two streams with `STREAMS_BATCH`.

    A batch has at most as many images as there are scenes.
    """

    named, most = kinds(config), len(scenes.texts)
    every = [(kind, batch) for batch in config.speed_batches for kind in named]
    every += [(kind, STREAMS_BATCH) for kind in ("plain", "guidance")]
    pairs = dict.fromkeys((kind, min(batch, most)) for kind, batch in every)
    return [_measure(kind, named[kind], batch, config, scenes) for kind, batch in pairs]


def ratio(speeds: list[DecodingSpeed]) -> float | None:
    """Time of two streams over that of one, with `STREAMS_BATCH` images at once; None if not measured."""
    found = {speed.kind: speed for speed in speeds if speed.batch == STREAMS_BATCH}
    if not {"plain", "guidance"} <= set(found):
        return None
    return found["guidance"].milliseconds / found["plain"].milliseconds


def device() -> str:
    """What it ran on, such as `a CPU`."""
    found = jax.devices()[0]
    return "a CPU" if found.platform == "cpu" else f"{found.device_kind}"


def _measure(
    kind: str,
    setting: DecodingSetting,
    batch: int,
    config: DecodingStageConfig,
    scenes: DecodingScenes,
) -> DecodingSpeed:
    seeds = tasks.make_seeds(config.seed, batch)

    def draw() -> np.ndarray:
        passes = scenes.draw(setting, seeds, batch).passes
        assert passes is not None
        return passes

    passes = float(draw().mean())
    return DecodingSpeed(kind, batch, 1000 * latency.median_seconds(draw) / batch, passes)
