#!/usr/bin/env bash
# Run once by Gradescope, when the autograder's image is built. The zip holds amft.py, tasks.py, what they import of harness/
# and recipes/, requirements.txt and course/, and setup.sh and run_autograder at its top. CPU wheels: no GPU is used, and the
# image stays small.
set -euo pipefail
cd /autograder/source
apt-get update -qq
apt-get install -y -qq python3 python3-venv util-linux
python=python3
if ! python3 -c "import tomllib" 2>/dev/null; then  # of Python 3.11
    apt-get install -y -qq python3.11 python3.11-venv
    python=python3.11
fi
$python -m venv venv
venv/bin/pip install -q --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' requirements.txt)"
venv/bin/pip install -q -r requirements.txt
venv/bin/python -c "import pytest, torch, transformers"
