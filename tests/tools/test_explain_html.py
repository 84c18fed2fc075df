"""explain --html: one page, valid, self-contained, and escaped."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mxfp4_compile.text import size
from mxfp4_compile.tools.explain import Measured, explain_model
from mxfp4_compile.tools.explain_html import page
from mxfp4_compile.tools.families import tiny_model
from mxfp4_compile.tools.main import main

_VOID = {"meta", "br", "hr", "link", "img"}


class _Page(HTMLParser):
    """Checks nesting, and collects tags, ids and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        assert "onclick" not in values and "style" not in values
        for name, value in attrs:
            if name in ("href", "src"):
                self.links.append(value or "")
            elif name == "id":
                self.ids.append(value or "")
            elif name == "aria-labelledby":
                self.labels.append(value or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _check(text: str) -> _Page:
    seen = _Page(text)
    assert not seen.tags & {"script", "img", "link", "iframe"}
    assert all(link.startswith("#") and link[1:] in seen.ids for link in seen.links)
    assert len(seen.ids) == len(set(seen.ids)) and set(seen.labels) <= set(seen.ids)
    assert "http://" not in text and "https://" not in text and "url(" not in text
    return seen


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "page.html"
    assert main(["explain", "--family", "gpt_oss", "--html", str(target)]) == 0
    seen = _check(target.read_text(encoding="utf-8"))
    for part in ("fused", "silu(gate)*up", "Verified on", "times smaller", "mxfp4.moe", "_grouped_mm", "before"):
        assert part in seen.text, part
    assert "page.html" in capsys.readouterr().err
    for part in ("The whole model", "Quantization error", "Kernel error", "Why none of the others"):
        assert part in seen.text, part


def test_the_summary_is_of_the_whole_model() -> None:
    model = tiny_model("qwen3_moe", layers=2, dtype=torch.bfloat16)
    explanation = explain_model(model, "m", measure=True)
    parameters = list(model.parameters())
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    total, moved = sum(p.nbytes for p in parameters), sum(p.nbytes for p in experts)
    count, held = sum(p.numel() for p in parameters), sum(p.numel() for p in experts)
    assert (explanation.parameters, explanation.bytes) == (count, total)
    text = page(explanation)
    after = moved * 17 // 64  # 4.25 of 16 bits
    assert f"{size(total)} &rarr; {size(total - moved + after)}" in text
    for value in (
        f"{held:,}",
        f"{held / count:.1%}",
        f"{count - held:,}",
        size(moved),
        size(after),
        size(total - moved),
    ):
        assert f">{value}</td>" in text, value
    assert "The whole model" not in page(explain_model(model, "m")), "without a measurement there is no after"


def test_nothing_gets_through_unescaped() -> None:
    evil = '<script>alert("x")</script>&\'"'
    explanation = explain_model(tiny_model("qwen3_moe", layers=1), evil)
    site = explanation.sites[0]
    bad = replace(
        site, names=(evil, evil), module_class=evil, reason=evil, call=evil, words=(evil,), backend=evil, layout=evil,
        device=evil, others=((evil, evil),), prep=((evil, evil),), rewritten=evil, captured=evil, outcome=evil,
        measured=Measured(evil, failure=evil),
    )  # fmt: skip
    good = replace(bad, measured=Measured(evil, 1, warnings=(evil,)))
    unmatched = replace(bad, spec="", weights=())
    text = page(replace(explanation, sites=(site, bad, good, unmatched)))
    _check(text.replace("http-equiv", "equiv"))
    assert evil not in text and "<script" not in text
    assert "Not measured" in text
