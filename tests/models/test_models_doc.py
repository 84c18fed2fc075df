"""docs/models.md says what the library does: the page is its tables, the tables are what a new survey finds."""

from __future__ import annotations

import pytest
from surveys import generator, group, surveyed

pytest.importorskip("transformers")


doc = generator()
ROW = {"class": "Experts", "sites": 2, "outcome": "fused", "weights": "packed [E, N, K]", "activation": "silu(gate)*up",
       "gate": "halves, first activated", "biases": "no", "weighted": "output", "reason": "", "error": 4.2e-3,
       "original": 4.1e-3}  # fmt: skip


def test_the_page_is_what_the_tables_render_to() -> None:
    assert doc.PAGE.read_text(encoding="utf-8") == doc.page()


@pytest.mark.slow
def test_every_family_is_in_the_table() -> None:
    version = doc.installed_version()
    table = doc.read_table(version)
    if not table:
        pytest.skip(f"docs/ has no table for transformers {version}: python docs/generate_models.py writes it")
    assert sorted(table) == doc.families()
    for family, rows in table.items():
        assert rows
        for row in rows:
            rewritten = row["outcome"] in ("fused", "split")
            assert rewritten or row["reason"], f"{family} is refused without a reason"
            assert not rewritten or row["error"] <= 1.5 * row["original"] + 2e-3, family


def test_differences_are_found() -> None:
    old = {"a": [ROW], "b": [ROW]}
    assert doc.differences(old, {"a": [ROW | {"error": 4.9e-3}], "b": [ROW]}) == []
    assert doc.settled(old, {"a": [ROW | {"error": 4.9e-3}]}) == {"a": [ROW]}
    for change in ({"error": 8e-3}, {"error": None}, {"outcome": "split"}, {"sites": 3}, {"reason": "it is so"}):
        new = {"a": [ROW | change], "b": [ROW]}
        (found,) = doc.differences(old, new)
        assert found.startswith("a [Experts]: " + next(iter(change)))
        assert doc.settled(old, new) == new
    assert doc.differences(old, {"a": [ROW, ROW], "c": [ROW]}) == [
        "c: not in the table",
        "b: in the table, not installed",
        "a: 1 kinds of sites in the table, 2 now",
    ]


def test_a_family_is_surveyed() -> None:
    (row,) = doc.survey("gpt_oss")
    assert (row["outcome"], row["sites"], row["biases"]) == ("fused", 2, "yes")
    assert row["gate"] == "interleaved, first activated"
    assert row["weights"] == "packed [E, K, N]"
    assert 0 < row["error"] < 1.5 * row["original"]


@pytest.mark.slow
@pytest.mark.matching
@pytest.mark.parametrize("family", [pytest.param(f, marks=group(f)) for f in doc.families()])
def test_the_table_is_what_the_library_does(family: str) -> None:
    version = doc.installed_version()
    table = doc.read_table(version)
    if not table:
        pytest.skip(f"docs/ has no table for transformers {version}: python docs/generate_models.py writes it")
    assert doc.differences({family: table[family]}, {family: surveyed(family)[1]}) == []
