"""The tables of the documents, from the files in results/: python -m bench.tables. Run it after a measurement is renewed."""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean, median

from .machine import RESULTS
from .race import counterpart

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"(?<=<!-- bench: )(?P<kind>\S+) (?P<file>\S+) -->\n.*?(?=<!-- end -->)", re.DOTALL)
ERRORS = ("text_error", "step_error", "latent_error")
CHOICES = {  # by the names of bench/captions.py: what a step takes, by which scores
    "right": ("the only caption, which is right", ""),
    "first": ("the only caption, the first of the four", ""),
    "turn": ("all in turn", ""),
    "best-clear": ("the best", "clear"),
    "score-clear": ("by score", "clear"),
    "best-noisy": ("the best", "noisy"),
    "score-noisy": ("by score", "noisy"),
    "best-useless": ("the best", "useless"),
    "score-useless": ("by score", "useless"),
}
Result = dict[str, object]


def with_tables(text: str) -> str:
    """The text with every `<!-- bench: KIND FILE -->` ... `<!-- end -->` holding what results/FILE.json says today."""

    def fill(place: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{place['file']}.json").read_text(encoding="utf-8"))
        return "\n".join([f"{place['kind']} {place['file']} -->", *KINDS[place["kind"]](result), ""])

    return PLACE.sub(fill, text)


def speed(result: Result) -> Iterator[str]:
    """Each case, and under it what else was tried, against the reference of its kind."""
    rows = result["rows"]
    widest = max(row["spread"] for row in rows)
    versions = ", ".join(f"{name} {result[name]}" for name in ("torch", "diffusers", "transformers"))
    yield f"{result['device']}, {versions}, {result['dtype'].removeprefix('torch.')}, {result['date']}, medians of"
    yield f"{result['repeats']}, middle half of the times within {widest:.0%}:\n"
    yield from header("", "reference", "here", "faster", "peak memory, reference", "here")
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["candidate"]: row for row in rows if row["case"] == case}
        for name, row in found.items():
            other = found[counterpart(name, found)]
            if other is not row:
                title = case if name == "ours" else f"the same, {name.removeprefix('ours, ')}"
                times = [f"{each['seconds']:.2f} s" for each in (other, row)]
                peaks = [f"{each['peak_bytes'] / 1e6:.0f} MB" for each in (other, row)]
                yield line(title, *times, f"{row['ratio']:.2f} x", *peaks)


def accuracy(result: Result) -> Iterator[str]:
    """Share of right pictures by guidance scale; the last column is of captions by which no scale was chosen."""
    respects = ("colour", "shape", "relation", "count", "background", "everything")
    yield from header("% right", *respects, "everything, 300 others")
    others = result["accuracy_by_guidance_of_other_captions"]
    for scale, found in result["accuracy_by_guidance"].items():
        title = f"guidance {scale}" + (", its default" if float(scale) == result["guidance_scale"] else "")
        yield line(title, *(f"{found[respect]:.0f}" for respect in respects), f"{others[scale]['everything']:.0f}")
    yield line("aimed at", 95, 90, 85, 80, "", "", "")


def changes(result: Result) -> Iterator[str]:
    """Share of right pictures of captions with one word changed."""
    yield from header("word changed", "captions", "% right in it", "% right in everything")
    for word, found in result["accuracy_after_changing_one_word"].items():
        yield line(word, found["captions"], f"{found[word]:.0f}", f"{found['everything']:.0f}")


def steps(result: Result) -> Iterator[str]:
    """Error and share of right pictures by number of steps, with the guidance of the model and with that of the released ones."""
    rows, strong = result["steps"], result["steps_with_guidance_of_released_models"]
    numbers = list(dict.fromkeys(row["steps"] for row in rows))
    yield from header("steps", *numbers)
    for name, form in (("median_error", "{:.3f}"), ("everything", "{:.0f}")):
        for solver, title in (("flow_dpm", "Flow-DPM-Solver"), ("flow_euler", "Flow-Euler")):
            for measured, suffix in ((rows, ""), (strong, ", guidance 4.5")):
                found = {row["steps"]: form.format(row[name]) for row in measured if row["solver"] == solver}
                what = "error" if name == "median_error" else "% right"
                yield line(f"{title}, {what}{suffix}", *(found.get(number, "") for number in numbers))


def quantised(result: Result) -> Iterator[str]:
    """The demo in each format, then with its ends packed too."""
    yield from header("", "on disk", "in memory", "error of a text", "of one step", "of the latent", "% right")
    for row in result["demo"]:
        megabytes = [f"{row[name] / 1e6:.1f} MB" for name in ("disk", "memory")]
        errors = [f"{100 * row[name]:.1f} %" if name in row else "" for name in ERRORS]
        right = f"{row['right']:.0f}" if "right" in row else ""
        suffix = ", ends too" if row["ends"] else ", multiplied in 8 bits" if row.get("in_int8") else ""
        yield line(row["format"] + suffix, *megabytes, *errors, right)


