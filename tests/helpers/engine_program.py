"""A program with an engine whose parts are in several processes: what it said to each prompt (`engines.Said`), and
what the engine counted: tokens by path, pairs that were visited, and all.

python engine_program.py '{"options": {...}, "prompts": [[...]], "generated": 4}' FILE.json
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    import engines
    from vllm import LLM

    import vllm_s2o

    asked = json.loads(sys.argv[1])
    llm = LLM(**asked["options"])
    outputs = engines.ask(llm, asked["prompts"], asked["generated"])
    answers = [engines.said(output) for output in outputs]
    if not engines.CPU:
        time.sleep(2)  # a thread writes the figures of the last steps, once the GPU has told them
    figures = vllm_s2o.figures()
    counted = {" ".join(kind).strip(): count for kind, count in figures.tokens.items()}
    Path(sys.argv[2]).write_text(json.dumps([answers, counted, figures.visited, figures.causal]))


if __name__ == "__main__":  # processes that the engine starts import this file
    main()
