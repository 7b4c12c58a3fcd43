#!/usr/bin/env bash
# Compress the small model in demo/model to two sizes, side by side, and compare what the three models write.
# No calibration text is given, so the model writes its own. Nothing is fetched from the network.
set -euo pipefail
cd "$(dirname "$0")/.."

export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1 # one core for each of the two: these matrices are too small to share among threads
options=(--tokens 16384 --text demo/text.txt)

rm -rf demo/out/keep-*
mkdir -p demo/out

echo "Compressing demo/model to 80 % and to 60 % of its parameters. This takes a few minutes."
echo
for keep in 0.80 0.60; do
    echo "  lillama compress demo/model demo/out/keep-$keep --keep $keep ${options[*]}"
done
echo

lillama compress demo/model demo/out/keep-0.60 --keep 0.60 "${options[@]}" >demo/out/keep-0.60.log 2>&1 &
smaller=$!
trap 'kill "$smaller" 2>/dev/null || true' EXIT
lillama compress demo/model demo/out/keep-0.80 --keep 0.80 "${options[@]}" >demo/out/keep-0.80.log
if ! wait "$smaller"; then
    cat demo/out/keep-0.60.log >&2
    exit 1
fi

python demo/compare.py demo/model demo/out/keep-0.80 demo/out/keep-0.60

echo
echo "The report of both, for a browser:"
lillama report demo/out/keep-0.80 demo/out/keep-0.60 --out demo/out/report.html
