"""What a server tells of itself: figures on /metrics, lines of the log, and the switch, in vLLM's layouts.

The model is small and its weights are random: what is visited is a fixed share, and nothing is asked of the answers.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import openai
import pytest
import torch
from processes import CHANGED, ROOT, python_path, without
from prometheus_client.parser import text_string_to_metric_families
from serving import BY_NAME, CUDA, Server, VllmServe, write_small

from vllm_s2o.config import load_config
from vllm_s2o.metrics import place
from vllm_s2o.metrics.switch import set_switch
from vllm_s2o.model import read
from vllm_s2o.quality.needles import needle
from vllm_s2o.settings import traits_of
from vllm_s2o.step_log import prefills

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1800)]

CONFIG = {
    "min_seq_len": 256, "min_query_len": 32, "segment_len": 64, "tile_size": 32, "key_block": 16, "budget": 0.25,
    "dense_tail": 0,
}  # fmt: skip
CHUNK = 512
ARGS = (
    *BY_NAME, "--additional-config", json.dumps({"s2o": CONFIG}), "--load-format", "dummy",
    "--enable-prefix-caching", "--enable-prompt-tokens-details", "--max-num-batched-tokens", str(CHUNK),
    # A CPU's. In a GPU's blocks of 16 tokens the first ones of all prompts are the same, and come from the cache.
    "--block-size", "128",
)  # fmt: skip
START_SECONDS = 600
"""Several processes import all of vLLM at the same time, on two cores."""


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    return write_small(model, tmp_path_factory.mktemp("small"))


class Told:
    """A server, and what it tells of itself."""

    def __init__(self, server: Server, count_tokens):
        self.server = server
        self._count, self._seed = count_tokens, 0

    @property
    def place(self) -> place.Server:
        (found,) = [found for found in place.running() if found.pid == self.server.process.pid]
        return found

    def page(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.server.port}/metrics", timeout=60) as answer:
            assert answer.status == 200
            return answer.read().decode()

    def samples(self) -> dict[str, list]:
        """By name."""
        found: dict[str, list] = {}
        for family in text_string_to_metric_families(self.page()):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample)
        return found

    def figures(self) -> SimpleNamespace:
        found = self.samples()
        tokens = found["vllm_s2o_prefill_tokens_total"]
        return SimpleNamespace(
            tokens={(s.labels["path"], s.labels["reason"]): int(s.value) for s in tokens},
            prompts={s.labels["request_id"]: s for s in found.get("vllm_s2o_recent_prompt_density", ())},
            visited=int(found["vllm_s2o_visited_pairs_total"][0].value),
            causal=int(found["vllm_s2o_causal_pairs_total"][0].value),
            count=int(found["vllm_s2o_prompt_density_count"][0].value),
            below={float(s.labels["le"]): int(s.value) for s in found["vllm_s2o_prompt_density_bucket"]},
            ranking=found["vllm_s2o_ranking_seconds_total"][0].value,
            attention=found["vllm_s2o_attention_seconds_total"][0].value,
            config=found["vllm_s2o_config_info"][0].labels,
            on=found["vllm_s2o_enabled"][0].value,
        )

    def text(self, num_tokens: int = 1400) -> str:
        """One that was never asked before."""
        self._seed += 1
        return needle(num_tokens, 0.5, self._seed, self._count).prompt

    def ask(self, text: str, name: str | None = None, **options):
        """Returns the usage, and the figures before and after."""
        before = self.figures()
        headers = {"X-Request-Id": name} if name else None
        answer = self.server.client.chat.completions.create(
            model=self.server.name, messages=[{"role": "user", "content": text}], max_tokens=2, temperature=0,
            extra_headers=headers, **options,
        )  # fmt: skip
        return answer.usage, before, self.figures()

    def says(self, text: str) -> tuple[str, list[float]]:
        """An answer, and the log-probabilities of its tokens."""
        asked = [{"role": "user", "content": text}]
        (choice,) = self.server.client.chat.completions.create(
            model=self.server.name, messages=asked, max_tokens=4, temperature=0, logprobs=True
        ).choices
        return choice.message.content, [token.logprob for token in choice.logprobs.content]

    def command(self, state: str) -> None:
        """In a process of its own."""
        command = [sys.executable, "-P", "-m", "vllm_s2o.cli", "switch", state, "--server", str(self.place.pid)]
        environment = without(*CHANGED) | {"PYTHONPATH": python_path(ROOT)}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_SECONDS)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout == f"server {self.place.pid} ({self.place.model}): S2O is {state} for new prompts\n"

    @contextlib.contextmanager
    def off(self):
        set_switch(False, self.place)
        try:
            yield
        finally:
            set_switch(True, self.place)


def grown(before: SimpleNamespace, after: SimpleNamespace) -> dict[tuple[str, str], int]:
    """Tokens by path and reason, since."""
    kinds = {kind: after.tokens[kind] - before.tokens.get(kind, 0) for kind in after.tokens}
    return {kind: count for kind, count in kinds.items() if count}


def started(how, model, log, args=(), env=None):
    server = how(model, log, (*ARGS, *args), env)
    server.start_seconds = START_SECONDS
    return server


def layer_pairs(tokens: int) -> int:
    """Causal pairs of a prompt, over the heads and layers of the small model."""
    return tokens * (tokens + 1) // 2 * 4 * 3


# -- one API server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(small, log_dir, count_tokens):
    with started(Server, small, log_dir / "figures.log", ("--distributed-executor-backend", "mp")) as server:
        yield Told(server, count_tokens)


SPARSE = ("sparse", "")
OFF, ASKED, FEW = (("dense", why) for why in ("switched off", "asked by the request", "below min_query_len"))


def test_a_long_prompt_is_in_the_figures(told):
    usage, before, after = told.ask(told.text(), name="mine-1")
    assert grown(before, after) == {SPARSE: usage.prompt_tokens}
    assert after.causal - before.causal == layer_pairs(usage.prompt_tokens)
    density = (after.visited - before.visited) / (after.causal - before.causal)
    assert 0.25 < density < 0.4, "a quarter of the history, and the segments themselves"
    # By request: vLLM's name for it begins with the client's.
    (prompt,) = [sample for name, sample in after.prompts.items() if name.startswith("chatcmpl-mine-1-")]
    assert prompt.value == pytest.approx(density)
    assert (prompt.labels["tokens"], prompt.labels["reason"]) == (str(usage.prompt_tokens), "")
    assert after.count == before.count + 1
    assert [after.below[le] - before.below[le] for le in (0.25, 0.4)] == [0, 1]
    assert 0 < after.ranking - before.ranking < after.attention - before.attention


def test_figures_beside_vllms_own(told):
    assert "vllm:prompt_tokens_total" in told.samples()
    for name in ("vllm_s2o_prefill_tokens", "vllm_s2o_prompt_density"):
        assert re.search(rf"^# TYPE {name}\w* (counter|histogram)$", told.page(), re.MULTILINE)


def test_figures_agree_with_the_log(told):
    """At the end of its last line; of steps that follow each other closely, the last one's comes late."""
    told.ask(told.text())
    after = told.figures()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        last = prefills(told.server.log)[-1]
        if last.causal == after.causal:
            break
        time.sleep(0.2)
    assert (last.visited, last.causal) == (after.visited, after.causal)
    tokens = int(re.findall(r"\| total steps=\d+ tokens=(\d+)", told.server.log)[-1])
    assert tokens == after.tokens[SPARSE]


