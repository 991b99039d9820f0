#!/usr/bin/env python3
"""Ask a question about a long document, and see when the answer begins.

    vllm serve MODEL --config examples/serve_config.yaml                   # in another terminal
    python examples/openai_client.py README.md "Which GPUs were the kernels run on?"

The API of a server with S2O is that of any other, and so is this client: it needs the package openai alone. What S2O
left out of the prompt stands in the server's log.
"""

import argparse
import time
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="a text file, as long as the model's context allows")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://localhost:8000/v1", help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=200, help="of the answer (default: %(default)s)")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key="none", timeout=1800)
    (model, *_) = client.models.list()
    prompt = f"{args.document.read_text(encoding='utf-8')}\n\n{args.question}"
    begin = time.perf_counter()
    first = None
    chunks = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=args.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            first = first or time.perf_counter() - begin
            print(text, end="", flush=True)
        if chunk.usage:
            print(f"\n\n{chunk.usage.prompt_tokens} tokens, first word after {first or 0:.2f} s")


if __name__ == "__main__":
    main()
