# Sourced by torchrun.sh and slurm.sh.
# shellcheck shell=bash

# A user's mistake: one line, nothing started.
fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# need_value OPTION "$@": an option must be followed by a value that is no other option.
need_value() {
    [[ $# -ge 3 && -n $3 && $3 != --* ]] || fail "$1: a value is missing; write $1 VALUE"
}

# need_count OPTION VALUE [SMALLEST]
need_count() {
    local smallest=${3:-1}
    [[ $2 =~ ^[0-9]{1,9}$ && $((10#$2)) -ge $smallest ]] ||
        fail "$1: '$2' is not a whole number of $smallest or more"
}

# refuse_late_options KNOWN OVERRIDE...: options of the launcher after the first override would go
# to the trainer, which does not know them. KNOWN is a list with spaces around each.
refuse_late_options() {
    local known=$1 argument
    shift
    for argument in "$@"; do
        if [[ $argument == --* && $known == *" ${argument%%=*} "* ]]; then
            fail "${argument%%=*}: options of the launcher stand before the overrides"
        fi
    done
}

# find_python REPOSITORY: the active environment, which someone chose, before the .venv that
# `make` sets up, before whatever is on the PATH.
find_python() {
    local candidate
    for candidate in \
        "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" \
        "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
        "$1/.venv/bin/python" \
        "$(command -v python3 || true)"; do
        if [[ -n $candidate && -x $candidate ]]; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    return 1
}

# device_is_given OVERRIDE...
device_is_given() {
    local override
    for override in "$@"; do
        [[ $override =~ ^\+*(device|device\.kind)= ]] && return 0
    done
    return 1
}
