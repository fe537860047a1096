#!/usr/bin/env bash
# Download COCO 2017: photos and captions, about 26 GB of disk space in the end. Needs only Python 3.8 or newer.
#
#   bash utils/download_coco_dataset.sh                    into data/COCO
#   bash utils/download_coco_dataset.sh --dir /disk/COCO   somewhere else
#   bash utils/download_coco_dataset.sh --val-only         validation photos and captions only: 2 GB
#
# Can be interrupted and run again: it resumes where it stopped and downloads only what is missing. Archives downloaded
# by other means are used if they are in that folder under their own names (train2017.zip and so on). Each archive is
# verified by its sha256, unpacked and deleted; where the disk is too small for both, it is truncated while unpacked.
#
# COCO_URL=... downloads from a mirror with the same folders as http://images.cocodataset.org.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
base=${COCO_URL:-http://images.cocodataset.org}

# What to unpack | archive on the server | its bytes | its sha256 | a file pattern and how many match | GB on disk
# The server publishes no checksums; these are of the files it has served since 2017.
archives="
annotations|annotations/annotations_trainval2017.zip|252907541|113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268|captions_*2017.json|2|1
val2017|zips/val2017.zip|815585330|4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05|*.jpg|5000|1
train2017|zips/train2017.zip|19336861798|69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929|*.jpg|118287|24
"
# Tests, and mirrors of other archives, provide their own list.
if [ -n "${COCO_ARCHIVES:-}" ]; then archives=$(cat "$COCO_ARCHIVES"); fi

fail() { echo "error: $*" >&2; exit "${status:-1}"; }

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }

dir=$root/data/COCO
val_only=false
while [ $# -gt 0 ]; do
    case $1 in
        --dir) [ -n "${2:-}" ] || status=2 fail "--dir needs a folder"; dir=$2; shift 2 ;;
        --dir=?*) dir=${1#--dir=}; shift ;;
        --val-only) val_only=true; shift ;;
        -h|--help) usage; exit 0 ;;
        *) status=2 fail "unknown argument '$1': expected --dir DIR, --val-only or --help" ;;
    esac
done

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    # The environment made by run_train.sh has tqdm for progress bars.
    if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; fi
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || fail "Python 3.8 or newer is needed"

mkdir -p "$dir" || fail "--dir $dir: cannot make this folder"
dir=$(cd "$dir" && pwd)

complete() {  # complete FOLDER PATTERN NUMBER: are its files all there?
    [ -d "$dir/$1" ] && [ "$(find "$dir/$1" -maxdepth 1 -type f -name "$2" ! -name '.*' | wc -l)" -ge "$3" ]
}

# What is missing, and the space it needs, less what an interrupted download has already written.
missing=""
needed=0
while IFS='|' read -r folder path bytes sha256 pattern number gigabytes; do
    if [ -z "$folder" ] || { $val_only && [ "$folder" = train2017 ]; }; then continue; fi
    if complete "$folder" "$pattern" "$number"; then
        echo "$dir/$folder is complete"
        continue
    fi
    missing="$missing$folder|$path|$bytes|$sha256|$pattern|$number
"
    here=0
    for file in "$dir/${path##*/}" "$dir/${path##*/}.part"; do
        if [ -f "$file" ]; then here=$((here + $(wc -c < "$file"))); fi
    done
    if [ -d "$dir/$folder" ]; then here=$((here + $(du -sk "$dir/$folder" | cut -f 1) * 1024)); fi
    left=$((gigabytes * 1000000000 - here))
    if [ "$left" -gt 0 ]; then needed=$((needed + left)); fi
done <<< "$archives"

if [ -n "$missing" ]; then
    free=$(($(df -Pk "$dir" | awk 'NR == 2 { print $4 }') * 1024))
    if ! $val_only; then echo "COCO 2017 takes 26 GB of disk space (its archives, and captions as text files, included)"; fi
    echo "to download: $(cut -d '|' -f 1 <<< "$missing" | tr '\n' ' ')- $(((needed + 999999999) / 1000000000)) GB more in $dir, where $((free / 1000000000)) GB are free"
    if [ "$free" -lt "$needed" ]; then
        fail "not enough space in $dir; give another folder with --dir, or download less with --val-only"
    fi
fi

while IFS='|' read -r folder path bytes sha256 pattern number; do
    if [ -z "$folder" ]; then continue; fi
    (cd "$root" && exec "$PYTHON" -m utils.archives --sha256 "$sha256" --size-limit "$bytes" --unpack "$dir" \
        "$base/$path" "$dir/${path##*/}" < /dev/null) || exit $?
    complete "$folder" "$pattern" "$number" || fail "$dir/$folder is still incomplete: expected $number files $pattern"
done <<< "$missing"

split=train2017
if $val_only; then split=val2017; fi
if [ "$dir" = "$root/data/COCO" ] && ! $val_only; then flags=""; else
    flags=$(printf ' --captions %q --out-dir %q' "$dir/annotations/captions_$split.json" "$dir/${split}_captions")
fi
echo "COCO 2017 is complete in $dir. Next, write the captions as text files:"
echo "    python data/process_trainset.py$flags"
