#!/usr/bin/env python3
"""A first look at the kernels on a GPU, beside FlashAttention-2 as PyTorch has it: what `lab.md` tells of.

    python benchmarks/lab.py [--tokens 32768 131072]

Llama-3.1-8B's attention (32 query heads, 8 KV heads, head size 128, bf16) on a paged cache in vLLM 0.32's layout.
Checks that two runs give the same bits and that nothing waits for the device.
"""

import argparse

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_s2o import S2OParams, attention

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, PAGE = 32, 8, 128, 16
SCALE = HEAD_SIZE**-0.5
VARIANTS = [{"threshold": 0.02}, {"budget": 0.06}, {"budget": 0.1}, {"threshold": 0.0}]


def make(tokens: int, device: torch.device, heavy: float = 0.02):
    """One direction per KV head that all queries share, and a share of the keys that point along it."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device=device, generator=generator)

    def uniform(*shape):
        return torch.rand(*shape, device=device, generator=generator)

    direction = torch.nn.functional.normalize(normal(NUM_KV_HEADS, HEAD_SIZE), dim=-1)
    query = normal(tokens, NUM_HEADS, HEAD_SIZE) * 0.7
    query += 6 * direction.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 0)
    along = (uniform(tokens, NUM_KV_HEADS) < heavy) * 10 + uniform(tokens, NUM_KV_HEADS)
    key = normal(tokens, NUM_KV_HEADS, HEAD_SIZE) + along[..., None] * direction
    value = normal(tokens, NUM_KV_HEADS, HEAD_SIZE)
    blocks = tokens // PAGE
    table = torch.randperm(blocks, device=device, generator=generator)
    memory = torch.empty(blocks, PAGE, NUM_KV_HEADS, 2 * HEAD_SIZE, dtype=torch.bfloat16, device=device)
    memory[table] = torch.cat([key, value], -1).bfloat16().view(memory.shape)
    return query.bfloat16(), key.bfloat16(), value.bfloat16(), *memory.split(HEAD_SIZE, -1), table.int()[None]


def milliseconds(run) -> float:
    return triton.testing.do_bench(run, warmup=50, rep=300, return_mode="median")


def measure(tokens: int) -> None:
    device = torch.device("cuda")
    query, key, value, key_cache, value_cache, table = make(tokens, device)
    heads_first = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]

    def flash():
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        exact, fa2 = flash()[0].transpose(0, 1).float(), milliseconds(flash)
    print(f"{tokens} tokens: FA2 {fa2:.2f} ms", flush=True)
    for variant in VARIANTS:
        params = S2OParams(**variant)
        plan = attention.to_device(attention.plan_step([tokens], [tokens], params, NUM_KV_HEADS), device)
        out = torch.empty_like(query)
        buffers = plan.buffers((NUM_KV_HEADS, HEAD_SIZE), params.num_classes)
        workspace = attention.allocate(buffers, device)
        stage = attention.stages("auto", device)

        def run(plan=plan, params=params, out=out, workspace=workspace):
            return attention.run(
                query, key_cache, value_cache, table, plan, params, SCALE, out, workspace=workspace
            )  # fmt: skip

        def rank(plan=plan, params=params, workspace=workspace, stage=stage):
            for tables in plan.waves:
                stage.rank_keys(
                    query, key_cache, table, tables.segments, tables.wave.num_slots, params.num_classes,
                    max_history=tables.wave.max_history, groups=tables.groups, workspace=workspace,
                )  # fmt: skip

        visited = run().sum().item()
        first = out.clone()
        torch.cuda.set_sync_debug_mode("error")
        run()
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out, first), "two runs differ"
        error = ((out.float() - exact).square().mean() / exact.square().mean()).item()
        total, ranking = milliseconds(run), milliseconds(rank)
        speed = 4 * HEAD_SIZE * visited / (total - ranking) / 1e9
        density = visited / (sum(plan.plan.causal_pairs) * NUM_HEADS)
        print(
            f"  {variant}: density {density:.3f} error {error:.1e} total {total:.2f} ms ranking {ranking:.2f} ms "
            f"attend {speed:.0f} TFLOP/s on visited pairs, {fa2 / total:.2f}x FA2, {len(plan.waves)} waves, "
            f"workspace {sum(tensor.nbytes for tensor in workspace) >> 20} MiB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072], help="lengths of the sequence")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "lab.py needs a CUDA device.\n")
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    for tokens in args.tokens:
        measure(tokens)


if __name__ == "__main__":
    main()
