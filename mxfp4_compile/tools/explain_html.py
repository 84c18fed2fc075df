"""An explanation as one HTML page: no scripts, nothing loaded from elsewhere, every value escaped."""

from __future__ import annotations

from html import escape
from math import prod

from ..text import size
from .explain import Explanation, SiteExplanation

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --back: #fff; --box: #f6f8fa;
  --good: #116329; --bad: #a40e26; --new: #dafbe1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --back: #0d1117;
  --box: #161b22; --good: #56d364; --bad: #ff9492; --new: #12361f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 100rem; color: var(--ink); background: var(--back);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p, ul { margin: .4rem 0; max-width: 60rem; } ul { padding-left: 1.3rem; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
article { border: 1px solid var(--line); border-radius: .5rem; padding: 1.1rem 1.25rem; margin: 1.5rem 0; }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem .8rem; margin: 0;
  overflow: auto; max-height: 34rem; tab-size: 2; }
mark { background: var(--new); color: inherit; display: inline-block; min-width: 100%; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
td:first-child { min-width: 9rem; } .pair + details { margin-top: 1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 1rem; }
.pair > div { min-width: 0; } .pair h4 { margin: 0 0 .3rem; font-size: .9rem; color: var(--soft); }
.badge { display: inline-block; border: 1px solid currentColor; border-radius: 1rem; padding: 0 .6rem;
  font-size: .85rem; font-weight: 600; } summary { cursor: pointer; padding: .2rem 0; } a { color: inherit; }
.big { font-size: 1.5rem; font-weight: 600; margin: .2rem 0 .8rem; } .big .soft { font-size: 1rem; font-weight: 400; }
section { margin: 1.2rem 0 2rem; }
@media (max-width: 45rem) {
  body { padding: 1.2rem .8rem 3rem; } article { padding: .8rem; } table, tbody, tr, td { display: block; }
  thead { display: none; } tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  td, td.n { border: 0; text-align: left; padding: .1rem 0; white-space: normal; }
  td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); }
}
pre:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
"""


def page(explanation: Explanation) -> str:
    """The whole page, as text to be written in UTF-8."""
    sites = explanation.sites
    count = sum(len(site.names) for site in sites)
    rows = "".join(_row(i, site) for i, site in enumerate(sites))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(explanation.model)}: MXFP4 experts</title><style>{_STYLE}</style></head><body><main>"
        f"<header><h1>{escape(explanation.model)}</h1>"
        f'<p class="soft">What mxfp4_compile.optimize would make of {_count(count, "mixture-of-experts module")}, '
        f"{len(sites)} of them distinct. Nothing was changed.</p></header>{_summary(explanation)}<h2>By module</h2>"
        '<div class="scroll" role="region" aria-label="Overview" tabindex="0"><table><caption hidden>Overview</caption>'
        '<thead><tr><th scope="col">modules</th><th scope="col">outcome</th><th scope="col">backend</th>'
        '<th scope="col" class="n">weights now</th><th scope="col" class="n">in MXFP4</th>'
        '<th scope="col" class="n">quantization error</th><th scope="col" class="n">kernel error</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f"{''.join(_site(i, site) for i, site in enumerate(sites))}</main></body></html>\n"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _summary(explanation: Explanation) -> str:
    """The whole model: parameters and bytes of what becomes MXFP4 and of the rest, before and after."""
    served = [s for s in explanation.sites if s.measured is not None and not s.measured.failure]
    experts = sum(len(s.names) * sum(prod(w.shape) for w in s.weights) for s in served)
    before = sum(len(s.names) * s.bytes_before for s in served)
    after = sum(len(s.names) * s.measured.bytes_after for s in served if s.measured is not None)
    rest = explanation.bytes - before
    if not served or rest < 0:
        return ""
    share = lambda count: f"{count / max(explanation.parameters, 1):.1%}"
    rows = [
        ("experts that become MXFP4", f"{experts:,}", share(experts), size(before), size(after)),
        ("everything else, as it is", f"{explanation.parameters - experts:,}", share(explanation.parameters - experts),
         size(rest), size(rest)),
        ("whole model", f"{explanation.parameters:,}", share(explanation.parameters), size(explanation.bytes),
         size(rest + after)),
    ]  # fmt: skip
    titles = ("part", "parameters", "share", "now", "with MXFP4 experts")
    return (
        f'<section aria-labelledby="whole"><h2 id="whole">The whole model</h2>'
        f'<p class="big">{size(explanation.bytes)} &rarr; {size(rest + after)} '
        f'<span class="soft">({explanation.bytes / max(rest + after, 1):.2f} times smaller)</span></p>'
        f'<table><thead><tr><th scope="col">{titles[0]}</th>'
        + "".join(f'<th scope="col" class="n">{title}</th>' for title in titles[1:])
        + "</tr></thead><tbody>"
        + "".join(
            f"<tr><td>{row[0]}</td>"
            + "".join(_cell(title, value) for title, value in zip(titles[1:], row[1:], strict=True))
            + "</tr>"
            for row in rows
        )
        + '</tbody></table><p class="soft">Two errors are told apart below. '
        "<strong>Quantization error</strong>: the MXFP4 weights against the weights as they are, squared and relative. "
        "<strong>Kernel error</strong>: what the backend computes against the original module on the same "
        "dequantized weights in fp32.</p></section>"
    )


def _cell(title: str, value: str) -> str:
    """A number, with its column's title for narrow screens."""
    return f'<td class="n" data-label="{title}">{value}</td>'


