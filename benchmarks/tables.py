"""`python -m benchmarks tables`: write README's table and the peers' plots from the committed JSON files.

`tests/benchmarks/test_tables.py` compares README with these tables.
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


def throughput_rows(figures: Json) -> Iterator[Row]:
    efficiency, stages = figures["pipeline_efficiency"], figures["stages"]
    low, high = efficiency["interval"]
    image = figures["work"]["image"].removesuffix(", synthetic")
    yield (
        f"`throughput`, {image}: pipeline efficiency, end-to-end rate / ceiling of the same run",
        f"{efficiency['median']:.2f}, 95 % {low:.2f} to {high:.2f}",
        "0.95",
    )
    yield "end to end", f"{figures['images_per_s']:.1f} images/s", ""
    ceiling = figures["ceiling_images_per_s"]
    yield "ceiling: cores / core-seconds per image, over all stages", f"{ceiling:.1f} images/s", ""
    costs = [
        f"{stage['core_ms_per_image']:.{2 if stage['core_ms_per_image'] < 10 else 1}f}"
        for stage in stages.values()
    ]
    yield f"{', '.join(stages)} alone", f"{', '.join(costs)} core-ms per image", ""
    total = sum(stage["core_ms_per_image"] for stage in stages.values())
    yield "of that the members", f"{100 * stages['members']['core_ms_per_image'] / total:.0f} %", ""
    yield "peak memory, all processes", f"{figures['peak_memory_mb']:.0f} MB", "1200 MB"


def null_rows(figures: Json) -> Iterator[Row]:
    rows = f"{figures['work']['rows']:,} rows, nothing decoded or scored"
    label = f"`throughput --null`: Python's own cost ({rows})"
    for entry in figures["sizes"].values():
        yield (
            f"{label}, batches of {entry['batch_size']}",
            f"{entry['host_us_per_image']:.0f} us per image",
            "20 us",
        )
        label = "the same"


def peers_rows(figures: Json) -> Iterator[Row]:
    work, contenders = figures["work"], figures["contenders"]
    label = f"`peers`, {work['archive']} archive, {work['rows']} rows, {work['rounds']} rounds: this engine"
    yield label, f"{contenders['engine']['images_per_s']['median']:.1f} images/s", ""
    for name, entry in contenders.items():
        if name == "engine":
            continue
        figure = f"its rate beside {entry['title']}"
        if entry["not_counted"]:
            yield figure, f"not counted: {entry['not_counted']}", ""
            continue
        is_engine = "beside_the_engine" in entry
        if is_engine:
            figure = f"{entry['title']}, its rate beside float32"
        aim = entry["beside_the_engine" if is_engine else "engine_beside_it"]["aim"]
        rate = f"{entry['images_per_s']['median']:.1f} images/s"
        yield figure, f"{_ratio_text(entry)} ({rate})", "" if aim is None else f"{aim:g}"
    if "corrupt_files" in figures:
        files = figures["corrupt_files"]
        text = "; ".join(f"{entry['title']}: {_mishap_text(entry)}" for entry in files["patterns"].values())
        yield f"{files['corrupt']} corrupt files among {files['rows']}", text, ""


def _ratio_text(entry: Json) -> str:
    """Format the speed-up over a peer, or of INT8 over float32; empty if not measured."""
    beside = entry.get("engine_beside_it") or entry.get("beside_the_engine")
    if not beside:
        return ""
    low, high = beside["interval"]
    return f"{beside['median']:.2f} x" + ("" if low is None else f", 95 % {low:.2f} to {high:.2f}")


def _mishap_text(entry: Json) -> str:
    if "problem" in entry:
        return str(entry["problem"]).split(":")[0]
    borrowed, lost = entry["rows_with_anothers_score"], entry["sound_rows_lost"]
    return f"{borrowed} with another file's score" + (f", {lost} sound rows lost" if lost else "")


def decode_rows(figures: Json) -> Iterator[Row]:
    limited = figures["aim"]["of"]
    rates = " and ".join(f"{rate:.0f}" for rate in limited.values())
    plain = [figures["formats"][name]["images_per_s_and_core"]["pydicom"] for name in limited]
    pydicom_rates = " and ".join("none" if rate is None else f"{rate:.0f}" for rate in plain)
    label = figures["work"]["image"].replace(", 12 bits or their upper 8, to", " to").removesuffix(" gray")
    syntaxes = "DICOM uncompressed and JPEG Lossless SV1"
    aim = f"{figures['aim']['images_per_s_and_core']:g}"
    yield f"`decode`: {label} on one core, {syntaxes}", f"{rates} images/s (pydicom {pydicom_rates})", aim

    fast = figures["fast"]
    beside = fast["fast_against"]["pillow"]
    levels = f"{fast['gray_levels_from_exact']['mean']:.1f} gray levels from exact on average"
    yield (
        f"`--decode fast` beside `PIL -> RGB -> resize`, {fast['images']}",
        f"{beside['median']:.1f} x, 95 % {beside['low']:.1f} to {beside['high']:.1f}; {levels}",
        f"{fast['aim']['pillow']:g}",
    )


def restart_rows(figures: Json) -> Iterator[Row]:
    first, twice = figures["first_batch_s"], figures["rows_scored_twice"]
    yield "`restart`: start to first finished batch", f"{first['median']:.1f} s", f"{first['limit']:g} s"
    label = (
        f"rows scored twice after `kill -9`, {len(figures['kills'])} kills of {figures['work']['rows']} rows"
    )
    yield label, f"{twice['median']:.0f}, at most {twice['most']}", f"a part: {twice['part_rows']}"


def scaling_out_rows(figures: Json) -> Iterator[Row]:
    work, overhead = figures["work"], figures["overhead"]
    low, high = overhead["interval"]
    interval = "" if low is None else f", 95 % {100 * low:.1f} to {100 * high:.1f}"
    yield (
        f"`scaling-out`: what `--ray` takes from the rate of one process ({work['rows']} rows)",
        f"{100 * overhead['median']:.1f} %{interval}",
        f"{100 * overhead['limit']:g} %",
    )
    rates = figures["null_rows_per_s"]
    text = ", ".join(f"{name}: {entry['median']:,.0f}" for name, entry in rates.items())
    yield f"rows/s with null stages ({work['null_rows']:,} rows)", text, ""
    recovery = figures["recovery"]
    yield (
        "an actor is killed: until another is at work (and rows scored again)",
        f"{recovery['seconds']['median']:.1f} s ({recovery['rows_again']['median']:.0f})",
        "",
    )


def scaling_rows(figures: Json) -> Iterator[Row]:
    series = figures["series"]
    line, most = series["rows"]["line"], series["rows"]["points"][-1]["x"]
    value = f"{line['intercept']:.1f} s + {1e6 * line['slope']:.0f} us a row, R² {line['r2']:.3f}"
    yield f"`scaling`: run of up to {most:,.0f} rows with null stages", value, "a straight line"
    line = series["image_size"]["line"]
    value = f"{line['intercept']:.1f} ms + {line['slope']:.1f} ms a megapixel, R² {line['r2']:.3f}"
    yield "an image's reading, decoding and resizing", value, "a straight line"


def damage_rows(figures: Json) -> Iterator[Row]:
    rates = {
        share: entry["of_clean"]["median"]
        for share, entry in figures["damaged_share"].items()
        if float(share)
    }
    for index, (share, rate) in enumerate(rates.items()):
        percent = f"{100 * float(share):g} %"
        if index == 0:
            label = f"`damage`: rate with {percent} of the images damaged in the middle, of the rate without"
            yield label, f"{rate:.2f} (a damaged image costs no inference)", f"{figures['limit']:g}"
        else:
            yield f"with {percent}", f"{rate:.2f}", "it finishes"


def memory_rows(figures: Json) -> Iterator[Row]:
    short, long = (run["rows"] for run in figures["runs"])
    label = f"`memory`: peak of {long:,} rows beyond that of {short:,} (null stages)"
    yield label, f"{figures['growth_mb']:.0f} MB", f"{figures['limit_mb']} MB"


def fuzz_rows(figures: Json) -> Iterator[Row]:
    mutated = figures["files"] - figures["untouched"]
    peak = max(run["peak_memory_mb"] for run in figures["runs"])
    problems = len(figures["problems"])
    outcome = f"{problems} problems" if problems else "no crash, no row wrong"
    times = f"{len(figures['runs'])} times"
    label = f"`python -m tests.fuzz`: {figures['files']:,} files, {mutated:,} of them mutated, {times}"
    yield label, f"{outcome}, {peak:.0f} MB", "none"


def synthetic_rows(figures: Json) -> Iterator[Row]:
    total = _images(figures, "train", "validation", "test")
    label = f"`training --freeze`: {total} synthetic radiographs to a bundle, members with random bases"
    yield label, f"{figures['training']['seconds'] / 60:.1f} minutes", "minutes"
    entry = figures["test"]["ensemble"]["macro_f1"]
    label = f"macro-F1 of the ensemble on {_images(figures, 'test')} test images (and of its better member)"
    value = f"{figures['engine_on_test']['macro_f1']:.2f}, 95 % {entry['low']:.2f} to {entry['high']:.2f}"
    yield label, f"{value} ({_better_member(figures):.2f})", ""


def knee_rows(figures: Json) -> Iterator[Row]:
    total, test = _images(figures, "train", "validation", "test"), _images(figures, "test")
    folds = figures["folds"]["voters"]["ensemble"]["macro_f1"]
    value = f"{figures['engine_on_test']['macro_f1']:.2f} ({_better_member(figures):.2f})"
    label = f"the same on {total} real knees, {test} of them test images, {figures['folds']['count']} folds"
    yield label, f"{value}; folds {folds['mean']:.2f} +- {folds['deviation']:.2f}: chance", ""


def _images(figures: Json, *sets: str) -> int:
    return sum(sum(figures["images"][name].values()) for name in sets)


def _better_member(figures: Json) -> float:
    return float(
        max(entry["macro_f1"]["value"] for name, entry in figures["test"].items() if name != "ensemble")
    )


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
    """Format README's table in Markdown, with the machines of the figures."""
    machines = defaultdict(list)
    for name, figures in results.items():
        machine = figures["machine"]
        machines[f"{machine['cores']} cores ({machine['processor']})"].append(f"`{name}`")
    if len(machines) == 1:
        text = next(iter(machines))
    else:
        text = "; ".join(f"{machine}: {', '.join(names)}" for machine, names in machines.items())
    lines = [
        f"On {text}, no GPU, float32, ResNet50 + InceptionV3; `python -m benchmarks NAME`:",
        "",
        "| figure | measured | aim |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {' | '.join(row)} |" for name, figures in results.items() for row in ROWS[name](figures)]
    lines = [line.replace("|  |", "| |") for line in lines]
    for name in PLOTTED:
        if name in results:
            lines += ["", f"![Rates of the engine and its peers](benchmarks/results/{name}.svg)"]
    if "scaling-cpu" in results:
        lines += ["", "![Cost against rows, sizes, threads and parts](benchmarks/results/scaling-cpu.svg)"]
    return "\n".join(lines)


