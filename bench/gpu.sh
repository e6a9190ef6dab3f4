#!/usr/bin/env bash
# What a GPU that is at hand for minutes can tell, most important first:
#   bench/gpu.sh [--small] [--out FOLDER] [PART ...]
# Needs a Python with PyTorch and the packages of ".[bench]": $PYTHON, else .venv/tests/bin/python, else python3. Every part has a
# time limit, 8 minutes in all, and writes FOLDER/gpu-PART.json (default: bench/results) and FOLDER/gpu-PART.log while it runs, so
# that a stop loses nothing. The exit code is 1 if a part failed or was stopped. The parts in ComfyUI are left out until
# python3 tests has fetched one. --small: networks of a few channels, on a CPU too, to see that every line runs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

small= out=bench/results chosen=
while [ $# -gt 0 ]; do
    case $1 in
        --small) small=1 ;;
        --out)
            [ $# -ge 2 ] || { echo "--out needs a folder" >&2; exit 2; }
            out=$2
            shift ;;
        -*) echo "option $1 is unknown; use --small or --out FOLDER" >&2; exit 2 ;;
        *) chosen="$chosen $1 " ;;
    esac
    shift
done

parts="precision speed captured compiled memory training host-demo host-low host"
for part in $chosen; do
    case " $parts " in
        *" $part "*) ;;
        *) echo "part $part is unknown; use one of $parts" >&2; exit 2 ;;
    esac
done

python=${PYTHON:-.venv/tests/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
mkdir -p "$out"
failed=

# part NAME SECONDS MODULE ARGUMENTS
part() {
    local name=$1 limit=$2 module=$3 code start=$SECONDS
    shift 3
    [ -z "$small" ] || limit=$((10 * limit))  # a machine that tests run on may be busy
    case "${chosen:- $name }" in *" $name "*) ;; *) return ;; esac
    echo "== $name, at most $limit s"
    timeout --signal=INT --kill-after=5 "$limit" \
        "$python" -m ${small:+bench.small} "$module" "$@" --out "$out/gpu-$name.json" 2>&1 | tee "$out/gpu-$name.log"
    code=$?
    echo "== $name: exit code $code after $((SECONDS - start)) s"
    [ "$code" = 0 ] || failed="$failed $name"
}

side=1024 picture=1024 largest=4096 steps=20 budget=() trained=() card=(--variant sana-0.6b-1024px --side 1024)
if [ -n "$small" ]; then
    side=64 picture=512 largest=64 steps=1 budget=(--repeats 1) trained=(--batch-size 1 --steps 1)
    card=(--variant demo --side 256)
fi
step="step, sana-(0.6b|1.6b|sprint-0.6b)-1024px, $side px"

part precision 60 bench.precision ${small:+--side 128}
part speed 90 bench --no-compiled --minutes 1.35 --steps $steps "${budget[@]}" \
    --only "$step|(encode|decode), $side px|^prompt of 20 words|picture.*0.6b.*, $picture px"
part captured 40 bench.captured --side $side --steps $steps "${budget[@]}"
part compiled 80 bench --compiled --minutes 1.15 --steps $steps "${budget[@]}" --only "$step|decode, $side px"
part memory 45 bench.memory --measure $largest
part training 40 bench.training --side $side "${trained[@]}"
if [ -d .venv/hosts ]; then
    part host-demo 25 tests.host.card --real --variant demo --side 256
    part host-low 25 tests.host.card --real --vram low --variant demo --side 256
    part host 70 tests.host.card --real "${card[@]}"
else
    echo "== left out: ComfyUI, which python3 tests fetches"
fi

[ -z "$failed" ] || { echo "failed or stopped:$failed"; exit 1; }
