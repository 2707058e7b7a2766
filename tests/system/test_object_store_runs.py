"""Images, manifests and results in object stores and on web servers: real servers, on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gcp_storage_emulator.server import create_server

import engine
from engine.core.errors import EngineError, UsageError
from engine.core.location import Url
from engine.core.records import Batch, Status
from engine.core.settings import Limits, parse_location
from engine.merge import merge
from engine.pipeline.pipeline import screen_in_process
from engine.report import __main__ as report
from engine.runs.run_settings import settings_from
from engine.storage import errors as common
from engine.storage import objects
from engine.storage.errors import ReadError
from engine.storage.images import ImageStorage
from engine.storage.object_folder import ObjectFolder
from tests.helpers.pixels import read_batches
from tests.helpers.processes import ROOT, Command, Start, run_module
from tests.helpers.runs import csv, ended, keys, local_rows, rows, stored_rows
from tests.helpers.servers import Proxy, web_server

IMAGES = 40


def read(paths: list[str | None], root: str = "/", timeout_s: float = 60, **options: int) -> list[Batch]:
    batches = read_batches(
        parse_location(root), paths, threads=4, limits=Limits(**options), timeout_s=timeout_s
    )
    return list(batches)


def statuses(batches: list[Batch]) -> list[Status]:
    return [Status(value) for batch in batches for value in batch.status]


def errors(batches: list[Batch]) -> list[str]:
    return [batch.errors.get(position, "") for batch in batches for position in range(batch.rows)]


@pytest.mark.parametrize("form", ["rows", "root", "manifest"])
def test_s3_gives_the_rows_of_the_disk_bit_for_bit(
    proxy: Proxy,
    local: pa.Table,
    names: list[str],
    engine_run: Command,
    bundle: Path,
    tmp_path: Path,
    form: str,
) -> None:
    manifest, options = "m.csv", []
    if form == "rows":
        (tmp_path / "m.csv").write_bytes(csv([f"s3://archive/knees/{name}" for name in names]))
    elif form == "root":
        (tmp_path / "m.csv").write_bytes(csv([f"./{name}" for name in names]))
        options = ["--root", "s3://archive/knees/"]
    else:
        manifest = "s3://archive/lists/all.csv"
    run = engine_run(manifest, "-b", bundle, *options)
    assert run.returncode == 0, run.stderr
    assert local_rows(tmp_path / "results").equals(local)
    recorded = json.loads((tmp_path / "results" / "_run.json").read_text())
    if form == "manifest":
        assert recorded["manifest"] == manifest
        assert recorded["result_options"]["root"] == "s3://archive/lists"


@pytest.mark.parametrize("fault", ["503", "reset", "cut"])
def test_every_tenth_request_may_fail(
    proxy: Proxy, client: Any, local: pa.Table, engine_run: Command, bundle: Path, fault: str
) -> None:
    proxy.every, proxy.fault = 10, fault
    run = engine_run(
        "s3://archive/lists/all.csv", "-b", bundle, "-o", f"s3://archive/faulty-{fault}", "--part-rows", 16
    )
    assert run.returncode == 0, run.stderr
    assert proxy.failed > 10
    proxy.every = 0
    assert stored_rows(client, f"faulty-{fault}/").equals(local)
    assert set(keys(client, f"faulty-{fault}/")) == {
        "_SUCCESS",
        "_run.json",
        "report.html",
        *(f"part-0000{index}.parquet" for index in range(3)),
    }


def test_each_failure_has_its_status_and_a_plain_text(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path
) -> None:
    def refuse(method: str, path: str) -> Any:
        if "forbidden" in path:
            return 403, {}, b""
        return (500, {}, b"") if "sick" in path else None

    proxy.refuse = refuse
    monkeypatch.setattr(common, "BACKOFF_S", 0.01)
    name = tmp_path / "a b.png"
    name.write_bytes((images / "image-00.png").read_bytes())
    expected = {
        "s3://archive/knees/image-00.png": (Status.OK, ""),
        f"file://{tmp_path}/a%20b.png": (Status.OK, ""),
        f"file://localhost{tmp_path}/a%20b.png": (Status.OK, ""),
        str(name): (Status.OK, ""),
        "s3://archive/knees/nowhere.png": (Status.MISSING, "the object does not exist"),
        "s3://nobucket/knees/nowhere.png": (Status.MISSING, "the object does not exist"),
        "s3://archive/knees": (Status.MISSING, "the object does not exist"),
        "s3://archive/knees/empty.png": (Status.EMPTY, "the file has 0 bytes"),
        "s3://archive/knees/forbidden-token-503.png": (Status.UNREADABLE, "the storage denies access"),
        "s3://archive/knees/sick.png": (Status.UNREADABLE, "the storage fails for an unknown reason"),
        "s3://archive/knees/a//b": (Status.UNREADABLE, "it is not a valid name of an object"),
        "s3:///knees": (Status.UNREADABLE, "there is no bucket after s3://"),
        "s3://key:secret@archive/x": (
            Status.UNREADABLE,
            "a URL is logged, so it must not contain a user or password; set them in the environment",
        ),
        "file://elsewhere/x": (
            Status.UNREADABLE,
            "a file URL must not have a host; write file:///folder/name for a local file",
        ),
        "ftp://host/x.png": (
            Status.UNSUPPORTED,
            "URLs of this scheme are not supported; allowed: a local path, file://, s3://, gs://, az://, "
            "abfs://, https:// or http://",
        ),
    }
    actual = read(list(expected))
    assert dict(zip(expected, zip(statuses(actual), errors(actual), strict=True), strict=True)) == expected


def test_a_size_over_the_limit_is_never_read(proxy: Proxy) -> None:
    result = read(["s3://archive/knees/image-00.png"], max_file_size=100)
    assert statuses(result) == [Status.TOO_LARGE]
    assert proxy.requests == 1  # the HEAD


def test_many_reads_are_in_flight(proxy: Proxy, names: list[str]) -> None:
    proxy.latency_s = 0.2
    result = read([f"s3://archive/knees/{name}" for name in names * 3])
    assert statuses(result).count(Status.OK) == 3 * IMAGES
    assert proxy.most_in_flight > 40


def test_storage_that_refuses_all_requests_ends_the_run(
    engine_run: Command, bundle: Path, proxy: Proxy, tmp_path: Path
) -> None:
    (tmp_path / "m.csv").write_bytes(csv([f"s3://archive/knees/{row}.png" for row in range(500)]))
    wrong = b"<Error><Code>InvalidAccessKeyId</Code><Message>of someone</Message></Error>"
    for body, complaint in (
        (wrong, "the storage does not accept the credentials"),
        (b"", "the storage denies access"),
    ):
        proxy.refuse = lambda method, path, body=body: (403, {}, b"" if method == "HEAD" else body)
        run = engine_run("m.csv", "-b", bundle)
        assert run.returncode == 1
        assert run.stderr.splitlines()[-1] == (
            f"error: the images at s3://archive cannot be read: {complaint}; "
            "fix this and run the same command again"
        )
    assert not list(tmp_path.glob("*/part-*"))


def test_a_bucket_that_may_not_be_listed_can_be_read(proxy: Proxy, names: list[str]) -> None:
    """Where listing is forbidden, S3 answers for what is missing as for what is forbidden."""

    def refuse(method: str, path: str) -> Any:
        return (403, {}, b"") if "list-type" in path or "nowhere" in path else None

    proxy.refuse = refuse
    result = read([f"s3://archive/knees/{name}" for name in ["nowhere-1", "nowhere-2", *names]])
    assert statuses(result)[:2] == [Status.UNREADABLE] * 2
    assert statuses(result).count(Status.OK) == IMAGES


@pytest.mark.slow
def test_an_endpoint_that_is_down_ends_the_run_and_the_same_command_goes_on(
    start: Start,
    engine_run: Command,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    local: pa.Table,
    names: list[str],
    bundle: Path,
    tmp_path: Path,
) -> None:
    rounds = 5
    (tmp_path / "m.csv").write_bytes(csv([f"s3://archive/knees/{name}" for name in names * rounds]))
    proxy.latency_s = 0.1
    process = start("m.csv", "--part-rows", "41")
    wait_for(process, lambda: len(list((tmp_path / "results").glob("part-*"))) >= 2)
    proxy.refuse = lambda method, path: (503, {}, b"")
    with monkeypatch.context() as context:
        context.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens
        never = start("m.csv", "-o", "never")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert log.splitlines()[-1].startswith("error: the images have disappeared: s3://archive or")
    _, log = never.communicate(timeout=60)
    assert never.returncode == 1
    assert log.splitlines()[-1].startswith(
        "error: the images at s3://archive cannot be read: the storage does not answer; "
    )
    assert not list((tmp_path / "never").glob("part-*"))
    proxy.refuse, proxy.latency_s = (lambda method, path: None), 0
    run = engine_run("m.csv", "-b", bundle)
    assert run.returncode == 0, run.stderr
    result = local_rows(tmp_path / "results").drop_columns(["row"])
    assert result.equals(pa.concat_tables([local.drop_columns(["row"])] * rounds))


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached() and process.poll() is None:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


@pytest.mark.slow
def test_results_in_s3_are_killed_resumed_refused_and_mended(
    start: Start,
    engine_run: Command,
    proxy: Proxy,
    client: Any,
    local: pa.Table,
    names: list[str],
    bundle: Path,
    tmp_path: Path,
) -> None:
    output = ("-o", "s3://archive/out/night 1", "--part-rows", "8")
    (tmp_path / "m.csv").write_bytes(csv([f"s3://archive/knees/{name}" for name in names]))

    def parts() -> list[str]:
        return [key for key in keys(client, "out/night 1/") if key.startswith("part-")]

    held = threading.Event()
    proxy.refuse = lambda method, path: held.wait(30) and None if "part-00003" in path else None
    process = start("m.csv", *output)
    wait_for(process, lambda: len(parts()) == 3)
    second = engine_run("m.csv", *output, "-b", bundle)
    assert second.returncode == 2
    assert second.stderr.startswith(
        "error: output s3://archive/out/night 1: another process is writing there"
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    held.set()
    assert len(parts()) == 3, "what was half written is not there"

    run = engine_run("m.csv", *output, "-b", bundle)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "s3://archive/out/night 1"
    success = json.loads(client.get_object(Bucket="archive", Key="out/night 1/_SUCCESS")["Body"].read())
    assert success["last_start"]["rows"] == len(names) - 8 * 3
    assert stored_rows(client, "out/night 1/").equals(local)
    assert "finished already" in engine_run("m.csv", *output, "-b", bundle).stderr

    good = client.get_object(Bucket="archive", Key="knees/image-03.jpg")["Body"].read()
    damaged = client.get_object(Bucket="archive", Key="knees/broken.jpg")["Body"].read()
    client.put_object(Bucket="archive", Key="knees/broken.jpg", Body=good)
    try:
        run = engine_run("--only-errors", "s3://archive/out/night 1")
    finally:
        client.put_object(Bucket="archive", Key="knees/broken.jpg", Body=damaged)
    assert run.returncode == 0, run.stderr
    mended = stored_rows(client, "out/night 1/")
    assert set(mended.column("status").to_pylist()) == {"ok"}
    assert mended.num_rows == len(names)

    run = engine_run("m.csv", *output, "--max-pixels", 5000, "--overwrite", "-b", bundle)
    assert run.returncode == 0, run.stderr
    assert "too_large" in stored_rows(client, "out/night 1/").column("status").to_pylist()


def test_a_local_folder_screened_into_s3_keeps_its_listing_there(
    engine_run: Command, proxy: Proxy, client: Any, images: Path, local: pa.Table, bundle: Path
) -> None:
    arguments = (images, "-b", bundle, "-o", "s3://archive/listed")
    assert engine_run(*arguments).returncode == 0
    assert "_manifest.parquet" in keys(client, "listed/")
    (images / "new.png").write_bytes(b"later")
    try:
        assert "finished already" in engine_run(*arguments).stderr
    finally:
        (images / "new.png").unlink()
    assert stored_rows(client, "listed/").equals(local)


def test_an_archive_in_s3_is_listed_and_known_again_by_the_objects_time(
    proxy: Proxy, client: Any, images: Path, bundle: Path, engine_run: Command, tmp_path: Path
) -> None:
    with ZipFile(tmp_path / "k.zip", "w") as packed:
        packed.writestr("a/../b.png", (images / "image-00.png").read_bytes())
    client.upload_file(str(tmp_path / "k.zip"), "archive", "packed/k.zip")
    position = "s3://archive/packed/k.zip"
    listed = run_module("engine.manifest", [position, "-o", "list.parquet"], folder=tmp_path, timeout_s=60)
    assert listed.returncode == 0, listed.stderr
    assert pq.read_table(tmp_path / "list.parquet")["path"].to_pylist() == [f"{position}::a/../b.png"]
    assert engine_run(position, "-b", bundle, "-o", "first").returncode == 0
    assert pq.read_table(tmp_path / "first" / "part-00000.parquet")["status"].to_pylist() == ["ok"]
    for manifest in (position, "list.parquet"):
        done = engine_run(manifest, "-b", bundle, "-o", "second", "--since", "first")
        assert "no row is new or changed" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("ftp://host/m.csv",), "ftp://...: URLs of this scheme are not supported; allowed: a local path"),
        (
            ("m.csv", "-o", "https://host/results"),
            "results https://host/results: a web server takes no files",
        ),
        (("m.csv", "--root", "s3://key:secret@bucket"), "s3://...: a URL is logged, so it must not"),
        (
            ("m.csv", "--root", "https://host/x?sig=secret"),
            "--root https://host/x?...: a folder has no query",
        ),
        (("m.csv", "-o", "file://host/x"), "file://...: a file URL must not have a host"),
        (
            ("s3://archive/lists/nowhere.csv",),
            "manifest s3://archive/lists/nowhere.csv: the object does not exist",
        ),
        (("m.csv", "-o", "s3://archive/knees"), "output s3://archive/knees: it is not empty ("),
        (("s3://archive/knees/image-00.png",), "manifest s3://archive/knees/image-00.png: this is an image"),
        (
            ("s3://archive/lists/k.zip", "--redact"),
            "manifest s3://archive/lists/k.zip: a list of this folder or archive would store paths",
        ),
    ],
)
def test_wrong_locations_are_one_line_errors(
    proxy: Proxy,
    client: Any,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.csv").write_bytes(csv(["a.png"]))
    client.put_object(Bucket="archive", Key="lists/k.zip", Body=b"PK\5\6" + bytes(18))
    monkeypatch.setenv("ENGINE_SALT", "a salt of sixteen bytes and more")
    with pytest.raises(UsageError) as raised:
        screen_in_process(settings_from([*arguments, "-b", str(bundle)]))
    log = str(raised.value)
    assert log.startswith(complaint)
    assert "\n" not in log
    assert "secret" not in log
    assert not (tmp_path / "results").exists()


def test_file_urls_are_local_paths(engine_run: Command, images: Path, local: pa.Table, bundle: Path) -> None:
    run = engine_run(f"file://{images}", "-b", bundle, "-o", f"file://{images.parent}/file%20url")
    assert run.returncode == 0, run.stderr
    assert local_rows(images.parent / "file url").equals(local)


def test_a_web_server_gives_the_rows_of_the_disk(
    engine_run: Command, local: pa.Table, images: Path, names: list[str], bundle: Path, tmp_path: Path
) -> None:
    files = {f"knees/{name}": (images / name).read_bytes() for name in names}
    files["m.csv"] = csv([f"knees/{name}" for name in names])
    with web_server(files) as (address, seen):
        run = engine_run(f"{address}/m.csv?signature=secret", "-b", bundle)
        assert run.returncode == 0, run.stderr
        assert seen[0] == "/m.csv?signature=secret"
        assert len(seen) == 1 + len(names), "one request a file"
    assert local_rows(tmp_path / "results").equals(local)
    assert "secret" not in (tmp_path / "results" / "_run.json").read_text() + run.stderr + run.stdout


def test_what_a_web_server_may_do(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "BACKOFF_S", 0.01)
    files = {"a b.png": (images / "image-00.png").read_bytes(), "none": b""}
    expected = {
        "/a%20b.png": (Status.OK, ""),
        "/chunked/none": (Status.EMPTY, "the file has 0 bytes"),
        "/none": (Status.EMPTY, "the file has 0 bytes"),
        "/a b.png?signature=secret": (Status.OK, ""),
        "/moved/moved/a%20b.png": (Status.OK, ""),
        "/moved" * 6 + "/a%20b.png": (Status.UNREADABLE, "the server redirects more than 5 times"),
        "/nowhere?signature=secret": (Status.MISSING, "the file does not exist on the server (HTTP 404)"),
        "/status/403/x?signature=secret": (Status.UNREADABLE, "the server denies access (HTTP 403)"),
        "/status/500/x?signature=secret": (Status.UNREADABLE, "the server answers HTTP 500"),
        "/cut/a b.png": (Status.UNREADABLE, "the file was cut short: fewer bytes arrived than announced"),
    }
    files |= {"a%20b.png": files["a b.png"]}
    with web_server(files) as (address, seen):
        actual = read([address + path for path in expected])
        assert (
            dict(zip(expected, zip(statuses(actual), errors(actual), strict=True), strict=True)) == expected
        )
        assert sum("status/500" in path for path in seen) == common.ATTEMPTS
        below = read(["a b.png"], root=address)
        assert statuses(below) == [Status.OK]
    files["chunked/big"] = b""
    with web_server({"big": bytes(5 << 20), "a.png": files["none"]}) as (address, _):
        actual = read([f"{address}/chunked/big"], max_file_size=3 << 20)
        assert statuses(actual) == [Status.TOO_LARGE]
    with pytest.raises(EngineError, match="the server does not answer; fix this and run the same command"):
        read([f"{address}/a.png?signature=secret"] * 3)


def test_without_urllib3_one_line_says_how_to_get_it(
    engine_run: Command, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['urllib3'] = None")
    (tmp_path / "m.csv").write_bytes(csv(["https://127.0.0.1:9/a.png"]))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "engine.run", "m.csv", "-b", str(bundle)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].endswith(
        "is missing; install it with: pip install -c constraints.txt '.[remote]'"
    )


def test_a_local_run_does_not_import_remote_libraries() -> None:
    script = (
        "import sys, engine.run; from engine.storage.images import ImageStorage; from pathlib import Path\n"
        "ImageStorage(Path('/')).exists('tmp')\n"
        "assert not {'urllib3', 'engine.storage.http', 'engine.storage.remote'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("text", "key", "name", "parent", "below"),
    [
        ("s3://b/x/m 1.csv", "x/m 1.csv", "m 1.csv", "s3://b/x", "s3://b/x/m 1.csv/a b.png"),
        ("gs://b/m?.csv", "m?.csv", "m?.csv", "gs://b/", "gs://b/m?.csv/a b.png"),
        ("abfs://c@account.dfs.core.windows.net/f", "f", "f", "abfs://c@account.dfs.core.windows.net/", None),
        (
            "https://h:8/m%201.csv?sig=x",
            "m%201.csv",
            "m 1.csv",
            "https://h:8/",
            "https://h:8/m%201.csv/a%20b.png",
        ),
        ("https://h/%2e%2e%2fetc%2fm.csv", "%2e%2e%2fetc%2fm.csv", "m.csv", "https://h/", None),
    ],
)
def test_urls_are_parsed(text: str, key: str, name: str, parent: str, below: str | None) -> None:
    url = parse_location(text)
    assert isinstance(url, Url)
    assert (url.key, url.name, str(url.parent)) == (key, name, parent)
    assert "sig" not in str(url) + repr(url)
    if below:
        assert str(url / "a b.png") == below
    assert str(Url("s3", "b", "/lists") / "../knees/./x") == "s3://b/knees/x"
    assert str(Url("s3", "b", "/lists") / "../../../x") == "s3://b/x"
    assert str(Url("s3", "b", "/a") / "../k.tar::../x//y z") == "s3://b/k.tar::../x//y z"
    assert str(Url("https", "h", "/a") / "k 1.tar::b c") == "https://h/a/k%201.tar::b c"


def test_google_and_azure_are_opened_as_their_own_tools_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GS_NO_SIGN_REQUEST", "yes")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    objects._open_gs.cache_clear()
    assert objects.filesystem(Url("gs", "b", "/x")).type_name == "gcs"
    objects._open_gs.cache_clear()
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    with pytest.raises(ReadError, match="set AZURE_STORAGE_ACCOUNT"):
        objects.filesystem(Url("az", "container", "/x"))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "account")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")
    for url in (Url("az", "c", "/x"), Url("abfs", "c@account.dfs.core.windows.net", "/x")):
        assert objects.filesystem(url).type_name == "abfs"
        assert objects.path_of(url) == "c/x"


@pytest.mark.slow
def test_google_cloud_storage_holds_images_and_results(
    monkeypatch: pytest.MonkeyPatch,
    engine_process: Command,
    images: Path,
    names: list[str],
    local: pa.Table,
    bundle: Path,
) -> None:
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="archive")
    server.start()
    monkeypatch.setenv("GS_NO_SIGN_REQUEST", "yes")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_address[1]}")
    objects._open_gs.cache_clear()
    try:
        folder = ObjectFolder(Url("gs", "archive", "/knees"))
        for name in names:
            folder.write(name, partial(shutil.copy, images / name))
        folder.write("m.csv", lambda path: path.write_bytes(csv(names)))
        for _ in range(2):
            run = engine_process("gs://archive/knees/m.csv", "-b", bundle, "-o", "gs://archive/out")
            assert run.returncode == 0, run.stderr
        assert "finished already" in run.stderr
        results = ObjectFolder(Url("gs", "archive", "/out"))
        assert set(results.names()) == {"_SUCCESS", "_run.json", "report.html", "part-00000.parquet"}
        part = b"".join(objects.read_chunks(results.location / "part-00000.parquet", lambda size: None))
        assert rows([pa.BufferReader(part)]).equals(local)
        assert statuses(read(["gs://archive/nowhere", "gs://nobucket/x"])) == [Status.MISSING] * 2
    finally:
        server.stop()
        objects._open_gs.cache_clear()


def test_locations_outside_the_command_line() -> None:
    with pytest.raises(UsageError, match=r"ftp://\.\.\.: URLs of this scheme"):
        parse_location("ftp://user:password@host/x")
    assert parse_location("file:///a%20b") == Path("/a b")
    assert parse_location("a/b://c") == Path("a/b://c")
    assert ImageStorage(Path("/")).where("s3://bucket/key") == "s3://bucket"
    assert pd.notna(ImageStorage(Path("/")).exists("tmp"))


def test_remote_results_are_read_and_merged(
    proxy: Proxy, client: Any, images: Path, names: list[str], bundle: Path
) -> None:
    for run, first in (("one", 0), ("two", 2)):
        manifest = images.parent / f"{run}.csv"
        manifest.write_bytes(csv(names[first : first + 4]))
        engine.screen(manifest, root=images, bundle=bundle, output=f"s3://archive/{run}", part_rows=3)
    merged = merge(
        [parse_location(f"s3://archive/{run}") for run in ("one", "two")],
        parse_location("s3://archive/merged"),
    )
    assert (merged.rows, merged.dropped) == (6, 2)
    assert report.main(["s3://archive/merged", "--thumbnails", "2"]) == 0
    page = client.get_object(Bucket="archive", Key="merged/report.html")["Body"].read().decode()
    assert "2 runs, joined" in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert page.count('scope="row" class="path"') == 5  # one is damaged
    frame = engine.read_results("s3://archive/merged")
    assert sorted(frame.path) == names[:6]
    assert frame.run_id.nunique() == len(frame.attrs["provenance"]["runs"]) == 2
    dataset = engine.open_results("s3://archive/one")
    assert dataset.to_table(columns=["row"]).column("row").to_pylist() == [0, 1, 2, 3]


@pytest.mark.slow
def test_two_shards_into_an_object_store(
    start: Start, proxy: Any, client: Any, names: list[str], local: pa.Table, tmp_path: Path
) -> None:
    (tmp_path / "m.csv").write_bytes(csv([f"s3://archive/knees/{name}" for name in names]))
    output = ("m.csv", "-o", "s3://archive/shards", "--part-rows", "8")
    processes = [start(*output, "--shard", f"{number}/2") for number in (1, 2)]
    log = [ended(process) for process in processes]
    assert stored_rows(client, "shards/").equals(local)
    others = {key for key in keys(client, "shards/") if not key.startswith("part-")}
    assert others == {"_run.json", "_SUCCESS", "report.html"}
    assert any("and with it all 6 parts" in one for one in log)
