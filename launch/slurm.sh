#!/usr/bin/env bash
# Submit a run, or a sweep of runs, to SLURM. What differs between clusters is in a site file.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$repository/launch/common.sh"

usage() {
    cat <<'USAGE'
usage: launch/slurm.sh [options] [--] experiment=NAME [key=value ...]

Submits a job that trains with one process for each GPU, saves and is requeued ahead of its time
limit, and goes on where it was. Overrides are checked here, before anything is queued. The job's
number goes to stdout, everything else to stderr.

  --nodes N            machines (default: 1)
  --gpus-per-node N    GPUs of each, and processes (default: 0, a CPU job)
  --tasks-per-node N   processes of each machine, for CPU jobs (default: 1)
  --cpus-per-task N    cores of each process
  --time LIMIT         as for sbatch: minutes, H:M:S or D-H[:M[:S]]
  --partition, --account, --qos NAME     before those of the site file
  --job-name NAME      default: run.name
  --sbatch "--OPTION=VALUE"              one more option of sbatch's; may be given several times
  --site FILE          site file (default: $MONE_SITE, or none); see launch/site.example.env
  --sweep              values separated by commas make one run each, as an array of jobs
  --max-parallel N     runs of a sweep at the same time (default: all)
  --grace SECONDS      SIGUSR1 this long before the limit, to save (default: 300)
  --max-stalls N       starts in a row without a new checkpoint before giving up (default: 3)
  --no-requeue         end at the time limit instead of starting again
  --dry-run            print the job instead of submitting it
  -h, --help

examples:
  launch/slurm.sh --nodes 4 --gpus-per-node 8 --time 24:00:00 experiment=mone_0.9b
  launch/slurm.sh --sweep --gpus-per-node 8 experiment=mone_0.9b mone.keep_ratio=0.125,0.25,0.5
USAGE
}

nodes=1 gpus=0 tasks='' cpus='' time_limit='' partition='' account='' qos='' job_name=''
site=${MONE_SITE:-} sweep=no max_parallel='' grace=300 max_stalls=3 requeue=yes dry_run=no
sbatch_lines=()
known=' --nodes --gpus-per-node --tasks-per-node --cpus-per-task --time --partition --account --qos --job-name --sbatch --site --max-parallel --grace --max-stalls --sweep --no-requeue --dry-run '

while [[ $# -gt 0 ]]; do
    case $1 in
        --sbatch) # Its value looks like an option.
            [[ $# -ge 2 ]] || fail '--sbatch: a value is missing; write --sbatch "--OPTION=VALUE"'
            sbatch_lines+=("$2")
            shift 2
            continue
            ;;
        # --option=value is --option value.
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            break
            ;;
        --sweep) sweep=yes && shift ;;
        --no-requeue) requeue=no && shift ;;
        --dry-run) dry_run=yes && shift ;;
        -*)
            [[ $1 != -m && $1 != --multirun ]] || fail "$1: is --sweep here"
            [[ $known == *" $1 "* ]] || fail "$1: unknown option; see launch/slurm.sh --help"
            need_value "$1" "$@"
            case $1 in
                --nodes) need_count "$1" "$2" && nodes=$2 ;;
                --gpus-per-node) need_count "$1" "$2" 0 && gpus=$2 ;;
                --tasks-per-node) need_count "$1" "$2" && tasks=$2 ;;
                --cpus-per-task) need_count "$1" "$2" && cpus=$2 ;;
                --time) time_limit=$2 ;;
                --partition) partition=$2 ;;
                --account) account=$2 ;;
                --qos) qos=$2 ;;
                --job-name) job_name=$2 ;;
                --sbatch) sbatch_lines+=("$2") ;;
                --site) site=$2 ;;
                --max-parallel) need_count "$1" "$2" && max_parallel=$2 ;;
                --grace) need_count "$1" "$2" && grace=$2 ;;
                --max-stalls) need_count "$1" "$2" && max_stalls=$2 ;;
            esac
            shift 2
            ;;
        *) break ;;
    esac
