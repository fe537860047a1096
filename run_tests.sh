#!/usr/bin/env bash
# Run the tests. Sets up its environment.
#
#   bash run_tests.sh                    the fast suite, in up to four processes, and the style and type checks
#   bash run_tests.sh --slow             adds the slow tests
#   bash run_tests.sh --latest           with the newest versions of all packages but PyTorch, in .venv/latest
#   bash run_tests.sh tests/test_bpe.py  anything else goes to pytest
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$root/utils/setup_env.sh"
latest=
for word in "$@"; do
    shift
    if [ "$word" = --latest ]; then latest=--latest; else set -- "$@" "$word"; fi
done
set_up "$root" $latest "$root/requirements.txt" "$root/requirements-serve.txt" "$root/requirements-dev.txt"
cd "$root"
# Peers and their requirements do not install beside this PyTorch; the tests need their code alone.
"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch_fidelity") is None)' ||
    "$python" -m pip install --quiet --no-deps dalle-pytorch==1.6.6 axial-positional-embedding==0.3.12 \
        rotary-embedding-torch==0.9.1 torch-fidelity==0.4.0
# The studio is tested in a browser, where there is one (Debian: apt-get install chromium-driver).
if command -v chromedriver >/dev/null; then
    "$python" -c 'import selenium' 2>/dev/null || "$python" -m pip install --quiet selenium==4.51.0
fi
if [ $# -eq 0 ]; then
    "$python" -m ruff check .
    "$python" -m mypy
fi
case "$*" in
    # One process for each processor, as most tests use one thread. A file's tests share fixtures.
    ''|--slow) set -- "$@" --numprocesses logical --maxprocesses 4 --dist loadfile ;;
esac
exec "$python" -m pytest -q "$@"
