"""A config file that holds what was found."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vllm_s2o.config_file import DIMENSIONS, ModelTraits
from vllm_s2o.params import S2OParams

from .search import Choice


def overrides(choices: Sequence[Choice], values: Sequence[float], group: int) -> tuple[float, list[dict[str, Any]]]:
    """The threshold that most layers have, and what the others have.

    Args:
        values: the thresholds that a choice's indices name.
        group: query heads of a KV head.
    """
    whole = Counter(values[choice.at[0]] for choice in choices if choice.at is not None and len(set(choice.at)) == 1)
    common = whole.most_common(1)[0][0] if whole else values[len(values) // 2]
    by_threshold: dict[Any, list[int]] = {}
    by_head = []
    for layer, choice in enumerate(choices):
        if choice.at is None:
            by_threshold.setdefault("dense", []).append(layer)
        elif len(set(choice.at)) == 1:
            if values[choice.at[0]] != common:
                by_threshold.setdefault(values[choice.at[0]], []).append(layer)
        else:
            for head, at in enumerate(choice.at):
                if values[at] != common:
                    heads = f"{head * group}-{(head + 1) * group - 1}" if group > 1 else head
                    by_head.append({"layers": layer, "heads": heads, "threshold": values[at]})
    whole_layers = [{"layers": _runs(layers), "threshold": value} for value, layers in by_threshold.items()]
    return common, sorted(whole_layers, key=lambda one: str(one["layers"])) + by_head


def _runs(layers: Sequence[int]) -> Any:
    """[3, 4, 5, 9] -> ["3-5", 9]; a single one alone."""
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][-1] + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    names = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found]
    return names[0] if len(names) == 1 else names


def document(
    traits: ModelTraits, names: Sequence[str], params: S2OParams, layers: Sequence[dict], *,
    min_seq_len: int, min_query_len: int, provenance: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What the file holds, in the order in which a person reads it."""
    given = params.model_dump(exclude={"budget"})
    return {
        "match": {"names": list(names), **{name: getattr(traits, name) for name in DIMENSIONS}},
        "min_seq_len": min_seq_len, "min_query_len": min_query_len, "params": given, "layers": list(layers),
        "provenance": provenance,
    }  # fmt: skip


class _Dumper(yaml.SafeDumper):
    """Lists of numbers and small mappings on one line, as in the files that people write."""


def _list(dumper: yaml.SafeDumper, data: list) -> yaml.Node:
    plain = all(isinstance(item, (int, float, str)) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=plain)


def _mapping(dumper: yaml.SafeDumper, data: dict) -> yaml.Node:
    small = len(data) <= 3 and all(isinstance(item, (int, float, str)) or _short(item) for item in data.values())
    return dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=small)


def _short(item: Any) -> bool:
    return isinstance(item, list) and len(item) < 20 and not any(isinstance(one, dict) for one in item)


_Dumper.add_representer(list, _list)
_Dumper.add_representer(dict, _mapping)


def write(path: Path, content: dict[str, Any], heading: Sequence[str]) -> None:
    """The file as a whole, or not at all."""
    text = "".join(f"# {line}".rstrip() + "\n" for line in heading)
    text += yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    part = path.with_name(path.name + ".new")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
