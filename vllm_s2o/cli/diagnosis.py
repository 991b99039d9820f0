"""Whether a model would be served with S2O here: all findings of `doctor` in their order."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_s2o import compat, model, plugin, settings
from vllm_s2o.cli import checks
from vllm_s2o.cli.checks import Finding, Machine
from vllm_s2o.cli.probe import Answer, ask
from vllm_s2o.config import ConfigError, ModelTraits, ResolvedConfig, S2OParams
from vllm_s2o.model import Model


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    findings: tuple[Finding, ...]
    machine: Machine
    traits: ModelTraits | None
    config: ResolvedConfig | None
    dense: dict[int, str] | None
    """Layer -> why it stays dense; None where the model or its config is not known."""

    @property
    def works(self) -> bool:
        return not self.count("problem")

    def count(self, level: checks.Level) -> int:
        return sum(finding.level == level for finding in self.findings)


def diagnose(name: str | None, additional: dict[str, Any] | None, tell: Callable[[str], None]) -> Diagnosis:
    """Look at everything.

    Args:
        name: a model's directory or name, or None.
        additional: --additional-config.
        tell: is told what takes long.
    """
    subject = _Subject(name, additional)
    tell("Asking vLLM in a process of its own: this takes 10 to 30 seconds.")
    answer = ask(subject.directory if subject.worth_asking else None, additional)
    subject.learn(answer)
    machine = checks.look_at_machine()
    findings = [
        *checks.machine_findings(machine),
        *checks.version_findings(machine, answer),
        *checks.backend_findings(answer),
        checks.kernel_finding(machine, answer, subject.traits, subject.params),
        *([] if name is None else subject.findings(answer)),
    ]
    if name is None and answer.refused is not None:
        findings.append(_refusal("backend", answer.refused))
    return Diagnosis(tuple(findings), machine, subject.traits, subject.config, subject.dense)


class _Subject:
    """The model in question: from its config.json first, and from vLLM where that answers."""

    def __init__(self, name: str | None, additional: dict[str, Any] | None):
        self.name, self.additional = name, additional
        self.directory: Path | None = None
        self.model: Model | None = None
        self.traits: ModelTraits | None = None
        self.config: ResolvedConfig | None = None
        self.unreadable: str | None = None
        self.wrong_config: str | None = None
        if name is None:
            return
        try:
            self.directory = model.locate(name)
            self.model = model.read(name)
            self.traits = settings.traits_of(self.model)
        except ConfigError as error:
            self.unreadable = str(error)
        self._resolve()

    @property
    def worth_asking(self) -> bool:
        """A config that is wrong would be all that vLLM's process says of the model."""
        return self.wrong_config is None

    @property
    def params(self) -> S2OParams:
        return self.config.params if self.config else S2OParams()

    def learn(self, answer: Answer) -> None:
        """vLLM knows models whose config.json says little; the name is the user's, not the directory's."""
        if answer.traits is not None and self.name is not None:
            self.traits = ModelTraits(**answer.traits | {"name": self.name})
            self.unreadable = None
            self._resolve()

    def _resolve(self) -> None:
        if self.traits is None:
            return
        self.config = self.wrong_config = None
        try:
            self.config = settings.load_with(self.traits, settings.part_of(self.additional))
        except ConfigError as error:
            self.wrong_config = str(error)

    @property
    def dense(self) -> dict[int, str] | None:
        if self.config is None:
            return None
        unable = {} if self.model is None else model.dense_layers(self.model, compat.MAX_HEAD_SIZE)
        layers = range(self.config.traits.num_layers)
        chosen = {layer: "the config says so" for layer in layers if self.config.layer(layer) is None}
        return dict(sorted((chosen | unable).items()))

    def findings(self, answer: Answer) -> list[Finding]:
        """About the model; `name` was given."""
        if self.unreadable is not None:
            return [Finding("model", "model", self.unreadable, "problem", "name another model, or mend this one.")]
        assert self.traits is not None
        found = [Finding("model", "model", in_words(self.traits)), *self._serving(answer)]
        if self.config is None:
            advice = "correct it; `vllm-s2o config explain` tells what each field may be."
            return [*found, Finding("model", "config", str(self.wrong_config), "problem", advice)]
        where, values, *more = self.config.describe()
        if self.config.named_by is not None:
            where += f", by {self.config.named_by}"
        found.append(Finding("model", "config", where.removeprefix("config ")))
        found += [Finding("model", "values", line) for line in (values, *more)]
        longest = answer.max_model_len or (self.model and self.model.max_model_len)
        useless = self.config.no_effect(longest) if longest else None
        if useless is not None:
            advice = "lower min_seq_len, or serve without the flag."
            found.append(Finding("model", "reach", useless, "warning", advice))
        beyond = self.config.beyond(longest) if longest else None
        if beyond is not None:
            advice = "where that is too much, calibrate at this length, or take a smaller threshold."
            found.append(Finding("model", "length", beyond, "warning", advice))
        return found + self._layers()

    def _serving(self, answer: Answer) -> list[Finding]:
        if answer.refused is not None:
            return [_refusal("model", answer.refused)]
        if answer.rejected is not None:
            advice = "start vLLM with this model and without the flag: it may need options, or not be supported."
            return [Finding("model", "serving", f"vLLM: {answer.rejected}", "problem", advice)]
        if answer.max_model_len is not None:
            return [Finding("model", "serving", f"vLLM accepts it, with up to {answer.max_model_len} tokens")]
        if self.model is not None and self.model.use_mla:
            return [_refusal("model", plugin.MLA)]
        if self.model is not None and self.model.is_encoder_decoder:
            return [_refusal("model", plugin.ENCODER_DECODER)]
        return []

    def _layers(self) -> list[Finding]:
        assert self.dense is not None and self.traits is not None
        every = range(self.traits.num_layers)
        sparse = [layer for layer in every if layer not in self.dense]
        value = f"{len(sparse)} of {len(every)} layers" + (f": {ranges(sparse)}" if sparse else "")
        if sparse:
            found = [Finding("model", "sparse", value)]
        else:
            found = [Finding("model", "sparse", value, "warning", "serve without the flag: it changes nothing here.")]
        for reason in dict.fromkeys(self.dense.values()):
            layers = [layer for layer, why in self.dense.items() if why == reason]
            found.append(Finding("model", "dense", f"layers {ranges(layers)}: {reason}"))
        return found


def _refusal(part: str, sentence: str) -> Finding:
    what, _, advice = sentence.rpartition(": ")
    if sentence not in (plugin.MLA, plugin.BATCH_INVARIANT):  # those two end with what to do
        what, advice = sentence, "mend what the sentence names, or serve without the flag."
    return Finding(part, "serving", f"refused: {what}", "problem", advice)


def in_words(traits: ModelTraits) -> str:
    return (
        f"{traits.name}: {traits.architecture}, {traits.num_layers} layers, {traits.num_heads} query heads, "
        f"{traits.num_kv_heads} KV heads, head size {traits.head_size}"
    )


def ranges(numbers: list[int]) -> str:
    """`0,4-7` of ascending numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