def quantised_sizes(result: Result) -> Iterator[str]:
    """Weights of the released models, with their ends in 16 bits."""
    forms = [name for name in result["released"][0] if name not in ("model", "plain")]
    yield from header("", "16 bits", *forms)
    for row in result["released"]:
        yield line(row["model"], *(f"{row[name] / 1e9:.2f} GB" for name in ("plain", *forms)))


def quantised_layers(result: Result) -> Iterator[str]:
    """Error of what each kind of layer gives, at the widths of the released models."""
    rows = result["layers"]
    forms = list(dict.fromkeys(row["format"] for row in rows))
    yield from header("", "width", *forms)
    for variant, kind in dict.fromkeys((row["variant"], row["kind"]) for row in rows):
        found = [row for row in rows if (row["variant"], row["kind"]) == (variant, kind)]
        errors = {row["format"]: f"{100 * row['error']:.1f} %" for row in found}
        yield line(f"{kind}, {variant}", found[0]["width"], *(errors[form] for form in forms))


def choices(result: Result) -> Iterator[str]:
    """Which captions a training took, and how many held-out ones it then draws right, over seeds."""
    seeds = len(result["seeds"])
    over = "one seed" if seeds == 1 else f"{seeds} seeds: the mean, from the lowest to the highest"
    yield f"Percent of {result['captions']} held-out captions that are right in everything, of {over}, {result['date']}:\n"
    yield from header("a step takes", "scores", "right ones", *(f"after {number} steps" for number in result["steps"]))
    for name, (taken, scores) in CHOICES.items():
        found = [row for row in result["rows"] if row["trial"] == name]
        cells = []
        for number in result["steps"]:
            shares = [row["accuracy"][str(number)]["everything"] for row in found]
            spread = f", {min(shares):.0f} to {max(shares):.0f}" if seeds > 1 else ""
            cells.append(f"{fmean(shares):.0f}{spread}")
        yield line(taken, scores, f"{fmean(row['taken'] for row in found):.0f} %", *cells)


def stream(result: Result) -> Iterator[str]:
    """Training on more and more pictures, and how fast those of the released models are read."""
    yield from header("pictures", "on disk", "memory after 20 steps", f"after {result['steps']}", "waits for batches")
    for row in result["rows"]:
        memory = [f"{row[name] / 2**20:.0f} MiB" for name in ("resident_first", "resident_last")]
        yield line(f"{row['pictures']:,}", f"{row['disk'] / 1e6:.0f} MB", *memory, f"{100 * row['waited_share']:.1f} %")
    speeds = ", ".join(f"of {name}: {speed:.0f}" for name, speed in result["pictures_read_per_second"].items())
    yield f"\nPictures that one process reads per second, with nothing else to do: {speeds}. {result['device']}, {result['date']}."


def resident(result: Result) -> Iterator[str]:
    """What is allocated and what is resident where memory is bounded."""
    yield from header("in least memory", "bound", "allocated", "resident")
    for row in result["rows"]:
        numbers = (f"{row[name] / 1e6:.0f} MB" for name in ("bound", "allocated", "resident"))
        yield line(f"{row['run']}, {row['side']} px, {row['dtype']}", *numbers)


def previews(result: Result) -> Iterator[str]:
    """How near small pictures come to the decoded one at their size."""
    yield from header(f"PSNR of {result['captions']} pictures", "mean", "worst")
    titles = {"linear": "linear previews", "one_colour": "one colour a cell of the latent, the best there can be"}
    for name, title in titles.items():
        yield line(title, *(f"{result[name][each]:.1f} dB" for each in ("mean", "worst")))


def preemption(result: Result) -> Iterator[str]:
    """Share of time that lost workers and the end cost, by the size of a shard."""
    hours = list(result["rows"][0]["overhead"])
    yield from header("pictures a shard", *(f"a GPU is lost every {float(each):,.0f} h" for each in hours))
    for row in result["rows"]:
        yield line(f"{row['shard']:,}", *(f"{100 * row['overhead'][each]:.1f} %" for each in hours))


def launches(result: Result) -> Iterator[str]:
    """Kernels and bytes of a step, a pass or a prompt, against the reference's."""
    columns = ("reference", "here", "in ComfyUI")
    yield from header("", *(f"{what}: {name}" for what in ("launches", "bytes") for name in columns), "products alone")
    for row in result["rows"]:
        host = row["host"] or {}
        counts = [*row["launches"], host.get("launches")]
        sizes = [*row["bytes"], host.get("bytes"), row["product_bytes"]]
        cells = ["" if count is None else f"{count:,}" for count in counts]
        yield line(row["title"], *cells, *("" if size is None else f"{size / 1e9:.1f} GB" for size in sizes))


