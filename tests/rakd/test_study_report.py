"""Results of a study in files, its pictures and its report, from figures made by hand."""

import dataclasses
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from study_cases import run, study_of

from benchmarks import gains
from rakd.evaluation.depth import DepthFigures
from rakd.evaluation.kitti import CLASSES
from rakd.study.evaluation import precisions_of
from rakd.study.metrics import Metric
from rakd.study.pictures import COLORS, draw_bars, draw_gains, draw_sizes, draw_tradeoff, draw_training, running_mean
from rakd.study.report import format_tables, write_report
from rakd.study.results import METHODS, ModelFigures, StudyResult, TrainingLog, read_study, write_study
from rakd.study.settings import STUDIES
from rakd.study.tables import make_tables

# ---- Results. ----


def test_a_study_survives_json(study, tmp_path):
    write_study(tmp_path / "study.json", study)
    back = read_study(tmp_path / "study.json")
    assert math.isnan(back.runs[-1].losses["distill"])
    finite = dataclasses.replace(study.runs[-1], losses={})
    for one in (study, back):
        object.__setattr__(one, "runs", (*one.runs[:-1], dataclasses.replace(one.runs[-1], losses={})))
    assert back == study
    assert back.runs[-1] == finite


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=3, max_size=3), st.none() | st.floats(0, 1e6))
def test_json_keeps_every_finite_figure_and_stays_json(values, seconds):
    study = study_of(run("none", 0, {"Car": tuple(values)}, abs_rel=values[0], seconds=seconds))

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    json.loads(study.to_json(), parse_constant=refuse)
    back = StudyResult.from_json(study.to_json()).runs[0]
    for got, wanted in zip(back.precisions["loose"]["3d"]["Car"], values, strict=True):
        assert got == wanted if math.isfinite(wanted) else math.isnan(got)
    assert back.seconds == seconds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(colour=1), "study has the unknown field 'colour'"),
        (lambda c: c["runs"][0].update(method="magic"), r"runs\[0\]: method must be one of expert, .*got 'magic'"),
        (lambda c: c["runs"][1].pop("seed"), r"runs\[1\]: .*seed"),
        (lambda c: c["runs"].append(c["runs"][0]), "several of expert, seed 0"),
        (lambda c: c["models"].append(c["models"][0]), "several of 'expert'"),
        (lambda c: c["runs"][0]["precisions"]["loose"]["3d"].update(Car=[1]), "must hold 3 levels, got 1"),
        (lambda c: c["runs"].insert(0, 5), r"runs\[0\] must be a JSON object, got int"),
    ],
)
def test_a_file_that_holds_no_study_is_an_error_that_names_it(study, tmp_path, change, message):
    content = json.loads(study.to_json())
    change(content)
    (tmp_path / "study.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"study.json: .*{message}"):
        read_study(tmp_path / "study.json")


def test_text_that_is_not_json_is_an_error(tmp_path):
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match=r"study\.json: "):
        read_study(tmp_path / "study.json")


def test_precisions_of_an_evaluation():
    def metric(evaluated, values, objects):
        return {"evaluated": evaluated, "R40": values, "R11": [], "precision": [], "objects": objects}

    none = metric(False, [0.0] * 3, [0, 0, 4])
    found, seen = metric(True, [3.0, 2.0, 1.0], [5, 6, 7]), metric(True, [9.0, 8.0, 7.0], [5, 6, 7])
    result = {name: {"3d": none, "bev": none, "bbox": none} for name in CLASSES}
    result["Car"] = {"3d": found, "bev": none, "bbox": seen}
    precisions = precisions_of(official=result, loose=result)
    assert precisions["loose"]["3d"]["Car"] == (3.0, 2.0, 1.0)
    assert precisions["official"]["bbox"]["Car"] == (9.0, 8.0, 7.0)
    # Nothing to be found is no figure; something to be found and nothing detected is 0.
    easy, moderate, hard = precisions["official"]["bev"]["Car"]
    assert math.isnan(easy) and math.isnan(moderate) and hard == 0.0


# ---- Pictures and files. ----


