"""The example dashboard asks for figures that there are."""

import json
import re

import pytest
from processes import ROOT

from vllm_s2o.metrics.figures import ALL

DASHBOARD = json.loads((ROOT / "examples" / "grafana-s2o.json").read_text())
QUERIES = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in DASHBOARD["panels"]}
SHOWN = {name: series for series in ALL for name in series.shown}


def names(query: str) -> set[str]:
    return set(re.findall(r"vllm_\w+", query))


@pytest.mark.parametrize("query", [query for queries in QUERIES.values() for query in queries])
def test_a_query_names_what_there_is(query):
    assert names(query)
    assert names(query) <= set(SHOWN)
    labels = {label for name in names(query) for label in (*SHOWN[name].labels, "le", "instance")}
    for grouped in re.findall(r"by \(([^)]*)\)", query):
        assert set(grouped.split(", ")) <= labels
    for kind in ("rate", "increase"):
        for name in re.findall(rf"{kind}\((\w+)", query):
            assert SHOWN[name].kind != "gauge"


def test_every_figure_is_shown():
    asked = set().union(*(names(query) for queries in QUERIES.values() for query in queries))
    assert [series.name for series in ALL if not asked & set(series.shown)] == []


def test_readme_has_every_figure_with_its_labels():
    text = (ROOT / "README.md").read_text()
    told = re.findall(r"`(vllm_s2o_\w+)(?:\{([^}]*)\})?`", text.partition("\n## Metrics\n")[2])
    known = {series.name if series.kind == "histogram" else series.shown[0]: series.labels for series in ALL}
    assert {name: tuple(labels.split(", ")) if labels else () for name, labels in told} == known


def test_legends_name_labels():
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            labels = {label for name in names(target["expr"]) for label in SHOWN[name].labels}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels | {"le", "instance"}


def test_servers_are_chosen_by_a_figure_that_there_is():
    (variable,) = [v for v in DASHBOARD["templating"]["list"] if v["name"] == "instance"]
    assert names(variable["query"]) <= set(SHOWN)
    assert all('instance=~"$instance"' in query for queries in QUERIES.values() for query in queries)


def test_panels_have_places_of_their_own():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
