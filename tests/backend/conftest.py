"""Layers and builders as vLLM makes them, and what they report."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import backend_log
import pytest
import tiny
from batch import CPU, DENSE, EXACT
from vllm.compilation.backends import set_model_tag
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_s2o import backend, compat, plugin


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Read once by type of number."""
    plugin.register()
    directory = tmp_path_factory.mktemp("model")
    return {dtype: tiny.model_config(directory, dtype) for dtype in ("float32", "bfloat16")}


@pytest.fixture
def told(monkeypatch):
    """Lines that the backend logs."""
    return backend_log.lines(monkeypatch)


@pytest.fixture
def finished(monkeypatch):
    """Steps that the backend reports as done."""
    steps = []
    monkeypatch.setattr(backend, "reporter", SimpleNamespace(finish=steps.append))
    return steps


@pytest.fixture(autouse=True)
def rank(monkeypatch):
    """This process's place among those that share the heads: (rank, size)."""
    place = [0, 1]
    monkeypatch.setattr(compat, "tensor_parallel", lambda: tuple(place))
    monkeypatch.setattr(compat, "counts_tokens", lambda: place[0] == 0)
    return place


@pytest.fixture
def start(models, told):
    """Layers of a model and their metadata builder, as vLLM makes them."""

    def start(
        s2o=EXACT, *, dense=False, dtype="float32", layers=({},), num_heads=tiny.NUM_HEADS, num_kv_heads=None,
        proposed=None, **changes,
    ):  # fmt: skip
        """A layer may have a `name`, a `tag` under which vLLM loads it, and a `mark`; drafts are `proposed` tokens."""
        config = tiny.vllm_config(models[dtype], None if dense else "CUSTOM", **s2o)
        if proposed is not None:
            config.speculative_config = tiny.speculative_config(config, proposed)
        for name, value in changes.items():
            setattr(config.scheduler_config, name, value)
        made = []
        with set_current_vllm_config(config):
            for index, special in enumerate(layers):
                special = dict(special)
                name = special.pop("name", f"model.layers.{index}.self_attn.attn")
                tag, mark = special.pop("tag", None), special.pop("mark", False)
                with set_model_tag(tag) if tag else nullcontext():
                    layer = Attention(
                        num_heads, tiny.HEAD_SIZE, tiny.HEAD_SIZE**-0.5, num_kv_heads=num_kv_heads or num_heads // 2,
                        cache_config=config.cache_config, prefix=name, **special,
                    )  # fmt: skip
                layer.is_draft_layer = mark
                made.append(layer)
            builder = made[0].attn_backend.get_builder_cls()(
                made[0].get_kv_cache_spec(config), [layer.layer_name for layer in made], config, CPU
            )
        return SimpleNamespace(layers=made, builder=builder, config=config)

    return start


@pytest.fixture
def other_group(monkeypatch):
    """FLASH_ATTN's way to use a step's metadata for a second group of layers; the CPU backend has none."""

    def update_block_table(self, metadata, blk_table, slot_mapping):
        new = copy.copy(metadata)
        new.block_table, new.slot_mapping = blk_table, slot_mapping
        return new

    monkeypatch.setattr(DENSE.get_builder_cls(), "update_block_table", update_block_table, raising=False)
