#!/usr/bin/env bash
# A small study, once undisturbed and once killed with SIGKILL twelve times: both end with the same tables, pictures and weights.
# Half an hour of one core.
#
#     bash tests/kill_study.sh
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=$(mktemp -d)  # always empty: in a finished study nothing would be left to kill
export TASKS=${TASKS:-emotion} OTHERS=${OTHERS-gender} WAVES=${WAVES:-1 2 3} FLAGS="--limit 320 --epochs 2" ENCODERS=wavlm JOBS=1
study() { RUNS=$OUT/$1/runs RESULTS=$OUT/$1/results bash run_all.sh >> "$OUT/$1.log" 2>&1; }
weights() {  # SHA-256 of each component of each run
    for run in "$OUT/$1"/runs/*/model.pt; do basename "$(dirname "$run")"; python evaluate.py --inspect "$run" | grep "parameters, SHA" | sed "s/, from.*//"; done
}

echo "logs, runs and pages in $OUT"
study whole
set -m  # each study is a process group of its own
for seconds in 7 19 31 43 11 23 37 5 29 41 17 13; do
    study killed & sleep "$seconds"
    kill -9 -- -$! 2> /dev/null && echo "killed after $seconds s, $(find "$OUT/killed/runs" -name metrics.json | wc -l) runs were finished"
    wait $! 2> /dev/null || true
done
study killed
diff -r -I '^| \(Command\|Records\) |' "$OUT/whole/results" "$OUT/killed/results"
diff <(weights whole) <(weights killed)
echo "the same tables, pictures and weights"
rm -r "$OUT"
