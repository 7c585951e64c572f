#!/usr/bin/env bash
# Run C unit tests one after the other and report each by a line.
#
# Usage: scripts/run_c_tests.sh plain|asan|tsan PROGRAM...
#
# A program passes by exit status 0; 77 says that this machine cannot run it, and its last line why.
# Anything else, a signal, a sanitizer's complaint or DM_TEST_TIMEOUT seconds (default 300) without an
# end, is a failure.
set -euo pipefail

variant=$1
shift

# ThreadSanitizer needs its shadow memory where randomised addresses may already be (kernels with
# vm.mmap_rnd_bits above 28), so it runs with randomisation off wherever that is permitted.
prefix=()
if [ "$variant" = tsan ] && setarch -R true 2>/dev/null; then
    prefix=(setarch -R)
fi

export ASAN_OPTIONS="detect_leaks=1:detect_stack_use_after_return=1:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
export TSAN_OPTIONS="second_deadlock_stack=1:${TSAN_OPTIONS:-}"

output=$(mktemp)
trap 'rm -f "$output"' EXIT

failed=0
for program in "$@"; do
    name=$(basename "$program")
    status=0
    timeout --kill-after=10 "${DM_TEST_TIMEOUT:-300}" ${prefix[@]+"${prefix[@]}"} "$program" \
        >"$output" 2>&1 </dev/null || status=$?
    case $status in
        0) echo "ok       $variant $name" ;;
        77) echo "skipped  $variant $name: $(tail -n 1 "$output")" ;;
        *)
            failed=$((failed + 1))
            case $status in
                124) why="no end after ${DM_TEST_TIMEOUT:-300} s" ;;
                *) why="exit status $status" ;;
            esac
            echo "FAILED   $variant $name: $why"
            sed 's/^/    | /' "$output"
            ;;
    esac
done

if [ $# -eq 0 ]; then
    echo "There are no C unit tests in tests/c." >&2
elif [ "$failed" -gt 0 ]; then
    echo "$failed of $# C unit tests failed ($variant)." >&2
    exit 1
fi
