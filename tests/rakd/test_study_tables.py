"""Measures, tables and paired differences of a study."""

import csv
import math

import numpy as np
import pytest
from study_cases import LOOSE, run, study_of

from rakd.evaluation.kitti import CLASSES
from rakd.study.metrics import MEAN, Metric, summarise, values_by_seed
from rakd.study.report import write_report
from rakd.study.settings import ALL_METHODS
from rakd.study.tables import format_csv, format_lines, format_markdown, make_tables


def table(study, key):
    return next(table for table in make_tables(study) if table.key == key)


def column(study, key, head):
    """Texts and marks of a column by method."""
    chosen = table(study, key)
    place = chosen.heads.index(head)
    return {row.method: (row.cells[place].text(row.runs), row.cells[place].mark) for row in chosen.rows}


# ---- Measures. ----


def test_averages_leave_out_what_the_data_lacks_but_not_what_a_run_lacks():
    nan = math.nan
    whole = {"Car": (9.0, 6.0, 3.0), "Pedestrian": (1.0, 1.0, nan), "Cyclist": (nan,) * 3}
    part = whole | {"Pedestrian": (1.0, nan, nan)}
    study = study_of(run("none", 0, whole), run("none", 1, part))
    assert values_by_seed(study, "none", LOOSE) == {0: 4.0}
    assert values_by_seed(study, "none", Metric("3d", MEAN, "easy", "loose")) == {0: 5.0, 1: 5.0}


def test_spread_is_the_sample_standard_deviation():
    summary = summarise([1.0, 2.0, 4.0])
    assert (summary.mean, summary.std, summary.count) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1), 3))
    assert math.isnan(summarise([5.0]).std)
    assert math.isnan(summarise([]).mean)


# ---- Tables. ----


def test_overview_has_accuracy_and_costs(study):
    assert column(study, "table2", "3D easy") == {
        "expert": ("30.00", ""),
        "none": ("11.00 ± 1.00", ""),
        "rakd": ("13.00 ± 1.00", ""),
    }
    assert [text for text, _ in column(study, "table2_loose", "Latency, ms").values()] == ["38.2", "17.0", "17.0"]
    assert [text for text, _ in column(study, "table2", "Params, M").values()] == ["44.12", "–", "–"]
    assert [row.name for row in table(study, "table2").rows][2] == "Apprentice + RAKD (resnet18)"


def test_best_and_second_are_marked_and_the_expert_is_not(study):
    columns = (("", "Average"), ("_loose", "Car mod."), ("_bev", "Ped. easy"), ("_bev_loose", "Cyc. hard"))
    for key, head in ((f"table3{end}", head) for end, head in (*columns, ("_2d", "Car easy"))):
        assert column(study, key, head) == {
            "expert": ("30.00", ""),
            "none": ("11.00 ± 1.00", "second"),
            "pkd": ("10.50", ""),
            "semckd": ("–", ""),
            "rakd": ("13.00 ± 1.00", "best"),
        }


def test_less_is_better_for_errors_and_equal_columns_have_no_marks(study):
    errors = column(study, "table3_depth", "All AbsRel")
    assert errors["rakd"] == ("8.00 ± 0.00", "best")
    assert errors["none"] == ("10.00 ± 0.00", "second")
    assert errors["pkd"] == ("10.00", "second")
    assert {mark for _, mark in column(study, "table3_depth", "Car recall").values()} == {""}


def test_figures_that_look_equal_share_their_mark():
    study = study_of(run("none", 0, 1.0), run("pkd", 0, 5.001), run("semckd", 0, 4.999), run("rakd", 0, 3.0))
    marks = {method: mark for method, (_, mark) in column(study, "table3", "Average").items()}
    assert marks == {"expert": "", "none": "", "pkd": "best", "semckd": "best", "rakd": "second"}


def test_ablation_has_the_terms_of_the_loss():
    values = {"none": 1.0, "l_roi": 2.0, "hfa": 3.0, "rakd": 4.0, "pkd": 9.0}
    study = study_of(*(run(method, 0, value) for method, value in values.items()))
    marks = {method: mark for method, (_, mark) in column(study, "ablation_loose", "Average").items()}
    assert marks == {"expert": "", "none": "", "l_roi": "", "hfa": "second", "rakd": "best"}


def test_tables_hold_the_methods_that_are_planned_or_done():
    runs = [run("none", 0, 1.0), run("rakd", 0, 2.0), run("cwd", 0, 3.0)]
    study = study_of(*runs, config={"methods": ["none", "pkd", "rakd"]})
    methods = {one.key: [row.method for row in one.rows] for one in make_tables(study)}
    assert methods["table3"] == ["expert", "none", "pkd", "rakd", "cwd"]
    assert methods["training"] == ["expert", "none", "pkd", "rakd", "cwd"]
    assert not any(key.startswith("ablation") for key in methods)  # nothing of it that table 3 has not
    study = study_of(*runs, config={"methods": ["none", "hfa", "rakd"]})
    assert [row.method for row in table(study, "ablation").rows] == ["expert", "none", "hfa", "rakd"]


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_study_of_one_method_has_its_tables(method, tmp_path):
    study = study_of(run("expert", 0, 3.0), run(method, 0, 1.0), config={"methods": [method]})
    write_report(study, tmp_path)
    shown = {row.method for one in make_tables(study) for row in one.rows} - {"expert", "none", "rakd"}
    assert shown == {method} - {"none", "rakd"}
    assert all(len(one.rows) > 1 for one in make_tables(study) if one.key.startswith(("table3", "ablation")))


