"""Thresholds and segment length for a budget: over all layers, and over the logits that the whole model ends with."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from vllm_s2o.config import ModelTraits, ResolvedConfig
from vllm_s2o.config_file import ConfigFile
from vllm_s2o.params import S2OParams
from vllm_s2o.quality import cost
from vllm_s2o.quality.capture import Source
from vllm_s2o.quality.parts import Parts

from . import file, search
from .curves import Curves
from .search import Budget, CalibrationError, Choice
from .speed import ranking_cost

NEAR = 0.8
"""A divergence is close enough to the budget from this share of it on: a run of the model takes a minute."""

LOOSEST = 0.5
"""The largest relative error of a layer that is tried for a divergence."""


def with_changes(params: S2OParams, **changes: Any) -> S2OParams:
    """Validated, as `model_copy` is not."""
    try:
        return S2OParams(**{**params.model_dump(exclude={"budget"}), **changes})
    except ValidationError as error:
        raise CalibrationError(f"These parameters cannot be used: {error.errors()[0]['msg']}.") from error


def cheapest(
    budget: Budget, curves: dict[str, list[Curves]], params: dict[str, S2OParams], traits: ModelTraits
) -> tuple[str, list[Choice]]:  # fmt: skip
    """The best segment length's choices: the cheapest at an error, the one that errs least at a density."""
    found, lowest = dict[str, tuple[float, list[Choice]]](), 1.0
    allowed = budget.max_relative_error or 0.0  # of no use where a density is given
    for rule in curves:
        ranking = ranking_cost(params[rule], traits)
        if budget.target_density is not None:
            choices = search.within_density(curves[rule], budget.target_density)
            density = search.mean_density(choices)
            lowest = min(lowest, density)
            if density <= budget.target_density:
                found[rule] = sum(choice.error for choice in choices), choices
        else:
            choices = [search.within_error(layer, allowed) for layer in curves[rule]]
            found[rule] = search.mean_density(choices) + ranking, choices
    if not found:
        raise CalibrationError(
            search.unreachable(budget.target_density or 0.0, [params[rule].segment_len for rule in curves], lowest)
        )
    rule = min(found, key=lambda rule: found[rule][0])
    return rule, found[rule][1]


def within_kl(
    allowed: float, source: Source, curves: dict[str, list[Curves]], params: dict[str, S2OParams], rules: dict,
    ids: list[int], parts: Parts, progress: Callable[[str, int], object], runs: int = 6,
) -> tuple[str, list[Choice], float]:  # fmt: skip
    """The cheapest choices whose next tokens stay within a divergence, measured on one prompt.

    What a run measured is kept in `parts` under the config's digest: after an interruption it is not run again.
    """
    model, best = None, None
    error, fits, exceeds = 3e-3, 0.0, math.inf
    for run in range(runs):
        rule, choices = cheapest(Budget(max_relative_error=error), curves, params, source.traits)
        kl = 0.0
        if not all(choice.dense for choice in choices):
            config = as_config(source.traits, choices, params[rule], rules[rule].values)
            name = f"logits of {config.digest()}"
            if (name, 0) not in parts.done:
                progress(f"run {run + 1} of at most {runs}, for logits", 0)
                model = model or source.load()
                parts.add(name, 0, {"kl": cost.measure(model, ids, config)[0].kl})
            kl = parts.done[name, 0]["kl"]
            if kl <= allowed and (best is None or search.mean_density(choices) < search.mean_density(best[1])):
                best = rule, choices, kl
        if NEAR * allowed <= kl <= allowed or (kl <= allowed and error == LOOSEST):
            break
        fits, exceeds = (max(fits, error), exceeds) if kl <= allowed else (fits, min(exceeds, error))
        # The divergence is about in proportion to the error; a little less of it, so as to end below.
        error = min(LOOSEST, error * min(10, max(0.1, 0.9 * allowed / max(kl, 1e-12))))
        if not fits < error < exceeds:
            error = math.sqrt(fits * exceeds)
    if best is None:
        raise CalibrationError(f"No thresholds kept the divergence of logits at {allowed:g} or below in {runs} runs.")
    return best


def as_config(
    traits: ModelTraits, choices: Sequence[Choice], params: S2OParams, values: Sequence[float]
) -> ResolvedConfig:
    """A config of these choices and of nothing else: no shipped file lies below it. Sparse at every length."""
    common, layers = file.overrides(choices, values, traits.num_heads // traits.num_kv_heads)
    given = {
        "params": with_changes(params, threshold=common).model_dump(exclude={"budget"}),
        "layers": layers,
        "min_seq_len": 1,
    }
    return ResolvedConfig(ConfigFile.model_validate(given), traits, "a candidate", "path")