def test_bars_stand_for_means_and_dots_for_seeds(study):
    figure = draw_bars(study)
    axis = figure.axes[3]  # the average of the first row
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        *("Expert", "No distillation", "PKD", "RAKD")
    ]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([30, 11, 10.5, 13])
    assert [sorted(line.get_xdata()) for line in axis.lines] == [[30], [10, 11, 12], [10.5], [12, 13, 14]]


def test_gains_stand_at_paired_means_and_are_filled_where_the_interval_excludes_0():
    key = Metric("3d", "Car", "moderate", "official").key
    alone = run("none", 0, 10.0, abs_rel=0.1, drawn={key: (9.0, 10.0, 11.0)})
    clear = run("rakd", 0, 14.0, abs_rel=0.08, drawn={key: (13.1, 14.0, 14.9)})
    unclear = run("hfa", 0, 11.0, drawn={key: (13.0, 10.0, 9.0)})
    figure = draw_gains(
        {"one": study_of(alone, clear, unclear), "two": study_of(alone), "three": study_of(alone, clear)}
    )
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["", "HFA", "RAKD", "", "RAKD"]  # in the second nothing was distilled
    assert [text.get_text() for text in figure.texts][:2] == ["one", "three"]
    places = {}
    for line in figure.axes[0].lines:
        if line.get_marker() == "o":
            places[line.get_ydata()[0]] = (line.get_xdata()[0], line.get_markerfacecolor())
    assert places == {1: (1.0, "white"), 2: (4.0, COLORS["rakd"]), 4: (4.0, COLORS["rakd"])}
    errors = next(axis for axis in figure.axes if axis.get_title(loc="left").startswith("Less AbsRel"))
    dots = [line for line in errors.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in dots] == pytest.approx([0, 2, 2])  # lower is better, and better is right
    assert [line.get_markerfacecolor() for line in dots] == ["white"] * 3  # nothing was drawn


def test_a_loss_is_no_gain_and_without_a_common_seed_there_is_no_picture(tmp_path):
    key = Metric("3d", "Car", "moderate", "official").key
    alone = run("none", 0, 10.0, drawn={key: (9.0, 10.0, 11.0)})
    worse = run("rakd", 0, 6.0, drawn={key: (5.1, 6.0, 6.9)})
    dots = [line for line in draw_gains({"": study_of(alone, worse)}).axes[0].lines if line.get_marker() == "o"]
    assert [(line.get_xdata()[0], line.get_markerfacecolor()) for line in dots] == [(-4.0, "white")]
    other = study_of(alone, run("rakd", 1, 6.0))
    assert "gains.png" not in [path.name for path in write_report(other, tmp_path)]


def test_training_curves_have_a_panel_for_each_loss(study):
    rows = [{"step": step, "task": 5 - step / 100} for step in range(100)]
    logs = [
        TrainingLog("none", 0, rows),
        TrainingLog("rakd", 0, [row | {"distill": math.nan if row["step"] == 3 else 1.0} for row in rows]),
    ]
    figure = draw_training(study, logs)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["task", "distill"]
    assert [line.get_color() for line in figure.axes[0].lines] == [COLORS["none"], COLORS["rakd"]]
    (line,) = figure.axes[1].lines
    assert len(line.get_xdata()) == 99
    (axis,) = draw_training(study, [TrainingLog("none", 0, [{"step": 1, "task": math.nan}])]).axes
    assert [text.get_text() for text in axis.texts] == ["no finite values"]
    with pytest.raises(ValueError, match="at least one loss"):
        draw_training(study, [])
    with pytest.raises(ValueError, match="row 1 has task"):
        TrainingLog("none", 0, [{"step": 1}, {"task": 1.0}])
    with pytest.raises(ValueError, match="method must be one of"):
        TrainingLog("magic", 0, [])


def test_running_mean():
    np.testing.assert_allclose(running_mean(np.array([1.0, 2, 6, 0]), 1), [1.5, 3, 8 / 3, 3])
    np.testing.assert_allclose(running_mean(np.array([1.0, 2, 6]), 0), [1, 2, 6])


def test_methods_have_names_and_colours():
    assert set(COLORS) == set(METHODS)
    assert len(set(COLORS.values())) == len(METHODS)


