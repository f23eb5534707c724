#!/usr/bin/env bash
# Trains a full model. Further arguments go to training/train.py and win over the ones here:
#
#   scripts/train.sh --steps 500 --output out/mine [--resume | --resume auto]
#   scripts/train.sh --epochs 3 --output out/mine
#   PROCESSES=8 scripts/train.sh                                   one process a GPU, by torchrun
#   PROCESSES=8 scripts/train.sh --fsdp                            weights spread over the GPUs
#   PROCESSES=8 scripts/train.sh --deepspeed training/zero3.json   the same by DeepSpeed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi

launch=("$python")
if [[ -n ${PROCESSES:-} ]]; then
    launch+=(-m torch.distributed.run --standalone --nproc-per-node "$PROCESSES")
fi

length=(--steps 1000)
[[ " $* " == *" --epochs"* ]] && length=()

exec "${launch[@]}" training/train.py \
    --model smollm2 \
    --data builtin \
    --eval-fraction 0.02 \
    --loss auto \
    "${length[@]}" \
    --batch-size 4 \
    --sequence-length 512 \
    --learning-rate 2e-5 \
    --warmup-steps 50 \
    --weight-decay 0.01 \
    --checkpoint-interval 100 \
    --output out/train \
    "$@"
