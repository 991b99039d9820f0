"""A model's config.json, read without vLLM: the same dimensions that vLLM reads, or one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import inspected_here
from vllm.config import ModelConfig

from vllm_s2o import compat, model, settings
from vllm_s2o.yaml_file import ConfigError

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96, "intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Write config.json, return the directory. A field that is None is left out."""

    def write(fields: dict | str | bytes, **changes) -> Path:
        if isinstance(fields, dict):
            fields = json.dumps({name: value for name, value in (fields | changes).items() if value is not None})
        data = fields.encode() if isinstance(fields, str) else fields
        (tmp_path / "config.json").write_bytes(data)
        return tmp_path

    return write


def refusal(name) -> str:
    with pytest.raises(ConfigError) as caught:
        settings.traits_of(model.read(str(name)))
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1
    assert sentence.endswith(".")
    return sentence


# -- dimensions -------------------------------------------------------------------------------------------------------

# What vLLM must be asked about, for the file says little or says it otherwise.
SHAPES = {
    "all stated": LLAMA,
    "no head size": LLAMA | {"head_dim": None},
    "no KV heads": LLAMA | {"num_key_value_heads": None},
    "a class whose head size is no quotient": LLAMA | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": None,
    },
    "names of its own": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 5, "n_head": 4, "n_embd": 128,
        "vocab_size": 128, "n_positions": 256,
    },
    "one KV head by a switch": {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "num_hidden_layers": 3, "hidden_size": 128,
        "num_attention_heads": 4, "multi_query": True, "alibi": False, "vocab_size": 128,
    },
    "KV heads that count": {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "num_hidden_layers": 3, "hidden_size": 128,
        "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False,
        "vocab_size": 128,
    },
    "a class without grouped heads": {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "num_hidden_layers": 2, "hidden_size": 128,
        "num_attention_heads": 4, "ffn_dim": 64, "vocab_size": 128, "word_embed_proj_dim": 128,
    },
}  # fmt: skip


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_vllm_reads_the_same(write, fields):
    directory = write(fields)
    with inspected_here():
        theirs = ModelConfig(model=str(directory), skip_tokenizer_init=True, dtype="float32", max_model_len=128)
    assert settings.traits_of(model.read(str(directory))) == settings.traits_of(theirs)


