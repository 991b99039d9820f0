"""Calibration from the model's name to the written file.

Thresholds are chosen on one half of each text and judged on the other. Segment lengths are compared by what they visit
and by what their rankings cost; the shortest prompt that should be sparse is estimated, see `shortest`.
"""

import contextlib
import datetime
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_s2o.config import ConfigError, ModelTraits, load_config
from vllm_s2o.params import S2OParams
from vllm_s2o.quality import cost
from vllm_s2o.quality.capture import CaptureError, Source, open_model
from vllm_s2o.quality.parts import Parts, PartsError
from vllm_s2o.quality.text import SOURCES
from vllm_s2o.version import __version__

from . import file, search
from .curves import Curves, layer_curves, measure, rule_of
from .search import Budget, Choice

SPLITS = ("choosing", "held-out")

RANKING_COST = 0.008
"""Of the causal pairs, what the ranking of a long prompt costs at segments of 512: on an H100 a twentieth of the time
at a tenth of the pairs visited, and half as much again for the spread (benchmarks/lab.md). Twice the segments, twice
that."""

SPARSE_PAIR = 1.4
"""Time of a visited pair in that of a pair of dense attention: 600 TFLOP/s against 430 on an H100."""

LAUNCH = 0.4e-3 * 600e12
"""Operations that dense attention would do while S2O's kernels start, of which short prompts are full."""


class CalibrationError(RuntimeError):
    """Why there is no config, in one sentence."""


class Found(NamedTuple):
    """What was found for a model."""

    params: S2OParams
    """With the threshold that most layers have."""
    layers: tuple[Choice, ...]
    """On the half of the texts that they were chosen on."""
    held_out: tuple[Choice, ...]
    """The same thresholds on the other half."""
    thresholds: tuple[float, ...]
    """What a choice's indices name."""
    single: tuple[float, float] | None
    """The largest threshold that, alone on all sparse layers, has no worse layer on the held-out half; its density."""
    min_seq_len: int
    kl: float | None
    """On the first text; only where the budget is one of it."""

    @property
    def density(self) -> float:
        return search.mean_density(self.held_out)

    @property
    def worst_error(self) -> float:
        return max(choice.error for choice in self.held_out)


def calibrate(
    model: str, out: Path, budget: Budget, *, texts: Sequence[str] = SOURCES[:2], num_tokens: int = 8192,
    segment_lens: Sequence[int] = (256, 512), min_seq_len: int | None = None, seed: int = 0, additional: Any = None,
    progress: Callable[[str, int], object] = lambda name, layers: None,
) -> Found:  # fmt: skip
    """Search a config for a model and write it.

    Args:
        model: a directory, or a name that transformers knows.
        out: the config file; sweeps lie beside it, in FILE.parts.jsonl, until it is written.
        texts: names as in `text.pieces`.
        segment_lens: multiples of the tile size; the cheapest one is taken.
        min_seq_len: of the written config; estimated if None.
        seed: which tiles are looked at.
        additional: what is not searched, over the model's present config: as in `load_config`.
        progress: told what is done, and how many layers of it; see `steps` for how many there are.

    Raises:
        CalibrationError: in one sentence, whatever went wrong.
    """
    _check(budget, texts, num_tokens, segment_lens)
    with _one_sentence():
        source = open_model(model, num_tokens)
        base = load_config(source.traits, additional)
        params = {f"{length}": _with(base.params, segment_len=length) for length in segment_lens}
        rules = {name: rule_of(one) for name, one in params.items()}
        prompts = {f"{split}: {text}": source.prompt(text, num_tokens, split) for split in SPLITS for text in texts}
        parts = Parts(
            out.with_name(out.name + ".parts.jsonl"),
            {
                "model": model, "tokens": num_tokens, "seed": seed, "context extension": source.rope_factor,
                "methods": {name: repr(rule) for name, rule in rules.items()},
            },
        )  # fmt: skip
        measure(source, parts, prompts, rules, seed, progress)

    traits = source.traits
    names = {split: [name for name in prompts if name.startswith(split)] for split in SPLITS}
    curves = {
        (split, rule): [
            layer_curves(parts, names[split], layer, rule, traits.num_kv_heads) for layer in range(traits.num_layers)
        ]
        for split in SPLITS
        for rule in rules
    }
    kl = None
    with _one_sentence():
        if budget.max_logit_kl is not None:
            rule, choices, kl = _within_kl(
                budget.max_logit_kl, source, {rule: curves["choosing", rule] for rule in rules}, params, rules,
                prompts[names["choosing"][0]], out, progress,
            )  # fmt: skip
        else:
            rule, choices = _cheapest(budget, {rule: curves["choosing", rule] for rule in rules}, segment_lens)
    found = _found(
        choices, curves["held-out", rule], params[rule], rules[rule].values, traits, min_seq_len, num_tokens, kl
    )
    with _one_sentence():
        _write(out, found, source, base, budget, texts, num_tokens, seed)
        parts.path.unlink()
    return found


