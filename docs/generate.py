"""Writes the generated parts of the documentation from class metadata; ``--check`` only compares.

Generated: docs/methods.md, docs/methods/*.md, docs/compositions.md, docs/hosts.md, and the tables between the markers
of README.md, docs/world.md and docs/serving.md. What was measured comes from the files in benchmarks/results; what is
not there is "not measured".
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import inspect
import json
import re
import sys
from pathlib import Path

from tokensieve import list_hosts, list_methods, method_class
from tokensieve.core.budget import list_budgets
from tokensieve.core.compose import ALONE, REFERENCE, Composition, list_compositions
from tokensieve.core.method import Method
from tokensieve.core.sample import HostFacts
from tokensieve.hosts import Host, host_class, host_for, tiny

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "data"
RESULTS = ROOT / "benchmarks" / "results"
SHOWN = ("0.25", "0.1", "0.05")
"""Retentions whose kept accuracy the short table of the README shows; the full one shows all that were measured."""
CONTROLS_LAST = {"exact": 0, "mostly": 0, "inferred": 0, "control": 1}


def methods() -> list[type[Method]]:
    """All methods, controls last."""
    classes = [method_class(name) for name in list_methods()]
    return sorted(classes, key=lambda cls: (CONTROLS_LAST[cls.fidelity], cls.name))


def hosts() -> list[type[Host]]:
    """All hosts by slug."""
    return [host_class(slug) for slug in list_hosts()]


def link(cls: type[Method]) -> str:
    """Title with a link to the paper where there is one."""
    return f"[{cls.title}]({cls.paper})" if cls.paper else cls.title


def golden_cases(cls: type[Method]) -> str:
    """Number of public reference cases that the tests compare with."""
    folder = GOLDEN / cls.name
    return str(len(list(folder.glob("*.npz")))) if folder.is_dir() else "-"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def own_times() -> dict[str, str]:
    """Own time of the methods at 32 x 196 x 3584, as ``benchmarks.own_time`` measured it."""
    summary = json.loads((RESULTS / "own_time.json").read_text())["summary"]
    return {name: _seconds(found["seconds"]) for name, found in summary.items() if found.get("seconds") is not None}


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


@functools.cache
def kept_shares() -> dict[tuple[str, str], str]:
    """Accuracy kept in percent by method and retention, as ``tokensieve bench`` measured it."""
    target = RESULTS / "world_bench" / "results.csv"
    if not target.exists():
        return {}
    with target.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["family"] == "all" and row["kept"]]
    return {(row["method"], row["retention"]): _percent(float(row["kept"])) for row in rows}


def retentions() -> list[str]:
    """Retentions that were measured for more than one method, largest first; those of the README at least."""
    measured = [retention for _, retention in kept_shares()]
    found = {retention for retention in measured if measured.count(retention) > 1} | set(SHOWN)
    return sorted((text for text in found if 0 < float(text) < 1), key=float, reverse=True)


def measured(name: str) -> str:
    """What ``benchmarks.NAME`` wrote, without its heading."""
    target = RESULTS / f"{name}.md"
    if not target.exists():
        return "Not measured."
    machine_and_table = target.read_text().split("\n", 2)[2].strip()
    return f"Measured by `python -m benchmarks.{name}`. {machine_and_table}".replace("\n## ", "\n### ")


def between_markers(text: str, parts: dict[str, str]) -> str:
    """A page with the text between its markers replaced."""
    for name, part in parts.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, number = re.subn(pattern, lambda m, part=part: f"{m.group(1)}{part}\n{m.group(2)}", text, flags=re.S)
        if number != 1:
            raise ValueError(f"the markers of {name} must occur once, not {number} times")
    return text


def method_table() -> str:
    """The short table of the README."""
    times, kept = own_times(), kept_shares()
    rows = [
        [
            f"[`{cls.name}`](docs/methods/{cls.name}.md)",
            link(cls),
            cls.venue or "-",
            ", ".join(cls.stages),
            cls.kind,
            cls.fidelity,
            times.get(cls.name, "not measured"),
            *(kept.get((cls.name, retention), "not measured") for retention in SHOWN),
        ]
        for cls in methods()
    ]
    header = ["name", "method", "venue", "stage", "kind", "fidelity", "own time"]
    return table([*header, *(f"kept at {_percent(float(retention))}" for retention in SHOWN)], rows)


def full_table() -> str:
    """Everything that is declared or was measured about every method."""
    times, kept, shown = own_times(), kept_shares(), retentions()
    rows = []
    for cls in methods():
        served = sum(cell(cls, host)[0] == "yes" for host in hosts())
        rows.append(
            [
                f"[`{cls.name}`](methods/{cls.name}.md)",
                link(cls),
                cls.venue or "-",
                ", ".join(cls.stages),
                signals_of(cls),
                cls.kind,
                "yes" if cls.exact_count else "no",
                "yes" if cls.causal else "no",
                "yes",
                f"{served} of {len(hosts())}",
                cls.fidelity,
                golden_cases(cls),
                times.get(cls.name, "not measured"),
                *(kept.get((cls.name, retention), "not measured") for retention in shown),
            ]
        )
    header = ["name", "method", "venue", "stage", "signals", "kind", "exact count", "causal", "batch > 1", "hosts"]
    header += ["fidelity", "reference cases passed", "own time"]
    return table([*header, *(f"kept at {_percent(float(retention))}" for retention in shown)], rows)


TABLE_NOTES = """*Signals*: what a method reads, on a host with a class token where it has the choice. *Exact count*:
the number of kept tokens follows from geometry. *Causal*: a frame is decided without later ones. *Batch > 1*: rows of a
padded batch equal rows alone; tested for every method and host. *Reference cases*: outputs of reference implementations
that the tests compare with; `make test` fails where one does not match. *Own time*: the decision alone for 32 frames of
196 tokens of width 3584, one thread ([own_time.md](../benchmarks/results/own_time.md)). *Kept*: accuracy on the bundled
model as a share of the full model's ([results](../benchmarks/results/world_bench/results.csv))."""


