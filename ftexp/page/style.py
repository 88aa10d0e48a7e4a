"""How the page looks: colours, rules for screen and print, and the little script that sorts tables."""

from __future__ import annotations

import base64
import hashlib
import re

COLOURS = {  # name -> light, dark
    "paper": ("#ffffff", "#14171a"),
    "card": ("#f5f6f7", "#1d2125"),
    "ink": ("#1b1f23", "#e6e8ea"),
    "soft": ("#57606a", "#a3abb3"),
    "rule": ("#d5d9dd", "#3a4148"),
    "accent": ("#0b5cad", "#6cb2ff"),
    "win": ("#116329", "#6fd08c"),
    "loss": ("#a40e26", "#ff9492"),
    "warn": ("#8a4b00", "#f0b45c"),
    "faint": ("#8b949e", "#7d8790"),
    "s0": ("#0b5cad", "#6cb2ff"),
    "s1": ("#b3400a", "#ff9d6b"),
    "s2": ("#0f6e5f", "#5fd0ba"),
    "s3": ("#8b2a8f", "#e39be6"),
    "s4": ("#6b5900", "#d9c25a"),
    "s5": ("#4a4fb8", "#a9aefc"),
    "s6": ("#9b1c4b", "#ff9dbd"),
    "s7": ("#3f6212", "#a8d36a"),
}
"""Text stands out from `paper` and `card` by a ratio of 4.5 at least, lines by 3 (WCAG 2.2, 1.4.3 and 1.4.11)."""
TEXT = ("ink", "soft", "accent", "win", "loss", "warn", *(f"s{n}" for n in range(8)))


def _set(which: int) -> str:
    return "".join(f"--{name}:{pair[which]};" for name, pair in COLOURS.items())


LIGHT, DARK = f".plot{{{_set(0)}}}", f":root{{{_set(1)}}}"

PLOT = """
.plot{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
.plot text{fill:var(--soft)}
.plot .paper{fill:var(--paper)}
.plot .end{text-anchor:end}
.plot .mid{text-anchor:middle}
.plot .title{fill:var(--ink)}
.plot .tag{fill:var(--ink);font-weight:600}
.plot path{fill:none}
.plot .grid,.plot .rail{stroke:var(--rule);stroke-width:1}
.plot .axis,.plot .tick{stroke:var(--faint)}
.plot .line{stroke:var(--faint);stroke-width:1.5}
.plot .level{stroke:var(--soft);stroke-dasharray:2 4}
.plot .front{stroke:var(--accent);stroke-width:1.5}
.plot .run:hover .line{stroke-width:4}
.plot .best .line{stroke:var(--accent);stroke-width:3;stroke-opacity:1}
.plot .pruned .line{stroke:var(--warn);stroke-dasharray:5 3;stroke-width:1.2}
.plot .failed .line{stroke:var(--loss);stroke-dasharray:1 3}
.plot.dense .plain .line,.plot.dense .pruned .line{stroke-width:.8;stroke-opacity:.55}
.plot .sign{stroke:var(--warn);stroke-width:2}
.plot .sign.failed{stroke:var(--loss);fill:var(--loss)}
.plot .dot{fill:var(--paper);stroke:var(--faint);stroke-width:1.5}
.plot .dot.best,.plot .bar.best{fill:var(--accent);stroke:var(--accent)}
.plot circle.dot.front{fill:var(--paper);stroke:var(--accent);stroke-width:2.5}
.plot .bar{fill:var(--faint)}
.plot .span{stroke:var(--soft);stroke-width:1.5}
.plot .span.best{stroke:var(--accent);stroke-width:2}
.plot .dot.same{fill:var(--soft);stroke:var(--soft)}
""" + "".join(
    f".plot .s{n} .line{{stroke:var(--s{n});stroke-width:2}}.plot .dot.s{n}{{fill:var(--s{n});stroke:var(--s{n})}}"
    f".plot .tag.s{n}{{fill:var(--s{n})}}\n"
    for n in range(8)
)

