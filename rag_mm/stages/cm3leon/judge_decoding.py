"""Which claims about decoding the measured settings support, with thresholds fixed beforehand."""

from collections.abc import Iterator, Mapping

import numpy as np

from rag_mm.decode import tasks
from rag_mm.eval import over_reliance
from rag_mm.stages.cm3leon import decoding_settings, judge_steering
from rag_mm.stages.cm3leon.decoding_results import DecodingClaim, Results, guided_name, plain_name
from rag_mm.stages.cm3leon.decoding_settings import DecodingStageConfig
from rag_mm.stages.cm3leon.rank_candidates import MIXTURE, ranked_name

RANK_GAIN, RANK_WITHIN = 0.12, 0.03
MOST_PASSES = {0.0: 16, 0.7: 18, 1.0: 20}  # Of 64, by temperature.
COUPLED_WITHIN = 0.5


def claims(
    config: DecodingStageConfig,
    values: Mapping[str, Mapping[str, np.ndarray]],
    codes: Mapping[str, np.ndarray],
) -> list[DecodingClaim]:
    """The claims for which the settings were measured.

    Args:
        config: of the stage.
        values: {setting: {figure: [Q]}}, those of re-ranking included.
        codes: {setting: int32 [Q, N]} of those that were drawn.
    """
    results = Results(config, values, codes)
    parts = (judge_steering.claims, _ranking, _jacobi, _over_reliance)
    return [claim for part in parts for claim in part(results)]


def _ranking(results: Results) -> Iterator[DecodingClaim]:
    def joint(maker: str, count: int) -> float:
        return results.mean(ranked_name(maker, count))

    counts = results.config.num_candidates
    if {1, 4} <= set(counts):
        gain, error = results.gain(ranked_name("plain", 4), ranked_name("plain", 1))
        yield DecodingClaim(
            "Re-ranking 4 candidates of plain sampling at temperature 1 beats 1",
            f"by {RANK_GAIN:g}",
            f"{joint('plain', 1):.3f} to {joint('plain', 4):.3f}, {gain:+.3f} ± {error:.3f}",
            gain >= RANK_GAIN,
        )
    if {4, 8} <= set(counts):
        bound = results.mean(ranked_name("plain", 8), "upper_bound")
        yield DecodingClaim(
            "and 8 are no worse than 4",
            f"within {RANK_WITHIN:g}",
            f"{joint('plain', 8):.3f}; the exact scorer's choice would be {bound:.3f}",
            joint("plain", 8) >= joint("plain", 4) - RANK_WITHIN,
        )
    if 8 in counts:
        mixed, halves = joint(MIXTURE, 8), [joint(maker, 8) for maker in ("plain", "contrast")]
        yield DecodingClaim(
            "8 candidates, half by contrast, are as good as either half",
            f"within {RANK_WITHIN:g}",
            f"{mixed:.3f}; plain {halves[0]:.3f}, contrast {halves[1]:.3f}",
            mixed >= max(halves) - RANK_WITHIN,
        )


def _jacobi(results: Results) -> Iterator[DecodingClaim]:
    for temperature in results.config.jacobi_temperatures:
        sampled = decoding_settings.plain(temperature)
        coupled = decoding_settings.jacobi(sampled).name
        loose = decoding_settings.jacobi(sampled, tasks.JACOBI_UNCOUPLED).name
        passes = results.mean(coupled, "passes")
        if temperature == 0:
            share = results.share_equal(coupled, plain_name(0.0))
            yield DecodingClaim(
                "Parallel decoding equals greedy sampling at temperature 0",
                "token for token",
                f"{share:.1%} of the images equal",
                share == 1,
            )
        else:
            gain, error = results.gain(coupled, plain_name(temperature))
            yield DecodingClaim(
                f"Parallel decoding is as good as sequential at temperature {temperature:g}",
                "within 2 standard errors",
                f"{results.mean(coupled):.3f}, {gain:+.3f} ± {error:.3f}",
                abs(gain) <= 2 * error,
            )
        if temperature in MOST_PASSES:
            num_codes = results.codes[coupled].shape[1]
            yield DecodingClaim(
                f"Passes of parallel decoding at temperature {temperature:g}",
                f"at most {MOST_PASSES[temperature]} of 64",
                f"{passes:.1f} of {num_codes}",
                passes <= MOST_PASSES[temperature] * num_codes / 64,
            )
        if results.has(loose):
            without = results.mean(loose, "passes")
            yield DecodingClaim(
                f"Coupling does not cost passes at temperature {temperature:g}",
                f"at most {COUPLED_WITHIN:g} more than without",
                f"{passes:.1f}, without {without:.1f}",
                passes <= without + COUPLED_WITHIN,
            )


def _over_reliance(results: Results) -> Iterator[DecodingClaim]:
    config = results.config
    mild = [
        guided_name(null, weight, temperature)
        for null in config.nulls
        for temperature in config.temperatures
        for weight in config.weights
        if 0 < weight <= 1.5
    ]
    if not mild or any(figure not in results.values[mild[0]] for figure in over_reliance.FIGURES):
        return
    for figure, most in over_reliance.AT_MOST.items():
        found = {name: results.mean(name, figure) for name in mild}
        worst = max(found, key=lambda name: found[name])
        what = {"copied_whole": "whole image"}.get(figure, figure.removeprefix("copied_"))
        yield DecodingClaim(
            f"A document's {what} is not copied against the caption, weights up to 1.5",
            f"at most {most:g}",
            f"{found[worst]:.3f} at most ({worst})",
            found[worst] <= most,
        )
