"""`vllm-s2o calibrate`: a config file with thresholds that were searched on a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vllm_s2o import model as models
from vllm_s2o import settings
from vllm_s2o.cli.options import TEXTS, additional_config, as_json, print_json
from vllm_s2o.cli.progress import layers_done

if TYPE_CHECKING:
    from vllm_s2o.quality.calibration.run import Found

LONGEST = 2**20


@click.command(short_help="Search thresholds for a model and write its config file.")
@click.argument("model", metavar="MODEL")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE", help="To write.")
@click.option("--max-relative-error", type=float, metavar="X", help="Budget: each layer's squared error, as a share.")
@click.option("--target-density", type=float, metavar="X", help="Budget: visited / causal pairs, mean over layers.")
@click.option("--max-logit-kl", type=float, metavar="X", help="Budget: divergence of the next token, in nats.")
@click.option("--text", "texts", multiple=True, metavar="TEXT", help=TEXTS)
@click.option("--tokens", type=click.IntRange(1, LONGEST), default=8192, show_default=True, help="Of each prompt.")
@click.option(
    "--segment-len", "segment_lens", type=int, multiple=True, metavar="N", help="To try; default 256 and 512."
)
@click.option(
    "--min-seq-len", type=click.IntRange(1, 2**31 - 1), metavar="N",
    help="Of the config; by default estimated, within a quarter of the model's context.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Which tiles of the prompts are looked at.")
@additional_config
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@as_json
def calibrate(
    model: str, out: Path, texts: tuple[str, ...], tokens: int, segment_lens: tuple[int, ...], min_seq_len: int | None,
    seed: int, additional: dict[str, Any] | None, force: bool, as_json: bool, **budgets: float | None,
) -> None:  # fmt: skip
    """Search thresholds for MODEL, per layer and per KV head, and write a config file.

    MODEL is a directory or a name on Hugging Face. It runs densely in transformers on one half of each text, where
    thresholds are chosen, and on the other half, where they are judged. Exactly one budget is needed. Stopped and
    started again, the same command goes on where it was.

    \b
    Example:
      vllm-s2o calibrate .models/SmolLM2-135M-Instruct --max-relative-error 0.01 --text code --tokens 2048 --out my.yaml
    """
    from vllm_s2o.quality.calibration import Budget, CalibrationError
    from vllm_s2o.quality.calibration.run import calibrate as search
    from vllm_s2o.quality.calibration.run import steps

    if out.exists() and not force:
        raise click.UsageError(f"{out} is there already: name another file, or add --force.")
    given: dict[str, Any] = {"texts": tuple(dict.fromkeys(texts)) or ("code", "prose")}
    given |= {"segment_lens": tuple(dict.fromkeys(segment_lens))} if segment_lens else {}
    known = models.read(model)
    layers = settings.traits_of(known).num_layers
    with layers_done(steps(layers, len(given["texts"])), quiet=as_json) as progress:
        try:
            found = search(
                model, out, Budget(**budgets), num_tokens=tokens, min_seq_len=min_seq_len, seed=seed,
                additional=settings.part_of(additional),
                progress=progress, **given,
            )  # fmt: skip
        except CalibrationError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("\nvllm-s2o calibrate: stopped; the same command goes on from here.", err=True)
            raise
    if as_json:
        print_json(_document(found, out))
        return
    for line in (*_lines(found), *found.notes):
        click.echo(line)
    if known.max_model_len is not None and found.min_seq_len > known.max_model_len:
        click.echo(
            f"No prompt is as long as that: the model's context ends at {known.max_model_len} tokens. "
            "--min-seq-len sets another minimum."
        )
    click.echo(f'\nWritten: {out}. Serve with --additional-config \'{{"s2o": "{out}"}}\'.')


def _thresholds(found: "Found", layer: int) -> list[float] | None:
    at = found.layers[layer].at
    return None if at is None else [found.thresholds[index] for index in at]


def _lines(found: "Found") -> list[str]:
    from vllm_s2o.quality.calibration import search

    rows = ["layer  thresholds per KV head           density  relative error   (held-out text)"]
    for layer, choice in enumerate(found.held_out):
        taus = _thresholds(found, layer)
        shown = "dense" if taus is None else f"{taus[0]:g}" if len(set(taus)) == 1 else " ".join(f"{t:g}" for t in taus)
        rows.append(f"{layer:5}  {shown:32} {choice.density:8.3f}  {choice.error:.1e}")
    rows.append(f"{'all':>5}  {'':32} {found.density:8.3f}  {found.worst_error:.1e} (worst)")
    chosen = search.mean_density(found.layers), max(choice.error for choice in found.layers)
    rows.append(f"{'':5}  {'where they were chosen':>32} {chosen[0]:8.3f}  {chosen[1]:.1e} (worst)")
    rows.append(f"\nsegment_len {found.params.segment_len}, min_seq_len {found.min_seq_len}")
    if found.single is None:
        rows.append("No single threshold reaches that worst layer.")
    else:
        threshold, density = found.single
        rows.append(f"The best single threshold with no worse layer, {threshold:.3g}, visits {density:.3f}.")
    if found.kl is not None:
        rows.append(f"Divergence of the next token, on the first text where they were chosen: {found.kl:.2g} nats.")
    return rows


def _document(found: "Found", out: Path) -> dict[str, Any]:
    return {
        "file": str(out), "segment_len": found.params.segment_len, "min_seq_len": found.min_seq_len,
        "density": found.density, "worst_relative_error": found.worst_error,
        "logit_kl_where_chosen": found.kl, "notes": list(found.notes),
        "worst_relative_error_where_chosen": max(choice.error for choice in found.layers),
        "single": None if found.single is None else {"threshold": found.single[0], "density": found.single[1]},
        "layers": [
            {
                "layer": layer, "thresholds": _thresholds(found, layer), "density": choice.density,
                "rel_error": choice.error,
            }
            for layer, choice in enumerate(found.held_out)
        ],
    }  # fmt: skip
