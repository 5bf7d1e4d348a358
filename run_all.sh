#!/usr/bin/env bash
# Every table and figure of the paper. study.py lists the jobs, each with the files that it needs and the file that it
# makes; GNU make runs those that are missing or out of date; analyze.py writes the pages. Start it again after a
# failure, a kill or a changed setting: what is finished is not repeated, what was interrupted goes on.
#
#     bash run_all.sh                      # everything, preset mini, one seed
#     bash run_all.sh tables embeddings    # some stages: tables, embeddings, traces, defences, sweeps
#     SEEDS="1 2 3" TASKS="asr emotion gender age" ENCODERS=wavlm bash run_all.sh tables
#     PRESET=paper FLAGS="--data-root /data" LAUNCH="torchrun --nproc_per_node=8" bash run_all.sh
#     CORPUS=crema TASKS=emotion OTHERS="gender age" FLAGS="--data-root DIR" RUNS=runs-real RESULTS=results/real bash run_all.sh
#     SRUN="srun --gres=gpu:1 --time=4:00:00" JOBS=20 PRESET=paper bash run_all.sh    # each job on a node of a cluster
set -uo pipefail
cd "$(dirname "$0")" || exit 2
STAGES=${*:-tables embeddings traces defences sweeps}
RUNS=${RUNS:-runs} PRESET=${PRESET:-mini} LAUNCH=${LAUNCH:-python}
CORES=$(getconf _NPROCESSORS_ONLN)
JOBS=${JOBS:-$([ "$PRESET" = mini ] && echo "$CORES" || echo 1)}  # at a time

[[ $JOBS =~ ^[1-9][0-9]*$ ]] || { echo "error: JOBS=$JOBS: give a number of jobs at a time, 1 or more" >&2; exit 2; }

# the graph, in $RUNS/jobs; a mistake in what is asked for ends here
python study.py --makefile --preset "$PRESET" --seeds ${SEEDS:-1} --tasks ${TASKS:-asr emotion} --runs "$RUNS" \
    --launch "$LAUNCH" --flags="${FLAGS:-}" ${ENCODERS:+--encoders $ENCODERS} ${OTHERS+--others $OTHERS} \
    ${CORPUS:+--corpus "$CORPUS"} || exit 2
mkdir -p "$RUNS/logs" || exit 2
build() { make --no-print-directory -C "$RUNS" -f jobs/Makefile "$@" $STAGES; }

# one job; make starts it in $RUNS
run_job() {  # NAME STAGE KIND TARGET SCRIPT NEED...
    local name=$1 stage=$2 kind=$3 target=$4 need
    local folder=${target%/*}
    shift 5
    export OVERWRITE=
    rm -f "logs/$name.failed"
    if [ -e "logs/$name.sh" ]; then  # it has been started before; by another command, or from other files?
        cmp -s "jobs/$name.sh" "logs/$name.sh" || OVERWRITE=--overwrite
        for need in "$@"; do [ "$need" -nt "$folder/args.json" ] && OVERWRITE=--overwrite; done
    fi
    cp "jobs/$name.sh" "logs/$name.sh"
    local LC_NUMERIC=C TIMEFORMAT='%R %U %S'  # seconds: on the clock, of the processor in two parts
    if { time ${SRUN:-} bash "jobs/$name.sh" > "logs/$name.log" 2>&1; } 2> "logs/$name.time" && [ -e "$target" ]; then
        touch "$target"
        echo "$stage $kind $(cat "logs/$name.time")" > "logs/$name.seconds"
        echo "$(date +%H:%M:%S) $name: $(cd "$PROGRAM" && python study.py --progress "$JOBS" --runs "$RUNS")"
    else
        touch "logs/$name.failed"
        echo "$(date +%H:%M:%S) $name FAILED: see $RUNS/logs/$name.log"
        return 1
    fi
}
export -f run_job
export PROGRAM=$PWD RUNS JOBS SRUN=${SRUN:-}
export TQDM_MININTERVAL=30  # seconds between lines of progress in the logs
[ "$LAUNCH" = python ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES / JOBS > 0 ? CORES / JOBS : 1))}

# what there is to do, then the work, in a process group of its own, which a signal stops as a whole
LISTED=$(build -n) || exit 2
sed -n 's/^run_job \([^ ]*\) [^ ]* \([^ ]*\) .*/\1 \2/p' <<< "$LISTED" > "$RUNS/logs/todo"
echo "$STAGES: $(python study.py --progress "$JOBS" --runs "$RUNS"), $JOBS at a time; logs in $RUNS/logs"
set -m
build -k -j "$JOBS" &
trap 'kill -TERM -- -$! 2> /dev/null; exit 143' TERM INT HUP
wait $!
STATUS=$?
trap - TERM INT HUP

# the pages, of whatever there is; PAGES= leaves them out
page() { python analyze.py "$@" --preset "$PRESET" --runs "$RUNS" ${RESULTS:+--out "$RESULTS"}; }
for stage in ${PAGES-$STAGES}; do
    case $stage in
        tables) page tables && { page claims || [ $? = 2 ]; } ;;  # 2: these runs decide none
        sweeps) page sweeps || [ $? = 2 ] ;;  # 2: none of these tasks is swept
        embeddings) page shift cluster ;;
        traces) page trace ;;
        defences) page defences ;;
    esac || STATUS=1
done
python study.py --costs --runs "$RUNS"
FAILED=$(while read -r name _; do [ -e "$RUNS/logs/$name.failed" ] && echo "$name"; done < "$RUNS/logs/todo")
if [ -n "$FAILED" ]; then
    echo "failed, see $RUNS/logs/NAME.log:" $FAILED
    exit 1
fi
exit $STATUS