def test_report_writes_everything_and_the_same_twice(study, tmp_path):
    logs = [TrainingLog("none", 0, [{"step": step, "task": 1.0 + step} for step in range(9)])]
    paths = write_report(study, tmp_path / "a", logs)
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "a").iterdir())
    text = (tmp_path / "a" / "tables.md").read_text()
    assert all(f"### {one.title}" in text for one in make_tables(study))
    assert "Data: made by hand. Detectors: expert (resnet50), apprentice (resnet18). Seeds: 0, 1, 2. Runs: 8." in text
    assert "![training](training.png)" in text
    assert read_study(tmp_path / "a" / "study.json").models == study.models
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.size[0] > 900
    for path in write_report(study, tmp_path / "b", logs):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def provenance(config, **more):
    """The paragraph in the text for a terminal; the Markdown has the same."""
    study = study_of(config=config, **more)
    text = format_tables(study)
    return text.partition("Where it comes from\n")[2].partition("\n")[0]


def test_provenance_tells_what_a_reader_must_know(tmp_path):
    config = dataclasses.asdict(STUDIES["tiny"]) | {
        "started_from": {"expert": "ImageNet weights", "apprentice": "random weights"},
    }
    more = {
        "models": (ModelFigures("expert", "resnet18"),),
        "versions": {"torch": "2.13", "device": "Xeon", "threads": "2"},
        "seeds": (0, 1),
    }
    text = provenance(config, **more)
    assert text == (
        "Detectors: expert tiny-expert (resnet18), apprentice tiny, images 128 pixels high, padded to a width of 448. "
        "Training: expert 400 steps of 4 images, apprentices 250 steps of 4 images. Seeds: 0, 1. Runs: 0. "
        "Boxes in which methods compare features: the apprentice's proposals on objects. "
        "Loss weights: each such that the loss is 10 times the task loss at first, not tuned. "
        "Backbones started from: expert ImageNet weights, apprentice random weights. "
        "Versions: torch 2.13. Device: Xeon, threads 2."
    )
    write_report(study_of(config=config, **more), tmp_path)
    assert f"\n{text}\n" in (tmp_path / "tables.md").read_text()
    write_report(study_of(config=config | {"rescale": True}, **more), tmp_path)
    rescaled = text.replace("Loss weights", "Expert's maps: brought to a root mean square of 1. Loss weights")
    assert f"\n{rescaled}\n" in (tmp_path / "tables.md").read_text()
    write_report(study_of(config=config | {"rescale": "both"}, **more), tmp_path)
    rescaled = text.replace("Loss weights", "Maps of both networks: brought to a root mean square of 1. Loss weights")
    assert f"\n{rescaled}\n" in (tmp_path / "tables.md").read_text()


def test_provenance_of_an_expert_from_a_file_and_of_other_weights():
    config = dataclasses.asdict(STUDIES["tiny"]) | {
        "expert": {"height": 128},
        "expert_file": "good.pt",
        "expert_training": None,
        "started_from": {"expert": "random weights", "apprentice": "random weights"},
        "weights": {"rakd": 1.0, "pkd": 0.5, "hfa": 1.0},
        "methods": ("none", "pkd", "rakd"),
    }
    text = provenance(config)
    assert "Detectors: expert of good.pt, apprentice tiny, images" in text
    assert "Training: apprentices 250 steps" in text
    assert "Loss weights: PKD 0.5, RAKD 1. Backbones started from: apprentice random weights." in text
    assert "Options of methods" not in text
    one = "Loss weights: one loss weight (2) for every method, not tuned: methods' losses have different scales."
    assert one in provenance(config | {"weights": {"pkd": 2.0, "rakd": 2.0}})
    assert "Loss weights: PKD 6, RAKD auto:10." in provenance(config | {"weights": {"pkd": 6.0, "rakd": "auto:10"}})
    text = provenance(config | {"options": {"rakd": {"sigma": 0.5, "output_size": 19}}})
    assert "RAKD 1. Options of methods: RAKD sigma 0.5, RAKD output_size 19." in text


def test_notes_warn_of_what_figures_do_not_say(study, tmp_path):
    write_report(study, tmp_path)
    for text in (format_tables(study), (tmp_path / "tables.md").read_text()):
        for words in (
            "they ignore the standard deviation",
            "false positives cost nothing",
            "Compare it beside the recall",
        ):
            assert words in text


