#!/usr/bin/env bash
# Every table and figure of the paper: the runs that study.py lists, then the analyses. Finished runs are not repeated, interrupted
# ones continue.
#
#     bash run_all.sh                                   # mini, one seed
#     SEEDS="1 2 3" TASKS="asr emotion gender age" ENCODERS=wavlm bash run_all.sh
#     PRESET=paper FLAGS="--data-root /data" LAUNCH="torchrun --nproc_per_node=8" bash run_all.sh
#     CORPUS=crema TASKS=emotion OTHERS="gender age" FLAGS="--data-root DIR" RUNS=runs-real RESULTS=results/real bash run_all.sh
#     SWEEP=1 WAVES=1 bash run_all.sh                   # AER against rate, strength, length, number and kind of the trigger
#     WAVES="1 2" bash run_all.sh                       # Tables 1 to 3; 3: embeddings, 4: traces, 5 to 7: defences
set -uo pipefail
cd "$(dirname "$0")"
export RUNS=${RUNS:-runs}
PRESET=${PRESET:-mini} LAUNCH=${LAUNCH:-python} WAVES="${WAVES:-1 2 3 4 5 6 7} ${SWEEP:+8}"
CORES=$(getconf _NPROCESSORS_ONLN)
JOBS=${JOBS:-$([ "$PRESET" = mini ] && echo "$CORES" || echo 1)}  # runs at a time
export TQDM_MININTERVAL=30  # seconds between lines of progress in the logs
[ "$LAUNCH" = python ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES / JOBS > 0 ? CORES / JOBS : 1))}

study() {
    python study.py --names --preset "$PRESET" --seeds ${SEEDS:-1} --tasks ${TASKS:-asr emotion} --runs "$RUNS" \
        --launch "$LAUNCH" --flags="${FLAGS:-}" ${ENCODERS:+--encoders $ENCODERS} ${OTHERS+--others $OTHERS} ${CORPUS:+--corpus "$CORPUS"} "$@"
}
run_one() {  # "name<TAB>command": finished once exactly this command has succeeded, as long as a run's figures are there
    local name=${1%%$'\t'*} command=${1#*$'\t'} n
    [[ $command != *train.py* || -f "$RUNS/$name/metrics.json" ]] || rm -f "$RUNS/logs/$name.done"
    if [ "$(cat "$RUNS/logs/$name.done" 2>/dev/null)" != "$command" ]; then
        if eval "$command" > "$RUNS/logs/$name.log" 2>&1; then echo "$command" > "$RUNS/logs/$name.done"
        else echo "$name" >> "$RUNS/logs/failed"; echo "FAILED: $name, see $RUNS/logs/$name.log"; fi
    fi
    echo >> "$RUNS/logs/progress"; n=$(wc -l < "$RUNS/logs/progress")
    echo "$(date +%H:%M:%S) $name: $n of $TOTAL, about $((($(date +%s) - START) * (TOTAL - n) / n / 60)) min left"
}
export -f run_one
stop() {  # a process and all that it has started
    local children; children=$(pgrep -P "$1")
    kill -TERM "$1" 2>/dev/null
    for child in $children; do stop "$child"; done
}
pages() {  # an analysis of what has run, to $RUNS/analysis or $RESULTS
    python analyze.py "$1" --preset "$PRESET" --runs "$RUNS" ${RESULTS:+--out "$RESULTS"} || echo "analyze.py $1" >> "$RUNS/logs/failed"
}

for wave in $WAVES; do LISTED[wave]=$(study --wave "$wave") || exit 2; done  # before anything runs: a typo shows here
mkdir -p "$RUNS/logs" || exit 2
rm -f "$RUNS"/logs/{failed,progress}
export START TOTAL; START=$(date +%s) TOTAL=$(printf '%s\n' "${LISTED[@]}" | grep -c .)
for wave in $WAVES; do
    [ -n "${LISTED[wave]}" ] || continue
    printf '%s\n' "${LISTED[wave]}" | tr '\n' '\0' | xargs -0 -P "$JOBS" -n 1 bash -c 'run_one "$1"' _ &
    trap "stop $!; exit 143" TERM INT HUP
    wait $!
done
trap - TERM INT HUP
for what in $([[ $WAVES == *3* ]] && echo shift cluster) tables claims $([[ $WAVES == *4* ]] && echo trace) \
    $([[ $WAVES == *7* ]] && echo defences) $([[ $WAVES == *8* ]] && echo sweeps); do pages $what; done
if [ -e "$RUNS/logs/failed" ]; then echo "failed: $(tr '\n' ' ' < "$RUNS/logs/failed")"; exit 1; fi
echo "everything in $((($(date +%s) - START) / 60)) min"
