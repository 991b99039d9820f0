"""A program with an engine whose parts are in several processes: log-probabilities of prompts and answers, and
what the engine counted: tokens by path, pairs that were visited, and all.

python engine_program.py '{"options": {...}, "prompts": [[...]], "generated": 4}' FILE.json
"""

import json
import sys
from pathlib import Path


def main() -> None:
    import engines
    from vllm import LLM

    import vllm_s2o

    asked = json.loads(sys.argv[1])
    llm = LLM(**asked["options"])
    outputs = engines.ask(llm, asked["prompts"], asked["generated"])
    answers = [[engines.of_prompt(output).tolist(), engines.of_answer(output).tolist()] for output in outputs]
    figures = vllm_s2o.figures()
    counted = {" ".join(kind).strip(): count for kind, count in figures.tokens.items()}
    Path(sys.argv[2]).write_text(json.dumps([answers, counted, figures.visited, figures.causal]))


if __name__ == "__main__":  # processes that the engine starts import this file
    main()
