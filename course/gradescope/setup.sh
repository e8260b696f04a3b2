#!/usr/bin/env bash
# Run once by Gradescope when the autograder's image is built. The zip holds this repository's amft.py, tasks.py and
# course/ at its top, beside copies of setup.sh and run_autograder. CPU wheels: no GPU is used, and the image stays small.
set -euo pipefail
apt-get update -qq && apt-get install -y -qq python3 python3-venv util-linux
cd /autograder/source
python3 -m venv venv
grep '^torch==' requirements.txt | venv/bin/pip install -q --index-url https://download.pytorch.org/whl/cpu -r /dev/stdin
venv/bin/pip install -q -r requirements.txt
venv/bin/python -c "import sys, torch, transformers; assert sys.version_info >= (3, 11), 'choose an image with Python 3.11 or later'"
