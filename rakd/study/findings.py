"""What a study found, in words made from its figures: differences between methods, seed by seed."""

import math

from rakd.evaluation.depth import ALL
from rakd.study.measures import MEAN, METHOD_NAMES, Measure, Summary, summarise, values_by_seed
from rakd.study.results import METHODS, StudyResult

HEADLINES = (
    Measure("3d", MEAN, MEAN, "official"),
    Measure("3d", MEAN, MEAN, "loose"),
    Measure("bev", MEAN, MEAN, "loose"),
    Measure("depth_error", ALL),
    Measure("found", ALL),
)
"""What RAKD is compared in with the apprentice on its own."""

RIVALS_IN = Measure("3d", MEAN, MEAN, "loose")
"""What all methods are compared in with each other: it tells small data's models apart."""

_NAMES_WITHIN = {"none": "no distillation"}
_OTHERS = ("pkd", "semckd", "l_roi", "hfa")


def describe(study: StudyResult) -> list[str]:
    """Sentences on each headline measure, then on how far they can be trusted.

    Methods are compared by the differences between their runs of the same seed. A mean difference counts as
    one only if all differences point the same way and it exceeds their standard deviation. The expert is
    another model, whose seeds have nothing to do with the apprentice's: there the means are compared.

    Returns:
        Sentences, in the order to be read; one that says so when nothing can be compared.
    """
    sentences = [sentence for measure in HEADLINES for sentence in _on_measure(study, measure)]
    for one, other in (*((other, "none") for other in _OTHERS), *(("rakd", other) for other in _OTHERS)):
        sentences += _compare(study, RIVALS_IN, one, other)
    if not sentences:
        return ["Nothing to compare yet: no two methods have figures of the same seed."]
    missing = [METHOD_NAMES[name] for name in METHODS if all(run.method != name for run in study.runs)]
    if missing:
        sentences.append(f"Not run: {', '.join(missing)}.")
    seeds = len(_paired(study, RIVALS_IN, "rakd", "none"))
    if seeds > 1:
        chance = 2 ** (seeds - 1)
        sentences.append(
            f"Where two methods do not differ at all, {seeds} seeds still point one way by chance once in {chance}."
        )
    return sentences


def _on_measure(study: StudyResult, measure: Measure) -> list[str]:
    """The expert and the apprentice on their own, then RAKD and the apprentice on its own."""
    if _is_mute(study, measure):
        return [f"{measure.title}: 0 in every run, which tells nothing apart."]
    expert, apprentice = (values_by_seed(study, method, measure) for method in ("expert", "none"))
    sentences = []
    if expert and apprentice:
        sentences.append(f"{measure.title}: {_gap(expert, apprentice, measure.lower_is_better)}")
    return sentences + _compare(study, measure, "rakd", "none")


def _compare(study: StudyResult, measure: Measure, one: str, other: str) -> list[str]:
    """A sentence on the difference of two methods; none if they share no seed."""
    differences = _paired(study, measure, one, other)
    if not differences or _is_mute(study, measure):
        return []
    names = f"{METHOD_NAMES[one]} − {_NAMES_WITHIN.get(other, METHOD_NAMES[other])}"
    return [f"{measure.title}: {names} {_difference(differences, measure.lower_is_better)}"]


def _is_mute(study: StudyResult, measure: Measure) -> bool:
    """Whether the measure is 0 in all runs that have it, as AP is for models too weak for its overlaps."""
    figures = [value for method in METHODS for value in values_by_seed(study, method, measure).values()]
    return bool(figures) and not any(figures)


def _paired(study: StudyResult, measure: Measure, one: str, other: str) -> list[float]:
    """Differences of the runs of two methods with the same seed."""
    ones, others = values_by_seed(study, one, measure), values_by_seed(study, other, measure)
    return [ones[seed] - others[seed] for seed in ones if seed in others]


def _gap(expert: dict[int, float], apprentice: dict[int, float], lower_is_better: bool) -> str:
    """The expert beside the apprentice on its own: whether there is something to teach."""
    figures = []
    for name, values in (("expert", expert), ("no distillation", apprentice)):
        summary = summarise(values.values())
        spread = f" ± {summary.spread:.2f}" if summary.count > 1 else ""
        figures.append(f"{name} {summary.mean:.2f}{spread} ({_plural(summary.count, 'run')})")
    gain = summarise(expert.values()).mean - summarise(apprentice.values()).mean
    verdict = "." if (gain < 0 if lower_is_better else gain > 0) else ": the expert has nothing to teach here."
    return ", ".join(figures) + verdict


def _difference(differences: list[float], lower_is_better: bool) -> str:
    """Mean, spread, signs and verdict of paired differences."""
    summary = summarise(differences)
    gains = [-value if lower_is_better else value for value in differences]
    signs = {"better": sum(gain > 0 for gain in gains), "worse": sum(gain < 0 for gain in gains)}
    signs["equal"] = len(gains) - sum(signs.values())
    if summary.count == 1:
        word = next(name for name, count in signs.items() if count)
        return f"{_signed(summary.mean)} ({word}); one seed, so it may be chance."
    told = [f"all {name}" if count == len(gains) else f"{count} {name}" for name, count in signs.items() if count]
    text = f"{_signed(summary.mean)} ± {summary.spread:.2f} over {summary.count} seeds ({', '.join(told)})"
    return f"{text}." if _stands_out(summary, signs) else f"{text}: no difference beyond the seeds' spread."


def _stands_out(summary: Summary, signs: dict[str, int]) -> bool:
    one_way = max(signs["better"], signs["worse"]) == summary.count
    return one_way and math.fabs(summary.mean) > summary.spread


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
