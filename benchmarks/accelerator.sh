#!/usr/bin/env bash
# Measures a GPU or TPU in about ten minutes: ./benchmarks/accelerator.sh FOLDER [bench's flags, such as --config=...]
#
# The step over formulations, precisions, batches and seeds, beside PyTorch where it is, the whole training loop,
# evaluation, input, compilation times and the longest kernels. FOLDER/report.md has the tables as they are
# measured, FOLDER/results.json all numbers. PYTHON=..., BATCHES=128,1024 and SEEDS=1,5 are other choices.
set -u
[ $# -gt 0 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python="${PYTHON:-python3}" batches="${BATCHES:-128,1024}" seeds="${SEEDS:-1,5}"
mkdir -p "$1" && folder="$(cd "$1" && pwd)" || exit
shift
failed=0
exec > >(tee "$folder/report.md") 2>&1

measure() { # NAME SECONDS COMMAND...: a failure is said, and the rest goes on
    echo && echo "## $1" && echo
    timeout "$2" "${@:3}" 2>"$folder/$1.log" || { failed=1; echo "failed: $(tail -n 1 "$folder/$1.log")"; }
}
bench() { measure "$1" "$2" "$python" -m ffl_jax.bench --synthetic=100 --json="$folder/$1.json" "${@:3}"; }
peer() {
    measure "$1" 120 "$python" benchmarks/pytorch_ffl.py --device=cuda --batch_size="${batches%%,*}" \
        --json="$folder/$1.json" "${@:2}"
}

command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
bench kernels 120 "$@" --parts=kernels --config.subnetworks.execution=loop
torch=0
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && torch=1
[ $torch = 0 ] || peer pytorch
bench float32 150 "$@" --parts=step --executions=loop,vmap --precisions=float32 --batch_sizes="$batches"
[ $torch = 0 ] || peer pytorch_bfloat16 --bfloat16 --channels_last
bench bfloat16 300 "$@" --parts=step --executions=loop,vmap --precisions=bfloat16 --batch_sizes="$batches"
bench seeds 240 "$@" --parts=step --executions=loop --precisions=float32,bfloat16 --seeds="$seeds"
[ $torch = 0 ] || peer pytorch_compiled --compile
bench loop 150 "$@" --parts=loop,evaluation,input --config.subnetworks.execution=loop
"$python" - "$folder" <<'EOF'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem != "results"}
(folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
EOF
echo && echo "written to $folder"
exit $failed
