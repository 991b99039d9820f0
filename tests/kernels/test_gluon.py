"""The Gluon kernels against the Triton kernels that they stand in for: the same rankings, the same stops. They have no
interpreter: without a GPU they are only compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from barriers import check_barriers
from cases import DEVICE, error_bar, make_case
from processes import python_path

from vllm_s2o import S2OParams, attention, prefill_attention
from vllm_s2o.kernels import cuda, prefill, rank

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="Gluon kernels run on an NVIDIA GPU only")
HOPPER = DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="these kernels need a Hopper GPU")

LENGTHS = dict(query_lens=[700, 1, 333, 130, 64], seq_lens=[1700, 900, 333, 2001, 64])
RULES = {
    "dense": dict(threshold=0.0),
    "worst row": dict(threshold=0.01),
    "short intervals": dict(threshold=0.02, key_block=32, stop_interval=1),
    "budget": dict(budget=0.3),
    "dense end": dict(threshold=0.3, dense_tail=100),
    "long histories": dict(threshold=0.4, reference_len=60),
    "dense end of a budget": dict(budget=0.1, dense_tail=1),
    # Histories that no interval divides, and for tiles of 64 no block either: a ranking ends between two tests.
    "a ranking for each KV head": dict(threshold=0.01, ranking="kv_head"),
    "odd histories": dict(threshold=0.002),
    "odd histories, long intervals": dict(threshold=0.002, stop_interval=8),
}


def params_of(rule, tile):
    segment_len = tile if rule.startswith("odd") else 256
    return S2OParams(**{"dense_tail": 0, **RULES[rule]}, segment_len=segment_len, tile_size=tile)


def rankings_of(case, params):
    return params.num_rankings(case.query.shape[1], case.key_cache.shape[2])


def one_wave(case, params):
    plan = attention.plan_step(case.query_lens, case.lens, params, rankings_of(case, params), max_slots=2**30)
    (wave,) = attention.to_device(plan, DEVICE).waves
    return wave


def ranked(module, case, wave, params):
    return module.rank_keys(
        case.query, case.key_cache, case.block_table, wave.segments, wave.wave.num_slots, params.num_classes,
        max_history=wave.wave.max_history, groups=wave.groups, num_rankings=rankings_of(case, params),
    )  # fmt: skip


def attended(module, case, params, wave, slots, thresholds, **options):
    """Output, NaN where nothing was written, and visited pairs."""
    out = torch.full_like(case.query, float("nan"))
    pairs = module.attend(
        case.query, case.key_cache, case.value_cache, case.block_table, wave.segments, wave.tiles, slots,
        thresholds, out, scale=case.scale, key_block=params.key_block, stop_interval=params.stop_interval,
        tile_size=params.tile_size, num_rankings=rankings_of(case, params), **options,
    )  # fmt: skip
    return out, pairs


@gpu
@needs_gpu
@pytest.mark.parametrize(
    ("query_lens", "seq_lens"), [([100], [100]), ([5000], [5000]), ([333, 1, 700], [1733, 40, 700])], ids=str
)
@pytest.mark.parametrize("ranking", ["kv_head", "query_head"])
def test_votes_place_as_running_counts_do(query_lens, seq_lens, ranking):
    case = make_case(query_lens, seq_lens, num_heads=4, num_kv_heads=2, dtype=torch.bfloat16)
    params = S2OParams(dense_tail=0, segment_len=64, tile_size=64, ranking=ranking)
    wave = one_wave(case, params)
    assert torch.equal(ranked(cuda, case, wave, params), ranked(rank, case, wave, params))


@gpu
@needs_hopper
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", ["joined_rows", "joined_blocks", "head_major"])
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stops_where_the_triton_kernel_stops(dtype, head_size, tile, layout, rule):
    from vllm_s2o.kernels import hopper

    case = make_case(**LENGTHS, num_heads=8, num_kv_heads=2, head_size=head_size, dtype=dtype, layout=layout)
    params = params_of(rule, tile)
    wave = one_wave(case, params)
    slots = ranked(rank, case, wave, params)
    thresholds = torch.full((8,), 0.0 if params.budget else params.threshold, device=DEVICE)
    interval = params.key_block * params.stop_interval
    assert hopper.unsuitable(case.query, case.key_cache, case.value_cache, tile, interval) is None
    results = [attended(module, case, params, wave, slots, thresholds) for module in (prefill, hopper, hopper)]
    (expected, want), (out, pairs), again = results
    assert torch.equal(pairs, want)
    assert torch.equal(out, again[0]), "two runs differ"
    exact, bar = error_bar(case)
    if rule == "dense":
        assert (out - exact).abs().max() <= bar
    for mine, seen in zip(wave.wave.tiles, pairs.tolist(), strict=True):
        if mine.share == 0:
            begin = wave.wave.segments[mine.segment].query_pos + mine.first
            assert seen == [sum(range(begin + 1, begin + mine.rows + 1))] * 8
    assert any(tile.share == 0 for tile in wave.wave.tiles) == (params.dense_tail > 0)
    assert (out.float() - expected.float()).abs().max() <= bar


@gpu
@needs_hopper
@pytest.mark.parametrize("rule", ["worst row", "short intervals", "odd histories", "budget", "dense end"])
@pytest.mark.parametrize("tile", [64, 128])
def test_it_does_not_matter_who_takes_a_tile(tile, rule):
    """One program takes all tiles, or each takes a few: rings, barriers and queries are used over and over."""
    from vllm_s2o.kernels import hopper

    case = make_case(**LENGTHS, num_heads=8, num_kv_heads=2, dtype=torch.bfloat16)
    params = params_of(rule, tile)
    wave = one_wave(case, params)
    slots = ranked(rank, case, wave, params)
    thresholds = torch.full((8,), 0.0 if params.budget else params.threshold, device=DEVICE)

    given = (case, params, wave, slots, thresholds)
    _, pairs = attended(prefill, *given)
    first, _ = attended(hopper, *given)
    for programs in (1, 2, 3, 100) * 5:
        out, visited = attended(hopper, *given, options=hopper.Launch(programs=programs))
        assert torch.equal(visited, pairs), programs
        assert torch.equal(out, first), programs


@pytest.fixture
def shared_gpu():
    """Other processes have the GPU too, which interrupts a kernel of some milliseconds."""
    program = Path(__file__).parents[1] / "helpers" / "keep_gpu_busy.py"
    busy = [subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for process in busy:
            assert process.stdout.readline() == b"busy\n"
        yield
    finally:
        for process in busy:
            process.kill()
            process.communicate()


@gpu
@needs_hopper
@pytest.mark.parametrize("tile", [64, 128])
def test_the_bits_stay_where_the_gpu_is_shared(shared_gpu, tile):
    """Of runs that are interrupted, one in a hundred had another result while a barrier shared its memory."""
    from vllm_s2o.kernels import hopper

    case = make_case([2000], [6000], num_heads=8, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    params = S2OParams(dense_tail=0, threshold=0.01, segment_len=256, tile_size=tile)
    wave = one_wave(case, params)
    slots = ranked(rank, case, wave, params)
    given = (case, params, wave, slots, torch.full((8,), params.threshold, device=DEVICE))
    out, pairs = attended(hopper, *given, options=hopper.Launch(programs=1))
    for _ in range(400):
        again, visited = attended(hopper, *given, options=hopper.Launch(programs=1))
        assert torch.equal(visited, pairs)
        assert torch.equal(again, out)


@gpu
@needs_hopper
def test_many_tiles_that_stop_everywhere():
    """Thresholds of their own make heads stop after any number of blocks, in a second tile and in a twentieth."""
    from vllm_s2o.kernels import hopper

    case = make_case([3000, 517], [6000, 517], num_heads=32, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    params = S2OParams(dense_tail=0, segment_len=128, key_block=32, stop_interval=4)
    wave = one_wave(case, params)
    slots = ranked(rank, case, wave, params)
    thresholds = torch.logspace(-4, -0.3, 32, device=DEVICE)
    results = []
    for module, options in ((prefill, {}), *((hopper, dict(options=hopper.Launch(programs=n))) for n in (7, 0) * 10)):
        results.append(attended(module, case, params, wave, slots, thresholds, **options))
    (expected, want), *ours = results
    assert want.unique().numel() > 50
    assert all(torch.equal(pairs, want) and torch.equal(out, ours[0][0]) for out, pairs in ours)
    assert (ours[0][0].float() - expected.float()).square().mean() < 1e-4 * expected.float().square().mean()


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_size", [96, 256])
def test_other_head_sizes_at_the_shipped_tile(head_size, dtype):
    case = make_case(**LENGTHS, num_heads=8, num_kv_heads=2, head_size=head_size, dtype=dtype)
    out = prefill_attention(**case.arguments, params=S2OParams(dense_tail=0, threshold=0.0, segment_len=256))
    exact, bar = error_bar(case)
    assert (out - exact).abs().max() <= bar


@gpu
@needs_gpu
def test_a_step_does_not_wait_for_the_device():
    """From the plan to the output, once the kernels are compiled."""
    case = make_case(**LENGTHS, num_heads=8, num_kv_heads=2, dtype=torch.bfloat16)
    params, out = S2OParams(dense_tail=0, threshold=0.01, segment_len=256), torch.empty_like(case.query)

    def step():
        plan = attention.plan_step(case.query_lens, case.lens, params, rankings_of(case, params))
        plan = attention.to_device(plan, DEVICE)
        arguments = (case.query, case.key_cache, case.value_cache, case.block_table, plan, params, case.scale, out)
        return attention.run(*arguments)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@needs_hopper
@pytest.mark.parametrize("why", ["head size", "interval", "dtype"])
def test_what_does_not_suit_takes_the_triton_kernel(why):
    dtype = torch.float32 if why == "dtype" else torch.bfloat16
    case = make_case([300], [300], head_size=96 if why == "head size" else 64, dtype=dtype)
    rules = dict(key_block=16, stop_interval=1) if why == "interval" else {}
    params = S2OParams(dense_tail=0, threshold=0.02, segment_len=128, **rules)
    ours = prefill_attention(**case.arguments, params=params)
    assert torch.equal(ours, prefill_attention(**case.arguments, params=params, implementation="triton"))


def test_compiled_for_a_hopper_gpu():
    """By the installed Triton, whose Gluon is not that of other versions, and within its shared memory."""
    script = Path(__file__).parents[1] / "helpers" / "compile_for_hopper.py"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = python_path(script.parent)  # `make` keeps Python from looking beside a script
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = dict(
        line.split() for line in done.stdout.splitlines() if line.startswith(("attend", "count", "place", "score"))
    )
    assert 0 < int(shared["attend_other"]) < int(shared["attend"]) <= 227 * 1024
    assert 0 < int(shared["score_128_bf16"]) < int(shared["score_256_bf16"])
    scores = {name: int(taken) for name, taken in shared.items() if name.startswith("score")}
    assert len(scores) == 12
    assert max(scores.values()) <= 227 * 1024, scores
    assert int(shared["count"]) == int(shared["place"]) == 0


PTX = """
    add.s32 \t%r1, %r9, 81920;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1;
    add.s32 \t%r2, %r9, 82000;
    st.shared.b32 [%r2 + 0], %r5;
    ld.shared.v2.b32 {{%r6, %r7}}, [%r8+{other}];
    st.shared.b32 \t[{last}], 0;
