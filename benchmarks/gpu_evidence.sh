#!/usr/bin/env bash
# One call on a machine with a GPU: install, GPU tests, compute-sanitizer, GPU benchmarks.
#
#   benchmarks/gpu_evidence.sh OUT_DIR [STEP...]
#
# A STEP is tests, memcheck, or a benchmark as bench_transfer; without any, all of them, as far as
# the time allows.
#
# Needs python3 with torch, triton, pytest, hypothesis, rich, sortedcontainers and setuptools;
# no network. Installs nothing outside a temporary folder, and ends within ten minutes.
# OUT_DIR gets summary.txt, log.txt and <device>/, which can be committed as
# benchmarks/results/<device>/. Exits 1 if a step failed. Without a GPU it is a dry run: what
# needs one is skipped, and said so.
#
# PYTHON names another interpreter; KVHEAP_COMMIT the commit, where git does not know it.
set -u

# A benchmark with GPU support is a line here: its file, and its time limit in seconds.
BENCHMARKS=(
    "bench_block_copy.py 120"
    "bench_paged_copy.py 120"
    "bench_transfer.py 120"
)
TOTAL_SECONDS=560

usage() { sed -n '2,15p' "$0" | sed 's/^# \{0,1\}//'; }

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    usage >&2
    exit 2
fi
steps=" ${*:2} "
for name in "${@:2}"; do
    [[ " tests memcheck ${BENCHMARKS[*]%%.py*} " == *" $name "* ]] || {
        echo "no step $name" >&2
        usage >&2
        exit 2
    }
done

# wanted NAME: whether to do a step.
wanted() { [ "$steps" = "  " ] || [[ "$steps" == *" $1 "* ]]; }

repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

log=$out/log.txt
summary=$out/summary.txt
: >"$log"
: >"$summary"
failed=0

say() { echo "$*" | tee -a "$summary"; }

# step NAME SECONDS COMMAND...: run it under a time limit; its output goes to the log.
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    [ "$limit" -le $((TOTAL_SECONDS - SECONDS)) ] || limit=$((TOTAL_SECONDS - SECONDS))
    if [ "$limit" -lt 5 ]; then
        say "FAILED  $name: no time is left of $TOTAL_SECONDS s"
        failed=1
        return 1
    fi
    echo "=== $name: $*" >>"$log"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$work/output" >>"$log"
    status=${PIPESTATUS[0]}
    case $status in
    0) say "passed  $name ($((SECONDS - start)) s)" ;;
    124 | 137) say "FAILED  $name: stopped at its limit of $limit s" ;;
    *) say "FAILED  $name: exit status $status ($((SECONDS - start)) s)" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
    return "$status"
}

skip() { say "skipped $1: $2"; }

# The sources are copied, so that the build leaves nothing in the working tree.
mkdir -p "$work/source" "$work/site" "$work/run"
cp -R "$repository"/{pyproject.toml,allocator,kernels} "$work/source/"
for file in README.md LICENSE; do
    [ ! -e "$repository/$file" ] || cp "$repository/$file" "$work/source/"
done
KVHEAP_COMMIT=${KVHEAP_COMMIT:-$(git -C "$repository" rev-parse HEAD 2>/dev/null || true)}
export KVHEAP_COMMIT PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$work/triton XDG_CACHE_HOME=$work/cache MPLCONFIGDIR=$work/matplotlib
# Nothing runs in the repository's root: `kernels` would become importable under that name.
cd "$work/run" || exit 1

step "install" 60 "$python" -m pip install --no-deps --no-index --no-build-isolation \
    --disable-pip-version-check --target "$work/site" "$work/source"
if [ ! -d "$work/site/kvheap/kernels" ]; then
    say "        not installed: the packages are copied into place for the other steps"
    mkdir -p "$work/site/kvheap"
    cp -R "$work/source/allocator/." "$work/site/kvheap/"
    cp -R "$work/source/kernels" "$work/site/kvheap/kernels"
fi
step "requirements" 60 "$python" -c "
import hypothesis, numpy, pytest, rich, sortedcontainers, torch, triton, kvheap.kernels
assert kvheap.__file__.startswith('$work/site/'), kvheap.__file__
print('torch', torch.__version__, 'triton', triton.__version__)"

gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name())" 2>/dev/null) || gpu=""
if ! wanted tests; then
    say "device  ${gpu:-none}"
elif [ -n "$gpu" ]; then
    say "device  $gpu"
    # Each kernel once, on all cores; else each test process waits for its compiler.
    step "kernels compiled ahead" 60 "$python" "$repository/tests/support/compile_ahead.py"
    # With pytest-xdist, on as many cores as there are.
    workers=()
    ! "$python" -c "import xdist" 2>/dev/null ||
        workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --dist worksteal)
    step "tests on the GPU" 240 "$python" -m pytest -c "$repository/pyproject.toml" \
        --rootdir "$repository" -p no:cacheprovider ${workers[@]+"${workers[@]}"} \
        -m gpu -q --durations 15 "$repository/tests"
else
    say "device  none: this is a dry run, and no figure in it is a GPU's"
    step "tests that need no GPU" 180 "$python" -m pytest -c "$repository/pyproject.toml" \
        --rootdir "$repository" -p no:cacheprovider "$repository/tests/kernels"
    step "tests on the GPU, counted" 90 "$python" -m pytest -c "$repository/pyproject.toml" \
        --rootdir "$repository" -p no:cacheprovider -m gpu --collect-only -q "$repository/tests"
    say "        $(tail -n 1 "$work/output"): 240 s are for them"
    skip "tests on the GPU" "no CUDA device"
fi

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null |
    head -n 1)
if ! wanted memcheck; then
    :
elif [ -z "$gpu" ]; then
    skip "compute-sanitizer memcheck" "no CUDA device"
elif [ -z "$sanitizer" ]; then
    skip "compute-sanitizer memcheck" "compute-sanitizer is not on this machine"
else
    step "compute-sanitizer memcheck" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --tool memcheck --target-processes application-only --error-exitcode 9 \
        "$python" "$repository/tests/support/sanitizer_cases.py"
fi

device_folder=$("$python" -c "
import sys, torch
sys.path.insert(0, '$repository/benchmarks')
from _report import device_name, slug
kind = 'cuda' if torch.cuda.is_available() else 'cpu'
print(slug(device_name(torch.device(kind))))" 2>>"$log") || device_folder=unknown-device
options=()
[ -n "$gpu" ] || options=(--quick)
for line in "${BENCHMARKS[@]}"; do
    read -r benchmark limit <<<"$line"
    wanted "${benchmark%.py}" || continue
    step "$benchmark ${options[*]-}" "$limit" "$python" "$repository/benchmarks/$benchmark" \
        --out "$out/$device_folder" ${options[@]+"${options[@]}"}
    cat "$work/output"
done

say "results $out/$device_folder"
if [ $failed -ne 0 ]; then
    echo "--- end of the log:"
    tail -n 40 "$log"
    say "FAILED: a step above did not pass"
    exit 1
fi
if [ -n "$gpu" ]; then say "all steps passed"; else say "dry run: all steps that can run here passed"; fi
