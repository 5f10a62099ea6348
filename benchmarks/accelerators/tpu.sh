#!/usr/bin/env bash
# On a TPU VM, from the repository's root: install, test the engine on the chips, measure, profile. Results go to
# benchmarks/results/ and profile-tpu/. A step that fails does not end it: what failed is said at the end, and is its status.
# About half an hour on a v5e; not run yet on any TPU.
#
#   bash benchmarks/accelerators/tpu.sh            # needs Python 3.11 or newer, and a package index
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python3 -m venv .venv-tpu
source .venv-tpu/bin/activate
pip install -q -e '.[tpu,test]'
python -c 'import jax; d = jax.devices(); assert d[0].platform == "tpu", d; print(len(d), d[0].device_kind)'

# The tests are written for eight devices: those that ask for more than there are here are skipped, by the engine's refusal.
cat > .venv-tpu/few_devices.py << 'PLUGIN'
import re

import pytest


def skipping(item):
    try:
        return (yield)
    except ValueError as error:
        if re.match(r"Expected devices=\d+ <= \d+", str(error)):
            pytest.skip(str(error))
        raise


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(skipping)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(skipping)
PLUGIN

failed=()
step() { # NAME COMMAND...
  local name=$1
  shift
  echo "== $name"
  "$@" || failed+=("$name ended with $?")
}

# One process at a time: a TPU belongs to the process that opened it. The tests compare float32 at 1e-5, and a TPU's products
# are of bfloat16 unless told otherwise; what is measured is the default.
step tests env JAX_PLATFORMS=tpu JAX_DEFAULT_MATMUL_PRECISION=highest PYTHONPATH=.venv-tpu \
  pytest -n 0 -p few_devices -rs tests/engine/test_lanes.py tests/algorithms/test_fed_avg.py tests/evaluation/test_evaluate.py
step accelerator.py python benchmarks/accelerators/accelerator.py
step lanes.py python benchmarks/engine/lanes.py
step 'data fetch' fedsim data fetch minilm_l6 20newsgroups
step profile fedsim profile --out profile-tpu
step 'profile --head' fedsim profile --head --out profile-tpu/head
step tpu_compile.py python benchmarks/accelerators/tpu_compile.py # its estimate beside what was measured

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo 'all steps ended well'
