"""`make sanitize` needs a GPU; what it would run, and how it says what went wrong, does not."""

import os
import subprocess
import sys

import pytest
import sanitize_cases as cases
import torch
from processes import ROOT

SANITIZER = """#!/bin/sh
case "$*" in
    *--version*) echo "Version 2026.1" ;;
    *"--tool {bad}"*) echo "========= {said}"; exit {status} ;;
    *) echo "========= ERROR SUMMARY: 0 errors" ;;
esac
"""

PYTHON = f"""#!/bin/sh
case "$*" in
    *hazards.py*) exec {sys.executable} "$@" ;;
    *) echo 'H100, torch 2, triton 3' ;;
esac
"""


def hazard(write: int, read: int, kind: str = "RAW", level: str = "Error") -> str:
    """As racecheck tells it of the Gluon kernel's lines."""
    told = f"{level}: Potential {kind} hazard detected at __shared__ 0x205a0 in block (4,0,0) :"
    places = (
        f"    Write Thread (31,0,0) at _attend+0x14c30 in hopper.py:{write}",
        f"    Read Thread (224,0,0) at _attend+0x41a0 in hopper.py:{read}",
    )
    return "\n".join(f"========= {line}" for line in (told, *places))


def place(part: str) -> int:
    """Number of the first line of the Gluon kernel that holds this."""
    lines = (ROOT / "kernels" / "hopper.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if part in line)


def sanitize(directory, bad="none", said="", status=0, **environment):
    """The script, with a sanitizer and a Python that only say so."""
    tool, python = directory / "compute-sanitizer", directory / "python"
    tool.write_text(SANITIZER.format(bad=bad, said=said, status=status))
    python.write_text(PYTHON)
    for program in (tool, python):
        program.chmod(0o755)
    env = os.environ | {
        "PYTHON": str(python), "COMPUTE_SANITIZER": str(tool), "OUT_FILE": str(directory / "out.txt")
    } | environment  # fmt: skip
    return subprocess.run(
        ["bash", ROOT / "benchmarks" / "sanitize.sh"], capture_output=True, text=True, env=env, timeout=60
    )


def test_both_tools_run_and_the_results_are_kept(tmp_path):
    done = sanitize(tmp_path)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out.txt").read_text()
    assert written.index("== memcheck") < written.index("memcheck: no errors") < written.index("== racecheck")
    assert "racecheck: no errors" in written
    assert written.startswith("H100, torch 2, triton 3\ncommit ")


@pytest.mark.parametrize(
    ("status", "said"), [(9, "ERRORS, above"), (124, "CUT OFF after 180 s"), (1, "FAILED, status 1")]
)
@pytest.mark.parametrize("bad", ["memcheck", "racecheck"])
def test_errors_are_kept_and_fail(tmp_path, bad, status, said):
    done = sanitize(tmp_path, bad, "Invalid __global__ read of size 4 bytes", status)
    assert done.returncode == 1
    written = (tmp_path / "out.txt").read_text()
    assert "Invalid __global__ read" in written
    assert f"{bad}: {said}" in written and written.count("no errors") == 1


VERDICT = place("verdict.index(side + half).store"), place("verdict.index(side).load")
RING = place("stage = i % STAGES"), place("stage = i % STAGES") + 1
BEGIN = (place("def _attend(") - 1,) * 2


@pytest.mark.parametrize(
    ("hazards", "counted", "fine"),
    [
        ([VERDICT], (1, 0), True),
        ([VERDICT, (VERDICT[0], BEGIN[0])], (2, 0), False),  # of two kinds
        ([VERDICT, BEGIN], (2, 0), True),
        ([VERDICT, RING], (2, 0), False),
        ([VERDICT, (*VERDICT, "WAR")], (2, 0), False),
        ([VERDICT, (*RING, "RAW", "Warning")], (1, 1), False),
        ([RING, (*VERDICT, "RAW", "Warning")], (1, 1), False),
        ([VERDICT], (7, 0), False),  # six that were not shown
        ([], (0, 0), False),
    ],
)
def test_hazards_that_a_barrier_orders_are_told_apart(tmp_path, hazards, counted, fine):
    errors, warnings = counted
    summary = f"RACECHECK SUMMARY: {len(hazards)} hazards displayed ({errors} errors, {warnings} warnings)"
    told = [*(hazard(*one) for one in hazards), f"========= {summary}"]
    done = sanitize(tmp_path, "racecheck", "\n".join(told), 9)
    written = (tmp_path / "out.txt").read_text()
    assert done.returncode == (0 if fine else 1), written
    assert ("racecheck: no errors but what it cannot follow, above" in written) == fine
    if fine:
        assert "halves meet at `met` between the two" in written
        assert f"{errors} hazards, 0 of them unknown, 0 not shown" in written


@pytest.mark.parametrize(("lines", "fine"), [(VERDICT, True), (RING, False)], ids=["seen above", "never seen"])
def test_sums_of_hazards_are_of_hazards_that_were_seen(tmp_path, lines, fine):
    first, second = lines
    race = (
        f"========= Error: Race reported between Read access at _attend+0x180 in hopper.py:{second}\n"
        f"=========     and Write access at _attend+0x10ef0 in hopper.py:{first} [1 hazards]"
    )
    summary = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
    done = sanitize(tmp_path, "racecheck", "\n".join([hazard(*VERDICT), race, summary]), 9)
    written = (tmp_path / "out.txt").read_text()
    assert done.returncode == (0 if fine else 1), written
    assert f"2 hazards, {0 if fine else 1} of them unknown, 0 not shown" in written


def test_without_a_sanitizer_it_says_what_it_needs(tmp_path):
    done = sanitize(tmp_path, COMPUTE_SANITIZER="", PATH="/usr/bin:/bin", CUDA_HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("sanitize needs compute-sanitizer") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run")
def test_its_cases_run(monkeypatch, capsys):
    """By the CPU path: problems, parameters and what is checked of them."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in cases.CASES:
        cases.run(name, "cpu")
    lines = capsys.readouterr().out.splitlines()
    densities = {line.removeprefix("cpu").strip().split(":")[0]: float(line.split()[-1]) for line in lines}
    assert list(densities) == list(cases.CASES)
    assert {name for name, density in densities.items() if density == 1} == {"dense", "bad numbers"}
    monkeypatch.setattr(cases, "by_rows", lambda case: torch.zeros_like(case.query.double()))
    with pytest.raises(SystemExit, match="dense: off by"):
        cases.run("dense", "cpu")
