#!/usr/bin/env bash
# Which versions of the libraries and of Python work: the tests, without the slow ones, in new
# environments with the locked versions, the newest and the oldest ones that requirements.in allows.
#
#     bash tests/versions.sh                   # all of them, and a table at the end: half an hour
#     bash tests/versions.sh "oldest 3.11"     # one of them
#
# It needs uv, and the Pythons that it names. Logs stay in $LOGS (a new folder of /tmp by default).
set -uo pipefail
cd "$(dirname "$0")/.."
LOGS=${LOGS:-$(mktemp -d)}
mkdir -p "$LOGS"
[ $# -gt 0 ] || set -- "locked 3.11" "locked 3.12" "locked 3.13" "newest 3.11" "oldest 3.11"

requirements() {  # which python: the versions to install, one a line
    case $1 in
        locked) cat requirements.txt ;;
        newest) uv pip compile -q --python-version "$2" requirements.in ;;
        oldest) uv pip compile -q --python-version "$2" --resolution lowest-direct requirements.in ;;
        *) echo "versions.sh: '$1' is not locked, newest or oldest" >&2; exit 2 ;;
    esac
}

version_of() {  # a library's version in the environment
    "$environment/bin/python" -c "import importlib.metadata as m; print(m.version('$1'))"
}

row() { printf '%-8s %-8s %-8s %-11s %-13s %-8s %s\n' "$@"; }

table=$(row versions Python torch torchaudio transformers numpy tests)
failed=0
for choice in "$@"; do
    read -r which python <<< "$choice"
    log=$LOGS/$which-$python.log
    environment=$LOGS/environment
    echo "$which versions on Python $python: log in $log"
    requirements "$which" "$python" > "$LOGS/$which-$python.txt" || exit 1
    uv venv -q --clear --python "$python" "$environment" || exit 1
    uv pip install -q --python "$environment" -r "$LOGS/$which-$python.txt" -r tests/requirements.in || exit 1
    "$environment/bin/python" -m pytest -q -n 2 -m "not slow" tests > "$log" 2>&1 || failed=1
    table+=$'\n'$(row "$which" "$python" "$(version_of torch)" \
        "$(version_of torchaudio)" "$(version_of transformers)" "$(version_of numpy)" "$(tail -n 1 "$log")")
    rm -r "$environment"
done
echo
echo "$table"
exit $failed