def test_a_figure_from_fewer_seeds_says_so():
    gap = dict.fromkeys(CLASSES, (math.nan, 1.0, 1.0))
    study = study_of(run("none", 0, 2.0), run("none", 1, gap))
    assert column(study, "table3", "Car easy")["none"][0] == "2.00 (of 1)"
    assert column(study, "table3", "Car hard")["none"][0] == "1.50 ± 0.71"
    # Differences, too, beside those that all seeds have.
    study = study_of(*(run("none", seed, 2.0) for seed in (0, 1)), run("rakd", 0, 2.5), run("rakd", 1, gap))
    cells = {cell.metric.key: cell.text(2) for cell in table(study, "difference").rows[0].cells}
    assert cells["recall all"] == "+0.00 ± 0.00"
    assert cells["3d mean mean official"] == "+0.50 (of 1)"


def test_training_time_and_losses(study):
    assert column(study, "training", "minutes")["pkd"] == ("1.50", "")
    assert column(study, "training", "task")["pkd"][0] == "1.50"
    assert column(study, "training", "distill")["pkd"][0] == "–"


def test_markdown_rows_agree_with_their_head(study):
    for one in make_tables(study):
        lines = format_markdown(one).splitlines()[2:]
        assert len({line.count("|") for line in lines}) == 1
    text = format_markdown(table(study, "table3"))
    assert "| RAKD | 3 | **13.00 ± 1.00** |" in text
    assert "<u>11.00 ± 1.00</u>" in text
    assert "| SemCKD | – | – |" in text


def test_lines_for_a_terminal_are_aligned(study):
    title, _, head, rule, seeds, *rows = format_lines(table(study, "table3")).splitlines()
    assert title.startswith("Table 3")
    assert all(len(line) <= len(rule) for line in (head, *rows))
    assert seeds.split() == ["seeds", "1", "3", "1", "–", "3"]
    end = head.index("RAKD") + len("RAKD")
    assert all(row[:end].endswith("13.00 ± 1.00") and row[end:] == "*" for row in rows)


def test_csv_is_long_form(study):
    rows = list(csv.DictReader(format_csv(make_tables(study)).splitlines()))
    assert list(rows[0]) == [
        "table",
        "method",
        "class",
        "metric",
        "level",
        "overlap",
        "mean",
        "std",
        "seeds",
        "low",
        "high",
    ]
    (row,) = (r for r in rows if (r["table"], r["method"], r["class"]) == ("table3_loose", "rakd", "mean"))
    assert list(row.values())[3:] == ["3d", "mean", "loose", "13", "1", "3", "", ""]
    (cost,) = (r for r in rows if (r["table"], r["method"], r["metric"]) == ("table2", "none", "latency_ms"))
    assert (cost["mean"], cost["std"], cost["seeds"]) == ("17", "", "")
    assert {r["mean"] for r in rows if r["method"] == "semckd"} == {""}


# ---- Paired differences. ----


def test_there_is_no_table_of_differences_to_a_method_that_did_not_run():
    for methods, tables in (
        (("none", "pkd"), {"difference"}),
        (("pkd", "rakd"), {"difference_rakd"}),
        (("pkd", "hfa"), set()),
        (("none", "pkd", "rakd"), {"difference", "difference_rakd"}),
    ):
        study = study_of(*(run(method, seed, 1.0) for method in methods for seed in (0, 1)))
        assert {table.key for table in make_tables(study) if table.key.startswith("difference")} == tables


def test_differences_pair_runs_of_one_seed():
    none, rakd = (1.0, 2.0, 3.0, 9.0), (2.0, 3.5, 5.0)
    runs = [
        run(method, s, value) for method, values in (("none", none), ("rakd", rakd)) for s, value in enumerate(values)
    ]
    study = study_of(*runs, run("pkd", 7, 1.0), run("hfa", 1, 4.0))
    head = LOOSE.title
    # Differences 1, 1.5, 2: mean 1.5, deviation 0.5. Runs of which nothing is known on drawn frames have no interval.
    assert column(study, "difference", head) == {
        "pkd": ("–", ""),
        "hfa": ("+2.00", ""),
        "rakd": ("+1.50 ± 0.50", ""),
    }
    assert column(study, "difference_rakd", head) == {"pkd": ("–", ""), "hfa": ("−0.50", "")}
    rows = {
        r["method"]: r
        for r in csv.DictReader(format_csv(make_tables(study)).splitlines())
        if r["overlap"] == "loose" and r["table"] == "difference" and r["class"] == MEAN
    }
    assert [rows["rakd"][name] for name in ("mean", "std", "low", "high")] == ["1.5", "0.5", "", ""]
    assert [rows["hfa"][name] for name in ("mean", "low", "high", "seeds")] == ["2", "", "", "1"]


def test_no_pair_no_table():
    keys = {one.key for one in make_tables(study_of(run("none", 0, 1.0), run("expert", 0, 2.0)))}
    assert "table3" in keys
    assert not any(key.startswith("difference") for key in keys)
