"""report.html: every number in it, what it must bear, and that it never costs a run anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, cohen_kappa_score, roc_auc_score

import engine
from engine.core.deadline import Deadline
from engine.core.errors import EngineError, UsageError
from engine.core.records import PartInfo, Scorer
from engine.merge import merge
from engine.report import __main__ as command
from engine.report import pictures
from engine.report.facts import throughput
from engine.report.page import format_number, format_option, printable
from engine.report.render import write_report
from engine.runs.run_folder import clear_explanations
from engine.storage.open_folder import open_folder
from tests.helpers.bundles import CLASSES, write_bundle
from tests.helpers.images import image_names
from tests.helpers.pages import Page
from tests.helpers.processes import ROOT
from tests.helpers.reports import HOSTILE, LABELS, with_explanations, with_operating_points
from tests.helpers.runs import Screen, many_rows, screen_columns

SALT = "a salt that is long enough"


@pytest.fixture
def reported(archive: Path, bundle: Path, tmp_path: Path) -> Screen:
    """The results of a manifest of these columns."""

    def run(name: str = "results", **columns: Any) -> Path:
        options = {"part_rows": 8} | columns.pop("options", {})
        return screen_columns(archive, tmp_path / name, columns, bundle, **options)

    return run


def page_of(results: Path, **options: Any) -> Page:
    if options:
        write_report(results, **options)
    return Page((results / "report.html").read_text())


HEADINGS = [
    *("Rows", "Classes", "Triage", "Against the labels", "Scores", "Members", "Work list", "Explanations"),
    *("Throughput", "Stages", "Provenance", "Use"),
]


def test_a_run_leaves_a_page_with_its_numbers(reported: Screen, archive: Path) -> None:
    truth = ["Normal ", "osteopenia", "OSTEOPOROSIS"]
    labels = [truth[row % 3] for row in range(24)]
    (archive / image_names(24)[20]).write_bytes(b"")
    results = reported(
        path=[*image_names(24), "gone.png", "gone too.png"], label=[*labels, "normal", "unknown"]
    )
    page = page_of(results)
    rows = engine.read_results(results)
    scored = rows[rows.status == "ok"]
    assert page.headings == [one for one in HEADINGS if one not in ("Triage", "Explanations")]
    assert "rows 26 scored 23 skipped 0 failed 3" in page.section("Rows")
    assert "missing 2 7.7 % No such file or directory row 24: gone.png" in page.section("Rows")
    assert f"empty 1 3.8 % the file has 0 bytes row 20: {image_names(24)[20]}" in page.section("Rows")
    classes = page.section("Classes")
    for name, count in scored.prediction.value_counts().items():
        assert f"{name} {count} {100 * count / 23:.1f} %" in classes

    ours = pd.Series(labels).str.strip().str.lower()[scored.row]
    figures = page.section("Against the labels")
    likely = scored[["p_normal", "p_osteopenia", "p_osteoporosis"]].to_numpy(np.float64)
    likely = likely / likely.sum(axis=1, keepdims=True)
    for value in (
        accuracy_score(ours, scored.prediction),
        cohen_kappa_score(ours, scored.prediction, weights="quadratic"),
        roc_auc_score(ours, likely, multi_class="ovr"),
    ):
        assert f"{format_number(value)} " in figures
    assert "Not counted: 2 rows with a label but without a score." in figures
    assert "1 row with a label that is not a class, such as: unknown." in figures

    winners = [
        rows[[f"{member}_p_{name}" for name in ("normal", "osteopenia", "osteoporosis")]].to_numpy().argmax(1)
        for member in ("member0", "member1")
    ]
    same = (winners[0] == winners[1])[scored.row].mean()
    assert f"name the same class for {100 * same:.1f} %" in page.section("Members")
    lowest = [title for title in page.text if title.startswith("0.00 to 0.02: ")]
    below = [int((scored[f"p_{name}"] < 0.02).sum()) for name in CLASSES]
    assert sorted(int(title.split()[3]) for title in lowest) == sorted(result for result in below if result)
    order = scored.sort_values("p_osteoporosis", ascending=False).path.tolist()
    assert [path for path in page.text if path in order and path not in page.section("Rows")] == order

    assert "23 rows" not in page.section("Throughput")
    assert "26 rows in " in page.section("Throughput")
    assert "limited the run: busy for" in page.section("Stages") or "busiest" in page.section("Stages")
    run = json.loads((results / "_run.json").read_text())
    for fact in (run["run_id"], run["bundle"], "member0 0.60, member1 0.40", run["chosen"], "part rows 8"):
        assert fact in page.section("Provenance")
    assert page.words.count("Research use only; not a medical device.") == 2
    for heading in page.headings[:-1]:  # the script comes after the last
        assert not {"nan", "NaN", "None"} & set(page.section(heading).split()), heading


def test_operating_points_explanations_and_pictures(reported: Screen, archive: Path) -> None:
    turned = Image.open(archive / image_names(2)[1])
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned.save(archive / "turned.jpg", exif=exif)
    results = with_operating_points(
        reported(path=["turned.jpg", *image_names(30)], options={"part_rows": 16})
    )
    with_explanations(results, row=3)
    rows = engine.read_results(results)
    page = page_of(results, rows=5, thumbnails=31)
    triage = page.section("Triage")
    for zone in ("refer", "gray_zone", "rule_out"):
        assert f"{zone.replace('_', ' ')} {(rows.triage == zone).sum()} " in triage
    assert f"abstains on {rows.abstain.sum()} rows" in triage
    assert "bone_loss (osteopenia + osteoporosis)" in page.section("Scores")
    assert "Jensen-Shannon" in page.section("Members")
    listed = pd.concat(
        [
            one.sort_values("p_osteoporosis", ascending=False, kind="stable").head(5)
            for one in (rows, rows[rows.abstain.astype(bool)])
        ]
    ).drop_duplicates("row")
    assert page.values("class").count("thumbnail") == len(listed)
    work = page.section("Work list")
    assert all(path in work for path in listed.path)
    assert "refer on data specificity 0.903 (0.862 to 0.936)" in page.section("Provenance")
    assert "below 0.200 rules out, above 0.600 refers" in triage
    assert page.values("class").count("mark") == 2
    pictures = page.values("src")
    assert all(re.match("data:image/(jpeg|png);base64,", source) for source in pictures)
    assert len(pictures) == len(listed) + 1
    assert "Row 3: osteoporosis" in page.section("Explanations")
    # the shape of a thumbnail is that of the picture as it is seen
    write_report(results, rows=40, thumbnails=40)
    html = (results / "report.html").read_text()
    sizes = re.findall(r'class="thumbnail" src="[^"]+" width="(\d+)" height="(\d+)"', html)
    assert len(sizes) == 31
    assert (str(round(192 * 82 / 97)), "192") in sizes


@pytest.mark.parametrize("damage", ["index", "picture", "other run"])
def test_invalid_explanations(reported: Screen, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    results = reported(path=image_names(4))
    folder = with_explanations(results, row=1)
    if damage == "index":
        (folder / "index.json").write_text('{"run_id": 3, "rows": 7')
    elif damage == "picture":
        next(folder.glob("*.png")).write_bytes(b"<svg onload=alert(1)>" * 10)
    else:
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(index | {"run_id": "another"}))
    assert command.main([str(results)]) == 0
    assert "left out" in capsys.readouterr().err
    assert "Explanations" not in page_of(results).headings


def test_explanations_that_no_browser_could_hold(
    reported: Screen, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = reported(path=image_names(4))
    index = with_explanations(results, row=1) / "index.json"
    result = json.loads(index.read_text())
    index.write_text(json.dumps(result | {"rows": result["rows"] * 3}))
    picture = next(index.parent.glob("*.png")).stat().st_size
    monkeypatch.setattr(pictures, "MAX_OVERLAY_BYTES", 2 * picture)
    assert command.main([str(results)]) == 0
    assert "the page shows 2 of 3 explanations; explanations/ has all" in capsys.readouterr().err
    assert page_of(results).values("class").count("saliency") == 2


def test_hostile_texts_are_escaped(archive: Path, tmp_path: Path) -> None:
    evil = ("normal", "</style><script>alert(5)</script>", '"onmouseover=alert(6) x="')
    for name in HOSTILE[:6:2]:
        (archive / name.replace("/", "_")).write_bytes((archive / image_names(1)[0]).read_bytes())
    paths = [
        *(name.replace("/", "_") if row % 2 == 0 else name for row, name in enumerate(HOSTILE)),
        *image_names(9),
    ]
    pq.write_table(
        pa.table({"path": paths, "label": [*(LABELS * 4)[: len(paths) - 2], *evil[1:]]}),
        archive / "m.parquet",
    )
    bundle = write_bundle(tmp_path / "evil", classes=evil)
    engine.screen(archive / "m.parquet", output=tmp_path / "out", bundle=bundle)
    html = (tmp_path / "out" / "report.html").read_text()
    page = Page(html)
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert not {"img", "iframe", "object", "embed", "link", "form", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert all(link.startswith("#") for link in page.values("href"))
    assert "<img src=x onerror=alert(1)>.png" in page.section("Work list")
    assert evil[1] in page.section("Classes")
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", html)
    assert "x" * 200 not in html
    assert "49" not in page.section("Work list")
    policy = next(value for value in page.values("content") if "default-src" in value)
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert "http" not in re.sub("http-equiv|http:.{1,2}example.invalid", "", html)


def test_a_redacted_run_names_no_path(
    archive: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("ENGINE_SALT", SALT)
    (archive / "m.csv").write_text(
        "\n".join(["path,label", *(f"{name},normal" for name in image_names(6)), "doe.png,x"])
    )
    out = tmp_path / "out"
    engine.screen(archive / "m.csv", output=out, bundle=bundle, redact=True, keep=["label"])
    with_explanations(out, row=1)
    assert command.main([str(out)]) == 0
    html = (out / "report.html").read_text()
    for word in ("image-0", "doe", str(tmp_path), "archive", "m.csv", "data:image"):
        assert word not in html.replace("img-src data:", ""), word
    assert engine.read_results(out).path[0] in html
    assert "Against the labels" in html
    capsys.readouterr()
    assert command.main([str(out), "--thumbnails", "3"]) == 2
    assert "a run with --redact shows no pictures" in capsys.readouterr().err


def test_nothing_scored_one_row_and_no_part(reported: Screen, tmp_path: Path) -> None:
    failed = page_of(reported("failed", path=["gone.png", "gone.jpg"], label=["normal", "normal"]))
    assert "rows 2 scored 0 skipped 0 failed 2" in failed.section("Rows")
    assert "No row has scores." in failed.section("Classes")
    assert "Work list" not in failed.headings
    assert "Against the labels" not in failed.headings
    one = page_of(reported("one", path=image_names(1), label=["normal"]))
    assert "1 rows" in one.section("Against the labels")
    assert image_names(1)[0] in one.section("Work list")
    (tmp_path / "one" / "_SUCCESS").unlink()
    with pytest.raises(UsageError, match="not finished"):
        write_report(tmp_path / "one")
    for part in (tmp_path / "one").glob("part-*"):
        part.unlink()
    none = page_of(tmp_path / "one", unfinished=True)
    assert "0 of 1 rows are done" in none.words


def test_unfinished_and_older_results(reported: Screen, capsys: pytest.CaptureFixture[str]) -> None:
    results = reported(path=image_names(20), label=["left"] * 20)
    (results / "_SUCCESS").unlink()
    (results / "part-00001.parquet").unlink()
    for file in results.glob("part-*"):  # as older versions wrote them
        table = pq.read_table(file)
        about = table.schema.metadata
        end = table.column_names.index("member1_p_osteoporosis") + 1
        table = table.select(table.column_names[:end]).add_column(2, "triage", table["row"])  # the manifest's
        facts = json.loads(about[b"part"])
        del facts["written"]
        pq.write_table(table.replace_schema_metadata(about | {b"part": json.dumps(facts).encode()}), file)
    assert command.main([str(results)]) == 2
    assert "the run is not finished, 12 of 20 rows" in capsys.readouterr().err
    assert command.main([str(results), "--unfinished"]) == 0
    page = page_of(results)
    assert "Unfinished. 12 of 20 rows are done" in page.words
    # a manifest column of that name is not the bundle's triage, and left is no class
    assert not {"Triage", "Throughput", "Stages", "Against the labels"} & set(page.headings)


def test_labels_that_are_all_unknown(reported: Screen, capsys: pytest.CaptureFixture[str]) -> None:
    results = reported(path=image_names(4), label=["left", "right"] * 2)
    assert command.main([str(results)]) == 0
    assert "no figures of merit: no value of column 'label' is a class" in capsys.readouterr().err


def test_label_columns(reported: Screen, capsys: pytest.CaptureFixture[str]) -> None:
    results = reported(
        path=image_names(6), grade=["normal"] * 6, side=[1.5] * 6, public=["OS", "healthy", "1"] * 2
    )
    assert "Against the labels" not in page_of(results).headings
    graded = page_of(results, label_column="grade").section("Against the labels")
    assert "whose grade is one" in graded
    assert "No row has the label osteopenia or osteoporosis" in graded
    aliases = page_of(results, label_column="public").section("Against the labels")
    assert "6 rows" in aliases
    assert "1 as osteopenia, OS as osteoporosis, healthy as normal" in aliases
    assert command.main([str(results), "--label-column", "gade"]) == 2
    assert "have no such column; allowed: row, path, grade" in capsys.readouterr().err
    assert command.main([str(results), "--label-column", "side"]) == 2
    assert "no value is a class; allowed: normal, osteopenia, osteoporosis" in capsys.readouterr().err
    for wrong in ("0", "2.5", "many"):
        assert command.main([str(results), "--rows", wrong]) == 2


def test_merged_results(reported: Screen, tmp_path: Path) -> None:
    for name, first in (("monday", 0), ("tuesday", 4)):
        reported(name, path=image_names(8)[first : first + 4], label=["normal"] * 4)
    merge([tmp_path / "monday", tmp_path / "tuesday"], tmp_path / "merged")
    page = page_of(tmp_path / "merged", thumbnails=8)
    assert "Merged screening results" in page.text
    assert page.values("class").count("thumbnail") == 8
    assert page.section("Provenance").count("bundle, sha256") == 2
    assert not {"Throughput", "Stages"} & set(page.headings)


def test_only_errors_rewrites_the_report_and_overwrite_deletes_it(
    reported: Screen, archive: Path, bundle: Path
) -> None:
    results = reported(path=[*image_names(9), "late.png"])
    assert "failed 1" in page_of(results).section("Rows")
    with_explanations(results, row=1)
    wrote = [one.written for one in engine.results.open_results_folder(results, unfinished=False).done]
    (archive / "late.png").write_bytes((archive / image_names(1)[0]).read_bytes())
    engine.screen(results, only_errors=True)
    assert "failed 0" in page_of(results).section("Rows")
    assert [
        one.written for one in engine.results.open_results_folder(results, unfinished=False).done
    ] == wrote
    stop = threading.Event()
    with pytest.raises(engine.Stopped):
        engine.screen(
            archive / "results.csv",
            output=results,
            bundle=bundle,
            part_rows=4,
            batch_size=2,
            overwrite=True,
            serial=True,
            stop=stop,
            progress=lambda now: stop.set(),
        )
    assert not (results / "report.html").exists()
    assert not (results / "explanations").exists()
    (archive / "row-1.png").touch()
    (results / "explanations").symlink_to(archive)
    clear_explanations(open_folder(results / "explanations"))
    assert (archive / "row-1.png").exists()  # somebody else's


def test_a_page_that_cannot_be_made_costs_the_run_nothing(
    archive: Path, bundle: Path, tmp_path: Path
) -> None:
    """A library that is broken, and a disk that takes no more."""
    (tmp_path / "broken" / "jinja2").mkdir(parents=True)
    (tmp_path / "broken" / "jinja2" / "__init__.py").write_text(
        "raise ImportError('libbroken.so: no such file')"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'broken'}:{ROOT}"}
    arguments = [sys.executable, "-m", "engine.run", archive, "-b", bundle, "-o", tmp_path / "out"]
    done = subprocess.run(
        [str(argument) for argument in arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    (line,) = (line for line in done.stderr.splitlines() if "report.html" in line)
    assert "report.html could not be written: libbroken.so: no such file" in line
    assert "Traceback" not in done.stderr
    # the same run, finished already, makes up for it
    engine.screen(archive, bundle=bundle, output=tmp_path / "out")
    assert (tmp_path / "out" / "report.html").exists()

    limit = f"ulimit -f 30; exec {sys.executable} -m engine.run {archive} -b {bundle} -o {tmp_path}/full"
    done = subprocess.run(
        ["bash", "-c", limit],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "report.html could not be written: " in done.stderr
    assert "File too large" in done.stderr
    assert (tmp_path / "full" / "_SUCCESS").exists()
    assert not list((tmp_path / "full").glob("*report*"))


def test_stopping_a_report(reported: Screen) -> None:
    results = reported(path=image_names(4))
    stop = threading.Event()
    stop.set()
    with pytest.raises(EngineError, match="stopped"):
        write_report(results, deadline=Deadline(stop=stop))


def test_long_results(reported: Screen) -> None:
    """300,000 rows: what Arrow holds is a few parts, and each list has its rows, from wherever they are."""
    results = reported(path=image_names(1), label=["normal"])
    parts, each = 30, 10_000
    size = many_rows(results, each, parts)
    table = pq.read_table(results / "part-00017.parquet")
    risk = np.zeros(each, np.float32)
    risk[1234] = 0.999
    position = table.schema.get_field_index("p_osteoporosis")
    pq.write_table(
        table.set_column(position, "p_osteoporosis", pa.array(risk)), results / "part-00017.parquet"
    )
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, pool.bytes_allocated() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        page = page_of(results, rows=10)
    finally:
        done.set()
        watcher.join()
    assert 0 < peak < 0.5 * parts * size
    assert "rows 300 000 scored 300 000" in page.section("Rows")
    assert f"{17 * each + 1234}.png" in page.section("Work list").split()[:60]
    assert "10 000 of the 300 000 rows, drawn at random" in page.section("Against the labels")


def test_throughput_leaves_pauses_out() -> None:
    began = datetime(2031, 5, 17, 20, tzinfo=UTC)
    at = [10, 20, 30, 40, 50, 50_000, 50_010, 50_020]
    done = [
        PartInfo(position, 0, 100, {}, {}, Scorer(), began + timedelta(seconds=s))
        for position, s in enumerate(at)
    ]
    result = throughput(began, done)
    assert result is not None
    assert "800 rows in 1 min, including start-up: 10 per second" in result["text"]
    assert "without 1 pause of 13 h 52 min in total" in result["text"]
    assert {bar["height"] for bar in result["chart"]["bars"]} == {78.0}
    few = throughput(began, done[:2])
    assert few is not None
    assert few["chart"] is None
    assert throughput(began, [PartInfo(0, 0, 1, {}, {}, Scorer(), None)]) is None


@pytest.mark.parametrize(
    ("value", "options", "wanted"),
    [
        (0.93149, {}, "0.931"),
        (None, {}, "–"),
        (-0.0001, {}, "0.000"),
        (-0.0001, {"signed": True}, "+0.000"),
        (-0.25, {"digits": 2}, "−0.25"),
    ],
)
def test_numbers(value: float | None, options: dict[str, Any], wanted: str) -> None:
    assert format_number(value, **options) == wanted


def test_values_are_readable() -> None:
    assert [format_option(one) for one in (None, True, [224, 224], 1e-4, "", {"a": [1]})] == [
        *("–", "yes", "224, 224", "0.0001", "–", "a 1"),
    ]
    assert printable({"a\x00": ["\u202eb", 1]}) == {"a\ufffd": ["\ufffdb", 1]}
    assert printable("9\u202f000\u00a0%") == "9\u202f000\u00a0%"


def test_importing_the_engine_does_not_load_the_report() -> None:
    code = (
        "import sys, engine.run, engine.report; "
        "print([name for name in ('jinja2', 'matplotlib', 'sklearn', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_page_without_labels_needs_no_library_for_plots(reported: Screen) -> None:
    results = reported(path=image_names(4))
    code = (
        "import sys; from engine.report.__main__ import main; "
        f"main([{str(results)!r}]); print({{'matplotlib', 'sklearn'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"
