"""Queries, keys and values of a model's attention on a real text, as they enter attention: after RoPE.

    python -P -m vllm_s2o.quality.capture MODEL --tokens 8192 --out FILE [--layers 1 15 29] [--text code]

The model runs in transformers, whole and dense. Any decoder will do whose attention goes through transformers'
attention interface and is causal and nothing more. A prompt longer than the model's context runs with RoPE extended by
YaRN. No tensor of tokens x tokens exists at any time, and only the chosen layers are kept, on the CPU.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_s2o.compat import MAX_HEAD_SIZE
from vllm_s2o.config import ConfigError, ModelTraits, load_config
from vllm_s2o.model import Model, locate
from vllm_s2o.quality.text import SOURCES, TextError, first_tokens
from vllm_s2o.settings import traits_of

NAME = "s2o_capture"
"""What the attention is registered as."""


class CaptureError(RuntimeError):
    """Why nothing was captured, in one sentence."""


class Layer(NamedTuple):
    """One layer's attention inputs; on the CPU, where they are kept."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    query: torch.Tensor
    """[num_tokens, num_heads, head_size]"""
    key: torch.Tensor
    """[num_tokens, num_kv_heads, head_size]"""
    value: torch.Tensor
    scale: float
    """Factor on the logits."""


class Capture(NamedTuple):
    """Layers of one prompt, and where they come from."""

    layers: tuple[Layer, ...]
    traits: ModelTraits
    num_tokens: int
    rope_factor: float
    """By which YaRN extended the context; 1 where the prompt fits into it."""
    text: str
    versions: dict[str, str]


def capture(
    model: str,
    num_tokens: int,
    layers: Sequence[int] | None = None,
    text: str = "code",
    device: torch.device | None = None,
) -> Capture:
    """Run a model on the beginning of a text: in bfloat16 on a GPU, in float32 on a CPU.

    Args:
        model: a directory, or a name that transformers knows.
        layers: which to keep; by default the first, the middle and the last of those that S2O's config makes sparse.
        text: one of text.SOURCES, or the path of a UTF-8 file.
        device: the GPU if there is one.

    Raises:
        CaptureError: in one sentence, whatever went wrong.
    """
    source = open_model(model, num_tokens)
    layers = default_layers(source.traits) if layers is None else checked_layers(layers, source.traits)
    ids = source.prompt(text, num_tokens)
    found = attention_inputs(source.load(device), ids, layers)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    versions["python"] = platform.python_version()  # its text, too
    return Capture(tuple(found), source.traits, num_tokens, source.rope_factor, text, versions)


class Source(NamedTuple):
    """A model whose weights are not loaded yet."""

    config: Any
    tokenizer: Any
    traits: ModelTraits
    rope_factor: float
    """By which YaRN extends the context; 1 where the prompt fits into it."""
    context: int
    """Tokens that the model was made for, without YaRN."""

    @property
    def extension(self) -> str | None:
        """That the context was extended, in a sentence; None where the prompt fits into it."""
        if self.rope_factor == 1:
            return None
        return (
            f"The model's context ends at {self.context} tokens: it ran with YaRN x{self.rope_factor:g}, and a server "
            "of such prompts has to."
        )

    def prompt(self, text: str, num_tokens: int, split: str | None = None) -> list[int]:
        """The beginning of a text, in tokens; `split` as in `text.pieces`.

        Raises:
            CaptureError: the text cannot be read, or is too short.
        """
        try:
            return first_tokens(self.tokenizer, text, num_tokens, split)
        except TextError as error:
            raise CaptureError(str(error)) from error

    def load(self, device: torch.device | None = None) -> Any:
        """The model, in bfloat16 on a GPU, in float32 on a CPU; by default on the GPU if there is one.

        Raises:
            CaptureError: the weights cannot be loaded.
        """
        from transformers import AutoModelForCausalLM

        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with _loading(self.traits.name):
            return AutoModelForCausalLM.from_pretrained(self.traits.name, config=self.config, dtype=dtype).to(device)


def open_model(model: str, num_tokens: int) -> Source:
    """Read a model's config and tokenizer, for a prompt of `num_tokens`.

    Raises:
        CaptureError: in one sentence, whatever went wrong.
    """
    if num_tokens < 1:
        raise CaptureError(f"A prompt has at least 1 token, not {num_tokens}.")
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise CaptureError(f"Capturing needs transformers, which cannot be imported: {_line(error)}") from error
    with _loading(model):
        config = AutoConfig.from_pretrained(model)
        traits = model_traits(model, config)
        context = config.get_text_config().max_position_embeddings
        rope_factor = extend_rope(config, num_tokens)
    return Source(config, open_tokenizer(model), traits, rope_factor, context)


