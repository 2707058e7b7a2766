"""Nothing that names a person leaves a run with --redact, be it in results or on the log."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pandas as pd
import pytest

import engine
from engine.core.errors import UsageError
from engine.core.redaction import Redaction, read_salt, redact_line
from tests.helpers.images import write_images
from tests.helpers.processes import Command

SALT = "a salt of sixteen bytes and more"
REDACTION = Redaction(SALT.encode())


@pytest.fixture
def hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest that names Jane Doe in every way a manifest can; two of its eight files fail."""
    monkeypatch.setenv("ENGINE_SALT", SALT)
    folder = write_images(tmp_path / "DOE^JANE" / "images", 6)
    (folder / "DOE-broken.jpg").write_bytes(b"\xff\xd8\xff\xd9 JANE")
    names = [path.name for path in sorted(folder.iterdir())]
    names.append("DOE-gone.png")
    manifest = folder / "DOE-list.csv"
    rows = {"path": names, "patient": ["DOE^JANE"] * 8, "site": ["north"] * 8}
    pd.DataFrame(rows).to_csv(manifest, index=False)
    return manifest


def everything_written(folder: Path) -> bytes:
    files = [path for path in folder.rglob("*") if path.is_file()]
    rows = engine.read_results(folder).to_csv().encode()
    return rows + b"".join(path.read_bytes() for path in files)


def test_no_name_leaves_the_run(hospital: Path, bundle: Path, engine_run: Command, tmp_path: Path) -> None:
    done = engine_run(hospital, "-b", bundle, "-o", "out", "--redact", "--keep", "site", "--part-rows", 3)
    assert done.returncode == 0, done.stderr
    written = everything_written(tmp_path / "out") + done.stderr.encode() + done.stdout.encode()
    for word in (b"DOE", b"JANE", b"image-0", SALT.encode(), str(tmp_path / "DOE").encode()):
        assert word not in written, word
    rows = engine.read_results(tmp_path / "out")
    names = pd.read_csv(hospital)["path"]
    assert list(rows["path"]) == [REDACTION.name(name) for name in names]
    assert "patient" not in rows.columns
    assert list(rows["site"]) == ["north"] * 8
    assert sorted(rows["status"]) == ["corrupt", "missing", *["ok"] * 6]


def test_scores_are_those_of_a_plain_run(
    hospital: Path, bundle: Path, engine_run: Command, tmp_path: Path
) -> None:
    for name, options in (("plain", ()), ("hidden", ("--redact",))):
        assert engine_run(hospital, "-b", bundle, "-o", name, *options).returncode == 0
    plain, hidden = (engine.read_results(tmp_path / name) for name in ("plain", "hidden"))
    pd.testing.assert_frame_equal(
        plain.drop(columns=["path", "patient", "site"]), hidden.drop(columns="path")
    )


def test_only_errors_needs_the_manifest_again(
    hospital: Path, bundle: Path, engine_run: Command, tmp_path: Path
) -> None:
    assert engine_run(hospital, "-b", bundle, "-o", "out", "--redact", "--part-rows", 3).returncode == 0
    good = hospital.with_name("image-01.jpg")
    hospital.with_name("DOE-gone.png").write_bytes(good.read_bytes())
    retry = ["--only-errors", "out", "-b", bundle]
    for options, words in (
        ([], "its paths are hashed"),
        (["--redact"], "--paths-from"),
        (["--redact", "--paths-from", bundle / "ensemble.json"], "manifest"),
        (["--redact", "--paths-from", hospital, "--root", tmp_path], "--root"),
        (["--paths-from", hospital], "--redact"),
        (["--redact", "--keep", "site", "--paths-from", hospital], "--keep"),
    ):
        done = engine_run(*retry, *options)
        assert (done.returncode, words in done.stderr) == (2, True), (options, done.stderr)
        assert "DOE" not in done.stderr or "--redact" not in options
    done = engine_run(*retry, "--redact", "--paths-from", hospital)
    assert done.returncode == 0, done.stderr
    rows = engine.read_results(tmp_path / "out")
    assert list(rows["status"]).count("ok") == 7
    assert b"DOE" not in everything_written(tmp_path / "out")
    names = list(pd.read_csv(hospital)["path"])
    assert list(rows["path"]) == [REDACTION.name(name) for name in names]
    assert rows["confidence"][7] == rows["confidence"][names.index(good.name)]


def test_another_salt_is_another_run(
    hospital: Path, bundle: Path, engine_run: Command, tmp_path: Path
) -> None:
    assert engine_run(hospital, "-b", bundle, "-o", "out", "--redact").returncode == 0
    again = engine_run(hospital, "-b", bundle, "-o", "out", "--redact")
    assert (again.returncode, "finished already" in again.stderr) == (0, True)
    salt = tmp_path / "salt"
    salt.write_text("another salt, just as long\n")
    done = engine_run(hospital, "-b", bundle, "-o", "out", "--redact", "--salt-file", salt)
    assert (done.returncode, "redacted_by was" in done.stderr) == (2, True), done.stderr
    assert engine_run(hospital, "-b", bundle, "-o", "out").returncode == 2


