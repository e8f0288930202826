"""What the stage `decoding` compares: its config, and the settings that follow from it."""

import dataclasses
from collections.abc import Iterator

from rag_mm.core import checks
from rag_mm.decode import contrastive_decoding, guidance, tasks
from rag_mm.decode.sampler import Sampling
from rag_mm.stages.shared import world_config

# k, alpha, amateur temperature, floor, null prompt; the fields of `contrastive_decoding.Contrast`.
ContrastValues = tuple[int, float, float, float, str]


@dataclasses.dataclass(frozen=True)
class DecodingStageConfig:
    """Which ways of sampling image codes are compared, and on how many scenes.

    All settings draw the same scenes from the same seeds, so that their differences are paired by scene.

    Attributes:
        seed: seed of sampling.
        world: world of the test documents.
        num_scenes: number of test scenes of held-out classes.
        num_docs: retrieved documents before each caption.
        temperatures: temperatures of plain sampling and of the sweep.
        weights: guidance weights of the sweep.
        nulls: null prompts of the sweep: documents | bare | caption.
        plausible: alpha of guidance that is restricted to plausible tokens.
        plausible_weights: its weights, with each null prompt of the sweep at temperature 1.
        plausible_temperatures: its further temperatures, at weight 1.5 with the first of `guided_nulls`.
        guided_nulls: null prompts of the settings that are measured with few of them, the best first.
        two_conditions: pairs of a weight of the documents and one of the caption, at temperature 1.
        contrasts: contrastive decoding at temperature 1; each is k, alpha, the amateur's temperature, the
            floor on a token's probability as a share of the largest, and the null prompt.
        ranked_contrast: which of `contrasts`, counted from 0, makes candidates for re-ranking.
        num_candidates: numbers of candidates among which the retriever chooses, each a divisor of the last.
        jacobi_temperatures: temperatures of parallel decoding.
        jacobi_weights: weights of guidance inside parallel decoding, with the first of `guided_nulls`.
        speed_batches: numbers of images that are timed together.
        num_examples: scenes that the page shows.
        shows_unseen_nulls: measures null prompts that training never showed the decoder, which `generate`
            refuses, to show what they are worth.
    """

    seed: int
    world: world_config.EmojiWorld
    num_scenes: int = 256
    num_docs: int = 2
    temperatures: tuple[float, ...] = (0.4, 0.7, 1.0)
    weights: tuple[float, ...] = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0)
    nulls: tuple[str, ...] = (guidance.BARE, guidance.DOCUMENTS, guidance.CAPTION)
    plausible: float = 0.1
    plausible_weights: tuple[float, ...] = (1.0, 1.5, 3.0)
    plausible_temperatures: tuple[float, ...] = (0.4, 0.7)
    guided_nulls: tuple[str, ...] = (guidance.BARE,)
    two_conditions: tuple[tuple[float, float], ...] = (
        (1.0, 1.0),
        (1.5, 1.0),
        (1.0, 1.5),
        (1.5, 1.5),
    )
    contrasts: tuple[ContrastValues, ...] = (
        (1, 1.0, 1.0, 0.0, guidance.BARE),
        (1, 0.5, 1.0, 0.0, guidance.BARE),
        (1, 0.1, 1.0, 0.0, guidance.BARE),
        (1, 0.1, 1.0, 0.0, guidance.DOCUMENTS),
        (1, 0.1, 1.0, 0.0, guidance.CAPTION),
        (1, 0.1, 5.0, 0.0, guidance.BARE),
        (2, 0.1, 1.0, 0.0, guidance.BARE),
        (2, 0.5, 1.0, 0.0, guidance.BARE),
        (4, 0.5, 1.0, 0.0, guidance.BARE),
        (2, 0.5, 1.0, 0.1, guidance.BARE),
        (4, 0.5, 1.0, 0.1, guidance.BARE),
    )
    ranked_contrast: int = 2
    num_candidates: tuple[int, ...] = (1, 2, 4, 8, 16)
    jacobi_temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    jacobi_weights: tuple[float, ...] = (1.5,)
    speed_batches: tuple[int, ...] = (1, 16)
    num_examples: int = 4
    shows_unseen_nulls: bool = False

    def __post_init__(self):
        checks.at_least(self, 2, "num_scenes")
        checks.at_least(self, 0, "num_docs", "num_examples")
        for name in ("temperatures", "weights", "nulls", "guided_nulls", "num_candidates"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one")
        if 1.0 not in self.temperatures:
            raise ValueError(f"temperatures are {self.temperatures}; 1 must be among them")
        counts = self.num_candidates
        if min(counts) < 1 or any(counts[-1] % count for count in counts):
            raise ValueError(
                f"num_candidates are {counts}; give at least 1 each, all divisors of the last"
            )
        if not 0 <= self.ranked_contrast < len(self.contrasts):
            raise ValueError(
                f"ranked_contrast is {self.ranked_contrast}; give the number of one of the "
                f"{len(self.contrasts)} contrasts, from 0"
            )
        if min(self.speed_batches, default=1) < 1:
            raise ValueError(f"speed_batches are {self.speed_batches}; give at least 1 each")
        # Refuses what none of them can be.
        _ = [setting.sampling for setting in settings(self)]


@dataclasses.dataclass(frozen=True)
class DecodingSetting:
    """One way of sampling the images of all scenes.

    Attributes:
        name: in files, metrics and tables.
        temperature: 0 is greedy.
        steering: how the logits of several prompts become one; None for plain sampling.
        decoding: one of `tasks.DECODINGS`.
        candidate: which of an example's seeds is drawn from.
    """

    name: str
    temperature: float
    steering: tasks.Steering | None = None
    decoding: str = tasks.SEQUENTIAL
    candidate: int = 0

    @property
    def sampling(self) -> Sampling:
        """Temperature, without a nucleus."""
        return Sampling(self.temperature)

    def with_candidate(self, candidate: int) -> "DecodingSetting":
        """The same with another seed for each image; candidate 0 is the setting itself."""
        if candidate == 0:
            return self
        name = f"{self.name}_candidate{candidate}"
        return dataclasses.replace(self, name=name, candidate=candidate)


def plain(temperature: float) -> DecodingSetting:
    """Sampling from the decoder alone."""
    return DecodingSetting(f"plain_t{temperature:g}", temperature)


def guided(null: str, weight: float, temperature: float, plausible: float = 0.0) -> DecodingSetting:
    """Guidance away from a null prompt, among all tokens or those that are plausible."""
    only = f"_plausible{plausible:g}" if plausible else ""
    steering = guidance.Guidance(weight, null, plausible=plausible)
    return DecodingSetting(f"{null}_w{weight:g}_t{temperature:g}{only}", temperature, steering)


def two_conditions(
    documents_weight: float, weight: float, temperature: float = 1.0
) -> DecodingSetting:
    """Guidance towards the documents and towards the caption, with weights of their own."""
    steering = guidance.Guidance(weight, documents_weight=documents_weight)
    name = f"two_conditions_d{documents_weight:g}_w{weight:g}_t{temperature:g}"
    return DecodingSetting(name, temperature, steering)


def contrast(values: ContrastValues, temperature: float = 1.0) -> DecodingSetting:
    """Contrastive decoding, CD-K."""
    k, alpha, amateur_temperature, floor, null = values
    steering = contrastive_decoding.Contrast(k, alpha, amateur_temperature, floor, null)
    more = f"_amateur{amateur_temperature:g}" if amateur_temperature != 1 else ""
    more += f"_floor{floor:g}" if floor else ""
    return DecodingSetting(
        f"contrast_k{k}_a{alpha:g}_{null}{more}_t{temperature:g}", temperature, steering
    )


def jacobi(of: DecodingSetting, decoding: str = tasks.JACOBI) -> DecodingSetting:
    """Parallel decoding of another setting."""
    return dataclasses.replace(of, name=f"{decoding}_{of.name}", decoding=decoding)


def sweep(config: DecodingStageConfig) -> list[DecodingSetting]:
    """Guidance with every null prompt, weight and temperature."""
    return [
        guided(null, weight, temperature)
        for null in config.nulls
        for temperature in config.temperatures
        for weight in config.weights
    ]


def plausible(config: DecodingStageConfig) -> list[DecodingSetting]:
    """Guidance restricted to plausible tokens."""
    at_one = [
        guided(null, weight, 1.0, config.plausible)
        for null in config.nulls
        for weight in config.plausible_weights
    ]
    null = config.guided_nulls[0]
    return [
        *at_one,
        *(guided(null, 1.5, each, config.plausible) for each in config.plausible_temperatures),
    ]


def contrasts(config: DecodingStageConfig) -> list[DecodingSetting]:
    """Contrastive decoding."""
    return [contrast(values) for values in config.contrasts]


def candidates(config: DecodingStageConfig) -> dict[str, list[DecodingSetting]]:
    """The candidates for re-ranking, by what makes them: plain sampling and contrastive decoding."""
    makers = {"plain": plain(1.0), "contrast": contrast(config.contrasts[config.ranked_contrast])}
    numbers = range(config.num_candidates[-1])
    return {name: [made.with_candidate(i) for i in numbers] for name, made in makers.items()}


def jacobis(config: DecodingStageConfig) -> list[DecodingSetting]:
    """Parallel decoding at its temperatures, coupled and not, and with guidance inside."""
    sampled = [plain(temperature) for temperature in config.jacobi_temperatures]
    null = config.guided_nulls[0]
    return [
        *(jacobi(each) for each in sampled),
        *(jacobi(each, tasks.JACOBI_UNCOUPLED) for each in sampled if each.temperature > 0),
        *(jacobi(guided(null, weight, 1.0)) for weight in config.jacobi_weights),
    ]


def settings(config: DecodingStageConfig) -> list[DecodingSetting]:
    """Every setting once, those of the sweep first."""

    def each() -> Iterator[DecodingSetting]:
        yield from (plain(temperature) for temperature in (0.0, *config.temperatures))
        yield from (plain(temperature) for temperature in config.jacobi_temperatures)
        yield from sweep(config)
        # Parallel decoding is compared with the same in sequence.
        null = config.guided_nulls[0]
        yield from (guided(null, weight, 1.0) for weight in config.jacobi_weights)
        yield from plausible(config)
        yield from contrasts(config)
        yield from (two_conditions(*weights) for weights in config.two_conditions)
        yield from jacobis(config)
        for drawn in candidates(config).values():
            yield from drawn

    return list({setting.name: setting for setting in each()}.values())
