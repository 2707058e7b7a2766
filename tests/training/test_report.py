"""The page: it says what it should, and holds nothing that runs, loads or leaks out of its text."""

import copy
import json
import re

import matplotlib
import numpy as np
import pytest

from engine.report.page import SERIES
from engine.stats import metrics
from tests.helpers.pages import Page
from training import assess, report

HOSTILE = '<img src=x onerror="alert(1)">$x^2$ &amp; {{ 7 * 7 }} ]]>'


def facts(members=("resnet50", "inception_v3"), classes=("normal", "osteopenia", "osteoporosis")) -> dict:
    """What evaluation.json holds, of a training that went well."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % len(classes)
    groups = np.arange(90)
    draws = {
        name: rng.dirichlet(np.ones(len(classes)), 90) + 0.7 * np.eye(len(classes))[labels]
        for name in (*members, "ensemble")
    }
    draws = {name: (one / one.sum(axis=1, keepdims=True)).astype(np.float32) for name, one in draws.items()}
    options = {"groups": groups, "seed": 0, "resamples": 50}
    figures = {name: metrics.evaluate(one, labels, classes=classes, **options) for name, one in draws.items()}
    difference = metrics.compare(draws["ensemble"], draws[members[0]], labels, **options)
    candidate = {
        "weights": [1 / len(members)] * len(members),
        "accuracy": 0.8,
        "macro_f1": 0.81,
        "nll": 0.5,
    }
    table = [
        {**candidate, "weights": [step / 10, *[(1 - step / 10) / (len(members) - 1)] * (len(members) - 1)]}
        for step in range(11)
    ]
    none = {"groups": 0, "images": 0}
    return {
        "classes": list(classes),
        "demo": False,
        "paper": assess.PAPER_FIGURES,
        "images": {name: dict.fromkeys(classes, 30) for name in ("train", "validation", "test")},
        "voters": {name: {"validation": one, "test": one} for name, one in figures.items()},
        "difference": {"from": members[0], "test": difference, "validation": difference},
        "weights_search": {"chosen": candidate, "beside": [candidate], "table": table},
        "temperature": {"applied": 1.0, "fitted": None, "validation_nll": None, "validation_ece": None},
        "data": {
            "images": 270,
            "left_out": {},
            "duplicates": "group",
            "dropped": 0,
            **dict.fromkeys(("exact", "near", "conflicts", "near_conflicts", "across"), none),
            "given_split": False,
            "patients": 200,
            "shortcuts": {
                "balanced_accuracy": 0.35,
                "p_value": 0.3,
                "chance": 1 / len(classes),
                "suspicious": False,
                "attributes": {
                    "bytes": {name: [2000.0, 3000.0, 4000.0] for name in classes},
                    "mode": {name: {"L": 80, "RGB": 10} for name in classes},
                },
            },
        },
        "history": {
            name: [
                {
                    "phase": phase,
                    "epoch": epoch,
                    "train_loss": 1 / epoch,
                    "validation_loss": 1.1 / epoch,
                    "validation_macro_f1": 1 - 0.5 / epoch,
                    "learning_rate": 1e-3,
                }
                for phase in ("head", "whole")
                for epoch in (1, 2, 3, 4, 5)
            ]
            for name in members
        },
        "best": {name: {"phase": "whole", "epoch": 4} for name in members},
        "folds": None,
        "recipe": {"members": list(members), "size": [224, 224], "head_rate": 1e-3, "freeze": False},
        "versions": {"torch": "2.14.0"},
    }


@pytest.fixture(scope="module")
def two() -> dict:
    return facts()


@pytest.fixture
def changed(two):
    """A copy to change."""
    return copy.deepcopy(two)


@pytest.mark.parametrize(
    ("members", "classes"),
    [
        (("resnet50", "inception_v3"), ("normal", "osteopenia", "osteoporosis")),
        (("resnet50", "inception_v3", "densenet121", "resnet50_2"), ("no", "yes")),
        (("resnet50", HOSTILE), (HOSTILE, *"abcdefg")),
    ],
)
def test_the_page_is_complete_and_self_contained(members, classes):
    evaluation = facts(members, classes)
    html = report.render(evaluation)
    page = Page(html)
    for heading in ("Verdict", "Test set", "Classes", "Confusions", "Learning curves", "Weights", "Data"):
        assert heading in page.text
    for name, sets in evaluation["voters"].items():
        for figure in ("accuracy", "macro_f1", "auc", "kappa"):
            assert f"{sets['test'][figure]['value']:.3f}" in page.text, (name, figure)
    assert page.tags.count("figure") == 2 + len(members) + (len(members) == 2)
    # nothing runs, nothing is loaded, nothing is sent
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "base", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html.replace("url(#", "")
    policy = page.values("content")[0]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    # every plot keeps to itself
    identifiers = page.values("id")
    assert len(identifiers) == len(set(identifiers)) > 0
    assert {link.removeprefix("#") for link in page.values("href")} <= set(identifiers)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(identifiers)


def test_hostile_names_are_text():
    evaluation = facts(("resnet50", HOSTILE), ("normal", HOSTILE, "x\x00y\u202ez\udcff"))
    evaluation["difference"]["from"] = HOSTILE
    evaluation["recipe"] |= {HOSTILE: HOSTILE}
    evaluation["versions"] |= {HOSTILE: HOSTILE}
    evaluation["data"]["left_out"] = {HOSTILE: 1}
    evaluation["data"]["shortcuts"]["attributes"]["mode"][HOSTILE] = {HOSTILE: 3}
    html = report.render(evaluation)
    page = Page(html)
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.text
    assert page.words.count(" ".join(HOSTILE.split())) > 20
    assert "x\ufffdy\ufffdz\ufffd" in page.text
    assert not re.search("[\x00\u202e\udcff]", html)
    html.encode("utf-8")


def test_same_input_same_page(two):
    first = report.render(two)
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "text.usetex": True}):
        assert report.render(json.loads(json.dumps(two))) == first
    assert dict(matplotlib.rcParams) == before


def test_plots_take_the_colours_of_the_page(two):
    drawings = re.findall(r"<svg.*?</svg>", report.render(two), flags=re.DOTALL)
    plots = [drawing for drawing in drawings if 'class="plot"' in drawing]
    assert len(plots) == 5
    for plot in plots:
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", plot)) <= {
            "none",
            "currentColor",
            "var(--faint)",
            *(f"var(--series-{number})" for number in range(SERIES)),
        }
        assert "var(--series-" in plot
        assert "font-family" not in plot
        assert "<text" in plot


def test_undefined_figures_are_dashes(changed):
    test = changed["voters"]["ensemble"]["test"]
    test["auc"] = test["kappa"] = {"value": None, "low": None, "high": None}
    test["accuracy"] |= {"low": None, "high": None}
    test["per_class"]["normal"] |= {"auc": None, "precision": None}
    test["roc"]["normal"] = {"fpr": [], "tpr": []}
    changed["difference"]["test"]["macro_f1"] |= {"low": None, "high": None}
    changed["data"]["shortcuts"]["balanced_accuracy"] = None
    page = Page(report.render(changed))
    assert "None" not in page.words
    assert "nan" not in page.text
    row = page.words.split("Table 2 (other images)")[0].split("ensemble")[-1].split()
    assert row[0] == f"{test['accuracy']['value']:.3f}"
    assert row.count("–") == 2
    assert "too few images for an interval" in page.words


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0.05, 0.01, 0.09, "+0.050 (+0.010 to +0.090): the interval excludes zero, averaging was better"),
        (-0.05, -0.09, -0.01, "−0.050 (−0.090 to −0.010): the interval excludes zero, averaging was worse"),
        (0.01, -0.03, 0.05, "+0.010 (−0.030 to +0.050): the interval includes zero"),
        (0.0, 0.0, 0.0, "the macro-F1 is the same"),
    ],
)
def test_the_verdict_on_averaging(changed, value, low, high, said):
    changed["difference"]["test"]["macro_f1"] = {"value": value, "low": low, "high": high}
    first, second, _ = report.verdict_text(changed)
    assert first.startswith("On 90 test images the ensemble is correct for ")
    assert said in second
    assert "resnet50" in second


def test_the_verdict_lists_caveats(changed):
    assert "no reason to doubt" in report.verdict_text(changed)[2]
    assert report.list_caveats(changed) == []
    some = {"groups": 2, "images": 5}
    changed["demo"] = True
    changed["data"] |= {"across": some, "conflicts": some, "patients": None}
    changed["data"]["shortcuts"]["suspicious"] = True
    changed["images"]["test"]["osteopenia"] = 1
    last = report.verdict_text(changed)[2]
    for part in (
        "bases are random",
        "the split leaks (5 images",
        "predict the class without the picture",
        "2 groups of identical files",
        "the smallest class, osteopenia, has only 1 test image;",
        "have no patient identifiers",
    ):
        assert part in last


def test_findings(changed):
    assert [warns for _, _, warns in report.describe_data_findings(changed["data"])] == [False] * 5
    some = {"groups": 1, "images": 3}
    changed["data"] |= {
        "left_out": {"corrupt": 2, "missing": 1},
        "duplicates": "drop",
        "dropped": 1234,
        **dict.fromkeys(("exact", "near", "conflicts", "near_conflicts", "across"), some),
        "given_split": True,
    }
    changed["data"]["shortcuts"] |= {"balanced_accuracy": 0.62, "suspicious": True}
    result = {
        heading: (sentence, warns)
        for heading, sentence, warns in report.describe_data_findings(changed["data"])
    }
    assert "Left out: 2 corrupt, 1 missing." in result["Files"][0]
    assert "3 images are in 1 group of copies" in result["Copies"][0]
    assert "1\u202f234 images were dropped" in result["Copies"][0]
    assert "1 group of identical files (3 images)" in result["Contradicting labels"][0]
    assert "It leaks" in result["Split"][0]
    assert "of 0.62; chance is 0.33 (p = 0.30, against shuffled labels). A network" in result["Shortcuts"][0]
    assert all(result[heading][1] for heading in ("Files", "Contradicting labels", "Split", "Shortcuts"))
    page = Page(report.render(changed))
    assert page.values("class").count("warning") == 4


def test_demo_folds_and_temperature(two, changed):
    plain = Page(report.render(two))
    assert "Demonstration." not in plain.text
    assert "Cross-validation" not in plain.text
    assert "No temperature was fitted" in plain.words
    figures = {"mean": 0.815, "deviation": 0.0123, "values": [0.80, 0.83]}
    changed |= {
        "demo": True,
        "folds": {
            "count": 2,
            "voters": {
                name: dict.fromkeys(("accuracy", "macro_f1", "auc", "balanced_accuracy"), figures)
                for name in changed["voters"]
            },
        },
        "temperature": {
            "applied": 1.31,
            "fitted": 1.31,
            "validation_nll": {"before": 0.4567, "after": 0.3456},
            "validation_ece": {"before": 0.1, "after": 0.05},
        },
    }
    page = Page(report.render(changed))
    assert "Demonstration." in page.text
    assert "Cross-validation" in page.text
    assert page.text.count("0.815") == 12
    assert "± 0.012" in page.text
    assert "is 1.31: it makes the probabilities softer" in page.words
    assert "0.457 0.346" in page.words


def test_one_phase_of_one_epoch(changed):
    for rows in changed["history"].values():
        del rows[1:]
    changed["best"] = {name: {"phase": "head", "epoch": 1} for name in changed["best"]}
    page = Page(report.render(changed))
    assert "second phase" not in page.words
    assert "Kept: epoch 1 of the head alone" in page.words


def test_attributes_are_readable():
    assert report.attribute_text([2000.0, 3400.0, 4000.0], "bytes") == "3 kB (2–4)"
    assert report.attribute_text([640.0, 1500.0, 2140.0], "width") == "1\u202f500 (640–2\u202f140)"
    assert report.attribute_text({"L": 80, "RGB": 10}, "mode") == "L 80, RGB 10"


def test_the_paper_is_quoted():
    assert assess.PAPER_FIGURES["ensemble"] == {
        "accuracy": 0.931,
        "macro_precision": 0.94,
        "macro_recall": 0.92,
        "macro_f1": 0.93,
        "auc": 0.97,
    }
    assert [assess.PAPER_FIGURES[name]["accuracy"] for name in ("resnet50", "inception_v3")] == [0.904, 0.912]
