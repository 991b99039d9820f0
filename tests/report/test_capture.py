"""What the page says of a prompt is what S2O does to it."""

import pytest
import torch
from report_case import TOKENS

from vllm_s2o import prefill_attention
from vllm_s2o.plan import causal_pairs
from vllm_s2o.quality import cost
from vllm_s2o.quality.capture import Layer, attention_inputs, dense_attention
from vllm_s2o.quality.selection import S2O, heads_of, tiles_of
from vllm_s2o.report import capture, maps
from vllm_s2o.report.png import CLEAR, SHADES

HEAD = 3


@pytest.fixture(scope="session")
def measured(case):
    return capture.measure(case.model, case.ids, case.config, 2, HEAD)


@pytest.fixture(scope="session")
def first(case) -> Layer:
    """What enters layer 0 is the same whatever later layers do."""
    return attention_inputs(case.model, case.ids, [0])[0]


def test_layers_are_those_of_evaluate(case, measured):
    """Whose second run hands on what S2O computed, too."""
    _, layers = cost.measure(case.model, case.ids, case.config)
    figures, _ = measured
    assert [(f.layer, f.density, f.rel_error) for f in figures] == [
        (layer.layer, pytest.approx(layer.density), pytest.approx(layer.rel_error, rel=1e-3)) for layer in layers
    ]
    assert [f.sparse for f in figures] == [True, False, True]
    assert figures[1].densities == [1.0] * 4 and figures[1].errors == [0.0] * 4
    assert figures[0].density < 0.9 and len({f.density for f in figures}) == 3


def test_heads_are_those_of_the_oracle(case, measured, first):
    params = case.config.layer(0)
    out, stats = prefill_attention(
        first.query, cost.paged(first.key), cost.paged(first.value),
        block_table=torch.arange(-(-TOKENS // cost.PAGE), dtype=torch.int32)[None],
        query_start_loc=torch.tensor([0, TOKENS], dtype=torch.int32),
        seq_lens=torch.tensor([TOKENS], dtype=torch.int32),
        scale=first.scale, params=params, return_stats=True, implementation="naive",
    )  # fmt: skip
    exact = dense_attention(first)
    errors = (out - exact).square().mean((0, 2)) / exact.square().mean((0, 2))
    (figures, _) = measured
    assert figures[0].densities == pytest.approx((stats.visited_pairs / stats.causal_pairs)[0].tolist())
    assert figures[0].errors == pytest.approx(errors.tolist(), rel=1e-3)
    assert len(set(figures[0].densities)) > 1


def test_tiles_stop_where_the_rule_says(case, first):
    """Against a second implementation, which knows positions only."""
    params = case.config.layer(0)
    _, total, tiles = capture.run_layer(first, params, HEAD)
    pairs = sum(int((t.positions - t.start + 1).sum()) + len(t.positions) * t.visited for t in tiles)
    assert pairs == total[HEAD]
    assert torch.cat([t.positions for t in tiles]).sort().values.tolist() == list(range(TOKENS))
    assert all(sorted(t.ranking.tolist()) == list(range(t.start)) for t in tiles)
    rule = S2O(segment=128, tile=32, key_block=16, interval=1)
    head = list(heads_of(first.query, first.key, first.scale))[HEAD]
    selected = rule.select(head, params.threshold)
    for tile, spans, row in zip(tiles, tiles_of(TOKENS, 32), selected, strict=True):
        assert tile.positions.tolist() == list(range(spans.first, spans.end))
        chosen = row[: tile.start].nonzero()[:, 0].tolist() if spans.end < TOKENS else list(range(tile.start))
        assert sorted(tile.ranking[: tile.visited].tolist()) == chosen
    assert any(tile.visited < tile.start for tile in tiles), "nothing stopped"


def weights_of(first: Layer) -> torch.Tensor:
    """Exact attention of layer 0, in the plainest way."""
    logits = first.query[:, HEAD] @ first.key[:, HEAD // 2].T * first.scale
    return logits.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), -torch.inf).softmax(1)


@pytest.fixture(scope="session")
def drawn(case):
    return capture.measure(case.model, case.ids, case.config, 0, HEAD)[1]


def test_every_pixel_where_each_key_has_one(case, first, drawn):
    found = maps.draw(drawn, pixels=1024)
    weights = weights_of(first)
    seen = ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    assert (found.keys, found.extent, found.before.shape) == (1, 768, (TOKENS, 768))
    torch.testing.assert_close(found.before[:, :TOKENS].nan_to_num(0), weights, rtol=1e-4, atol=1e-7)
    assert torch.equal(found.before[:, :TOKENS].isnan(), ~seen) and found.before[:, TOKENS:].isnan().all()
    line, kept = 0, []
    for tile in drawn.tiles:
        for position in tile.positions.tolist():
            own = weights[position, tile.start : position + 1]
            torch.testing.assert_close(found.after[line, : len(own)], own, rtol=1e-4, atol=1e-7)
            history = found.after[line, 128 : 128 + tile.start]
            torch.testing.assert_close(history, weights[position, tile.ranking], rtol=1e-4, atol=1e-7)
            assert (
                found.after[line, len(own) : 128].isnan().all() and found.after[line, 128 + tile.start :].isnan().all()
            )
            kept.append(own.sum() + weights[position, tile.ranking[: tile.visited]].sum())
            line += 1
    assert line == TOKENS == len(found.after)
    assert found.kept == pytest.approx(torch.stack(kept).mean().item(), rel=1e-5)
    assert [(stop.lines, stop.start, stop.visited) for stop in found.stops] == [
        (len(tile.positions), tile.start, tile.visited) for tile in drawn.tiles
    ]


@pytest.mark.parametrize("pixels", [512, 100, 7])
def test_smaller_pictures_are_sums_of_some_queries(drawn, pixels):
    whole, found = maps.draw(drawn, pixels=1024), maps.draw(drawn, pixels)
    every = -(-TOKENS // pixels)
    assert max(found.before.shape) <= pixels and found.before.shape == found.after.shape
    assert sum(stop.lines for stop in found.stops) == len(found.after)
    for picture, all_lines in ((found.after, whole.after), (found.before, whole.before)):
        torch.testing.assert_close(picture.nansum(1), torch.ones(len(picture)), rtol=1e-5, atol=0)
        if picture is found.after:
            padded = torch.nn.functional.pad(all_lines[every // 2 :: every].nan_to_num(0), (0, found.keys))
            sums = padded[:, : found.before.shape[1] * found.keys].unflatten(1, (-1, found.keys)).sum(2)
            torch.testing.assert_close(picture.nan_to_num(0), sums, rtol=1e-5, atol=1e-7)


def test_shades():
    shares = torch.tensor([[torch.nan, 0.0, 1e-9, 1e-4, 1e-2, 1.0]])
    (row,) = maps.shades(shares)
    assert row[0] == CLEAR and list(row[1:4]) == [1, 1, 1] and row[5] == SHADES
    assert row[4] == round(1 + (SHADES - 1) / 2), "half way between 1e-4 and 1"


def test_the_layer_to_draw(case):
    assert capture.chosen_layer(case.config, None, 0) == 2, "0 and 2 are sparse"
    assert capture.chosen_layer(case.config, 0, 3) == 0


def test_progress_and_pairs_of_whole_prompts(case):
    told = []
    capture.measure(case.model, case.ids, case.config, 0, 0, told.append)
    assert told == [1, 1, 1]
    assert causal_pairs(TOKENS, TOKENS) == TOKENS * (TOKENS + 1) // 2
