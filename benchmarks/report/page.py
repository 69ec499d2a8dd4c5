"""The report as one HTML page that needs nothing but itself: follows the reader's light or dark, fits a phone.

text = page(rows)    # rows of benchmarks.summary, the sweep's among them
"""

import html
from collections.abc import Iterable, Sequence
from functools import partial

from benchmarks.plots import Figure, all_figures
from benchmarks.summary import METHODS, Row, Rows, name_of, order, task_name
from benchmarks.svg import PALETTE, key_of_line
from benchmarks.verdict import details, set_by_set, verdict

_safe = partial(html.escape, quote=True)
TITLE = "When is an adapter better than the document in the prompt?"
_COLORS = [" ".join(f"--{name}: {pair[i]};" for name, pair in PALETTE.items()) for i in range(2)]
STYLE = f"""
:root {{ color-scheme: light dark; {_COLORS[0]} --band: #f4f6f8; }}
@media (prefers-color-scheme: dark) {{ :root {{ {_COLORS[1]} --band: #1f242a; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1rem; }}
h2 {{ font-size: 1.25rem; margin: 2.5rem 0 .25rem; }}
h3 {{ font-size: 1rem; margin: 1.5rem 0 .25rem; }}
p, ul, dl {{ max-width: 46rem; margin: .5rem 0; }}
.answer {{ background: var(--band); border-left: .25rem solid var(--orange); padding: .75rem 1rem; max-width: 52rem; }}
.answer p {{ max-width: none; }}
.answer th:first-child {{ background: var(--band); }}
.note, .command {{ color: var(--soft); font-size: .875rem; }}
.finding {{ font-weight: 500; }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 1fr)); gap: 1rem;
  margin: .75rem 0; }}
.panels.uneven {{ display: block; columns: 3 20.5rem; }}
.panels.uneven svg {{ break-inside: avoid; margin-bottom: 1rem; }}
.panels svg {{ display: block; width: 100%; max-width: 27rem; height: auto; }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; padding: 0; margin: .5rem 0;
  max-width: none; font-size: .875rem; }}
.legend li {{ display: flex; align-items: center; gap: .4rem; }}
section {{ margin: 0; }}
details {{ margin: .5rem 0; }}
summary {{ cursor: pointer; padding: .25rem 0; }}
.scroll {{ overflow-x: auto; margin: .75rem 0; max-width: 100%; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; padding: .25rem 0; font-weight: 600; }}
th, td {{ padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
thead th {{ vertical-align: bottom; white-space: normal; min-width: 4.5rem; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: var(--page);
  white-space: normal; min-width: 7rem; max-width: 12rem; }}
tbody tr:nth-child(even) > * {{ background: var(--band); }}
dt {{ font-weight: 600; }}
dd {{ margin: 0 0 .4rem 1rem; }}
code {{ font-size: .875rem; overflow-wrap: anywhere; }}
a {{ color: inherit; }}
:focus-visible {{ outline: 2px solid currentColor; outline-offset: 2px; }}
@media print {{ details > * {{ display: block; }} }}
"""


