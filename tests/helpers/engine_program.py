"""A program with an engine whose parts are in several processes: what it said to each prompt (`engines.Said`), and
what the engine counted: tokens by path, pairs that were visited, and all. Prompts of `dense` ask for dense attention.

python engine_program.py '{"options": {...}, "prompts": [[...]], "dense": [], "generated": 4}' FILE.json
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
    params = [engines.sampling(asked["generated"]) for _ in asked["prompts"]]
    for index in asked["dense"]:
        params[index].extra_args = {"s2o": "dense"}
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    answers = [engines.said(output) for output in outputs]
    if not engines.CPU:
        time.sleep(2)  # a thread writes the figures of the last steps, once the GPU has told them
    figures = vllm_s2o.figures()
    counted = {" ".join(kind).strip(): count for kind, count in figures.tokens.items()}
    Path(sys.argv[2]).write_text(json.dumps([answers, counted, figures.visited, figures.causal]))
    llm.llm_engine.engine_core.shutdown()  # not at the interpreter's end, when Ray may be gone before its actors


if __name__ == "__main__":  # processes that the engine starts import this file
    main()
