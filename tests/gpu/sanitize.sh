#!/usr/bin/env bash
# The kernels under compute-sanitizer, on a GPU: memcheck, racecheck, synccheck and initcheck over the small tests of
# every kernel (pytest's mark `sanitized`). Ends with 0 where every tool is clean. Run from the repository's root:
#     tests/gpu/sanitize.sh [TOOL ...]
set -u
python=${PYTHON:-.venv/bin/python}
if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer was not found; it comes with the CUDA toolkit" >&2
    exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: torch.cuda.is_available() is False" >&2
    exit 2
fi
# each tensor an allocation of its own, whose end the tools see
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
failed=0
for tool in "${@:-memcheck racecheck synccheck initcheck}"; do
    for tool in $tool; do
        # initcheck must see torch's kernels write what ours read; the others look at ours alone
        only=(--kernel-name kns=mrlhf)
        [ "$tool" = initcheck ] && only=()
        echo "== $tool"
        compute-sanitizer --tool "$tool" "${only[@]}" --error-exitcode 99 \
            "$python" -m pytest -q -p no:cacheprovider --device cuda -m sanitized -k "not reference" tests/ops || failed=1
    done
done
exit $failed