def test_wrong_options(
    hospital: Path, bundle: Path, engine_run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        (["--keep", "site"], "--keep"),
        (["--redact", "--keep", "DOE^JANE"], "no such column"),
        (["--redact", "--salt-file", "nowhere"], "salt-file"),
        (["--salt-file", "nowhere"], "--salt-file works only with --redact"),
    ]
    for options, words in cases:
        done = engine_run(hospital, "-b", bundle, "-o", "out", *options)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    since = engine_run(hospital, "-b", bundle, "-o", "out", "--redact", "--since", "earlier")
    assert (since.returncode, "--since cannot be given with --redact" in since.stderr) == (2, True)
    (hospital.parent / "other" / "DOE JANE").mkdir(parents=True)
    output = engine_run(hospital, "-b", bundle, "-o", hospital.parent / "other", "--redact")
    assert (output.returncode, "not empty" in output.stderr, "DOE" in output.stderr) == (2, True, False)
    folder = engine_run(hospital.parent, "-b", bundle, "-o", "out", "--redact")
    assert (folder.returncode, "engine.manifest" in folder.stderr, "DOE" in folder.stderr) == (2, True, False)
    monkeypatch.setenv("ENGINE_SALT", "short")
    done = engine_run(hospital, "-b", bundle, "-o", "out", "--redact")
    assert (done.returncode, "can be guessed" in done.stderr) == (2, True)
    monkeypatch.delenv("ENGINE_SALT")
    done = engine_run(hospital, "-b", bundle, "-o", "out", "--redact")
    assert (done.returncode, "needs a salt" in done.stderr) == (2, True)


@pytest.mark.parametrize("damage", ["no file", "no header", "a column twice"])
def test_errors_about_the_manifest_contain_no_names(
    damage: str, hospital: Path, bundle: Path, engine_run: Command
) -> None:
    if damage == "no file":
        hospital.unlink()
    elif damage == "no header":
        hospital.write_text("DOE JANE.jpg\nDOE JOHN.jpg\n")
    else:
        hospital.write_text("path,DOE/JANE,DOE/JANE\na,b,c\n")
    done = engine_run(hospital, "-b", bundle, "-o", "out", "--redact")
    assert done.returncode == 2
    assert "DOE" not in done.stderr, done.stderr


def test_the_output_folder_is_for_its_owner(
    archive: Path, bundle: Path, engine_run: Command, tmp_path: Path
) -> None:
    assert engine_run(archive, "-b", bundle, "-o", "a/b").returncode == 0
    assert stat.S_IMODE(os.stat(tmp_path / "a" / "b").st_mode) == 0o700
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o750)
    assert engine_run(archive, "-b", bundle, "-o", "shared").returncode == 0
    assert stat.S_IMODE(shared.stat().st_mode) == 0o750


def test_salts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "salt"
    file.write_bytes(b"  " + SALT.encode() + b"\n")
    monkeypatch.setenv("ENGINE_SALT", "from the environment")
    assert read_salt(file) == SALT.encode()
    assert read_salt(None) == b"from the environment"
    file.write_bytes(b"\n")
    with pytest.raises(UsageError, match="0 bytes"):
        read_salt(file)
    assert SALT not in repr(REDACTION)
    assert REDACTION.name("a") != Redaction(b"x" * 16).name("a") != REDACTION.name("b")
    assert len(REDACTION.name("\udcff")) == 32


def test_a_line_of_the_log_without_paths() -> None:
    known = [("/data", "ROOT"), ("/data/DOE", "MANIFEST"), ("a", "ROOT"), ("DOE", "ROOT")]
    for text, expected in (
        ("12/40 rows, 25.2 images/s, 0 errors, ETA 0:01:02", None),
        ("error: manifest /data/DOE: no such file", "error: manifest MANIFEST: no such file"),
        ("error: --root DOE: not a folder", "error: --root ROOT: not a folder"),
        ("error: /mnt/x/y.png: read error", "error: [path]: read error"),
        ("error: s3://bucket/DOE.dcm is gone", "error: [path] is gone"),
        (
            "its first line is 'DOE JANE.jpg'; add a line 'path'",
            "its first line is [path]; add a line 'path'",
        ),
        ('error: output DOE: not empty ("DOE\'s")', "error: output ROOT: not empty ([value])"),
        ("cpu: onnx, fp32, 2 threads (no GPU here)", None),
    ):
        assert redact_line(text, known) == (expected or text)


def test_run_json_holds_no_place(hospital: Path, bundle: Path, engine_run: Command, tmp_path: Path) -> None:
    assert engine_run(hospital, "-b", bundle, "-o", "out", "--redact").returncode == 0
    run = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert str(tmp_path) not in json.dumps(run)
    assert run["manifest"] is None