def compiled(result: Result) -> Iterator[str]:
    """What torch.compile makes of a step or a pass, and of the reference's."""
    columns = ("graph breaks", "loops", "kernels of libraries")
    yield from header("", *(f"{what}: {name}" for what in columns for name in ("reference", "here")))
    for row in result["rows"]:
        yield line(row["title"], *row["breaks"], *row["generated"], *row["library"])


def program(result: Result) -> Iterator[str]:
    """Time of a step without arithmetic, of each candidate in each dtype."""
    rows = result["rows"]
    widest = max(row["spread"] for row in rows)
    versions = ", ".join(f"{name} {result[name]}" for name in ("torch", "diffusers"))
    yield f"{result['device']}, {versions}, {result['date']}, medians of {result['repeats']}, middle half of the ratios"
    yield f"within {widest:.0%}:\n"
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    yield from header("", *(cell for dtype in dtypes for cell in (dtype, "faster")))
    for name in dict.fromkeys(row["candidate"] for row in rows):
        found = {row["dtype"]: row for row in rows if row["candidate"] == name}
        cells = [(f"{1e3 * found[dtype]['seconds']:.1f} ms", f"{found[dtype]['ratio']:.2f} x") for dtype in dtypes]
        yield line(name, *(cell for pair in cells for cell in pair))


def workers(result: Result) -> Iterator[str]:
    """One worker and two against a bare loop, the start, a long file, and kills."""
    scaling, stream = result["scaling"], result["stream"]
    rounds = scaling["rounds"]
    rates = {name: [each[name]["rate"] for each in rounds] for name in ("one", "two")} | {
        "loop": [each["loop"] for each in rounds]
    }
    scales = [two / one for one, two in zip(rates["one"], rates["two"], strict=True)]
    overheads = [100 * (loop / one - 1) for loop, one in zip(rates["loop"], rates["one"], strict=True)]
    yield f"{result['device']}, torch {result['torch']}, {result['date']}; one thread for the loop and for each worker; medians"
    yield f"of {len(rounds)} rounds of {scaling['prompts']} prompts, lowest and highest in brackets:\n"
    yield from header("", "")
    for title, value in (
        ("pictures a second: a bare loop", ranged(rates["loop"], ".2f")),
        ("one worker", ranged(rates["one"], ".2f")),
        ("two workers", ranged(rates["two"], ".2f")),
        ("two workers against one", f"{ranged(scales, '.2f')} x"),
        ("one worker against the bare loop takes longer by", f"{ranged(overheads, '.1f')} %"),
        ("start of Ray", f"{median(each['one']['ray'] for each in rounds):.1f} s"),
        ("then of a worker, until its first pictures", f"{median(each['one']['first'] for each in rounds):.1f} s"),
        (
            f"{stream['rows']:,} rows, with a stand-in that draws nothing: the first is done after",
            f"{stream['first']:.1f} s",
        ),
        ("rows a second", f"{stream['rows_per_second']:,.0f}"),
        (
            "memory of the command after a tenth of them, and at the end",
            f"{stream['memory_after_a_tenth'] / 1e6:.0f} MB, {stream['memory_at_the_end'] / 1e6:.0f} MB",
        ),
    ):
        yield line(title, value)
    if "kills" in result:
        kills = result["kills"]["kills"]
        title = "kills of workers and of drivers, after which every row was there once"
        yield line(title, f"{kills.get('worker', 0)}, {kills.get('driver', 0)}")


def ranged(values: list[float], form: str) -> str:
    """Median, lowest and highest."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def header(*columns: object) -> Iterable[str]:
    return [line(*columns), "|---|" + "---:|" * (len(columns) - 1)]


def line(*cells: object) -> str:
    return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)


KINDS: dict[str, Callable[[Result], Iterator[str]]] = {
    "speed": speed,
    "accuracy": accuracy,
    "changes": changes,
    "steps": steps,
    "quantised": quantised,
    "quantised_sizes": quantised_sizes,
    "quantised_layers": quantised_layers,
    "choices": choices,
    "stream": stream,
    "previews": previews,
    "preemption": preemption,
    "workers": workers,
    "launches": launches,
    "compiled": compiled,
    "program": program,
    "resident": resident,
}


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__).parse_args()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if with_tables(text) != text:
            document.write_text(with_tables(text), encoding="utf-8")
            print(document.relative_to(ROOT))


if __name__ == "__main__":
    main()