def steps(num_layers: int, num_texts: int) -> int:
    """Layers that are swept in all."""
    return num_layers * num_texts * len(SPLITS)


def _check(budget: Budget, texts: Sequence[str], num_tokens: int, segment_lens: Sequence[int]) -> None:
    given = [value for value in budget if value is not None]
    if len(given) != 1:
        raise CalibrationError("Exactly one budget is needed: a relative error, a density, or a divergence of logits.")
    if not 0 < given[0] < (1 if budget.max_logit_kl is None else math.inf):
        raise CalibrationError(
            f"The budget {budget} cannot be met: allowed is a number above 0, and below 1 but for KL."
        )
    if not texts:
        raise CalibrationError("At least one text must be named.")
    if not segment_lens or num_tokens < 2 * max(segment_lens):
        raise CalibrationError(
            f"{num_tokens} tokens hold no two segments of {max(segment_lens, default=0)}: only keys before a prompt's "
            "first segment can be left out."
        )


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except (CaptureError, ConfigError, PartsError, cost.CostError) as error:
        raise CalibrationError(str(error)) from error
    except OSError as error:
        raise CalibrationError(f"Cannot write {error.filename}: {error.strerror}.") from error


def _with(params: S2OParams, **changes: Any) -> S2OParams:
    """Validated, as `model_copy` is not."""
    try:
        return S2OParams(**{**params.model_dump(exclude={"budget"}), **changes})
    except ValueError as error:
        raise CalibrationError(
            f"These parameters do not go together: {str(error).splitlines()[-1].strip()}."
        ) from error


def _cheapest(budget: Budget, curves: dict[str, list[Curves]], segment_lens: Sequence[int]) -> tuple[str, list[Choice]]:
    """The best segment length's choices: the cheapest at an error, the one that errs least at a density."""
    found = {}
    for rule, length in zip(curves, segment_lens, strict=True):
        ranking = RANKING_COST * 512 / length
        if budget.target_density is not None:
            choices = search.within_density(curves[rule], budget.target_density)
            density = search.mean_density(choices)
            if density > budget.target_density:
                if length == max(segment_lens) and not found:
                    lowest = min(density, *(entry[1] for entry in found.values())) if found else density
                    raise CalibrationError(
                        f"A density of {budget.target_density:g} cannot be reached: segments of {length} visit "
                        f"{lowest:.3f} at least."
                    )
                continue
            found[rule] = (sum(choice.error for choice in choices), density, choices)
        else:
            choices = [search.within_error(layer, budget.max_relative_error) for layer in curves[rule]]
            found[rule] = (search.mean_density(choices) + ranking, search.mean_density(choices), choices)
    rule = min(found, key=lambda rule: found[rule][0])
    return rule, found[rule][2]


def _within_kl(
    allowed: float, source: Source, curves: dict[str, list[Curves]], params: dict[str, S2OParams], rules: dict,
    ids: list[int], out: Path, progress: Callable[[str, int], object], runs: int = 5,
) -> tuple[str, list[Choice], float]:  # fmt: skip
    """The cheapest choices whose next tokens stay within a divergence, measured on one prompt."""
    model = source.load()
    lengths = [params[rule].segment_len for rule in rules]
    error, best = 3e-3, None
    for _ in range(runs):
        rule, choices = _cheapest(Budget(max_relative_error=error), curves, lengths)
        if all(choice.dense for choice in choices):
            break
        config = _as_config(source.traits, choices, params[rule], rules[rule].values)
        kl = cost.measure(model, ids, config, lambda layers: progress("logits", 0))[0].kl
        if kl <= allowed and (best is None or search.mean_density(choices) < search.mean_density(best[1])):
            best = rule, choices, kl
        if 0.8 * allowed <= kl <= allowed:
            break
        # The divergence is about in proportion to the error; a little less, so as to end below.
        error = min(0.5, error * min(10, max(0.1, 0.9 * allowed / max(kl, 1e-12))))
    if best is None:
        raise CalibrationError(f"No thresholds kept the divergence of logits at {allowed:g} or below in {runs} runs.")
    return best


