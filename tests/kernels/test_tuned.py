"""Tuned options are data: every file must name options that the kernels take."""

import math

import pytest
import torch

from vllm_s2o.kernels import hopper, prefill, tuned

LAUNCH = {"hopper": hopper.Launch, "prefill": prefill.Launch}


@pytest.mark.parametrize("file", tuned.read_files(), ids=lambda file: file["gpu"])
def test_files(file):
    assert {"gpu", "capability", "measured"} < file.keys()
    for kernel in file.keys() - {"gpu", "capability", "measured"}:
        for head_size, options in file[kernel].items():
            launch = LAUNCH[kernel](**options)
            assert int(head_size) in (64, 96, 128, 256)
            assert launch.block == math.gcd(launch.block, 256), "whole blocks between two stop tests"
            if kernel == "hopper":
                assert 128 * (2 * launch.visit_registers + launch.gather_registers) <= 65536


def test_the_gpu_itself_comes_first(monkeypatch):
    def file(gpu, stages):
        return {"gpu": gpu, "capability": [9, 0], "prefill": {"64": {"num_stages": stages}}}

    monkeypatch.setattr(tuned, "read_files", lambda: (file("A", 1), file("B", 2)))
    assert tuned.choose("prefill", 64, "B", (9, 0)) == {"num_stages": 2}
    assert tuned.choose("prefill", 64, "C", (9, 0)) == {"num_stages": 1}
    assert tuned.choose("prefill", 128, "B", (9, 0)) == tuned.choose("prefill", 64, "B", (8, 0)) == {}


@pytest.mark.parametrize("interval", [16, 48, 64, 256, 320])
def test_blocks_divide_the_interval(interval):
    block = prefill.launch(torch.zeros(1, 1, 128), 128, interval).block
    assert interval % block == 0
    assert block >= 16