def _row(index: int, site: SiteExplanation) -> str:
    m = site.measured
    total, n = site.bytes_before * len(site.names), len(site.names)
    good = m is not None and not m.failure
    return (
        f'<tr><td><a href="#site{index}"><code>{escape(_range(site.names))}</code></a> ({n})</td>'
        f'<td data-label="outcome">{_badge(site)}</td><td data-label="backend">{escape(site.backend) or "–"}</td>'
        + _cell("weights now", size(total) if total else "–")
        + _cell("in MXFP4", size(m.bytes_after * n) if m is not None and good else "–")
        + _cell("quantization error", f"{m.weight_error_mean:.2g}" if m is not None and good else "–")
        + _cell("kernel error", f"{m.error:.2g}" if m is not None and good else "–")
        + "</tr>"
    )


def _range(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _badge(site: SiteExplanation) -> str:
    failed = site.measured is not None and bool(site.measured.failure)
    good = site.outcome in ("fused", "split") and not failed
    return f'<span class="badge {"good" if good else "bad"}">{"failed" if failed else escape(site.outcome)}</span>'


def _site(index: int, site: SiteExplanation) -> str:
    parts = [
        f'<article id="site{index}" aria-labelledby="h{index}"><h2 id="h{index}">{escape(_range(site.names))} '
        f"{_badge(site)}</h2>",
        f'<p class="soft">{_count(len(site.names), "module")} of class <code>{escape(site.module_class)}</code></p>',
    ]
    if len(site.names) > 1:
        names = "".join(f"<li><code>{escape(name)}</code></li>" for name in site.names)
        parts.append(f"<details><summary>Names of the {len(site.names)} modules</summary><ul>{names}</ul></details>")
    if site.reason:
        parts.append(f"<p>{escape(site.reason)}</p>")
    if not site.spec:
        return "".join(parts) + "</article>"
    parts.append("<h3>What it computes</h3><ul>" + "".join(f"<li>{escape(w)}</li>" for w in site.words))
    parts.append(f"<li>called as <code>{escape(site.call)}</code></li></ul>")
    parts.append("<h3>Weights</h3><ul>" + "".join(f"<li>{escape(str(w))}</li>" for w in site.weights) + "</ul>")
    others = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in site.others)
    parts.append(
        f"<h3>Backend</h3><p><strong>{escape(site.backend)}</strong>, layout {escape(site.layout)}, on "
        f"{escape(site.device)}.</p>"
        + (f"<details><summary>Why none of the others</summary><ul>{others}</ul></details>" if others else "")
    )
    parts.append("<h3>Bytes and verification</h3>" + _measured(site))
    parts.append(
        f'<h3>Graph</h3><div class="pair"><div><h4 id="b{index}">before: as captured</h4>'
        f"{_code(site.captured, f'b{index}', wrap=True)}</div>"
        f'<div><h4 id="a{index}">after: what takes its place</h4>'
        f"{_code(site.rewritten, f'a{index}', wrap=True)}</div></div>"
    )
    for slot, code in site.prep:
        label = f"p{index}{escape(slot)}"
        parts.append(
            f'<details><summary id="{label}">How <code>{escape(slot)}</code> is prepared</summary>'
            f"{_code(code, label)}</details>"
        )
    return "".join(parts) + "</article>"


def _measured(site: SiteExplanation) -> str:
    before = f"{size(site.bytes_before)} a module"
    m = site.measured
    if m is None:
        return f"<p>Weights: {before} now. Not measured.</p>"
    if m.failure:
        return f'<p>Weights: {before} now.</p><p class="bad">Verification failed: {escape(m.failure)}</p>'
    ratio = site.bytes_before / max(m.bytes_after, 1)
    warnings = "".join(f'<p class="bad">{escape(w)}</p>' for w in m.warnings)
    return (
        f"<ul><li>Weights: {before} now, {size(m.bytes_after)} in MXFP4: {ratio:.2f} times smaller.</li>"
        f"<li><strong>Quantization error</strong>, MXFP4 weights against the weights as they are: squared, relative, "
        f"{m.weight_error_mean:.3g} on average, {m.weight_error_max:.3g} for the worst expert.</li>"
        f"<li><strong>Kernel error</strong>, {escape(site.backend)} against the original module on the same "
        f"dequantized weights in fp32: relative, {m.error:.2g}; the original in its own dtype is at "
        f"{m.original_error:.2g}, and {m.limit:.2g} is allowed. Verified on "
        f"<code>{escape(m.name)}</code>.</li></ul>{warnings}"
    )


def _code(text: str, label: str, wrap: bool = False) -> str:
    lines = []
    for line in text.splitlines():
        shown = escape(line) or " "
        lines.append(f"<mark>{shown}</mark>" if "mxfp4." in line else shown)
    kind = ' class="wrap"' if wrap else ""
    body = "\n".join(lines)
    return f'<pre{kind} tabindex="0" role="region" aria-labelledby="{label}"><code>{body}</code></pre>'


__all__ = ["page"]
