"""Keys and values of dense prompts, of sparse ones and of other configs never mix; where they may, it is said."""

import pytest
from entering import decided, hashes, request
from vllm.v1.engine.core import EngineCore
from vllm_configs import configured

from vllm_s2o import compat, plugin
from vllm_s2o.compat import requests
from vllm_s2o.metrics.switch import SALT, set_switch


def test_blocks_of_dense_and_sparse_prompts_are_never_the_same(server):
    sparse = hashes(decided(configured()))
    asked = hashes(decided(configured(), extra={"s2o": "dense"}))
    set_switch(False)
    switched_off = hashes(decided(configured()))
    assert len(sparse) == 4
    assert not set(sparse) & set(asked)
    assert asked == switched_off, "dense is dense"
    assert sparse == hashes(request()), "a sparse prompt's are what they are without a decision"


@pytest.mark.parametrize("extra", [None, {"s2o": "dense"}])
def test_a_salt_of_the_clients_stays_apart(server, extra):
    found = [hashes(decided(configured(), extra=extra, salt=salt)) for salt in (None, "mine", "yours")]
    assert not set(found[0]) & set(found[1])
    assert not set(found[1]) & set(found[2])


@pytest.mark.parametrize("given", [None, "x"])
def test_no_salt_of_a_clients_undoes_what_parts_dense_from_sparse(server, given):
    """Nor does it mix two clients' sparse prompts."""
    dense = decided(configured(), extra={"s2o": "dense"}, salt=given)
    alike = decided(configured(), salt=dense.cache_salt)
    assert not set(hashes(dense)) & set(hashes(alike))
    once_more = decided(configured(), salt=alike.cache_salt)
    assert not set(hashes(alike)) & set(hashes(once_more))


def test_a_store_of_keys_and_values_is_parted_by_config(server):
    store = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    one, same, other = (configured(store=store, threshold=threshold) for threshold in (0.01, 0.01, 0.02))
    found = [hashes(decided(config)) for config in (one, same, other)]
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])
    assert not set(found[0]) & set(hashes(request())), "nor does a server without S2O share them"
    dense = [hashes(decided(config, extra={"s2o": "dense"})) for config in (one, other)]
    assert dense[0] == dense[1], "dense prompts do not depend on the config"
    assert not set(dense[0]) & set(found[0])


@pytest.fixture
def engine(monkeypatch, server):
    """As much of vLLM's engine as takes a request, before its caches are made."""
    monkeypatch.setattr(EngineCore, "_initialize_kv_caches", lambda self, vllm_config: "made")
    monkeypatch.setattr(EngineCore, "preprocess_add_request", lambda self, entered: (entered, 0))

    def built(config, late: bool = False) -> EngineCore:
        made = object.__new__(EngineCore)
        made.vllm_config = config
        if not late:
            requests.follow_requests(plugin.admit, plugin.hash_for_stores, load=True)
        assert made._initialize_kv_caches(config) == "made"
        requests.follow_requests(plugin.admit, plugin.hash_for_stores, load=True)
        return made

    return built


def test_a_store_is_parted_by_what_runs_and_not_by_what_a_file_says_later(engine, tmp_path):
    path = tmp_path / "mine.yaml"
    store = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}

    def start(threshold: float) -> EngineCore:
        path.write_text(f"params:\n  threshold: {threshold}\n")
        return engine(configured(store=store, config=str(path)))

    first, second = start(0.01), start(0.02)
    path.unlink()
    for one in (first, second, first):
        entered, _ = one.preprocess_add_request(request())
        assert entered.cache_salt == f"s2o-{one.vllm_config.digest}"
    assert first.vllm_config.digest != second.vllm_config.digest


def test_an_engine_that_was_built_before_the_hooks_parts_its_store_too(engine):
    """A spawned process may have loaded the plugins before it had an engine to hook."""
    late = engine(configured(store={"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}), late=True)
    assert not hasattr(late, "s2o_started"), "else nothing is tried"
    entered, _ = late.preprocess_add_request(request())
    assert entered.cache_salt == f"s2o-{late.vllm_config.digest}"


def test_an_engine_without_the_flag_that_came_before_is_left_alone(engine):
    config = configured(store={"kv_connector": "OffloadingConnector", "kv_role": "kv_both"})
    engine(config)
    before = object.__new__(EngineCore)
    before.vllm_config = config
    config.attention_config.backend = None
    entered, _ = before.preprocess_add_request(request())
    assert entered.cache_salt is None


def test_salts_are_written_as_documented(server):
    store = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    config = configured(store=store)
    assert decided(config).cache_salt == f"s2o-{config.digest}"
    assert decided(config, salt="mine").cache_salt == f"s2o-{config.digest}-mine"
    assert decided(configured(), extra={"s2o": "dense"}).cache_salt == SALT == "s2o-dense"


@pytest.mark.parametrize(
    ("connector", "mixes", "hands_over"),
    [
        (None, [], []),
        ("OffloadingConnector", [], []),
        ("LMCacheConnectorV1", ["LMCacheConnectorV1"], []),
        ("SomeoneElses", ["SomeoneElses"], []),
        ("my.stores:OffloadingConnector", ["my.stores.OffloadingConnector"], []),
        (("OffloadingConnector", "mine:NixlConnector"), ["mine.NixlConnector"], []),
        ("NixlConnector", [], ["NixlConnector"]),
        ("MooncakeConnector", [], ["MooncakeConnector"]),
        (("NixlConnector", "ExampleConnector"), ["ExampleConnector"], ["NixlConnector"]),
    ],
)
def test_connectors_that_may_mix_configs_are_warned_of(connector, mixes, hands_over, monkeypatch):
    """Those of stores that know no salt, and those that bring what another engine has computed.

    One that a module of the user's has counts before vLLM's own of that name.
    """

    def named(one: str) -> dict:
        module, _, connector = one.rpartition(":")
        return {"kv_connector": connector} | ({"kv_connector_module_path": module} if module else {})

    store: dict = {"kv_role": "kv_both"}
    if isinstance(connector, tuple):
        several = [named(one) for one in connector]
        store |= {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": several}}
    elif connector:
        store |= named(connector)
    lines = []
    monkeypatch.setattr(compat.logger(), "warning", lambda line, *values: lines.append(line % values))
    plugin.check(configured(store=store if connector else None))
    for part, whose in (
        ("may key what it stores by tokens alone", mixes),
        ("as another one computed them", hands_over),
    ):
        assert [line.split()[1] for line in lines if part in line] == whose


def test_known_connectors_are_vllms():
    """A name that vLLM does not have would hide the warning for another one."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert set(KVConnectorFactory._registry) >= requests.SALTED_STORES | requests.HANDING_OVER
