#!/usr/bin/env bash
# On a TPU VM, from the repository's root: install, test the engine on the chips, measure, profile. Results go to
# benchmarks/results/ and profile-tpu/. Any error ends it. About half an hour on a v5e; not run yet on any TPU.
#
#   bash benchmarks/tpu.sh            # needs Python 3.11 or newer, and a package index
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python3 -m venv .venv-tpu
source .venv-tpu/bin/activate
pip install -q -e '.[tpu,test]'
python -c 'import jax; d = jax.devices(); assert d[0].platform == "tpu", d; print(len(d), d[0].device_kind)'

# One process at a time: a TPU belongs to the process that opened it.
JAX_PLATFORMS=tpu pytest -n 0 tests/test_lanes.py tests/test_fed_avg.py tests/test_evaluate.py
for script in benchmarks/accelerator.py benchmarks/lanes.py; do
  if [ -f "$script" ]; then python "$script"; fi
done
fedsim data fetch minilm_l6 20newsgroups
fedsim profile --out profile-tpu
fedsim profile --head --out profile-tpu/head
python benchmarks/tpu_compile.py || true # its estimate beside what was measured
