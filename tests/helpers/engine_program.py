"""A program with an engine whose parts are in several processes: log-probabilities of prompts and answers.

python engine_program.py '{"options": {...}, "prompts": [[...]], "generated": 4}' FILE.json
"""

import json
import sys
from pathlib import Path


def main() -> None:
    import engines
    from vllm import LLM

    asked = json.loads(sys.argv[1])
    llm = LLM(**asked["options"])
    outputs = engines.ask(llm, asked["prompts"], asked["generated"])
    found = [[engines.of_prompt(output).tolist(), engines.of_answer(output).tolist()] for output in outputs]
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":  # processes that the engine starts import this file
    main()
