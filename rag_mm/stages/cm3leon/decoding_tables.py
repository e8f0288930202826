"""The tables of the page about decoding, from the metrics of the stage."""

from collections.abc import Mapping, Sequence
from typing import Any

from rag_mm.decode import guidance, tasks
from rag_mm.eval import over_reliance
from rag_mm.report.decoding_page import PageSection, TextTable
from rag_mm.stages.cm3leon import decoding_settings, decoding_speed, rank_candidates
from rag_mm.stages.cm3leon.decoding_settings import DecodingSetting, DecodingStageConfig

_FACTS = ("joint", "entity", "place", "color")
READS = {
    guidance.BARE: "null prompt without caption and documents (bare)",
    guidance.DOCUMENTS: "null prompt with the documents alone (documents)",
    guidance.CAPTION: "null prompt with the caption alone (caption)",
}
_KINDS = {
    "plain": "plain, one stream",
    "guidance": "guidance, two streams",
    "contrast": "contrastive decoding, two streams",
    "jacobi": "parallel, one stream",
    "jacobi_guidance": "parallel with guidance, two streams",
}


def number(figures: Mapping[str, Any], name: str, digits: int = 3) -> str:
    """A figure as ".680 ± .029"; empty where it was not measured."""
    figure = figures.get(name)
    if figure is None:
        return ""
    value = figure.get("accuracy", figure.get("mean"))
    return f"{value:.{digits}f} ± {figure['standard_error']:.{digits}f}"


def claims(metrics: Mapping[str, Any]) -> PageSection:
    """Every claim, whether this run meets it."""
    verdicts = {True: "met", False: "not met", None: "reported"}
    rows = [
        [each["claim"], each["required"], each["measured"], verdicts[each["is_met"]]]
        for each in metrics["claims"]
    ]
    text = (
        "Thresholds were fixed beforehand. This run is one seed; a claim rests on three "
        "(rag-mm ablate)."
    )
    table = TextTable(["claim", "required", "measured", ""], rows)
    return PageSection("Claims", text, tables=[table])


def other_steering(config: DecodingStageConfig, metrics: Mapping[str, Any]) -> PageSection:
    """Guidance among plausible tokens, with two conditions, and contrastive decoding."""
    of_plain = [decoding_settings.plain(each) for each in (0.0, *config.temperatures)]
    tables = [
        _settings_table("Plain sampling; temperature 0 is greedy.", of_plain, metrics),
        _settings_table(
            f"Guidance among tokens of at least {config.plausible:g} of the largest probability.",
            decoding_settings.plausible(config),
            metrics,
        ),
        _settings_table(
            "Two conditions: d is the weight of the documents, w that of the caption.",
            [decoding_settings.two_conditions(*weights) for weights in config.two_conditions],
            metrics,
        ),
        _settings_table(
            "Contrastive decoding, CD-K: k and alpha (a) say which tokens are plausible, then the amateur's "
            "null prompt, its temperature and the floor where there is one.",
            decoding_settings.contrasts(config),
            metrics,
        ),
    ]
    text = (
        "Entropy is that of the distribution that codes are drawn from, in nats per code, estimated at "
        "temperature 1 from the log-probabilities of the drawn codes."
    )
    return PageSection("Plausible tokens, two conditions, contrast", text, tables=tables)


def _settings_table(
    note: str, settings: Sequence[DecodingSetting], metrics: Mapping[str, Any]
) -> TextTable:
    rows = [
        [
            setting.name,
            *(number(metrics["settings"][setting.name], fact) for fact in _FACTS),
            number(metrics["settings"][setting.name], "entropy"),
        ]
        for setting in settings
    ]
    return TextTable(["setting", *_FACTS, "entropy"], rows, note)


def ranking_table(config: DecodingStageConfig, metrics: Mapping[str, Any]) -> TextTable:
    """Joint accuracy after re-ranking by the number of candidates and what makes them."""
    makers = [*decoding_settings.candidates(config), rank_candidates.MIXTURE]
    rows = []
    for count in config.num_candidates:
        row = [str(count)]
        for maker in makers:
            found = metrics["ranked"][rank_candidates.ranked_name(maker, count)]
            row += [number(found, "joint"), number(found, "upper_bound")]
        rows.append(row)
    head = ["candidates"]
    for maker in makers:
        head += [maker, f"{maker}, upper bound"]
    ranked = decoding_settings.contrast(config.contrasts[config.ranked_contrast])
    note = (
        "The upper bound is what the exact scorer would choose: any candidate is right. Figures are means "
        f"over all groups of that many of {config.num_candidates[-1]} candidates of each kind; the mixture "
        f"takes turns. Contrast is {ranked.name}."
    )
    return TextTable(head, rows, note)


def parallel(config: DecodingStageConfig, metrics: Mapping[str, Any]) -> PageSection:
    """Passes of parallel decoding, and what its images show."""
    rows = []
    for setting in decoding_settings.jacobis(config):
        found = metrics["settings"][setting.name]
        same = metrics["settings"][setting.name.removeprefix(f"{setting.decoding}_")]
        row = [
            setting.name,
            number(found, "passes", 1),
            number(found, "joint"),
            number(same, "joint"),
        ]
        rows.append(row)
    head = ["setting", "passes per image", "joint", "joint, sequential"]
    text = (
        f"Speculative Jacobi decoding with maximal coupling ({tasks.JACOBI}) and without "
        f"({tasks.JACOBI_UNCOUPLED}): passes of the decoder after the prompt. Sequential sampling makes one "
        "for every code but the first. Images of the same distribution, not of the same noise, are compared."
    )
    return PageSection("Parallel decoding", text, tables=[TextTable(head, rows)])


def speed(speeds: Sequence[decoding_speed.DecodingSpeed], ratio: float | None) -> PageSection:
    """Time and passes per image."""
    rows = [
        [_KINDS[each.kind], str(each.batch), f"{each.milliseconds:.2f}", f"{each.passes:.1f}"]
        for each in speeds
    ]
    text = (
        f"Median of several warm calls at temperature {decoding_speed.TEMPERATURE:g}, with the prompt, "
        f"without pixels. The milliseconds are those of {decoding_speed.device()}."
    )
    if ratio is not None:
        size = decoding_speed.STREAMS_BATCH
        text += f" With {size} images at once two streams take {ratio:.2f} x the time of one."
    table = TextTable(["decoding", "images at once", "ms per image", "passes per image"], rows)
    return PageSection("Speed", text, tables=[table])


def over_reliance_table(
    config: DecodingStageConfig, metrics: Mapping[str, Any], num_copyable: Mapping[str, int]
) -> PageSection:
    """What is copied from documents against the caption, by null prompt, weight and temperature."""
    rows = []
    for null in config.nulls:
        for weight in config.weights:
            row = [null, f"{weight:g}"]
            for temperature in config.temperatures:
                name = decoding_settings.guided(null, weight, temperature).name
                found = metrics["settings"][name]
                shares = [found.get(figure) for figure in over_reliance.FIGURES]
                row.append(
                    " ".join("" if each is None else f"{each['mean']:.3f}" for each in shares)
                )
            rows.append(row)
    head = ["null prompt", "weight", *(f"T {each:g}" for each in config.temperatures)]
    counts = ", ".join(
        f"{name.removeprefix('copied_')} {count}" for name, count in num_copyable.items()
    )
    text = (
        "Share of images that have the place, the background color, or all codes of a document, among the "
        f"scenes whose documents all differ from the caption in that (n: {counts or 'none'}). In each cell: "
        "place, color, whole image."
    )
    return PageSection("Copied against the caption", text, tables=[TextTable(head, rows)])