def test_a_request_in_the_log(told):
    usage, _, after = told.ask(told.text(), name="mine-2")
    (line,) = re.findall(r"s2o: request (chatcmpl-mine-2-.*)", told.server.log)
    name, *figures = line.split()
    assert dict(figure.split("=") for figure in figures) == {
        "prompt": str(usage.prompt_tokens), "cached": "0", "sparse": str(usage.prompt_tokens), "dense": "0",
        "density": f"{after.prompts[name].value:.3f}",
    }  # fmt: skip


def test_short_prompts_are_dense_tokens(told):
    usage, before, after = told.ask(told.text(150))
    assert grown(before, after) == {("dense", "below min_seq_len"): usage.prompt_tokens}
    assert (after.count, after.prompts) == (before.count, before.prompts)


def test_the_config(told, small):
    config = load_config(traits_of(read(str(small))), CONFIG)
    assert told.figures().config == {"config_hash": config.digest(), "source": "default.yaml"}
    assert f"s2o: config hash {config.digest()}; off and on again: " in told.server.log


def test_off_and_on_again(told):
    assert told.figures().on == 1
    told.command("off")
    try:
        usage, before, after = told.ask(told.text(), name="while-off")
        assert after.on == 0
        assert grown(before, after) == {OFF: usage.prompt_tokens}
        assert (after.visited, after.causal) == (before.visited, before.causal)
        (prompt,) = [sample for name, sample in after.prompts.items() if name.startswith("chatcmpl-while-off-")]
        assert (prompt.value, prompt.labels["reason"]) == (1.0, "switched off")
        assert re.search(r"request chatcmpl-while-off-\S+ .* density=1.000 \(switched off\)", told.server.log)
    finally:
        told.command("on")
    usage, before, after = told.ask(told.text())
    assert (after.on, grown(before, after)) == (1, {SPARSE: usage.prompt_tokens})


