"""Other projects' sparse attention, on the problem of this table. None of their code is here: a path says where a
checkout lies, and it is imported when it is asked for.

A peer's own parameter trades error for density. `at` gives it for a looseness between 0 (everything is visited) and 1,
so that one search serves all of them. What cannot run raises ImportError or RuntimeError with one sentence.

FlashPrefill V2's attention is a CUDA extension, for which its checkout must have been built. XAttention's is one too
(block_sparse_attn), and is not among them.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from inputs import Problem

BLOCK = 128
"""Queries and keys in one block of a peer's mask: the default of all. FlashPrefill V2 counts a query once a head."""


def reason(error: BaseException) -> str:
    """One line for whatever a peer's code raised: compilers wrap the cause and add their own lines."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)  # Triton's own text begins with a position
    lines = str(text).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def plain_reasons() -> Iterator[None]:
    """Turn what another project's code raises, assertions too, into the two errors that this module promises."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise RuntimeError(reason(error)) from error


def load_file(file: Path) -> types.ModuleType:
    """A module by its file, without the packages above it and what those import."""
    if not file.is_file():
        raise ImportError(f"there is no {file}")
    spec = importlib.util.spec_from_file_location(f"peer_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def recorded(module: types.ModuleType, name: str) -> Iterator[list]:
    """What a function of a module returns in the block: the masks are made inside, and not handed out."""
    function, results = getattr(module, name), []

    def record(*args: Any, **kwargs: Any) -> Any:
        results.append(function(*args, **kwargs))
        return results[-1]

    setattr(module, name, record)
    try:
        yield results
    finally:
        setattr(module, name, function)


def density(before: torch.Tensor, num_tokens: int, diagonal: int = BLOCK, queries: int = BLOCK) -> float:
    """Selected causal pairs / causal pairs.

    Args:
        before: [num_heads, blocks], for each block of queries how many whole blocks of keys before its diagonal square
            are selected.
        diagonal: side of the squares on the diagonal, whose causal half is always selected.
        queries: how many a block of them has.
    """
    heads, blocks = before.shape
    rows = (num_tokens - torch.arange(blocks, device=before.device) * queries).clamp(max=queries)
    pairs = (before.long() * rows).sum().item() * BLOCK
    squares, rest = divmod(num_tokens, diagonal)
    pairs += heads * (squares * diagonal * (diagonal + 1) + rest * (rest + 1)) // 2
    return pairs / (heads * num_tokens * (num_tokens + 1) // 2)


class Peer:
    """One problem under another project's kernel, with that project's defaults but for one parameter."""

    default: float
    dense: float | None = None
    """The parameter that selects everything, where there is one: the result must then be exact."""
    module: Any
    """The other project's code."""
    selects: str
    """Its function that makes the mask."""

    def __init__(self, problem: Problem, path: Path):
        self.problem = problem
        with plain_reasons():
            self.load(path)

    def load(self, path: Path) -> None:
        """Import the checkout and prepare the problem for it."""
        raise NotImplementedError

    def at(self, looseness: float) -> float:
        """The parameter for a looseness between 0 and 1."""
        raise NotImplementedError

    def attend(self, value: float) -> torch.Tensor:
        """[num_tokens, num_heads, head_size]"""
        raise NotImplementedError

    def before(self, result: Any) -> tuple[Any, ...]:
        """Arguments of `density`, from what `selects` returned."""
        raise NotImplementedError

    def run(self, value: float) -> torch.Tensor:
        """[num_tokens, num_heads, head_size]"""
        with plain_reasons():
            return self.attend(value)

    def density(self, value: float) -> float:
        with plain_reasons(), recorded(self.module, self.selects) as results:
            self.attend(value)
            # A short sequence is left to dense attention, without a selection.
            return density(*self.before(results[0])) if results else 1.0

    def forget(self) -> None:
        """Free what one run leaves for the next, so that a run's memory is seen whole."""


class PBS(Peer):
    """xinghaow99/pbs-attn: keys are permuted in segments, then blocks are selected until `threshold` of the pooled
    scores is covered. [batch, heads, tokens, head_size], as many KV heads as heads. Its own patch for models repeats
    the KV heads before the call: the repeating is counted in neither time nor memory."""

    default = 0.9
    dense = 1  # an int: 1.0 would be a share to cover
    selects = "permuted_block_selection"
    segment = 256

    def load(self, path: Path) -> None:
        if not (path / "pbs_attn").is_dir():
            raise ImportError(f"there is no {path / 'pbs_attn'}")
        sys.path.insert(0, str(path))  # its modules import each other by the package's name
        try:
            self.module = importlib.import_module("pbs_attn.src.pbs")
        finally:
            sys.path.remove(str(path))
        p = self.problem
        group = p.shape.num_heads // p.shape.num_kv_heads
        self.query = p.query.transpose(0, 1)[None].contiguous()
        self.key, self.value = (t.transpose(0, 1).repeat_interleave(group, 0)[None] for t in (p.key, p.value))

    def at(self, looseness: float) -> float:
        return 1 - looseness

    def attend(self, value: float) -> torch.Tensor:
        out = self.module.permuted_block_sparse_attn_fwd(
            self.query, self.key, self.value, block_size=BLOCK, segment_size=self.segment, threshold=value, causal=True,
            force_select_first_block=value != self.dense,  # its mask of everything cannot be written to
        )  # fmt: skip
        return out[0].transpose(0, 1)

    def before(self, result: Any) -> tuple[Any, ...]:
        # The mask says nothing of its own segment, which is visited whole; later ones it may name, but none is visited.
        mask = result[1][0]
        segment = torch.arange(mask.shape[-1], device=mask.device) * BLOCK // self.segment
        return (mask & (segment < segment[:, None])).sum(-1), self.problem.num_tokens, self.segment


class FlashPrefill(Peer):
    """qhfan/FlashPrefill: blocks whose pooled score is at least `alpha` times the row's largest, with its values for
    Llama. [batch, tokens, heads, head_size], GQA."""

    default = 0.18
    dense = 0.0
    selects = "deal_output_score"

    def load(self, path: Path) -> None:
        # It takes two decorators from flash-linear-attention, for tensors with gaps and for autocast. There is neither
        # here, and the package need not be.
        utils = types.ModuleType("fla.utils")
        vars(utils).update(dict.fromkeys(("contiguous", "autocast_custom_fwd"), lambda function: function))
        stand_ins = {"fla": types.ModuleType("fla"), "fla.utils": utils}
        kept = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
        sys.modules.update(stand_ins)
        try:
            self.module = load_file(path / "ops" / "flashprefill_native_forward.py")
        finally:
            for name in stand_ins:
                del sys.modules[name]
            sys.modules.update(kept)

    def at(self, looseness: float) -> float:
        return looseness

    def attend(self, value: float) -> torch.Tensor:
        p = self.problem
        out = torch.empty_like(p.query)
        self.module.flash_prefill(
            p.query[None], p.key[None], p.value[None], out[None], block_size=BLOCK, attention_sink=2, window_size=4,
            alpha=value, last_n_block_full=2, min_budget=0,
        )  # fmt: skip
        return out

    def before(self, result: Any) -> tuple[Any, ...]:
        return result[1][0].T - 1, self.problem.num_tokens  # [blocks, num_heads], the diagonal block among them


class FlashPrefillV2(Peer):
    """qhfan/FlashPrefillv2: blocks whose summed score is at least `abs_threshold` times the largest, with the values of
    its README. They are chosen once for each KV head and 128 rows, a row being one query of one head of the group.
    Blocks that are not selected take part by the means of their keys and values, which the density does not count.

    [tokens, heads, head_size], and the paged cache as it is, read as pages of one token: so its server does, and for
    that its kernels are tuned. It corrects by means only where 64 does not divide the page. Its checkout must have been
    built in place.
    """

    default = 0.1
    dense = 0.0  # a score is never less than nothing
    selects = "build_block_sparse_index_fast"
    page = 1
    corrected = True

    def load(self, path: Path) -> None:
        folder = path / "flashprefill_ops"
        if not (folder / "flashprefill").is_dir():
            raise ImportError(f"there is no {folder / 'flashprefill'}")
        p, shape = self.problem, self.problem.shape
        if shape.head_size not in (128, 256):
            raise RuntimeError(f"it has no kernel for heads of {shape.head_size}")
        # Its launches end the process where they fail.
        if p.query.is_cuda and torch.cuda.get_device_capability(p.query.device) != (9, 0):
            raise RuntimeError("its kernels run on Hopper GPUs only")
        sys.path.insert(0, str(folder))
        try:
            self.module = importlib.import_module("flashprefill.prefill")
        finally:
            sys.path.remove(str(folder))
        self.operator = self.module.FlashPrefill(
            k_block_m=BLOCK, k_block_n=BLOCK, attention_sink=2, window_size=4, last_n_blocks=8,
            use_mean_correction=self.corrected,
        )  # fmt: skip
        self.key, self.value = (t.flatten(0, 1).unflatten(0, (-1, self.page)) for t in (p.key_cache, p.value_cache))
        parts = shape.page // self.page
        self.table = (p.block_table[..., None] * parts + torch.arange(parts, device=p.query.device)).flatten(1).int()
        self.lengths = torch.full((1,), p.num_tokens, dtype=torch.int32, device=p.query.device)
        self.starts = torch.tensor([0, p.num_tokens], dtype=torch.int32, device=p.query.device)

    def at(self, looseness: float) -> float:
        return looseness

    def attend(self, value: float) -> torch.Tensor:
        p = self.problem
        self.operator.abs_threshold = value
        return self.operator(
            p.query, self.key, self.value, self.table, self.lengths, self.starts, q_lens=(p.num_tokens,),
            max_cache_seqlen=p.num_tokens,
        )  # fmt: skip

    def before(self, result: Any) -> tuple[Any, ...]:
        # For each KV head and block of rows a list of the selected keys in tiles of 64, two to a block but for the
        # sequence's last. A block of rows selects its whole diagonal: the blocks of its first row to those of its last.
        ends, tiles, blocks = result[:3]
        shape, num_tokens = self.problem.shape, self.problem.num_tokens
        group = shape.num_heads // shape.num_kv_heads
        first = torch.arange(blocks, device=ends.device) * BLOCK // group // BLOCK
        lists = torch.arange(len(ends) - 1, device=ends.device).repeat_interleave(ends.diff())
        whole = tiles[: len(lists)] // 2 < first[lists % blocks]
        selected = torch.bincount(lists[whole], minlength=len(ends) - 1).view(-1, blocks) // 2
        row = torch.arange(num_tokens * group, device=ends.device)
        before = selected[:, row // BLOCK] + row // group // BLOCK - first[row // BLOCK]
        return before.view(-1, num_tokens, group).transpose(1, 2).flatten(0, 1), num_tokens, BLOCK, 1

    def forget(self) -> None:
        self.operator.clear_workspaces()


class FlexPrefill(Peer):
    """ByteDance-Seed/FlexPrefill: vertical and slash blocks, or blocks by pooled scores, that cover `gamma` of the
    mass, with the values of its README. [batch, tokens, heads, head_size], GQA."""

    default = 0.9
    selects = "get_active_blocks"

    def load(self, path: Path) -> None:
        # By its file: its package imports patches for models of another transformers.
        self.module = load_file(path / "flex_prefill" / "ops" / "flex_prefill_attention.py")

    def at(self, looseness: float) -> float:
        return 1 - looseness

    def attend(self, value: float) -> torch.Tensor:
        p = self.problem
        return self.module.flex_prefill_attention(
            p.query[None], p.key[None], p.value[None], gamma=value, tau=0.1, min_budget=512, block_size=BLOCK
        )[0]

    def before(self, result: Any) -> tuple[Any, ...]:
        # Places of the selected blocks in the square of all blocks, without doubles.
        blocks = -(-self.problem.num_tokens // BLOCK)
        rows = (places[places % blocks < places // blocks] // blocks for places in result[0])
        return torch.stack([torch.bincount(r, minlength=blocks) for r in rows]), self.problem.num_tokens


PEERS: dict[str, type[Peer]] = {
    "pbs": PBS, "flashprefill": FlashPrefill, "flashprefill2": FlashPrefillV2, "flexprefill": FlexPrefill,
}  # fmt: skip
