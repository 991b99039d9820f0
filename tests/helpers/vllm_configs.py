"""As much of a VllmConfig as the plugin looks at."""

from types import SimpleNamespace

from vllm.config import KVTransferConfig, SchedulerConfig

from vllm_s2o import compat
from vllm_s2o.settings import resolve


def configured(store: dict | None = None, **s2o) -> SimpleNamespace:
    """With the flag, for a small model. `store` is what --kv-transfer-config holds; `digest` is of its config."""
    compat.register_backend()
    text = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4)
    traits = {
        "model": "some/model", "use_mla": False, "is_encoder_decoder": False, "hf_config": text, "hf_text_config": text,
        "get_total_num_kv_heads": lambda: 2, "get_head_size": lambda: 64, "max_model_len": 8192,
    }  # fmt: skip
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=compat.s2o_member()),
        model_config=SimpleNamespace(**traits),
        speculative_config=None,
        kv_transfer_config=None if store is None else KVTransferConfig(**store),
        parallel_config=SimpleNamespace(distributed_executor_backend="mp"),
        scheduler_config=SchedulerConfig(
            max_model_len=8192, is_encoder_decoder=False, max_num_batched_tokens=2048, max_num_seqs=8
        ),
        additional_config={"s2o": s2o} if s2o else {},
    )
    config.digest = resolve(config).digest()
    return config