SHEET = (
    f":root{{color-scheme:light dark;{_set(0)}}}@media (prefers-color-scheme:dark){{{DARK}}}"
    + PLOT
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans",sans-serif}
header,main{max-width:1160px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:0 0 10px}
h3{font-size:1rem;margin:22px 0 6px;overflow-wrap:anywhere}
section{margin:36px 0;scroll-margin-top:12px}
p{margin:6px 0;max-width:78ch}
a{color:var(--accent)}
.soft{color:var(--soft)}
.warn{color:var(--warn)}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:12px 0 0}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.skip{position:absolute;left:-999px}
.skip:focus{left:8px;top:8px;background:var(--paper);padding:6px}
.card{display:flex;flex-wrap:wrap;gap:1px;background:var(--rule);border:1px solid var(--rule);border-radius:6px;
overflow:hidden;margin:0}
.card>div{flex:1 1 310px;min-width:0;background:var(--card);padding:14px 16px}
.card .wide{flex-basis:100%}
dt{color:var(--soft);font-size:.875rem}
dd{margin:2px 0 0;overflow-wrap:anywhere}
dd strong{font-size:1.15rem}
dd ul{margin:4px 0;padding-left:18px}
pre{margin:4px 0 0;white-space:pre-wrap;overflow-wrap:anywhere;font:.9rem/1.45 ui-monospace,Menlo,Consolas,monospace}
.told{padding-left:20px;max-width:90ch}
.told li{overflow-wrap:anywhere}
.scroll{overflow:auto;max-height:34rem;border:1px solid var(--rule);border-radius:6px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.9375rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 9px;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
tr:last-child>*{border-bottom:0}
thead>tr>*{position:sticky;top:0;z-index:1;background:var(--card);font-weight:600;white-space:nowrap;
vertical-align:bottom}
.num{text-align:right;white-space:nowrap}
tbody th{font-weight:400;min-width:11.5rem;overflow-wrap:anywhere}
table.small tbody th{min-width:0;overflow-wrap:break-word}
table.slim{width:auto;min-width:min(100%,26rem)}
td:first-child{white-space:nowrap}
tr.best>*{font-weight:600}
tr.base>*,tr.unfinished>*{color:var(--soft)}
tr.lead>*{border-bottom:2px solid var(--faint)}
th button{all:unset;cursor:pointer;text-decoration:underline dotted;text-underline-offset:3px}
th button:focus-visible{outline:3px solid var(--accent)}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
svg.strip{display:block;width:240px;max-width:none}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:24px;align-items:start}
figure{margin:0}
figure .plot{width:100%;max-width:640px;height:auto;display:block}
figcaption{font-size:.9375rem;color:var(--soft);max-width:70ch}
.key{list-style:none;padding:0;margin:0;columns:auto 20rem;font-size:.9375rem}
.key li{overflow-wrap:anywhere;break-inside:avoid;padding:2px 0}
.key svg{width:34px;height:12px;margin-right:8px;vertical-align:middle}
.show{border:0;padding:0;margin:10px 0;display:flex;flex-wrap:wrap;gap:6px 18px}
.show legend{float:left;margin-right:12px;padding:0}
.show label{cursor:pointer}
.rows{list-style:none;padding:0;margin:0}
.rows>li{border-top:1px solid var(--rule);padding:14px 0}
.head{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline;font-size:.9rem;color:var(--soft)}
.win .what{color:var(--win);font-weight:700}
.loss .what{color:var(--loss);font-weight:700}
.texts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,260px),1fr));gap:10px 24px;margin:8px 0 0}
.texts dd{white-space:pre-wrap}
.asked{white-space:pre-wrap;overflow-wrap:anywhere;margin:4px 0 0;max-width:none}
main:has(#show-win:checked) .rows>li:not(.win),main:has(#show-loss:checked) .rows>li:not(.loss),
main:has(#show-same:checked) .rows>li:not(.same){display:none}
main{padding-bottom:40px}
@media (max-width:1000px){svg.strip{width:150px}figure .plot text{font-size:13.5px}}
@media (max-width:600px){
body{font-size:15px}
header,main{padding-left:14px;padding-right:14px}
figure .plot text{font-size:15px}
}
@media print{
:root{color-scheme:light;"""
    + _set(0)
    + """}
body{font-size:10pt}
header,main{max-width:none;padding:0}
nav,.show,.skip{display:none}
.scroll{max-height:none;overflow:visible;border:0}
thead>tr>*{position:static}
table{font-size:8pt}
th,td{padding:2px 5px}
tbody th{min-width:0}
section{margin:18pt 0}
figure,tr,.rows>li,.card>div{break-inside:avoid}
h2,h3{break-after:avoid}
svg.strip{width:120px}
.rows>li:nth-child(n+13){display:none}
.printed{display:block}
}
@media screen{.printed{display:none}}
"""
)

SCRIPT = """
document.querySelectorAll('table.sort').forEach(function(table){
var body=table.tBodies[0];
function key(row,n){var c=row.cells[n];return c.classList.contains('num')?parseFloat(c.textContent):c.textContent}
table.querySelectorAll('thead th').forEach(function(head,n){
var button=document.createElement('button');button.type='button';button.textContent=head.textContent;
head.textContent='';head.appendChild(button);
button.addEventListener('click',function(){
var up=head.getAttribute('aria-sort')!=='ascending';
table.querySelectorAll('thead th').forEach(function(h){h.removeAttribute('aria-sort')});
head.setAttribute('aria-sort',up?'ascending':'descending');
var rows=Array.from(body.rows).filter(function(r){return !r.classList.contains('base')});
rows.sort(function(a,b){var x=key(a,n),y=key(b,n);
if(typeof x==='number'&&typeof y==='number'){
if(isNaN(x)||isNaN(y))return isNaN(x)-isNaN(y);return up?x-y:y-x}
return (up?1:-1)*String(x).localeCompare(String(y),undefined,{numeric:true})});
rows.forEach(function(r){body.appendChild(r)})})})});
"""
HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{HASH}'; base-uri 'none'; form-action 'none'"
)
"""What a browser may load for the page: nothing; and run: this script alone."""


def contrast(one: str, other: str) -> float:
    """Ratio of the luminances of two colours (WCAG 2.2).

    >>> round(contrast("#000000", "#ffffff"))
    21
    """
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(part, 16) / 255 for part in re.findall("..", colour[1:])]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
