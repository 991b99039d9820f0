"""Calibration from the model's name to the written file.

Thresholds are chosen on one half of each text and judged on the other. Segment lengths are compared by what they visit
and by what their rankings cost; the shortest prompt that should be sparse is estimated, see `shortest`.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_s2o import settings
from vllm_s2o.cli.environment import commit_name, describe
from vllm_s2o.config import ConfigError, ResolvedConfig, load_config
from vllm_s2o.params import S2OParams
from vllm_s2o.quality import cost
from vllm_s2o.quality.capture import CaptureError, Source, open_model
from vllm_s2o.quality.journal import JournalError
from vllm_s2o.quality.parts import Parts
from vllm_s2o.quality.text import SOURCES
from vllm_s2o.version import __version__

from . import file, search
from .choose import cheapest, with_changes, within_kl
from .curves import Curves, dense_share, layer_curves, least_density, measure, rule_of
from .search import Budget, CalibrationError, Choice
from .speed import capped, shortest

SPLITS = ("choosing", "held-out")
OWN = {
    "params.threshold": "it is searched",
    "layers": "they are searched",
    "params.segment_len": "the best of those to try is taken (--segment-len)",
    "params.reference_len": "it becomes the length that thresholds are judged at (--tokens)",
    "params.budget": "it would take the place of thresholds",
    "min_seq_len": "it is estimated, or given by itself (--min-seq-len)",
}
"""Fields that a calibration sets itself, and how."""
MOST_LEN = 2**31 - 1


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
    """The best threshold that, alone at any of the segment lengths, has no worse layer on the held-out half, chosen
    there; and its density."""
    min_seq_len: int
    kl: float | None
    """On the first text's half that thresholds were chosen on; only where the budget is one of it."""
    notes: tuple[str, ...]
    """What else to know of these figures, a sentence each."""

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
        min_seq_len: of the written config; if None estimated, and no more than a quarter of the model's context.
        seed: which tiles are looked at.
        additional: what is not searched, over the model's present config: as in `settings.load_with`.
        progress: told what is done, and how many layers of it; see `steps` for how many there are.

    Raises:
        CalibrationError: in one sentence, whatever went wrong.
    """
    texts = tuple(dict.fromkeys(texts))
    _check(budget, texts, num_tokens, segment_lens, min_seq_len)
    with _one_sentence():
        source = open_model(model, num_tokens)
        base = settings.load_with(source.traits, additional)
        _check_given(base)
        # What is found holds for prompts like those it is judged on, and falls from there on.
        common = with_changes(base.params, reference_len=num_tokens)
        params = {f"{length}": with_changes(common, segment_len=length) for length in segment_lens}
        _check_reachable(budget, params.values(), num_tokens)
        rules = {name: rule_of(one) for name, one in params.items()}
        prompts = {f"{split}: {text}": source.prompt(text, num_tokens, split) for split in SPLITS for text in texts}
        parts = Parts(
            out.with_name(out.name + ".parts.jsonl"),
            {
                "model": model, "tokens": num_tokens, "seed": seed, "context extension": source.rope_factor,
                "commit": commit_name(describe()), "torch": importlib.metadata.version("torch"),
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                # A file of one's own may have changed since.
                "texts": [[name, hashlib.sha256(str(ids).encode()).hexdigest()[:12]] for name, ids in prompts.items()],
                "methods": {name: repr(rule) for name, rule in rules.items()},
            },
        )  # fmt: skip
        measure(source, parts, prompts, rules, seed, progress)

    traits = source.traits
    names = {split: [name for name in prompts if name.startswith(split)] for split in SPLITS}
    curves = {
        (split, rule): [
            layer_curves(parts, names[split], layer, rule, traits.num_kv_heads, dense_share(num_tokens, params[rule]))
            for layer in range(traits.num_layers)
        ]
        for split in SPLITS
        for rule in rules
    }
    kl = None
    with _kept(parts.path), _one_sentence():
        if budget.max_logit_kl is not None:
            rule, choices, kl = within_kl(
                budget.max_logit_kl, source, {rule: curves["choosing", rule] for rule in rules}, params, rules,
                prompts[names["choosing"][0]], parts, progress,
            )  # fmt: skip
        else:
            rule, choices = cheapest(budget, {rule: curves["choosing", rule] for rule in rules}, params, traits)
        held_out = {rule: curves["held-out", rule] for rule in rules}
        found = _found(choices, held_out, rule, params[rule], rules[rule].values, source, min_seq_len, num_tokens, kl)
        _write(out, found, source, base, budget, texts, num_tokens, seed)
        parts.path.unlink()
    return found


def steps(num_layers: int, num_texts: int) -> int:
    """Layers that are swept in all."""
    return num_layers * num_texts * len(SPLITS)


def _check(
    budget: Budget, texts: Sequence[str], num_tokens: int, segment_lens: Sequence[int], min_seq_len: int | None
) -> None:
    given = [value for value in budget if value is not None]
    if len(given) != 1:
        raise CalibrationError("Exactly one budget is needed: a relative error, a density, or a divergence of logits.")
    if not 0 < given[0] < (1 if budget.max_logit_kl is None else math.inf):
        raise CalibrationError(
            f"The budget {budget} cannot be met: allowed is a number above 0, and below 1 but for KL."
        )
    if not texts:
        raise CalibrationError("At least one text must be named.")
    if not segment_lens:
        raise CalibrationError("At least one segment length must be named.")
    if num_tokens < 2 * max(segment_lens):
        raise CalibrationError(
            f"{num_tokens} tokens hold no two segments of {max(segment_lens)}: only keys before a prompt's "
            "first segment can be left out."
        )
    if min_seq_len is not None and not 1 <= min_seq_len <= MOST_LEN:
        raise CalibrationError(f"min_seq_len cannot be {min_seq_len}: allowed is a number from 1 to {MOST_LEN}.")


def _check_given(base: ResolvedConfig) -> None:
    """Nobody shall give in vain what is set here. A file's values for the same are what is to be replaced."""
    for name, how in OWN.items():
        if base.origins.get(name, "default") not in ("default", base.source):
            raise CalibrationError(f"The field '{name}' cannot be given to a calibration: {how}; leave it out.")


