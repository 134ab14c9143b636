"""The report of a comparison: a table, findings from its numbers, and Markdown and HTML files."""

import base64
import html
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluation.memorisation import COPY_QUANTILE
from ..evaluation.metrics.table import METRICS, Metric
from ..files import replacing, write_json
from .plots import families_of, save_curves, save_grids, values_of

_NOT_MEASURED = "–"
_NO_BITS = "none"
_COPY_LIMIT = f"{100 * COPY_QUANTILE:g} %"  # fraction of held-out images, by construction
_NOT_SEPARATED = "are not separated by these seeds"


def _significant(value: float) -> str:
    """Three significant digits, without an exponent for large numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _memory(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


_FID, _PRECISION, _RECALL, _ACCURACY, _COPIED, _BITS = (
    METRICS[name] for name in ("fid", "precision", "recall", "accuracy", "copied_share", "bits_per_dim")
)
_SPREAD = Metric("spread", "spread", _significant)
_SECONDS = Metric("seconds_per_image", "s/image", _significant)
_COSTS = (
    _SPREAD,
    _SECONDS,
    Metric("parameters", "parameters", _count),
    Metric("memory_bytes", "memory", _memory),
    Metric("steps", "steps", _count),
)


def _columns(comparison: Mapping[str, Any]) -> list[Metric]:
    """The table's columns: every metric that was measured for some family, then the costs."""
    families = families_of(comparison).values()
    real = {} if comparison["real"] is None else comparison["real"]["metrics"]
    measured = [
        metric
        for name, metric in METRICS.items()
        if metric is _BITS or name in real or any(values_of(runs, name) for runs in families)
    ]
    return [*measured, *_COSTS]


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The results as a Markdown table with one row per family, and notes that explain the cells.

    Args:
        comparison (`Mapping`): The results: `runs`, one per family and seed, and `real`, the metrics of held-out
            images (or `None`).

    Returns:
        `str`: The table. A cell is the mean over seeds, with the lowest and the highest in brackets.
    """
    header, *rows = _table(comparison)
    lines = [header, ["---"] * len(header), *([_markdown(cell) for cell in row] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n" + "\n".join(f"- {_markdown(note)}" for note in _footnotes(comparison))


def findings(comparison: Mapping[str, Any]) -> list[str]:
    """The findings that follow from the numbers, in sentences.

    Two families differ "with every seed" if every run of the one is better than every run of the other. If the ranges
    of their seeds overlap, the seeds do not separate them.

    Args:
        comparison (`Mapping`): As for [`comparison_table`].

    Returns:
        `list[str]`: The sentences, about the families and numbers that are present.
    """
    families = families_of(comparison)
    by_name = {family: _title(runs) for family, runs in families.items()}
    found = [_best(families, column) for column in (_FID, _PRECISION, _RECALL, _ACCURACY)]
    for name in ("diffusion", "guided"):
        if {name, "gan"} <= by_name.keys():
            found.append(_duel(families[name], families["gan"]))
    if {"guided", "diffusion"} <= by_name.keys():
        found.append(_effect_of_guidance(families["diffusion"], families["guided"]))
    found += [_best_bits(families), _without_bits(families), _steadiness(families), _fastest(families)]
    found += [_copies(families), *_notes(families)]
    return [sentence for sentence in found if sentence is not None]


def write_comparison(
    folder: str | os.PathLike,
    comparison: Mapping[str, Any],
    grids: Mapping[str, Sequence[Image.Image]],
    titles: Mapping[str, str],
) -> None:
    """Writes `comparison.json`, `comparison.md`, `comparison.html`, `grids.png` and `curves.png`.

    Args:
        folder (`str` or `os.PathLike`): The folder, created if needed.
        comparison (`Mapping`): As for [`comparison_table`].
        grids (`Mapping[str, Sequence[PIL.Image.Image]]`): The images of each family, as for [`save_grids`].
        titles (`Mapping[str, str]`): The heading above each family's images.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(comparison, folder / "comparison.json")
    save_grids(grids, comparison["settings"]["class_names"], folder / "grids.png", titles)
    save_curves(comparison, folder / "curves.png")
    for name, text in (
        ("comparison.md", _report_markdown(comparison)),
        ("comparison.html", _report_html(comparison, folder)),
    ):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


