#!/usr/bin/env bash
# Start the processes of a run on this machine; once on each machine of a run of several.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$repository/launch/common.sh"

usage() {
    cat <<'USAGE'
usage: launch/torchrun.sh [options] [--] experiment=NAME [key=value ...]

Trains with several processes through torchrun. What follows the options goes to
mone_megatron.pretrain untouched; `--` ends the options when a flag of Hydra's comes first.

  --nproc-per-node N   processes on this machine (default: one for each GPU; without a GPU 2, on
                       the CPU)
  --nnodes N           machines (default: 1); start the same command on each of them, with
    --node-rank R --master-addr HOST [--master-port P]
                       its number from 0, and the address of machine 0 (port 29500), or with
    --rdzv-endpoint HOST:P --rdzv-id ID
                       c10d rendezvous: the address of any of the machines, and a name for the run;
                       numbers are then given out by torchrun
  --local-addr HOST    this machine's address for the others, when its name does not resolve (c10d)
  -h, --help

The python is that of the active environment, or of .venv beside launch/, or the one on the PATH.

examples:
  launch/torchrun.sh --nproc-per-node 2 experiment=tiny_mone device=cpu
  launch/torchrun.sh --nnodes 2 --node-rank 0 --master-addr node0 experiment=mone_0.9b
  launch/torchrun.sh --nnodes 2 --rdzv-endpoint node0:29400 --rdzv-id 7 experiment=mone_0.9b
USAGE
}

processes='' nodes=1 node_rank='' master_addr='' master_port=''
endpoint='' rdzv_id='' local_addr=''
known=' --nproc-per-node --nnodes --node-rank --master-addr --master-port --rdzv-endpoint --rdzv-id --local-addr '

while [[ $# -gt 0 ]]; do
    # --option=value is --option value.
    if [[ $1 == --*=* ]]; then
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
    fi
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            break
            ;;
        -*)
            [[ $known == *" $1 "* ]] ||
                fail "$1: unknown option; see launch/torchrun.sh --help (flags of Hydra's stand after --)"
            need_value "$1" "$@"
            case $1 in
                --nproc-per-node) need_count "$1" "$2" && processes=$2 ;;
                --nnodes) need_count "$1" "$2" && nodes=$2 ;;
                --node-rank) need_count "$1" "$2" 0 && node_rank=$2 ;;
                --master-addr) master_addr=$2 ;;
                --master-port) need_count "$1" "$2" && master_port=$2 ;;
                --rdzv-endpoint) endpoint=$2 ;;
                --rdzv-id) rdzv_id=$2 ;;
                --local-addr) local_addr=$2 ;;
            esac
            shift 2
            ;;
        *) break ;;
    esac
done
refuse_late_options "$known" "$@"

rendezvous=()
if [[ -n $endpoint || -n $rdzv_id ]]; then
    [[ -z $node_rank$master_addr$master_port ]] ||
        fail "--rdzv-endpoint: c10d rendezvous takes no --node-rank, --master-addr or --master-port"
    [[ -n $rdzv_id ]] || fail "--rdzv-id: missing; give the run a name that all machines use"
    [[ $endpoint =~ ^.+:[0-9]+$ ]] || fail "--rdzv-endpoint: '$endpoint' is not HOST:PORT"
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$rdzv_id")
    [[ -z $local_addr ]] || rendezvous+=(--local-addr "$local_addr")
elif [[ $nodes -gt 1 || -n $node_rank$master_addr$master_port ]]; then
    [[ -z $local_addr ]] || fail "--local-addr: for c10d rendezvous only (--rdzv-endpoint)"
    [[ -n $master_addr ]] || fail "--master-addr: missing; $nodes machines need the address of machine 0"
    [[ -n $node_rank ]] || fail "--node-rank: missing; number the machines from 0 to $((nodes - 1))"
    [[ $node_rank -lt $nodes ]] || fail "--node-rank: $node_rank is not below --nnodes=$nodes"
    rendezvous=(--node-rank "$node_rank" --master-addr "$master_addr"
        --master-port "${master_port:-29500}")
else
    [[ -z $local_addr ]] || fail "--local-addr: for c10d rendezvous only (--rdzv-endpoint)"
    # A free port of its own: two runs on a machine do not meet.
    rendezvous=(--standalone)
fi

python=$(find_python "$repository") ||
    fail "no python found; run \`make .venv/installed\`, or activate an environment"
# The sources beside this script, also where they are not installed (a container).
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"

if [[ -z $processes ]]; then
    gpus=0
    if [[ " $* " == *" device=cuda "* || " $* " == *" device.kind=cuda "* ]] ||
        ! device_is_given "$@"; then
        gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') ||
            fail "$python cannot import torch; activate the environment that has it"
    fi
    processes=$gpus
    if [[ $gpus -eq 0 ]]; then
        processes=2
        device_is_given "$@" || set -- device=cpu "$@"
    fi
fi

# The trainer takes its own number of threads (device.threads); this silences torchrun's warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A run that is asked to stop saves first. torchrun kills it after 30 s unless told otherwise
# (torch 2.13; earlier ones have no such setting).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}

# torchrun, whose last lines and exit code are the run's.
exec "$python" -m mone_megatron.launcher --nnodes "$nodes" --nproc-per-node "$processes" \
    "${rendezvous[@]}" -m mone_megatron.pretrain "$@"
