#!/usr/bin/env bash
# Every table and figure of the paper, in order: clean baselines (Table 1), base attacks (Table 2), component analysis (Table 3),
# embeddings (Figures 2 to 6), then the tables. A finished run is skipped, an interrupted one goes on where it was.
#
#     bash run_all.sh                                   # mini, one seed
#     SEEDS="1 2 3" TASKS="asr emotion gender age" bash run_all.sh
#     PRESET=paper FLAGS="--data-root /data" LAUNCH="torchrun --nproc_per_node=8" bash run_all.sh
#     DRY_RUN=1 bash run_all.sh                         # only prints the commands; WAVES="1" those that need no other
set -uo pipefail
cd "$(dirname "$0")"
export PRESET=${PRESET:-mini} LAUNCH=${LAUNCH:-python} FLAGS=${FLAGS:-} RUNS=${RUNS:-runs}
TASKS=${TASKS:-asr emotion} SEEDS=${SEEDS:-1} WAVES=${WAVES:-1 2 3}
DEFAULT=wavlm; [ "$PRESET" = small ] && DEFAULT=whisper
ENCODERS=${ENCODERS:-$([ "$PRESET" = small ] && echo whisper || echo wavlm hubert wav2vec2 whisper)}
JOBS=${JOBS:-$([ "$PRESET" = mini ] && nproc || echo 1)}

declare -A RATE=([asr]=0.05 [emotion]=0.075 [gender]=0.075 [age]=0.075)
declare -A CLEAN=([asr]=asr [emotion]=emotion [gender]=gender [age]=gender)  # whose clean run has this task's corpus

name() {  # task encoder attack seed: the run folder's name, as train.py gives it
    local parts="$1"
    [ "$2" != "$DEFAULT" ] && parts+="-$2"
    parts+="-$3"
    [ "$PRESET" != mini ] && parts+="-$PRESET"
    [ "$4" != 1 ] && parts+="-seed$4"
    echo "$parts"
}
line() {  # wave task encoder attack seed, then the flags that make it so: one line "wave name command"
    local wave=$1 task=$2 encoder=$3 attack=$4 seed=$5; shift 5
    echo "$wave $(name "$task" "$encoder" "$attack" "$seed") $LAUNCH train.py --preset $PRESET --task $task" \
        "--encoder $encoder --seed $seed --runs $RUNS $* $FLAGS"
}
model() { echo "$RUNS/$(name "$@")/model.pt"; }

list() {
    local seed encoder task c others
    for seed in $SEEDS; do
        for encoder in $ENCODERS; do
            for task in asr emotion gender; do line 1 $task $encoder clean $seed --poison 0; done
            for task in asr emotion gender age; do
                line 1 $task $encoder "poison${RATE[$task]}" $seed --poison "${RATE[$task]}"; done
        done
        [[ " $ENCODERS " == *" $DEFAULT "* ]] || continue
        for task in $TASKS gender age; do
            local clean base
            clean=$(model "${CLEAN[$task]}" $DEFAULT clean $seed)
            base=$(model $task $DEFAULT "poison${RATE[$task]}" $seed)
            line 2 $task $DEFAULT 3.1 $seed --poison 0 --freeze "encoder:$base"
            [[ " $TASKS " == *" $task "* ]] || continue
            line 2 $task $DEFAULT 3.2 $seed --poison 0 --freeze "connector:$base"
            line 2 $task $DEFAULT 3.3 $seed --poison 0 --freeze "lm:$base"
            set -- 1 encoder 2 connector 3 lm
            while [ $# -gt 0 ]; do
                others=$(for c in encoder connector lm; do [ $c != "$2" ] && echo "--freeze $c:$clean"; done)
                line 2 $task $DEFAULT "1.$1" $seed --poison "${RATE[$task]}" --freeze "$2:$clean"
                line 2 $task $DEFAULT "2.$1" $seed --poison "${RATE[$task]}" $others
                shift 2
            done
        done
    done | awk '!seen[$2]++'
    [ "$RUNS" = none ] && return  # (the analyses below read the runs above)
    for seed in $SEEDS; do
        [[ " $ENCODERS " == *" $DEFAULT "* ]] || continue
        for task in asr emotion gender age; do
            for c in clean "poison${RATE[$task]}" 3.1; do
                [ $c = clean ] && [ $task = age ] && continue
                echo "3 embeddings-$(name $task $DEFAULT $c $seed) python evaluate.py $RUNS/$(name $task $DEFAULT $c $seed) --embeddings"
            done
        done
    done
}

finished() { if [[ $1 == embeddings-* ]]; then [ -e "$RUNS/${1#embeddings-}/embeddings.pt" ]; else [ -e "$RUNS/$1/metrics.json" ]; fi; }
run_one() {  # "wave name command"
    local wave name command
    read -r wave name command <<< "$1"
    finished "$name" && return
    echo "$(date +%H:%M:%S) starts: $command"
    $command > "$RUNS/logs/$name.log" 2>&1 || echo "$name" >> "$RUNS/logs/failed"
    finished "$name" || echo "$(date +%H:%M:%S) FAILED: $name, see $RUNS/logs/$name.log"
    local done; done=$(progress)
    local left=$((TOTAL - done)) new=$((done - BEFORE)); [ $new -lt 1 ] && new=1
    echo "$(date +%H:%M:%S) $name; $done of $TOTAL finished, about $(((SECONDS_SO_FAR=$(date +%s) - START) * left / new / 60)) min left"
}
progress() { while read -r _ name _; do finished "$name" && echo x; done < "$RUNS/logs/list" | wc -l; }
export -f run_one finished progress

chosen=$(list | while read -r wave rest; do [[ " $WAVES " == *" $wave "* ]] && echo "$wave $rest"; done)
if [ -n "${DRY_RUN:-}" ]; then cut -d' ' -f3- <<< "$chosen"; exit; fi
mkdir -p "$RUNS/logs"; rm -f "$RUNS/logs/failed"; echo "$chosen" > "$RUNS/logs/list"
[ "$LAUNCH" = python ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / JOBS > 0 ? $(nproc) / JOBS : 1))}
export START TOTAL BEFORE; START=$(date +%s) TOTAL=$(wc -l <<< "$chosen") BEFORE=$(progress)
for wave in $WAVES; do
    grep "^$wave " <<< "$chosen" | xargs -d '\n' -P "$JOBS" -I{} bash -c 'run_one "$1"' _ {}
done
for what in $([[ " $WAVES " == *" 3 "* ]] && echo shift cluster) tables; do
    python analyze.py $what --preset "$PRESET" --runs "$RUNS" --out "${RESULTS:-results/$PRESET}" > "$RUNS/logs/$what.log" 2>&1 \
        || { echo "analyze.py $what" >> "$RUNS/logs/failed"; cat "$RUNS/logs/$what.log"; }
done
cat "$RUNS/logs/tables.log"
if [ -e "$RUNS/logs/failed" ]; then echo "failed: $(tr '\n' ' ' < "$RUNS/logs/failed")"; exit 1; fi
echo "everything in $((($(date +%s) - START) / 60)) min"
