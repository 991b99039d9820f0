"""The assembly of `vote.py`, which no interpreter of Triton runs, executed instruction by instruction."""

import itertools

import numpy as np
import pytest
from ptx import Warp

from vllm_s2o.kernels import vote

KEYS = 32 * vote.ROUNDS
GARBAGE = 987_654_321
ADDRESS = 2**40


def operands(count: int) -> list[np.ndarray]:
    return [np.full(32, GARBAGE, np.uint64) for _ in range(count)]


@pytest.fixture(params=[(512, 1.0), (512, 0.05), (496, 9.0), (48, 1.0), (16, 0.05)], ids=str)
def block(request):
    """Classes of a block's keys, [512], 0 beyond its end, and how many keys it has; few classes or many."""
    count, evenness = request.param
    rng = np.random.default_rng(count)
    classes = np.zeros(KEYS, int)
    classes[:count] = rng.choice(vote.CLASSES, count, p=rng.dirichlet(np.full(vote.CLASSES, evenness)))
    return classes, count


def test_count(block):
    classes, count = block
    given, memory = operands(16), {}
    for word in range(4):  # a thread holds 16 neighbours, four to a word
        bytes_of = classes.reshape(32, 4, 4)[:, word].astype(np.uint64)
        given[4 + word] = sum(bytes_of[:, byte] << np.uint64(8 * byte) for byte in range(4))
        given[8 + word] = np.full(32, ADDRESS, np.uint64)
        given[12 + word] = np.full(32, KEYS - count, np.uint64)
    Warp(given, memory).run(vote._count_instructions())
    counts = [memory[ADDRESS + 4 * cls] for cls in range(vote.CLASSES)]
    assert counts == np.bincount(classes[:count], minlength=vote.CLASSES).tolist()


def test_place(block):
    """Each key's slot goes behind those of its class that come earlier; what lies beyond the end stays unwritten."""
    classes, count = block
    rng = np.random.default_rng(1)
    offsets = rng.permutation(vote.CLASSES) * 1000
    slots = np.where(np.arange(KEYS) < count, rng.permutation(KEYS) + 7, 2**32 - 1)
    given, rounds = operands(5 * vote.ROUNDS), vote.ROUNDS
    for r in range(rounds):  # a thread holds one key of every 32
        mine = slice(32 * r, 32 * r + 32)
        given[2 * rounds + r] = classes[mine].astype(np.uint64)
        given[3 * rounds + r] = slots[mine].astype(np.uint64)
        given[4 * rounds + r] = np.full(32, ADDRESS, np.uint64)
    memory = {ADDRESS + 4 * cls: int(offset) for cls, offset in enumerate(offsets)}
    Warp(given, memory).run(vote._place_instructions())
    out = [(int(given[rounds + r][t]), int(given[r][t])) for r in range(rounds) for t in range(32)]
    written = [(place, slot) for place, slot in out if slot != 2**32 - 1]

    expected, following = {}, offsets.copy()
    for key in range(count):
        expected[int(following[classes[key]])] = int(slots[key])
        following[classes[key]] += 1
    assert dict(written) == expected and len(written) == count
    # In runs: that is what the sort is for.
    breaks = sum(b[0] != a[0] + 1 for a, b in itertools.pairwise(written))
    assert breaks < len(set(classes[:count]))