# The table


def _table(comparison: Mapping[str, Any]) -> list[list[str]]:
    """The header and the rows, as plain text."""
    columns = _columns(comparison)
    rows = [["", *(column.title for column in columns)]]
    if comparison["real"] is not None:
        cells = (_cell([comparison["real"]["metrics"].get(column.name)], column) for column in columns)
        rows.append(["held-out images", *cells])
    for runs in families_of(comparison).values():
        rows.append([_title(runs), *(_family_cell(runs, column) for column in columns)])
    return rows


def _family_cell(runs: Sequence[Mapping[str, Any]], column: Metric) -> str:
    if column is _SPREAD:
        return _cell([_spread(runs)], column)
    values = values_of(runs, column.name)
    if column is _BITS:
        if not values:
            return _NO_BITS
        return ("≤ " if _is_bound(runs) else "") + _cell(values.values(), column)
    return _cell(values.values(), column)


def _cell(values: Iterable[float | None], column: Metric) -> str:
    """The mean, with the lowest and the highest in brackets if they differ in the digits shown."""
    known = [value for value in values if value is not None]
    if not known:
        return _NOT_MEASURED
    low, high = column.format(min(known)), column.format(max(known))
    mean = column.format(_mean(known))
    return mean if low == high else f"{mean} ({low}–{high})"


def _footnotes(comparison: Mapping[str, Any]) -> list[str]:
    """Explanations of the cells that are present."""
    families = families_of(comparison)
    notes = []
    if any(len(runs) > 1 for runs in families.values()):
        notes.append("Cells: the mean over seeds, with the lowest and the highest in brackets if they differ.")
    most = max((len(runs) for runs in families.values()), default=0)
    for runs in families.values():
        if len(runs) < most:
            notes.append(f"{_title(runs)}: {_seeds_in_words([run['seed'] for run in runs])} only.")
    if any(value < 0 for runs in families.values() for value in values_of(runs, "kid").values()):
        notes.append(
            "KID below 0: KID is unbiased for samples with randomly drawn classes, and lower for class-balanced ones."
        )
    if any(values_of(runs, _COPIED.name) for runs in families.values()):
        notes.append(
            f"copied: the fraction of samples closer to a training image than all but {_COPY_LIMIT} of held-out "
            "images are."
        )
    if any(values_of(runs, _BITS.name) and _is_bound(runs) for runs in families.values()):
        notes.append("bits/dim with ≤: an upper bound; the true value may be lower.")
    for runs in families.values():
        why = _why_no_bits(runs)
        if why is not None:
            notes.append(f"{_title(runs)} has no bits/dim: {why}.")
    if any(_spread(runs) is not None for runs in families.values()):
        notes.append("spread: the highest FID of the seeds divided by the lowest; 1 is the most stable training.")
    return notes


# Findings


def _verdict(better: Mapping[int, float], worse: Mapping[int, float], higher_is_better: bool) -> str:
    """How clearly the family with the better mean is ahead of the other.

    Returns:
        `str`: `"clear"`: every run is better than every run of the other. `"single"`: the same, but one of the two has
            only one run. `"paired"`: better with every seed that both have, but the ranges overlap. `"overlap"`:
            none of these.
    """
    sign = 1 if higher_is_better else -1
    if min(sign * value for value in better.values()) > max(sign * value for value in worse.values()):
        return "clear" if min(len(better), len(worse)) > 1 else "single"
    common = better.keys() & worse.keys()
    if len(common) > 1 and all(sign * better[seed] > sign * worse[seed] for seed in common):
        return "paired"
    return "overlap"


