# Sourced by run_train.sh and run_tests.sh: sets `python` to an interpreter that has what a requirements file lists.
#
# An active virtual environment, conda environment or Poplar SDK is used as it is; else .venv is made beside this project.
# An installed PyTorch is never replaced: it may be a CUDA build, or the one that the Poplar SDK's wheel needs.

set_up() {  # set_up PROJECT_FOLDER REQUIREMENTS_FILE...
    local root=$1 file marker home wanted
    shift
    if [ -n "${VIRTUAL_ENV:-}" ] || [ -n "${CONDA_PREFIX:-}" ] || [ -n "${POPLAR_SDK_ENABLED:-}" ]; then
        python=$(command -v python3 || command -v python) || { echo "error: no python3 in the active environment" >&2; exit 1; }
        home=${VIRTUAL_ENV:-${CONDA_PREFIX:-$root/.cache}}
    else
        home=$root/.venv
        python=$home/bin/python
        if [ ! -x "$python" ]; then
            command -v python3 >/dev/null || { echo "error: python3 is not installed; install Python 3.8 or newer" >&2; exit 1; }
            python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' ||
                { echo "error: $(python3 --version) is too old; install Python 3.8 or newer" >&2; exit 1; }
            echo "making a virtual environment in $home"
            python3 -m venv "$home" || { rm -rf "$home"; echo "error: cannot make $home; is the package python3-venv installed?" >&2; exit 1; }
        fi
    fi
    if [ -n "${POPLAR_SDK_ENABLED:-}" ] && [ -f "$root/requirements-ipu.txt" ]; then
        set -- "$root/requirements-ipu.txt" "${@:2}"
    fi
    # Installed before, with these very lists: nothing to do, and no network needed.
    marker=$home/.mini_dalle_requirements
    wanted=$(cat "$@" | cksum)
    if [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ]; then
        return
    fi
    echo "installing $(basename -a "$@" | tr '\n' ' ')(once)"
    if "$python" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 0))' 2>/dev/null; then
        cat "$@" | grep -v -e '^torch[=><]' -e '^-r ' | "$python" -m pip install --quiet -r /dev/stdin
    else
        for file in "$@"; do "$python" -m pip install --quiet -r "$file"; done
    fi || { echo "error: pip could not install the requirements; see its message above" >&2; exit 1; }
    mkdir -p "$home" && printf '%s\n' "$wanted" > "$marker"
}