def open_tokenizer(model: str) -> Any:
    """A model's tokenizer.

    Raises:
        CaptureError: in one sentence, whatever went wrong.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CaptureError(f"A tokenizer needs transformers, which cannot be imported: {_line(error)}") from error
    with _loading(model):
        return AutoTokenizer.from_pretrained(model)


@contextlib.contextmanager
def _loading(model: str) -> Iterator[None]:
    """Turn what transformers says of a model that it cannot load into a sentence."""
    try:
        if not Path(model).is_dir():
            locate(model)  # without a network, transformers would ask for half a minute and then blame the connection
        yield
    except ConfigError as error:
        raise CaptureError(str(error)) from None
    except (OSError, ValueError, AttributeError) as error:
        raise CaptureError(f"The model {model} cannot be loaded: {_line(error)}") from error


def attention_inputs(model: Any, ids: Sequence[int], layers: Sequence[int]) -> list[Layer]:
    """What enters the attention of some layers of a causal LM that is loaded.

    Args:
        model: one of transformers'; afterwards its attention is again what it was.
        ids: one prompt's tokens.
        layers: in the order in which they are wanted.

    Raises:
        CaptureError: the model's attention is not plain causal attention, or does not go through the interface.
    """
    found: list[Layer] = []
    visit_layers(model, ids, layers, found.append)
    by_index = {layer.index: layer for layer in found}
    return [by_index[index] for index in layers]


def visit_layers(model: Any, ids: Sequence[int], layers: Collection[int], visit: Callable[[Layer], object]) -> None:
    """Hand on what enters the attention of some layers while the model runs: none is kept here.

    Args:
        model, ids: as in `attention_inputs`.
        visit: called with each of `layers` in the order in which the model runs them.

    Raises:
        CaptureError: as in `attention_inputs`.
    """

    def attend(layer: Layer) -> torch.Tensor:
        if layer.index in layers:
            # Copies: the model's own tensors would be kept whole, and may be views of one another.
            query, key, value = (t.to("cpu", copy=True).contiguous() for t in (layer.query, layer.key, layer.value))
            visit(Layer(layer.index, query, key, value, layer.scale))
        return dense_attention(layer)

    last_states(model, ids, attend)


def last_states(model: Any, ids: Sequence[int], attend: Callable[[Layer], torch.Tensor]) -> torch.Tensor:
    """Run a causal LM on one prompt with an attention that is given.

    Args:
        model, ids: as in `attention_inputs`.
        attend: called for each layer in order, whose tensors are the model's own, on its device; returns
            [num_tokens, num_heads, head_size].

    Returns:
        What enters the model's head, [num_tokens, hidden_size].

    Raises:
        CaptureError: as in `attention_inputs`.
    """
    from transformers import AttentionInterface

    seen = set()
    # transformers keeps what is registered: this lets go of `attend`, and of what it holds, when the model has run.
    functions = [attend]

    def call(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
        scaling: float | None = None, **options: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """query [1, num_heads, tokens, head_size] -> [1, tokens, num_heads, head_size]"""
        if problem := _beside_causality(module, query, value, options):
            raise CaptureError(f"The attention of layer {module.layer_idx} has {problem}: S2O runs no such layer.")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        seen.add(module.layer_idx)
        query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        return functions[0](Layer(module.layer_idx, query, key, value, scale))[None], None

    # A name that has no mask function gets no mask: of a long prompt, one would be larger than the model.
    AttentionInterface.register(NAME, call)
    before = model.config._attn_implementation
    model.eval().set_attn_implementation(NAME)
    try:
        with torch.no_grad():
            # Without the head: of a long prompt, its logits would be larger still.
            prompt = torch.tensor([list(ids)], device=model.device)
            states = model.base_model(prompt, use_cache=False).last_hidden_state[0]
    except torch.OutOfMemoryError as error:
        raise CaptureError(f"This GPU has too little memory for the model and {len(ids)} tokens.") from error
    finally:
        model.set_attn_implementation(before)
        functions.clear()
    missing = sorted(set(range(model.config.get_text_config().num_hidden_layers)) - seen)
    if missing:
        raise CaptureError(
            f"{type(model).__name__} ran without calling transformers' attention interface in layer {missing[0]}: "
            "its attention cannot be captured."
        )
    return states


def _beside_causality(module: Any, query: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> str | None:
    """What a layer's attention has that neither S2O nor `dense_attention` computes, or None.

    `options` are what transformers tells an attention function beside the tensors. To leave out a window or a cap would
    change what the layers after it see.
    """
    num_tokens, head_size = query.shape[2:]
    window = options.get("sliding_window") or num_tokens
    chunk = getattr(getattr(module, "config", None), "attention_chunk_size", None) or num_tokens
    extras = {
        "no causal mask": not getattr(module, "is_causal", True),
        f"a sliding window of {window} tokens": window < num_tokens,
        f"chunks of {chunk} tokens": chunk < num_tokens,
        "a soft cap on its logits": options.get("softcap") is not None,
        "attention sinks": options.get("s_aux") is not None,
        "position biases": options.get("position_bias") is not None,
        "values of another size than its keys": value.shape[-1] != head_size,
        f"heads of size {head_size}": head_size > MAX_HEAD_SIZE,
    }
    return next((name for name, has in extras.items() if has), None)


def dense_attention(layer: Layer) -> torch.Tensor:
    """Causal attention by one of PyTorch's kernels that hold a block of it at a time.

    Returns:
        [num_tokens, num_heads, head_size]
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = (t.transpose(0, 1)[None] for t in (layer.query, layer.key, layer.value))
    # Not every one of these kernels knows groups of query heads.
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) if group > 1 else t for t in (key, value))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=layer.scale)
    return out[0].transpose(0, 1)


