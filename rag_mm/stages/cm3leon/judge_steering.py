"""Claims about guidance and contrastive decoding, with thresholds fixed beforehand."""

from collections.abc import Iterator

from rag_mm.decode import guidance
from rag_mm.stages.cm3leon import decoding_settings
from rag_mm.stages.cm3leon.decoding_results import DecodingClaim, Results, guided_name, plain_name

CHANCE_OF = {"place": (0.15, 0.35), "color": (0.05, 0.22)}  # One of 4 places, one of 8 colors.
ENTITY_KEPT, JOINT_LOST = 0.60, 0.05
HARM_OF_3, NO_GAIN_WITHIN = 0.08, 0.03
PLAUSIBLE_GAIN, GREEDY_WITHIN = 0.12, 0.06
CONTRAST_WITHIN = 0.05


def claims(results: Results) -> Iterator[DecodingClaim]:
    """The claims for which the settings were measured."""
    yield from _ends_of_the_sweep(results)
    yield from _middle_of_the_sweep(results)
    yield from _plausible(results)
    yield from _contrast(results)


def _ends_of_the_sweep(results: Results) -> Iterator[DecodingClaim]:
    """A weight of 0 follows the null prompt, one of 1 is plain sampling."""
    config = results.config
    if 1.0 in config.weights:
        shares = [
            results.share_equal(guided_name(null, 1.0, temperature), plain_name(temperature))
            for null in config.nulls
            for temperature in config.temperatures
        ]
        yield DecodingClaim(
            "At weight 1 guidance draws the codes of plain sampling",
            "all equal, every null prompt and temperature",
            f"{min(shares):.1%} of the images equal at least",
            min(shares) == 1,
        )
    coolest = min(config.temperatures)
    name = guided_name(guidance.DOCUMENTS, 0.0, coolest)
    if results.has(name):
        found = {fact: results.mean(name, fact) for fact in ("entity", "place", "color", "joint")}
        is_chance = all(low <= found[fact] <= high for fact, (low, high) in CHANCE_OF.items())
        yield DecodingClaim(
            f"At weight 0 documents give the entity; place and color are at chance (temperature {coolest:g})",
            f"entity >= {ENTITY_KEPT:g}, place {_range('place')}, color {_range('color')}, "
            f"joint <= {JOINT_LOST:g}",
            ", ".join(f"{fact} {share:.3f}" for fact, share in found.items()),
            is_chance and found["entity"] >= ENTITY_KEPT and found["joint"] <= JOINT_LOST,
        )


def _range(fact: str) -> str:
    low, high = CHANCE_OF[fact]
    return f"{low:g} to {high:g}"


def _middle_of_the_sweep(results: Results) -> Iterator[DecodingClaim]:
    """Without documents in the null prompt, some guidance helps at temperature 1, and none at a low one."""
    config, bare = results.config, guidance.BARE
    one, best, much = (guided_name(bare, weight, 1.0) for weight in (1.0, 1.5, 3.0))
    if results.has(one, best, much):
        gain, error = results.gain(best, one)
        harm = results.mean(best) - results.mean(much)
        yield DecodingClaim(
            "Temperature 1, null prompt without documents: weight 1.5 beats 1",
            "more than 2 standard errors, paired",
            f"{results.mean(one):.3f} to {results.mean(best):.3f}, {gain:+.3f} ± {error:.3f}",
            gain > 2 * error,
        )
        yield DecodingClaim(
            "and weight 3 harms",
            f"more than {HARM_OF_3:g} below 1.5",
            f"{results.mean(much):.3f}, {-harm:+.3f}",
            harm > HARM_OF_3,
        )
    coolest = min(config.temperatures)
    if coolest < 1 and 1.0 in config.weights:
        joints = {
            (null, weight): results.mean(guided_name(null, weight, coolest))
            for null in config.nulls
            for weight in config.weights
            if weight >= 1
        }
        best_weight = max(joints, key=lambda key: joints[key])
        plain = results.mean(plain_name(coolest))
        yield DecodingClaim(
            f"At temperature {coolest:g} no guidance is best",
            f"no weight above 1 is more than {NO_GAIN_WITHIN:g} better",
            f"weight 1: {plain:.3f}; the best is weight {best_weight[1]:g} with null prompt "
            f"{best_weight[0]}: {joints[best_weight]:.3f}",
            joints[best_weight] <= plain + NO_GAIN_WITHIN,
        )


def _plausible(results: Results) -> Iterator[DecodingClaim]:
    config = results.config
    name = guided_name(config.guided_nulls[0], 1.5, 1.0, config.plausible)
    if not results.has(name):
        return
    gain, error = results.gain(name, plain_name(1.0))
    short = results.mean(plain_name(0.0)) - results.mean(name)
    yield DecodingClaim(
        "Guidance among plausible tokens, temperature 1, weight 1.5, beats plain sampling",
        f"by {PLAUSIBLE_GAIN:g}",
        f"{results.mean(plain_name(1.0)):.3f} to {results.mean(name):.3f}, {gain:+.3f} ± {error:.3f}",
        gain >= PLAUSIBLE_GAIN,
    )
    yield DecodingClaim(
        "and is near greedy decoding",
        f"within {GREEDY_WITHIN:g}",
        f"greedy {results.mean(plain_name(0.0)):.3f}, {-short:+.3f}",
        short <= GREEDY_WITHIN,
    )


def _contrast(results: Results) -> Iterator[DecodingClaim]:
    config = results.config
    null = config.guided_nulls[0]
    by_alpha = {
        alpha: decoding_settings.contrast((1, alpha, 1.0, 0.0, null)).name
        for alpha in (1.0, 0.5, 0.1)
    }
    if results.has(by_alpha[1.0]):
        share = results.share_equal(by_alpha[1.0], plain_name(0.0))
        yield DecodingClaim(
            "CD-K with k = 1 and alpha = 1 is greedy decoding",
            "token for token",
            f"{share:.1%} of the images equal",
            share == 1,
        )
    if results.has(*by_alpha.values()):
        entropies = [results.mean(name, "entropy") for name in by_alpha.values()]
        yield DecodingClaim(
            "Its entropy rises as alpha falls",
            "alpha 1 < 0.5 < 0.1",
            ", ".join(f"{entropy:.3f}" for entropy in entropies) + " nats per code",
            entropies[0] < entropies[1] < entropies[2],
        )
    if results.has(by_alpha[0.1]):
        guided = {
            setting.name: results.mean(setting.name)
            for setting in (
                *decoding_settings.sweep(config),
                *decoding_settings.plausible(config),
            )
            if setting.temperature == 1
        }
        best = max(guided, key=lambda name: guided[name])
        found = results.mean(by_alpha[0.1])
        yield DecodingClaim(
            "CD-K with k = 1 and alpha = 0.1 is as good as the best guidance at temperature 1",
            f"within {CONTRAST_WITHIN:g}",
            f"{found:.3f}, {best} {guided[best]:.3f}",
            found >= guided[best] - CONTRAST_WITHIN,
        )
    many = [decoding_settings.contrast(values).name for values in config.contrasts if values[0] > 1]
    if many:
        yield DecodingClaim(
            "k above 1, with and without a floor",
            "reported",
            ", ".join(f"{name} {results.mean(name):.3f}" for name in many),
            None,
        )
