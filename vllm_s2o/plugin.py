"""The entry point that vLLM calls in each of its processes: API server, engine, workers.

Light on purpose: no CUDA context, no kernel, and nothing changes for a server without the flag.
"""

from vllm_s2o import compat
from vllm_s2o.compat import requests

MLA = "the S2O backend does not support multi-head latent attention (MLA): start without the flag."
ENCODER_DECODER = "the S2O backend does not support encoder-decoder models: start without the flag."
# What is skipped depends on where a prompt is cut into chunks, and that on the other requests of a step.
BATCH_INVARIANT = "the S2O backend does not support VLLM_BATCH_INVARIANT: unset it, or start without the flag."

# A cache salt keeps the blocks of one config from those of another, in vLLM's cache and wherever its hashes are keys.
MIXING = (
    "s2o: %s may key what it stores by tokens alone, and then gives keys and values of one config, or of dense "
    "prompts, to another: let only servers with this config use the store, and neither switch S2O off nor ask for "
    "dense prompts."
)
HANDED_OVER = (
    "s2o: %s hands an engine keys and values as another one computed them, whatever its own config and decision say, "
    "and they stay in its prefix cache: give both engines the same config, send a request that asks to run dense to "
    "both so, and switch S2O off and on in both."
)


def register() -> None:
    """Register the backend and watch for the flag. Safe to call any number of times."""
    problem = compat.version_problem()
    if problem is not None:
        compat.logger().error("s2o: %s", problem)
    try:
        compat.register_backend()
        compat.install_hooks(check)
        requests.follow_requests(admit, hash_for_stores)
    except Exception:
        # An unsupported vLLM may have moved anything. A server without the flag must start all the same.
        if problem is None:
            raise


def check(vllm_config) -> None:
    """Refuse what cannot be served while the person who starts the server can still see it."""
    problem = compat.version_problem()
    if problem is not None:
        compat.stop(problem)
    model_config = vllm_config.model_config
    if model_config is None:
        return
    if model_config.use_mla:
        compat.stop(MLA)
    if model_config.is_encoder_decoder:
        compat.stop(ENCODER_DECODER)
    if compat.batch_invariant():
        compat.stop(BATCH_INVARIANT)
    from vllm_s2o.config import ConfigError
    from vllm_s2o.settings import resolve

    try:
        config = resolve(vllm_config)
    except ConfigError as error:
        compat.stop(str(error))
    logger = compat.logger()
    longest = model_config.max_model_len
    for doubt in (config.no_effect(longest, compat.longest_chunk(vllm_config)), config.beyond(longest)):
        if doubt is not None:
            logger.warning("s2o: %s", doubt)
    unseen = requests.unseen_steps(vllm_config)
    if unseen is not None:
        logger.warning("s2o: no switch, no dense requests, and figures without requests: %s.", unseen)
    connectors = set(requests.kv_connectors(vllm_config)) - requests.SALTED_STORES
    for doubt, named in (
        (MIXING, connectors - requests.HANDING_OVER),
        (HANDED_OVER, connectors & requests.HANDING_OVER),
    ):
        if named:
            logger.warning(doubt, ", ".join(sorted(named)))
    from vllm_s2o import metrics

    metrics.begin(str(model_config.model), logger, fixed=unseen)
    requests.follow_requests(admit, hash_for_stores, load=True)
    requests.refuse_lost_wishes()


def hash_for_stores(vllm_config) -> str | None:
    """Of the config that an engine runs with, where keys and values leave it. Asked for when it is built, as its layers
    read the config: what comes of a file later changes nothing."""
    if not compat.uses_s2o(vllm_config) or not requests.kv_connectors(vllm_config):
        return None
    from vllm_s2o.settings import resolve

    return resolve(vllm_config).digest()


def admit(vllm_config, engine_request, config_hash: str | None) -> None:
    """See `metrics.switch.admit`; imported with the first request of an engine with the flag."""
    if compat.uses_s2o(vllm_config):
        from vllm_s2o.metrics import switch

        switch.admit(vllm_config, engine_request, config_hash)