def test_a_prompt_that_is_being_computed_keeps_its_path(told):
    """Chunk by chunk, switched off in between."""
    text = told.text(7000)
    before = told.figures()
    answers = []
    asked = threading.Thread(target=lambda: answers.append(told.ask(text, name="under-way")))
    asked.start()
    deadline = time.monotonic() + 120
    while told.figures().tokens[SPARSE] < before.tokens[SPARSE] + CHUNK and time.monotonic() < deadline:
        time.sleep(0.02)
    with told.off():
        between = told.figures()
        asked.join()
        usage, _, _ = answers[0]
        assert between.tokens[SPARSE] - before.tokens[SPARSE] < usage.prompt_tokens, "it was over too soon"
        assert grown(before, told.figures()) == {SPARSE: usage.prompt_tokens}
        usage, before, after = told.ask(told.text())
        assert grown(before, after) == {OFF: usage.prompt_tokens}


def test_a_request_asks_for_dense_attention(told):
    """And shares no cached prefix with a sparse run, nor the other way round; each shares with its own kind."""
    text, wish = told.text(), {"extra_body": {"vllm_xargs": {"s2o": "dense"}}}
    for options, path, again in (({}, SPARSE, False), (wish, ASKED, False), ({}, SPARSE, True), (wish, ASKED, True)):
        usage, before, after = told.ask(text, **options)
        cached = usage.prompt_tokens_details.cached_tokens or 0
        assert (cached > 0) == again
        computed = grown(before, after)
        few = computed.pop(FEW, 0)  # all but some tokens of the prompt may be cached
        assert (computed or {path: 0}).keys() == {path}
        assert computed.get(path, 0) + few == usage.prompt_tokens - cached


def test_what_was_computed_while_s2o_was_off_is_not_used_by_sparse_prompts(told):
    text = told.text()
    with told.off():
        told.ask(text)
        usage, _, _ = told.ask(text)
        assert usage.prompt_tokens_details.cached_tokens > 0
    usage, before, after = told.ask(text)
    assert not usage.prompt_tokens_details.cached_tokens
    assert grown(before, after) == {SPARSE: usage.prompt_tokens}


def test_another_wish_is_refused(told):
    with pytest.raises(openai.BadRequestError, match="'s2o' of a request cannot be 'sparse'; allowed is 'dense'"):
        told.ask(told.text(), extra_body={"vllm_xargs": {"s2o": "sparse"}})