def host_table(prefix: str = "") -> str:
    """Families and their token layouts."""
    rows = [
        [f"`{cls.slug}`", cls.title, " + ".join(f"{m}s" for m in cls.modalities), cls.layout_note] for cls in hosts()
    ]
    return table(["host", "family", "takes", "visual tokens"], rows)


@functools.cache
def bare(slug: str) -> tuple[Host, object, HostFacts]:
    """Host, base model and facts of a tiny checkpoint of a family."""
    model, _ = tiny.build_in_memory(slug)
    host = host_for(model)
    return host, model.base_model, host.facts(model.base_model)


def cell(method: type[Method], host: type[Host]) -> tuple[str, str]:
    """Whether a method runs on a host, and the condition or the reason."""
    found, base, facts = bare(host.slug)
    names = [request.partition("@")[0] for request in method().signals(facts)]
    for name in names:
        if found.availability(name, base, text_tower="named") == "absent":
            return "no", f"{name}: {found.why_absent(name)}"
    if "frames" in method.stages and "video" not in host.modalities and host.slug != "internvl":
        return "yes", "pictures have no frames to leave out"
    if "frames" in method.stages and not host.drops_frames:
        return "yes", "the frames left out are still encoded"
    if method.uniform_views and host.ragged_frames:
        return "yes", host.ragged_frames
    return "yes", ""


def matrix() -> str:
    """Methods x hosts with numbered notes."""
    notes: list[str] = []
    rows = []
    for method in methods():
        row = [f"`{method.name}`"]
        for host in hosts():
            mark, note = cell(method, host)
            if note and note not in notes:
                notes.append(note)
            row.append(f"{mark} ({notes.index(note) + 1})" if note else mark)
        rows.append(row)
    text = table(["method", *(f"`{host.slug}`" for host in hosts())], rows)
    return text + "\n\n" + "\n".join(f"{i + 1}. {note}." for i, note in enumerate(notes))


def composition_page() -> str:
    """Which methods act together."""
    found = list_compositions()
    budgets = [item for item in found if item.budget and item.allowed]
    steered = [f"`{cls.name}`" for cls in methods() if any(item.second == cls.name for item in budgets)]
    pairs = {(item.first, item.second): item for item in found if not item.budget}
    inside = [cls for cls in methods() if not set(ALONE) & set(cls.stages)]
    notes: list[str] = []
    rows = []
    for first in [cls for cls in methods() if cls not in inside and cls.kind != "none"]:
        row = [f"`{first.name}`"]
        for second in inside:
            row.append(_composition_cell(pairs[first.name, second.name], notes))
        rows.append(row)
    among = [[f"`{first.name}`", *(_among(pairs, first, second, notes) for second in inside)] for first in inside]
    header = ["", *(f"`{cls.name}`" for cls in inside)]
    listed = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    return f"""# Compositions

<!-- generated by docs/generate.py from tokensieve/core/compose.py -->

`a+b` runs two methods, `a:budget=b` lets a frame budget decide how many tokens every frame keeps. What goes together
follows from what the classes declare; `tokensieve.list_compositions()` and `tokensieve list compositions` (with
`--refused` for the reasons) say the same. A test walks all of them on tiny models: every allowed one runs and keeps
what was promised, every refused one is refused with the declared reason.

1. At the stages *frames*, *encoder* and *tokens* only one method may act. A pair of two such methods of one stage is
   refused.
2. Methods that only act in front of the LLM go with all that only act inside.
3. Two methods that both act inside go together while they cut at different layers, and while none brings tokens back
   that the other cut meanwhile. The tables hold the default options on an LLM with {REFERENCE.decoder_layers} layers
   (`--layers` for another depth); a clash is solved by giving one of them another layer.
4. Only one method may select cache entries while an answer is decoded.

## Frame budgets

{" and ".join(f"`{name}`" for name in list_budgets())} go with every method that accepts one: {", ".join(steered)}.
Others take no frame budget, since their number of tokens follows from another rule, and say so.

## In front of the LLM, then inside it

{table(header, rows)}

## Inside the LLM, both

{table(header, among)}

{listed}
"""


