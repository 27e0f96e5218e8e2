#!/bin/sh
# Starts flowhn on the PyTorch of this machine.
#
# PyTorch @VERSION@ is looked for in this order: $LIBTORCH (its folder, with lib/ in it), then $FLOWHN_PYTHON or else python3, which
# says where its torch package is. Relative paths on the command line, and those inside configurations, start at this
# script's folder; so do the run directories.
set -eu

fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    for help in "$@"; do
        printf '  help: %s\n' "$help" >&2
    done
    exit 1
}

# The script may have been called through links.
self=$0
while [ -L "$self" ]; do
    to=$(readlink "$self")
    case $to in
    /*) self=$to ;;
    *) self=$(dirname "$self")/$to ;;
    esac
done
root=$(CDPATH= cd -- "$(dirname -- "$self")" && pwd -P)

install="install it with: python3 -m pip install torch==@VERSION@"
if [ -n "${LIBTORCH:-}" ]; then
    torch=$LIBTORCH
    whose="LIBTORCH=$LIBTORCH"
else
    python=${FLOWHN_PYTHON:-python3}
    command -v "$python" >/dev/null 2>&1 ||
        fail "there is no $python, which knows where PyTorch is" "install Python 3 and PyTorch @VERSION@, or set FLOWHN_PYTHON to a Python that has it" "or set LIBTORCH to the folder of a libtorch"
    torch=$("$python" -c '
from importlib.util import find_spec
torch = find_spec("torch")
print(list(torch.submodule_search_locations)[0] if torch and torch.submodule_search_locations else "")
') || fail "$python does not run" "set FLOWHN_PYTHON to a Python 3 that has PyTorch @VERSION@"
    whose=$python
    [ -n "$torch" ] || fail "$python has no PyTorch" "$install" "or set FLOWHN_PYTHON to a Python that has it"
fi
case $torch in
/*) ;;
*) torch=$PWD/$torch ;;
esac

# A libtorch states its version in a file of its own, a Python package in a module; neither is started for it.
version=
if [ -r "$torch/build-version" ]; then
    version=$(cat "$torch/build-version")
elif [ -r "$torch/version.py" ]; then
    version=$(sed -n "s/^__version__ = ['\"]\\([^'\"]*\\).*/\\1/p" "$torch/version.py")
fi
case $version in
'') fail "$whose: there is no PyTorch in $torch" "$install" ;;
@VERSION@ | @VERSION@+*) ;;
*) fail "$whose: PyTorch $version is in $torch, and this program needs @VERSION@" "$install" ;;
esac
[ -e "$torch/lib/libtorch_cpu.so" ] || fail "$whose: $torch/lib has no libtorch_cpu.so" "$install"
@CUDA@[ -e "$torch/lib/libtorch_cuda.so" ] ||
@CUDA@    fail "$whose: PyTorch $version in $torch is for the CPU only, and this program was built for CUDA" \
@CUDA@        "install the CUDA build: python3 -m pip install torch==@VERSION@ --index-url https://download.pytorch.org/whl/cu130"

LD_LIBRARY_PATH=$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
cd -- "$root"
exec "$root/bin/flowhn" "$@"
