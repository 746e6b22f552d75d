"""The frame of a page: its style, its script and its sections. Driven by `tools.report`."""

from __future__ import annotations

from html import escape
from pathlib import Path

SCRIPT = Path(__file__).with_name("interaction.js")
STYLE = """
:root {
  --ink:#1d2733; --muted:#5d6b7a; --line:#e2e7ec; --paper:#fff; --wash:#f5f7f9; --accent:#3d5bd9;
  --good:#12876f; --bad:#c23f22;
}
* { box-sizing:border-box }
body {
  margin:0; background:var(--wash); color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;
}
main { max-width:1080px; margin:0 auto; padding:36px 28px 64px }
h1 { font-size:30px; line-height:1.2; margin:0; letter-spacing:-.01em }
h2 { font-size:19px; margin:0 0 2px }
.kind { color:var(--accent); font-weight:600; font-size:13px; margin:0 0 4px }
.lead { color:var(--muted); margin:6px 0 0 }
section {
  background:var(--paper); border:1px solid var(--line); border-radius:10px;
  padding:20px 24px; margin-top:18px;
}
section > p.note, details > p.note {
  color:var(--muted); margin:0 0 12px; font-size:13.5px; max-width:86ch; text-wrap:pretty;
}
svg { width:100%; height:auto; display:block; touch-action:pan-y; user-select:none }
svg text { font-family:inherit !important }
.panels {
  display:grid; gap:18px 26px; grid-template-columns:repeat(var(--columns),minmax(0,1fr));
}
h3 { font-size:13.5px; margin:0 0 2px }
.legend { display:flex; flex-wrap:wrap; gap:2px 6px; margin:2px 0 6px -6px }
.legend button {
  font:inherit; font-size:12.5px; color:var(--ink); background:none; border:0; padding:2px 6px;
  border-radius:5px; cursor:pointer;
}
.legend button:hover { background:var(--wash) } .legend .off { opacity:.4 }
.legend i, .tip i {
  display:inline-block; width:10px; height:10px; border-radius:3px; margin-right:6px;
}
.tip {
  display:none; position:absolute; pointer-events:none; background:#fff; z-index:1;
  border:1px solid #c3cbd3; border-radius:6px; padding:5px 9px; font-size:12.5px;
  box-shadow:0 2px 8px #1d273326; font-variant-numeric:tabular-nums;
}
.cross { stroke:#9aa3ad; stroke-width:.6 } .frame { fill:#3d5bd922; stroke:#3d5bd9 }
.zoomed text { font-size:8.5px; fill:var(--muted) }
[clip-path] path { vector-effect:non-scaling-stroke }
.facts { display:flex; flex-wrap:wrap; gap:10px 40px; margin-top:22px }
.facts b { display:block; font-size:23px; line-height:1.25; font-variant-numeric:tabular-nums }
.facts span { color:var(--muted); font-size:13px }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums }
th,td {
  text-align:left; padding:7px 14px 7px 0; border-bottom:1px solid var(--line);
  vertical-align:top;
}
th { color:var(--muted); font-weight:500; font-size:13px } tr:last-child td { border-bottom:0 }
td.n,th.n { text-align:right } td.n { white-space:nowrap }
.good { color:var(--good) } .bad { color:var(--bad) }
.problems { border-left:4px solid #e3a11f } .problems ul { margin:6px 0 0; padding-left:20px }
pre {
  background:var(--wash); border:1px solid var(--line); border-radius:6px; padding:10px 12px;
  margin:6px 0; font:12.5px/1.5 ui-monospace,"DejaVu Sans Mono",monospace; white-space:pre-wrap;
  overflow-wrap:anywhere; max-height:15em; overflow:auto;
}
summary { cursor:pointer; font-weight:600 } details[open] summary { margin-bottom:8px }
.tag { white-space:nowrap; width:1%; font-size:13px; color:var(--muted) }
.tag b { color:var(--ink) }
@media (max-width:700px) {
  main { padding:18px 10px 40px } section { padding:14px 12px; overflow-x:auto }
  table { font-size:13.5px } th,td { padding-right:8px; overflow-wrap:anywhere }
  td.n,th.n { overflow-wrap:normal }
  .panels { grid-template-columns:minmax(0,1fr) } .facts { gap:8px 22px }
  td.tag { display:block; width:auto; white-space:normal; border:0; padding-bottom:0 }
  td.tag + td { display:block }
}
"""


def page_of(title: str, body: str) -> str:
    """A self-contained page: it needs neither other files nor the network."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # so that a browser asks no server for one
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main><script>{SCRIPT.read_text(encoding='utf-8')}</script>"
        "</body></html>\n"
    )


def section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="note">{note}</p>{body}</section>'
