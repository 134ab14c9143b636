"""The report of a comparison: a table, findings from its numbers, and Markdown and HTML files.

The code decides what is said, and of which numbers; the words stand in `templates/`.
"""

import base64
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from ..evaluation.memorisation import COPY_QUANTILE
from ..evaluation.metrics.table import METRICS, Metric
from ..files import replacing, write_json
from .plots import save_curves, save_grids
from .results import FamilyRuns, families_of

_VERDICTS = ("clear", "single", "paired", "overlap")


def _significant(value: float) -> str:
    """Three significant digits, without an exponent for large numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


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
    Metric("parameters", "parameters", "{:,.0f}".format),
    Metric("memory_bytes", "memory", _memory),
    Metric("steps", "steps", "{:,.0f}".format),
)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _seeds_in_words(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def _markdown(text: str) -> str:
    """Escaped text for Markdown, since users' names may hold any character."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", " ".join(text.split()))


_TEMPLATES = Environment(
    loader=PackageLoader("hf_guided.comparison"),
    autoescape=select_autoescape(["html.jinja"]),
    trim_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)
_TEMPLATES.filters |= {"listed": _listed, "seeds": _seeds_in_words, "markdown": _markdown}
_say: Any = _TEMPLATES.get_template("sentences.jinja").module


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The results as a Markdown table with one row per family, and notes that explain the cells.

    A cell is the mean over seeds, with the lowest and the highest in brackets. `comparison` has `runs`, one per family
    and seed, and `real`, the metrics of held-out images (or `None`).
    """
    header, *rows = _table(comparison)
    lines = [header, ["---"] * len(header), *([_markdown(cell) for cell in row] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n" + "\n".join(f"- {_markdown(note)}" for note in _footnotes(comparison))


def findings(comparison: Mapping[str, Any]) -> list[str]:
    """The findings that follow from the numbers that are present, in sentences.

    Two families differ "with every seed" if every run of the one is better than every run of the other. If the ranges
    of their seeds overlap, the seeds do not separate them.
    """
    by_name = families_of(comparison)
    families = list(by_name.values())
    found = [_best(families, column) for column in (_FID, _PRECISION, _RECALL, _ACCURACY)]
    found += [_duel(by_name[name], by_name["gan"]) for name in ("diffusion", "guided") if {name, "gan"} <= {*by_name}]
    if {"guided", "diffusion"} <= by_name.keys():
        found.append(_effect_of_guidance(by_name["diffusion"], by_name["guided"]))
    found.append(_best(families, _BITS))
    if without_bits := [family for family in families if family.no_bits is not None]:
        found.append(_say.without_bits(without_bits))
    found += [_steadiness(families), _best(families, _SECONDS), _copies(families), *_notes(families)]
    return [sentence for sentence in found if sentence]


def write_comparison(
    folder: str | os.PathLike,
    comparison: Mapping[str, Any],
    grids: Mapping[str, Sequence[Image.Image]],
    titles: Mapping[str, str],
) -> None:
    """Writes `comparison.json`, `comparison.md`, `comparison.html`, `grids.png` and `curves.png` to a folder.

    `grids` and `titles`: see [`save_grids`].
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(comparison, folder / "comparison.json")
    save_grids(grids, comparison["settings"]["class_names"], folder / "grids.png", titles)
    save_curves(comparison, folder / "curves.png")
    header, *rows = _table(comparison)
    report = {
        "title": f"Families of generative models on {comparison['settings']['data']}",
        "settings": _say.settings(comparison["settings"]),
        "table": comparison_table(comparison),
        "header": header,
        "rows": rows,
        "notes": _footnotes(comparison),
        "findings": findings(comparison),
        **{name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in ("grids", "curves")},
    }
    for name in ("comparison.md", "comparison.html"):
        with replacing(folder / name) as temporary:
            temporary.write_text(_TEMPLATES.get_template(f"{name}.jinja").render(report), encoding="utf-8")


# The table


def _table(comparison: Mapping[str, Any]) -> list[list[str]]:
    """The header and the rows, as plain text: every metric that was measured for some family, then the costs."""
    families = families_of(comparison).values()
    real = {} if comparison["real"] is None else comparison["real"]["metrics"]
    measured = [
        metric
        for name, metric in METRICS.items()
        if metric is _BITS or name in real or any(family.values(name) for family in families)
    ]
    columns = [*measured, *_COSTS]
    rows = [["", *(column.title for column in columns)]]
    if comparison["real"] is not None:
        rows.append(["held-out images", *(_cell([real.get(column.name)], column) for column in columns)])
    return rows + [[family.title, *(_family_cell(family, column) for column in columns)] for family in families]


def _family_cell(family: FamilyRuns, column: Metric) -> str:
    if column is _SPREAD:
        return _cell([family.spread], column)
    values = family.values(column.name)
    if column is _BITS and not values:
        return "none"
    return ("≤ " if column is _BITS and family.has_bound else "") + _cell(values.values(), column)


