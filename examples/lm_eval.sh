#!/usr/bin/env bash
# RULER's tasks by lm-evaluation-harness, asked of a served model.
#
#     pip install 'lm_eval[api,ruler]'
#     vllm serve MODEL --config examples/serve_config.yaml     # in another terminal; without the file, for comparison
#     examples/lm_eval.sh MODEL
#
# MODEL is what the server was given: its tokenizer makes the prompts. Prompts must be longer than min_seq_len, or both
# servers compute the same. Settings are variables: LENGTHS="8192 16384", TASKS=ruler, LIMIT=100 (samples of each task),
# URL, and OUT, a folder that takes the results.
set -euo pipefail

model=${1:?"usage: examples/lm_eval.sh MODEL"}
lengths=${LENGTHS:-8192 16384}

# Prompts go as text: the server's tokenizer adds what the model wants before them.
exec lm_eval \
    --model local-completions \
    --model_args "model=$model,base_url=${URL:-http://localhost:8000}/v1/completions,tokenizer=$model,tokenizer_backend=huggingface,tokenized_requests=False,timeout=1800" \
    --tasks "${TASKS:-niah_single_1,niah_single_2,niah_multikey_1,niah_multivalue}" \
    --metadata "{\"max_seq_lengths\": [${lengths// /, }]}" \
    --limit "${LIMIT:-100}" \
    --output_path "${OUT:-lm_eval_results}"