def _composition_cell(item: Composition, notes: list[str]) -> str:
    if item.allowed:
        return "yes"
    if item.reason not in notes:
        notes.append(item.reason)
    return f"no ({notes.index(item.reason) + 1})"


def _among(
    pairs: dict[tuple[str, str], Composition], first: type[Method], second: type[Method], notes: list[str]
) -> str:
    item = pairs.get((first.name, second.name)) or pairs.get((second.name, first.name))
    return "-" if item is None else _composition_cell(item, notes)


def signals_of(cls: type[Method]) -> str:
    """Signals that the method asks for with default options on a tower with 24 layers and a class token."""
    facts = HostFacts("llava", 32, 24, 22, True)
    found = [f"`{request}`" for request in cls().signals(facts)]
    if "tokens" in cls.stages and cls.fidelity != "control":
        found.insert(0, "`tokens.features`")
    if cls().decoder_cuts(facts):
        found += [f"`{request}`" for request in cls().decoder_signals(facts)] + ["`decoder.hidden_states`"]
    return ", ".join(found) or "none"


def method_page(cls: type[Method]) -> str:
    """The page of one method."""
    options = [[f"`{field.name}`", f"`{field.default!r}`"] for field in dataclasses.fields(cls)]
    facts = [
        ["stage", ", ".join(cls.stages)],
        ["kind", cls.kind],
        ["signals", signals_of(cls)],
        ["count known from geometry", "yes" if cls.exact_count else "no"],
        ["causal (usable on a stream)", "yes" if cls.causal else "no"],
        ["takes a frame budget", "yes" if cls.accepts_budget else "no"],
        ["batch > 1", "yes, rows equal rows alone (tested)"],
        ["fidelity", cls.fidelity + (f"; {cls.fidelity_note}" if cls.fidelity_note else "")],
        ["reference cases in the tests", golden_cases(cls)],
    ]
    if cls.paper:
        facts.insert(0, ["paper", f"{cls.paper} ({cls.venue})"])
        facts.insert(1, ["released code", cls.code])
    module = cls.__module__.replace(".", "/") + ".py"
    return "\n".join(
        [
            f"# {cls.title} (`{cls.name}`)",
            "",
            f"<!-- generated by docs/generate.py from {module} -->",
            "",
            *_docstring(cls),
            "",
            table(["fact", "value"], facts),
            "",
            "```python",
            f'with tokensieve.compress(model, "{cls.name}", retention={cls().retention:.3g}) as run:',
            "    out = model.generate(**inputs)",
            "```",
            "",
            "## Options and defaults",
            "",
            table(["option", "default"], options),
            "",
            f"Source: [`{module}`](../../{module})",
            "",
        ]
    )


def _docstring(cls: type[Method]) -> list[str]:
    """Module and class docstrings as Markdown; numpy sections become lists."""
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    text = inspect.getdoc(cls) or ""
    parts = [] if cls.fidelity == "control" else [module, ""]
    body, _, parameters = text.partition("Parameters\n----------\n")
    parts += [body.strip()]
    if parameters:
        parts += ["", "Parameters:", ""]
        for line in parameters.splitlines():
            if line and not line.startswith(" "):
                parts.append(f"- `{line.strip()}`:")
            elif line.strip():
                parts[-1] += " " + line.strip()
    return [part.replace("``", "`") for part in parts]


def pages() -> dict[Path, str]:
    """Every generated file and its text."""
    marked = {
        ROOT / "README.md": {"methods": method_table(), "hosts": host_table()},
        ROOT / "docs" / "world.md": {"accuracy": measured("world_accuracy"), "unique": measured("unique_frames")},
        ROOT / "docs" / "serving.md": {"load": measured("serve_load")},
    }
    note = "<!-- generated by docs/generate.py -->\n"
    found = {
        **{path: between_markers(path.read_text(), parts) for path, parts in marked.items()},
        ROOT / "docs" / "methods.md": f"# Methods\n\n{note}\n{full_table()}\n\n{TABLE_NOTES}\n\n"
        f"## Which method runs on which host\n\nEvery cell is tested: the invariants of "
        f"`tests/invariants/test_matrix.py` run over the whole matrix, and where a host lacks a "
        f"signal, the refusal. Methods that need a text tower are named one where none is known.\n\n{matrix()}\n",
        ROOT / "docs" / "compositions.md": composition_page(),
        ROOT / "docs" / "hosts.md": f"# Hosts\n\n{note}\n{host_table()}\n",
    }
    for cls in methods():
        found[ROOT / "docs" / "methods" / f"{cls.name}.md"] = method_page(cls)
    return found


def main() -> int:
    """Write, or compare with ``--check``; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when a file is out of date")
    check = parser.parse_args().check
    stale = []
    for path, text in pages().items():
        if path.exists() and path.read_text() == text:
            continue
        stale.append(path.relative_to(ROOT))
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