def _cell(values: Iterable[float | None], column: Metric) -> str:
    """The mean, with the lowest and the highest in brackets if they differ in the digits shown."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = column.format(min(known)), column.format(max(known))
    average = column.format(fmean(known))
    return average if low == high else f"{average} ({low}–{high})"


def _footnotes(comparison: Mapping[str, Any]) -> list[str]:
    """Explanations of the cells that are present."""
    families = families_of(comparison).values()
    most = max((len(family.runs) for family in families), default=0)
    notes = [
        (most > 1, _say.cells()),
        *((len(family.runs) < most, _say.fewer_seeds(family)) for family in families),
        (any(value < 0 for family in families for value in family.values("kid").values()), _say.kid_below_0()),
        (any(family.values(_COPIED.name) for family in families), _COPIED.note),
        (any(family.values(_BITS.name) and family.has_bound for family in families), _say.bound()),
        *((family.no_bits is not None, _say.no_bits(family)) for family in families),
        (any(family.spread is not None for family in families), _say.spread()),
    ]
    return [note for applies, note in notes if applies]


# Findings


def _verdict(better: Mapping[int, float], worse: Mapping[int, float], higher_is_better: bool) -> str:
    """How clearly the family with the better mean is ahead of the other.

    `"clear"`: every run is better than every run of the other. `"single"`: the same, but one of the two has only one
    run. `"paired"`: better with every seed that both have, but the ranges overlap. `"overlap"`: none of these.
    """
    sign = 1 if higher_is_better else -1
    if min(sign * value for value in better.values()) > max(sign * value for value in worse.values()):
        return "clear" if min(len(better), len(worse)) > 1 else "single"
    common = better.keys() & worse.keys()
    if len(common) > 1 and all(sign * better[seed] > sign * worse[seed] for seed in common):
        return "paired"
    return "overlap"


def _best(families: Sequence[FamilyRuns], column: Metric) -> str | None:
    """The family with the best mean, and how it compares with the others; `None` with nothing to compare."""
    known = [(family, values) for family in families if (values := family.values(column.name))]
    known.sort(key=lambda item: fmean(item[1].values()), reverse=column.higher_is_better)
    if len(known) < 2:
        return None
    (best, values), *others = known
    of_verdict: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
    for family, others_values in others:
        of_verdict[_verdict(values, others_values, column.higher_is_better)].append(family.title)
    facts = {
        "title": best.title,
        "cell": _cell(values.values(), column),
        "others": {verdict: titles for verdict, titles in of_verdict.items() if titles},
    }
    if column is _BITS:
        bounded = [family.title for family, _ in others if family.has_bound]
        return _say.lowest_bits(**facts, is_bound=best.has_bound, bounded=bounded)
    if column is _SECONDS:
        own = fmean(values.values())
        factors = [f"{family.title} {_significant(fmean(times.values()) / own)}" for family, times in others]
        return _say.fastest(**facts, factors=factors)
    return _say.best(metric=column.title, **facts)


def _duel(family: FamilyRuns, rival: FamilyRuns) -> str | None:
    """Whether a family beats another."""
    answers = []
    for column in (_FID, _PRECISION, _RECALL):
        sides = family.values(column.name), rival.values(column.name)
        if not all(sides):
            continue
        own, other = (fmean(values.values()) for values in sides)
        wins = own > other if column.higher_is_better else own < other
        verdict = _verdict(*(sides if wins else sides[::-1]), column.higher_is_better)
        means = [column.format(own), column.format(other)]
        answers.append({"metric": column.title, "wins": wins, "verdict": verdict, "means": means})
    return _say.duel(family.title, rival.title, answers) if answers else None


def _effect_of_guidance(plain: FamilyRuns, guided: FamilyRuns) -> str | None:
    """The effect of guidance between runs of the same seed; guided diffusion trains its own UNet."""
    effects: dict[Metric, dict[str, Any]] = {}
    for column in (_PRECISION, _RECALL, _FID, _ACCURACY):
        before, after = plain.values(column.name), guided.values(column.name)
        seeds = sorted(before.keys() & after.keys())
        if not seeds:
            continue
        rises = sum(after[seed] > before[seed] for seed in seeds)
        falls = sum(after[seed] < before[seed] for seed in seeds)
        changes = {(len(seeds), 0): "rises", (0, len(seeds)): "falls", (0, 0): "same"}
        effects[column] = {
            "metric": column.title,
            "change": changes.get((rises, falls), "mixed"),
            "rises": rises,
            "falls": falls,
            "seeds": len(seeds),
            "means": [column.format(fmean(values[seed] for seed in seeds)) for values in (before, after)],
        }
    if not effects:
        return None
    changes_with_every_seed = {column: effect["change"] for column, effect in effects.items() if effect["seeds"] > 1}
    is_trade = {_PRECISION: "rises", _RECALL: "falls"}.items() <= changes_with_every_seed.items()
    return _say.effect_of_guidance(plain.title, list(effects.values()), is_trade)


def _steadiness(families: Sequence[FamilyRuns]) -> str | None:
    ratios = [(ratio, family.title) for family in families if (ratio := family.spread) is not None]
    (most, unsteady), (least, steady) = max(ratios, default=(0, "")), min(ratios, default=(0, ""))
    if _significant(most) == _significant(least):  # fewer than two families, or equal spreads
        return None
    return _say.steadiness(unsteady, _significant(most), steady, _significant(least))


def _copies(families: Sequence[FamilyRuns]) -> str | None:
    known = {family.title: values for family in families if (values := family.values(_COPIED.name))}
    above = [title for title, values in known.items() if min(values.values()) > COPY_QUANTILE]
    cells = [f"{title} {_cell(values.values(), _COPIED)}" for title, values in known.items()]
    return _say.copies(f"{100 * COPY_QUANTILE:g} %", cells, above) if known else None


def _notes(families: Sequence[FamilyRuns]) -> list[str]:
    """Notes on single runs, once if several seeds share a note."""
    sentences = []
    for family in families:
        seeds_of: dict[str, list[int]] = {}
        for run in family.runs:
            for note in run["notes"]:
                seeds_of.setdefault(note, []).append(run["seed"])
        sentences += [_say.note(family.title, seeds, note) for note, seeds in seeds_of.items()]
    return sentences