class Page(HTMLParser):
    """The rows of a page's tables, its pictures, and whether each mark that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.pictures: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_page_has_the_figures_of_the_tables(study, tmp_path):
    study = dataclasses.replace(study, data="made <by> hand & eye")
    write_report(study, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == [] and "made &lt;by&gt; hand &amp; eye" in text
    assert page.pictures == ["bars.png", "gains.png", "tradeoff.png", "frames.png"]
    wanted = []
    for one in make_tables(study):
        wanted.append(["Method", "Seeds", *one.heads])
        wanted += [[r.name, str(r.runs or "–"), *(cell.text(r.runs) for cell in r.cells)] for r in one.rows]
    assert page.rows == wanted


def test_gains_by_size_are_paired_means_over_seeds(tmp_path):
    def sized(method, seed, recall, abs_rel=0.1):
        groups = tuple(DepthFigures(abs_rel if i else math.nan, recall * i / 7, 10 + i) for i in range(7))
        return dataclasses.replace(run(method, seed, 1.0), by_size=groups)

    runs = [sized("none", 0, 0.7), sized("none", 1, 0.5), sized("rakd", 0, 0.75, 0.08), sized("rakd", 1, 0.65)]
    study = study_of(run("expert", 0, 9.0), *runs, sized("pkd", 5, 0.1))  # without none of its seed
    write_study(tmp_path / "study.json", study)
    again = read_study(tmp_path / "study.json")
    assert again.to_json() == study.to_json() and again.runs[1].by_size[1] == study.runs[1].by_size[1]
    left, right = draw_sizes(study).axes
    (recall,), (less,) = left.containers, right.containers
    assert recall.get_label() == "RAKD"
    np.testing.assert_allclose(recall.lines[0].get_ydata(), [10 * i / 7 for i in range(7)], atol=1e-12)
    np.testing.assert_allclose(less.lines[0].get_ydata(), [np.nan, *[1.0] * 6])  # no object of the first size was found
    # Of the largest, differences of 6/7 of 5 and of 15 points; 12.7062 is Student's quantile of one degree of freedom.
    low, high = recall.lines[2][0].get_segments()[-1][:, 1]
    np.testing.assert_allclose([low, high], 6 / 7 * np.array([10 - 12.7062 * 5, 10 + 12.7062 * 5]), rtol=1e-5)
    assert [label.get_text() for label in left.get_xticklabels()][1] == "24 to 34\n11\n8.6"
    one = draw_sizes(study_of(runs[0], runs[2])).axes[0].containers[0]
    np.testing.assert_allclose(one.lines[0].get_ydata(), [5 * i / 7 for i in range(7)], atol=1e-12)
    assert draw_sizes(study_of(runs[0], runs[3])) is None


def test_points_stand_at_latency_and_mean_ap(study):
    left, right = draw_tradeoff(study).axes
    for axis in (left, right):
        points = {c.get_label(): c.lines[0].get_xydata()[0].tolist() for c in axis.containers}
        assert points == {
            "Expert": [38.21, 30.0],
            "No distillation": [17.0, 11.0],
            "PKD": [17.0, 10.5],
            "RAKD": [17.0, 13.0],
        }
        (hollow,) = (line for line in axis.lines if line.get_markerfacecolor() == "white")
        assert hollow.get_xydata().tolist() == [[21.5, 30.0]]
        assert axis.get_xlabel().endswith("hollow: in ONNX Runtime)")


def test_report_of_an_empty_study(tmp_path):
    paths = write_report(study_of(), tmp_path)
    assert [path.name for path in paths] == ["study.json", "tables.md", "tables.csv", "report.html"]
    assert "Table 3" in format_tables(study_of())


def test_every_study_of_the_picture_of_gains_has_five_seeds_a_method():
    for stem in gains.STUDIES.values():
        found = read_study(gains.ROOT / "benchmarks" / "results" / stem / "study.json")
        seeds = {
            method: sorted(run.seed for run in found.runs if run.method == method) for method in found.config["methods"]
        }
        assert {"none", "rakd"} <= set(seeds) and set(map(tuple, seeds.values())) == {(0, 1, 2, 3, 4)}
