"""The entry point that vLLM calls in each of its processes: API server, engine, workers.

Light on purpose: no CUDA context, no kernel, and nothing changes for a server without the flag.
"""

from vllm_s2o import compat

MLA = "the S2O backend does not support multi-head latent attention (MLA): start without the flag."
# What is skipped depends on where a prompt is cut into chunks, and that on the other requests of a step.
BATCH_INVARIANT = "the S2O backend does not support VLLM_BATCH_INVARIANT: unset it, or start without the flag."


def register() -> None:
    """Register the backend and watch for the flag. Safe to call any number of times."""
    problem = compat.version_problem()
    if problem is not None:
        compat.logger().error("s2o: %s", problem)
    try:
        compat.register_backend()
        compat.install_hooks(check)
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
    if compat.batch_invariant():
        compat.stop(BATCH_INVARIANT)
    from vllm_s2o.config import ConfigError
    from vllm_s2o.settings import resolve

    try:
        config = resolve(vllm_config)
    except ConfigError as error:
        compat.stop(str(error))
    useless = config.no_effect(model_config.max_model_len)
    if useless is not None:
        compat.logger().warning("s2o: %s", useless)
