# Sourced by run_train.sh and run_tests.sh: sets `python` to an interpreter with the packages of the requirements files,
# in the versions of constraints/.
#
# An active virtual environment, conda environment or Poplar SDK is used; else .venv is made in the project folder.
# An installed PyTorch is never replaced: it may be a CUDA build, or the one that the Poplar SDK's wheel needs.

set_up() {  # set_up PROJECT_FOLDER [--latest] REQUIREMENTS_FILE...    --latest: newest versions, in .venv/latest
    local root=$1 latest='' home version constraints which marker wanted torch skip='^-r ' pins='^$' more=''
    shift
    if [ "$1" = --latest ]; then
        latest=1
        shift
    fi
    if [ -n "${POPLAR_SDK_ENABLED:-}" ]; then
        [ -z "$latest" ] || { echo "error: --latest: the Poplar SDK's Python has no newer versions; omit it" >&2; exit 1; }
        set -- "$root/requirements-ipu.txt" "${@:2}"
    fi
    if [ -z "$latest" ] && [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}${POPLAR_SDK_ENABLED:-}" ]; then
        python=$(command -v python3 || command -v python) || { echo "error: no python3 in the active environment" >&2; exit 1; }
        home=${VIRTUAL_ENV:-${CONDA_PREFIX:-$root/.cache}}
    else
        home=$root/.venv${latest:+/latest}
        python=$home/bin/python
        if [ ! -x "$python" ]; then
            command -v python3 >/dev/null || { echo "error: python3 is not installed; install Python 3.10 to 3.13" >&2; exit 1; }
            python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' ||
                { echo "error: $(python3 --version) is too old; install Python 3.10 to 3.13" >&2; exit 1; }
            echo "making a virtual environment in $home"
            python3 -m venv "$home" || { rm -rf "$home"; echo "error: cannot make $home; is the package python3-venv installed?" >&2; exit 1; }
        fi
    fi
    version=$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
    constraints=$root/constraints/py$version.txt
    if [ -n "$latest" ]; then
        which="newest versions"
        constraints=/dev/null
    elif [ -f "$constraints" ]; then
        which="versions of constraints/py$version.txt, once"
    else
        which="newest versions: there are no constraints for Python $version, use 3.10 to 3.13"
        constraints=/dev/null
    fi
    # Already installed from these lists: nothing to do, no network needed.
    marker=$home/.mini_dalle_requirements
    wanted=$(cat "$@" "$constraints" | cksum)
    if [ -z "$latest" ] && [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ]; then
        return
    fi
    echo "installing $(basename -a "$@" | tr '\n' ' ')($which)"
    if [ -z "$latest" ] && torch=$("$python" -c 'import torch; print(torch.__version__)' 2>/dev/null); then
        case $torch in
            [01].*) ;;
            2.[0-2].*) skip='^-r |^torch[=><]' pins='^numpy==2' more='numpy<2' ;;  # these do not support NumPy 2
            *) skip='^-r |^torch[=><]' ;;
        esac
    fi
    { grep -h -v -E "$skip" "$@"; echo "$more"; } | "$python" -m pip install --quiet \
        ${latest:+--upgrade --upgrade-strategy eager} -c <(grep -v -E "$pins" "$constraints") -r /dev/stdin ||
        { echo "error: pip could not install the requirements; see its message above" >&2; exit 1; }
    mkdir -p "$home" && printf '%s\n' "$wanted" > "$marker"
}