def extend_rope(config: Any, num_tokens: int) -> float:
    """Extend a model's RoPE by YaRN, if `num_tokens` exceed its context, and return the factor (1: nothing changed).

    Args:
        config: transformers' config of the model, changed in place.

    Raises:
        CaptureError: the model has no RoPE, or one that is scaled already.
    """
    config = config.get_text_config()
    context = config.max_position_embeddings
    if num_tokens <= context:
        return 1.0
    # transformers 4 called this `rope_scaling`, beside `rope_theta`. Version 5, which every supported vLLM requires
    # (0.25.1: 5.5.3, 0.32.0: 5.16.1), calls it `rope_parameters` and reads the old names from a checkpoint too.
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "not the same for all layers") if rope else "missing"
    if kind != "default":
        raise CaptureError(
            f"The model's context ends at {context} tokens and cannot be extended to {num_tokens} by YaRN: "
            f"that takes plain RoPE, and this model's is {kind}."
        )
    factor = num_tokens / context
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context}
    config.rope_parameters = {**rope, **yarn}
    config.max_position_embeddings = num_tokens
    return factor


def model_traits(model: str, config: Any) -> ModelTraits:
    """What S2O's config files are matched by, from transformers' config."""
    return traits_of(Model(model, Path(model), config, config.get_text_config()))


def default_layers(traits: ModelTraits) -> list[int]:
    """The first, the middle and the last of the layers that the shipped config makes sparse."""
    config = load_config(traits)
    sparse = [index for index in range(traits.num_layers) if config.layer(index) is not None]
    if not sparse:
        raise CaptureError(f"{config.source} makes no layer of {traits.name} sparse: name the layers to capture.")
    return sorted({sparse[0], sparse[len(sparse) // 2], sparse[-1]})


def checked_layers(layers: Sequence[int], traits: ModelTraits) -> list[int]:
    """Layers that a model has, sorted, each once.

    Raises:
        CaptureError: none is given, or the model lacks one.
    """
    for index in layers:
        if not 0 <= index < traits.num_layers:
            raise CaptureError(f"There is no layer {index}: {traits.name} has layers 0 to {traits.num_layers - 1}.")
    if not layers:
        raise CaptureError("No layer is named: nothing would be captured.")
    return sorted(set(layers))


def _line(error: BaseException) -> str:
    """An error's first line, for the end of a sentence."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first.rstrip(".") + "."


def _tensors(layer: Layer) -> Iterator[tuple[str, torch.Tensor]]:
    for part in ("query", "key", "value"):
        yield f"layers.{layer.index}.{part}", getattr(layer, part)


def save(captured: Capture, path: Path) -> None:
    """Write a safetensors file: `layers.INDEX.query`, `.key` and `.value`; everything else is JSON in its metadata.

    Raises:
        CaptureError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    told = captured._asdict() | {
        "layers": {layer.index: layer.scale for layer in captured.layers},
        "traits": dataclasses.asdict(captured.traits),
    }
    tensors = dict(pair for layer in captured.layers for pair in _tensors(layer))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {name: json.dumps(value) for name, value in told.items()})
    except (OSError, SafetensorError) as error:
        raise CaptureError(f"Cannot write {path}: {_line(error)}") from error


def load(path: Path) -> Capture:
    """What `save` wrote.

    Raises:
        CaptureError: the file is missing, or was not written by `save`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            layers = []
            for index, scale in told["layers"].items():
                query, key, value = (file.get_tensor(f"layers.{index}.{part}") for part in ("query", "key", "value"))
                layers.append(Layer(int(index), query, key, value, scale))
            return Capture(**told | {"layers": tuple(layers), "traits": ModelTraits(**told["traits"])})
    except (OSError, SafetensorError) as error:
        raise CaptureError(f"Cannot read {path}: {_line(error)}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CaptureError(f"{path} holds no captured attention.") from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -P -m vllm_s2o.quality.capture",
        description="Write queries, keys and values of a model's attention on a real text, after RoPE.",
    )
    parser.add_argument("model", help="directory or name of the model")
    parser.add_argument("--tokens", type=int, required=True, help="length of the prompt")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the safetensors file")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="layers to keep (default: the first, middle and last sparse one)"
    )
    parser.add_argument("--text", default="code", help=f"{', '.join(SOURCES)}, or a UTF-8 file (default code)")
    args = parser.parse_args()
    try:
        captured = capture(args.model, args.tokens, args.layers, args.text)
        save(captured, args.out)
    except CaptureError as error:
        sys.exit(f"capture: {error}")
    indices = ", ".join(str(layer.index) for layer in captured.layers)
    print(f"{args.out}: layers {indices}, {captured.num_tokens} tokens of {args.text}, YaRN x{captured.rope_factor:g}")


if __name__ == "__main__":
    main()