done
refuse_late_options "$known" "$@"
[[ $# -gt 0 ]] || fail "nothing to run; write experiment=NAME (see launch/slurm.sh --help)"
[[ -z $tasks || $gpus -eq 0 ]] ||
    fail "--tasks-per-node: for CPU jobs; with --gpus-per-node there is one process for each GPU"
[[ -z $max_parallel || $sweep == yes ]] || fail "--max-parallel: for sweeps; add --sweep"
if [[ -z $tasks ]]; then
    tasks=$((gpus > 0 ? gpus : 1))
fi

# seconds LIMIT: of a time limit as sbatch reads it, or nothing.
seconds() {
    local days=0 rest=$1 parts
    if [[ $rest =~ ^([0-9]+)-(.+)$ ]]; then
        days=${BASH_REMATCH[1]} rest=${BASH_REMATCH[2]}
        [[ $rest =~ ^[0-9]+(:[0-9]+){0,2}$ ]] || return 0
        IFS=: read -ra parts <<<"$rest:0:0"
    else
        [[ $rest =~ ^[0-9]+(:[0-9]+){0,2}$ ]] || return 0
        case $rest in
            *:*:*) IFS=: read -ra parts <<<"$rest" ;;
            *) IFS=: read -ra parts <<<"0:$rest:0" ;; # minutes, minutes:seconds
        esac
    fi
    printf '%d\n' $(((10#$days * 24 + 10#${parts[0]}) * 3600 + 10#${parts[1]} * 60 + 10#${parts[2]}))
}
if [[ -n $time_limit ]]; then
    limit=$(seconds "$time_limit")
    [[ -n $limit ]] || fail "--time: '$time_limit' is not a limit; write minutes, H:M:S or D-H:M:S"
    # 0 is no limit.
    [[ $requeue == no || $limit -eq 0 || $grace -lt $limit ]] ||
        fail "--grace: $grace s are no less than --time=$time_limit ($limit s); give less, such as --grace $(((limit + 3) / 4))"
fi

# --- the site file
site_names=" SITE_PARTITION SITE_ACCOUNT SITE_QOS SITE_SBATCH SITE_GPU_REQUEST SITE_CPUS_PER_TASK \
SITE_MODULES SITE_SETUP SITE_ENVIRONMENT SITE_VENV SITE_CONTAINER SITE_IMAGE SITE_MOUNTS \
SITE_CONTAINER_ARGS SITE_CONTAINER_PYTHON SITE_SRUN SITE_HEAD_SUFFIX SITE_OVERRIDES "
for name in $site_names; do
    unset "$name" # only the file says
done
SITE_PARTITION='' SITE_ACCOUNT='' SITE_QOS='' SITE_GPU_REQUEST='--gpus-per-node={n}'
SITE_CPUS_PER_TASK='' SITE_SETUP='' SITE_VENV='' SITE_CONTAINER='' SITE_IMAGE=''
SITE_CONTAINER_PYTHON=python SITE_HEAD_SUFFIX=''
SITE_SBATCH=() SITE_MODULES=() SITE_ENVIRONMENT=() SITE_MOUNTS=() SITE_CONTAINER_ARGS=()
SITE_SRUN=() SITE_OVERRIDES=()

read_site() {
    local file=$1 problem name
    [[ -f $file && -r $file ]] || fail "--site: $file is no file that can be read; copy launch/site.example.env"
    problem=$(bash -n "$file" 2>&1) || fail "$file: not valid bash: ${problem%%$'\n'*}"
    # Names that the file sets, and nothing reads, are misspelt ones.
    while read -r name; do
        [[ $site_names == *" $name "* ]] ||
            fail "$file: $name: unknown; launch/site.example.env has all the names"
    done < <(sed -nE 's/^[[:space:]]*(SITE_[A-Za-z0-9_]*)\+?=.*/\1/p' "$file")
    # Once by itself, where a failing command or a variable that is not set ends it.
    problem=$(bash -eu "$file" 2>&1 >/dev/null) || fail "${problem:+${problem%%$'\n'*}: }$file: a line fails"
    # shellcheck disable=SC1090
    source "$file" >&2
}

# need_entries FILE NAME PATTERN WHAT ENTRY...
need_entries() {
    local file=$1 name=$2 pattern=$3 what=$4 entry
    shift 4
    for entry in "$@"; do
        [[ $entry =~ $pattern && $entry != *$'\n'* ]] || fail "$file: $name: '$entry' is not $what"
    done
}

[[ -z $site ]] || read_site "$site"
need_entries "$site" SITE_SBATCH '^--?[a-zA-Z]' 'an option of sbatch such as --constraint=a100' "${SITE_SBATCH[@]}"
need_entries "--sbatch" value '^--?[a-zA-Z]' 'an option of sbatch such as --constraint=a100' "${sbatch_lines[@]}"
need_entries "$site" SITE_ENVIRONMENT '^[A-Za-z_][A-Za-z0-9_]*=' 'NAME=value' "${SITE_ENVIRONMENT[@]}"
need_entries "$site" SITE_MOUNTS '^/' 'an absolute path, or /outside:/inside' "${SITE_MOUNTS[@]}"
need_entries "$site" SITE_GPU_REQUEST '^$|\{n\}' 'empty or an option with {n} such as --gres=gpu:{n}' "$SITE_GPU_REQUEST"
[[ -z $SITE_CPUS_PER_TASK ]] || need_count "$site: SITE_CPUS_PER_TASK" "$SITE_CPUS_PER_TASK"
[[ -z $SITE_CONTAINER || -z $SITE_VENV ]] || fail "$site: SITE_VENV: not with SITE_CONTAINER; the image brings its python"
case $SITE_CONTAINER in
    '') [[ -z $SITE_IMAGE ]] || fail "$site: SITE_CONTAINER: missing for SITE_IMAGE; write pyxis or apptainer" ;;
    pyxis | apptainer) [[ -n $SITE_IMAGE ]] || fail "$site: SITE_IMAGE: missing for SITE_CONTAINER=$SITE_CONTAINER" ;;
    *) fail "$site: SITE_CONTAINER: '$SITE_CONTAINER' is neither pyxis nor apptainer" ;;