def test_a_language_model_within_another(write):
    """Of Gemma 3, files state only what differs from its class."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    found = model.read(str(write(whole)))
    traits = settings.traits_of(found)
    assert (traits.architecture, traits.num_layers) == ("Gemma3ForConditionalGeneration", 34)
    assert (traits.num_heads, traits.num_kv_heads, traits.head_size) == (8, 4, 256)
    dense = model.dense_layers(found, compat.MAX_HEAD_SIZE)
    assert [layer for layer in range(34) if layer not in dense] == [5, 11, 17, 23, 29]
    assert set(dense.values()) == {"sliding window"}


def test_without_transformers_a_plain_file_is_read_all_the_same(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    traits = settings.traits_of(model.read(str(write(LLAMA, head_dim=None, num_key_value_heads=None))))
    assert (traits.num_layers, traits.num_heads, traits.num_kv_heads, traits.head_size) == (4, 6, 6, 16)


def test_code_beside_the_weights_is_not_run(write, tmp_path):
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}, "head_dim": None}
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert settings.traits_of(model.read(str(write(LLAMA, **own)))).head_size == 16
    assert not (tmp_path / "ran").exists()


def test_a_file_that_says_all_needs_neither_torch_nor_vllm(write):
    code = (
        "import sys; from vllm_s2o import model, settings\n"
        f"print(settings.traits_of(model.read({str(write(LLAMA))!r})).num_heads)\n"
        "print({'torch', 'transformers', 'triton', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "6\nset()\n"


# -- layers that cannot be sparse -------------------------------------------------------------------------------------

DENSE = {
    "nothing": ({}, {}),
    "all slide": ({"sliding_window": 256}, dict.fromkeys(range(4), "sliding window")),
    "a window that is switched off": ({"sliding_window": 256, "use_sliding_window": False}, {}),
    "some slide": (
        {"sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"] * 2},
        {0: "sliding window", 2: "sliding window"},
    ),
    "a hybrid": (
        {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
        dict.fromkeys(range(3), "no attention"),
    ),
    "soft cap": ({"attn_logit_softcapping": 50.0}, dict.fromkeys(range(4), "logits soft cap")),
    "ALiBi": ({"alibi": True}, dict.fromkeys(range(4), "ALiBi")),
    "sinks": ({"model_type": "gpt_oss"}, dict.fromkeys(range(4), "attention sinks")),
    "large heads": ({"head_dim": 288}, dict.fromkeys(range(4), "head size 288, above 256")),
    "the largest heads": ({"head_dim": 256}, {}),
}


@pytest.mark.parametrize("changes, dense", DENSE.values(), ids=DENSE)
def test_dense_layers(write, changes, dense):
    assert model.dense_layers(model.read(str(write(LLAMA, **changes))), compat.MAX_HEAD_SIZE) == dense


@pytest.mark.parametrize(
    "changes, full",
    [
        ({"model_type": "gemma3_text", "num_hidden_layers": 12, "sliding_window": 1024}, [5, 11]),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, [0, 1]),
    ],
    ids=["gemma 3", "qwen 2"],
)
def test_the_class_knows_which_layers_have_the_window(write, changes, full):
    """Also where the file states every dimension."""
    found = model.read(str(write(LLAMA, **changes)))
    dense = model.dense_layers(found, compat.MAX_HEAD_SIZE)
    layers = range(settings.traits_of(found).num_layers)
    assert [layer for layer in layers if layer not in dense] == full
    assert set(dense.values()) == {"sliding window"}


@pytest.mark.parametrize("changes, latent", [({}, False), ({"kv_lora_rank": 64}, True)], ids=["plain", "latent"])
def test_latent_attention_is_seen(write, changes, latent):
    assert model.read(str(write(LLAMA, **changes))).use_mla is latent


@pytest.mark.parametrize("changes, both", [({}, False), ({"is_encoder_decoder": True}, True)], ids=["decoder", "both"])
def test_an_encoder_is_seen(write, changes, both):
    assert model.read(str(write(LLAMA, **changes))).is_encoder_decoder is both


# -- refusals ---------------------------------------------------------------------------------------------------------

BAD = {
    "no JSON": ("{", "no JSON text"),
    "not UTF-8": (b'{"a": "\xff"}', "no JSON text"),
    "deep": ("[" * 100_000, "no JSON text"),
    "a list": ("[]", "holds no fields", "JSON object"),
    "no layers": (LLAMA | {"num_hidden_layers": None, "model_type": "own"}, "'num_hidden_layers'"),
    "no heads": (LLAMA | {"num_attention_heads": None, "model_type": "own"}, "'num_attention_heads'"),
    "layers in words": (LLAMA | {"num_hidden_layers": "four"}, "'num_hidden_layers'", '"four"', "from 1 to"),
    "no layer at all": (LLAMA | {"num_hidden_layers": 0}, "'num_hidden_layers'", "0", "from 1 to"),
    "a billion layers": (LLAMA | {"num_hidden_layers": 10**9}, "'num_hidden_layers'", "from 1 to 65536"),
    "heads a truth": (LLAMA | {"num_attention_heads": True}, "'num_attention_heads'", "true"),
    "half a KV head": (LLAMA | {"num_key_value_heads": 0.5}, "'num_key_value_heads'", "0.5"),
    "negative head size": (LLAMA | {"head_dim": -1}, "'head_dim'", "-1"),
    "heads without a size": (LLAMA | {"hidden_size": 3, "head_dim": None, "model_type": "own"}, "'hidden_size'"),
    "an architecture that is none": (LLAMA | {"architectures": 5}, "dimensions"),
}


@pytest.mark.parametrize("content, words", [(b[0], b[1:]) for b in BAD.values()], ids=BAD)
def test_bad_config_json(write, content, words):
    sentence = refusal(write(content))
    assert "config.json" in sentence
    for word in words:
        assert word in sentence


def test_a_large_file_is_not_read(write):
    assert "larger than 16 MiB" in refusal(write(b" " * (model.MAX_BYTES + 1)))


ALLOWED = "allowed is a model's directory, or its name on Hugging Face."


def test_places_without_a_model(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path} is a directory without a config.json; {ALLOWED}"
    (tmp_path / "a.gguf").touch()
    assert refusal(tmp_path / "a.gguf") == f"{tmp_path / 'a.gguf'} is a file; {ALLOWED}"
    for name in ("./no", "/no/such/model", "~nobody-of-that-name/x", "a/b/c"):
        assert refusal(name) == f"there is no directory {name}; {ALLOWED}"
    assert refusal("") == f"the model's name is empty; {ALLOWED}"
    assert "cannot be looked at" in refusal("a" * 5000)
    assert "no model can have that name" in refusal("a b/c")


# -- names on Hugging Face --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Hugging Face's client, with an empty cache and no network."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(model, "_reachable", lambda host: False)
    return huggingface_hub


def test_a_cached_name(hub, write, monkeypatch):
    path = str(write(LLAMA) / "config.json")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: path)
    found = model.read("someone/llama")
    assert (found.model, found.directory) == ("someone/llama", Path(path).parent)
    assert settings.traits_of(found).name == "someone/llama", "a config may be matched by it"


def test_a_name_is_fetched_where_there_is_a_network(hub, write, monkeypatch):
    path = str(write(LLAMA) / "config.json")
    monkeypatch.setattr(model, "_reachable", lambda host: host == "huggingface.co")
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: {("someone/llama", "config.json"): path}[name, file])
    assert model.read("someone/llama").directory == Path(path).parent


def test_without_a_network_the_sentence_comes_at_once(hub, monkeypatch):
    missing = "there is no directory someone/llama, and Hugging Face's cache has no config.json of that name; "
    assert refusal("someone/llama") == f"{missing}huggingface.co cannot be reached to fetch it."
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert refusal("someone/llama") == f"{missing}HF_HUB_OFFLINE keeps from fetching it."


def test_a_host_that_does_not_exist_is_not_reached(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert not model._reachable("no-such-host.invalid")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid")
    assert model._reachable("no-such-host.invalid"), "only the proxy can tell"


def failures():
    """What the client raises, and a part of our sentence."""
    from huggingface_hub import errors

    return {
        errors.RepositoryNotFoundError: "Hugging Face has no model of that name",
        errors.GatedRepoError: "asked for access",
        errors.EntryNotFoundError: "has no config.json",
        errors.LocalEntryNotFoundError: "fetching it failed.",
        ConnectionError: "fetching it failed (ConnectionError)",
    }


@pytest.mark.parametrize("kind, words", failures().items(), ids=lambda p: getattr(p, "__name__", ""))
def test_what_the_hub_says_becomes_a_sentence(hub, monkeypatch, kind, words):
    def fail(name, file):
        raise kind.__new__(kind)  # their arguments differ between versions

    monkeypatch.setattr(model, "_reachable", lambda host: True)
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    sentence = refusal("someone/llama")
    assert words in sentence and "someone/llama" in sentence


def test_names_need_the_hubs_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "names need huggingface_hub" in refusal("someone/llama")
