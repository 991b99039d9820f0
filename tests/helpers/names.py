"""What the installed vLLM calls the backend."""

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_s2o import compat

OWN_NAME = hasattr(AttentionBackendEnum, "register")
"""Whether this vLLM takes new names, which it does from 0.32 on."""
NAME = compat.NAME if OWN_NAME else "CUSTOM"
"""For --attention-backend: the backend's own where there may be one."""
