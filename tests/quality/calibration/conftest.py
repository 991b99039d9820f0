from pathlib import Path

import calibration_case
import pytest

from vllm_s2o.quality.calibration import Budget, Found, calibrate


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    return calibration_case.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def calibrated(checkpoint, tmp_path_factory) -> tuple[Path, Found]:
    """From scratch, in a folder that was not there."""
    out = tmp_path_factory.mktemp("calibrated") / "folder" / "model.yaml"
    return out, calibrate(checkpoint, out, Budget(max_relative_error=0.02), **calibration_case.TASK)