"""


@pytest.mark.parametrize(
    ("other", "last", "shared"),
    [
        (81924, "global_smem+81928", None),  # a thread's own place, of which nothing is known
        (81920, "global_smem+82004", 81920),
        (82100, "global_smem+81924", 81924),
        (82100, "%r1+4", 81924),
    ],
)
def test_a_barrier_that_shares_its_memory_is_found(other, last, shared):
    ptx = PTX.format(other=other, last=last)
    if shared is None:
        return check_barriers(ptx)
    with pytest.raises(SystemExit, match=rf"barriers share their memory at \[{shared}\]"):
        check_barriers(ptx)


def test_ptx_without_a_barrier_that_is_found_is_refused():
    with pytest.raises(SystemExit, match="no barrier was found"):
        check_barriers(PTX.format(other=1, last="%r1").replace("mbarrier.init.shared::cta", "mbarrier.init.shared"))


def test_giving_up_leaves_the_triton_kernels(monkeypatch):
    monkeypatch.setattr(cuda, "_missing", None)
    assert cuda.uses_gluon()
    cuda.give_up("they do not compile here (SomeError)")
    assert not cuda.uses_gluon()
    said = cuda.describe(DEVICE, torch.bfloat16, 2, 64, S2OParams())
    assert "without those in Gluon: they do not compile here (SomeError)" in said
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"capability": (8, 0)}, "the GPU is no Hopper"),
        ({"dtype": torch.float32}, "torch.float32"),
        ({"head_size": 96}, "head size 96"),
        ({"tile": 32}, "tile_size=32"),
        ({"interval": 16}, "a stop test every 16 keys"),
        ({"layout": "transposed_keys"}, "cache strides"),
        ({"shift": 1}, "cache alignment"),
        ({"skew": 8}, "query alignment"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons_for_the_triton_kernel(monkeypatch, change, reason):
    """Decided on the host, from types, strides and addresses."""
    from vllm_s2o.kernels import hopper

    given = dict(capability=(9, 0), dtype=torch.bfloat16, head_size=128, tile=128, interval=256)
    given |= dict(layout="joined_rows", shift=0, skew=0) | change
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: given["capability"])
    case = make_case([40], [60], head_size=given["head_size"], dtype=given["dtype"], layout=given["layout"])
    key_cache, shift = case.key_cache, given["shift"]
    if shift:  # rows that begin beside a multiple of 16 bytes
        memory = torch.zeros(key_cache.numel() * 2 + shift, dtype=key_cache.dtype, device=DEVICE)
        key_cache = memory[shift:].as_strided(key_cache.shape, key_cache.stride())
    query, skew = case.query, given["skew"]
    if skew:  # a slice of wider rows
        wide = torch.zeros(query.shape[0], query.shape[1] * query.shape[2] + skew, dtype=query.dtype, device=DEVICE)
        query = wide[:, skew:].unflatten(1, query.shape[1:])
    problem = (query, key_cache, case.value_cache, given["tile"], given["interval"])
    assert hopper.unsuitable(*problem) == reason
