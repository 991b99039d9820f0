"""Steps as vLLM's scheduler describes them to a worker."""

from types import SimpleNamespace

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput


def new(name: str, length: int, computed: int = 0, mark: str | None = None) -> NewRequestData:
    """A request that was not scheduled before."""
    params = SamplingParams(extra_args=None if mark is None else {"s2o": mark})
    return NewRequestData(
        req_id=name, prompt_token_ids=[1] * length, mm_features=[], sampling_params=params, pooling_params=None,
        block_ids=(), num_computed_tokens=computed, lora_request=None,
    )  # fmt: skip


def scheduled(tokens: dict[str, int], new=(), computed: dict[str, int] | None = None, finished=(), resumed=()):
    """
    Args:
        tokens: new tokens of each request.
        computed: what the others had, whose data the workers know.
        resumed: of these, those that start again.
    """
    computed = computed or {}
    cached = CachedRequestData(
        req_ids=list(computed), resumed_req_ids=set(resumed), new_token_ids=[], all_token_ids={}, new_block_ids=[],
        num_computed_tokens=list(computed.values()), num_output_tokens=[0] * len(computed),
    )  # fmt: skip
    return SchedulerOutput(
        scheduled_new_reqs=list(new), scheduled_cached_reqs=cached, num_scheduled_tokens=dict(tokens),
        total_num_scheduled_tokens=sum(tokens.values()), scheduled_spec_decode_tokens={}, scheduled_encoder_inputs={},
        num_common_prefix_blocks=[], finished_req_ids=set(finished), free_encoder_mm_hashes=[],
    )  # fmt: skip


def runner_v1(*names: str) -> SimpleNamespace:
    """As much of vLLM's first model runner as is looked at: its rows."""
    return SimpleNamespace(input_batch=SimpleNamespace(req_ids=list(names)))


def runner_v2(places: dict[int, str]) -> SimpleNamespace:
    """The same of the second one: its table of requests."""
    return SimpleNamespace(req_states=SimpleNamespace(index_to_req_id=places))