def _ranked(families: Mapping[str, Sequence[Mapping[str, Any]]], column: Metric) -> list[tuple[str, dict[int, float]]]:
    """Title and values of each family that has values, the best mean first."""
    known = [(_title(runs), values_of(runs, column.name)) for runs in families.values()]
    known = [(title, values) for title, values in known if values]
    return sorted(known, key=lambda item: _mean(item[1].values()), reverse=column.higher_is_better)


def _ahead(best: Mapping[int, float], others: Sequence[tuple[str, Mapping[int, float]]], higher_is_better: bool) -> str:
    """How the best family compares with each of the others, as clauses of a sentence."""
    of_verdict: dict[str, list[str]] = {}
    for title, values in others:
        of_verdict.setdefault(_verdict(best, values, higher_is_better), []).append(title)
    clauses = []
    if "clear" in of_verdict:
        named = "every other family" if len(of_verdict) == 1 else _listed(of_verdict["clear"])
        clauses.append(f"ahead of {named} with every seed")
    if "single" in of_verdict:
        clauses.append(
            f"ahead of {_listed(of_verdict['single'])} by a single run, which says nothing about other seeds"
        )
    if "paired" in of_verdict:
        clauses.append(
            f"ahead of {_listed(of_verdict['paired'])} with each seed, but the ranges overlap: they {_NOT_SEPARATED}"
        )
    if "overlap" in of_verdict:
        clauses.append(f"but it and {_listed(of_verdict['overlap'])} {_NOT_SEPARATED}")
    return "; ".join(clauses)


def _best(families: Mapping[str, Sequence[Mapping[str, Any]]], column: Metric) -> str | None:
    ranked = _ranked(families, column)
    if len(ranked) < 2:
        return None
    (title, values), *others = ranked
    ahead = _ahead(values, others, column.higher_is_better)
    return f"Best {column.title}: {title}, {_cell(values.values(), column)}, {ahead}."


