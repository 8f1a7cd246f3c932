"""The page of a benchmark: curves, front, tables; everything embedded, no script, nothing loaded from anywhere."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tokensieve.bench.charts import curves, front, percent
from tokensieve.bench.results import Comparison, Results, Row
from tokensieve.bench.settings import RANDOM
from tokensieve.bench.statistics import Estimate

__all__ = ["claim", "ranked", "refusals", "render_page", "verdict"]

SIGNIFICANT = 0.05


def render_page(results: Results) -> str:
    """The page as text."""
    template = _environment().get_template("bench.html")
    style = "\n".join(_template_text(name) for name in ("report.css", "bench.css"))
    title, more = claim(results)
    return template.render(
        claim=title,
        more=more,
        facts=_facts(results),
        note=results.facts.get("note"),
        charts=_charts(results),
        groups=[(name, [_cells(row) for row in rows]) for name, rows in ranked(results)],
        families=[(name, facts) for name, facts in results.families.items()],
        by_family=[
            (name, [(row.setting, [_family(row.families[family]) for family in results.families]) for row in rows])
            for name, rows in ranked(results)
        ],
        chance=[percent(facts["chance"]) for facts in results.families.values()],
        refused=[(", ".join(settings), reason) for reason, settings in refusals(results).items()],
        encode=_milliseconds(results.full.milliseconds["encode"]),
        style=Markup(style),
    )


def claim(results: Results) -> tuple[str, str]:
    """The outcome in one sentence, and the numbers behind it in another.

    The number of methods that beat the control is told first: the best of many methods looks better than it is.
    """
    full = results.full
    behind = f"The full model answers {percent(full.accuracy.value)} of {full.questions} questions"
    published = [row for row in results.rows[1:] if not row.control]
    lowest = min((row.retention for row in published if row.retention is not None), default=None)
    same = [row for row in published if row.retention == lowest]
    if lowest is None or not same:
        return behind, ""
    better = sum(verdict(row.against_random) == "better" for row in same)
    best = max(same, key=lambda row: row.accuracy.value)
    chosen = next((row for row in results.rows if row.method == RANDOM and row.retention == lowest), None)
    control = "" if chosen is None else f", random choice {percent(chosen.accuracy.value)}"
    title = (
        f"{better} of {len(same)} methods beat{'s' if better == 1 else ''} random choice at {100 * lowest:g} % of the "
        "visual tokens"
    )
    return title, f"{behind}{control}, the highest method {percent(best.accuracy.value)} ({best.method})."


def ranked(results: Results) -> list[tuple[str, list[Row]]]:
    """Rows by retention, the most accurate first; the full model and settings of their own come before."""
    own = [row for row in results.rows if row.retention is None]
    found = [("", own)]
    for share in sorted({row.retention for row in results.rows if row.retention is not None}, reverse=True):
        rows = [row for row in results.rows if row.retention == share]
        rows.sort(key=lambda row: -row.accuracy.value)
        found.append((f"{100 * share:g} % of the visual tokens asked for", rows))
    return found


def verdict(compared: Comparison | None) -> str:
    """What a corrected test says: ``better``, ``worse``, ``undecided``, or nothing where there was no test."""
    if compared is None:
        return ""
    if compared.p_holm >= SIGNIFICANT:
        return "undecided"
    return "better" if compared.difference > 0 else "worse"


def refusals(results: Results) -> dict[str, list[str]]:
    """Why settings have no result, without the list of methods that would work -> the settings."""
    found: dict[str, list[str]] = {}
    for setting, reason in results.refused.items():
        brief = reason.partition("; methods that work here")[0].rstrip(".") + "."
        found.setdefault(brief, []).append(setting)
    return found


def _facts(results: Results) -> list[str]:
    facts = results.facts
    found = [f"{facts['questions']} questions about {facts['clips']} clips", f"prompt: {facts['prompt']}"]
    named = {"data": "data", "frames": "frames per clip", "dtype": "dtype", "device": "device", "workers": "workers"}
    named["seed"] = "seed"
    return found + [f"{label}: {facts[name]}" for name, label in named.items() if facts.get(name) is not None]


def _charts(results: Results) -> list[dict[str, Any]]:
    found = []
    lines = curves(results)
    if lines is not None:
        note = "Grey band: 95 % interval of the full model. Dashed: controls. Point at a line for its numbers."
        found.append({"title": "Accuracy over retention", "svg": lines, "note": note})
    note = (
        "Encoding, the same for nearly all methods, is left out. Times of processes that run side by side are longer."
    )
    found.append({"title": "Accuracy against LLM time", "svg": front(results), "note": note})
    return found


def _cells(row: Row) -> dict[str, Any]:
    flops = row.flops["prefill_share"]
    return {
        "setting": row.setting,
        "control": row.control,
        "front": row.on_front,
        "accuracy": percent(row.accuracy.value),
        "interval": _interval(row.accuracy),
        "bar": [f"{100 * value:.1f}" for value in (row.accuracy.low, row.accuracy.value, row.accuracy.high)],
        "kept": "" if row.kept is None else percent(row.kept.value),
        "kept_interval": "" if row.kept is None else _interval(row.kept),
        "full": _comparison(row.against_full),
        "random": _comparison(row.against_random),
        "tokens": f"{row.tokens['entered']:.0f}",
        "last": f"{row.tokens['last']:.0f}",
        "achieved": percent(row.achieved),
        "compress": _milliseconds(row.milliseconds["compress"]),
        "prefill": _milliseconds(row.milliseconds["prefill"]),
        "flops": "" if flops is None else percent(flops),
    }


def _comparison(compared: Comparison | None) -> dict[str, str]:
    if compared is None:
        return {"text": "", "kind": "", "tip": ""}
    tip = (
        f"{compared.won} won, {compared.lost} lost against {compared.reference}; p = {compared.p:.2g} over clips, "
        f"{compared.p_holm:.2g} corrected; McNemar {compared.mcnemar:.2g}"
    )
    return {"text": f"{100 * compared.difference:+.1f}", "kind": verdict(compared), "tip": tip}


def _family(found: Estimate) -> dict[str, str]:
    return {"text": f"{100 * found.value:.0f}", "tip": _interval(found), "depth": f"{found.value:.2f}"}


def _interval(found: Estimate) -> str:
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}"


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("tokensieve.view"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _template_text(name: str) -> str:
    return (resources.files("tokensieve.view") / "templates" / name).read_text(encoding="utf-8")
