"""Prompts that hide a number in plain text and ask for it at the end."""

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WHO = "The gardener,A retired captain,My neighbour,The young teacher,An old fisherman,The village baker,Our librarian"
DID = "walked along,wrote about,remembered,painted,repaired,described,measured,visited,talked of,looked after"
WHAT = "the narrow bridge,a wooden boat,the stone wall,an empty market,a field of barley,the winter road,the old mill"
WHEN = "at dawn,in late autumn,after the rain,on a windy day,when the bells rang,under a grey sky,early in spring"
WORDS = tuple(words.split(",") for words in (WHO, DID, WHAT, WHEN))


@dataclass(frozen=True)
class Needle:
    """A prompt that hides a number, and the number."""

    name: str
    prompt: str
    number: str


def filler(num_tokens: int, seed: int, count: Callable[[str], int]) -> list[str]:
    """Plain sentences, few of them the same, of `num_tokens` tokens together."""
    rng, sentences, tokens = random.Random(seed), [], 0
    while tokens < num_tokens:
        sentence = " ".join(rng.choice(words) for words in WORDS) + "."
        sentences.append(sentence)
        tokens += count(" " + sentence)
    return sentences


def needle(num_tokens: int, depth: float, seed: int, count: Callable[[str], int]) -> Needle:
    """A prompt of about `num_tokens` tokens with its chat template.

    Args:
        depth: where the number stands: 0 the beginning, 1 the end.
        count: number of tokens of a text.
    """
    number = str(random.Random(f"{num_tokens} {depth} {seed}").randint(10_000, 99_999))
    sentences = filler(num_tokens - 120, seed, count)
    sentences.insert(int(len(sentences) * depth), f"The special magic number for the lighthouse is: {number}.")
    prompt = (
        "A special magic number is hidden in the following text. Remember it: you will be asked for it at the end.\n\n"
        + " ".join(sentences)
        + "\n\nWhat is the special magic number for the lighthouse mentioned in the text? Answer with the number only."
    )
    return Needle(f"{num_tokens} tokens, depth {depth:.0%}", prompt, number)


def main() -> None:
    """Print a chat request with such a prompt, for `curl --data @-`."""
    parser = argparse.ArgumentParser(prog="python -m vllm_s2o.quality.needles", description=main.__doc__)
    parser.add_argument("tokenizer", help="directory or name of the served model")
    parser.add_argument("--tokens", type=int, default=7800, help="length of the prompt (default 7800)")
    parser.add_argument("--depth", type=float, default=0.5, help="where the number stands, 0 to 1 (default 0.5)")
    parser.add_argument("--seed", type=int, default=1, help="another text and number")
    parser.add_argument("--name", help="what the server calls the model (default: the directory's name)")
    args = parser.parse_args()
    from .capture import CaptureError, open_tokenizer  # not for those who take a prompt from here: it imports PyTorch

    try:
        tokenizer = open_tokenizer(args.tokenizer)
    except CaptureError as error:
        sys.exit(f"needles: {error}")
    made = needle(args.tokens, args.depth, args.seed, lambda text: len(tokenizer(text).input_ids))
    print(f"the number is {made.number}", file=sys.stderr)
    messages = [{"role": "user", "content": made.prompt}]
    name = args.name or Path(args.tokenizer).name
    print(json.dumps({"model": name, "messages": messages, "max_tokens": 24, "temperature": 0}))


if __name__ == "__main__":
    main()