def _duel(runs: Sequence[Mapping[str, Any]], gan: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether a family beats the GAN."""
    answers = []
    for column in (_FID, _PRECISION, _RECALL):
        own, rival = values_of(runs, column.name), values_of(gan, column.name)
        if not own or not rival:
            continue
        means = _mean(own.values()), _mean(rival.values())
        wins = means[0] > means[1] if column.higher_is_better else means[0] < means[1]
        numbers = f"({column.format(means[0])} against {column.format(means[1])})"
        leader = _title(runs) if wins else _title(gan)
        verdict = _verdict(*((own, rival) if wins else (rival, own)), column.higher_is_better)
        answer = {
            "clear": "yes, with every seed" if wins else f"no, {leader} wins with every seed",
            "single": f"{'yes' if wins else f'no, {leader} wins'}, but by a single run",
            "paired": f"{leader} is ahead with each seed, but the ranges overlap: they {_NOT_SEPARATED}",
            "overlap": f"they {_NOT_SEPARATED}",
        }[verdict]
        answers.append(f"{column.title}: {answer} {numbers}")
    return f"Does {_title(runs)} beat {_title(gan)}? {'; '.join(answers)}." if answers else None


def _effect_of_guidance(plain: Sequence[Mapping[str, Any]], guided: Sequence[Mapping[str, Any]]) -> str | None:
    """The effect of guidance between runs of the same seed; guided diffusion trains its own UNet."""
    effects, directions = [], {}
    for column in (_PRECISION, _RECALL, _FID, _ACCURACY):
        before, after = values_of(plain, column.name), values_of(guided, column.name)
        seeds = sorted(before.keys() & after.keys())
        if not seeds:
            continue
        rises = sum(after[seed] > before[seed] for seed in seeds)
        falls = sum(after[seed] < before[seed] for seed in seeds)
        if len(seeds) == 1:
            change = ("rises" if rises else "falls" if falls else "stays the same") + " with the one seed"
        elif len(seeds) in (rises, falls):
            change = f"{'rises' if rises else 'falls'} with every seed"
        elif rises or falls:
            change = f"rises with {rises} and falls with {falls} of {len(seeds)} seeds"
        else:
            change = "stays the same with every seed"
        directions[column] = change
        means = (column.format(_mean(values[seed] for seed in seeds)) for values in (before, after))
        effects.append(f"{column.title} {change} ({' to '.join(means)})")
    if not effects:
        return None
    is_trade = directions.get(_PRECISION, "").startswith("rises with every") and directions.get(_RECALL, "").startswith(
        "falls with every"
    )
    trade = " Guidance trades recall for precision." if is_trade else ""
    return f"Effect of guidance on {_title(plain)}: {', '.join(effects)}.{trade}"


def _best_bits(families: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    ranked = _ranked(families, _BITS)
    if len(ranked) < 2:
        return None
    (title, values), *others = ranked
    bounds = [_title(runs) for runs in families.values() if values_of(runs, _BITS.name) and _is_bound(runs)]
    kind = "at most " if title in bounds else ""
    sentence = f"Lowest bits/dim: {title}, {kind}{_cell(values.values(), _BITS)}, {_ahead(values, others, False)}."
    bounded_others = [other for other, _ in others if other in bounds]
    if bounded_others:
        sentence += f" For {_listed(bounded_others)} only an upper bound is known; the true value may be lower."
    return sentence


def _without_bits(families: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    """The families without a likelihood, with the reasons."""
    reasons = [(_title(runs), _why_no_bits(runs)) for runs in families.values()]
    named = [f"{title} ({why})" for title, why in reasons if why is not None]
    return f"No bits/dim: {_listed(named)}." if named else None


def _steadiness(families: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    ratios = [(ratio, _title(runs)) for runs in families.values() if (ratio := _spread(runs)) is not None]
    (most, unsteady), (least, steady) = max(ratios, default=(0, "")), min(ratios, default=(0, ""))
    if _significant(most) == _significant(least):  # fewer than two families, or equal spreads
        return None
    return (
        f"Seeds differ most for {unsteady}, whose highest FID is {_significant(most)} times its lowest, and least for "
        f"{steady}, {_significant(least)} times."
    )


def _fastest(families: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    ranked = _ranked(families, _SECONDS)
    if len(ranked) < 2:
        return None
    (title, values), *others = ranked
    own = _mean(values.values())
    factors = [f"{other} {_significant(_mean(times.values()) / own)}" for other, times in others]
    cell = _cell(values.values(), _SECONDS)
    ahead = _ahead(values, others, False)
    return f"Fastest to sample: {title}, {cell} s per image, {ahead}. Relative times: {', '.join(factors)}."


def _copies(families: Mapping[str, Sequence[Mapping[str, Any]]]) -> str | None:
    shares = {_title(runs): values_of(runs, _COPIED.name) for runs in families.values()}
    known = {title: values for title, values in shares.items() if values}
    if not known:
        return None
    above = [title for title, values in known.items() if min(values.values()) > COPY_QUANTILE]
    numbers = ", ".join(f"{title} {_cell(values.values(), _COPIED)}" for title, values in known.items())
    verdict = f"{_listed(above)} above that in every run" if above else "no family is above that in every run"
    return (
        f"Samples closer to a training image than all but {_COPY_LIMIT} of held-out images are: {numbers}; {verdict}."
    )


def _notes(families: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Notes on single runs, once if several seeds share a note."""
    sentences = []
    for runs in families.values():
        seeds_of: dict[str, list[int]] = {}
        for run in runs:
            for note in run["notes"]:
                seeds_of.setdefault(note, []).append(run["seed"])
        for note, seeds in seeds_of.items():
            sentences.append(f"{_title(runs)}, {_seeds_in_words(seeds)}: {note.rstrip('.')}.")
    return sentences


# The report


def _report_title(comparison: Mapping[str, Any]) -> str:
    return f"Families of generative models on {comparison['settings']['data']}"


def _report_settings(comparison: Mapping[str, Any]) -> str:
    settings = comparison["settings"]
    if settings["budget"] is None:
        return (
            f"The models had been trained before. {settings['num_images']:,} samples of each were measured in the "
            f"features of {settings['features']}."
        )
    return (
        f"Each model was trained for {settings['budget']} ({settings['hardware']}), with "
        f"{_seeds_in_words(settings['seeds'])}. {settings['num_images']:,} samples of each were measured in the "
        f"features of {settings['features']}."
    )


def _report_markdown(comparison: Mapping[str, Any]) -> str:
    found = "\n".join(f"- {_markdown(sentence)}" for sentence in findings(comparison))
    return (
        f"# {_markdown(_report_title(comparison))}\n\n{_markdown(_report_settings(comparison))}\n\n"
        f"{comparison_table(comparison)}\n\n## Findings\n\n{found}\n\n"
        "## Images\n\n![Images of each family](grids.png)\n\n"
        "![Precision, recall, FID and losses](curves.png)\n"
    )


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1240px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2rem; }
h1, li, p { overflow-wrap: anywhere; }
.wide { overflow-x: auto; border: 1px solid #d1d9e0; border-radius: 6px; }
.wide img { display: block; min-width: 760px; max-width: 100%; height: auto; margin: 0 auto; }
table { border-collapse: collapse; font-size: 0.8rem; }
th, td { padding: 6px 5px; border-bottom: 1px solid #d1d9e0; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; }
th:first-child { position: sticky; left: 0; background: white; text-align: left; white-space: normal;
  min-width: 6rem; max-width: 10rem;
  overflow-wrap: anywhere; }
td small { display: block; color: #59636e; font-size: 0.65rem; }
.notes { font-size: 0.85rem; color: #59636e; }
"""


def _report_html(comparison: Mapping[str, Any], folder: Path) -> str:
    """The report as one HTML file, which includes the images of the folder."""
    header, *rows = _table(comparison)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{_two_lines(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    notes, found = (
        "\n".join(f"<li>{html.escape(text)}</li>" for text in texts)
        for texts in (_footnotes(comparison), findings(comparison))
    )
    grids, curves = (base64.b64encode((folder / name).read_bytes()).decode() for name in ("grids.png", "curves.png"))
    title = html.escape(_report_title(comparison))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>{html.escape(_report_settings(comparison))}</p>
<div class="wide"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<ul class="notes">
{notes}
</ul>
<h2>Findings</h2>
<ul>
{found}
</ul>
<h2>Images</h2>
<div class="wide"><img src="data:image/png;base64,{grids}" alt="Images of each family, one row per class"></div>
<h2>Curves</h2>
<div class="wide"><img src="data:image/png;base64,{curves}" alt="Precision, recall, FID and losses"></div>
</body>
</html>
"""


def _two_lines(cell: str) -> str:
    """The range in small print below the mean, to fit fifteen columns."""
    mean, bracket, lowest_and_highest = cell.partition(" (")
    return html.escape(mean) + (f"<small>{html.escape(lowest_and_highest.rstrip(')'))}</small>" if bracket else "")


# Helpers


def _title(runs: Sequence[Mapping[str, Any]]) -> str:
    return runs[0]["title"]


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known)


def _spread(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """The highest FID of the seeds divided by the lowest; `None` with fewer than two."""
    fids = values_of(runs, _FID.name).values()
    return max(fids) / min(fids) if len(fids) > 1 and min(fids) > 0 else None


def _is_bound(runs: Sequence[Mapping[str, Any]]) -> bool:
    return any(run.get("bits_kind") == "bound" for run in runs)


def _why_no_bits(runs: Sequence[Mapping[str, Any]]) -> str | None:
    """The reason why a family has no likelihood; `None` if it has one or no reason is known."""
    if values_of(runs, _BITS.name):
        return None
    return next((run["no_bits"].rstrip(".") for run in runs if run.get("no_bits")), None)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _seeds_in_words(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def _markdown(text: str) -> str:
    """Escaped text for Markdown, since users' names may hold any character."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", " ".join(text.split()))