def test_beam_search_has_no_wish(told):
    beams = {"use_beam_search": True, "n": 2}
    usage, before, after = told.ask(told.text(), extra_body=beams)
    assert grown(before, after)[SPARSE] >= usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="'s2o' of a request cannot be had with beam search"):
        told.ask(told.text(), extra_body=beams | {"vllm_xargs": {"s2o": "dense"}})


@pytest.mark.parametrize("content", [b"", b"\x10", bytes(range(256)) * 300], ids=["empty", "short", "noise"])
def test_a_broken_file_does_not_break_metrics(told, content):
    before = told.figures()
    broken = told.place.figures / "counter_s2o-0.db"
    broken.write_bytes(content)
    try:
        found = told.samples()
        assert "vllm:prompt_tokens_total" in found
        assert told.figures().tokens == before.tokens
    finally:
        broken.unlink()


def test_a_missing_file_does_not_break_metrics(told):
    before = told.figures()
    (counters,) = told.place.figures.glob("counter_s2o-*.db")
    counters.rename(counters.with_suffix(".away"))
    try:
        found = told.samples()
        assert "vllm:prompt_tokens_total" in found
        assert "vllm_s2o_prefill_tokens_total" not in found
        told.server.ask("Hello!")  # nor serving
    finally:
        counters.with_suffix(".away").rename(counters)
    assert told.figures().tokens[SPARSE] == before.tokens[SPARSE]


# -- several API servers and engines, after one that was killed -------------------------------------------------------


@pytest.fixture(scope="module")
def several(small, log_dir, count_tokens, told):
    """Started where another server was killed in the middle of its work, which first answers some prompts."""
    if CUDA and torch.cuda.device_count() < 2:
        pytest.skip("each engine takes a GPU of its own")
    texts = [needle(1400, 0.5, 1000 + seed, count_tokens).prompt for seed in range(4)]  # nobody else asks them
    answers = {text: told.says(text) for text in texts}
    left = told.place.directory
    os.killpg(told.server.process.pid, signal.SIGKILL)
    told.server.process.wait(60)
    assert left.is_dir() and list(left.glob("*.db")), "else a restart would have nothing to leave out"
    args = ("--api-server-count", "2", "--data-parallel-size", "2")
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else the engines look for a core each beside a reserved one
    with started(VllmServe, small, log_dir / "several.log", args, env) as server:
        # One that answers does not tell that the other one does: on two GPUs it came later, once.
        deadline = time.monotonic() + START_SECONDS
        while (ready := server.log.count("Application startup complete.")) < 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert ready == 2, "one server alone was started"
        yield Told(server, count_tokens), left, answers


@pytest.mark.long
def test_a_restart_leaves_no_figures(several):
    told, left, _ = several
    assert not left.exists()
    after = told.figures()
    assert (after.tokens, after.prompts, after.causal, after.count) == ({SPARSE: 0}, {}, 0, 0)
    assert after.on == 1


@pytest.mark.long
def test_several_api_servers_tell_the_same(several):
    """Whichever of them is asked: requests and scrapes go to either."""
    told, *_ = several
    usages = [told.ask(told.text())[0] for _ in range(3)]
    tokens = sum(usage.prompt_tokens for usage in usages)
    seen = {(after.tokens[SPARSE], after.causal, after.count) for after in (told.figures() for _ in range(8))}
    assert seen == {(tokens, sum(layer_pairs(usage.prompt_tokens) for usage in usages), 3)}
    assert "vllm:prompt_tokens_total" in told.samples()


@pytest.mark.long
def test_engines_add_up(several):
    """Requests are shared between them; what each has computed is in one sum."""
    told, *_ = several
    for _ in range(4):
        usage, before, after = told.ask(told.text())
        assert grown(before, after) == {SPARSE: usage.prompt_tokens}
        assert after.causal - before.causal == layer_pairs(usage.prompt_tokens)
    asked = {s.labels["engine"]: s.value for s in told.samples()["vllm:prompt_tokens_total"]}
    assert asked.keys() == {"0", "1"} and all(asked.values()), "one engine did all"


