#!/usr/bin/env bash
# Runs the kernels under compute-sanitizer, memcheck and racecheck, and writes what they say to
# benchmarks/results/sanitize.txt. Needs an NVIDIA GPU and CUDA's compute-sanitizer (in $PATH, $CUDA_HOME/bin, or named by
# $COMPUTE_SANITIZER). PYTHON names the interpreter of the environment, LIMIT the seconds that each tool may take.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
LIMIT=${LIMIT:-180}
OUT=${OUT_FILE:-benchmarks/results/sanitize.txt}

tool=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}
for place in "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}/compute-sanitizer; do
    [ -n "$tool" ] || [ ! -x "$place" ] || tool=$place
done
if [ -z "$tool" ]; then
    echo "sanitize needs compute-sanitizer, which comes with the CUDA toolkit: put it in PATH, or name it with COMPUTE_SANITIZER=." >&2
    exit 1
fi

# Problems are made as for the tests. Each tensor is an allocation of its own, so that what is read or written beside it is
# found.
export PYTHONPATH=tests/helpers${PYTHONPATH:+:$PYTHONPATH} PYTORCH_NO_CUDA_MEMORY_CACHING=1

# Compiled before the clock starts: under a sanitizer compilers run as slowly as all else.
"$PYTHON" -P tests/helpers/sanitize_cases.py >/dev/null

# Memcheck finds what is read or written beside an allocation, racecheck what threads do to each other in shared memory,
# and among that orders that it cannot follow: hazards.py tells those apart.
failed=0
report=$(mktemp) told=$(mktemp)
trap 'rm -f "$report" "$told"' EXIT
{
    "$PYTHON" -P -c 'import torch, triton; print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")'
    echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo "${S2O_COMMIT:-unknown}"), $("$tool" --version | tail -1)"
} >"$report"
for check in memcheck racecheck; do
    options=(--tool "$check" --error-exitcode 9 --print-limit 20)
    # All of them, of which none may be missing where they are told apart.
    [ "$check" = memcheck ] || options=(--tool racecheck --error-exitcode 9 --racecheck-report all --print-limit 100000 --show-backtrace no)
    {
        echo
        echo "== $check"
    } >>"$report"
    start=$SECONDS
    status=0
    timeout "$LIMIT" "$tool" "${options[@]}" "$PYTHON" -P tests/helpers/sanitize_cases.py >"$told" 2>&1 || status=$?
    if [ "$check" = racecheck ] && [ "$status" = 9 ] && "$PYTHON" -P benchmarks/hazards.py "$told" >>"$report"; then
        grep -vE "^=========( *$|  | Error: Race reported)|hazard detected" "$told" >>"$report" || true
        status=known
    else
        cat "$told" >>"$report"
    fi
    case $status in
        0) said="no errors" ;;
        known) status=0 said="no errors but what it cannot follow, above" ;;
        9) said="ERRORS, above" ;;
        124) said="CUT OFF after $LIMIT s" ;;
        *) said="FAILED, status $status" ;;
    esac
    echo "$check: $said, $((SECONDS - start)) s" | tee -a "$report"
    [ "$status" = 0 ] || failed=1
done
mkdir -p "$(dirname "$OUT")"
cp "$report" "$OUT"
echo "$OUT"
exit $failed