def _as_config(traits: ModelTraits, choices: Sequence[Choice], params: S2OParams, values: Sequence[float]):
    """A resolved config of these choices, sparse at every length."""
    common, layers = file.overrides(choices, values, traits.num_heads // traits.num_kv_heads)
    given = {
        "params": _with(params, threshold=common).model_dump(exclude={"budget"}),
        "layers": layers,
        "min_seq_len": 1,
    }
    return load_config(traits, given)


def _found(
    choices: Sequence[Choice], held_out: Sequence[Curves], params: S2OParams, values: Sequence[float],
    traits: ModelTraits, min_seq_len: int | None, num_tokens: int, kl: float | None,
) -> Found:  # fmt: skip
    if all(choice.dense for choice in choices):
        raise CalibrationError("No layer can be sparse within this budget: nothing is written.")
    judged = [
        search.DENSE if choice.dense else search.take(curves, choice.at)
        for choice, curves in zip(choices, held_out, strict=True)
    ]
    single = search.best_single(held_out, [choice.dense for choice in choices], max(choice.error for choice in judged))
    common, _ = file.overrides(choices, values, traits.num_heads // traits.num_kv_heads)
    if min_seq_len is None:
        sparse = [choice.density for choice in choices if not choice.dense]
        min_seq_len = shortest(traits, sum(sparse) / len(sparse), num_tokens, params.segment_len)
    return Found(
        _with(params, threshold=common), tuple(choices), tuple(judged), tuple(values),
        None if single is None else (values[single[0]], single[1]), min_seq_len, kl,
    )  # fmt: skip


def shortest(traits: ModelTraits, density: float, num_tokens: int, segment_len: int) -> int:
    """The shortest prompt, in powers of two, that S2O should take less time for than dense attention on an H100.

    A tile visits about as many keys of a short history as of a long one: what is a share of the pairs at `num_tokens`
    is a larger one of fewer. That is an estimate: at 50 / 30 / 20 % of 4,096 / 8,192 / 16,384 tokens S2O took 2.7 /
    0.70 / 0.39 of the time of FlashAttention-3 (Llama-3.1-8B's shape).
    """
    for exponent in range(10, 20):
        tokens = 2**exponent
        share = min(1.0, density * num_tokens / tokens) + RANKING_COST * 512 / segment_len
        dense = 2 * traits.num_heads * traits.head_size * tokens**2  # operations: half of the pairs, two products
        if share * SPARSE_PAIR * dense + LAUNCH < dense:
            return tokens
    return 2**20


def _write(
    out: Path, found: Found, source: Source, base, budget: Budget, texts: Sequence[str], num_tokens: int, seed: int
) -> None:
    traits = source.traits
    group = traits.num_heads // traits.num_kv_heads
    _, layers = file.overrides(found.layers, found.thresholds, group)
    tools = ("torch", "transformers")
    versions = {"vllm-s2o": __version__, **{tool: importlib.metadata.version(tool) for tool in tools}}
    name = Path(traits.name).resolve().name if Path(traits.name).exists() else traits.name
    provenance = {
        "calibrated": True,
        "source": f"searched on {name} for {budget}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "calibration": {
            "texts": [Path(text).name for text in texts], "tokens": num_tokens, "budget": str(budget), "seed": seed,
            "context_extension": source.rope_factor, "density": round(found.density, 4),
            "worst_relative_error": float(f"{found.worst_error:.3g}"),
            **({} if found.kl is None else {"logit_kl": float(f"{found.kl:.3g}")}),
            "layer_density": [round(choice.density, 3) for choice in found.held_out],
            "layer_relative_error": [float(f"{choice.error:.2g}") for choice in found.held_out],
            "versions": versions,
        },
    }  # fmt: skip
    content = file.document(
        traits, base.file.match.names or (name,), found.params, layers,
        min_seq_len=found.min_seq_len, min_query_len=base.min_query_len, provenance=provenance,
    )  # fmt: skip
    heading = [
        f"Thresholds of {name}, searched by `vllm-s2o calibrate`. Densities and errors are those of held-out text;",
        "a layer is dense where the budget leaves too little to skip.",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    file.write(out, content, heading)
    load_config(traits, str(out))  # what cannot be read was never of use
