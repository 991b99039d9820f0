"""What vLLM makes of this environment and of a model, in a process of its own.

    python -P -m vllm_s2o.cli.probe FILE '{"model": DIRECTORY, "additional": {"s2o": ...}}'

Registering changes vLLM, and importing it takes seconds and may fail in many ways: whoever asks (`ask`) stays clear of
both. The answer goes to a file, and anew after each step: vLLM prints what it likes, and may end the process.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_s2o.metrics import place

SECONDS = 300
"""A cold disk may need a minute to give vLLM's import what it reads."""
GROUP, ENTRY = "vllm.general_plugins", "s2o"


@dataclasses.dataclass
class Answer:
    """What was found out, up to where the process came."""

    entry_point: str | None = None
    """What the installed package names for vLLM to load; None where none is installed."""
    vllm: str | None = None
    """Version; None where there is no vLLM."""
    failed: str | None = None
    """Why vLLM or the plugin cannot be loaded, or that the process ended."""
    device: str | None = None
    """The platform that vLLM chose."""
    names: list[str] = dataclasses.field(default_factory=list)
    """Values of --attention-backend that lead to the backend, after plugins were loaded."""
    refused: str | None = None
    """The plugin's sentence against serving, under the model's configuration where there is one."""
    rejected: str | None = None
    """vLLM's own sentence against the model."""
    traits: dict[str, Any] | None = None
    """The model's, as vLLM reads them."""
    max_model_len: int | None = None
    dtype: str | None = None


def ask(model: Path | None = None, additional: dict[str, Any] | None = None) -> Answer:
    """Run the program below and wait for its answer."""
    with tempfile.TemporaryDirectory(prefix="vllm-s2o-") as work:
        path = Path(work) / "answer.json"
        request = {"model": None if model is None else str(model.resolve()), "additional": additional or {}}
        command = [sys.executable, "-P", "-m", "vllm_s2o.cli.probe", str(path), json.dumps(request)]
        # What the model needs was found before; nothing is to be fetched, or waited for, now.
        environment = os.environ | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop(place.MERGED, None)  # where servers have their figures, which no question is to add to
        ended = None
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=SECONDS,
            )  # fmt: skip
            if done.returncode:
                said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
                ended = f"the process ended with {done.returncode}" + (f": {said[-1][:200]}" if said else "")
        except subprocess.TimeoutExpired:
            ended = f"the process did not end within {SECONDS} seconds"
        try:
            answer = Answer(**json.loads(path.read_text()))
        except (OSError, ValueError):
            answer = Answer()
        answer.failed = answer.failed or ended
        return answer


def main(path: Path, model: str | None, additional: dict[str, Any]) -> None:
    answer = Answer()

    def tell() -> None:
        whole = path.with_suffix(".new")
        whole.write_text(json.dumps(dataclasses.asdict(answer)))
        whole.replace(path)

    entry = next(iter(importlib.metadata.entry_points(group=GROUP, name=ENTRY)), None)
    answer.entry_point = None if entry is None else entry.value
    tell()
    if importlib.util.find_spec("vllm") is None:
        return
    try:
        if entry is not None:
            entry.load()  # vLLM logs why it cannot, and goes on
        from vllm_s2o import compat, plugin

        answer.vllm = compat.installed_version()
        tell()
        compat.load_plugins()
        answer.device = compat.device_type()
        answer.names = compat.backend_names()
        if compat.batch_invariant():
            answer.refused = plugin.BATCH_INVARIANT
    except BaseException as error:  # a broken vLLM may raise anything, or exit
        answer.failed = one_line(error)
        tell()
        return
    tell()
    if model is not None and answer.names and answer.refused is None:
        try:
            look_at(model, additional, answer)
        except compat.StartError as error:
            answer.refused = str(error)
        except BaseException as error:
            answer.rejected = one_line(error)
        tell()


def look_at(model: str, additional: dict[str, Any], answer: Answer) -> None:
    from vllm_s2o import compat, settings

    # CUSTOM may be another plugin's.
    config = compat.server_config(model, answer.names[0], additional).model_config
    answer.traits = dataclasses.asdict(settings.traits_of(config))
    answer.max_model_len = config.max_model_len
    answer.dtype = str(config.dtype).removeprefix("torch.")


def one_line(error: BaseException) -> str:
    """What an exception says, without what pydantic adds to it."""
    details = error.errors() if hasattr(error, "errors") and callable(error.errors) else ()
    said = details[0]["msg"].removeprefix("Value error, ") if details else str(error)
    line = " ".join(said.split()) or "nothing more is known"
    line = line if len(line) <= 300 else line[:297] + "..."
    return line if details else f"{type(error).__name__}: {line}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
