#!/bin/sh
# benchmarks.gpu on a machine that has python3 with jax for its GPU, and no package index:
#
#   sh launch/gpu.sh wheels    where a package index is: puts into .whl what else is needed, for Python 3.12 on x86-64 Linux
#   sh launch/gpu.sh 1         there, with the folder .whl beside the code: the first part; arguments after it are passed on
#   sh launch/gpu.sh 2         the second
#
# OUT is the folder of the results, runs/gpu by default; with another one, what is in runs/gpu is copied to it first, so that
# a run that was cut off goes on. COMMIT says which commit this is, where there is no git.
set -eu
cd "$(dirname "$0")/.."

# What the requirements name and images for GPUs lack: of the input pipeline and configs, then of attention on Hopper.
PACKAGES="ml_collections>=1.1,<2 grain>=0.2.18,<0.3 array-record>=0.8.1 portpicker tensorboardX>=2.6.2,<3
  tokamax==0.0.17 einshape immutabledict qwix>=0.1.2 xprof>=2.23.1 fire termcolor
  pydantic==2.14.4 pydantic-core==2.50.5 annotated-types>=0.6 typing-inspection>=0.4.4 typing-extensions>=4.16"

wheels() {
  platforms=""
  for version in _2_28 _2_27 _2_24 _2_17 2014 1; do platforms="$platforms --platform manylinux${version}_x86_64"; done
  rm -rf .whl
  # shellcheck disable=SC2086  # both are lists of words
  "${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
    -d .whl $PACKAGES
  du -sh .whl
}

install() {
  site="${TMPDIR:-/tmp}/deepseek_jax-gpu-site"
  python3 -m pip install -q --root-user-action=ignore --no-index --no-deps --no-compile --no-cache-dir \
    --upgrade --target "$site" .whl/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  if ! JAX_PLATFORMS=cpu python3 -c "import tokamax._src.ops.attention.pallas_mosaic_gpu_kernel_sm90"; then
    echo "tokamax cannot be imported, see above: attention is XLA's"
    rm -rf "$site"/tokamax*
  fi
}

usage="usage: sh launch/gpu.sh wheels, then there: sh launch/gpu.sh 1, and sh launch/gpu.sh 2"
case "${1:-}" in
  -h | --help | help) echo "$usage" ;;
  wheels) wheels ;;
  1 | 2)
    part=$1
    shift
    out="${OUT:-runs/gpu}"
    mkdir -p "$out"
    if [ -f runs/gpu/gpu.json ] && [ ! -f "$out/gpu.json" ]; then cp runs/gpu/* "$out/"; fi
    install
    exec python3 -m benchmarks.gpu "--part=$part" "--out=$out" ${COMMIT:+"--commit=$COMMIT"} "$@"
    ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
