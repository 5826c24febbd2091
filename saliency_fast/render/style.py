"""The page's style sheet: system fonts, light and dark, and paper."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #f6f6f4; --card: #ffffff; --ink: #1b1d21; --soft: #5d636d; --line: #e1e2e4;
  --bar: #d9dde3; --accent: #b3372f; --good: #2f7d4f; --bad: #b3372f; --code: #f0f0ee;
  --for: #e08a5b; --against: #6f9fdc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1c1f24; --ink: #e9eaec; --soft: #a0a6b0; --line: #30343b;
    --bar: #3a3f48; --accent: #ee8b78; --good: #74c796; --bad: #ee8b78; --code: #262a31;
    --for: #b5643c; --against: #3f6fae;
  }
}
* { box-sizing: border-box; }
html { font-size: 16px; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
.page { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.5rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.015em; }
h2 { font-size: 1.125rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: 1rem; line-height: 1.3; margin: 0; }
.lead { max-width: 46rem; margin: 0; color: var(--soft); }
.soft { color: var(--soft); }
.small { font-size: .8125rem; }
code, pre {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  font-size: .8125rem;
}
.legends { display: grid; gap: 1rem 2rem; margin: 1.5rem 0 1.75rem;
  grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
.ramp { height: .75rem; border-radius: .375rem; margin: .3rem 0 .25rem; background-color: #777; }
.ends { display: flex; justify-content: space-between; gap: 1rem; font-size: .8125rem;
  color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  padding: 1.25rem 1.5rem 1.5rem; margin: 0 0 1.25rem; }
.head { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem;
  padding-bottom: .75rem; margin-bottom: 1.25rem; border-bottom: 1px solid var(--line); }
.verdict { margin-left: auto; font-size: .9375rem; }
.right { color: var(--good); font-weight: 600; }
.wrong { color: var(--bad); font-weight: 600; }
.columns { display: grid; gap: 1.5rem 2rem; grid-template-columns: 14rem minmax(0, 1fr); }
.maps { display: grid; gap: 1.75rem 2rem; align-content: start;
  grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); }
.method { border-top: 2px solid var(--line); padding-top: .6rem; }
.method > p { margin: .1rem 0 .75rem; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .75rem;
  max-width: 36rem; }
figure { margin: 0; }
figcaption { font-size: .8125rem; color: var(--soft); margin-top: .3rem; }
.frame { position: relative; border-radius: .375rem; overflow: hidden; line-height: 0;
  background: #000; }
.frame img { display: block; width: 100%; height: auto; }
.frame img.pixels { image-rendering: pixelated; }
.box { position: absolute; border: 1.5px dashed #19e3b1; border-radius: 2px;
  filter: drop-shadow(0 0 1px #000); }
.ranking { list-style: none; margin: 1rem 0 0; padding: 0; font-size: .875rem; }
.ranking li { margin: 0 0 .55rem; }
.ranking .row { display: flex; justify-content: space-between; gap: 1rem; }
.ranking .name { overflow-wrap: anywhere; }
.ranking .track { height: .25rem; border-radius: .125rem; background: var(--bar); }
.ranking .fill { height: 100%; border-radius: .125rem; background: var(--soft); }
.ranking .first { font-weight: 600; }
.ranking .first .fill { background: var(--accent); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem;
  margin: .8rem 0 0; font-size: .8125rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--code); border-radius: .5rem; padding: .75rem 1rem; margin: .4rem 0 1.25rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 2rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
.notice { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--bad);
  border-radius: .5rem; padding: .6rem 1rem; margin: 1.25rem 0 0; }
header + .card, main > .card:first-child, .notice + .card { margin-top: 1.5rem; }
.verdicts { list-style: none; margin: 0; padding: 0; }
.verdicts li { display: grid; grid-template-columns: 1.5rem minmax(0, 1fr); margin: 0 0 .35rem;
  color: var(--ink); }
.verdicts .mark { font-weight: 700; }
.verdicts .good .mark { color: var(--good); }
.verdicts .bad .mark { color: var(--bad); }
.verdicts .soft .mark { color: var(--soft); }
.plain { margin: 0 0 1rem; padding-left: 1.2rem; }
.card > p { margin: 0 0 .9rem; max-width: 52rem; }
.wide { overflow-x: auto; position: relative; }
table { border-collapse: collapse; font-size: .875rem; }
caption { text-align: left; color: var(--soft); font-size: .8125rem; padding: 0 0 .6rem;
  max-width: calc(100vw - 6rem); }
th { font-weight: 600; text-align: left; vertical-align: bottom; }
.means { width: 100%; }
.means td, .means thead th { text-align: right; }
.means thead tr:first-child th:first-child { text-align: left; }
.means th[scope="colgroup"] { color: var(--soft); font-weight: 400; font-size: .8125rem;
  border-bottom: 1px solid var(--line); }
.means th, .means td { padding: .4rem .6rem; }
.means tbody tr:not(:first-child) > * { border-top: 1px solid var(--line); }
.means td { white-space: nowrap; vertical-align: top; }
.means tbody th { vertical-align: top; font-weight: 400; }
.means .group { color: var(--soft); font-size: .8125rem; padding-top: 1rem;
  border-bottom: 1px solid var(--soft); }
.below { display: block; color: var(--soft); font-size: .75rem; }
.star { color: var(--accent); font-size: .75rem; }
.matrix { font-size: .8125rem; }
.matrix td, .matrix th { padding: .3rem .45rem; border: 1px solid var(--line); }
.matrix th { font-weight: 400; }
.matrix td { text-align: right; }
.pairs { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); }
.options td, .options th { padding: .25rem 1.25rem .25rem 0; vertical-align: top; }
.options tbody th { font-weight: 400; }
.options td:last-child { color: var(--soft); }
.options thead th { color: var(--soft); font-weight: 400; font-size: .8125rem; }
summary { cursor: pointer; font-size: .875rem; margin: .6rem 0 .3rem; }
.plot { display: block; width: 100%; max-width: 46rem; height: auto; border-radius: .375rem; }
.strip { display: grid; gap: .75rem; margin: .5rem 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); max-width: 68rem; }
@media screen and (max-width: 52rem) {
  .columns { grid-template-columns: minmax(0, 1fr); }
  .maps { grid-template-columns: minmax(0, 1fr); }
  .input { max-width: 14rem; }
  .verdict { margin-left: 0; }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --bar: #ddd; }
  html { font-size: 9.5px; }
  body { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .page { padding: 0; max-width: none; }
  .card { break-inside: avoid; padding: 1rem 1.25rem; }
  .columns { grid-template-columns: 12rem minmax(0, 1fr); }
  .maps { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.25rem 1.5rem; }
  .pair { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
"""
