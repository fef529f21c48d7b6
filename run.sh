#!/usr/bin/env bash
# Set up and run: see ./run.sh --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
    cat <<'TEXT'
./run.sh                                   set up, then train configs/quickstart.yaml: minutes on two CPU cores
./run.sh configs/NAME.yaml [--KEY VALUE]   set up, then train that preset; ./run.sh configs/NAME.yaml --help lists the keys
./run.sh test [PYTEST ARGUMENTS]           set up, then lint, type-check and run the test suite: some minutes on two cores
./run.sh test quick [PYTEST ARGUMENTS]     set up, then lint and run the tests that start no process: under a minute

TOPOLOGY=NAME ./run.sh ...                 launch with accelerate_configs/NAME.yaml: cpu, cpu_2, gpu, gpu_8, fsdp2_8.
                                           Without it: gpu where there is an NVIDIA GPU, else cpu.
PYTHON=python3.12 ./run.sh                 the interpreter that .venv is made with (3.10 or newer)

Set-up makes .venv and installs the pinned set of pyproject.toml, and of what that needs the versions in .ci/constraints.txt;
with nothing changed it installs nothing.
The same command in the same run directory goes on where the run was stopped.
Exit code: 0 done, 2 a setting that cannot be used (one line says which), else stopped or failed.
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# setup EXTRAS: .venv with the pinned set and, for the tests, their tools. .ci/constraints.txt has the version of all that
# they need in turn. The stamp is written last, so that an interrupted installation is taken up again.
setup() {
    local extras=$1 python=${PYTHON:-python3} stamp wanted install
    wanted=$(<pyproject.toml)$(<.ci/constraints.txt)
    for stamp in .venv/installed-"$extras" .venv/installed-pinned,test; do # the tests' set holds the other
        [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
    done
    command -v "$python" >/dev/null || fail "$python not found: install Python 3.10 or newer, or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" --version) is too old: Python 3.10 or newer is needed; set PYTHON"
    if [[ ! -x .venv/bin/pip ]]; then
        rm -rf .venv # what an attempt without ensurepip leaves has no pip
        "$python" -m venv .venv || fail "$python has no venv module (on Debian: apt install python3-venv)"
    fi
    echo "installing into .venv (1.5 GB without CUDA) ..." >&2
    [[ $(<pyproject.toml) =~ torch==[0-9.]+ ]] # torch first and pinned: whatever asks for any torch finds it there
    install=".venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt"
    $install "${BASH_REMATCH[0]}"
    $install --editable ".[$extras]"
    echo "$wanted" >.venv/installed-"$extras"
}

train() {
    local preset=$1 topology=${TOPOLOGY:-} settings argument
    shift
    [[ -f $preset ]] || fail "no preset $preset: choose one of $(echo configs/*.yaml)"
    if [[ -z $topology ]]; then
        if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then topology=gpu; else topology=cpu; fi
    fi
    settings=accelerate_configs/$topology.yaml
    [[ -f $settings ]] || fail "TOPOLOGY=$topology: no $settings; choose one of $(echo accelerate_configs/*.yaml)"
    setup pinned
    for argument in "$@"; do
        [[ $argument != -h && $argument != --help ]] || exec .venv/bin/python recipe/train.py --help
    done
    [[ $(<"$settings") =~ num_processes:\ ([0-9]+) ]]
    local ranks=${BASH_REMATCH[1]}
    # A mistake in a setting is answered here, in a moment and in one line, before anything is launched.
    WORLD_SIZE=$ranks .venv/bin/python -m recipe plan --config "$preset" "$@" >/dev/null
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(.venv/bin/python -c \
        'import os, sys; print(max(1, (os.cpu_count() or 1) // int(sys.argv[1])))' "$ranks")}
    # Whoever signals this process signals what it becomes: the training, or a launcher that waits for it.
    if ((ranks == 1)); then
        [[ $(<"$settings") =~ use_cpu:\ (true|false) ]]
        export ACCELERATE_USE_CPU=${BASH_REMATCH[1]}
        exec .venv/bin/python recipe/train.py --config "$preset" "$@"
    fi
    exec .venv/bin/python -m recipe launch --quiet --config_file "$settings" recipe/train.py --config "$preset" "$@"
}

case ${1:-} in
-h | --help) usage ;;
test)
    shift
    setup pinned,test
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    if [[ ${1:-} == quick ]]; then
        set -- --quick -n 2 "${@:2}" # nothing waits there
    else
        .venv/bin/mypy
    fi
    # What tests leave among the temporary files, as launchers and compilers that are killed do, goes with them.
    TMPDIR=$(mktemp -d)
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
    .venv/bin/python -m pytest "$@"
    ;;
"") # again after it is complete trains it again; after it was stopped it goes on
    if [[ -d runs/quickstart/final ]]; then train configs/quickstart.yaml --resume fresh; else train configs/quickstart.yaml; fi
    ;;
--*) train configs/quickstart.yaml "$@" ;;
*) train "$@" ;;
esac