esac
partition=${partition:-$SITE_PARTITION} account=${account:-$SITE_ACCOUNT} qos=${qos:-$SITE_QOS}
cpus=${cpus:-$SITE_CPUS_PER_TASK}

# --- the runs
if [[ -n $SITE_VENV ]]; then
    here=$SITE_VENV/bin/python
    [[ -x $here ]] || fail "$site: SITE_VENV: no $here"
else
    here=$(find_python "$repository") ||
        fail "no python found; run \`make .venv/installed\`, or activate an environment"
fi
"$here" -c 'import hydra' 2>/dev/null ||
    fail "$here has no Hydra, which checks overrides before a job is queued; activate an environment that has it"

set -- "${SITE_OVERRIDES[@]}" "$@"
if ! device_is_given "$@"; then
    # Not auto: a job that asked for GPUs and sees none must not train on the CPU.
    device=cpu
    [[ $gpus -eq 0 ]] || device=cuda
    set -- "device=$device" "$@"
fi
options=(--nodes "$nodes" --tasks-per-node "$tasks" --gpus-per-node "$gpus")
[[ -z $job_name ]] || options+=(--job-name="$job_name")
[[ $sweep == no ]] || options+=(--sweep)
[[ $requeue == no ]] || options+=(--requeue)
runs=$(PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" "$here" "$repository/launch/jobs.py" \
    "${options[@]}" -- "$@") || exit $?
job_name='' job_dir='' job_runs=''
eval "$(head -n 3 <<<"$runs")"

# --- the container
python=$here
inside=() srun_options=("${SITE_SRUN[@]}") gpu_options=()
[[ $gpus -eq 0 ]] || gpu_options=(--gpu-bind=none)
if [[ -n $SITE_CONTAINER ]]; then
    python=$SITE_CONTAINER_PYTHON
    mounts=("$repository" "$PWD" "$job_dir" "${SITE_MOUNTS[@]}")
    if [[ $SITE_CONTAINER == pyxis ]]; then
        list=''
        for mount in "${mounts[@]}"; do
            [[ $mount == *:* ]] || mount=$mount:$mount
            list+=${list:+,}$mount
        done
        srun_options+=(--container-image="$SITE_IMAGE" --container-mounts="$list"
            --container-workdir="$PWD" "${SITE_CONTAINER_ARGS[@]}")
    else
        inside=(apptainer exec --pwd "$PWD")
        [[ $gpus -eq 0 ]] || inside+=(--nv)
        for mount in "${mounts[@]}"; do
            inside+=(--bind "$mount")
        done
        inside+=("${SITE_CONTAINER_ARGS[@]}" "$SITE_IMAGE")
    fi
fi

# --- the job
# Names with spaces need quotes, which sbatch takes away again.
line() {
    if [[ $2 == *[[:space:]]* ]]; then
        printf '#SBATCH %s="%s"\n' "$1" "$2"
    else
        printf '#SBATCH %s=%s\n' "$1" "$2"
    fi
}

# array NAME VALUE...: an assignment that bash reads back.
array() {
    local name=$1
    shift
    printf '%s=(' "$name"
    [[ $# -eq 0 ]] || printf ' %q' "$@"
    printf ' )\n'
}

logs=$job_dir/logs
render() {
    echo '#!/usr/bin/env bash'
    line --job-name "$job_name"
    line --nodes "$nodes"
    line --ntasks-per-node "$tasks"
    [[ -z $cpus ]] || line --cpus-per-task "$cpus"
    [[ $gpus -eq 0 || -z $SITE_GPU_REQUEST ]] || echo "#SBATCH ${SITE_GPU_REQUEST//'{n}'/$gpus}"
    [[ -z $time_limit ]] || line --time "$time_limit"
    [[ -z $partition ]] || line --partition "$partition"
    [[ -z $account ]] || line --account "$account"
    [[ -z $qos ]] || line --qos "$qos"
    line --chdir "$PWD"
    if [[ $sweep == yes ]]; then
        line --array "0-$((job_runs - 1))${max_parallel:+%$max_parallel}"
        line --output "$logs/slurm-%A_%a.log"
    else
        line --output "$logs/slurm-%j.log"
    fi
    echo '#SBATCH --open-mode=append'
    if [[ $requeue == yes ]]; then
        echo '#SBATCH --requeue'
        # To the processes, not to this script.
        line --signal "USR1@$grace"
    else
        echo '#SBATCH --no-requeue'
    fi
    local extra
    for extra in "${SITE_SBATCH[@]}" "${sbatch_lines[@]}"; do
        echo "#SBATCH $extra"
    done
    printf '\n# --- settings\n'
    printf 'repository=%q\npython=%q\n' "$repository" "$python"
    printf 'tasks_per_node=%s\nmax_stalls=%s\nrequeue=%s\n' "$tasks" "$max_stalls" "$requeue"
    printf 'head_suffix=%q\nsetup=%q\n' "$SITE_HEAD_SUFFIX" "$SITE_SETUP"
    array modules "${SITE_MODULES[@]}"
    array environment "${SITE_ENVIRONMENT[@]}"
    array inside "${inside[@]}"
    array srun_options "${srun_options[@]}"
    array gpu_options "${gpu_options[@]}"
    printf '%s\n\n# --- launch/job.sbatch\n' "$runs"
    tail -n +2 "$repository/launch/job.sbatch"
}

[[ $PWD != *[%\"\\$'\n']* ]] ||
    fail "$PWD: this folder's name has a character that SLURM takes for its own; submit from another"
if [[ $dry_run == yes ]]; then
    render
    exit 0
fi
command -v sbatch >/dev/null || fail "sbatch not found; submit from a machine of the cluster, or look with --dry-run"
# SLURM makes no folders for logs: without this one the job would end without a word.
mkdir -p "$logs"
script=$logs/job-$(date +%Y%m%d-%H%M%S)-$$.sbatch
render >"$script"
id=$(sbatch --parsable "$script") || fail "sbatch refused the job (above); it is $script"
id=${id%%;*} # with several clusters, ID;CLUSTER
{
    echo "submitted job $id ($job_name): $nodes nodes, $tasks processes each$([[ $sweep == no ]] || echo ", $job_runs runs")"
    echo "logs: $logs/slurm-$id*.log; each process: $([[ $sweep == no ]] || echo 'RUN_DIR/')logs/slurm-$id*-rank-*.log"
    [[ $sweep == no ]] || echo "compare: python tools/compare_runs.py $(printf '%q' "$job_dir")/*_* --output $(printf '%q' "$job_dir")"
} >&2
printf '%s\n' "$id"
