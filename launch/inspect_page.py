"""The page that `tessera inspect html=FILE` fills in: no script, no font, no file beside it."""

from string import Template

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fbfbfa; --ink: #1c1c1c; --quiet: #6b6b6b;
  --line: #dcdcd8; --card: #ffffff; --trained: #bfe8c4; --special: #7a3fb0; --label: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --page: #161616; --ink: #e8e8e6; --quiet: #9a9a96; --line: #383836;
    --card: #1e1e1e; --trained: #1f5a2c; --special: #c99bf0; --label: #7fbaf5; } }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--page);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .8rem; }
h2 { font-size: 1.05rem; margin: 0 0 .4rem; }
h3 { font-size: .85rem; font-weight: 500; margin: .9rem 0 .3rem; padding-top: .5rem;
  border-top: 1px solid var(--line); color: var(--quiet); }
small, .note, caption, th { color: var(--quiet); font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .85rem; align-self: flex-start;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; white-space: nowrap; padding-bottom: .2rem; }
th, td { padding: .1rem 1rem .1rem 0; text-align: right; border-top: 1px solid var(--line); }
th:last-child, td:last-child { text-align: left; overflow-wrap: anywhere; }
section { margin: 1rem 0; padding: .9rem 1.1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; }
.legend { margin: 1.2rem 0 0; font-size: .9rem; }
.text, .t { font: 13px/1.7 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.t { box-shadow: inset -1px 0 rgb(128 128 128 / 35%); border-radius: 2px; }
.t:empty::before { content: "\\2009"; }
.t:hover { outline: 2px solid var(--label); }
.parts .t { color: var(--quiet); }
.parts .y, .y { background: var(--trained); color: var(--ink); }
.parts .s, .s { color: var(--special); font-weight: 600; }
.l { margin: 0 .25em 0 .1em; padding: 0 .35em; border: 1px solid currentColor; border-radius: 4px;
  color: var(--label); font-size: .75rem; font-weight: 600; }
.note { margin: .5rem 0 0; font-size: .85rem; }
</style>
</head>
<body>
<h1>$title</h1>
<dl>$facts</dl>
<p class="legend">$legend<br>
<span class="t s">special token</span>, &#8629; line break, &#8677; tab;
hover over a token for its id, position, segment and target</p>
<div class="tables">$tables</div>
$rows
</body>
</html>
""")
