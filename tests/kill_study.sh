#!/usr/bin/env bash
# A small study, once undisturbed and once killed with SIGKILL twelve times: both end with the same
# tables, pictures and weights. Half an hour of one core.
#
#     bash tests/kill_study.sh
#     KILL_AFTER="5 9" STAGES=tables bash tests/kill_study.sh     # killed twice, after so many seconds
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=$(mktemp -d)  # always empty: in a finished study nothing would be left to kill
KILL_AFTER=${KILL_AFTER:-7 19 31 43 11 23 37 5 29 41 17 13}
STAGES=${STAGES:-tables embeddings}
export TASKS=${TASKS:-emotion} OTHERS=${OTHERS-gender} ENCODERS=${ENCODERS:-wavlm} JOBS=1
export FLAGS=${FLAGS:---limit 320 --epochs 2}

study() {  # name: in a session of its own, whose number is this process's
    export RUNS=$OUT/$1/runs RESULTS=$OUT/$1/results
    exec setsid bash run_all.sh $STAGES >> "$OUT/$1.log" 2>&1
}

weights() {  # name: SHA-256 of each component of each run
    local run
    for run in "$OUT/$1"/runs/*/model.pt; do
        basename "$(dirname "$run")"
        python evaluate.py --inspect "$run" | grep "parameters, SHA" | sed "s/, from.*//"
    done
}

echo "logs, runs and pages in $OUT"
(study whole)
for seconds in $KILL_AFTER; do
    study killed &
    sleep "$seconds"
    if pkill -9 -s $!; then  # with everything that it has started
        finished=$(find "$OUT/killed/runs" -name metrics.json 2> /dev/null | wc -l)
        echo "killed after $seconds s, $finished runs were finished"
    fi
    wait $! 2> /dev/null || true
done
(study killed)
diff -r -I '^| \(Command\|Commit\|Records\|Runs by commit\) |' "$OUT/whole/results" "$OUT/killed/results"
diff <(weights whole) <(weights killed)
echo "the same tables, pictures and weights"
rm -r "$OUT"
