"""`python -m benchmarks tables`: README's measured table and the peers' plot, from the committed JSON files.

No figure in them is typed by hand; `tests/benchmarks/test_tables.py` compares README with these tables.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import ROOT
from engine.core.errors import UsageError

BEGIN, END = "<!-- measured: python -m benchmarks tables -->", "<!-- end of measured -->"
Json = dict[str, Any]
Row = tuple[str, str, str]  # figure, measured, aim


def throughput_rows(found: Json) -> Iterator[Row]:
    efficiency, stages = found["pipeline_efficiency"], found["stages"]
    low, high = efficiency["interval"]
    image = found["work"]["image"].removesuffix(", synthetic")
    yield (
        f"`throughput`, {image}: pipeline efficiency, end-to-end rate / ceiling of the same run",
        f"{efficiency['median']:.2f}, 95 % {low:.2f} to {high:.2f}",
        "0.95",
    )
    yield "end to end", f"{found['images_per_s']:.1f} images/s", ""
    ceiling = found["ceiling_images_per_s"]
    yield "ceiling: cores / core-seconds per image, over all stages", f"{ceiling:.1f} images/s", ""
    costs = [
        f"{stage['core_ms_per_image']:.{2 if stage['core_ms_per_image'] < 10 else 1}f}"
        for stage in stages.values()
    ]
    yield f"{', '.join(stages)} alone", f"{', '.join(costs)} core-ms per image", ""
    total = sum(stage["core_ms_per_image"] for stage in stages.values())
    yield "of that the members", f"{100 * stages['members']['core_ms_per_image'] / total:.0f} %", ""
    yield "peak memory, all processes", f"{found['peak_memory_mb']:.0f} MB", "1200 MB"


def null_rows(found: Json) -> Iterator[Row]:
    what = (
        f"`throughput --null`: Python's own cost ({found['work']['rows']:,} rows, nothing decoded or scored)"
    )
    for one in found["sizes"].values():
        yield (
            f"{what}, batches of {one['batch_size']}",
            f"{one['host_us_per_image']:.0f} us per image",
            "20 us",
        )
        what = "the same"


def peers_rows(found: Json) -> Iterator[Row]:
    work, contenders = found["work"], found["contenders"]
    what = f"`peers`, {work['archive']} archive, {work['rows']} rows, {work['rounds']} rounds: this engine"
    yield what, f"{contenders['engine']['images_per_s']['median']:.1f} images/s", ""
    for name, one in contenders.items():
        if name == "engine":
            continue
        figure = f"its rate beside {one['title']}"
        if one["not_counted"]:
            yield figure, f"not counted: {one['not_counted']}", ""
            continue
        own = "beside_the_engine" in one
        if own:
            figure = f"{one['title']}, its rate beside float32"
        aim = one["beside_the_engine" if own else "engine_beside_it"]["aim"]
        rate = f"{one['images_per_s']['median']:.1f} images/s"
        yield figure, f"{_ratio_text(one)} ({rate})", "" if aim is None else f"{aim:g}"
    if "corrupt_files" in found:
        files = found["corrupt_files"]
        told = "; ".join(f"{one['title']}: {_aftermath_text(one)}" for one in files["patterns"].values())
        yield f"{files['corrupt']} corrupt files among {files['rows']}", told, ""


def _ratio_text(one: Json) -> str:
    """Format the speed-up over a peer, or of INT8 over float32; empty where there is none."""
    beside = one.get("engine_beside_it") or one.get("beside_the_engine")
    if not beside:
        return ""
    low, high = beside["interval"]
    return f"{beside['median']:.2f} x" + ("" if low is None else f", 95 % {low:.2f} to {high:.2f}")


def _aftermath_text(one: Json) -> str:
    if "problem" in one:
        return str(one["problem"]).split(":")[0]
    borrowed, lost = one["rows_with_anothers_score"], one["sound_rows_lost"]
    return f"{borrowed} with another file's score" + (f", {lost} sound rows lost" if lost else "")


def decode_rows(found: Json) -> Iterator[Row]:
    limited = found["aim"]["of"]
    rates = " and ".join(f"{rate:.0f}" for rate in limited.values())
    plain = [found["formats"][name]["images_per_s_and_core"]["pydicom"] for name in limited]
    theirs = " and ".join("none" if rate is None else f"{rate:.0f}" for rate in plain)
    what = found["work"]["image"].replace(", 12 bits or their upper 8, to", " to").removesuffix(" gray")
    syntaxes = "DICOM uncompressed and JPEG Lossless SV1"
    aim = f"{found['aim']['images_per_s_and_core']:g}"
    yield f"`decode`: {what} on one core, {syntaxes}", f"{rates} images/s (pydicom {theirs})", aim

    fast = found["fast"]
    beside = fast["fast_against"]["pillow"]
    levels = f"{fast['gray_levels_from_exact']['mean']:.1f} gray levels from exact on average"
    yield (
        f"`--decode fast` beside `PIL -> RGB -> resize`, {fast['images']}",
        f"{beside['median']:.1f} x, 95 % {beside['low']:.1f} to {beside['high']:.1f}; {levels}",
        f"{fast['aim']['pillow']:g}",
    )


def restart_rows(found: Json) -> Iterator[Row]:
    first, twice = found["first_batch_s"], found["rows_scored_twice"]
    yield "`restart`: start to first finished batch", f"{first['median']:.1f} s", f"{first['limit']:g} s"
    what = f"rows scored twice after `kill -9`, {len(found['kills'])} kills of {found['work']['rows']} rows"
    yield what, f"{twice['median']:.0f}, at most {twice['most']}", f"a part: {twice['part_rows']}"


def scaling_out_rows(found: Json) -> Iterator[Row]:
    work, overhead = found["work"], found["overhead"]
    low, high = overhead["interval"]
    sure = "" if low is None else f", 95 % {100 * low:.1f} to {100 * high:.1f}"
    yield (
        f"`scaling-out`: what `--ray` takes from the rate of one process ({work['rows']} rows)",
        f"{100 * overhead['median']:.1f} %{sure}",
        f"{100 * overhead['limit']:g} %",
    )
    rates = found["null_rows_per_s"]
    told = ", ".join(f"{name}: {one['median']:,.0f}" for name, one in rates.items())
    yield f"rows/s with null stages ({work['null_rows']:,} rows)", told, ""
    recovery = found["recovery"]
    yield (
        "an actor is killed: until another is at work (and rows scored again)",
        f"{recovery['seconds']['median']:.1f} s ({recovery['rows_again']['median']:.0f})",
        "",
    )


def scaling_rows(found: Json) -> Iterator[Row]:
    series = found["series"]
    line, most = series["rows"]["line"], series["rows"]["points"][-1]["x"]
    value = f"{line['intercept']:.1f} s + {1e6 * line['slope']:.0f} us a row, R² {line['r2']:.3f}"
    yield f"`scaling`: run of up to {most:,.0f} rows with null stages", value, "a straight line"
    line = series["image_size"]["line"]
    value = f"{line['intercept']:.1f} ms + {line['slope']:.1f} ms a megapixel, R² {line['r2']:.3f}"
    yield "an image's reading, decoding and resizing", value, "a straight line"


def damage_rows(found: Json) -> Iterator[Row]:
    rates = {
        share: one["of_clean"]["median"] for share, one in found["damaged_share"].items() if float(share)
    }
    for index, (share, rate) in enumerate(rates.items()):
        percent = f"{100 * float(share):g} %"
        if index == 0:
            what = f"`damage`: rate with {percent} of the images damaged in the middle, of the rate without"
            yield what, f"{rate:.2f} (a damaged image costs no inference)", f"{found['limit']:g}"
        else:
            yield f"with {percent}", f"{rate:.2f}", "it finishes"


def memory_rows(found: Json) -> Iterator[Row]:
    short, long = (run["rows"] for run in found["runs"])
    what = f"`memory`: peak of {long:,} rows beyond that of {short:,} (null stages)"
    yield what, f"{found['growth_mb']:.0f} MB", f"{found['limit_mb']} MB"


def fuzz_rows(found: Json) -> Iterator[Row]:
    mutated = found["files"] - found["untouched"]
    peak = max(run["peak_memory_mb"] for run in found["runs"])
    problems = len(found["problems"])
    outcome = f"{problems} problems" if problems else "no crash, no row wrong"
    times = f"{len(found['runs'])} times"
    what = f"`python -m tests.fuzz`: {found['files']:,} files, {mutated:,} of them mutated, {times}"
    yield what, f"{outcome}, {peak:.0f} MB", "none"


def synthetic_rows(found: Json) -> Iterator[Row]:
    total = _images(found, "train", "validation", "test")
    what = f"`training --freeze`: {total} synthetic radiographs to a bundle, members with random bases"
    yield what, f"{found['training']['seconds'] / 60:.1f} minutes", "minutes"
    one = found["test"]["ensemble"]["macro_f1"]
    what = f"macro-F1 of the ensemble on {_images(found, 'test')} test images (and of its better member)"
    value = f"{found['engine_on_test']['macro_f1']:.2f}, 95 % {one['low']:.2f} to {one['high']:.2f}"
    yield what, f"{value} ({_better_member(found):.2f})", ""


def knee_rows(found: Json) -> Iterator[Row]:
    total, test = _images(found, "train", "validation", "test"), _images(found, "test")
    folds = found["folds"]["voters"]["ensemble"]["macro_f1"]
    value = f"{found['engine_on_test']['macro_f1']:.2f} ({_better_member(found):.2f})"
    what = f"the same on {total} real knees, {test} of them test images, {found['folds']['count']} folds"
    yield what, f"{value}; folds {folds['mean']:.2f} +- {folds['deviation']:.2f}: chance", ""


def _images(found: Json, *sets: str) -> int:
    return sum(sum(found["images"][name].values()) for name in sets)


def _better_member(found: Json) -> float:
    return float(max(one["macro_f1"]["value"] for name, one in found["test"].items() if name != "ensemble"))


ROWS: dict[str, Callable[[Json], Iterator[Row]]] = {  # by the name of the JSON file, in README's order
    "throughput-cpu": throughput_rows,
    "throughput-null-cpu": null_rows,
    "peers-cpu": peers_rows,
    "peers-uniform-cpu": peers_rows,
    "decode-cpu": decode_rows,
    "restart-cpu": restart_rows,
    "scaling-cpu": scaling_rows,
    "scaling-out-cpu": scaling_out_rows,
    "damage-cpu": damage_rows,
    "memory-cpu": memory_rows,
    "fuzz-cpu": fuzz_rows,
    "training-synthetic-frozen-cpu": synthetic_rows,
    "training-knee-frozen-cpu": knee_rows,
}
PLOTTED = ("peers-cpu", "peers-uniform-cpu")


def load_results(folder: Path) -> dict[str, Json]:
    """Load the existing results, in README's order."""
    paths = {name: folder / f"{name}.json" for name in ROWS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def format_tables(results: dict[str, Json]) -> str:
    """README's table in Markdown, with the machines that the figures were taken on."""
    machines = defaultdict(list)
    for name, found in results.items():
        machine = found["machine"]
        machines[f"{machine['cores']} cores ({machine['processor']})"].append(f"`{name}`")
    if len(machines) == 1:
        told = next(iter(machines))
    else:
        told = "; ".join(f"{machine}: {', '.join(names)}" for machine, names in machines.items())
    lines = [
        f"On {told}, no GPU, float32, ResNet50 + InceptionV3; `python -m benchmarks NAME`:",
        "",
        "| figure | measured | aim |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {' | '.join(row)} |" for name, found in results.items() for row in ROWS[name](found)]
    lines = [line.replace("|  |", "| |") for line in lines]
    for name in PLOTTED:
        if name in results:
            lines += ["", f"![Rates of the engine and its peers](benchmarks/results/{name}.svg)"]
    if "scaling-cpu" in results:
        lines += ["", "![Cost against rows, sizes, threads and parts](benchmarks/results/scaling-cpu.svg)"]
    return "\n".join(lines)


def insert_table(text: str, table: str) -> str:
    """README with `table` between its two marks. Raises UsageError where they are not."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(
            f"README.md: the table goes between the lines {BEGIN} and {END}, which it does not have"
        )
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def plot_peers(found: Json, target: Path) -> None:
    """Rates of the contenders that count: median, quartiles, rounds."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = [one for one in found["contenders"].values() if one["not_counted"] is None]
    shown.sort(key=lambda one: one["images_per_s"]["median"])
    figure = Figure(figsize=(8, 0.8 + 0.4 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for place, one in enumerate(shown):
        rates = one["images_per_s"]
        low, high = rates["quartiles"]
        colour = "tab:blue" if one["title"].startswith("this engine") else "tab:gray"
        error = [[rates["median"] - low], [high - rates["median"]]]
        axes.barh(place, rates["median"], xerr=error, color=colour, alpha=0.6, capsize=3)
        axes.plot(rates["rounds"], [place] * len(rates["rounds"]), "k.", markersize=3)
    axes.set_yticks(range(len(shown)), [one["title"] for one in shown])
    work, machine = found["work"], found["machine"]
    where = f"{machine['cores']} cores ({machine['processor']})"
    axes.set_xlabel(f"images/s, {work['archive']} archive, {where}; quartiles, rounds")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.set_canvas(FigureCanvasSVG(figure))
    figure.savefig(target, metadata={"Date": None})


def show_peers(console: Console, found: Json) -> None:
    columns = ("contender", "images/s", "quartiles", "start-up, s", "peak MB", "differs", "engine beside it")
    table = Table(*columns, box=None, pad_edge=False)
    for name, one in found["contenders"].items():
        rates = one.get("images_per_s")
        told = f"not counted: {one['not_counted']}" if one["not_counted"] else _ratio_text(one)
        if rates is None:
            table.add_row(name, *[""] * 5, told)
            continue
        low, high = rates["quartiles"]
        difference = one["largest_difference"]
        table.add_row(
            name,
            f"{rates['median']:.2f}",
            f"{low:.2f} {high:.2f}",
            f"{one['start_up_s']:.1f}",
            f"{one['peak_memory_mb']:.0f}",
            "" if difference is None else f"{difference:.4f}",
            told,
        )
    console.print(table)
    for name, why in found["left_out"].items():
        console.print(f"{name}: {why}", highlight=False)
    for one in found.get("corrupt_files", {}).get("patterns", {}).values():
        console.print(
            f"corrupt files, {one['title']}: {one.get('problem') or _aftermath_text(one)}", highlight=False
        )


def main(console: Console, options: Any) -> None:
    results = load_results(options.output)
    for name in PLOTTED:
        if name in results:
            plot_peers(results[name], options.output / f"{name}.svg")
            console.print(f"written: {options.output / name}.svg", highlight=False, soft_wrap=True)
    readme = ROOT / "README.md"
    readme.write_text(insert_table(readme.read_text(), format_tables(results)))
    console.print(f"written: {readme}", highlight=False, soft_wrap=True)
