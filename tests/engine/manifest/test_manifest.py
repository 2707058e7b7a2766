from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.core.errors import UsageError
from engine.manifest.manifest import open_manifest


def rows_of(source: Path, **options: object) -> list[str | None]:
    manifest = open_manifest(source, **options)
    paths = [path for part in manifest.parts(3) for path in part.paths]
    assert len(paths) == manifest.rows
    return paths


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("path,label\na.png,1\nb.png,2\n", ["a.png", "b.png"]),
        ("label,path\r\n1,a.png\r\n2,b.png\r\n", ["a.png", "b.png"]),
        ("\ufeffpath,label\na.png,1\n", ["a.png"]),
        ('path,note\n"a, b.png","two\nlines"\n"say ""x"".png",\n', ["a, b.png", 'say "x".png']),
        ("path\nhüfte/Übersicht.png\n骨/画像.jpg\n", ["hüfte/Übersicht.png", "骨/画像.jpg"]),
        ("path;t_score\na.png;-1,5\n", ["a.png"]),
        ("path\tlabel\na.png\tx\n", ["a.png"]),
        ("image,label\nx/a.png,1", ["x/a.png"]),
        ("path,label\n,1\nb.png,2\n", ["", "b.png"]),
    ],
)
def test_csv_dialects(tmp_path: Path, text: str, paths: list[str]) -> None:
    assert rows_of(write(tmp_path / "m.csv", text)) == paths


def test_a_quote_within_a_cell_is_only_a_letter(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "m.csv", 'path,disk\na.png,5" floppy\nb.png,\n')) == ["a.png", "b.png"]


def test_columns_keep_what_they_hold(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "path": ["a.png", "b.png", "c.png"],
            "patient": ["007", "012", "100"],
            "age": [61, 72, 83],
            "t_score": [-1.5, 0.25, -2.0],
            "left": [True, False, True],
            "note": ["", "x", "1"],
            "year": ["", "1999", "2001"],
            "long_id": ["12345678901234567890", "2", "3"],
        }
    )
    frame.to_csv(tmp_path / "m.csv", index=False)
    manifest = open_manifest(tmp_path / "m.csv")
    (part,) = manifest.parts(10)
    types = {field.name: field.type for field in part.columns.schema}
    assert types == {
        "patient": pa.string(),
        "age": pa.int64(),
        "t_score": pa.float64(),
        "left": pa.bool_(),
        "note": pa.string(),
        "year": pa.int64(),
        "long_id": pa.string(),
    }
    assert part.columns.column("patient").to_pylist() == ["007", "012", "100"]
    assert part.columns.column("left").to_pylist() == [True, False, True]
    assert part.columns.column("t_score").to_pylist() == [-1.5, 0.25, -2.0]
    assert part.columns.column("year").to_pylist() == [None, 1999, 2001]


def test_a_type_is_settled_by_all_rows(tmp_path: Path) -> None:
    """The first megabytes look like numbers, the last row doesn't."""
    lines = "".join(f"a{row}.png,{row}\n" for row in range(400_000))
    manifest = open_manifest(write(tmp_path / "m.csv", f"path,id\n{lines}b.png,x7\n"))
    *_, last = manifest.parts(65_536)
    assert manifest.rows == 400_001
    assert last.columns.column("id").to_pylist()[-1] == "x7"


def test_parquet_keeps_types_and_order(tmp_path: Path) -> None:
    table = pa.table(
        {
            "when": pa.array([1, 2, 3, 4], pa.timestamp("ms")),
            "path": ["a.png", None, "c.png", "d.png"],
            "tags": [["x"], [], None, ["y", "z"]],
            "note": ["a", None, "c", "d"],
        }
    )
    views = table.set_column(3, "note", table["note"].cast(pa.string_view()))  # come as strings
    views = views.set_column(2, "tags", table["tags"].cast(pa.list_(pa.string_view())))
    pq.write_table(views, tmp_path / "m.parquet", row_group_size=1)
    manifest = open_manifest(tmp_path / "m.parquet")
    parts = list(manifest.parts(3))
    assert [part.paths for part in parts] == [["a.png", None, "c.png"], ["d.png"]]
    assert pa.concat_tables(part.columns for part in parts).equals(table.drop_columns(["path"]))


def test_text_list(tmp_path: Path) -> None:
    source = write(tmp_path / "list.txt", "\ufeffa b.png\r\n\r\n  ü.jpg\n/abs/c.png")
    assert rows_of(source) == ["a b.png", "  ü.jpg", "/abs/c.png"]


def test_folder_is_listed_once(tmp_path: Path) -> None:
    folder, listing = tmp_path / "images", tmp_path / "listing.parquet"
    for name in ("b/2.png", "b/1.png", "a.png", ".hidden.png", ".git/x.png", "ä/3.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    before = rows_of(folder, listing=listing)
    assert before == ["a.png", "b/1.png", "b/2.png", "ä/3.png"]
    (folder / "new.png").touch()
    assert rows_of(folder, listing=listing) == before


def test_folder_leaves_its_own_results_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    output = tmp_path / "results"
    output.mkdir()
    (output / "part-00000.parquet").touch()
    assert rows_of(tmp_path, listing=output / "listing.parquet") == ["a.png"]


def test_parts_are_consecutive_and_can_be_chosen(tmp_path: Path) -> None:
    source = write(tmp_path / "m.csv", "path\n" + "".join(f"{row}.png\n" for row in range(10)))
    manifest = open_manifest(source)
    assert [(part.index, int(part.row[0]), part.rows) for part in manifest.parts(4)] == [
        (0, 0, 4),
        (1, 4, 4),
        (2, 8, 2),
    ]
    assert [part.paths for part in manifest.parts(4, {1})] == [["4.png", "5.png", "6.png", "7.png"]]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("m.csv", "", "0 bytes"),
        ("m.csv", "path,label\n", "no rows"),
        ("m.csv", "id,age\n1,2\n", "'id' holds int64, not paths"),
        ("m.csv", "name,label\nfoo,normal\n", "'name', the first, has no paths"),
        ("m.csv", "x/a.png,1\nx/b.png,2\n", "no header"),
        ("m.csv", "path,x\na.png,1,2\n", "Expected 2 columns, got 3"),
        ("m.csv", b"path\n\xe9.png\n", "not UTF-8"),
        ("m.csv", "path,a,a\nx.png,1,2\n", "two columns are named 'a'"),
        ("m.csv", 'path,x\na.png,1\nb.png,"2\nc.png,3\n', "line 3: a quote is opened and never closed"),
        ("m.csv", "path\n" + "a" * (9 << 20) + "\n", "more than 4 MiB; is a closing quote missing"),
        ("m.txt", "path,label\na.png,1\n", "rename it to .csv"),
        ("m.txt", b"\xe9.png\n", "not UTF-8"),
        ("m.parquet", b"PAR1 and then nothing", "manifest"),
        ("m.csv", b"\xff\xd8\xff\xe0JFIF", "this is an image"),
        ("m.xlsx", b"PK\x03\x04", "this is a spreadsheet; save it as CSV"),
    ],
)
def test_wrong_manifests_are_one_line_errors(
    tmp_path: Path, name: str, content: str | bytes, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        open_manifest(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_path_column_by_name(tmp_path: Path) -> None:
    source = write(tmp_path / "m.csv", "path,other\na.png,b.png\n")
    assert rows_of(source, path_column="other") == ["b.png"]
    with pytest.raises(UsageError, match="no column 'wrong'; it has 'path', 'other'"):
        open_manifest(source, path_column="wrong")
