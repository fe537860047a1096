#!/usr/bin/env bash
# Write constraints/py*.txt: for each Python, the newest version of every package that the requirements files allow and
# that comes as a wheel. Run it when a requirement changes, and regularly; then `bash run_tests.sh`.
#
#   bash utils/make_constraints.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet uv
mkdir -p constraints
for version in 3.8 3.10 3.11 3.12 3.13; do
    files=(requirements.txt requirements-serve.txt requirements-dev.txt)
    if [ "$version" = 3.8 ]; then
        files=(requirements-ipu.txt "${files[@]}")
    fi
    "$work/venv/bin/uv" pip compile --quiet --no-config --no-header --no-annotate --only-binary :all: --python-version "$version" \
        --python-platform linux --output-file "$work/pins" "${files[@]}"
    # requirements.txt pins PyTorch, which pins its CUDA packages; another installed PyTorch is kept.
    {
        echo "# Made by utils/make_constraints.sh: what run_train.sh and run_tests.sh install on Python $version."
        grep -v -E '^(torch|triton|nvidia-|cuda-)' "$work/pins"
    } > "$work/new"
    cp "$work/new" "constraints/py$version.txt"
    rm "$work/pins"
    echo "constraints/py$version.txt: $(grep -c == "constraints/py$version.txt") packages"
done