def _check_reachable(budget: Budget, params: Iterable[S2OParams], num_tokens: int) -> None:
    """Lengths alone tell the least density: nobody shall wait for sweeps to hear of it."""
    if budget.target_density is None:
        return
    least = {one.segment_len: least_density(num_tokens, one) for one in params}
    if budget.target_density < min(least.values()):
        # Rounded up: whoever gives what is named here is not refused by its last digit.
        named = math.ceil(1e3 * min(least.values())) / 1e3
        raise CalibrationError(search.unreachable(budget.target_density, least, named))


@contextlib.contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Add to a refusal that the work before it is not lost."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(
            f"{str(error).removesuffix('.')}; the sweeps are kept in {path}, for the next try."
        ) from error


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except (CaptureError, ConfigError, JournalError, cost.CostError) as error:
        raise CalibrationError(str(error)) from error
    except OSError as error:
        where = "a file" if error.filename is None else error.filename  # a full disk has no name
        raise CalibrationError(f"Cannot write {where}: {error.strerror or error}.") from error


def _found(
    choices: Sequence[Choice], held_out: dict[str, list[Curves]], rule: str, params: S2OParams,
    values: Sequence[float], source: Source, min_seq_len: int | None, num_tokens: int, kl: float | None,
) -> Found:  # fmt: skip
    if all(choice.dense for choice in choices):
        raise CalibrationError("No layer can be sparse within this budget: nothing is written.")
    judged = [
        search.DENSE if choice.at is None else search.take(curves, choice.at)
        for choice, curves in zip(choices, held_out[rule], strict=True)
    ]
    dense, worst = [choice.dense for choice in choices], max(choice.error for choice in judged)
    singles = [search.best_single(curves, dense, worst, values) for curves in held_out.values()]
    single = min((one for one in singles if one), key=lambda one: one[1], default=None)
    traits = source.traits
    common, _ = file.overrides(choices, values, traits.num_heads // traits.num_kv_heads)
    notes = [source.extension] if source.extension else []
    if min_seq_len is None:
        sparse = [choice.density for choice in choices if not choice.dense]
        estimate = shortest(traits, sum(sparse) / len(sparse), num_tokens, params)
        min_seq_len, note = capped(estimate, source.context, params.segment_len)
        notes += [note] if note else []
    return Found(
        with_changes(params, threshold=common), tuple(choices), tuple(judged), tuple(values),
        single, min_seq_len, kl, tuple(notes),
    )  # fmt: skip


def _write(
    out: Path, found: Found, source: Source, base: ResolvedConfig, budget: Budget, texts: Sequence[str],
    num_tokens: int, seed: int,
) -> None:  # fmt: skip
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
            **({} if found.kl is None else {"logit_kl_where_chosen": float(f"{found.kl:.3g}")}),
            "layer_density": [round(choice.density, 3) for choice in found.held_out],
            "layer_relative_error": [float(f"{choice.error:.2g}") for choice in found.held_out],
            "versions": versions,
        },
    }  # fmt: skip
    content = file.document(
        traits, _names(base, name), found.params, layers,
        min_seq_len=found.min_seq_len, min_query_len=base.min_query_len, provenance=provenance,
    )  # fmt: skip
    heading = [
        f"Thresholds of {name}, searched by `vllm-s2o calibrate`. Densities and errors are those of held-out text;",
        "a layer is dense where the budget leaves too little to skip.",
        *found.notes,
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(out.name + ".draft")
    try:
        file.write(draft, content, heading)
        load_config(traits, str(draft))  # what cannot be read is of no use, and takes no file's place
        os.replace(draft, out)
    finally:
        draft.unlink(missing_ok=True)


def _names(base: ResolvedConfig, name: str) -> tuple[str, ...]:
    """Whom the file is for: by the present file's names if the model has one of them, not its dimensions alone."""
    match = base.file.match
    called = (base.traits, dataclasses.replace(base.traits, name=name))
    return match.names if any(map(match.by_last_part, called)) else (name,)
