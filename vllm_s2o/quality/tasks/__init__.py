"""Long-context tasks asked of a served model, with S2O and with dense attention, on the same prompts.

    python -P -m vllm_s2o.quality.tasks MODEL --out tasks.csv [--tasks ...] [--lengths 1024 2048 4096 8192]
        [--samples N] [--backends s2o dense] [--plot tasks.png]

The eleven tasks of RULER (arXiv 2404.06654) that need no download are generated here: its forms (what is hidden in
what, how much of it, how it is scored), our words. Two more ask about SQuAD and HotpotQA, which are downloads.

lm-evaluation-harness 0.4.13 has RULER too, and was tried first. Where it reaches no network, 6 of these 11 tasks work:
single_1, multikey_2, multikey_3, vt, cwe and fwe; the others take essays from a hub. Of these six, with SmolLM2's
tokenizer, cwe's prompts have 465 to 529 tokens of 1,024 (6,395 to 6,707 of 8,192) and multikey_3's 583 to 620 (6,182
to 6,290), for lists grow in steps of ten and more, and fwe's have up to 8,187, which leaves no room in a context of
8,192 for the 50 of its answer. cwe comes without its example, 500 samples are made however few are asked, and none of
its metrics is for 1,024 or 2,048 tokens. What it cannot give, prompts of the right length, all tasks by one generator,
and densities from the server's log, would have to be written around it; with it come 34 packages, 760 MB in all. So the
generators are ours, and nothing of it is used.

Samples that someone downloaded, of InfiniteBench and LongBench v2, are asked in the same way: see `infinitebench.py`
and `longbench.py`.

    prompt        tokens of a prompt, cut to a length
    haystack      what answers hide in
    retrieval, tracking, counting    RULER's tasks; suite: by their names
    scoring       RULER's scores; statistics: their means and intervals
    external      samples from files; infinitebench, longbench: how each is asked and scored
    backends      servers; client: the OpenAI API; answers: what they said, kept in a file
    run           all prompts to all backends; table, plot: what came of it; command: the command
"""