def page(rows: Rows) -> str:
    """The whole page.

    Raises:
        ValueError: no `sweep` row says what made the others.
    """
    sweep = next((row for row in rows if row["kind"] == "sweep"), None)
    if sweep is None:
        raise ValueError("The rows have no row of kind sweep; write them with python -m benchmarks.report output=...")
    figures, missing = all_figures(rows)
    body = [
        f"<h1>{TITLE}</h1>",
        _answer(rows, sweep),
        _contents(figures),
        _methods(rows),
        *(_figure(figure, sweep) for figure in figures),
        _missing(missing),
        _all_tables(rows),
        _made(sweep),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{TITLE}</title><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _answer(rows: Rows, sweep: Row) -> str:
    said = " ".join(f"<strong>{_safe(title)}</strong> {_safe(text)}" for title, text in verdict(rows))
    more = "".join(f"<p><strong>{_safe(title)}:</strong> {_safe(text)}</p>" for title, text in details(rows))
    head, lines = set_by_set(rows)
    more += _table("Difference of exact match (95 % interval), set by set", head, lines) if lines else ""
    more = f"<details><summary>Set by set</summary>{more}</details>" if more else ""
    seeds = max((row["seeds"] for row in rows if row["kind"] == "summary"), default=0)
    scale = ", ".join([*sweep["checkpoints"], *sweep["hardware"], f"{seeds} seeds", f"{sweep['cells']} cells"])
    return (
        f'<div class="answer"><p>{said}</p>{more}<p class="note">Scores are exact match, 0 to 1. A set is won or lost '
        "where the 95 % interval of the difference (paired bootstrap over documents and seeds) lies on one side of 0. "
        f"Measured: {_safe(scale)}.</p></div>"
    )


def _contents(figures: Sequence[Figure]) -> str:
    links = "".join(f'<li><a href="#{figure.key}">{_safe(figure.title)}</a></li>' for figure in figures)
    links += '<li><a href="#tables">All tables</a></li><li><a href="#made">How it was made</a></li>'
    return f'<nav aria-label="Contents"><ul class="legend">{links}</ul></nav>'


def _methods(rows: Rows) -> str:
    names = sorted({row["method"] for row in rows if row["kind"] == "summary"}, key=order)
    items = "".join(
        f"<dt>{_safe(name_of(name))}</dt><dd>{_safe(METHODS[name][1] if name in METHODS else '')}</dd>"
        for name in names
    )
    terms = (
        "<dt>share of the gap closed</dt><dd>0 is no context's score, 1 is full context's.</dd>"
        "<dt>exact match</dt><dd>Share of answers that are right, apart from case, punctuation and articles.</dd>"
        "<dt>chunk</dt><dd>Part of a document that is read by itself and has its own ranks in the adapter.</dd>"
    )
    return f"<details><summary>What the methods and terms mean</summary><dl>{items}{terms}</dl></details>"


def _figure(figure: Figure, sweep: Row) -> str:
    legend = "".join(f"<li>{key_of_line(style)}{_safe(name)}</li>" for name, style in figure.legend)
    legend = f'<ul class="legend" aria-label="Legend">{legend}</ul>' if legend else ""
    finding = f'<p class="finding">{_safe(figure.finding)}</p>' if figure.finding else ""
    known = [c for task in figure.tasks for c in sweep["commands_by_task"].get(task, [])]
    commands = list(dict.fromkeys(known)) or sweep["commands"]
    text = "".join(f'<p class="note">{_safe(part)}</p>' for part in figure.text.split("\n"))
    tables = "".join(_table(*table) for table in figure.tables)
    return (
        f'<section id="{figure.key}"><h2>{_safe(figure.title)}</h2>{finding}{text}'
        f'{legend}<div class="panels{" uneven" if figure.key == "sets" else ""}">{"".join(figure.panels)}</div>'
        f"<details><summary>These figures as a table</summary>{tables}</details>"
        f"{_made_by(commands)}</section>"
    )


def _missing(missing: Sequence[tuple[str, str]]) -> str:
    if not missing:
        return ""
    items = "".join(f"<li>{_safe(title)}: <code>{_safe(command)}</code></li>" for title, command in missing)
    return f'<section id="missing"><h2>Not measured yet</h2><ul>{items}</ul></section>'


def _all_tables(rows: Rows) -> str:
    from benchmarks.report import COST, QUALITY, by_set, cost_cells, quality_cells

    parts: list[str] = []
    task = ""
    for name, title, chosen in by_set(rows):
        if name != task:
            parts += ["</details>"] if task else []
            parts.append(f"<details><summary>{_safe(task_name(name))}</summary>")
            task = name
        parts.append(_table(f"{title}: quality", QUALITY, map(quality_cells, chosen)))
        parts.append(_table(f"{title}: cost", COST, map(cost_cells, chosen)))
    parts += ["</details>"] if task else []
    return f'<section id="tables"><h2>All tables</h2>{"".join(parts)}</section>'


def _made(sweep: Row) -> str:
    facts = [
        ("Commands", _codes([*sweep["commands"], "python -m benchmarks.report"])),
        ("Commits", _safe(", ".join(sweep["commits"]))),
        ("Hardware", _safe(", ".join(sweep["hardware"]))),
        ("Versions", _safe(", ".join(f"{name} {number}" for name, number in sweep["versions"].items()))),
        (
            "Measured",
            _safe(f"{sweep['cells']} cells in {sweep['wall_s'] / 60:.0f} minutes; {' to '.join(sweep['dates'])}"),
        ),
    ]
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts)
    parts = [f'<section id="made"><h2>How it was made</h2><dl>{items}</dl>']
    if sweep["failed"]:
        failed = "".join(f"<li>{_safe(text)}</li>" for text in sweep["failed"])
        parts.append(f"<h3>Cells that failed</h3><ul>{failed}</ul>")
    if sweep["choices"]:
        chosen = "".join(
            f"<li>{_safe(name_of(name))}: <code>{_safe(text)}</code></li>" for name, text in sweep["choices"]
        )
        parts.append(f"<h3>Settings of the methods</h3><ul>{chosen}</ul>")
    return "".join([*parts, "</section>"])


def _made_by(commands: Sequence[str]) -> str:
    if len(commands) == 1:
        return f'<p class="command">Made by {_codes([*commands, "python -m benchmarks.report"])}</p>'
    items = "".join(f"<li><code>{_safe(command)}</code></li>" for command in [*commands, "python -m benchmarks.report"])
    summary = f"<summary>Made by {len(commands)} commands and a report</summary>"
    return f'<details class="command">{summary}<ol>{items}</ol></details>'


def _codes(commands: Sequence[str]) -> str:
    return ", then ".join(f"<code>{_safe(command)}</code>" for command in commands)


def _table(caption: str, head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    cells = lambda tag, row: "".join(f"<{tag}>{_safe(cell)}</{tag}>" for cell in row)  # noqa: E731
    columns = "".join(f'<th scope="col">{_safe(name)}</th>' for name in head)
    lines = "".join(f'<tr><th scope="row">{_safe(row[0])}</th>{cells("td", row[1:])}</tr>' for row in body)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_safe(caption)}"><table><caption>{_safe(caption)}'
        f"</caption><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
