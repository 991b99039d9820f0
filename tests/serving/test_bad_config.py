"""A config that cannot be used stops the server at once, with one sentence at the end of its output."""

import json

import pytest
from serving import S2O, Server

pytestmark = pytest.mark.serving

# name: what is given, and what the sentence must name: the file or option, the field, what is allowed
BAD = {
    "missing file": ("missing.yaml", ["missing.yaml", "no such file", "YAML config file is expected"]),
    "unknown key": ({"treshold": 0.1}, ["additional-config", "'treshold'", "allowed", "threshold"]),
    "tau out of range": ({"threshold": 1.5}, ["additional-config", "threshold", "1.5", "from 0 up to"]),
    "layer that the model lacks": (
        {"layers": [{"layers": "28-30", "threshold": "dense"}]},
        ["additional-config", "layers.0.layers", "30", "0 to 29"],
    ),
    "ambiguous": (
        {"threshold": 0.1, "params": {"threshold": 0.2}},
        ["additional-config", "threshold", "twice", "once"],
    ),
}


@pytest.fixture(scope="module")
def ended(model, log_dir):
    """Exit status and output per case. All start together: most of their time is vLLM's import."""
    servers = {}
    for name, (given, _) in BAD.items():
        args = (*S2O, "--additional-config", json.dumps({"s2o": given}))
        servers[name] = Server(model, log_dir / f"bad {name}.log", args)
    file = log_dir / "typo.yaml"
    file.write_text("params: {tile_sise: 64}\n")
    servers["file from the environment"] = Server(model, log_dir / "bad env.log", S2O, {"VLLM_S2O_CONFIG": str(file)})
    for server in servers.values():
        server.launch()
    try:
        yield {name: (server.process.wait(180), server.log) for name, server in servers.items()}
    finally:
        for server in servers.values():
            server.stop()


def last_line(log: str) -> str:
    return [line for line in log.splitlines() if line.strip()][-1]


@pytest.mark.parametrize("name", BAD)
def test_sentence(ended, name):
    status, log = ended[name]
    sentence = last_line(log)
    assert status != 0
    assert sentence.startswith("vllm-s2o: ")
    assert sentence.endswith(".")
    for word in BAD[name][1]:
        assert word in sentence
    assert "Engine core initialization failed" not in log
    assert "Traceback" not in log


def test_file_from_the_environment(ended):
    status, log = ended["file from the environment"]
    assert status != 0
    for word in ("vllm-s2o: ", "typo.yaml", "params.tile_sise", "allowed", "tile_size"):
        assert word in last_line(log)
