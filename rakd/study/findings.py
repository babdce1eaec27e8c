"""What a study found, in words made from its figures: differences between methods, seed by seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rakd.evaluation.depth import ALL
from rakd.study.measures import MEAN, METHOD_NAMES, Measure, summarise, values_by_seed
from rakd.study.results import METHODS, PAPER_METHODS, StudyResult

HEADLINES = (
    Measure("3d", "Car", "moderate", "official"),
    Measure("3d", MEAN, MEAN, "official"),
    Measure("3d", MEAN, MEAN, "loose"),
    Measure("depth_error", ALL),
    Measure("found", ALL),
)
"""What every method is compared in with no distillation; KITTI ranks by the first.

RAKD is compared with the other methods in the first of them that is not 0 for every apprentice.
"""

FEWEST_SEEDS = 3
"""Paired seeds from which on two methods can be said to differ: two point one way by chance every other time."""

_APPRENTICES = tuple(method for method in METHODS if method != "expert")
_DISTILLED = tuple(method for method in _APPRENTICES if method != "none")


def describe(study: StudyResult) -> list[str]:
    """A sentence or two on each headline measure, then on RAKD and its rivals, then on how far to trust them.

    Methods are compared by the differences between their runs of the same seed. They are said to differ only if
    there are `FEWEST_SEEDS` or more, all point the same way and their mean exceeds their standard deviation. The
    expert is another model, whose seed has nothing to do with the apprentice's: there the means are compared.

    Returns:
        Sentences, in the order to be read; one that says so when nothing can be compared.
    """
    sentences, made, silent = [], [], []
    for measure in HEADLINES:
        if _is_silent(study, measure, METHODS):
            silent.append(measure.title)
            continue
        compared = [] if _is_silent(study, measure, _APPRENTICES) else _with_none(study, measure)
        told = _gap(study, measure)
        if compared:
            told.append(_list("Change from no distillation", compared))
        if told:
            sentences.append(f"{measure.title}: {' '.join(told)}")
        made += compared
    telling = (measure for measure in HEADLINES if not _is_silent(study, measure, _APPRENTICES))
    rivals = next((compared for measure in telling if (compared := _with_rivals(study, measure))), [])
    if rivals:
        sentences.append(f"{rivals[0].measure.title}: {_list('Change to RAKD', rivals)}")
        made += rivals
    if not sentences and not silent:
        return ["Nothing to compare yet: no two methods have figures of the same seed."]
    if silent:
        sentences.append(f"0 in every run, which tells nothing apart: {'; '.join(silent)}.")
    missing = [METHOD_NAMES[name] for name in PAPER_METHODS if all(run.method != name for run in study.runs)]
    if missing:
        sentences.append(f"Not run: {', '.join(missing)}.")
    return sentences + _caution(made)


@dataclass(frozen=True)
class _Comparison:
    """Differences in a measure of the runs of two methods with the same seeds; there is at least one."""

    measure: Measure
    names: str
    differences: Sequence[float]

    @property
    def signs(self) -> dict[str, int]:
        """Number of seeds that are better, worse, equal."""
        gains = [-value if self.measure.lower_is_better else value for value in self.differences]
        signs = {"better": sum(gain > 0 for gain in gains), "worse": sum(gain < 0 for gain in gains)}
        return signs | {"equal": len(gains) - sum(signs.values())}

    @property
    def is_one_sided(self) -> bool:
        return len(self.differences) in (self.signs["better"], self.signs["worse"])

    @property
    def text(self) -> str:
        """Mean, spread, signs and, if they differ, the verdict."""
        summary = summarise(self.differences)
        mean = f"{summary.mean:+.2f}".replace("-", "−")
        signs = {name: count for name, count in self.signs.items() if count}
        if summary.count == 1:
            return f"{self.names} {mean} ({next(iter(signs))})"
        told = ", ".join(f"{'all' if count == summary.count else count} {name}" for name, count in signs.items())
        differs = summary.count >= FEWEST_SEEDS and self.is_one_sided and math.fabs(summary.mean) > summary.spread
        return f"{self.names} {mean} ± {summary.spread:.2f} ({told}{': differs' if differs else ''})"


def _list(head: str, compared: Sequence[_Comparison]) -> str:
    """Comparisons in a sentence for each number of seeds, most seeds first."""
    sentences = []
    for count in sorted({len(each.differences) for each in compared}, reverse=True):
        texts = "; ".join(each.text for each in compared if len(each.differences) == count)
        doubt = "" if count >= FEWEST_SEEDS else ", which cannot tell"
        sentences.append(f"{head} over {_plural(count, 'seed')}{doubt}: {texts}.")
    return " ".join(sentences)


def _with_none(study: StudyResult, measure: Measure) -> list[_Comparison]:
    """Each method and no distillation, as far as they share seeds."""
    return _comparisons(study, measure, {METHOD_NAMES[method]: (method, "none") for method in _DISTILLED})


def _with_rivals(study: StudyResult, measure: Measure) -> list[_Comparison]:
    """RAKD and each other method, as far as they share seeds."""
    rivals = [method for method in _DISTILLED if method != "rakd"]
    return _comparisons(study, measure, {f"from {METHOD_NAMES[method]}": ("rakd", method) for method in rivals})


def _comparisons(study: StudyResult, measure: Measure, pairs: dict[str, tuple[str, str]]) -> list[_Comparison]:
    made = []
    for names, pair in pairs.items():
        ones, others = (values_by_seed(study, method, measure) for method in pair)
        differences = [ones[seed] - others[seed] for seed in ones if seed in others]
        if differences:
            made.append(_Comparison(measure, names, differences))
    return made


def _is_silent(study: StudyResult, measure: Measure, methods: Sequence[str]) -> bool:
    """Whether the measure is 0 in all runs that have it, as AP is for models too weak for its overlaps."""
    figures = [value for method in methods for value in values_by_seed(study, method, measure).values()]
    return bool(figures) and not any(figures)


def _gap(study: StudyResult, measure: Measure) -> list[str]:
    """The expert beside the apprentice on its own: whether there is something to teach. Empty if one is missing."""
    figures, means = [], []
    for name, method in (("expert", "expert"), ("no distillation", "none")):
        summary = summarise(values_by_seed(study, method, measure).values())
        if not summary.count:
            return []
        spread = f" ± {summary.spread:.2f}" if summary.count > 1 else ""
        figures.append(f"{name} {summary.mean:.2f}{spread} ({_plural(summary.count, 'run')})")
        means.append(summary.mean)
    expert, apprentice = means
    ahead = expert < apprentice if measure.lower_is_better else expert > apprentice
    return [", ".join(figures) + ("." if ahead else ": the expert is not ahead here.")]


def _caution(made: Sequence[_Comparison]) -> list[str]:
    """How comparisons are judged, and how many of them chance alone would make look like something."""
    if not made:
        return []
    telling = [each for each in made if len(each.differences) >= FEWEST_SEEDS]
    comparisons = _plural(len(made), "comparison")
    if not telling:
        return [f"{comparisons}, none over {FEWEST_SEEDS} seeds or more: none can tell a difference from chance."]
    one_sided = sum(each.is_one_sided for each in telling)
    by_chance = sum(2.0 ** (1 - len(each.differences)) for each in telling)
    return [
        f"Methods are told apart only where it says “differs”: over {FEWEST_SEEDS} seeds or more, all pointing one "
        "way, with a mean beyond their standard deviation. This is a rule of thumb, no test of significance.",
        f"{comparisons}, {len(telling)} over {FEWEST_SEEDS} seeds or more, of which {one_sided} point one way in all "
        f"seeds. Were all methods alike, about {by_chance:.2g} would by chance; as comparisons share runs, they lean "
        "together.",
    ]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
