"""One page of HTML that needs nothing else: styles, pictures and a few lines of script are inside.

Whatever comes from models, recipes or errors is text that others wrote. It becomes Html by `escaped` alone;
the page's policy allows no script but ours, by its digest, and nothing from elsewhere.
"""

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import NewType

from merge.printing import printable
from merge.report.pictures import Picture

Html = NewType("Html", str)
Cell = str | float | int | None  # numbers are sorted as such; None and NaN are shown as a dash

# figures that a line ends before or after, not within: p = 1e-9, +1.5 points, 95 %, 61.2 ± 0.4
WHOLE = re.compile(
    r"(p = [\d.e+-]{0,20}\d|(?<![\w.-])[+-]?\d[\d.]{0,15}(?: ± \d[\d.]{0,15}| (?:points|%)(?!\w)))"
)
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const column = [...head.parentElement.children].indexOf(head);
  const down = head.getAttribute("aria-sort") === "descending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "ascending" : "descending");
  const key = row => row.children[column].dataset.n ?? null, text = row => row.children[column].textContent;
  const order = (a, b) => {
    const x = key(a), y = key(b);
    if (x === null && y === null) return text(a).localeCompare(text(b), undefined, {numeric: true});
    if (x === null || y === null) return x === null ? -1 : 1;
    return x - y;
  };
  const rows = [...body.rows].sort(order);
  body.append(...(down ? rows : rows.reverse()));
});
"""
STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --ink: #1d232a; --faint: #5d6772;
  --line: #dfe3e7; --mark: #e8f1f8; --accent: #0063a0; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181c; --card: #1b2026; --ink: #e4e7ea;
  --faint: #9aa5b0; --line: #333b43; --mark: #203442; --accent: #7cc0f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.faint { color: var(--faint); }
.say { background: var(--mark); border-left: 4px solid var(--accent); padding: .7rem 1rem; margin: 1rem 0;
  max-width: none; border-radius: 0 6px 6px 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 1rem 0; font-size: .95rem; }
a { color: var(--accent); }
figure { margin: 1rem 0 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .6rem; max-width: 46rem; }
.wide { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); max-height: 34rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .32rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; }
td.long { white-space: normal; min-width: 18rem; overflow-wrap: anywhere; }
thead th { position: sticky; top: 0; background: var(--card); z-index: 1; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; }
th[aria-sort] button::after { content: " \\25BE"; }
th[aria-sort="ascending"] button::after { content: " \\25B4"; }
.whole { white-space: nowrap; }
tr.mark { background: var(--mark); }
details { margin: .5rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  overflow-x: auto; font-size: .85rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media print { .wide { max-height: none; overflow: visible; } }
"""


def escaped(text: str) -> Html:
    """Any text, so that it is shown and nothing else."""
    return Html(escape(printable(text, "\n\t")))


def prose(text: str) -> Html:
    """Text as of `escaped`, whose figures with their signs and units stay on one line."""
    pieces = [escaped(piece) for piece in WHOLE.split(text)]
    pieces[1::2] = [Html(f"<span class=whole>{piece}</span>") for piece in pieces[1::2]]
    return Html("".join(pieces))


def joined(parts: Iterable[Html]) -> Html:
    return Html("\n".join(parts))


def paragraph(text: str, kind: str = "") -> Html:
    """kind: `faint` for what is told beside, `say` for what matters most."""
    of_kind = f' class="{kind}"' if kind else ""
    return Html(f"<p{of_kind}>{prose(text)}</p>")


def section(identity: str, heading: str, *parts: Html) -> Html:
    return Html(
        f'<section id="{identity}">\n<h2>{escaped(heading)}</h2>\n{joined(parts)}\n</section>'
    )


def figure(picture: Picture) -> Html:
    """A picture with what is to be seen on it."""
    label = escaped(f"{picture.title}: {picture.told}")
    element = picture.svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return Html(f"<figure>\n{element}\n<figcaption>{prose(picture.told)}</figcaption>\n</figure>")


def details(summary: str, text: str) -> Html:
    """Text that is shown on demand, letter for letter."""
    return Html(
        f"<details><summary>{escaped(summary)}</summary><pre>{escaped(text)}</pre></details>"
    )


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    digits: Sequence[int] | int = 1,
    marked: Iterable[int] = (),
    label: str = "",
) -> Html:
    """A table whose columns sort by a click. digits: behind the point, of all columns or of each. marked:
    numbers of rows that stand out. Columns of text alone are set to the left."""
    places = [digits] * len(head) if isinstance(digits, int) else digits
    texts = [all(isinstance(row[i], str | None) for row in rows) for i in range(len(head))]
    chosen = set(marked)
    heads = "".join(
        f"<th scope=col{' class=text' if is_text else ''}><button type=button>{escaped(name)}</button></th>"
        for name, is_text in zip(head, texts, strict=True)
    )
    body = "\n".join(
        f"<tr{' class=mark' if i in chosen else ''}>"
        + "".join(
            _cell(value, place, is_text)
            for value, place, is_text in zip(row, places, texts, strict=True)
        )
        + "</tr>"
        for i, row in enumerate(rows)
    )
    named = f' tabindex=0 role=region aria-label="{escaped(label)}"' if label else ""
    content = f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return Html(f"<div class=wide{named}><table>\n{content}\n</table></div>")


def _cell(value: Cell, digits: int, is_text: bool) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return f"<td{' class=text' if is_text else ''}>–</td>"
    if isinstance(value, str):
        kind = "long" if len(value) > 80 else ""
        classes = " ".join(filter(None, ("text" if is_text else "", kind)))
        return f'<td class="{classes}">{escaped(value)}</td>'
    shown = f"{value:.{digits}f}" if isinstance(value, float) else f"{value}"
    return f"<td data-n={value!r}>{shown}</td>"


def page(title: str, head: Html, sections: Sequence[tuple[str, str, Html]]) -> str:
    """The whole document. sections: (identity, name in the list of contents, content)."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    policy += f"form-action 'none'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{identity}">{escaped(name)}</a>' for identity, name, _ in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{escaped(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escaped(title)}</h1>
{head}
<nav aria-label="Contents">{links}</nav>
{joined(content for _, _, content in sections)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