@pytest.mark.long
def test_engines_answer_as_one_alone(several):
    """Sparse prompts, each once: the next engine takes the next one."""
    told, _, answers = several
    before = told.samples()["vllm:prompt_tokens_total"]
    for text, (answer, scores) in answers.items():
        said, ours = told.says(text)
        assert said == answer
        assert ours == pytest.approx(scores, abs=1e-3)
    after = {sample.labels["engine"]: sample.value for sample in told.samples()["vllm:prompt_tokens_total"]}
    assert all(after[sample.labels["engine"]] > sample.value for sample in before), "one engine did all"


@pytest.mark.long
def test_several_api_servers_have_one_switch(several):
    told, *_ = several
    with told.off():
        for _ in range(3):
            usage, before, after = told.ask(told.text())
            assert (after.on, grown(before, after)) == (0, {OFF: usage.prompt_tokens})
    usage, before, after = told.ask(told.text())
    assert (after.on, grown(before, after)) == (1, {SPARSE: usage.prompt_tokens})


@pytest.mark.long
def test_nothing_is_left_of_a_server_that_ends(several):
    told, *_ = several
    directory, figures = told.place.directory, told.place.figures
    assert directory.is_dir() and figures.is_dir()
    told.server.stop()
    assert not directory.exists() and not figures.exists()
    assert not directory.with_name(directory.name + ".lock").exists()


# -- no server --------------------------------------------------------------------------------------------------------

OFFLINE = """
import json, os, sys

def main():
    import vllm_s2o
    from vllm import LLM, SamplingParams
    model, additional = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(
        model, load_format="dummy", enforce_eager=True, max_model_len=2048, max_num_batched_tokens=512,
        attention_config={"backend": "CUSTOM"}, additional_config=additional, **json.loads(sys.argv[3]),
    )
    answer = SamplingParams(max_tokens=2, temperature=0)
    wish = SamplingParams(max_tokens=2, temperature=0, extra_args={"s2o": "dense"})
    prompts = [{"prompt_token_ids": [(7 * i + shift) % 997 for i in range(1000)]} for shift in range(4)]
    llm.generate(prompts[:1], answer)
    llm.generate(prompts[1:2], wish)
    vllm_s2o.set_switch(False)
    off = vllm_s2o.figures().on
    llm.generate(prompts[2:3], answer)
    vllm_s2o.set_switch(True)
    llm.generate(prompts[3:], answer)
    found = vllm_s2o.figures()
    tokens = {" ".join(kind): count for kind, count in found.tokens.items()}
    densities = sorted(found.prompts.values())
    with open(sys.argv[4], "w") as file:
        json.dump([off, found.on, tokens, found.causal, 0 < found.ranking_share < 1, densities], file)

if __name__ == "__main__":
    main()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "processes",
    [pytest.param("1", id="an engine process"), pytest.param("0", id="in the program")],
)
def test_a_program_reads_its_figures(small, tmp_path, processes):
    from serving import KV_CACHE, SHARE_OPTIONS

    program = tmp_path / "program.py"
    program.write_text(OFFLINE)
    told = tmp_path / "told.json"  # stdout has vLLM's log, of several threads
    command = [sys.executable, "-P", program, small, json.dumps({"s2o": CONFIG}), json.dumps(SHARE_OPTIONS), told]
    environment = without(*CHANGED, place.VARIABLE) | KV_CACHE
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": processes, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_SECONDS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    off, on, tokens, causal, share, densities = json.loads(told.read_text())
    assert (off, on, share) == (False, True, True)
    assert tokens == {"sparse ": 2000, "dense switched off": 1000, "dense asked by the request": 1000}
    assert causal == 2 * layer_pairs(1000)
    assert len(densities) == 4 and densities[2:] == [1.0, 1.0] and densities[1] < 0.5