def insert_table(text: str, table: str) -> str:
    """Return README with `table` between its two marks. Raises UsageError if a mark is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UsageError(
            f"README.md: the lines {BEGIN} and {END} are missing; the table is written between the lines"
        )
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def plot_peers(figures: Json, target: Path) -> None:
    """Plot the rates of the counted contenders: median, quartiles, rounds."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    contenders = [entry for entry in figures["contenders"].values() if entry["not_counted"] is None]
    contenders.sort(key=lambda entry: entry["images_per_s"]["median"])
    figure = Figure(figsize=(8, 0.8 + 0.4 * len(contenders)), layout="constrained")
    axes = figure.add_subplot()
    for position, entry in enumerate(contenders):
        rates = entry["images_per_s"]
        low, high = rates["quartiles"]
        colour = "tab:blue" if entry["title"].startswith("this engine") else "tab:gray"
        error = [[rates["median"] - low], [high - rates["median"]]]
        axes.barh(position, rates["median"], xerr=error, color=colour, alpha=0.6, capsize=3)
        axes.plot(rates["rounds"], [position] * len(rates["rounds"]), "k.", markersize=3)
    axes.set_yticks(range(len(contenders)), [entry["title"] for entry in contenders])
    work, machine = figures["work"], figures["machine"]
    machine_text = f"{machine['cores']} cores ({machine['processor']})"
    axes.set_xlabel(f"images/s, {work['archive']} archive, {machine_text}; quartiles, rounds")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.set_canvas(FigureCanvasSVG(figure))
    figure.savefig(target, metadata={"Date": None})


def show_peers(console: Console, figures: Json) -> None:
    columns = ("contender", "images/s", "quartiles", "start-up, s", "peak MB", "differs", "engine beside it")
    table = Table(*columns, box=None, pad_edge=False)
    for name, entry in figures["contenders"].items():
        rates = entry.get("images_per_s")
        text = f"not counted: {entry['not_counted']}" if entry["not_counted"] else _ratio_text(entry)
        if rates is None:
            table.add_row(name, *[""] * 5, text)
            continue
        low, high = rates["quartiles"]
        difference = entry["largest_difference"]
        table.add_row(
            name,
            f"{rates['median']:.2f}",
            f"{low:.2f} {high:.2f}",
            f"{entry['start_up_s']:.1f}",
            f"{entry['peak_memory_mb']:.0f}",
            "" if difference is None else f"{difference:.4f}",
            text,
        )
    console.print(table)
    for name, reason in figures["left_out"].items():
        console.print(f"{name}: {reason}", highlight=False)
    for entry in figures.get("corrupt_files", {}).get("patterns", {}).values():
        console.print(
            f"corrupt files, {entry['title']}: {entry.get('problem') or _mishap_text(entry)}", highlight=False
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
